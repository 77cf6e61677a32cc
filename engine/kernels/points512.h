// Weights from code books on AVX-512 VBMI, without a gather: tables of at most 4 KB are looked up by permutations of
// bytes, 64 indexes and 128 points at a time. What is found is made unsigned weights by a product with a matrix of
// bits, or by shifts of their own for each byte, and a table of at most 16 values.
//
// All of these formats stand in the order COLUMNS: the q-th 64 bits of four registers are the q-th 32 weights.
#ifndef ENGINE_POINTS512_H
#define ENGINE_POINTS512_H

#include "grids.h"
#include "isimd512.h"
#include "matmul.h"

#if defined(__AVX512VBMI__)

// What the weights of a 256-block are made of. The q-th 64 bits are of the q-th 32 weights.
//
// Of points of eight values, codes[0] has the first two and codes[1] the last two. Bytes 7, 6 and 5 hold the lower bits
// of the codes of a point, their upper bits, and its signs; bytes 4, 3 and 2 those of the next point.
//
// Of points of four values, codes[0] has the first four and codes[1] the last four, in 16 bits each; `signs` has a byte
// for 8 weights, in its lower half.
typedef struct {
    __m512i codes[2], signs;
} block_points;

// 64 indexes: their lower bytes, and a mask for each bit above them.
typedef struct {
    __m512i low;
    __mmask64 high[3];
} grid_indexes;

// Both bytes of the points at n times 64 indexes in a table of n_points; side by side they share what is loaded of it.
// 256 points take two permutations, of which the first leaves indexes of the upper 128 in their bytes for the second;
// the bits above choose between results. Longer chains of permutations would be too slow, 5 cycles for each.
ALWAYS_INLINE void look_up(const packed_grid *grid, int n_points, int n, const grid_indexes *at, __m512i (*planes)[2]) {
    __asm__("" : "+r"(grid)); // no copy of the table on the stack, please
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m512i halves[4][4]; // results that wait for those of the upper half, by bit
#pragma GCC unroll 8
        for (int part = 0; part < n_points / 256; part++) {
            const uint8_t *table = grid->bytes[i] + 256 * part;
#pragma GCC unroll 4
            for (int v = 0; v < n; v++) {
                const __mmask64 above = _mm512_movepi8_mask(at[v].low);
                __m512i found = _mm512_mask2_permutex2var_epi8(_mm512_load_si512(table), at[v].low, _knot_mask64(above),
                                                               _mm512_load_si512(table + 64));
                found = _mm512_mask2_permutex2var_epi8(_mm512_load_si512(table + 128), found, above,
                                                       _mm512_load_si512(table + 192));
                int bit = 0;
#pragma GCC unroll 3
                for (; part >> bit & 1; bit++)
                    found = _mm512_mask_mov_epi8(halves[v][bit], at[v].high[bit], found);
                halves[v][bit] = found;
                if (part == n_points / 256 - 1)
                    planes[v][i] = found;
            }
        }
    }
}

// Eight numbers that stand `stride` apart in all their bytes.
#define EIGHT_TIMES(first, stride)                                                                                     \
    _mm512_setr_epi64((first), (first) + (stride), (first) + 2 * (stride), (first) + 3 * (stride),                     \
                      (first) + 4 * (stride), (first) + 5 * (stride), (first) + 6 * (stride), (first) + 7 * (stride))
#define EACH_BYTE 0x0101010101010101

// Both bytes of 32 of the 64 points, four in each 64 bits: those from `first` on, the next four `stride` further on.
static inline __m512i join_planes(const __m512i planes[2], int first, int stride) {
    const __m512i places = EIGHT_TIMES(0x4303420241014000 + EACH_BYTE * first, EACH_BYTE * stride);
    return _mm512_permutex2var_epi8(planes[0], places, planes[1]);
}

// Where the sign bytes of a block stand: that of the k-th 8 of the q-th 32 weights at first + k * stride + q * step.
typedef struct {
    int first, stride, step;
} sign_places;

// The points of four blocks of 32 points of eight values; those of two blocks are looked up side by side.
ALWAYS_INLINE void look_up_8(const packed_grid *grid, int n_points, const grid_indexes at[2], const __m512i signs[4],
                             sign_places sign_at, block_points out[4]) {
    __m512i planes[2][2];
    look_up(grid, n_points, 2, at, planes);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        const __m512i points = join_planes(planes[r / 2], r % 2 * 32, 4);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const int64_t of_points = 0x0001000203000000 + 0x0404000404000000 * h;
            const int64_t of_signs = 0x0000400000400000 +
                                     0x0000010000010000 * (sign_at.first + 2 * h * sign_at.stride) +
                                     0x0000000000010000 * sign_at.stride;
            const int64_t steps = 0x0808000808000000 + 0x0000010000010000 * sign_at.step;
            out[r].codes[h] = _mm512_permutex2var_epi8(points, EIGHT_TIMES(of_points + of_signs, steps), signs[r]);
        }
    }
}

// The points of four blocks of 64 points of four values.
ALWAYS_INLINE void look_up_4(const packed_grid *grid, int n_points, const grid_indexes at[4], const __m512i signs[4],
                             block_points out[4]) {
    __m512i planes[4][2];
    look_up(grid, n_points, 4, at, planes);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        out[r] = (block_points){{join_planes(planes[r], 0, 8), join_planes(planes[r], 4, 8)}, signs[r]};
}

// Numbers that lie anywhere in 64 bits, as the lower bits of eight bytes; what is above them is left.
static inline __m512i spread_bits(__m512i packed, int64_t places) {
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(places), packed);
}

// Eight signs from each 7 bits, whose parity is the eighth.
static inline __m512i with_parity(__m512i signs) {
    return _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(0x010204081020407f), 0);
}

// A format's points, and how many values they have: 8 or 4.
typedef struct {
    const packed_grid *grid;
    int n_values;
} point_layout;

// The k-th 8 of each 32 weights, unsigned. For points of eight values the i-th bits of six bytes become the i-th byte,
// of which one table looks at bits 0 to 2 and another at bits 3 to 5. For those of four values signs are put above
// codes.
static inline __m512i column_of_points(point_layout l, const block_points *points, int k) {
    const __m512i packed = points->codes[k / 2];
    if (l.n_values == 8) {
        const __m512i codes = _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64((int64_t)0x8040201008040201), packed, 0);
        return _mm512_permutexvar_epi8(codes, _mm512_load_si512(l.grid->weights[k % 2]));
    }
    const __m512i code = spread_bits(packed, 0x1916131009060300 + 0x20 * EACH_BYTE * (k % 2));
    const __m512i sign = spread_bits(points->signs, (8 * k + 61) % 64 * EACH_BYTE + 0x0706050403020100);
    return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi64(_mm512_set1_epi8(7), code, sign, 0xca),
                                   _mm512_load_si512(l.grid->weights[0]));
}

// The k-th 64 bits of a register in memory, four times.
static inline __m256i repeat_64(const __m512i *packed, int k) {
    int64_t bits;
    __builtin_memcpy(&bits, (const char *)packed + 8 * k, sizeof bits);
    return _mm256_set1_epi64x(bits);
}

// The k-th 32 weights, in order, of points that lie in memory.
static inline __m256i chunk_of_points(point_layout l, const block_points *points, int k) {
    const __m256i weights = load_256(l.grid->weights[0]);
    const __m256i packed = _mm256_blend_epi32(repeat_64(&points->codes[0], k), repeat_64(&points->codes[1], k), 0xf0);
    if (l.n_values == 8) {
        const __m256i codes = _mm256_gf2p8affine_epi64_epi8(_mm256_set1_epi64x((int64_t)0x8040201008040201), packed, 0);
        return _mm256_permutexvar_epi8(_mm256_srlv_epi64(codes, _mm256_setr_epi64x(0, 3, 0, 3)), weights);
    }
    const __m256i code = _mm256_multishift_epi64_epi8(
        _mm256_setr_epi64x(0x1916131009060300, 0x3936333029262320, 0x1916131009060300, 0x3936333029262320), packed);
    const __m256i sign = _mm256_multishift_epi64_epi8(
        _mm256_setr_epi64x(0x04030201003f3e3d, 0x0c0b0a0908070605, 0x14131211100f0e0d, 0x1c1b1a1918171615),
        repeat_64(&points->signs, k));
    return _mm256_permutexvar_epi8(_mm256_ternarylogic_epi64(_mm256_set1_epi8(7), code, sign, 0xca), weights);
}

#endif
#endif
