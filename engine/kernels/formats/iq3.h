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
            set_signed(q, engine_grid_iq3_xxs[b->qs[8 * s + 2 * o]], signs, 4);
            set_signed(q + 4, engine_grid_iq3_xxs[b->qs[8 * s + 2 * o + 1]], signs >> 4, 4);
        }
        set_sub_blocks(out->scale, s, 32, 2 * (int)(a >> 28) + 1);
    }
    out->d = f16_to_f32(b->d) * 0.25f;
}

static inline void unpack_IQ3_S(const void *block, integer_block *out) {
    const block_IQ3_S *b = block;
    for (int i = 0; i < 64; i++) {
        const int index = b->qs[i] | (b->qh[i / 8] >> (i % 8) & 1) << 8;
        set_signed(out->q + 4 * i, engine_grid_iq3_s[index], (unsigned)b->signs[i / 2] >> 4 * (i % 2), 4);
    }
    for (int s = 0; s < 8; s++)
        set_sub_blocks(out->scale, s, 32, 2 * (b->scales[s / 2] >> 4 * (s % 2) & 15) + 1);
    out->d = f16_to_f32(b->d);
}

#if defined(__AVX2__)
static inline int32_t load_i32(const void *p) {
    int32_t value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

// Four bytes from each of eight grid points.
static inline __m256i grid_points_of_4(const int8_t (*grid)[4], const uint16_t index[8]) {
    return _mm256_setr_epi32(load_i32(grid[index[0]]), load_i32(grid[index[1]]), load_i32(grid[index[2]]),
                             load_i32(grid[index[3]]), load_i32(grid[index[4]]), load_i32(grid[index[5]]),
                             load_i32(grid[index[6]]), load_i32(grid[index[7]]));
}

static inline __m256i chunk_IQ3_XXS(const void *block, int k) {
    const block_IQ3_XXS *b = block;
    uint16_t index[8];
    for (int i = 0; i < 8; i++)
        index[i] = b->qs[8 * k + i];
    return apply_signs(grid_points_of_4(engine_grid_iq3_xxs, index), signs_of_28_bits(b->signs_scale[k]));
}

static inline __m256i scales_IQ3_XXS(const void *block, __m256i *mins) {
    (void)mins;
    return odd_scales(scales_from_i32(_mm256_srli_epi32(load_256(((const block_IQ3_XXS *)block)->signs_scale), 28)));
}

static inline __m256i chunk_IQ3_S(const void *block, int k) {
    const block_IQ3_S *b = block;
    uint16_t index[8];
    const __m128i bits = _mm_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128);
    const __m128i high = _mm_cmpeq_epi16(_mm_and_si128(_mm_set1_epi16(b->qh[k]), bits), bits);
    const __m128i low = _mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)(b->qs + 8 * k)));
    _mm_storeu_si128((void *)index, _mm_or_si128(low, _mm_and_si128(high, _mm_set1_epi16(256))));
    return apply_signs(grid_points_of_4(engine_grid_iq3_s, index), (uint32_t)load_i32(b->signs + 4 * k));
}

static inline __m256i scales_IQ3_S(const void *block, __m256i *mins) {
    const __m256i packed = _mm256_set1_epi32(load_i32(((const block_IQ3_S *)block)->scales));
    const __m256i nibbles = _mm256_srlv_epi32(packed, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    (void)mins;
    return odd_scales(scales_from_i32(_mm256_and_si256(nibbles, _mm256_set1_epi32(15))));
}
#endif

#endif
