// IQ4_NL, IQ4_XS, MXFP4: nibbles that index a table of sixteen values.
#ifndef ENGINE_FORMATS_IQ4_H
#define ENGINE_FORMATS_IQ4_H

#include "../integer_block.h"
#include "../isimd.h"

#include <string.h>

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; // twice E2M1

static inline void unpack_table_32(const uint8_t *qs, const int8_t *table, int8_t *q) {
    for (int i = 0; i < 16; i++) {
        q[i] = table[qs[i] & 15];
        q[i + 16] = table[qs[i] >> 4];
    }
}

// 2^(e - 128), exact: the two smallest are subnormal.
static inline float mxfp4_scale(uint8_t e) {
    return float_of_bits(e < 2 ? (uint32_t)0x200000 << e : (uint32_t)(e - 1) << 23);
}

static inline void unpack_IQ4_NL(const void *block, integer_block *out) {
    const block_IQ4_NL *b = block;
    unpack_table_32(b->qs, iq4_values, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    out->d = f16_to_f32(b->d);
}

static inline void unpack_MXFP4(const void *block, integer_block *out) {
    const block_MXFP4 *b = block;
    unpack_table_32(b->qs, mxfp4_values, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    out->d = mxfp4_scale(b->e);
}

static inline void unpack_IQ4_XS(const void *block, integer_block *out) {
    const block_IQ4_XS *b = block;
    for (int s = 0; s < 8; s++) {
        const int scale = (b->scales_l[s / 2] >> 4 * (s % 2) & 15) | (b->scales_h >> 2 * s & 3) << 4;
        unpack_table_32(b->qs + 16 * s, iq4_values, out->q + 32 * s);
        set_sub_blocks(out->scale, s, 32, scale - 32);
    }
    out->d = f16_to_f32(b->d);
}

#if defined(__AVX2__)
static inline __m256i table_32(const uint8_t *qs, const int8_t *table) {
    return _mm256_shuffle_epi8(load_128_twice(table), nibbles_32(qs));
}

static inline __m256i chunk_IQ4_NL(const void *block, int k) {
    (void)k;
    return table_32(((const block_IQ4_NL *)block)->qs, iq4_values);
}

static inline __m256i chunk_MXFP4(const void *block, int k) {
    static const int8_t shifted[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; // mxfp4_values + 12
    (void)k;
    return table_32(((const block_MXFP4 *)block)->qs, shifted);
}

static inline __m128 d_MXFP4(const uint8_t *const blocks[4]) {
    const uint32_t packed = *blocks[0] | *blocks[1] << 8 | *blocks[2] << 16 | (uint32_t)*blocks[3] << 24;
    const __m128i e = _mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)packed));
    const __m128i twice = _mm_max_epi32(_mm_slli_epi32(e, 23), _mm_set1_epi32(0x400000)); // 2^-127 is subnormal
    return _mm_mul_ps(_mm_castsi128_ps(twice), _mm_set1_ps(0.5f));
}

static inline two_runs table_of_runs(__m256i packed, const int8_t *table, int offset) {
    const __m256i values = _mm256_add_epi8(load_128_twice(table), _mm256_set1_epi8((char)offset));
    const two_runs indexes = nibbles_of_runs(packed);
    return (two_runs){_mm256_shuffle_epi8(values, indexes.low), _mm256_shuffle_epi8(values, indexes.high)};
}

static inline two_runs runs_IQ4_NL(const uint8_t *first, const uint8_t *second, int index) {
    (void)index;
    return table_of_runs(load_two_128(((const block_IQ4_NL *)first)->qs, ((const block_IQ4_NL *)second)->qs),
                         iq4_values, SIGNED_OFFSET);
}

static inline two_runs runs_MXFP4(const uint8_t *first, const uint8_t *second, int index) {
    (void)index;
    return table_of_runs(load_two_128(((const block_MXFP4 *)first)->qs, ((const block_MXFP4 *)second)->qs),
                         mxfp4_values, 12);
}

static inline two_runs runs_IQ4_XS(const uint8_t *block, const uint8_t *same, int index) {
    (void)same;
    return table_of_runs(load_256(((const block_IQ4_XS *)block)->qs + 32 * index), iq4_values, SIGNED_OFFSET);
}

static inline __m256i chunk_IQ4_XS(const void *block, int k) {
    return table_32(((const block_IQ4_XS *)block)->qs + 16 * k, iq4_values);
}

static inline __m256i scales_IQ4_XS(const void *block, __m256i *mins) {
    const block_IQ4_XS *b = block;
    int32_t packed_low;
    (void)mins;
    memcpy(&packed_low, b->scales_l, 4);
    const __m256i steps = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i low =
        _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(packed_low), steps), _mm256_set1_epi32(15));
    const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(b->scales_h), _mm256_srli_epi32(steps, 1));
    const __m256i scale = _mm256_or_si256(low, _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
    const __m256i centred = _mm256_sub_epi32(scale, _mm256_set1_epi32(32));
    return scales_from_i32(centred);
}
#endif

#endif
