// IQ3_XXS and IQ3_S: grid points of four magnitudes with signs; weight = d (or d / 4) * (2 scale + 1) * magnitude.
#ifndef ENGINE_FORMATS_IQ3_H
#define ENGINE_FORMATS_IQ3_H

#include "iq2.h"

static inline void unpack_IQ3_XXS(const void *block, integer_block *out) {
    const block_IQ3_XXS *b = block;
    for (int s = 0; s < 8; s++) {
        const uint32_t a = b->signs_scale[s];
        for (int o = 0; o < 4; o++) {
            const unsigned signs = signs_of_7_bits[a >> 7 * o & 127];
            int8_t *q = out->q + 32 * s + 8 * o;
            set_signed(q, engine_grid_iq3_xxs.points[b->qs[8 * s + 2 * o]], signs, 4);
            set_signed(q + 4, engine_grid_iq3_xxs.points[b->qs[8 * s + 2 * o + 1]], signs >> 4, 4);
        }
        set_sub_blocks(out->scale, s, 32, 2 * (int)(a >> 28) + 1);
    }
    out->d = f16_to_f32(b->d) * 0.25f;
}

static inline void unpack_IQ3_S(const void *block, integer_block *out) {
    const block_IQ3_S *b = block;
    for (int i = 0; i < 64; i++) {
        const int index = b->qs[i] | (b->qh[i / 8] >> (i % 8) & 1) << 8;
        set_signed(out->q + 4 * i, engine_grid_iq3_s.points[index], (unsigned)b->signs[i / 2] >> 4 * (i % 2), 4);
    }
    for (int s = 0; s < 8; s++)
        set_sub_blocks(out->scale, s, 32, 2 * (b->scales[s / 2] >> 4 * (s % 2) & 15) + 1);
    out->d = f16_to_f32(b->d);
}

#if defined(__AVX2__)
static inline __m256i scales_IQ3_XXS(const void *block, __m256i *mins) {
    (void)mins;
    return odd_scales(scales_from_i32(_mm256_srli_epi32(load_256(((const block_IQ3_XXS *)block)->signs_scale), 28)));
}

static inline __m256i scales_IQ3_S(const void *block, __m256i *mins) {
    const __m256i packed = _mm256_set1_epi32(load_i32(((const block_IQ3_S *)block)->scales));
    const __m256i nibbles = _mm256_srlv_epi32(packed, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    (void)mins;
    return odd_scales(scales_from_i32(_mm256_and_si256(nibbles, _mm256_set1_epi32(15))));
}
#endif

#if defined(__AVX512VBMI__)
static const point_layout layout_IQ3_XXS = {&engine_packed_iq3_xxs, 4};
static const point_layout layout_IQ3_S = {&engine_packed_iq3_s, 4};

static inline void points_IQ3_XXS(const uint8_t *const blocks[4], block_points out[4]) {
    grid_indexes at[4];
    __m512i signs[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        const block_IQ3_XXS *b = (const void *)blocks[r];
        at[r].low = load_512(b->qs);
        signs[r] = with_parity(spread_bits(_mm512_cvtepu32_epi64(load_256(b->signs_scale)), 0x150e0700));
    }
    look_up_4(&engine_packed_iq3_xxs, 256, at, signs, out);
}

static inline void points_IQ3_S(const uint8_t *const blocks[4], block_points out[4]) {
    grid_indexes at[4];
    __m512i signs[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        const block_IQ3_S *b = (const void *)blocks[r];
        at[r] = (grid_indexes){load_512(b->qs), {load_u64(b->qh)}};
        signs[r] = _mm512_cvtepu32_epi64(load_256(b->signs));
    }
    look_up_4(&engine_packed_iq3_s, 512, at, signs, out);
}
#elif defined(__AVX2__)
static const point_layout layout_IQ3_XXS = {engine_grid_iq3_xxs.points, 4, offsetof(block_IQ3_XXS, qs)};
static const point_layout layout_IQ3_S = {engine_grid_iq3_s.points, 4, 0};

static inline void points_IQ3_XXS(const uint8_t *block, block_points *out) {
    const __m256i words = load_256(((const block_IQ3_XXS *)block)->signs_scale);
    set_signs(out, bytes_with_parity(bytes_of_7_bits(words)));
}

static inline void points_IQ3_S(const uint8_t *block, block_points *out) {
    const block_IQ3_S *b = (const void *)block;
    const __m256i one = _mm256_set1_epi8(1);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m256i low = load_256(b->qs + 32 * i);
        const __m256i high = _mm256_and_si256(bytes_of_bits((uint32_t)load_i32(b->qh + 4 * i)), one);
        const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
        _mm256_store_si256((void *)(out->indexes + 32 * i), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_store_si256((void *)(out->indexes + 32 * i + 16), _mm256_permute2x128_si256(even, odd, 0x31));
    }
    set_signs(out, load_256(b->signs));
}
#endif

#if defined(__AVX512VNNI__) && !defined(__AVX512VBMI__)
static inline weights_256 wide_IQ3_XXS(const uint8_t *block) {
    const block_IQ3_XXS *b = (const void *)block;
    weights_256 w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        w.u[i] = _mm512_i32gather_epi32(_mm512_cvtepu8_epi32(load_128(b->qs + 16 * i)), engine_grid_iq3_xxs.points, 4);
        w.minus[i] = signs_of_words(b->signs_scale[2 * i], b->signs_scale[2 * i + 1]);
    }
    return w;
}

static inline weights_256 wide_IQ3_S(const uint8_t *block) {
    const block_IQ3_S *b = (const void *)block;
    weights_256 w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i low = _mm512_cvtepu8_epi32(load_128(b->qs + 16 * i));
        const __mmask16 high = (__mmask16)(b->qh[2 * i] | b->qh[2 * i + 1] << 8);
        w.u[i] = _mm512_i32gather_epi32(_mm512_mask_add_epi32(low, high, low, _mm512_set1_epi32(256)),
                                        engine_grid_iq3_s.points, 4);
        w.minus[i] = load_u64(b->signs + 8 * i);
    }
    return w;
}
#endif

#endif
