// One decoding step of GPT-2 on a processor: T tokens of each of B rows in, logits out. T is 1, or
// more for a prompt and for tokens that were proposed.
//
// A step reads every weight once; of one row it does little else, so memory is the limit, and all
// of it is one call. Threads share the features of each product and the heads of attention, and wait
// for each other after each: four times per layer. Several rows are also prepared for a product by
// parts, which takes up to four waits more. Weights are fp32, bf16 or int8 with a scale per feature;
// products.h says how they are multiplied. All else is fp32. The graph is OpenAI's, as in
// fastgpt2/generate/step.py.
// N = B T tokens, C width, F features, H heads, D head size, S keys of the cache, V vocabulary.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "choice.h"
#include "lanes.h"
#include "products.h"
#include "tiles.h"
#include "vectors.h"

namespace {

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
    int64_t* tokens;         // (B, T)
    int64_t* lengths;        // (B,), keys of each row that are in the cache
    const int64_t* wanted;   // (n_wanted,), the tokens of the B T whose logits are wanted, rising
    void* const* kv;         // of each layer its first row: (2, B, H, S, D)
    float* space;            // space_of(...) numbers
    float* logits;           // (n_wanted, V)
    int64_t B, T, n_wanted, S;
    int64_t plane;  // from a key to its value, in elements
    int64_t threads;
};

namespace {

// (x - mean) rstd weight + bias of one row, x (C,)
void normalize(const Norm& norm, const float* x, float* out, int64_t C) {
    const float mean = float(total(x, C, [](Wide v) { return v; }) / double(C));
    const double squares = total(x, C, [&](Wide v) { return (v - mean) * (v - mean); });
    const float rstd = float(1 / std::sqrt(squares / double(C) + norm.eps));
    each(x, C, [&](int64_t c, Vec v, int64_t count) {
        Vec y = (v - mean) * rstd * some(norm.weight + c, count);
        if (norm.bias) y += some(norm.bias + c, count);
        store(y, out + c, count);
    });
}

// GELU of n numbers, in place; the tanh form by an exponential: tanh(u) = 1 - 2 / (exp(2 u) + 1)
void gelu(float* x, int64_t n, bool erf) {
    if (erf) {
        for (int64_t i = 0; i < n; i++) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
        return;
    }
    each(x, n, [&](int64_t i, Vec v, int64_t count) {
        const Vec u = 0.79788456f * (v + 0.044715f * v * v * v);
        const Vec y = v * (1 - 1 / (exponential(2 * u) + 1));
        store(y, x + i, count);
    });
}

// sum_s probs_s v_s / total over n keys, COUNT registers of v's D columns
template <int COUNT, class E>
void weigh(const E* v, const float* probs, int64_t n, int64_t D, float total, float* out) {
    Vec sums[COUNT] = {};
    for (int64_t s = 0; s < n; s++)
#pragma GCC unroll 8
        for (int k = 0; k < COUNT; k++) sums[k] += load(v + s * D + k * LANES) * probs[s];
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; k++) sums[k] /= total;
    std::memcpy(out, sums, sizeof sums);
}

// softmax(q k^T / sqrt(D)) v over n keys: k and v (n, D), out (D,)
template <class E>
void attend(const float* q, const E* k, const E* v, int64_t n, int64_t D, float* probs,
            float* out) {
    const float scale = float(1 / std::sqrt(double(D)));
    float largest = -INFINITY, total = 0;
    int64_t first = 0;
    for (; first + 4 <= n; first += 4) {
        const Four scores = dot_four(k + first * D, q, D) * scale;
        std::memcpy(probs + first, &scores, sizeof scores);
    }
    for (; first < n; first++) probs[first] = dot(k + first * D, q, D) * scale;
    // NaN stays, as in the sum
    for (int64_t s = 0; s < n; s++) largest = probs[s] > largest ? probs[s] : largest;
    each(probs, n, [&](int64_t s, Vec scores, int64_t count) {
        const Vec weights = exponential(scores - largest);
        store(weights, probs + s, count);
    });
    for (int64_t s = 0; s < n; s++) total += probs[s];
    int64_t d = 0;
    for (; d + 8 * LANES <= D; d += 8 * LANES) weigh<8>(v + d, probs, n, D, total, out + d);
    for (; d + LANES <= D; d += LANES) weigh<1>(v + d, probs, n, D, total, out + d);
    for (; d < D; d++) {
        out[d] = 0;
        for (int64_t s = 0; s < n; s++) out[d] += widen(v[s * D + d]) * probs[s];
        out[d] /= total;
    }
}

// numbers of N rows as a product reads them: fp32, and int16 with scales
int64_t prepared_of(const Model& model, int64_t N) {
    const int64_t C = model.tokens.width, F = model.layers[0].fc.features;
    return N * (C + 1) + (N * std::max(C, F) + 1) / 2;
}

// numbers that a step writes before what is each thread's own
int64_t shared_of(const Model& model, const Step& step) {
    const int64_t C = model.tokens.width, F = model.layers[0].fc.features, N = step.B * step.T;
    const int64_t n = N * (5 * C + F) + (N == 1 ? step.threads : 1) * prepared_of(model, N);
    return (n + LANES - 1) / LANES * LANES;
}

// numbers that are one thread's own: pieces of what a product reads
template <class W>
int64_t pieces_of(const Model& model, const Step& step) {
    const int64_t C = model.tokens.width, F = model.layers[0].fc.features;
    const int64_t N = step.B * step.T, width = std::max(C, F);
    const int64_t count = std::max(tiles_of<W>(N, width), lines_of<W>(N, width));
    return count * int64_t(sizeof(Tile) / sizeof(float));
}
// and scores of attention
template <class W>
int64_t own_of(const Model& model, const Step& step) {
    return pieces_of<W>(model, step) + (step.S + LANES - 1) / LANES * LANES;
}

// what one thread does of a step; W of weights, E of positions, keys and values
template <class W, class E>
void run(const Model& model, const Step& step, Barrier& barrier, int64_t thread) {
    const int64_t B = step.B, T = step.T, N = B * T, S = step.S;
    const int64_t C = model.tokens.width, H = model.n_head, D = C / H;
    const int64_t F = model.layers[0].fc.features;
    constexpr bool INT8 = std::is_same_v<W, int8_t>;
    // shared by all threads
    float* x = step.space;
    float* qkv = x + N * C;
    float* heads = qkv + N * 3 * C;
    float* hidden = heads + N * C;
    // what a product reads: each thread prepares a lone row for itself, and a part of several rows
    // for all
    const bool alone = N == 1;
    float* rows = hidden + N * F + (alone ? thread * prepared_of(model, N) : 0);
    float* scales = rows + N * C;
    int16_t* rounded = reinterpret_cast<int16_t*>(scales + N);
    // this thread's own
    float* pieces = step.space + shared_of(model, step) + thread * own_of<W>(model, step);
    float* probs = pieces + pieces_of<W>(model, step);
    auto multiply = [&](const Matrix& m, Rows<W> with, int64_t count, Part own, float* to,
                        Write how) {
        Tile* tiles = reinterpret_cast<Tile*>(pieces);
        own = product_of_tiles<W>(m, with, count, own, to, how, tiles);
        own = product_of_lanes<W>(m, with, count, own, to, how, tiles);
        product<W>(m, with, count, own, to, how);
    };
    begin_tiles();
    auto part = [&](int64_t count) { return Part(count, thread, step.threads); };
    auto mine = [&](int64_t count) { return alone ? Part(count, 0, 1) : part(count); };
    auto prepared = [&](const float* from, int64_t count, int64_t width) {
        Rows<W> out;
        if constexpr (INT8) {
            narrow(from, width, mine(count), rounded, scales);
            out = {rounded, scales};
        } else {
            out = {from, nullptr};
        }
        if (!alone && (INT8 || from == rows)) barrier.wait();
        return out;
    };
    // LayerNorm of the first rows of x
    auto normalized = [&](const Norm& norm, int64_t count) {
        const Part own = mine(count);
        for (int64_t i = own.first; i < own.stop; i++) normalize(norm, x + i * C, rows + i * C, C);
        return prepared(rows, count, C);
    };

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
        // after the keys and values of the last layer, only the wanted tokens go on
        const bool is_last = i + 1 == model.n_layer;
        const int64_t n = is_last ? step.n_wanted : N;
        auto token = [&](int64_t k) { return is_last ? step.wanted[k] : k; };
        multiply(layer.qkv, normalized(layer.norm_1, N), N, part(3 * C), qkv, REPLACE);
        barrier.wait();
        for (int64_t pair = pairs.first; pair < pairs.stop; pair++) {
            const int64_t b = pair / H, h = pair % H, held = step.lengths[b];
            E* k = static_cast<E*>(step.kv[i]) + pair * S * D;
            E* v = k + step.plane;
            auto keep = [&](const float* from, E* to) {
                each(from, D, [&](int64_t d, Vec x, int64_t some) { store(x, to + d, some); });
            };
            for (int64_t t = 0; t < T; t++) {
                const float* q = qkv + (b * T + t) * 3 * C + h * D;
                keep(q + C, k + (held + t) * D);
                keep(q + 2 * C, v + (held + t) * D);
            }
            for (int64_t j = 0; j < n; j++) {
                const int64_t t = token(j) - b * T;
                if (t < 0 || t >= T) continue;
                const float* q = qkv + token(j) * 3 * C + h * D;
                attend(q, k, v, held + t + 1, D, probs, heads + j * C + h * D);
            }
        }
        if (is_last)
            for (int64_t j = 0; j < n; j++)
                std::memmove(x + j * C + columns.first, x + token(j) * C + columns.first,
                             size_t(columns.stop - columns.first) * sizeof(float));
        barrier.wait();
        multiply(layer.proj, prepared(heads, n, C), n, columns, x, ADD);
        barrier.wait();
        multiply(layer.fc, normalized(layer.norm_2, n), n, features, hidden, REPLACE);
        for (int64_t j = 0; j < n; j++)
            gelu(hidden + j * F + features.first, features.stop - features.first, model.erf);
        barrier.wait();
        multiply(layer.out, prepared(hidden, n, F), n, columns, x, ADD);
        barrier.wait();
    }
    const Rows<W> last = normalized(model.norm, step.n_wanted);
    multiply(model.head, last, step.n_wanted, part(model.head.features), step.logits, REPLACE);
    end_tiles();
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

// Ask for pages of 2 MB for what is in memory now, where the system can move it: with 4 KB each,
// finding a page's place takes part of the time in which it is read.
void use_large_pages(void* first, void* stop) {
#if defined(__linux__)
    constexpr intptr_t SIZE = 1 << 21;
    constexpr int COLLAPSE = 25;  // since Linux 6.1
    const intptr_t from = (intptr_t(first) + SIZE - 1) / SIZE * SIZE;
    const intptr_t to = intptr_t(stop) / SIZE * SIZE;
    if (from < to) madvise(reinterpret_cast<void*>(from), size_t(to - from), COLLAPSE);
#endif
}

// numbers that a step writes beside its logits
int64_t space_of(const Model* model, const Step* step) {
    const int64_t own = model->weight_kind == 0   ? own_of<float>(*model, *step)
                        : model->weight_kind == 1 ? own_of<Bf16>(*model, *step)
                                                  : own_of<int8_t>(*model, *step);
    return shared_of(*model, *step) + step->threads * own;
}

void decode_step(const Model* model, const Step* step) {
    const bool half = model->cache_kind == 1;
    if (model->weight_kind == 0) run_all<float, float>(*model, *step);
    if (model->weight_kind == 1) run_all<Bf16, Bf16>(*model, *step);
    if (model->weight_kind == 2 && half) run_all<int8_t, Bf16>(*model, *step);
    if (model->weight_kind == 2 && !half) run_all<int8_t, float>(*model, *step);
}

// `count` steps, each after the tokens that were chosen from the logits before; T is 1
void decode_ahead(const Model* model, const Step* step, const Choice* choice, int64_t count) {
    const int64_t B = step->B, V = model->head.features;
    std::vector<float> scores(2 * V);
    std::vector<Bf16> rounded(V);
    for (int64_t at = 0; at < count * B; at++) {
        const int64_t b = at % B;
        if (b == 0) decode_step(model, step);
        float* logits = step->logits + b * V;
        // a choice sees logits in the model's dtype
        if (model->cache_kind == 1)
            each(logits, V, [&](int64_t i, Vec v, int64_t some) {
                store(v, rounded.data() + i, some);
                for (int64_t k = i; k < i + some; k++) logits[k] = widen(rounded[k]);
            });
        const float* times = choice->times ? choice->times + at * V : nullptr;
        choice->tokens[at] = choose(*choice, logits, times, scores.data(), choice->best + at);
        step->tokens[b] = choice->tokens[at];
        step->lengths[b]++;
    }
}

}  // extern "C"
