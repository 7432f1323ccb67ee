// Matrix products of several rows by AVX-512 where there are no matrix units: what products.h does
// by sums over a register's lanes, here with a row in each lane.
//
// A line holds one column of 16 rows, and meets a feature's weight of that column in every lane, so
// that no sum over lanes is left at the end. Weights are read where they are. bf16 is multiplied by
// instructions of its own, two columns at once: a row of fp32 is cut into two bf16, whose sum it is
// but for 2^-17 of its size, and lies in two lanes.
// N rows, C width, F features.

#pragma once

#include "transposed.h"

namespace {

#if defined(__AVX512BW__)

// How rows of fp32 lie in lines, and meet weights of a kind: a tile is SIDE lines of ROWS rows'
// COLUMNS columns. Fewer than FEWEST rows are left to `product`.
template <class W>
struct Lanes {
    static constexpr bool KNOWN = false;
};

template <>
struct Lanes<float> {
    static constexpr bool KNOWN = true;
    static constexpr int ROWS = 16, COLUMNS = 16;
    static constexpr int64_t FEWEST = 8;
    // a tile the other way around: row i's columns
    static void cut(const float* from, __m512i* tile, int64_t i) {
        tile[i] = _mm512_loadu_si512(from);
    }
    static Vec meet(Vec sum, Vec line, const float* weight) { return sum + line * *weight; }
    static __m512 total(__m512 sum) { return sum; }
};

#if defined(__AVX512BF16__)
template <>
struct Lanes<Bf16> {
    static constexpr bool KNOWN = true;
    static constexpr int ROWS = 8, COLUMNS = 32;
    static constexpr int64_t FEWEST = 6;
    // the first 8 bits, and what is left rounded to 8 bits
    static void cut(const float* from, __m512i* tile, int64_t i) {
        const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
        tile[i] = first_bits(a, b);
        tile[i + ROWS] = __m512i(_mm512_cvtne2ps_pbh(rest(b), rest(a)));
    }
    static Vec meet(Vec sum, Vec line, const Bf16* weight) {
        int32_t two;
        std::memcpy(&two, weight, sizeof two);
        const __m512i weights = _mm512_set1_epi32(two);
        return Vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(line), __m512bh(weights)));
    }
    // both pieces of each row
    static __m512 total(__m512 sum) {
        return _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e));
    }
};
#endif

// tiles that a thread writes for a product of N rows
template <class W>
int64_t lines_of(int64_t N, int64_t C) {
    typedef Lanes<W> L;
    if constexpr (L::KNOWN) return (N + L::ROWS - 1) / L::ROWS * (C / L::COLUMNS);
    return 0;
}

// N rows (N, C) as tiles of lines: for each group of rows its columns
template <class W>
void lay_lines(const float* x, int64_t C, int64_t N, Tile* out) {
    typedef Lanes<W> L;
    for (int64_t n = 0; n < N; n += L::ROWS)
        for (int64_t c = 0; c < C; c += L::COLUMNS) {
            __m512i lines[SIDE] = {};
            for (int64_t i = 0; i < std::min<int64_t>(L::ROWS, N - n); i++)
                L::cut(x + (n + i) * C + c, lines, i);
            transpose(lines);
            std::memcpy(out++, lines, sizeof lines);
        }
}

// SIDE features of GROUPS groups of rows, eight features at a time, whose sums stay in registers.
// `columns` are `count` tiles for each group.
template <class W, int GROUPS>
void sum_lines(const W* weight, int64_t C, const Tile* columns, int64_t count, bool foresee,
               __m512 (*out)[SIDE]) {
    typedef Lanes<W> L;
    constexpr int FEATURES = 8;
    for (int first = 0; first < SIDE; first += FEATURES) {
        Vec sums[FEATURES][GROUPS] = {};
        for (int64_t k = 0; k < count; k++) {
            const W* at = weight + first * C + k * L::COLUMNS;
            // the same columns of the next SIDE features
            if (foresee)
                for (int i = SIDE; i < SIDE + FEATURES; i++) __builtin_prefetch(at + i * C, 0, 2);
            for (int line = 0; line < SIDE; line++, at += L::COLUMNS / SIDE) {
                Vec x[GROUPS];
#pragma GCC unroll 2
                for (int g = 0; g < GROUPS; g++)
                    std::memcpy(x + g, columns[g * count + k][line], sizeof *x);
#pragma GCC unroll 8
                for (int i = 0; i < FEATURES; i++)
#pragma GCC unroll 2
                    for (int g = 0; g < GROUPS; g++)
                        sums[i][g] = L::meet(sums[i][g], x[g], at + i * C);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < FEATURES; i++)
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; g++) out[g][first + i] = L::total(__m512(sums[i][g]));
    }
}

// `product` by lines, as far as there are SIDE features; `pieces` are this thread's own. Returns
// the features that are left.
template <class W>
Part product_of_lanes(const Matrix& m, Rows<W> x, int64_t N, Part part, float* out, Write how,
                      Tile* pieces) {
    typedef Lanes<W> L;
    Part left = part;
    if constexpr (L::KNOWN) {
        const int64_t C = m.width, count = C / L::COLUMNS;
        if (N < L::FEWEST || C % L::COLUMNS) return left;
        left.first = part.stop - (part.stop - part.first) % SIDE;
        if (left.first > part.first) lay_lines<W>(x.values, C, N, pieces);
        for (int64_t f = part.first; f < left.first; f += SIDE) {
            const W* weight = static_cast<const W*>(m.weight) + f * C;
            for (int64_t n = 0; n < N; n += 2 * L::ROWS) {
                const Tile* columns = pieces + n / L::ROWS * count;
                __m512 sums[2][SIDE];
                const bool both = N - n > L::ROWS;
                if (both) sum_lines<W, 2>(weight, C, columns, count, n == 0, sums);
                else sum_lines<W, 1>(weight, C, columns, count, n == 0, sums);
                for (int g = 0; g <= int(both); g++) {
                    const int64_t row = n + g * L::ROWS;
                    write(sums[g], nullptr, nullptr, m.bias ? m.bias + f : nullptr,
                          std::min<int64_t>(L::ROWS, N - row), m.features,
                          out + row * m.features + f, how);
                }
            }
        }
    }
    return left;
}

#else

template <class W>
int64_t lines_of(int64_t, int64_t) {
    return 0;
}
template <class W>
Part product_of_lanes(const Matrix&, Rows<W>, int64_t, Part part, float*, Write, Tile*) {
    return part;
}

#endif

}  // namespace
