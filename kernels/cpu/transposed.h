// What products.h's relatives have in common: 16 x 16 numbers in AVX-512's registers, and fp32 as
// a sum of bf16.
// C width, F features.

#pragma once

#include "products.h"

namespace {

#if defined(__AVX512BW__)

constexpr int SIDE = 16;  // rows of a tile, and 32-bit numbers in one of its rows
typedef uint32_t Tile[SIDE][SIDE];

// a tile of 16 x 16 numbers the other way around
void transpose(__m512i* r) {
    __m512i t[SIDE];
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) r[i] = t[i];
}

// the first 8 bits of 32 numbers, as bf16
__m512i first_bits(__m512 a, __m512 b) {
    alignas(64) static constexpr uint16_t ODD[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i odd = _mm512_load_si512(ODD);
    return _mm512_permutex2var_epi16(_mm512_castps_si512(a), odd, _mm512_castps_si512(b));
}

// and what is left of 16; of what is not finite there is no rest
__m512 rest(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i first = _mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000)));
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), 1);
    return _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(first));
}

// 16 features' sums (features, rows) -> out (rows, features), scaled, with bias and residual
void write(const __m512* sums, const float* units, const float* scale, const float* bias,
           int64_t rows, int64_t F, float* out, Write how) {
    __m512i lines[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) lines[i] = _mm512_castps_si512(sums[i]);
    transpose(lines);
    const Vec scales = scale ? load(scale) : Vec{} + 1, biases = bias ? load(bias) : Vec{};
    for (int64_t n = 0; n < rows; n++) {
        Vec y = Vec(lines[n]) * (units ? units[n] : 1) * scales + biases;
        if (how == ADD) y += load(out + n * F);
        std::memcpy(out + n * F, &y, sizeof y);
    }
}

#else

typedef char Tile;

#endif

}  // namespace
