// Products with few tokens on vector levels: four weight rows at a time against one activation row.
//
// A format of 256-blocks gives `chunk(block, k)`, 32 weights as bytes u, and `scales(block, &mins)`. The weights are
// u - offset with u <= 129, or u itself where `is_signed`. Scales are sixteen int16, one for 16 weights, or
// (`sub_block` 32) eight in each half; minimums likewise sixteen, or eight in the lower half. A format whose packing
// puts the two halves of 32 weights into the nibbles of 16 bytes, or whose blocks are 32 weights, gives `runs`: two
// runs of 32 weights side by side. Four rows share the activation loads, and give the horizontal sums and the chain of
// fused multiply-adds four lanes to work on.
#ifndef ENGINE_DECODE_H
#define ENGINE_DECODE_H

#include "isimd.h"
#include "matmul.h"

#include <stddef.h>

#if defined(__AVX2__)

typedef __m256i chunk_fn(const void *block, int k);
typedef __m256i scales_fn(const void *block, __m256i *mins);
typedef __m128 d_fn(const uint8_t *const blocks[4]);
typedef two_runs runs_fn(const uint8_t *first, const uint8_t *second, int index);

typedef struct {
    int block_size, block_bytes, sub_block, has_min, activation;
    int is_signed, largest, offset; // largest u, for unsigned ones
    chunk_fn *chunk;
    scales_fn *scales; // of 256-blocks
    d_fn *d, *min_d;
    runs_fn *runs; // or NULL
} vector_format;

enum { BYTES_AHEAD = 16 << 10 }; // that are being fetched from memory, or a little more

// Keeps the compiler from turning a chain of additions into a tree, for which it would have to put its leaves on the
// stack.
#define KEEP_ORDER(vector) __asm__("" : "+x"(vector))

// The weights of a chunk times activations, as int16 sums of two. Signed: |u| * (x with the sign of u), where
// 128 * 127 * 2 still fits.
ALWAYS_INLINE __m256i dot_pairs(vector_format f, __m256i u, __m256i x) {
    return f.is_signed ? dot_pairs_u8(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u)) : dot_pairs_u8(u, x);
}

// What two_runs takes off: signed weights are made unsigned for VNNI.
ALWAYS_INLINE int offset_of_runs(vector_format f) { return f.is_signed ? SIGNED_OFFSET : f.offset; }

ALWAYS_INLINE two_runs runs_of_activations(const int8_t *first, const int8_t *second) {
    const __m256i a = load_256(first), b = load_256(second);
    return (two_runs){_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}

// The weights of two runs times activations: four sums of each.
ALWAYS_INLINE __m256i dot_runs(vector_format f, two_runs u, two_runs x) {
#if defined(__AVX512VNNI__)
    (void)f;
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), u.low, x.low), u.high, x.high);
#else
    const __m256i low = dot_pairs(f, u.low, x.low), high = dot_pairs(f, u.high, x.high), ones = _mm256_set1_epi16(1);
    return f.is_signed ? _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones))
                       : _mm256_madd_epi16(_mm256_add_epi16(low, high), ones);
#endif
}

// Four 256-blocks before any weight is looked at: their scales, the sums that their minimums are for, and what their
// offsets take off.
typedef struct {
    __m256i scales[4], min_dots[4], dots[4];
} blocks_256;

ALWAYS_INLINE blocks_256 begin_4_blocks_256(vector_format f, int offset, const uint8_t *const blocks[4],
                                            const int16_t *x_sums) {
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
        if (offset)
            b.dots[r] = _mm256_sub_epi32(b.dots[r], _mm256_mullo_epi32(b.min_dots[r], _mm256_set1_epi32(offset)));
    }
    return b;
}

// Each of the next three adds the products of a block, times the scales of their sub-blocks.

// Products are summed by two, and the multiplication by the scale adds up two of those.
ALWAYS_INLINE void add_chunks(vector_format f, const uint8_t *const blocks[4], const int8_t *x, blocks_256 *b) {
    __m256i high_scales[4];
    if (f.sub_block == 16)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            high_scales[r] = high_half_twice(b->scales[r]);
            b->scales[r] = low_half_twice(b->scales[r]);
        }
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        const __m256i values = load_256(x + 32 * k);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256i scale = f.sub_block == 32
                                      ? spread_scale(b->scales[r], k)
                                      : spread_two_scales(k < 4 ? b->scales[r] : high_scales[r], k % 4 * 2);
            b->dots[r] = add_dot_i16(b->dots[r], dot_pairs(f, f.chunk(blocks[r], k), values), scale);
            KEEP_ORDER(b->dots[r]);
        }
    }
}

// Two sub-blocks of 32 side by side.
ALWAYS_INLINE void add_runs(vector_format f, const uint8_t *const blocks[4], const int8_t *x, blocks_256 *b) {
    __m256i scales[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        scales[r] = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(b->scales[r]));
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const two_runs values = runs_of_activations(x + 64 * k, x + 64 * k + 32);
        const __m256i of_runs = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(2 * k));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256i scale = _mm256_permutevar8x32_epi32(scales[r], of_runs);
            const __m256i sums = dot_runs(f, f.runs(blocks[r], blocks[r], k), values);
            b->dots[r] = _mm256_add_epi32(b->dots[r], _mm256_mullo_epi32(sums, scale));
            KEEP_ORDER(b->dots[r]);
        }
    }
}

#if defined(__AVX512VNNI__)
// Whether VNNI's sums of four products can be packed to int16, whatever the activations are: two chunks of two
// sub-blocks each then share one multiplication.
ALWAYS_INLINE int fours_can_be_packed(vector_format f) {
    return f.sub_block == 16 && !f.is_signed && 4 * 127 * f.largest <= 32767;
}

ALWAYS_INLINE void add_packed_fours(vector_format f, const uint8_t *const blocks[4], const int8_t *x, blocks_256 *b) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i even_then_odd = _mm256_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        b->scales[r] = _mm256_permutexvar_epi16(even_then_odd, b->scales[r]);
#pragma GCC unroll 4
    for (int k = 0; k < 8; k += 2) {
        const __m256i first = load_256(x + 32 * k), second = load_256(x + 32 * k + 32);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m256i fours = _mm256_packs_epi32(_mm256_dpbusd_epi32(zero, f.chunk(blocks[r], k), first),
                                                     _mm256_dpbusd_epi32(zero, f.chunk(blocks[r], k + 1), second));
            b->dots[r] = _mm256_dpwssd_epi32(b->dots[r], fours, spread_two_scales_by_4(b->scales[r], k));
            KEEP_ORDER(b->dots[r]);
        }
    }
}
#endif

// Integer sums of four 256-blocks that meet the same activations; those of the minimums too.
ALWAYS_INLINE __m128i sums_of_4_blocks_256(vector_format f, const uint8_t *const blocks[4], const int8_t *x,
                                           const int16_t *x_sums, __m128i *min_sums) {
    blocks_256 b = begin_4_blocks_256(f, f.runs ? offset_of_runs(f) : f.offset, blocks, x_sums);
    if (f.runs)
        add_runs(f, blocks, x, &b);
#if defined(__AVX512VNNI__)
    else if (fours_can_be_packed(f))
        add_packed_fours(f, blocks, x, &b);
#endif
    else
        add_chunks(f, blocks, x, &b);
    if (f.has_min && f.sub_block == 32)
        *min_sums = sum_lanes_of_4_halves(_mm256_castsi256_si128(b.min_dots[0]), _mm256_castsi256_si128(b.min_dots[1]),
                                          _mm256_castsi256_si128(b.min_dots[2]), _mm256_castsi256_si128(b.min_dots[3]));
    else if (f.has_min)
        *min_sums = sum_lanes_of_4(b.min_dots[0], b.min_dots[1], b.min_dots[2], b.min_dots[3]);
    return sum_lanes_of_4(b.dots[0], b.dots[1], b.dots[2], b.dots[3]);
}

// One 256-block of four rows, added to their chains.
ALWAYS_INLINE __m128 add_block_256(vector_format f, const uint8_t *const blocks[4], const int8_t *x,
                                   const int16_t *x_sums, float d_x, __m128 acc) {
    __m128i imin;
    const __m128i isum = sums_of_4_blocks_256(f, blocks, x, x_sums, &imin);
    acc = _mm_fmadd_ps(_mm_mul_ps(f.d(blocks), _mm_set1_ps(d_x)), _mm_cvtepi32_ps(isum), acc);
    return f.has_min ? _mm_fmadd_ps(_mm_mul_ps(f.min_d(blocks), _mm_set1_ps(d_x)), _mm_cvtepi32_ps(imin), acc) : acc;
}

// Two blocks of 32 (or one, `n` says) of four rows.
ALWAYS_INLINE __m128 add_blocks_32(vector_format f, int n, const uint8_t *const blocks[4], const int8_t *x,
                                   const int16_t *x_sums, const float *d_x, __m128 acc) {
    const int second = n == 2; // a missing block is the first again, and what comes of it is left alone
    const two_runs values = runs_of_activations(x, x + 32 * second);
    const uint8_t *const seconds[4] = {blocks[0] + second * f.block_bytes, blocks[1] + second * f.block_bytes,
                                       blocks[2] + second * f.block_bytes, blocks[3] + second * f.block_bytes};
    const int sums[2] = {x_sums[0] + x_sums[1], x_sums[2 * second] + x_sums[2 * second + 1]};
    __m256i dots[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        dots[r] = dot_runs(f, f.runs(blocks[r], seconds[r], 0), values);
    __m256i isums = sum_halves_of_4(dots[0], dots[1], dots[2], dots[3]);
    if (offset_of_runs(f)) {
        const __m128i both = n == 2 ? _mm_loadl_epi64((const void *)x_sums) : _mm_cvtsi32_si128(load_i32(x_sums));
        const __m128i offsets = _mm_madd_epi16(both, _mm_set1_epi16((short)offset_of_runs(f)));
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
            acc = _mm_fmadd_ps(_mm_mul_ps(f.min_d(b ? seconds : blocks), d), _mm_set1_ps((float)sums[b]), acc);
    }
    return acc;
}

// Four rows, block by block. Meanwhile what stands at `next`, as many bytes, is fetched into the second-level cache
// from the first byte to the last: one long stream suits memory and its prefetchers far better than four short ones,
// and the first-level cache is too small for it.
ALWAYS_INLINE __m128 add_blocks(vector_format f, const uint8_t *const rows[4], int b, int n, activation_row x,
                                __m128 acc) {
    const int64_t at = (int64_t)b * f.block_bytes;
    const uint8_t *const blocks[4] = {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at};
    const int8_t *q = x.q + (int64_t)b * f.block_size;
    const int16_t *x_sums = x.sums + (int64_t)b * (f.block_size / 16);
    return f.block_size == 256 ? add_block_256(f, blocks, q, x_sums, x.d[b], acc)
                               : add_blocks_32(f, n, blocks, q, x_sums, x.d + b, acc);
}

ALWAYS_INLINE __m128 dot_4_rows(vector_format f, const uint8_t *const rows[4], const uint8_t *next, int n_blocks,
                                activation_row x) {
    const int step = 256 / f.block_size; // blocks that share the fetching ahead
    __m128 acc = _mm_setzero_ps();
    int b = 0;
    for (; b + step <= n_blocks; b += step) {
        if (next)
            for (int line = 0; line < 4 * step * f.block_bytes; line += 64)
                _mm_prefetch((const char *)next + (int64_t)b * 4 * f.block_bytes + line, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int i = 0; i < step; i += 2)
            acc = add_blocks(f, rows, b + i, 2, x, acc);
    }
    if (f.block_size == 32) {
        for (; b + 2 <= n_blocks; b += 2)
            acc = add_blocks(f, rows, b, 2, x, acc);
        if (b < n_blocks)
            acc = add_blocks(f, rows, b, 1, x, acc);
    }
    return acc;
}

ALWAYS_INLINE void matmul_decode(vector_format f, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                                 const void *const *x, int n_x, float *const *y) {
    const int64_t ahead = (BYTES_AHEAD / (4 * row_bytes) + 1) * 4 * row_bytes;
    for (int r = 0; r < n_rows; r += 4) {
        const int n = n_rows - r < 4 ? n_rows - r : 4;
        const uint8_t *rows[4];
        for (int i = 0; i < 4; i++)
            rows[i] = w + (r + (i < n ? i : n - 1)) * row_bytes;
        for (int t = 0; t < n_x; t++) {
            float sums[4];
            const uint8_t *next = t == 0 ? rows[0] + ahead : NULL; // fetched once for all tokens
            _mm_storeu_ps(
                sums, dot_4_rows(f, rows, next, n_cols / f.block_size, activation_view(x[t], f.activation, n_cols)));
            for (int i = 0; i < n; i++)
                y[t][r + i] = sums[i];
        }
    }
}

#endif
#endif
