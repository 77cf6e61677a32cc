// IQ2_XXS, IQ2_XS, IQ2_S: grid points of eight magnitudes with signs; weight = d / 8 * (2 scale + 1) * magnitude.
#ifndef ENGINE_FORMATS_IQ2_H
#define ENGINE_FORMATS_IQ2_H

#include "../grids.h"
#include "../integer_block.h"
#include "../points256.h"
#include "../points512.h"

// Signs from a 7-bit index: the eighth makes the number of minus signs even.
static const uint8_t signs_of_7_bits[128] = {
    0x00, 0x81, 0x82, 0x03, 0x84, 0x05, 0x06, 0x87, 0x88, 0x09, 0x0a, 0x8b, 0x0c, 0x8d, 0x8e, 0x0f, 0x90, 0x11, 0x12,
    0x93, 0x14, 0x95, 0x96, 0x17, 0x18, 0x99, 0x9a, 0x1b, 0x9c, 0x1d, 0x1e, 0x9f, 0xa0, 0x21, 0x22, 0xa3, 0x24, 0xa5,
    0xa6, 0x27, 0x28, 0xa9, 0xaa, 0x2b, 0xac, 0x2d, 0x2e, 0xaf, 0x30, 0xb1, 0xb2, 0x33, 0xb4, 0x35, 0x36, 0xb7, 0xb8,
    0x39, 0x3a, 0xbb, 0x3c, 0xbd, 0xbe, 0x3f, 0xc0, 0x41, 0x42, 0xc3, 0x44, 0xc5, 0xc6, 0x47, 0x48, 0xc9, 0xca, 0x4b,
    0xcc, 0x4d, 0x4e, 0xcf, 0x50, 0xd1, 0xd2, 0x53, 0xd4, 0x55, 0x56, 0xd7, 0xd8, 0x59, 0x5a, 0xdb, 0x5c, 0xdd, 0xde,
    0x5f, 0x60, 0xe1, 0xe2, 0x63, 0xe4, 0x65, 0x66, 0xe7, 0xe8, 0x69, 0x6a, 0xeb, 0x6c, 0xed, 0xee, 0x6f, 0xf0, 0x71,
    0x72, 0xf3, 0x74, 0xf5, 0xf6, 0x77, 0x78, 0xf9, 0xfa, 0x7b, 0xfc, 0x7d, 0x7e, 0xff,
};

// Copies n magnitudes, negative where bit i of `signs` is set.
static inline void set_signed(int8_t *q, const int8_t *magnitudes, unsigned signs, int n) {
    for (int i = 0; i < n; i++)
        q[i] = (int8_t)(signs >> i & 1 ? -magnitudes[i] : magnitudes[i]);
}

static inline void unpack_IQ2_XXS(const void *block, integer_block *out) {
    const block_IQ2_XXS *b = block;
    for (int s = 0; s < 8; s++) {
        const uint32_t a = b->group[s].signs_scale;
        for (int o = 0; o < 4; o++)
            set_signed(out->q + 32 * s + 8 * o, engine_grid_iq2_xxs[b->group[s].index[o]],
                       signs_of_7_bits[a >> 7 * o & 127], 8);
        set_sub_blocks(out->scale, s, 32, 2 * (int)(a >> 28) + 1);
    }
    out->d = f16_to_f32(b->d) * 0.125f;
}

static inline void unpack_IQ2_XS(const void *block, integer_block *out) {
    const block_IQ2_XS *b = block;
    for (int o = 0; o < 32; o++)
        set_signed(out->q + 8 * o, engine_grid_iq2_xs[b->qs[o] & 511], signs_of_7_bits[b->qs[o] >> 9], 8);
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)(2 * (b->scales[u / 2] >> 4 * (u % 2) & 15) + 1);
    out->d = f16_to_f32(b->d) * 0.125f;
}

static inline void unpack_IQ2_S(const void *block, integer_block *out) {
    const block_IQ2_S *b = block;
    for (int o = 0; o < 32; o++) {
        const int index = b->qs[o] | (b->qh[o / 4] >> 2 * (o % 4) & 3) << 8;
        set_signed(out->q + 8 * o, engine_grid_iq2_s[index], b->signs[o], 8);
    }
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)(2 * (b->scales[u / 2] >> 4 * (u % 2) & 15) + 1);
    out->d = f16_to_f32(b->d) * 0.125f;
}

#if defined(__AVX2__)
// Four 7-bit sign indexes below a scale, in each of eight words.
static inline __m256i signs_scales_of_iq2_xxs(const block_IQ2_XXS *b) {
    const __m256 low = _mm256_castsi256_ps(load_256(&b->group[0])), high = _mm256_castsi256_ps(load_256(&b->group[4]));
    return _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd)), 0xd8); // odd words
}

static inline __m256i scales_IQ2_XXS(const void *block, __m256i *mins) {
    (void)mins;
    return odd_scales(scales_from_i32(_mm256_srli_epi32(signs_scales_of_iq2_xxs(block), 28)));
}

// Sixteen nibbles.
static inline __m256i odd_scales_of_nibbles(const uint8_t *scales) {
    const __m128i packed = _mm_loadl_epi64((const void *)scales);
    const __m128i bytes = _mm_and_si128(_mm_unpacklo_epi8(packed, _mm_srli_epi16(packed, 4)), _mm_set1_epi8(15));
    return odd_scales(_mm256_cvtepu8_epi16(bytes));
}

static inline __m256i scales_IQ2_XS(const void *block, __m256i *mins) {
    (void)mins;
    return odd_scales_of_nibbles(((const block_IQ2_XS *)block)->scales);
}

static inline __m256i scales_IQ2_S(const void *block, __m256i *mins) {
    (void)mins;
    return odd_scales_of_nibbles(((const block_IQ2_S *)block)->scales);
}
#endif

#if defined(__AVX512VBMI__)
static const point_layout layout_IQ2_XXS = {&engine_packed_iq2_xxs, 8};
static const point_layout layout_IQ2_XS = {&engine_packed_iq2_xs, 8};
static const point_layout layout_IQ2_S = {&engine_packed_iq2_s, 8};

static inline void points_IQ2_XXS(const uint8_t *const blocks[4], block_points out[4]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __m512i groups[4], signs[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        groups[r] = load_512(((const block_IQ2_XXS *)blocks[r])->group);
        signs[r] = with_parity(spread_bits(groups[r], 0x352e272000000000)); // 7 bits each, in the upper half
    }
    const grid_indexes at[2] = {{.low = _mm512_permutex2var_epi32(groups[0], even, groups[1])},
                                {.low = _mm512_permutex2var_epi32(groups[2], even, groups[3])}};
    look_up_8(&engine_packed_iq2_xxs, 256, at, signs, (sign_places){4, 1, 8}, out);
}

static inline void points_IQ2_XS(const uint8_t *const blocks[4], block_points out[4]) {
    const __m512i even = EIGHT_TIMES(0x0e0c0a0806040200, 0x10 * EACH_BYTE), one = _mm512_set1_epi8(1);
    const __m512i parity = _mm512_set1_epi64(0x02040810204080fe); // signs are the upper seven bits of odd bytes
    grid_indexes at[2];
    __m512i qs[4], signs[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        qs[r] = load_512(((const block_IQ2_XS *)blocks[r])->qs);
        signs[r] = _mm512_gf2p8affine_epi64_epi8(qs[r], parity, 0);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        at[i].low = _mm512_permutex2var_epi8(qs[2 * i], even, qs[2 * i + 1]);
        at[i].high[0] =
            _mm512_test_epi8_mask(_mm512_permutex2var_epi8(qs[2 * i], _mm512_or_si512(even, one), qs[2 * i + 1]), one);
    }
    look_up_8(&engine_packed_iq2_xs, 512, at, signs, (sign_places){1, 2, 8}, out);
}

static inline void points_IQ2_S(const uint8_t *const blocks[4], block_points out[4]) {
    grid_indexes at[2];
    __m512i signs[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        signs[r] = _mm512_castsi256_si512(load_256(((const block_IQ2_S *)blocks[r])->signs));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const block_IQ2_S *a = (const void *)blocks[2 * i], *b = (const void *)blocks[2 * i + 1];
        const __m512i eights = // of pairs of bits
            _mm512_cvtepu16_epi64(_mm_set_epi64x((int64_t)load_u64(b->qh), (int64_t)load_u64(a->qh)));
        const __m512i pairs = spread_bits(eights, 0x0e0c0a0806040200);
        at[i] = (grid_indexes){
            load_two_256(a->qs, b->qs),
            {_mm512_test_epi8_mask(pairs, _mm512_set1_epi8(1)), _mm512_test_epi8_mask(pairs, _mm512_set1_epi8(2))}};
    }
    look_up_8(&engine_packed_iq2_s, 1024, at, signs, (sign_places){0, 1, 4}, out);
}
#elif defined(__AVX2__)
static const point_layout layout_IQ2_XXS = {engine_grid_iq2_xxs, 8, offsetof(block_IQ2_XXS, group)};
static const point_layout layout_IQ2_XS = {engine_grid_iq2_xs, 8, 0};
static const point_layout layout_IQ2_S = {engine_grid_iq2_s, 8, 0};

static inline void points_IQ2_XXS(const uint8_t *block, block_points *out) {
    const __m256i words = signs_scales_of_iq2_xxs((const void *)block);
    set_signs(out, bytes_with_parity(bytes_of_7_bits(words)));
}

static inline void points_IQ2_XS(const uint8_t *block, block_points *out) {
    const block_IQ2_XS *b = (const void *)block;
    const __m256i first = load_256(b->qs), second = load_256(b->qs + 16), mask = _mm256_set1_epi16(511);
    const __m256i signs = _mm256_packus_epi16(_mm256_srli_epi16(first, 9), _mm256_srli_epi16(second, 9));
    _mm256_store_si256((void *)out->indexes, _mm256_and_si256(first, mask));
    _mm256_store_si256((void *)(out->indexes + 16), _mm256_and_si256(second, mask));
    set_signs(out, bytes_with_parity(_mm256_permute4x64_epi64(signs, 0xd8)));
}

static inline void points_IQ2_S(const uint8_t *block, block_points *out) {
    const block_IQ2_S *b = (const void *)block;
    const __m256i qh = _mm256_set1_epi64x((int64_t)load_u64(b->qh)); // of each byte, two bits for an index
    const __m256i byte_of = _mm256_setr_epi64x((int64_t)0x8000800080008000, (int64_t)0x8001800180018001,
                                               (int64_t)0x8002800280028002, (int64_t)0x8003800380038003);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m256i spread = _mm256_shuffle_epi8(qh, _mm256_add_epi8(byte_of, _mm256_set1_epi16((short)(4 * i))));
        const __m256i raised = _mm256_mullo_epi16(spread, _mm256_set1_epi64x(0x0004001000400100));
        set_indexes(out, 16 * i, b->qs + 16 * i, _mm256_and_si256(raised, _mm256_set1_epi16(0x300)));
    }
    set_signs(out, load_256(b->signs));
}
#endif

#if defined(__AVX512VNNI__) && !defined(__AVX512VBMI__)
// Eight times 7 bits, one in each byte, with their parity as the eighth.
static inline __mmask64 with_parity(uint64_t bits) {
    uint64_t folded = bits ^ bits >> 4;
    folded ^= folded >> 2;
    folded ^= folded >> 1;
    return bits | (folded & 0x0101010101010101) << 7;
}

// The signs of 64 weights from two words of four 7-bit indexes below a scale.
static inline __mmask64 signs_of_words(uint32_t first, uint32_t second) {
    const uint64_t spread = 0x7f7f7f7f;
    return with_parity(_pdep_u64(first, spread) | _pdep_u64(second, spread) << 32);
}

static inline weights_256 wide_IQ2_XXS(const uint8_t *block) {
    const block_IQ2_XXS *b = (const void *)block;
    const __m128i places = _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, -1, -1, -1, -1, -1, -1, -1, -1);
    weights_256 w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256i indexes = _mm256_cvtepu8_epi32(_mm_shuffle_epi8(load_128(&b->group[2 * i]), places));
        w.u[i] = _mm512_i32gather_epi64(indexes, engine_grid_iq2_xxs, 8);
        w.minus[i] = signs_of_words(b->group[2 * i].signs_scale, b->group[2 * i + 1].signs_scale);
    }
    return w;
}

static inline weights_256 wide_IQ2_XS(const uint8_t *block) {
    const block_IQ2_XS *b = (const void *)block;
    weights_256 w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m128i packed = load_128(b->qs + 8 * i);
        const __m256i indexes = _mm256_cvtepu16_epi32(_mm_and_si128(packed, _mm_set1_epi16(511)));
        const __m128i signs = _mm_srli_epi16(packed, 9);
        w.u[i] = _mm512_i32gather_epi64(indexes, engine_grid_iq2_xs, 8);
        w.minus[i] = with_parity((uint64_t)_mm_cvtsi128_si64(_mm_packus_epi16(signs, signs)));
    }
    return w;
}

static inline weights_256 wide_IQ2_S(const uint8_t *block) {
    const block_IQ2_S *b = (const void *)block;
    weights_256 w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(b->qh[2 * i] | b->qh[2 * i + 1] << 8),
                                               _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
        const __m256i high_bits = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 8);
        const __m256i low_bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(b->qs + 8 * i)));
        w.u[i] = _mm512_i32gather_epi64(_mm256_or_si256(low_bits, high_bits), engine_grid_iq2_s, 8);
        w.minus[i] = load_u64(b->signs + 8 * i);
    }
    return w;
}
#endif

#endif
