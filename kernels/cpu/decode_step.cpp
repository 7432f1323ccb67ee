// One decoding step of GPT-2 on a processor: T tokens of each of B rows in, logits out. T is 1, or
// more for a short prompt and for tokens that were proposed.
//
// A step reads every weight once and does little else, so memory is the limit: all of it is one
// call, and a weight meets all rows while it is in a register. Threads share the features of each
// product and the heads of attention, and wait for each other four times per layer. Weights are
// fp32, bf16 or int8 with a scale per feature; all else is fp32, and so is every sum. The graph is
// OpenAI's, as in fastgpt2/generate/step.py, which prepares the arguments.
// N = B T tokens, C width, F features, H heads, D head size, S keys of the cache, V vocabulary.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// a vector register of fp32
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct Bf16 {
    uint16_t bits;
};

template <class W>
float widen(W x) { return x; }
float widen(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// the nearest bf16, ties to even
void store(float x, Bf16* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = uint16_t(x == x ? rounded : 0x7fc0);
}
void store(float x, float* to) { *to = x; }

Vec load(const float* from) {
    Vec out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

#if defined(__AVX512F__)
Vec load(const int8_t* from) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Vec(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}
Vec load(const Bf16* from) {
    __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}
#elif defined(__AVX2__)
Vec load(const int8_t* from) {
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return Vec(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
}
Vec load(const Bf16* from) {
    __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
#else
Vec load(const int8_t* from) {
    Vec out;
    for (int i = 0; i < LANES; i++) out[i] = from[i];
    return out;
}
Vec load(const Bf16* from) {
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = int32_t(uint32_t(from[i].bits) << 16);
    return Vec(out);
}
#endif

#if defined(__AVX512F__)
float sum(Vec x) { return _mm512_reduce_add_ps(__m512(x)); }
#elif defined(__AVX2__)
float sum(Vec x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#endif

// sum_i a_i b_i over n
template <class E>
float dot(const E* a, const float* b, int64_t n) {
    Vec even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        even += load(a + i) * load(b + i);
        odd += load(a + i + LANES) * load(b + i + LANES);
    }
    float out = sum(even + odd);
    for (; i < n; i++) out += widen(a[i]) * b[i];
    return out;
}

// Threads of one step wait here for the others.
class Barrier {
   public:
    explicit Barrier(int count) : count_(count) {}

    void wait() {
        if (count_ == 1) return;
        int round = round_.load();
        if (waiting_.fetch_add(1) + 1 == count_) {
            waiting_.store(0);
            round_.fetch_add(1);
            return;
        }
        // who shares its processor with others lets them run
        for (int spins = 0; round_.load() == round; spins++) {
            if (spins > 4000) std::this_thread::yield();
        }
    }

   private:
    const int count_;
    std::atomic<int> waiting_{0}, round_{0};
};

}  // namespace

// y_nf = scale_f sum_c weight_fc x_nc + bias_f
struct Matrix {
    const void* weight;
    const float* scale;  // null for 1
    const float* bias;   // null for 0
    int64_t features, width;
};

struct Norm {
    const float* weight;
    const float* bias;  // null for 0
    double eps;
};

struct Layer {
    Norm norm_1;
    Matrix qkv, proj;
    Norm norm_2;
    Matrix fc, out;
};

struct Model {
    Matrix tokens;           // (V, C)
    const void* positions;   // (block_size, C), in the cache's dtype
    const Layer* layers;
    Norm norm;
    Matrix head;
    int64_t n_layer, n_head, block_size;
    int32_t weight_kind;  // 0 fp32, 1 bf16, 2 int8
    int32_t cache_kind;   // 0 fp32, 1 bf16
    int32_t erf;          // the form of the GELU
};

struct Step {
    const int64_t* tokens;   // (B, T)
    const int64_t* lengths;  // (B,), keys of each row that are in the cache
    const int64_t* wanted;   // (n_wanted,), the tokens of the B T whose logits are wanted
    void* const* kv;         // of each layer its first row: (2, B, H, S, D)
    float* space;            // space_of(...) numbers
    float* logits;           // (n_wanted, V)
    int64_t B, T, n_wanted, S;
    int64_t plane;  // from a key to its value, in elements
    int64_t threads;
};

namespace {

// [first, stop) of what one thread does of n things
struct Part {
    int64_t first, stop;
    Part(int64_t n, int64_t thread, int64_t threads)
        : first(n * thread / threads), stop(n * (thread + 1) / threads) {}
};

// what a product does with what is there
enum Write { REPLACE, ADD };

// FEATURES features of ROWS rows
template <int FEATURES, int ROWS, class W>
void tile(const Matrix& m, int64_t f, int64_t n, const float* x, float* out, Write how) {
    const int64_t C = m.width;
    const W* weight = static_cast<const W*>(m.weight) + f * C;
    x += n * C;
    // sums that do not wait for each other, in registers if none of this is a loop
    constexpr int SUMS = ROWS == 1 ? 4 : 4 / ROWS, STEP = SUMS * LANES;
    Vec sums[FEATURES][ROWS][SUMS] = {};
    int64_t c = 0;
    for (; c + STEP <= C; c += STEP) {
        // a stream of fp32 is all that the processor foresees: narrow weights are asked for 8 KB
        // ahead, and of two streams the next two features
        if (FEATURES > 1)
            for (int i = 0; i < FEATURES; i++) __builtin_prefetch(weight + (i + FEATURES) * C + c);
        else if (sizeof(W) < sizeof(float))
            __builtin_prefetch(reinterpret_cast<const char*>(weight + c) + 8192);
#pragma GCC unroll 4
        for (int k = 0; k < SUMS; k++) {
            const float* columns = x + c + k * LANES;
#pragma GCC unroll 2
            for (int i = 0; i < FEATURES; i++) {
                const Vec w = load(weight + i * C + c + k * LANES);
#pragma GCC unroll 4
                for (int j = 0; j < ROWS; j++) sums[i][j][k] += w * load(columns + j * C);
            }
        }
    }
    for (int i = 0; i < FEATURES; i++) {
        const float scale = m.scale ? m.scale[f + i] : 1, bias = m.bias ? m.bias[f + i] : 0;
        for (int j = 0; j < ROWS; j++) {
            Vec total = sums[i][j][0];
            for (int k = 1; k < SUMS; k++) total += sums[i][j][k];
            float value = sum(total);
            for (int64_t rest = c; rest < C; rest++)
                value += widen(weight[i * C + rest]) * x[j * C + rest];
            float& y = out[(n + j) * m.features + f + i];
            y = value * scale + bias + (how == ADD ? y : 0);
        }
    }
}

// a product, x (N, C) -> out (N, F): this thread's features
template <class W>
void product(const Matrix& m, const float* x, int64_t N, Part part, float* out, Write how) {
    for (int64_t f = part.first; f < part.stop; f += 2) {
        // the weights come from memory once, then from the nearest cache
        const int64_t features = std::min<int64_t>(2, part.stop - f);
        int64_t n = 0;
        if (features == 2) {
            for (; n + 4 <= N; n += 4) tile<2, 4, W>(m, f, n, x, out, how);
            for (; n + 2 <= N; n += 2) tile<2, 2, W>(m, f, n, x, out, how);
        }
        for (; n < N; n++)
            for (int64_t i = 0; i < features; i++) tile<1, 1, W>(m, f + i, n, x, out, how);
    }
}

// (x - mean) rstd weight + bias, x (N, C)
void normalize(const Norm& norm, const float* x, float* out, int64_t N, int64_t C) {
    for (int64_t n = 0; n < N; n++, x += C, out += C) {
        double total = 0, squares = 0;
        for (int64_t c = 0; c < C; c++) total += x[c];
        const float mean = float(total / double(C));
        for (int64_t c = 0; c < C; c++) squares += double(x[c] - mean) * (x[c] - mean);
        const float rstd = float(1 / std::sqrt(squares / double(C) + norm.eps));
        for (int64_t c = 0; c < C; c++) {
            out[c] = (x[c] - mean) * rstd * norm.weight[c] + (norm.bias ? norm.bias[c] : 0);
        }
    }
}

// the tanh form by an exponential: tanh(u) = 1 - 2 / (exp(2 u) + 1)
float gelu(float x, bool erf) {
    if (erf) return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    const float u = 0.79788456f * (x + 0.044715f * x * x * x);
    return x * (1 - 1 / (std::exp(2 * u) + 1));
}

// softmax(q k^T / sqrt(D)) v over n keys: k and v (n, D), out (D,)
template <class E>
void attend(const float* q, const E* k, const E* v, int64_t n, int64_t D, float* probs, float* out) {
    const float scale = float(1 / std::sqrt(double(D)));
    float largest = -INFINITY, total = 0;
    for (int64_t s = 0; s < n; s++) {
        probs[s] = dot(k + s * D, q, D) * scale;
        largest = std::fmax(largest, probs[s]);
    }
    for (int64_t s = 0; s < n; s++) total += probs[s] = std::exp(probs[s] - largest);
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        Vec sums = {};
        for (int64_t s = 0; s < n; s++) sums += load(v + s * D + d) * probs[s];
        sums /= total;
        std::memcpy(out + d, &sums, sizeof sums);
    }
    for (; d < D; d++) {
        out[d] = 0;
        for (int64_t s = 0; s < n; s++) out[d] += widen(v[s * D + d]) * probs[s];
        out[d] /= total;
    }
}

// what one thread does of a step; W of weights, E of positions, keys and values
template <class W, class E>
void run(const Model& model, const Step& step, Barrier& barrier, int64_t thread) {
    const int64_t B = step.B, T = step.T, N = B * T, S = step.S;
    const int64_t C = model.tokens.width, H = model.n_head, D = C / H;
    const int64_t F = model.layers[0].fc.features;
    // shared, one after the other
    float* x = step.space;
    float* qkv = x + N * C;
    float* heads = qkv + N * 3 * C;
    float* hidden = heads + N * C;
    // this thread's own
    float* normalized = hidden + N * F + thread * (N * C + S);
    float* probs = normalized + N * C;
    auto part = [&](int64_t count) { return Part(count, thread, step.threads); };

    const Part columns = part(C), features = part(F), pairs = part(B * H);
    for (int64_t n = 0; n < N; n++) {
        // beyond the last position there are only proposals that will not be taken
        const int64_t at = std::min(step.lengths[n / T] + n % T, model.block_size - 1);
        const int64_t token = step.tokens[n];
        const W* row = static_cast<const W*>(model.tokens.weight) + token * C;
        const E* position = static_cast<const E*>(model.positions) + at * C;
        const float scale = model.tokens.scale ? model.tokens.scale[token] : 1;
        for (int64_t c = columns.first; c < columns.stop; c++)
            x[n * C + c] = widen(row[c]) * scale + widen(position[c]);
    }
    barrier.wait();
    for (int64_t i = 0; i < model.n_layer; i++) {
        const Layer& layer = model.layers[i];
        normalize(layer.norm_1, x, normalized, N, C);
        product<W>(layer.qkv, normalized, N, part(3 * C), qkv, REPLACE);
        barrier.wait();
        for (int64_t pair = pairs.first; pair < pairs.stop; pair++) {
            const int64_t b = pair / H, h = pair % H, held = step.lengths[b];
            E* k = static_cast<E*>(step.kv[i]) + pair * S * D;
            E* v = k + step.plane;
            for (int64_t t = 0; t < T; t++) {
                const float* q = qkv + (b * T + t) * 3 * C + h * D;
                for (int64_t d = 0; d < D; d++) {
                    store(q[C + d], k + (held + t) * D + d);
                    store(q[2 * C + d], v + (held + t) * D + d);
                }
                attend(q, k, v, held + t + 1, D, probs, heads + (b * T + t) * C + h * D);
            }
        }
        barrier.wait();
        product<W>(layer.proj, heads, N, columns, x, ADD);
        barrier.wait();
        normalize(layer.norm_2, x, normalized, N, C);
        product<W>(layer.fc, normalized, N, features, hidden, REPLACE);
        for (int64_t n = 0; n < N; n++)
            for (int64_t f = features.first; f < features.stop; f++)
                hidden[n * F + f] = gelu(hidden[n * F + f], model.erf);
        barrier.wait();
        product<W>(layer.out, hidden, N, columns, x, ADD);
        barrier.wait();
    }
    for (int64_t i = 0; i < step.n_wanted; i++)
        normalize(model.norm, x + step.wanted[i] * C, normalized + i * C, 1, C);
    const Part vocabulary = part(model.head.features);
    product<W>(model.head, normalized, step.n_wanted, vocabulary, step.logits, REPLACE);
}

template <class W, class E>
void run_all(const Model& model, const Step& step) {
    Barrier barrier(int(step.threads));
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < step.threads; thread++)
        others.emplace_back([&, thread] { run<W, E>(model, step, barrier, thread); });
    run<W, E>(model, step, barrier, 0);
    for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

// numbers that a step writes beside its logits
int64_t space_of(const Model* model, const Step* step) {
    const int64_t C = model->tokens.width, F = model->layers[0].fc.features;
    const int64_t N = step->B * step->T;
    return N * (5 * C + F) + step->threads * (N * C + step->S);
}

void decode_step(const Model* model, const Step* step) {
    const bool half = model->cache_kind == 1;
    if (model->weight_kind == 0) run_all<float, float>(*model, *step);
    if (model->weight_kind == 1) run_all<Bf16, Bf16>(*model, *step);
    if (model->weight_kind == 2 && half) run_all<int8_t, Bf16>(*model, *step);
    if (model->weight_kind == 2 && !half) run_all<int8_t, float>(*model, *step);
}

}  // extern "C"
