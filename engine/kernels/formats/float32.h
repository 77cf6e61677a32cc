// Formats that meet float32 activations: F32, F16, BF16, and rare ones that are made float32 a block at a time.
//
// load_* returns 16 weights of the first kind, expand_* writes a whole block of the second kind.
#ifndef ENGINE_FORMATS_FLOAT32_H
#define ENGINE_FORMATS_FLOAT32_H

#include "../blocks.h"
#include "../fp.h"
#include "../simd.h"
#include "iq4.h"

static inline v16 load_F32(const uint8_t *w) { return v16_load((const void *)w); }
static inline v16 load_F16(const uint8_t *w) { return v16_from_f16((const void *)w); }
static inline v16 load_BF16(const uint8_t *w) { return v16_from_bf16((const void *)w); }

// Base-3 digits: byte * 3^k, modulo 256, times 3 / 256 is digit k; minus one.
static inline float tq1_0_digit(uint8_t packed, int power) { return (float)(((uint8_t)(packed * power) * 3 >> 8) - 1); }

static inline void expand_TQ1_0(const void *block, float *out) {
    static const int powers[5] = {1, 3, 9, 27, 81};
    const block_TQ1_0 *b = block;
    const float d = f16_to_f32(b->d);
    for (int k = 0; k < 5; k++) {
        for (int i = 0; i < 32; i++)
            out[32 * k + i] = d * tq1_0_digit(b->qs[i], powers[k]);
        for (int i = 0; i < 16; i++)
            out[160 + 16 * k + i] = d * tq1_0_digit(b->qs[32 + i], powers[k]);
    }
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++)
            out[240 + 4 * k + i] = d * tq1_0_digit(b->qh[i], powers[k]);
}

static inline void expand_TQ2_0(const void *block, float *out) {
    const block_TQ2_0 *b = block;
    const float d = f16_to_f32(b->d);
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 32; i++)
                out[128 * half + 32 * k + i] = d * (float)((b->qs[32 * half + i] >> 2 * k & 3) - 1);
}

static inline void expand_Q1_0(const void *block, float *out) {
    const block_Q1_0 *b = block;
    const uint32_t d = bits_of_float(f16_to_f32(b->d));
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < 8; i++) // a bit that is not set is a minus sign
            out[8 * k + i] = float_of_bits(d ^ (~(uint32_t)b->qs[k] >> i & 1) << 31);
}

static inline void expand_Q2_0(const void *block, float *out) {
    const block_Q2_0 *b = block;
    const float d = f16_to_f32(b->d);
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < 4; i++)
            out[4 * k + i] = d * (float)((b->qs[k] >> 2 * i & 3) - 1);
}

// Half an unsigned E4M3 number (4 exponent bits with bias 7, 3 mantissa bits); the code 0x7f is zero.
static inline float nvfp4_scale(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if (code == 0x7f)
        return 0.0f;
    return exponent ? float_of_bits((uint32_t)(exponent - 7 - 1 + 127) << 23 | (uint32_t)mantissa << 20)
                    : (float)mantissa * 0x1p-10f;
}

// Sixteen weights of eight bytes, before they meet their scale.
static inline v16 load_nvfp4_values(const uint8_t *qs) {
    int8_t values[16];
#if defined(__AVX2__)
    const __m128i packed = _mm_loadl_epi64((const void *)qs), low_bits = _mm_set1_epi8(15);
    const __m128i codes = _mm_and_si128(_mm_unpacklo_epi64(packed, _mm_srli_epi16(packed, 4)), low_bits);
    _mm_storeu_si128((void *)values, _mm_shuffle_epi8(_mm_loadu_si128((const void *)mxfp4_values), codes));
#else
    for (int i = 0; i < 8; i++) {
        values[i] = mxfp4_values[qs[i] & 15];
        values[8 + i] = mxfp4_values[qs[i] >> 4];
    }
#endif
    return v16_from_i8(values);
}

static inline void expand_NVFP4(const void *block, float *out) {
    const block_NVFP4 *b = block;
    for (int g = 0; g < 4; g++)
        v16_store(out + 16 * g, v16_mul(v16_set(nvfp4_scale(b->scales[g])), load_nvfp4_values(b->qs + 8 * g)));
}

#endif
