// Products with few tokens on vector levels: four weight rows at a time against one activation row.
//
// A format gives `chunk(block, k)`, 32 weights as bytes u, and `scales(block, &mins)`, sixteen int16 for its sub-blocks.
// The weights are u - offset with u <= 129 (KIND_UNSIGNED), or u itself (KIND_SIGNED). Four rows share the activation
// loads, and give the horizontal sums and the chain of fused multiply-adds four lanes to work on.
#ifndef ENGINE_DECODE_H
#define ENGINE_DECODE_H

#include "isimd.h"
#include "matmul.h"

#if defined(__AVX2__)

typedef __m256i chunk_fn(const void *block, int k);
typedef __m256i scales_fn(const void *block, __m256i *mins);
typedef __m128 d_fn(const uint8_t *const blocks[4]);

typedef struct {
    int block_size, block_bytes, has_min, activation;
    int is_signed, offset;
    chunk_fn *chunk;
    scales_fn *scales; // of 256-blocks
    d_fn *d, *min_d;
} vector_format;

ALWAYS_INLINE __m256i dot_pairs(int is_signed, __m256i u, __m256i x) {
    // signed: |u| * (x with the sign of u); 128 * 127 * 2 still fits
    return is_signed ? dot_pairs_u8(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u)) : dot_pairs_u8(u, x);
}

// Lanes whose sum is the integer sum of a 256-block, and those of its minimums.
ALWAYS_INLINE __m256i block_256_sums(vector_format f, const uint8_t *block, const int8_t *x, __m256i sums,
                                     __m256i *min_sums) {
    __m256i mins = _mm256_setzero_si256();
    const __m256i scales = f.scales(block, &mins);
    __m256i acc = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        acc = add_dot_i16(acc, dot_pairs(f.is_signed, f.chunk(block, k), load_256(x + 32 * k)), spread_scales(scales, k));
    if (f.offset) {
        const __m256i scaled = _mm256_madd_epi16(scales, sums);
        acc = _mm256_sub_epi32(acc, _mm256_mullo_epi32(scaled, _mm256_set1_epi32(f.offset)));
    }
    if (f.has_min)
        *min_sums = _mm256_madd_epi16(mins, sums);
    return acc;
}

// Four rows, block by block. The rows that come next are read ahead into the cache.
ALWAYS_INLINE __m128 dot_4_rows(vector_format f, const uint8_t *const rows[4], int64_t row_bytes, int n_blocks,
                                activation_row x) {
    __m128 acc = _mm_setzero_ps();
    for (int b = 0; b < n_blocks; b++) {
        const int64_t at = (int64_t)b * f.block_bytes;
        const uint8_t *const blocks[4] = {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at};
        const int8_t *q = x.q + (int64_t)b * f.block_size;
        __m256i dots[4], min_dots[4];
        __m128i isum, imin;
        (void)row_bytes;
        if (f.block_size == 256) {
            const __m256i sums = load_256(x.sums + 16 * (int64_t)b);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                dots[r] = block_256_sums(f, blocks[r], q, sums, &min_dots[r]);
            isum = sum_lanes_of_4(dots[0], dots[1], dots[2], dots[3]);
            if (f.has_min)
                imin = sum_lanes_of_4(min_dots[0], min_dots[1], min_dots[2], min_dots[3]);
        } else {
            const __m256i values = load_256(q);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                const __m256i u = f.chunk(blocks[r], 0);
                dots[r] = f.is_signed ? dot_fours_u8(_mm256_abs_epi8(u), _mm256_sign_epi8(values, u)) : dot_fours_u8(u, values);
            }
            isum = sum_lanes_of_4(dots[0], dots[1], dots[2], dots[3]);
            const int sum = x.sums[2 * (int64_t)b] + x.sums[2 * (int64_t)b + 1];
            if (f.offset)
                isum = _mm_sub_epi32(isum, _mm_set1_epi32(f.offset * sum));
            if (f.has_min)
                imin = _mm_set1_epi32(sum);
        }
        const __m128 d_x = _mm_set1_ps(x.d[b]);
        acc = _mm_fmadd_ps(_mm_mul_ps(f.d(blocks), d_x), _mm_cvtepi32_ps(isum), acc);
        if (f.has_min)
            acc = _mm_fmadd_ps(_mm_mul_ps(f.min_d(blocks), d_x), _mm_cvtepi32_ps(imin), acc);
    }
    return acc;
}

ALWAYS_INLINE void matmul_decode(vector_format f, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                                 const void *const *x, int n_x, float *const *y) {
    for (int r = 0; r < n_rows; r += 4) {
        const int n = n_rows - r < 4 ? n_rows - r : 4;
        const uint8_t *rows[4];
        for (int i = 0; i < 4; i++)
            rows[i] = w + (r + (i < n ? i : n - 1)) * row_bytes;
        for (int t = 0; t < n_x; t++) {
            float sums[4];
            _mm_storeu_ps(sums, dot_4_rows(f, rows, row_bytes, n_cols / f.block_size,
                                           activation_view(x[t], f.activation, n_cols)));
            for (int i = 0; i < n; i++)
                y[t][r + i] = sums[i];
        }
    }
}

#endif
#endif
