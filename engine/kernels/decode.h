// Products with few tokens on vector levels: four weight rows at a time against one activation row.
//
// A format gives `chunk(block, k)`, 32 weights as bytes u, and for 256-blocks `scales(block, &mins)`. The weights are
// u - offset with u <= 129, or u itself where `is_signed`. Scales are sixteen int16, one for 16 weights, or
// (`sub_block` 32) eight in each half; minimums likewise sixteen, or eight in the lower half. Four rows share the
// activation loads, and give the horizontal sums and the chain of fused multiply-adds four lanes to work on.
#ifndef ENGINE_DECODE_H
#define ENGINE_DECODE_H

#include "isimd.h"
#include "matmul.h"

#include <stddef.h>

#if defined(__AVX2__)

typedef __m256i chunk_fn(const void *block, int k);
typedef __m256i scales_fn(const void *block, __m256i *mins);
typedef __m128 d_fn(const uint8_t *const blocks[4]);

typedef struct {
    int block_size, block_bytes, sub_block, has_min, activation;
    int is_signed, largest, offset; // largest u, for unsigned ones
    chunk_fn *chunk;
    scales_fn *scales; // of 256-blocks
    d_fn *d, *min_d;
} vector_format;

// Keeps the compiler from turning a chain of additions into a tree, for which it would have to put its leaves on the
// stack.
#define KEEP_ORDER(vector) __asm__("" : "+x"(vector))

// The weights of a chunk times activations, as int16 sums of two. Signed: |u| * (x with the sign of u), where
// 128 * 127 * 2 still fits.
ALWAYS_INLINE __m256i dot_pairs(vector_format f, __m256i u, __m256i x) {
    return f.is_signed ? dot_pairs_u8(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u)) : dot_pairs_u8(u, x);
}

// Integer sums of four 256-blocks that meet the same activations; those of the minimums too.
ALWAYS_INLINE __m128i sums_of_4_blocks_256(vector_format f, const uint8_t *const blocks[4], const int8_t *x,
                                           const int16_t *x_sums, __m128i *min_sums) {
    const __m256i sums_16 = load_256(x_sums);
    const __m128i sums_32 = _mm_hadd_epi16(_mm256_castsi256_si128(sums_16), _mm256_extracti128_si256(sums_16, 1));
    __m256i dots[4], min_dots[4], scales[4], high_scales[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        __m256i mins = _mm256_setzero_si256();
        scales[r] = f.scales(blocks[r], &mins);
        const __m256i offsets = f.has_min ? mins : scales[r]; // what the sums of activations are multiplied by
        min_dots[r] = f.sub_block == 32
                          ? _mm256_zextsi128_si256(_mm_madd_epi16(_mm256_castsi256_si128(offsets), sums_32))
                          : _mm256_madd_epi16(offsets, sums_16);
        dots[r] = _mm256_setzero_si256();
        if (f.offset)
            dots[r] = _mm256_sub_epi32(dots[r], _mm256_mullo_epi32(min_dots[r], _mm256_set1_epi32(f.offset)));
        if (f.sub_block == 16) {
            high_scales[r] = high_half_twice(scales[r]);
            scales[r] = low_half_twice(scales[r]);
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const __m256i values = load_256(x + 32 * k);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256i scale = f.sub_block == 32 ? spread_scale(scales[r], k)
                                                    : spread_two_scales(k < 4 ? scales[r] : high_scales[r], k % 4 * 2);
            dots[r] = add_dot_i16(dots[r], dot_pairs(f, f.chunk(blocks[r], k), values), scale);
            KEEP_ORDER(dots[r]);
        }
    }
    if (f.has_min && f.sub_block == 32)
        *min_sums = sum_lanes_of_4_halves(_mm256_castsi256_si128(min_dots[0]), _mm256_castsi256_si128(min_dots[1]),
                                          _mm256_castsi256_si128(min_dots[2]), _mm256_castsi256_si128(min_dots[3]));
    else if (f.has_min)
        *min_sums = sum_lanes_of_4(min_dots[0], min_dots[1], min_dots[2], min_dots[3]);
    return sum_lanes_of_4(dots[0], dots[1], dots[2], dots[3]);
}

// The same for blocks of 32.
ALWAYS_INLINE __m128i sums_of_4_blocks_32(vector_format f, const uint8_t *const blocks[4], const int8_t *x,
                                          const int16_t *x_sums, __m128i *min_sums) {
    const __m256i values = load_256(x);
    __m256i dots[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        const __m256i u = f.chunk(blocks[r], 0);
        dots[r] = f.is_signed ? dot_fours_u8(_mm256_abs_epi8(u), _mm256_sign_epi8(values, u)) : dot_fours_u8(u, values);
    }
    const __m128i isum = sum_lanes_of_4(dots[0], dots[1], dots[2], dots[3]);
    *min_sums = _mm_set1_epi32(x_sums[0] + x_sums[1]);
    return f.offset ? _mm_sub_epi32(isum, _mm_mullo_epi32(*min_sums, _mm_set1_epi32(f.offset))) : isum;
}

// Four rows, block by block. Meanwhile what follows at `next`, as many bytes, is fetched into the cache from the first
// byte to the last: one long stream suits memory and its prefetchers far better than four short ones.
ALWAYS_INLINE __m128 dot_4_rows(vector_format f, const uint8_t *const rows[4], const uint8_t *next, int n_blocks,
                                activation_row x) {
    const int step = 256 / f.block_size; // blocks that share the fetching ahead
    __m128 acc = _mm_setzero_ps();
    for (int first = 0; first < n_blocks; first += step) {
        if (next)
            for (int line = 0; line < 4 * step * f.block_bytes; line += 64)
                _mm_prefetch((const char *)next + (int64_t)first * 4 * f.block_bytes + line, _MM_HINT_T0);
        for (int b = first; b < first + step && b < n_blocks; b++) {
            const int64_t at = (int64_t)b * f.block_bytes;
            const uint8_t *const blocks[4] = {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at};
            const int8_t *q = x.q + (int64_t)b * f.block_size;
            const int16_t *x_sums = x.sums + (int64_t)b * (f.block_size / 16);
            __m128i imin;
            const __m128i isum = f.block_size == 256 ? sums_of_4_blocks_256(f, blocks, q, x_sums, &imin)
                                                     : sums_of_4_blocks_32(f, blocks, q, x_sums, &imin);
            const __m128 d_x = _mm_set1_ps(x.d[b]);
            acc = _mm_fmadd_ps(_mm_mul_ps(f.d(blocks), d_x), _mm_cvtepi32_ps(isum), acc);
            if (f.has_min)
                acc = _mm_fmadd_ps(_mm_mul_ps(f.min_d(blocks), d_x), _mm_cvtepi32_ps(imin), acc);
        }
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
            const uint8_t *next = t == 0 ? rows[0] + 4 * row_bytes : NULL; // fetched once for all tokens
            _mm_storeu_ps(
                sums, dot_4_rows(f, rows, next, n_cols / f.block_size, activation_view(x[t], f.activation, n_cols)));
            for (int i = 0; i < n; i++)
                y[t][r + i] = sums[i];
        }
    }
}

#endif
#endif
