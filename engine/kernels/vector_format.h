// What a weight format gives the vector levels.
//
// A format of 256-blocks gives `chunk(block, k)`, 32 weights as bytes u, and `scales(block, &mins)`. The weights are
// u - offset with u <= 129, or u itself where `is_signed`. Scales are sixteen int16, one for 16 weights, or
// (`sub_block` 32) eight in each half; minimums likewise sixteen, or eight in the lower half. A format of 32-blocks
// gives its only chunk.
//
// For single tokens (decode.h) AVX2 asks a format whose packing puts the two halves of 32 weights into the nibbles of
// 16 bytes, or whose blocks are 32 weights, for `runs`: two runs of 32 weights side by side. AVX-512 asks every format
// for `wide`: 256 weights in four registers, of one block or of eight. Formats with grids give no chunks but `points`,
// what is needed to look up the points of a block, and `layout`. With VBMI `points` looks them up, those of four
// blocks, and takes the place of `wide`, too.
#ifndef ENGINE_VECTOR_FORMAT_H
#define ENGINE_VECTOR_FORMAT_H

#include "matmul.h"
#include "points256.h"
#include "points512.h"

#if defined(__AVX2__)

typedef __m256i chunk_fn(const void *block, int k);
typedef __m256i scales_fn(const void *block, __m256i *mins);
typedef __m128 d_fn(const uint8_t *const blocks[4]);

#if defined(__AVX512VNNI__)
typedef weights_256 wide_fn(const uint8_t *block);
typedef scales_of_4 scales_4_fn(const uint8_t *const blocks[4]);
typedef __m512 d_16_fn(const uint8_t *const blocks[4], int at);
#else
typedef two_runs runs_fn(const uint8_t *first, const uint8_t *second, int index);
#endif

#if defined(__AVX512VBMI__)
typedef void points_fn(const uint8_t *const blocks[4], block_points out[4]);
#else
typedef void points_fn(const uint8_t *block, block_points *out);
#endif

typedef struct {
    int block_size, block_bytes, sub_block, has_min, activation;
    int is_signed, largest, offset; // largest u, for unsigned ones
    chunk_fn *chunk;
    scales_fn *scales; // of 256-blocks
    d_fn *d, *min_d;
    points_fn *points; // or NULL
    point_layout layout;
#if defined(__AVX512VNNI__)
    wide_fn *wide;
    group_order order;
    int has_signs;            // wide gives magnitudes and signs
    scales_4_fn *scales_4;    // of sub-blocks of 32 in pairs of registers
    int second_shift;         // by which registers 2 and 3 are too large, as a power of two
    d_16_fn *d_16, *min_d_16; // of four blocks of 32 of four rows, a block in each 128 bits; or NULL
#else
    runs_fn *runs; // or NULL
#endif
} vector_format;

// Sixteen int16, one for 16 weights, from scales or minimums as a format gives them.
ALWAYS_INLINE __m256i one_a_sub_block(vector_format f, __m256i values) {
    if (f.sub_block == 16)
        return values;
    const __m256i spread = _mm256_permute4x64_epi64(values, 0x50); // lower four in the lower half, upper four above
    return _mm256_unpacklo_epi16(spread, spread);
}

// Repeating what memory holds is a matter of the load units; the compiler would rather shuffle what it just stored.
#define KEEP_IN_MEMORY(variable) __asm__("" : "+m"(variable))

// What chunks of four blocks need to know before.
ALWAYS_INLINE void begin_chunks(vector_format f, const uint8_t *const blocks[4], block_points out[4]) {
    if (f.points)
#if defined(__AVX512VBMI__)
        f.points(blocks, out);
#else
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            f.points(blocks[r], &out[r]);
            KEEP_IN_MEMORY(out[r]);
        }
#endif
}

static inline __m256i flip_top_bits(__m256i u) { return _mm256_xor_si256(u, _mm256_set1_epi8((char)128)); }

// 32 weights, signed if the format is.
ALWAYS_INLINE __m256i chunk_of(vector_format f, const uint8_t *block, const block_points *points, int k) {
    if (!f.points)
        return f.chunk(block, k);
#if defined(__AVX512VBMI__)
    const __m256i u = chunk_of_points(f.layout, points, k);
    return f.is_signed ? flip_top_bits(u) : u;
#else
    return chunk_of_points(f.layout, f.is_signed, block, points, k);
#endif
}

// The same, unsigned: signed ones are raised by `offset`.
ALWAYS_INLINE __m256i unsigned_chunk(vector_format f, int offset, const uint8_t *block, const block_points *points,
                                     int k) {
    const __m256i u = chunk_of(f, block, points, k);
    if (!f.is_signed)
        return u;
    return offset == 128 ? flip_top_bits(u) : _mm256_add_epi8(u, _mm256_set1_epi8((char)offset));
}

#endif
#endif
