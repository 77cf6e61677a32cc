// Half and bfloat16 in plain C, for the scalar level and for values read one at a time.
#ifndef ENGINE_FP_H
#define ENGINE_FP_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t bits_of_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline float bf16_to_f32(uint16_t h) { return float_of_bits((uint32_t)h << 16); }

static inline float f16_to_f32(uint16_t h) {
#if defined(__F16C__)
    return __builtin_ia32_vcvtph2ps((__attribute__((vector_size(16))) short){(short)h})[0];
#else
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) // infinity and NaN (made quiet, as the hardware does)
        return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000u : 0));
    if (magnitude < 0x400) // zero and subnormals: magnitude * 2^-24, exact
        return float_of_bits(sign | bits_of_float((float)magnitude * 0x1p-24f));
    return float_of_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
#endif
}

// Rounds to nearest, ties to even.
static inline uint16_t f32_to_f16(float f) {
    const uint32_t bits = bits_of_float(f);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) // NaN keeps the top of its payload and is made quiet
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000u) // rounds to 65536 or more
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000u) { // below 2^-14: adding 0.5 lines the last kept bit up with the last bit of a float
        const float shifted = float_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (bits_of_float(shifted) - bits_of_float(0.5f)));
    }
    return (uint16_t)(sign | ((magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

#endif
