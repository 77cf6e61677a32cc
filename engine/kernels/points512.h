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

// What the weights of a 256-block are made of. The q-th 64 bits are of the q-th 32 weights:
//
//   points of eight values   codes[0] has the first two points, codes[1] the last two. Bytes 7, 6 and 5 hold the lower
//   bits
//                            of the codes of a point, their upper bits, and its signs; bytes 4, 3 and 2 those of the
//                            next.
//   points of four values    codes[0] has the first four points, codes[1] the last four, in 16 bits each; `signs` one
//   byte
//                            for 8 weights, in the lower half.
typedef struct {
    __m512i codes[2], signs;
} block_points;

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

// The points of two blocks of 32 points of eight values.
static inline void look_up_8(const packed_grid *grid, int n_points, __m512i low, __m512i high, const __m512i signs[2],
                             sign_places at, block_points out[2]) {
    __m512i planes[2];
    look_up_64(grid, n_points, low, high, planes);
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++) {
        const __m512i points = join_planes(planes, 32 * r, 4);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const int64_t of_points = 0x0001000203000000 + 0x0404000404000000 * h;
            const int64_t of_signs = 0x0000400000400000 + 0x0000010000010000 * (at.first + 2 * h * at.stride) +
                                     0x0000000000010000 * at.stride;
            const int64_t steps = 0x0808000808000000 + 0x0000010000010000 * at.step;
            out[r].codes[h] = _mm512_permutex2var_epi8(points, EIGHT_TIMES(of_points + of_signs, steps), signs[r]);
        }
    }
}

// The points of a block of 64 points of four values.
static inline void look_up_4(const packed_grid *grid, int n_points, __m512i low, __m512i high, block_points *out) {
    __m512i planes[2];
    look_up_64(grid, n_points, low, high, planes);
    out->codes[0] = join_planes(planes, 0, 8);
    out->codes[1] = join_planes(planes, 4, 8);
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
// which tables then look at the lower or upper half of.
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
