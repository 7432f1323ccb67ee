// Vector registers of whatever processor this is compiled for, and numbers narrower than fp32.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// a register of fp32, of int32, and of twice as many int16
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
// LANES int16
typedef int16_t Half __attribute__((vector_size(2 * LANES)));
typedef float Four __attribute__((vector_size(16)));
// a register of fp64
typedef double Wide __attribute__((vector_size(4 * LANES)));

struct Bf16 {
    uint16_t bits;
};

template <class W>
W widen(W x) { return x; }
float widen(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// the first `count` numbers as the nearest bf16, ties to even
void store(Vec x, Bf16* to, int64_t count) {
    typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
    const Bits bits = Bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Half half = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0, Half);
    std::memcpy(to, &half, count * sizeof *to);
}
void store(Vec x, float* to, int64_t count) { std::memcpy(to, &x, count * sizeof *to); }

Vec load(const float* from) {
    Vec out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
Shorts load(const int16_t* from) {
    Shorts out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

#if defined(__AVX512BW__)
Vec load(const Bf16* from) {
    __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}
Shorts load(const int8_t* from) {
    return Shorts(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
float sum(Vec x) { return _mm512_reduce_add_ps(__m512(x)); }
#elif defined(__AVX2__)
Vec load(const Bf16* from) {
    __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
Shorts load(const int8_t* from) {
    return Shorts(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
float sum(Vec x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
Vec load(const Bf16* from) {
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = int32_t(uint32_t(from[i].bits) << 16);
    return Vec(out);
}
Shorts load(const int8_t* from) {
    Shorts out;
    for (int i = 0; i < 2 * LANES; i++) out[i] = from[i];
    return out;
}
float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#endif

// the sums of four registers, each in the same order
#if defined(__AVX2__)
Four sum(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return Four(_mm256_castps256_ps128(halves)) + Four(_mm256_extractf128_ps(halves, 1));
}
#endif
#if defined(__AVX512BW__)
Four sum(Vec a, Vec b, Vec c, Vec d) {
    auto fold = [](Vec x) {
        const __m512d twice = _mm512_castps_pd(__m512(x));
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(twice, 1));
        return _mm256_add_ps(_mm512_castps512_ps256(__m512(x)), high);
    };
    return sum(fold(a), fold(b), fold(c), fold(d));
}
#elif !defined(__AVX2__)
Four sum(Vec a, Vec b, Vec c, Vec d) { return Four{sum(a), sum(b), sum(c), sum(d)}; }
#endif

// sum + a b, of int16 the sum of two neighbours' products
Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }
Ints add_product(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return Ints(_mm512_dpwssd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
#elif defined(__AVX512BW__)
    return sum + Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVXVNNI__)
    return Ints(_mm256_dpwssd_avx_epi32(__m256i(sum), __m256i(a), __m256i(b)));
#elif defined(__AVX2__)
    return sum + Ints(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#else
    for (int i = 0; i < LANES; i++)
        sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

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

// sum_i a_ki b_i over n, for four k: rows of a
template <class E>
Four dot_four(const E* a, const float* b, int64_t n) {
    Vec sums[4] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vec entries = load(b + i);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) sums[k] += load(a + k * n + i) * entries;
    }
    Four out = sum(sums[0], sums[1], sums[2], sums[3]);
    for (; i < n; i++)
        for (int k = 0; k < 4; k++) out[k] += widen(a[k * n + i]) * b[i];
    return out;
}

// n numbers, at most LANES, and zeros after them
Vec some(const float* from, int64_t n) {
    if (n == LANES) return load(from);
    Vec out = {};
    std::memcpy(&out, from, n * sizeof(float));
    return out;
}

// work(i, x_i ... x_i+LANES, count) over n numbers; the last register is filled up with zeros
template <class Work>
void each(const float* x, int64_t n, Work work) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) work(i, load(x + i), LANES);
    if (i < n) work(i, some(x + i, n - i), n - i);
}

// sum_i term(x_i) over n numbers, in fp64
template <class Term>
double total(const float* x, int64_t n, Term term) {
    typedef float Narrow __attribute__((vector_size(2 * LANES)));
    Wide even = {}, odd = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Narrow a, b;
        std::memcpy(&a, x + i, sizeof a);
        std::memcpy(&b, x + i + LANES / 2, sizeof b);
        even += term(__builtin_convertvector(a, Wide));
        odd += term(__builtin_convertvector(b, Wide));
    }
    even += odd;
    for (; i < n; i++) even[0] += term(Wide{} + double(x[i]))[0];
    double out = 0;
    for (int k = 0; k < LANES / 2; k++) out += even[k];
    return out;
}

// Adding it to a number below 2^22 in size rounds that to an integer, ties to even: the integer is
// then the low bits of the sum.
const Vec ROUND = Vec{} + 12582912.0f;

// exp(x) to 2 ulp: 2^n exp(r) with r in [-ln 2 / 2, ln 2 / 2], by the series to r^7. Beyond what
// fp32 holds it stays at the nearest power; NaN stays NaN.
Vec exponential(Vec x) {
    const Vec low = Vec{} - 87.3f, high = Vec{} + 88.3f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
    // ln 2 in two parts: n times the first is exact
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * (1 / 5040.0f) + 1 / 720.0f;
    for (float factor : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 1 / 2.0f, 1.0f, 1.0f}) p = p * r + factor;
    return p * Vec((Ints(shifted) - Ints(ROUND) + 127) << 23);
}

}  // namespace
