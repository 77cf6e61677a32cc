// Q4_0, Q4_1, Q5_0, Q5_1: 32 weights of 4 or 5 bits with one scale, and with an offset or a minimum.
#ifndef ENGINE_FORMATS_Q4_0_H
#define ENGINE_FORMATS_Q4_0_H

#include "../integer_block.h"
#include "../isimd.h"

// Nibbles of 16 bytes: low halves first. `high` gives each weight its fifth bit, `offset` is taken off.
static inline void unpack_nibbles_32(const uint8_t *qs, uint32_t high, int offset, int8_t *q) {
    for (int i = 0; i < 16; i++) {
        q[i] = (int8_t)(((qs[i] & 15) | (high >> i & 1) << 4) - offset);
        q[i + 16] = (int8_t)((qs[i] >> 4 | (high >> (i + 16) & 1) << 4) - offset);
    }
}

static inline void unpack_Q4_0(const void *block, integer_block *out) {
    const block_Q4_0 *b = block;
    unpack_nibbles_32(b->qs, 0, 8, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    out->d = f16_to_f32(b->d);
}

static inline void unpack_Q4_1(const void *block, integer_block *out) {
    const block_Q4_1 *b = block;
    unpack_nibbles_32(b->qs, 0, 0, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    set_sub_blocks(out->min, 0, 32, 1);
    out->d = f16_to_f32(b->d);
    out->min_d = f16_to_f32(b->m);
}

static inline void unpack_Q5_0(const void *block, integer_block *out) {
    const block_Q5_0 *b = block;
    unpack_nibbles_32(b->qs, b->qh, 16, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    out->d = f16_to_f32(b->d);
}

static inline void unpack_Q5_1(const void *block, integer_block *out) {
    const block_Q5_1 *b = block;
    unpack_nibbles_32(b->qs, b->qh, 0, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    set_sub_blocks(out->min, 0, 32, 1);
    out->d = f16_to_f32(b->d);
    out->min_d = f16_to_f32(b->m);
}

#if defined(__AVX2__)
static inline __m256i fifth_bits_32(uint32_t bits) {
    return _mm256_and_si256(bytes_of_bits(bits), _mm256_set1_epi8(16));
}

static inline __m256i chunk_Q4_0(const void *block, int k) {
    (void)k;
    return nibbles_32(((const block_Q4_0 *)block)->qs);
}
static inline __m256i chunk_Q4_1(const void *block, int k) {
    (void)k;
    return nibbles_32(((const block_Q4_1 *)block)->qs);
}
static inline __m256i chunk_Q5_0(const void *block, int k) {
    const block_Q5_0 *b = block;
    (void)k;
    return _mm256_or_si256(nibbles_32(b->qs), fifth_bits_32(b->qh));
}
static inline __m256i chunk_Q5_1(const void *block, int k) {
    const block_Q5_1 *b = block;
    (void)k;
    return _mm256_or_si256(nibbles_32(b->qs), fifth_bits_32(b->qh));
}

static inline two_runs with_fifth_bits(two_runs low, uint32_t first, uint32_t second) {
#if defined(__AVX512VNNI__)
    const __m256i fifth = _mm256_set1_epi8(16);
    return (two_runs){_mm256_mask_add_epi8(low.low, (first & 0xffff) | second << 16, low.low, fifth),
                      _mm256_mask_add_epi8(low.high, first >> 16 | (second & 0xffff0000), low.high, fifth)};
#else
    const __m256i a = fifth_bits_32(first), b = fifth_bits_32(second);
    return (two_runs){_mm256_or_si256(low.low, _mm256_permute2x128_si256(a, b, 0x20)),
                      _mm256_or_si256(low.high, _mm256_permute2x128_si256(a, b, 0x31))};
#endif
}

#define RUNS_OF_NIBBLES(NAME)                                                                                          \
    static inline two_runs runs_##NAME(const uint8_t *first, const uint8_t *second, int index) {                       \
        (void)index;                                                                                                   \
        return nibbles_of_runs(load_two_128(((const block_##NAME *)first)->qs, ((const block_##NAME *)second)->qs));   \
    }
#define RUNS_OF_5_BITS(NAME)                                                                                           \
    static inline two_runs runs_##NAME(const uint8_t *first, const uint8_t *second, int index) {                       \
        const block_##NAME *a = (const block_##NAME *)first, *b = (const block_##NAME *)second;                        \
        (void)index;                                                                                                   \
        return with_fifth_bits(nibbles_of_runs(load_two_128(a->qs, b->qs)), a->qh, b->qh);                             \
    }
RUNS_OF_NIBBLES(Q4_0)
RUNS_OF_NIBBLES(Q4_1)
RUNS_OF_5_BITS(Q5_0)
RUNS_OF_5_BITS(Q5_1)
#endif

#endif
