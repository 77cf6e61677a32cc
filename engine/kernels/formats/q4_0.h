// Q4_0, Q4_1, Q5_0, Q5_1: 32 weights of 4 or 5 bits with one scale, and with an offset or a minimum.
#ifndef ENGINE_FORMATS_Q4_0_H
#define ENGINE_FORMATS_Q4_0_H

#include "../integer_block.h"
#include "../isimd512.h"

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
    const __m256i a = fifth_bits_32(first), b = fifth_bits_32(second);
    return (two_runs){_mm256_or_si256(low.low, _mm256_permute2x128_si256(a, b, 0x20)),
                      _mm256_or_si256(low.high, _mm256_permute2x128_si256(a, b, 0x31))};
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

#if defined(__AVX512VNNI__)
// Of eight blocks whose nibbles begin at qs.
static inline weights_256 wide_of_nibbles(const uint8_t *qs, int block_bytes) {
    weights_256 w;
    set_nibbles(w.u, load_four_128(qs, block_bytes));
    set_nibbles(w.u + 2, load_four_128(qs + 4 * block_bytes, block_bytes));
    return w;
}

// Sixteen bits from each of four places.
static inline __mmask64 load_four_16(const uint8_t *p, int stride) {
    uint64_t bits = 0;
    for (int i = 0; i < 4; i++) {
        uint16_t word;
        __builtin_memcpy(&word, p + i * stride, sizeof word);
        bits |= (uint64_t)word << 16 * i;
    }
    return bits;
}

static inline weights_256 with_fifth_bits_wide(weights_256 w, const uint8_t *qh, int block_bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __mmask64 fifth = load_four_16(qh + i / 2 * 4 * block_bytes + i % 2 * 2, block_bytes);
        w.u[i] = _mm512_mask_add_epi8(w.u[i], fifth, w.u[i], _mm512_set1_epi8(16));
    }
    return w;
}

static inline weights_256 wide_Q4_0(const uint8_t *blocks) {
    return wide_of_nibbles(blocks + offsetof(block_Q4_0, qs), Q4_0_BLOCK_BYTES);
}
static inline weights_256 wide_Q4_1(const uint8_t *blocks) {
    return wide_of_nibbles(blocks + offsetof(block_Q4_1, qs), Q4_1_BLOCK_BYTES);
}
static inline weights_256 wide_Q5_0(const uint8_t *blocks) {
    return with_fifth_bits_wide(wide_of_nibbles(blocks + offsetof(block_Q5_0, qs), Q5_0_BLOCK_BYTES),
                                blocks + offsetof(block_Q5_0, qh), Q5_0_BLOCK_BYTES);
}
static inline weights_256 wide_Q5_1(const uint8_t *blocks) {
    return with_fifth_bits_wide(wide_of_nibbles(blocks + offsetof(block_Q5_1, qs), Q5_1_BLOCK_BYTES),
                                blocks + offsetof(block_Q5_1, qh), Q5_1_BLOCK_BYTES);
}
#endif

#endif
