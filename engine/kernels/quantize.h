// Float32 activation rows to the forms of activations.h.
#ifndef ENGINE_QUANTIZE_H
#define ENGINE_QUANTIZE_H

#include "activations.h"
#include "simd.h"

// Whole numbers in [-128, 127] to int8.
static inline void v16_to_i8(int8_t *out, v16 a) {
#if defined(__AVX512F__)
    _mm_storeu_si128((void *)out, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
#elif defined(__AVX2__)
    __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    pairs = _mm256_permute4x64_epi64(pairs, 0xd8);
    _mm_storeu_si128((void *)out, _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
#else
    for (int i = 0; i < 16; i++)
        out[i] = (int8_t)a.f[i];
#endif
}

// The sum of sixteen int8.
static inline int sum_of_i8(const int8_t *q) {
#if defined(__AVX2__)
    const __m128i shifted = _mm_xor_si128(_mm_loadu_si128((const void *)q), _mm_set1_epi8(-128)); // q + 128, unsigned
    const __m128i halves = _mm_sad_epu8(shifted, _mm_setzero_si128());
    return _mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4) - 16 * 128;
#else
    int sum = 0;
    for (int i = 0; i < 16; i++)
        sum += q[i];
    return sum;
#endif
}

static inline v16 v16_abs(v16 a) { return v16_max(a, v16_sub(v16_set(0.0f), a)); }

// d = amax / 127, q = x * (127 / amax) rounded to nearest even. A NaN counts as nothing in amax and becomes -127; an
// infinity makes d infinite.
static inline void quantize_q8(const float *x, void *out, int n_cols, int first, int end, int activation) {
    const int group = activation_group(activation);
    const activation_row row = activation_view(out, activation, n_cols);
    int8_t *q = (int8_t *)row.q;
    float *d = (float *)row.d;
    int16_t *sums = (int16_t *)row.sums;
    for (int g = first / group; g < end / group; g++) {
        const float *values = x + (int64_t)g * group;
        v16 largest = v16_set(0.0f);
        for (int i = 0; i < group; i += 16)
            largest = v16_max(v16_abs(v16_load(values + i)), largest);
        const float amax = v16_largest(largest);
        const v16 ratio = v16_set(amax > 0.0f ? 127.0f / amax : 0.0f);
        d[g] = amax / 127.0f;
        for (int i = 0; i < group; i += 16) {
            const v16 rounded = v16_round(v16_mul(v16_load(values + i), ratio));
            int8_t *chunk = q + (int64_t)g * group + i;
            v16_to_i8(chunk, v16_min(v16_max(rounded, v16_set(-127.0f)), v16_set(127.0f)));
            sums[((int64_t)g * group + i) / 16] = (int16_t)sum_of_i8(chunk);
        }
    }
}

static void quantize_F32(const float *x, void *out, int n_cols, int first, int end) {
    (void)n_cols;
    memcpy((float *)out + first, x + first, (size_t)(end - first) * sizeof(float));
}
static void quantize_Q8_256(const float *x, void *out, int n_cols, int first, int end) {
    quantize_q8(x, out, n_cols, first, end, ACTIVATION_Q8_256);
}
static void quantize_Q8_32(const float *x, void *out, int n_cols, int first, int end) {
    quantize_q8(x, out, n_cols, first, end, ACTIVATION_Q8_32);
}

#endif
