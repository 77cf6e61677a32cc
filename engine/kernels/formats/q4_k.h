// Q4_K and Q5_K: 256 weights of 4 or 5 bits in sub-blocks of 32, with 6-bit scales and minimums.
#ifndef ENGINE_FORMATS_Q4_K_H
#define ENGINE_FORMATS_Q4_K_H

#include "../integer_block.h"
#include "../isimd512.h"

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

#if defined(__AVX512VNNI__)
// Registers 0 and 1 get the sub-blocks 0, 2, 4, 6, registers 2 and 3 the others, so bytes (s, s', m, m') of sub-blocks
// 2l and 2l + 1 go to the l-th 128 bits: as they stand in the bytes 4-11 of a head, or from bytes 12-15 with their
// upper two bits from there.
static inline scales_of_4 scales_4_of_q4_k(const uint8_t *const blocks[4]) {
    const __m512i heads = heads_of_4(blocks);
    // words 2-3, 4-5 and 6-7 of a head are the bytes 4-7, 8-11 and 12-15
    const __m512i rows = four_times(_mm_setr_epi32(0, 0x00080008, 0x00100010, 0x00180018));
    const __m512i low_words = _mm512_add_epi32(rows, each_128(0x00040002, 0x00050003, 0x00060006, 0x00070007));
    const __m512i high_words = _mm512_add_epi32(rows, each_128(0, 0, 0x00040002, 0x00050003));
    const __m512i steps = join_256(_mm256_setzero_si256(), _mm256_set1_epi32(0x00040000));
    const __m512i low_mask = join_256(_mm256_set1_epi8(63), _mm256_set1_epi8(15));
    const __m512i high_mask = join_256(_mm256_setzero_si256(), _mm256_set1_epi8(0x30));
    const __m512i low = _mm512_srlv_epi16(_mm512_permutexvar_epi16(low_words, heads), steps);
    const __m512i high = _mm512_srli_epi16(_mm512_permutexvar_epi16(high_words, heads), 2);
    const __m512i all = _mm512_or_si512(_mm512_and_si512(low, low_mask), _mm512_and_si512(high, high_mask));
    const __m128i odd = _mm_setr_epi8(1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13, -1, -1, -1);
    const __m128i mins = _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
    return (scales_of_4){{_mm512_and_si512(all, _mm512_set1_epi32(255)), _mm512_shuffle_epi8(all, four_times(odd))},
                         _mm512_shuffle_epi8(all, four_times(mins))};
}

// The first 16 of each 32 bytes, and the last 16.
static inline void load_halves_of_32(const uint8_t *p, __m512i *first, __m512i *last) {
    const __m512i a = load_512(p), b = load_512(p + 64);
    *first = _mm512_shuffle_i64x2(a, b, 0x88);
    *last = _mm512_shuffle_i64x2(a, b, 0xdd);
}

static inline weights_256 wide_Q4_K(const uint8_t *block) {
    __m512i first, last;
    load_halves_of_32(((const block_Q4_K *)block)->qs, &first, &last);
    const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8((char)0xf0);
    return (weights_256){.u = {_mm512_and_si512(first, low), _mm512_and_si512(last, low), _mm512_and_si512(first, high),
                               _mm512_and_si512(last, high)}};
}

static inline weights_256 wide_Q5_K(const uint8_t *block) {
    const block_Q5_K *b = (const void *)block;
    __m512i first, last;
    load_halves_of_32(b->qs, &first, &last);
    const __m512i bits[2] = {four_times(load_128(b->qh)), four_times(load_128(b->qh + 16))};
    // bit k of a byte is of sub-block k: rotated to bit 4, for even sub-blocks and for odd ones
    const __m512i even = each_128(4, 2, 0, 30), odd = each_128(3, 1, 31, 29), low = _mm512_set1_epi8(15);
    weights_256 w;
    w.u[0] = with_bits(_mm512_and_si512(first, low), _mm512_rolv_epi32(bits[0], even), 16);
    w.u[1] = with_bits(_mm512_and_si512(last, low), _mm512_rolv_epi32(bits[1], even), 16);
    w.u[2] = with_bits(_mm512_and_si512(_mm512_srli_epi16(first, 4), low), _mm512_rolv_epi32(bits[0], odd), 16);
    w.u[3] = with_bits(_mm512_and_si512(_mm512_srli_epi16(last, 4), low), _mm512_rolv_epi32(bits[1], odd), 16);
    return w;
}
#endif

#endif
