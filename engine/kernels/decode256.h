// Four rows against one activation row on AVX2, 32 weights in a register.
#ifndef ENGINE_DECODE256_H
#define ENGINE_DECODE256_H

#include "vector_format.h"

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// Keeps the compiler from turning a chain of additions into a tree, for which it would have to put its leaves on the
// stack.
#define KEEP_ORDER(vector) __asm__("" : "+x"(vector))

// The weights of a chunk times activations, as int16 sums of two. Signed: |u| * (x with the sign of u), where
// 128 * 127 * 2 still fits.
ALWAYS_INLINE __m256i dot_pairs(vector_format f, __m256i u, __m256i x) {
    return f.is_signed ? dot_pairs_u8(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u)) : dot_pairs_u8(u, x);
}

// The same for the k-th chunk of a block. Formats with grids have signs apart, which spares two instructions.
ALWAYS_INLINE __m256i dot_chunk(vector_format f, const uint8_t *block, const block_points *points, int k, __m256i x) {
    if (f.points && f.is_signed)
        return dot_pairs_u8(look_up_points(f.layout, block, points, k), give_signs(signs_of_points(points, k), x));
    return dot_pairs(f, chunk_of(f, block, points, k), x);
}

ALWAYS_INLINE two_runs runs_of_activations(const int8_t *first, const int8_t *second) {
    const __m256i a = load_256(first), b = load_256(second);
    return (two_runs){_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}

// The weights of two runs times activations: four sums of each.
ALWAYS_INLINE __m256i dot_runs(vector_format f, two_runs u, two_runs x) {
    const __m256i low = dot_pairs(f, u.low, x.low), high = dot_pairs(f, u.high, x.high), ones = _mm256_set1_epi16(1);
    return f.is_signed ? _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones))
                       : _mm256_madd_epi16(_mm256_add_epi16(low, high), ones);
}

// Four 256-blocks before any weight is looked at: their scales, the sums that their minimums are for, and what their
// offsets take off.
typedef struct {
    __m256i scales[4], min_dots[4], dots[4];
} blocks_256;

ALWAYS_INLINE blocks_256 begin_4_blocks_256(vector_format f, const uint8_t *const blocks[4], const int16_t *x_sums) {
    const __m256i sums_16 = load_256(x_sums);
    const __m128i sums_32 = _mm_hadd_epi16(_mm256_castsi256_si128(sums_16), _mm256_extracti128_si256(sums_16, 1));
    blocks_256 b;
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        __m256i mins = _mm256_setzero_si256();
        b.scales[r] = f.scales(blocks[r], &mins);
        const __m256i offsets = f.has_min ? mins : b.scales[r]; // what the sums of activations are multiplied by
        b.min_dots[r] = f.sub_block == 32
                            ? _mm256_zextsi128_si256(_mm_madd_epi16(_mm256_castsi256_si128(offsets), sums_32))
                            : _mm256_madd_epi16(offsets, sums_16);
        b.dots[r] = _mm256_setzero_si256();
        if (f.offset)
            b.dots[r] = _mm256_sub_epi32(b.dots[r], _mm256_mullo_epi32(b.min_dots[r], _mm256_set1_epi32(f.offset)));
    }
    return b;
}

// Both of the next two add the products of a block, times the scales of their sub-blocks.

// Products are summed by two, and the multiplication by the scale adds up two of those.
ALWAYS_INLINE void add_chunks(vector_format f, const uint8_t *const blocks[4], const int8_t *x, blocks_256 *b) {
    __m256i high_scales[4];
    if (f.sub_block == 16)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            high_scales[r] = high_half_twice(b->scales[r]);
            b->scales[r] = low_half_twice(b->scales[r]);
        }
    block_points points[4];
    begin_chunks(f, blocks, points);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const __m256i values = load_256(x + 32 * k);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256i scale = f.sub_block == 32
                                      ? spread_scale(b->scales[r], k)
                                      : spread_two_scales(k < 4 ? b->scales[r] : high_scales[r], k % 4 * 2);
            const __m256i pairs = dot_chunk(f, blocks[r], &points[r], k, values);
            b->dots[r] = _mm256_add_epi32(b->dots[r], _mm256_madd_epi16(pairs, scale));
            KEEP_ORDER(b->dots[r]);
        }
    }
}

// Two sub-blocks of 32 side by side.
ALWAYS_INLINE void add_runs(vector_format f, const uint8_t *const blocks[4], const int8_t *x, blocks_256 *b) {
    __m256i scales[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        scales[r] = low_half_twice(b->scales[r]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const two_runs values = runs_of_activations(x + 64 * k, x + 64 * k + 32);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const two_runs u = f.runs(blocks[r], blocks[r], k);
            const __m256i scale = spread_two_scales(scales[r], 2 * k);
            const __m256i low = _mm256_madd_epi16(dot_pairs(f, u.low, values.low), scale);
            const __m256i high = _mm256_madd_epi16(dot_pairs(f, u.high, values.high), scale);
            b->dots[r] = _mm256_add_epi32(b->dots[r], _mm256_add_epi32(low, high));
            KEEP_ORDER(b->dots[r]);
        }
    }
}

// One 256-block of four rows, added to their chains.
ALWAYS_INLINE __m128 add_block_256(vector_format f, const uint8_t *const blocks[4], const int8_t *x,
                                   const int16_t *x_sums, float d_x, __m128 acc) {
    blocks_256 b = begin_4_blocks_256(f, blocks, x_sums);
    if (f.runs)
        add_runs(f, blocks, x, &b);
    else
        add_chunks(f, blocks, x, &b);
    const __m128i isum = sum_lanes_of_4(b.dots[0], b.dots[1], b.dots[2], b.dots[3]);
    acc = _mm_fmadd_ps(_mm_mul_ps(f.d(blocks), _mm_set1_ps(d_x)), _mm_cvtepi32_ps(isum), acc);
    if (f.has_min) {
        const __m256i *m = b.min_dots;
        const __m128i imin = f.sub_block == 32
                                 ? sum_lanes_of_4_halves(_mm256_castsi256_si128(m[0]), _mm256_castsi256_si128(m[1]),
                                                         _mm256_castsi256_si128(m[2]), _mm256_castsi256_si128(m[3]))
                                 : sum_lanes_of_4(m[0], m[1], m[2], m[3]);
        acc = _mm_fmadd_ps(_mm_mul_ps(f.min_d(blocks), _mm_set1_ps(d_x)), _mm_cvtepi32_ps(imin), acc);
    }
    return acc;
}

// Two blocks of 32 (or one, `n` says) of four rows.
ALWAYS_INLINE __m128 add_blocks_32(vector_format f, int n, const uint8_t *const blocks[4], const int8_t *x,
                                   const int16_t *x_sums, const float *d_x, __m128 acc) {
    const int second = n == 2; // a missing block is the first again, and what comes of it is left alone
    const two_runs values = runs_of_activations(x, x + 32 * second);
    const uint8_t *const seconds[4] = {blocks[0] + second * f.block_bytes, blocks[1] + second * f.block_bytes,
                                       blocks[2] + second * f.block_bytes, blocks[3] + second * f.block_bytes};
    __m256i dots[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        dots[r] = dot_runs(f, f.runs(blocks[r], seconds[r], 0), values);
    __m256i isums = sum_halves_of_4(dots[0], dots[1], dots[2], dots[3]);
    if (f.offset) {
        const __m128i both = n == 2 ? _mm_loadl_epi64((const void *)x_sums) : _mm_cvtsi32_si128(load_i32(x_sums));
        const __m128i offsets = _mm_madd_epi16(both, _mm_set1_epi16((short)f.offset));
        isums = _mm256_sub_epi32(isums, _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(offsets),
                                                                    _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)));
    }
    const __m256 floats = _mm256_cvtepi32_ps(isums);
#pragma GCC unroll 2
    for (int b = 0; b < n; b++) {
        const __m128 d = _mm_set1_ps(d_x[b]),
                     isum = b ? _mm256_extractf128_ps(floats, 1) : _mm256_castps256_ps128(floats);
        acc = _mm_fmadd_ps(_mm_mul_ps(f.d(b ? seconds : blocks), d), isum, acc);
        if (f.has_min)
            acc = _mm_fmadd_ps(_mm_mul_ps(f.min_d(b ? seconds : blocks), d),
                               _mm_set1_ps((float)(x_sums[2 * b] + x_sums[2 * b + 1])), acc);
    }
    return acc;
}

// One block of 256, or `n` of 32, from block b on.
ALWAYS_INLINE __m128 add_blocks(vector_format f, const uint8_t *const rows[4], int b, int n, activation_row x,
                                __m128 acc) {
    const int64_t at = (int64_t)b * f.block_bytes;
    const uint8_t *const blocks[4] = {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at};
    const int8_t *q = x.q + (int64_t)b * f.block_size;
    const int16_t *x_sums = x.sums + (int64_t)b * (f.block_size / 16);
    return f.block_size == 256 ? add_block_256(f, blocks, q, x_sums, x.d[b], acc)
                               : add_blocks_32(f, n, blocks, q, x_sums, x.d + b, acc);
}

// Row r of four streams, 256 weights of each at a time.
ALWAYS_INLINE __m128 dot_4_rows(vector_format f, row_streams streams, int r, int n_blocks, activation_row x,
                                int fetches) {
    const int step = 256 / f.block_size;
    const uint8_t *rows[4];
    __m128 acc = _mm_setzero_ps();
    set_rows(streams, 4, r, rows);
    int b = 0;
    for (; b + step <= n_blocks; b += step) {
        if (fetches)
            fetch_of_streams(streams, 4, r * streams.row_bytes + (int64_t)b * f.block_bytes, step * f.block_bytes);
#pragma GCC unroll 4
        for (int i = 0; i < step; i += 2)
            acc = add_blocks(f, rows, b + i, 2, x, acc);
    }
    if (f.block_size == 32 && b < n_blocks) {
        if (fetches)
            fetch_of_streams(streams, 4, r * streams.row_bytes + (int64_t)b * f.block_bytes, step * f.block_bytes);
        for (; b + 2 <= n_blocks; b += 2)
            acc = add_blocks(f, rows, b, 2, x, acc);
        if (b < n_blocks)
            acc = add_blocks(f, rows, b, 1, x, acc);
    }
    return acc;
}

ALWAYS_INLINE void matmul_decode(vector_format f, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                                 const void *const *x, int n_x, float *const *y, const weight_rows *next) {
    const row_streams streams = streams_of(4, w, row_bytes, n_rows, next);
    for (int r = 0; r < streams.n_each; r++)
        for (int t = 0; t < n_x; t++) {
            float sums[4];
            _mm_storeu_ps(sums, dot_4_rows(f, streams, r, n_cols / f.block_size,
                                           activation_view(x[t], f.activation, n_cols), t == 0));
            store_of_rows(streams, 4, r, sums, y[t]);
        }
}

#endif
#endif
