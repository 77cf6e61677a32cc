// Sixteen floats at a time, the same bits on every instruction-set level.
//
// `v16` is one AVX-512 register, two AVX2 registers, or an array of sixteen floats. All float arithmetic of the CPU
// kernels is written on it: lanes never mix except in `v16_sum`, whose tree is fixed, and multiply-add is always one
// rounding (`fma`). So the level decides the speed and never the result.
#ifndef ENGINE_SIMD_H
#define ENGINE_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 v16;
static inline v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v16_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
static inline v16 v16_set(float a) { return _mm512_set1_ps(a); }
static inline v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
static inline v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
static inline v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
static inline v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
static inline v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
static inline v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline v16 v16_round(v16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^n for whole n in [-126, 127]
static inline v16 v16_scale_by_power(v16 a, v16 n) {
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(a, _mm512_castsi512_ps(bits));
}
static inline v16 v16_from_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline v16 v16_from_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}
static inline v16 v16_from_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
static inline void v16_to_f16(uint16_t *p, v16 a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
#include <immintrin.h>
typedef struct {
    __m256 lo, hi;
} v16;
static inline v16 v16_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void v16_store(float *p, v16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
static inline v16 v16_set(float a) { return (v16){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
static inline v16 v16_add(v16 a, v16 b) { return (v16){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline v16 v16_sub(v16 a, v16 b) { return (v16){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline v16 v16_mul(v16 a, v16 b) { return (v16){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline v16 v16_div(v16 a, v16 b) { return (v16){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline v16 v16_max(v16 a, v16 b) { return (v16){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline v16 v16_min(v16 a, v16 b) { return (v16){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline v16 v16_fma(v16 a, v16 b, v16 c) {
    return (v16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline v16 v16_round(v16 a) {
    const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return (v16){_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
static inline __m256 v8_scale_by_power_(__m256 a, __m256 n) {
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(bits));
}
static inline v16 v16_scale_by_power(v16 a, v16 n) {
    return (v16){v8_scale_by_power_(a.lo, n.lo), v8_scale_by_power_(a.hi, n.hi)};
}
static inline v16 v16_from_f16(const uint16_t *p) {
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}
static inline v16 v16_from_i8(const int8_t *p) {
    return (v16){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))),
                 _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p + 8))))};
}
static inline __m256 v8_from_bf16_(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline v16 v16_from_bf16(const uint16_t *p) { return (v16){v8_from_bf16_(p), v8_from_bf16_(p + 8)}; }
static inline void v16_to_f16(uint16_t *p, v16 a) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((void *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
#else
#include "fp.h"
typedef struct {
    float f[16];
} v16;
#define V16_EACH(expression)                                                                                           \
    v16 r;                                                                                                             \
    for (int i = 0; i < 16; i++)                                                                                       \
        r.f[i] = (expression);                                                                                         \
    return r
static inline v16 v16_load(const float *p) { V16_EACH(p[i]); }
static inline void v16_store(float *p, v16 a) { memcpy(p, a.f, sizeof a.f); }
static inline v16 v16_set(float a) { V16_EACH(a); }
static inline v16 v16_add(v16 a, v16 b) { V16_EACH(a.f[i] + b.f[i]); }
static inline v16 v16_sub(v16 a, v16 b) { V16_EACH(a.f[i] - b.f[i]); }
static inline v16 v16_mul(v16 a, v16 b) { V16_EACH(a.f[i] * b.f[i]); }
static inline v16 v16_div(v16 a, v16 b) { V16_EACH(a.f[i] / b.f[i]); }
// maxps and minps give the second operand when either is NaN; so do these
static inline v16 v16_max(v16 a, v16 b) { V16_EACH(a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
static inline v16 v16_min(v16 a, v16 b) { V16_EACH(a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
static inline v16 v16_fma(v16 a, v16 b, v16 c) { V16_EACH(fmaf(a.f[i], b.f[i], c.f[i])); }
static inline v16 v16_round(v16 a) { V16_EACH(rintf(a.f[i])); }
static inline v16 v16_scale_by_power(v16 a, v16 n) { V16_EACH(a.f[i] * ldexpf(1.0f, (int)n.f[i])); }
static inline v16 v16_from_f16(const uint16_t *p) { V16_EACH(f16_to_f32(p[i])); }
static inline v16 v16_from_i8(const int8_t *p) { V16_EACH((float)p[i]); }
static inline v16 v16_from_bf16(const uint16_t *p) { V16_EACH(bf16_to_f32(p[i])); }
static inline void v16_to_f16(uint16_t *p, v16 a) {
    for (int i = 0; i < 16; i++)
        p[i] = f32_to_f16(a.f[i]);
}
#undef V16_EACH
#endif

// Adds the sixteen lanes as a binary tree: lane i with lane i + 8, then + 4, + 2, + 1. V16_FOLD does that with any
// operation of two operands, the upper lanes first.
#if defined(__AVX2__)
#if defined(__AVX512F__)
static inline __m256 v16_lower_(v16 a) { return _mm512_castps512_ps256(a); }
static inline __m256 v16_upper_(v16 a) { return _mm512_extractf32x8_ps(a, 1); }
#else
static inline __m256 v16_lower_(v16 a) { return a.lo; }
static inline __m256 v16_upper_(v16 a) { return a.hi; }
#endif
#define V16_FOLD(a, OPERATION, SCALAR)                                                                                 \
    const __m256 of_8 = _mm256_##OPERATION##_ps(v16_upper_(a), v16_lower_(a));                                         \
    const __m128 of_4 = _mm_##OPERATION##_ps(_mm256_extractf128_ps(of_8, 1), _mm256_castps256_ps128(of_8));            \
    const __m128 of_2 = _mm_##OPERATION##_ps(_mm_movehl_ps(of_4, of_4), of_4);                                         \
    return _mm_cvtss_f32(_mm_##OPERATION##_ss(_mm_movehdup_ps(of_2), of_2))
#else
#define V16_FOLD(a, OPERATION, SCALAR)                                                                                 \
    for (int half = 8; half; half /= 2)                                                                                \
        for (int i = 0; i < half; i++)                                                                                 \
            a.f[i] = SCALAR(a.f[i + half], a.f[i]);                                                                    \
    return a.f[0]
#endif
#define SUM_OF_TWO_(a, b) ((a) + (b))
#define LARGER_OF_TWO_(a, b) ((a) > (b) ? (a) : (b))
static inline float v16_sum(v16 a) { V16_FOLD(a, add, SUM_OF_TWO_); }
static inline float v16_largest(v16 a) { V16_FOLD(a, max, LARGER_OF_TWO_); }
#undef V16_FOLD
#undef SUM_OF_TWO_
#undef LARGER_OF_TWO_

// The first n (0..16) floats of p, zeros after them.
static inline v16 v16_load_first(const float *p, int n) {
    if (n == 16)
        return v16_load(p);
    float t[16] = {0};
    memcpy(t, p, (size_t)n * sizeof(float));
    return v16_load(t);
}

static inline void v16_store_first(float *p, v16 a, int n) {
    if (n == 16) {
        v16_store(p, a);
        return;
    }
    float t[16];
    v16_store(t, a);
    memcpy(p, t, (size_t)n * sizeof(float));
}

#endif
