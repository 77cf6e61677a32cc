// IQ1_S and IQ1_M: grid points of eight values in {-1, 0, 1}, shifted by an eighth; weight = d / 8 * (2 scale + 1) *
// (8 g + 1 or 8 g - 1).
#ifndef ENGINE_FORMATS_IQ1_H
#define ENGINE_FORMATS_IQ1_H

#include "../grids.h"
#include "../integer_block.h"
#include "../points256.h"
#include "../points512.h"

static inline void set_shifted_iq1(int8_t *q, int index, int shift) {
    for (int i = 0; i < 8; i++)
        q[i] = (int8_t)(engine_grid_iq1[index][i] - 9 + shift);
}

static inline void unpack_IQ1_S(const void *block, integer_block *out) {
    const block_IQ1_S *b = block;
    for (int s = 0; s < 8; s++) {
        const int h = b->qh[s];
        for (int o = 0; o < 4; o++)
            set_shifted_iq1(out->q + 32 * s + 8 * o, b->qs[4 * s + o] | (h >> 3 * o & 7) << 8, h & 0x8000 ? -1 : 1);
        set_sub_blocks(out->scale, s, 32, 2 * (h >> 12 & 7) + 1);
    }
    out->d = f16_to_f32(b->d) * 0.125f;
}

// The half-float scale is spread over the top nibbles of the four scale words.
static inline float d_of_iq1_m(const block_IQ1_M *b) {
    const int d = b->scales[0] >> 12 | b->scales[1] >> 12 << 4 | b->scales[2] >> 12 << 8 | b->scales[3] >> 12 << 12;
    return f16_to_f32((uint16_t)d) * 0.125f;
}

static inline void unpack_IQ1_M(const void *block, integer_block *out) {
    const block_IQ1_M *b = block;
    for (int o = 0; o < 32; o++) {
        const int h = b->qh[o / 2] >> 4 * (o % 2);
        set_shifted_iq1(out->q + 8 * o, b->qs[o] | (h & 7) << 8, h & 8 ? -1 : 1);
    }
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)(2 * (b->scales[u / 4] >> 3 * (u % 4) & 7) + 1);
    out->d = d_of_iq1_m(b);
}

#if defined(__AVX2__)
static inline __m256i scales_IQ1_S(const void *block, __m256i *mins) {
    const __m256i high = load_128_twice(((const block_IQ1_S *)block)->qh);
    (void)mins;
    return odd_scales(_mm256_and_si256(_mm256_srli_epi16(high, 12), _mm256_set1_epi16(7)));
}

// Four scales of 3 bits in each of four words: each is moved to the top of its 12 bits, then down.
static inline __m256i scales_IQ1_M(const void *block, __m256i *mins) {
    uint64_t words;
    __builtin_memcpy(&words, ((const block_IQ1_M *)block)->scales, 8);
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi64x((int64_t)words),
        _mm256_setr_epi64x(0x0100010001000100, 0x0302030203020302, 0x0504050405040504, 0x0706070607060706));
    const __m256i raised = _mm256_mullo_epi16(spread, _mm256_set1_epi64x(0x0001000800400200));
    (void)mins;
    return odd_scales(_mm256_and_si256(_mm256_srli_epi16(raised, 9), _mm256_set1_epi16(7)));
}

static inline __m128 d_IQ1_M(const uint8_t *const blocks[4]) {
    float d[4];
    for (int r = 0; r < 4; r++)
        d[r] = d_of_iq1_m((const void *)blocks[r]);
    return _mm_loadu_ps(d);
}
#endif

#if defined(__AVX512VBMI__)
static const point_layout layout_IQ1_S = {&engine_packed_iq1, 8};
static const point_layout layout_IQ1_M = {&engine_packed_iq1, 8};

// From 32 lower bytes of each block, and the three upper bits in bytes.
static inline grid_indexes indexes_of_iq1(const uint8_t *a, const uint8_t *b, __m512i upper) {
    return (grid_indexes){load_two_256(a, b),
                          {_mm512_test_epi8_mask(upper, _mm512_set1_epi8(1)),
                           _mm512_test_epi8_mask(upper, _mm512_set1_epi8(2)),
                           _mm512_test_epi8_mask(upper, _mm512_set1_epi8(4))}};
}

static inline void points_IQ1_S(const uint8_t *const blocks[4], block_points out[4]) {
    grid_indexes at[2];
    __m512i is_minus[4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const block_IQ1_S *a = (const void *)blocks[2 * i], *b = (const void *)blocks[2 * i + 1];
        const __m256i qh = load_two_128(a->qh, b->qh); // 16 bits for 32 weights
        const uint32_t minus_mask = _mm256_movepi16_mask(qh);
        at[i] = indexes_of_iq1(a->qs, b->qs, spread_bits(_mm512_cvtepu32_epi64(qh), 0x1916131009060300));
        is_minus[2 * i] = _mm512_movm_epi64((__mmask8)minus_mask);
        is_minus[2 * i + 1] = _mm512_movm_epi64((__mmask8)(minus_mask >> 8));
    }
    look_up_8(&engine_packed_iq1, 2048, at, is_minus, (sign_places){0, 0, 8}, out);
}

static inline void points_IQ1_M(const uint8_t *const blocks[4], block_points out[4]) {
    grid_indexes at[2];
    __m512i is_minus[4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const block_IQ1_M *a = (const void *)blocks[2 * i], *b = (const void *)blocks[2 * i + 1];
        const __m512i nibbles = spread_bits(_mm512_cvtepu32_epi64(load_two_128(a->qh, b->qh)), 0x1c1814100c080400);
        at[i] = indexes_of_iq1(a->qs, b->qs, nibbles);
        is_minus[2 * i] = _mm512_movm_epi8(_mm512_test_epi8_mask(nibbles, _mm512_set1_epi8(8)));
        is_minus[2 * i + 1] = _mm512_shuffle_i64x2(is_minus[2 * i], is_minus[2 * i], 0xee);
    }
    look_up_8(&engine_packed_iq1, 2048, at, is_minus, (sign_places){0, 1, 4}, out);
}
#elif defined(__AVX2__)
static const point_layout layout_IQ1_S = {engine_grid_iq1, 8, 0};
static const point_layout layout_IQ1_M = {engine_grid_iq1, 8, 0};

static inline void points_IQ1_S(const uint8_t *block, block_points *out) {
    const block_IQ1_S *b = (const void *)block;
    const __m128i qh = load_128(b->qh); // 16 bits for 32 weights
    const __m256i word_of =
        _mm256_setr_epi64x(0x0100010001000100, 0x0302030203020302, 0x0504050405040504, 0x0706070607060706);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) { // three bits of an index are moved to the top of a lane, then down
        const __m256i spread = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(qh),
                                                   _mm256_add_epi8(word_of, _mm256_set1_epi8((char)(8 * i))));
        const __m256i raised = _mm256_mullo_epi16(spread, _mm256_set1_epi64x(0x0010008004002000));
        set_indexes(out, 16 * i, b->qs + 16 * i,
                    _mm256_and_si256(_mm256_srli_epi16(raised, 5), _mm256_set1_epi16(0x700)));
    }
    const __m256i is_minus = _mm256_cvtepi16_epi32(_mm_srai_epi16(qh, 15));
    _mm256_store_si256((void *)out->shifts, _mm256_or_si256(is_minus, _mm256_set1_epi8(1)));
}

static inline void points_IQ1_M(const uint8_t *block, block_points *out) {
    const block_IQ1_M *b = (const void *)block;
    const __m128i qh = load_128(b->qh), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(qh, mask), high = _mm_and_si128(_mm_srli_epi16(qh, 4), mask);
    const __m128i nibbles[2] = {_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m128i is_minus = _mm_cmpgt_epi8(nibbles[i], _mm_set1_epi8(7));
        const __m256i bits = _mm256_cvtepu8_epi16(_mm_and_si128(nibbles[i], _mm_set1_epi8(7)));
        set_indexes(out, 16 * i, b->qs + 16 * i, _mm256_slli_epi16(bits, 8));
        _mm_store_si128((void *)(out->shifts + 16 * i), _mm_or_si128(is_minus, _mm_set1_epi8(1)));
    }
}
#endif

#if defined(__AVX512VNNI__) && !defined(__AVX512VBMI__)
// 8 g + shift + 9, from 0 to 18, for the 11-bit indexes whose high bits start each lane of `high`.
static inline __m512i wide_of_iq1(const uint8_t *low, __m256i high, __m512i shifts) {
    const __m256i high_bits = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(7)), 8);
    const __m256i low_bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)low));
    return _mm512_add_epi8(_mm512_i32gather_epi64(_mm256_or_si256(low_bits, high_bits), engine_grid_iq1, 8), shifts);
}

// The shifts of eight indexes, where a bit says that they are minus.
static inline __m512i shifts_of_iq1(__mmask8 is_minus) {
    return _mm512_mask_blend_epi64(is_minus, _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
}

static inline weights_256 wide_IQ1_S(const uint8_t *block) {
    const block_IQ1_S *b = (const void *)block;
    weights_256 w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int first = b->qh[2 * i], second = b->qh[2 * i + 1];
        const __m256i high = _mm256_srlv_epi32(_mm256_setr_m128i(_mm_set1_epi32(first), _mm_set1_epi32(second)),
                                               _mm256_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9));
        w.u[i] = wide_of_iq1(b->qs + 8 * i, high,
                             shifts_of_iq1((__mmask8)((first & 0x8000 ? 0x0f : 0) | (second & 0x8000 ? 0xf0 : 0))));
    }
    return w;
}

static inline weights_256 wide_IQ1_M(const uint8_t *block) {
    const block_IQ1_M *b = (const void *)block;
    weights_256 w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(load_i32(b->qh + 4 * i)),
                                                  _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        w.u[i] =
            wide_of_iq1(b->qs + 8 * i, nibbles, shifts_of_iq1(_mm256_test_epi32_mask(nibbles, _mm256_set1_epi32(8))));
    }
    return w;
}
#endif

#endif
