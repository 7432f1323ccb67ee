// Matrix products of a few rows: y_nf = scale_f sum_c weight_fc x_nc + bias_f, with a thread's
// features. N rows, C width, F features.
//
// A weight comes from memory once and meets all rows while it is near. fp32 and bf16 are multiplied
// in fp32. int8 meets rows that are rounded to int16 with a scale per row: twice as many products
// per instruction as in fp32, and a row's result does not depend on how many rows there are. The
// rounding moves no entry by more than 2^-16 of its row's largest; that of the weights, by 2^-8 of
// theirs.

#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

struct Matrix {
    const void* weight;
    const float* scale;  // null for 1
    const float* bias;   // null for 0
    int64_t features, width;
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

// how weights of a kind are multiplied
template <class W>
struct Kind {
    typedef float Entry;  // of a row
    typedef Vec Sums;
    typedef float Rest;  // the sum of some columns, exact if they are integers
    typedef Four Total;  // of four rows; of integers exact, and rounded once
    static Total sum(Vec a, Vec b, Vec c, Vec d) { return ::sum(a, b, c, d); }
    static constexpr int AT_ONCE = LANES;  // columns in a register
    static constexpr int FEATURES = 2;     // of a tile
    static constexpr int64_t SEGMENT = INT64_MAX;
};

template <>
struct Kind<int8_t> {
    typedef int16_t Entry;
    typedef Ints Sums;
    typedef int32_t Rest;
    typedef double Total __attribute__((vector_size(32)));
    static Total sum(Ints a, Ints b, Ints c, Ints d) {
        auto high = [](Ints x) { return __builtin_convertvector(x >> 16, Vec); };
        auto low = [](Ints x) { return __builtin_convertvector(x & 0xffff, Vec); };
        // sums below 2^24, so exact in fp32
        const Four highs = ::sum(high(a), high(b), high(c), high(d));
        const Four lows = ::sum(low(a), low(b), low(c), low(d));
        return __builtin_convertvector(highs, Total) * 65536 +
               __builtin_convertvector(lows, Total);
    }
    static constexpr int AT_ONCE = 2 * LANES;
    static constexpr int FEATURES = 3;
    // columns whose sum fits into a lane: with weights of at most 2^7 and entries below 2^15 in
    // size, two products are less than 2^23, and 256 pairs less than 2^31
    static constexpr int64_t SEGMENT = 256 * AT_ONCE;
};

// rows as weights of a kind meet them: x_nc = scale_n values_nc
template <class W>
struct Rows {
    const typename Kind<W>::Entry* values;
    const float* scales;  // null for 1
};

// Rows x (N, C) rounded to int16, with the largest entry of each at 32639: those of one thread.
// A row that is not finite gets a scale that is not.
void narrow(const float* x, int64_t C, Part rows, int16_t* values, float* scales) {
    for (int64_t n = rows.first; n < rows.stop; n++) {
        Ints sizes = {};
        // as integers, the bits of fp32 without the sign are in order, and NaN is the largest
        each(x + n * C, C, [&](int64_t, Vec entries, int64_t) {
            const Ints bits = Ints(entries) & 0x7fffffff;
            sizes = bits > sizes ? bits : sizes;
        });
        float largest;
        int32_t bits = 0;
        for (int i = 0; i < LANES; i++) bits = std::max(bits, sizes[i]);
        std::memcpy(&largest, &bits, sizeof largest);
        scales[n] = largest / 32639;
        // of zeros there is none: the integers are anything, and the scale is 0
        const float inverse = 32639 / largest;
        each(x + n * C, C, [&](int64_t c, Vec entries, int64_t count) {
            const Vec rounded = entries * inverse + ROUND;
            const Half half = __builtin_convertvector(Ints(rounded) - Ints(ROUND), Half);
            std::memcpy(values + n * C + c, &half, count * sizeof(int16_t));
        });
    }
}

// FEATURES features of ROWS rows, at most four; the features are `apart` from each other
template <int FEATURES, int ROWS, class W>
void tile(const Matrix& m, int64_t f, int64_t n, Rows<W> x, float* out, Write how,
          int64_t apart = 1) {
    typedef Kind<W> K;
    const int64_t C = m.width;
    const W* weight = static_cast<const W*>(m.weight) + f * C;
    const typename K::Entry* values = x.values + n * C;
    // sums that do not wait for each other, in registers if none of this is a loop
    constexpr int SUMS = FEATURES == 8 ? 2 : 4 / ROWS;
    // the same for any number of rows, and with it a row's result
    constexpr int STEP = 4 * K::AT_ONCE;
    typename K::Total totals[FEATURES] = {};
    int64_t c = 0;
    while (c + STEP <= C) {
        const int64_t stop = C - c < K::SEGMENT ? C : c + K::SEGMENT;
        typename K::Sums sums[FEATURES][4][SUMS] = {};
        for (; c + STEP <= stop; c += STEP) {
// an unrolled sum of integers is rearranged, out of the registers
#pragma GCC unroll 1
            for (int64_t at = c; at < c + STEP; at += SUMS * K::AT_ONCE) {
                // a stream of fp32 is all that the processor foresees: narrow weights are asked for
                // 8 KB ahead, and of several streams or features the next ones
                if (FEATURES > 1 && apart == 1)
                    for (int i = 0; i < FEATURES; i++)
                        __builtin_prefetch(weight + (i + FEATURES) * C + at);
                else if (FEATURES > 1)
                    for (int i = 0; i < FEATURES; i++)
                        for (int k = 0; k < SUMS * K::AT_ONCE; k += 64 / sizeof(W))
                            __builtin_prefetch(weight + (i * apart + 1) * C + at + k);
                else if (sizeof(W) < sizeof(float))
                    __builtin_prefetch(reinterpret_cast<const char*>(weight + at) + 8192);
#pragma GCC unroll 4
                for (int k = 0; k < SUMS; k++) {
                    const int64_t column = at + k * K::AT_ONCE;
                    decltype(load(weight)) w[FEATURES];
#pragma GCC unroll 8
                    for (int i = 0; i < FEATURES; i++) w[i] = load(weight + i * apart * C + column);
#pragma GCC unroll 4
                    for (int j = 0; j < ROWS; j++) {
                        const auto entries = load(values + j * C + column);
#pragma GCC unroll 8
                        for (int i = 0; i < FEATURES; i++)
                            sums[i][j][k] = add_product(sums[i][j][k], w[i], entries);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < FEATURES; i++) {
            auto& s = sums[i];
#pragma GCC unroll 4
            for (int j = 0; j < ROWS; j++)
#pragma GCC unroll 4
                for (int k = 1; k < SUMS; k++) s[j][0] += s[j][k];
            totals[i] += K::sum(s[0][0], s[1][0], s[2][0], s[3][0]);
        }
    }
    Four units = Four{} + 1;
    if (x.scales) std::memcpy(&units, x.scales + n, ROWS * sizeof(float));
#pragma GCC unroll 8
    for (int i = 0; i < FEATURES; i++) {
        for (int j = 0; j < ROWS && c < C; j++) {
            typename K::Rest rest = 0;
            for (int64_t at = c; at < C; at++)
                rest += widen(weight[i * apart * C + at]) * values[j * C + at];
            totals[i][j] += rest;
        }
        const int64_t feature = f + i * apart;
        const float scale = m.scale ? m.scale[feature] : 1, bias = m.bias ? m.bias[feature] : 0;
        const Four result = __builtin_convertvector(totals[i], Four) * units * scale + bias;
        for (int j = 0; j < ROWS; j++) {
            float& y = out[(n + j) * m.features + feature];
            y = result[j] + (how == ADD ? y : 0);
        }
    }
}

// a product, x (N, C) -> out (N, F): one thread's features
template <class W>
void product(const Matrix& m, Rows<W> x, int64_t N, Part part, float* out, Write how) {
    constexpr int FEATURES = Kind<W>::FEATURES;
    // With AVX-512's registers, rows meet features from many places at once: a processor reads
    // ahead in several streams of its own, and one is what it waits for. AMD's read ahead of fewer.
#if defined(__SSE4A__)
    constexpr int MOST = sizeof(W) < sizeof(float) ? 2 : 4;
#else
    constexpr int MOST = 8;
#endif
    auto streams = [&](auto count, auto some) {
        constexpr int STREAMS = decltype(count)::value;
        const int64_t apart = (part.stop - part.first) / STREAMS;
        for (int64_t f = part.first; f < part.first + apart; f++) some(f, apart);
        part.first += STREAMS * apart;
    };
    if (LANES == 16 && N == 1)
        streams(std::integral_constant<int, MOST>(), [&](int64_t f, int64_t apart) {
            tile<MOST, 1, W>(m, f, 0, x, out, how, apart);
        });
    else if (LANES == 16)
        streams(std::integral_constant<int, 4>(), [&](int64_t f, int64_t apart) {
            int64_t n = 0;
            for (; n + 4 <= N; n += 4) tile<4, 4, W>(m, f, n, x, out, how, apart);
            for (; n + 2 <= N; n += 2) tile<4, 2, W>(m, f, n, x, out, how, apart);
            for (; n < N; n++) tile<4, 1, W>(m, f, n, x, out, how, apart);
        });
    for (int64_t f = part.first; f < part.stop; f += FEATURES) {
        // the weights come from memory once, then from the nearest cache
        const int64_t features = std::min<int64_t>(FEATURES, part.stop - f);
        int64_t n = 0;
        if (features == FEATURES) {
            for (; n + 4 <= N; n += 4) tile<FEATURES, 4, W>(m, f, n, x, out, how);
            for (; n + 2 <= N; n += 2) tile<FEATURES, 2, W>(m, f, n, x, out, how);
        }
        for (; n < N; n++)
            for (int64_t i = 0; i < features; i++) tile<1, 1, W>(m, f + i, n, x, out, how);
    }
}

}  // namespace
