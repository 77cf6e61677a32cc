// Weights from code books on AVX-512 VBMI, without a gather: code books of at most 4 KB are looked up by permutations
// of bytes, 64 indexes and 128 points at a time, and the codes that a point is made of are spread by shifts of their
// own for each byte.
//
// All of these formats stand in the order COLUMNS: the q-th 64 bits of four registers are the q-th 32 weights.
#ifndef ENGINE_POINTS512_H
#define ENGINE_POINTS512_H

#include "grids.h"
#include "isimd512.h"

#if defined(__AVX512VBMI__)

// The points of a 256-block. The q-th 64 bits hold those of the q-th 32 weights: four points of eight values, in order,
// or the first four of four values in codes[0] and the last four in codes[1]; and 32 signs, 8 for 8 weights, where
// point_layout says.
typedef struct {
    __m512i codes[2], signs;
} block_points;

typedef struct {
    const packed_grid *grid;
    int n_values;                // of a point: 8 or 4
    int first_sign, sign_stride; // bits: where the signs of the k-th 8 weights of 32 begin
} point_layout;

static inline int code_bits(point_layout l) { return l.n_values == 8 ? 2 : 3; }

// Looks up the 64 points low + 256 * high, of n_points in all. An index stays in its byte until its part of the table
// is reached, so no blends are needed.
static inline void look_up_64(const packed_grid *grid, int n_points, __m512i low, __m512i high, __m512i planes[2]) {
    const __mmask64 above = _mm512_movepi8_mask(low);
    planes[0] = planes[1] = low;
#pragma GCC unroll 16
    for (int first = 0; first < n_points; first += 128) {
        const __mmask64 half = first % 256 ? above : _knot_mask64(above);
        const __mmask64 here =
            n_points == 256 ? half : _mm512_mask_cmpeq_epi8_mask(half, high, _mm512_set1_epi8((char)(first / 256)));
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const uint8_t *part = grid->bytes[i] + first;
            planes[i] =
                _mm512_mask2_permutex2var_epi8(_mm512_load_si512(part), planes[i], here, _mm512_load_si512(part + 64));
        }
    }
}

// Both bytes of 32 of the 64 points, four in each 64 bits: those from `first` on, the next four `stride` further on.
static inline __m512i join_planes(const __m512i planes[2], int first, int stride) {
#define FOUR(q) (0x4303420241014000 + 0x0101010101010101 * (first + (q) * stride))
    const __m512i places = _mm512_setr_epi64(FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7));
#undef FOUR
    return _mm512_permutex2var_epi8(planes[0], places, planes[1]);
}

// The points of two blocks of 32 points of eight values.
static inline void look_up_8(const packed_grid *grid, int n_points, __m512i low, __m512i high, block_points out[2]) {
    __m512i planes[2];
    look_up_64(grid, n_points, low, high, planes);
    out[0].codes[0] = join_planes(planes, 0, 4);
    out[1].codes[0] = join_planes(planes, 32, 4);
}

// The points of a block of 64 points of four values.
static inline void look_up_4(const packed_grid *grid, int n_points, __m512i low, __m512i high, block_points *out) {
    __m512i planes[2];
    look_up_64(grid, n_points, low, high, planes);
    out->codes[0] = join_planes(planes, 0, 8);
    out->codes[1] = join_planes(planes, 4, 8);
}

// Numbers that lie anywhere in 64 bits, as the lower bits of eight bytes; what is above them is left.
static inline __m512i spread_bits(__m512i packed, uint64_t places) {
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64((int64_t)places), packed);
}

// Eight signs from each 7 bits, whose parity is the eighth.
static inline __m512i with_parity(__m512i signs) {
    return _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(0x010204081020407f), 0);
}

// Four sign bytes in each 64 bits, from 32 bytes.
static inline __m512i widen_signs(const void *signs) { return _mm512_cvtepu32_epi64(load_256(signs)); }

// Where the codes and signs of the k-th 8 of 32 weights lie in 64 bits.
static inline uint64_t code_places(point_layout l, int k) {
    return l.n_values == 8 ? 0x0e0c0a0806040200 + 0x1010101010101010 * (uint64_t)k
                           : 0x1916131009060300 + 0x2020202020202020 * (uint64_t)(k % 2);
}
static inline uint64_t sign_places(point_layout l, int k) { // above the code
    return 0x0706050403020100 +
           0x0101010101010101 * (uint64_t)((l.first_sign + l.sign_stride * k + 64 - code_bits(l)) % 64);
}

// The k-th 8 of each 32 weights, unsigned.
static inline __m512i column_of_points(point_layout l, const block_points *points, int k) {
    const __m512i code = spread_bits(points->codes[l.n_values == 8 ? 0 : k / 2], code_places(l, k));
    const __m512i sign = spread_bits(points->signs, sign_places(l, k));
    const __m512i mask = _mm512_set1_epi8((char)((1 << code_bits(l)) - 1));
    return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi64(mask, code, sign, 0xca),
                                   _mm512_load_si512(l.grid->weights));
}

static inline __m256i four_of_64(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    return _mm256_setr_epi64x((int64_t)a, (int64_t)b, (int64_t)c, (int64_t)d);
}

// The k-th 64 bits of a register in memory, four times.
static inline __m256i repeat_64(const __m512i *packed, int k) {
    int64_t bits;
    __builtin_memcpy(&bits, (const char *)packed + 8 * k, sizeof bits);
    return _mm256_set1_epi64x(bits);
}

// The k-th 32 weights, in order, of points that lie in memory.
static inline __m256i chunk_of_points(point_layout l, const block_points *points, int k) {
    __m256i codes = repeat_64(&points->codes[0], k);
    if (l.n_values == 4)
        codes = _mm256_blend_epi32(codes, repeat_64(&points->codes[1], k), 0xf0);
    const __m256i signs = repeat_64(&points->signs, k);
    const __m256i code = _mm256_multishift_epi64_epi8(
        four_of_64(code_places(l, 0), code_places(l, 1), code_places(l, 2), code_places(l, 3)), codes);
    const __m256i sign = _mm256_multishift_epi64_epi8(
        four_of_64(sign_places(l, 0), sign_places(l, 1), sign_places(l, 2), sign_places(l, 3)), signs);
    const __m256i mask = _mm256_set1_epi8((char)((1 << code_bits(l)) - 1));
    return _mm256_permutexvar_epi8(_mm256_ternarylogic_epi64(mask, code, sign, 0xca), load_256(l.grid->weights));
}

#endif
#endif
