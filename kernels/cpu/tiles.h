// Matrix products by a processor's matrix units (Intel's AMX): what products.h does by vectors.
//
// A unit multiplies tiles of 16 rows of 64 bytes: int8 by int8, or bf16 by bf16. Weights are read
// where they are, 16 features by 64 bytes of columns. What they meet is cut into pieces of that
// type, whose sum it is, and laid out for the unit: an int16 is two int8, a number of fp32 is
// three bf16. So products are those that products.h describes, but fp32's: of its nine products of
// pieces, three are below 2^-24 of the whole and left out.
// N rows, C width, F features.

#pragma once

#include "transposed.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define FASTGPT2_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if FASTGPT2_TILES

constexpr int64_t ROWS_AT_ONCE = 256;  // whose pieces stay in the second cache

// Linux gives a process the tiles' registers when it asks for them.
bool tiles_are_there() {
    constexpr int REQUEST = 0x1023, TILES = 18;
    static const bool given = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    return given;
}

// how weights of a kind are cut, and the rows that they meet
template <class W>
struct Cut {
    static constexpr int COLUMNS = 32, ROWS = SIDE;  // of a tile
    static constexpr int TILES = 3;                  // one for each piece
    static constexpr int64_t PANEL = 1024;  // columns whose pieces are near
    static constexpr int64_t FEWEST = std::is_same_v<W, float> ? 16 : 2;  // rows that are worth it
};
template <>
struct Cut<int8_t> {
    static constexpr int COLUMNS = 64, ROWS = SIDE / 2;
    static constexpr int TILES = 1;  // both pieces of a row
    static constexpr int64_t PANEL = INT64_MAX;
    static constexpr int64_t FEWEST = 2;
};

// rows are cut a tile's number at a time
template <class W>
int64_t groups_of(int64_t N) {
    return (N + Cut<W>::ROWS - 1) / Cut<W>::ROWS;
}

// tiles that a thread writes for a product of N rows
template <class W>
int64_t tiles_of(int64_t N, int64_t C) {
    const int64_t columns = std::min(C, Cut<W>::PANEL) / Cut<W>::COLUMNS;
    const int64_t groups = groups_of<W>(std::min(N, ROWS_AT_ONCE));
    return columns * Cut<W>::TILES * (groups + (std::is_same_v<W, float> ? 2 : 0));
}

// 64 int16 of at most 32639 in size: 256 first + second
void cut(const int16_t* from, __m512i* pieces) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32);
    auto narrow = [](__m512i a, __m512i b) {
        const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(a));
        return _mm512_inserti64x4(low, _mm512_cvtepi16_epi8(b), 1);
    };
    auto high = [](__m512i x) {
        return _mm512_srai_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(128)), 8);
    };
    pieces[0] = narrow(high(a), high(b));
    pieces[1] = narrow(a, b);
}

// 32 numbers as sums of three bf16, each the first 8 bits of what is left
void cut(const float* from, __m512i* pieces) {
    __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
#pragma GCC unroll 3
    for (int p = 0; p < 3; p++) {
        pieces[p] = first_bits(a, b);
        a = rest(a);
        b = rest(b);
    }
}

// Pieces of N rows' columns from c to stop, as the unit reads them: a tile for each group of rows,
// COLUMNS of them and piece, with a row's columns below each other, four bytes a line. Of int8 both
// pieces are in one tile, side by side.
template <class W>
void lay_out(const typename Kind<W>::Entry* x, int64_t C, int64_t N, int64_t c, int64_t stop,
             Tile* out) {
    typedef Cut<W> K;
    constexpr int PIECES = std::is_same_v<W, int8_t> ? 2 : 3;
    for (int64_t n = 0; n < N; n += K::ROWS)
        for (int64_t at = c; at < stop; at += K::COLUMNS) {
            __m512i pieces[K::ROWS][PIECES] = {};
            for (int64_t i = 0; i < std::min<int64_t>(K::ROWS, N - n); i++)
                cut(x + (n + i) * C + at, pieces[i]);
            for (int t = 0; t < K::TILES; t++) {
                __m512i lines[SIDE];
#pragma GCC unroll 16
                for (int i = 0; i < SIDE; i++) lines[i] = pieces[i % K::ROWS][t + i / K::ROWS];
                transpose(lines);
                std::memcpy(out++, lines, sizeof lines);
            }
        }
}

// Compilers may not know that instructions of tiles read memory: before these it is to be written.
void settle() { asm volatile("" ::: "memory"); }

// a thread's tiles: all of one size
void begin_tiles() {
    if (!tiles_are_there()) return;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, rest[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64};
        uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE};
    } sizes;
    settle();
    _tile_loadconfig(&sizes);
}
void end_tiles() {
    if (tiles_are_there()) _tile_release();
}

// Registers: 0 and 1 are sums of two tiles of features; 2 is of columns, 3 and 4 are of features.
// A processor that lends its other registers to a second thread waits where more are in use.
template <class W>
void multiply() {
    if constexpr (std::is_same_v<W, int8_t>) {
        _tile_dpbssd(0, 3, 2);
        _tile_dpbssd(1, 4, 2);
    } else {
        _tile_dpbf16ps(0, 3, 2);
        _tile_dpbf16ps(1, 4, 2);
    }
}

void load_features(const void* from, int64_t to_second, int64_t stride) {
    _tile_loadd(3, from, stride);
    _tile_loadd(4, static_cast<const char*>(from) + to_second, stride);
}

// 32 features of a group of rows, in `count` times COLUMNS columns: sums in the registers.
// `features` are weights with `stride` bytes from row to row, of fp32 their pieces.
template <class W>
void sum_tiles(const char* features, int64_t stride, const Tile* columns, int64_t count,
               bool foresee) {
    constexpr int TILES = Cut<W>::TILES;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < count; k++, columns += TILES) {
        if constexpr (std::is_same_v<W, float>) {
            // of pieces 0 to 2 the pairs that add up to 2 at most
            const Tile* pieces = reinterpret_cast<const Tile*>(features) + 6 * k;
            for (int piece = TILES - 1; piece >= 0; piece--) {
                load_features(pieces + 2 * piece, sizeof(Tile), 64);
                for (int other = TILES - 1 - piece; other >= 0; other--) {
                    _tile_loadd(2, columns + other, 64);
                    multiply<W>();
                }
            }
        } else {
            const char* at = features + 64 * k;
            // the same columns of the next features
            if (foresee)
                for (int i = 2 * SIDE; i < 4 * SIDE; i++)
                    _mm_prefetch(at + i * stride, _MM_HINT_T1);
            load_features(at, SIDE * stride, stride);
            for (int piece = TILES - 1; piece >= 0; piece--) {
                _tile_loadd(2, columns + piece, 64);
                multiply<W>();
            }
        }
    }
}

// what is in the registers -> out, 32 features of a group of rows
template <class W>
void write_tiles(const Matrix& m, int64_t f, const float* units, const float* bias, int64_t rows,
                 float* out, Write how) {
    alignas(64) Tile sums[2];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    for (int i = 0; i < 2; i++, f += SIDE, out += SIDE) {
        __m512 lines[SIDE];
        if constexpr (std::is_same_v<W, int8_t>) {
#pragma GCC unroll 16
            for (int k = 0; k < SIDE; k++) {
                // exact, and rounded once
                auto wide = [&](int piece) {
                    const uint32_t* at = sums[i][k] + SIDE / 2 * piece;
                    return _mm512_cvtepi32_pd(_mm256_load_si256((const __m256i*)at));
                };
                const __m512d whole = _mm512_fmadd_pd(wide(0), _mm512_set1_pd(256), wide(1));
                lines[k] = _mm512_castps256_ps512(_mm512_cvtpd_ps(whole));
            }
        } else {
            std::memcpy(lines, sums[i], sizeof lines);
        }
        write(lines, units, m.scale ? m.scale + f : nullptr, bias ? bias + f : nullptr, rows,
              m.features, out, how);
    }
}

// 32 features' pieces, of `count` columns of fp32 weights
void cut_features(const float* weight, int64_t C, int64_t count, Tile* out) {
    for (int64_t c = 0; c < count; c += 32, out += 6)
        for (int i = 0; i < 2 * SIDE; i++) {
            __m512i pieces[3];
            cut(weight + i * C + c, pieces);
            __builtin_prefetch(weight + (2 * SIDE + i) * C + c, 0, 2);
            __builtin_prefetch(weight + (2 * SIDE + i) * C + c + 16, 0, 2);
            for (int p = 0; p < 3; p++)
                std::memcpy(out[2 * p + i / SIDE][i % SIDE], pieces + p, sizeof *pieces);
        }
}

// `product` by tiles, as far as there are 32 features; `pieces` are this thread's own. Returns the
// features that are left.
template <class W>
Part product_of_tiles(const Matrix& m, Rows<W> x, int64_t N, Part part, float* out, Write how,
                      Tile* pieces) {
    typedef Cut<W> K;
    const int64_t C = m.width, stride = C * int64_t(sizeof(W));
    Part left = part;
    if (N < K::FEWEST || C % K::COLUMNS || !tiles_are_there()) return left;
    left.first = part.stop - (part.stop - part.first) % (2 * SIDE);
    for (int64_t first = 0; first < N; first += ROWS_AT_ONCE)
        for (int64_t c = 0, stop; c < C; c = stop) {
            stop = C - c < K::PANEL ? C : c + K::PANEL;
            const int64_t rows = std::min(N - first, ROWS_AT_ONCE), count = (stop - c) / K::COLUMNS;
            lay_out<W>(x.values + first * C, C, rows, c, stop, pieces);
            Tile* own = pieces + groups_of<W>(rows) * count * K::TILES;
            for (int64_t f = part.first; f < left.first; f += 2 * SIDE) {
                const W* weight = static_cast<const W*>(m.weight) + f * C + c;
                const char* features = reinterpret_cast<const char*>(weight);
                if constexpr (std::is_same_v<W, float>) {
                    cut_features(weight, C, stop - c, own);
                    features = reinterpret_cast<const char*>(own);
                }
                settle();
                for (int64_t n = first; n < first + rows; n += K::ROWS) {
                    const Tile* columns = pieces + (n - first) / K::ROWS * count * K::TILES;
                    sum_tiles<W>(features, stride, columns, count, n == first);
                    write_tiles<W>(m, f, x.scales ? x.scales + n : nullptr, c ? nullptr : m.bias,
                                   std::min<int64_t>(K::ROWS, first + rows - n),
                                   out + n * m.features + f, c ? ADD : how);
                }
            }
        }
    return left;
}

#else

void begin_tiles() {}
void end_tiles() {}
template <class W>
int64_t tiles_of(int64_t, int64_t) {
    return 0;
}
template <class W>
Part product_of_tiles(const Matrix&, Rows<W>, int64_t, Part part, float*, Write, Tile*) {
    return part;
}

#endif

}  // namespace
