// Q4_K and Q5_K: 256 weights of 4 or 5 bits in sub-blocks of 32, with 6-bit scales and minimums.
#ifndef ENGINE_FORMATS_Q4_K_H
#define ENGINE_FORMATS_Q4_K_H

#include "../integer_block.h"
#include "../isimd.h"

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

// From the sixteen bytes that start both blocks (d, dmin, scales).
static inline __m256i scales_of_q4_k(const void *block, __m256i *mins) {
    const __m128i head = load_128(block);
    const __m128i low = _mm_shuffle_epi8(head, _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m128i high =
        _mm_shuffle_epi8(head, _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11));
    const __m128i low_bits = _mm_and_si128(_mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 0, 4)),
                                           _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    const __m128i high_bits = _mm_and_si128(_mm_srli_epi16(high, 2), _mm_set1_epi8(0x30));
    const __m256i all = _mm256_cvtepu8_epi16(_mm_or_si128(low_bits, high_bits)); // scales, then minimums
    *mins = high_half_twice(all);
    return low_half_twice(all);
}

static inline __m256i chunk_Q4_K(const void *block, int k) { return nibbles_of_k(((const block_Q4_K *)block)->qs, k); }
static inline __m256i scales_Q4_K(const void *block, __m256i *mins) { return scales_of_q4_k(block, mins); }

static inline __m256i chunk_Q5_K(const void *block, int k) {
    const block_Q5_K *b = block;
    const __m256i high = _mm256_and_si256(load_256(b->qh), _mm256_set1_epi8((char)(1 << k)));
    return _mm256_or_si256(nibbles_of_k(b->qs, k),
                           k < 4 ? _mm256_slli_epi16(high, 4 - k) : _mm256_srli_epi16(high, k - 4));
}
static inline __m256i scales_Q5_K(const void *block, __m256i *mins) { return scales_of_q4_k(block, mins); }
#endif

#endif
