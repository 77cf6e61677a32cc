// Q2_K and Q3_K: 256 weights of 2 or 3 bits in sub-blocks of 16.
#ifndef ENGINE_FORMATS_Q2_K_H
#define ENGINE_FORMATS_Q2_K_H

#include "../integer_block.h"
#include "../isimd512.h"

// The 2-bit part of both: half h of the block is 32 bytes, whose bit pairs j hold weights 128 h + 32 j + 0..31.
static inline int two_bits_of(const uint8_t *qs, int i) { return qs[i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3; }

static inline void unpack_Q2_K(const void *block, integer_block *out) {
    const block_Q2_K *b = block;
    for (int i = 0; i < 256; i++)
        out->q[i] = (int8_t)two_bits_of(b->qs, i);
    for (int u = 0; u < 16; u++) {
        out->scale[u] = b->scales[u] & 15;
        out->min[u] = b->scales[u] >> 4;
    }
    out->d = f16_to_f32(b->d);
    out->min_d = -f16_to_f32(b->dmin);
}

// Scales are 6 bits: low nibbles in bytes 0-7, high pairs in bytes 8-11.
static inline int q3_k_scale(const uint8_t *scales, int u) {
    const int low = u < 8 ? scales[u] & 15 : scales[u - 8] >> 4;
    return (low | (scales[8 + u % 4] >> 2 * (u / 4) & 3) << 4) - 32;
}

static inline void unpack_Q3_K(const void *block, integer_block *out) {
    const block_Q3_K *b = block;
    for (int i = 0; i < 256; i++) {
        const int high = b->hmask[i % 32] >> (i / 32) & 1; // a set bit means that 4 is not taken off
        out->q[i] = (int8_t)(two_bits_of(b->qs, i) - (high ? 0 : 4));
    }
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)q3_k_scale(b->scales, u);
    out->d = f16_to_f32(b->d);
}

#if defined(__AVX2__)
static inline __m256i two_bits_32(const uint8_t *qs, int k) {
    return _mm256_and_si256(_mm256_srli_epi16(load_256(qs + k / 4 * 32), k % 4 * 2), _mm256_set1_epi8(3));
}

static inline __m256i chunk_Q2_K(const void *block, int k) { return two_bits_32(((const block_Q2_K *)block)->qs, k); }

static inline __m256i scales_Q2_K(const void *block, __m256i *mins) {
    const __m256i packed = _mm256_cvtepu8_epi16(load_128(((const block_Q2_K *)block)->scales));
    *mins = _mm256_srli_epi16(packed, 4);
    return _mm256_and_si256(packed, _mm256_set1_epi16(15));
}

static inline __m256i chunk_Q3_K(const void *block, int k) {
    const block_Q3_K *b = block;
    const __m256i high = _mm256_and_si256(load_256(b->hmask), _mm256_set1_epi8((char)(1 << k)));
    return _mm256_or_si256(two_bits_32(b->qs, k),
                           k < 2 ? _mm256_slli_epi16(high, 2 - k) : _mm256_srli_epi16(high, k - 2));
}

static inline __m256i scales_Q3_K(const void *block, __m256i *mins) {
    const __m128i end = load_128((const uint8_t *)block + 94); // two bytes before the scales, to stay inside the block
    const __m128i low = _mm_shuffle_epi8(end, _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 7, 8, 9));
    const __m128i high = _mm_shuffle_epi8(end, _mm_set1_epi32(0x0d0c0b0a));
    const __m128i low_bits = _mm_and_si128(_mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 4, 4)), _mm_set1_epi8(15));
    const __m128i high_bits = _mm_and_si128(_mm_srlv_epi32(high, _mm_setr_epi32(0, 2, 4, 6)), _mm_set1_epi8(3));
    const __m128i scales = _mm_or_si128(low_bits, _mm_slli_epi16(high_bits, 4));
    (void)mins;
    return _mm256_cvtepi8_epi16(_mm_sub_epi8(scales, _mm_set1_epi8(32)));
}
#endif

#if defined(__AVX512VNNI__)
static inline weights_256 wide_of_two_bits(const uint8_t *qs) {
    const __m512i packed = load_512(qs), mask = _mm512_set1_epi8(3);
#if defined(__GFNI__)
    return (weights_256){.u = {_mm512_and_si512(packed, mask), move_bits(packed, BIT_TO(0, 2) | BIT_TO(1, 3)),
                               move_bits(packed, BIT_TO(0, 4) | BIT_TO(1, 5)),
                               move_bits(packed, BIT_TO(0, 6) | BIT_TO(1, 7))}};
#else
    return (weights_256){.u = {_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask),
                               _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask),
                               _mm512_and_si512(_mm512_srli_epi16(packed, 6), mask)}};
#endif
}

static inline weights_256 wide_Q2_K(const uint8_t *block) { return wide_of_two_bits(((const block_Q2_K *)block)->qs); }

static inline weights_256 wide_Q3_K(const uint8_t *block) {
    const block_Q3_K *b = (const void *)block;
    weights_256 w = wide_of_two_bits(b->qs);
    // bit k is of the 32 weights from 32 k on; those in the upper halves of the registers are 128 further on
#if defined(__GFNI__)
    const __m512i high = load_256_twice(b->hmask);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i bit_to_2 = join_256(_mm256_set1_epi64x(BIT_TO(2, i)), _mm256_set1_epi64x(BIT_TO(2, i + 4)));
        w.u[i] = _mm512_or_si512(w.u[i], _mm512_gf2p8affine_epi64_epi8(high, bit_to_2, 0));
    }
#else
    const __m512i high = _mm512_srlv_epi64(load_256_twice(b->hmask), _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
    w.u[0] = with_bits(w.u[0], _mm512_slli_epi16(high, 2), 4);
    w.u[1] = with_bits(w.u[1], _mm512_slli_epi16(high, 1), 4);
    w.u[2] = with_bits(w.u[2], high, 4);
    w.u[3] = with_bits(w.u[3], _mm512_srli_epi16(high, 1), 4);
#endif
    return w;
}
#endif

#endif
