// Q4_K and Q5_K: 256 weights of 4 or 5 bits in sub-blocks of 32, with 6-bit scales and minimums.
#ifndef ENGINE_FORMATS_Q4_K_H
#define ENGINE_FORMATS_Q4_K_H

#include "../integer_block.h"
#include "../isimd.h"

#include <string.h>

// Twelve bytes hold eight scales and eight minimums of 6 bits: bytes 0-3 and 4-7 the first four of each, with the high
// pairs of the last four on top; bytes 8-11 the low nibbles of the last four.
static inline void unpack_scales_q4_k(const uint8_t *packed, integer_block *out) {
    for (int s = 0; s < 4; s++) {
        set_sub_blocks(out->scale, s, 32, packed[s] & 63);
        set_sub_blocks(out->min, s, 32, packed[s + 4] & 63);
        set_sub_blocks(out->scale, s + 4, 32, (packed[s + 8] & 15) | packed[s] >> 6 << 4);
        set_sub_blocks(out->min, s + 4, 32, packed[s + 8] >> 4 | packed[s + 4] >> 6 << 4);
    }
}

// Each 32 bytes of nibbles hold 64 weights: low halves, then high halves.
static inline void unpack_Q4_K(const void *block, integer_block *out) {
    const block_Q4_K *b = block;
    for (int i = 0; i < 256; i++)
        out->q[i] = (int8_t)(b->qs[i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15);
    unpack_scales_q4_k(b->scales, out);
    out->d = f16_to_f32(b->d);
    out->min_d = -f16_to_f32(b->dmin);
}

static inline void unpack_Q5_K(const void *block, integer_block *out) {
    const block_Q5_K *b = block;
    for (int i = 0; i < 256; i++) {
        const int high = b->qh[i % 32] >> (i / 32) & 1;
        out->q[i] = (int8_t)((b->qs[i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15) | high << 4);
    }
    unpack_scales_q4_k(b->scales, out);
    out->d = f16_to_f32(b->d);
    out->min_d = -f16_to_f32(b->dmin);
}

#if defined(__AVX2__)
static inline __m256i nibbles_of_k(const uint8_t *qs, int k) {
    const __m256i packed = load_256(qs + k / 2 * 32);
    return _mm256_and_si256(k % 2 ? _mm256_srli_epi16(packed, 4) : packed, _mm256_set1_epi8(15));
}

static inline __m256i scales_of_q4_k(const uint8_t *packed, __m256i *mins) {
    uint32_t a[3];
    memcpy(a, packed, 12);
    const uint32_t scales_high = (a[2] & 0x0f0f0f0f) | (a[0] >> 2 & 0x30303030);
    const uint32_t mins_high = (a[2] >> 4 & 0x0f0f0f0f) | (a[1] >> 2 & 0x30303030);
    const __m128i all = _mm_setr_epi32((int)(a[0] & 0x3f3f3f3f), (int)scales_high, (int)(a[1] & 0x3f3f3f3f), (int)mins_high);
    *mins = twice_each_i16(_mm_unpackhi_epi64(all, all));
    return twice_each_i16(all);
}

static inline __m256i chunk_Q4_K(const void *block, int k) { return nibbles_of_k(((const block_Q4_K *)block)->qs, k); }
static inline __m256i scales_Q4_K(const void *block, __m256i *mins) {
    return scales_of_q4_k(((const block_Q4_K *)block)->scales, mins);
}

static inline __m256i chunk_Q5_K(const void *block, int k) {
    const block_Q5_K *b = block;
    const __m256i high = _mm256_and_si256(load_256(b->qh), _mm256_set1_epi8((char)(1 << k)));
    return _mm256_or_si256(nibbles_of_k(b->qs, k), k < 4 ? _mm256_slli_epi16(high, 4 - k) : _mm256_srli_epi16(high, k - 4));
}
static inline __m256i scales_Q5_K(const void *block, __m256i *mins) {
    return scales_of_q4_k(((const block_Q5_K *)block)->scales, mins);
}
#endif

#endif
