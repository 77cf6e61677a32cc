// IQ4_NL, IQ4_XS, MXFP4: nibbles that index a table of sixteen values.
#ifndef ENGINE_FORMATS_IQ4_H
#define ENGINE_FORMATS_IQ4_H

#include "../integer_block.h"
#include "../isimd512.h"

#include <string.h>

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};    // twice E2M1
static const int8_t mxfp4_shifted[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; // + 12

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
    (void)k;
    return table_32(((const block_MXFP4 *)block)->qs, mxfp4_shifted);
}

static inline __m128 d_MXFP4(const uint8_t *const blocks[4]) {
    const uint32_t packed = *blocks[0] | *blocks[1] << 8 | *blocks[2] << 16 | (uint32_t)*blocks[3] << 24;
    const __m128i e = _mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)packed));
    const __m128i twice = _mm_max_epi32(_mm_slli_epi32(e, 23), _mm_set1_epi32(0x400000)); // 2^-127 is subnormal
    const __m128 d = _mm_mul_ps(_mm_castsi128_ps(twice), _mm_set1_ps(0.5f));
    return _mm_min_ps(d, _mm_set1_ps(0x1p127f)); // twice that is infinite
}

static inline two_runs table_of_runs(__m256i packed, const int8_t *table) {
    const __m256i values = load_128_twice(table);
    const two_runs indexes = nibbles_of_runs(packed);
    return (two_runs){_mm256_shuffle_epi8(values, indexes.low), _mm256_shuffle_epi8(values, indexes.high)};
}

static inline two_runs runs_IQ4_NL(const uint8_t *first, const uint8_t *second, int index) {
    (void)index;
    return table_of_runs(load_two_128(((const block_IQ4_NL *)first)->qs, ((const block_IQ4_NL *)second)->qs),
                         iq4_values);
}

static inline two_runs runs_MXFP4(const uint8_t *first, const uint8_t *second, int index) {
    (void)index;
    return table_of_runs(load_two_128(((const block_MXFP4 *)first)->qs, ((const block_MXFP4 *)second)->qs),
                         mxfp4_shifted);
}

static inline two_runs runs_IQ4_XS(const uint8_t *block, const uint8_t *same, int index) {
    (void)same;
    return table_of_runs(load_256(((const block_IQ4_XS *)block)->qs + 32 * index), iq4_values);
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

#if defined(__AVX512VNNI__)
static const uint8_t iq4_shifted[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                        129, 141, 153, 166, 181, 197, 217, 241}; // + 128

#if defined(__AVX512VBMI__)
// As set_nibbles, of a table that `values` holds four times: of an index its two upper bits do not matter.
static inline void look_up_nibbles(__m512i *u, __m512i packed, __m512i values) {
    KEEP_IN_REGISTER_512(packed);
    u[0] = _mm512_permutexvar_epi8(packed, values);
    u[1] = _mm512_permutexvar_epi8(high_nibbles(packed), values);
}
#endif

static inline weights_256 wide_of_table(__m512i first, __m512i second, const void *table) {
    const __m512i values = four_times(load_128(table));
    weights_256 w;
#if defined(__AVX512VBMI__)
    look_up_nibbles(w.u, first, values);
    look_up_nibbles(w.u + 2, second, values);
#else
    set_nibbles(w.u, first);
    set_nibbles(w.u + 2, second);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        w.u[i] = _mm512_shuffle_epi8(values, w.u[i]);
#endif
    return w;
}

// The nibbles of four blocks of 17 bytes. One load reaches those of three, and the exponents of all, see d_16_MXFP4.
static inline __m512i load_four_17(const uint8_t *blocks) {
#if defined(__AVX512VBMI__)
    const __m128i in_order = _mm_setr_epi8(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    const int block = MXFP4_BLOCK_BYTES * 0x01010101;
    const __m512i places = _mm512_add_epi8(four_times(in_order), each_128(0, block, 2 * block, 0));
    const uint8_t *last = blocks + 3 * MXFP4_BLOCK_BYTES + offsetof(block_MXFP4, qs);
    return _mm512_inserti32x4(_mm512_permutexvar_epi8(places, load_512(blocks)), load_128(last), 3);
#else
    return load_four_128(blocks + offsetof(block_MXFP4, qs), MXFP4_BLOCK_BYTES);
#endif
}

static inline weights_256 wide_IQ4_NL(const uint8_t *blocks) {
    const uint8_t *qs = blocks + offsetof(block_IQ4_NL, qs);
    return wide_of_table(load_four_128(qs, IQ4_NL_BLOCK_BYTES),
                         load_four_128(qs + 4 * IQ4_NL_BLOCK_BYTES, IQ4_NL_BLOCK_BYTES), iq4_shifted);
}
static inline weights_256 wide_MXFP4(const uint8_t *blocks) {
    return wide_of_table(load_four_17(blocks), load_four_17(blocks + 4 * MXFP4_BLOCK_BYTES), mxfp4_shifted);
}
static inline weights_256 wide_IQ4_XS(const uint8_t *block) {
    const uint8_t *qs = ((const block_IQ4_XS *)block)->qs;
    return wide_of_table(load_512(qs), load_512(qs + 64), iq4_shifted);
}

// As d_MXFP4.
static inline __m512 d_16_MXFP4(const uint8_t *const blocks[4], int at) {
#if defined(__AVX512VBMI__)
    const int block = MXFP4_BLOCK_BYTES << 24;
    const __m512i places = each_128(0, block, 2 * block, 3 * block);
    __m512i above = _mm512_setzero_si512(); // exponents in the upper bytes of the lanes
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        __mmask64 upper = 0x0008000800080008u << 4 * r;
        KEEP_IN_MASK(upper);
        above = _mm512_mask_permutexvar_epi8(above, upper, places, load_512(blocks[r] + at));
    }
    const __m512i powers = _mm512_srli_epi32(above, 1);
#else
    uint64_t first = 0, last = 0; // exponents of two blocks
    for (int r = 0; r < 4; r++) {
        const block_MXFP4 *b = (const void *)(blocks[r] + at);
        first |= (uint64_t)b[0].e << 8 * r | (uint64_t)b[1].e << (32 + 8 * r);
        last |= (uint64_t)b[2].e << 8 * r | (uint64_t)b[3].e << (32 + 8 * r);
    }
    const __m512i e = _mm512_cvtepu8_epi32(_mm_set_epi64x((int64_t)last, (int64_t)first));
    const __m512i powers = _mm512_slli_epi32(e, 23);
#endif
    __m512i least = _mm512_set1_epi32(0x400000);
    KEEP_IN_REGISTER_512(least);
    const __m512i twice = _mm512_max_epi32(powers, least);
    const __m512 d = _mm512_mul_ps(_mm512_castsi512_ps(twice), _mm512_set1_ps(0.5f));
    return _mm512_min_ps(d, _mm512_set1_ps(0x1p127f));
}

static inline scales_of_4 scales_4_of_iq4_xs(const uint8_t *const blocks[4]) {
    const __m512i heads = heads_of_4(blocks), rows = four_times(_mm_setr_epi32(0, 4, 8, 12));
    const __m512i high = _mm512_permutexvar_epi32(rows, heads); // above d
    const __m512i low = _mm512_permutexvar_epi32(_mm512_add_epi32(rows, _mm512_set1_epi32(1)), heads);
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    scales_of_4 s;
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
        const __m512i sub_blocks = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * p));
        const __m512i low_bits = _mm512_srlv_epi32(low, _mm512_slli_epi32(sub_blocks, 2));
        const __m512i high_bits =
            _mm512_srlv_epi32(high, _mm512_add_epi32(_mm512_slli_epi32(sub_blocks, 1), _mm512_set1_epi32(12)));
        const __m512i scales = _mm512_or_si512(_mm512_and_si512(low_bits, _mm512_set1_epi32(15)),
                                               _mm512_and_si512(high_bits, _mm512_set1_epi32(0x30)));
        s.scales[p] = _mm512_sub_epi32(scales, _mm512_set1_epi32(32));
    }
    return s;
}
#endif

#endif
