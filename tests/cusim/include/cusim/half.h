// float16 and bfloat16: storage, conversions (to nearest even) and the arithmetic that is correctly rounded when it is
// done in float and rounded once more (+, -, *, /; not fma, which is therefore not here).
#pragma once

#include "arithmetic.h"

static inline uint16_t cusim_float_to_half(float value) {
    uint32_t bits = cusim_bits<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return 0x7fff; // the NaN that GPUs give
    if (magnitude >= 0x477ff000u)
        return (uint16_t)(sign | 0x7c00u); // rounds to 65520 or more: infinity
    uint32_t result, rest, half;
    if (magnitude < 0x38800000u) { // below 2^-14: a subnormal, a multiple of 2^-24
        uint32_t exponent = magnitude >> 23;
        if (exponent < 102)
            return (uint16_t)sign; // below 2^-25
        uint32_t shift = 126 - exponent, mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        result = mantissa >> shift;
        rest = mantissa & ((1u << shift) - 1);
        half = 1u << (shift - 1);
    } else {
        result = (magnitude - 0x38000000u) >> 13;
        rest = magnitude & 0x1fffu;
        half = 0x1000u;
    }
    result += rest > half || (rest == half && (result & 1));
    return (uint16_t)(sign | result);
}

static inline float cusim_half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ffu;
    if (exponent == 31)
        return cusim_bits<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent)
        return cusim_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    float magnitude = (float)mantissa * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

static inline uint16_t cusim_float_to_bfloat16(float value) {
    uint32_t bits = cusim_bits<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fff;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
static inline float cusim_bfloat16_to_float(uint16_t b) { return cusim_bits<float>((uint32_t)b << 16); }

#define CUSIM_HALF_TYPE(T, T2, from_float, to_float)                                                                   \
    struct T {                                                                                                         \
        uint16_t bits;                                                                                                 \
        T() = default;                                                                                                 \
        T(float v) : bits(from_float(v)) {}                                                                            \
        T(double v) : bits(from_float((float)v)) {}                                                                    \
        T(int v) : bits(from_float((float)v)) {}                                                                       \
        operator float() const { return to_float(bits); }                                                              \
    };                                                                                                                 \
    struct alignas(4) T2 {                                                                                             \
        T x, y;                                                                                                        \
        T2() = default;                                                                                                \
        T2(T a, T b) : x(a), y(b) {}                                                                                   \
    };                                                                                                                 \
    static inline T operator+(T a, T b) { return T((float)a + (float)b); }                                             \
    static inline T operator-(T a, T b) { return T((float)a - (float)b); }                                             \
    static inline T operator*(T a, T b) { return T((float)a * (float)b); }                                             \
    static inline T operator/(T a, T b) { return T((float)a / (float)b); }                                             \
    static inline T operator-(T a) { return T(-(float)a); }                                                            \
    static inline bool operator<(T a, T b) { return (float)a < (float)b; }                                             \
    static inline bool operator>(T a, T b) { return (float)a > (float)b; }                                             \
    static inline T __hadd(T a, T b) { return a + b; }                                                                 \
    static inline T __hsub(T a, T b) { return a - b; }                                                                 \
    static inline T __hmul(T a, T b) { return a * b; }                                                                 \
    static inline T2 __hadd2(T2 a, T2 b) { return T2(a.x + b.x, a.y + b.y); }                                          \
    static inline T2 __hsub2(T2 a, T2 b) { return T2(a.x - b.x, a.y - b.y); }                                          \
    static inline T2 __hmul2(T2 a, T2 b) { return T2(a.x * b.x, a.y * b.y); }
CUSIM_HALF_TYPE(__half, __half2, cusim_float_to_half, cusim_half_to_float)
CUSIM_HALF_TYPE(__nv_bfloat16, __nv_bfloat162, cusim_float_to_bfloat16, cusim_bfloat16_to_float)
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

static inline float __half2float(__half h) { return (float)h; }
static inline __half __float2half(float f) { return __half(f); }
static inline __half __float2half_rn(float f) { return __half(f); }
static inline float2 __half22float2(__half2 h) { return make_float2((float)h.x, (float)h.y); }
static inline __half2 __float22half2_rn(float2 f) { return __half2(__half(f.x), __half(f.y)); }
static inline __half2 __floats2half2_rn(float a, float b) { return __half2(__half(a), __half(b)); }
static inline __half2 __half2half2(__half h) { return __half2(h, h); }
static inline __half2 __halves2half2(__half a, __half b) { return __half2(a, b); }
static inline __half __low2half(__half2 h) { return h.x; }
static inline __half __high2half(__half2 h) { return h.y; }
static inline float __low2float(__half2 h) { return (float)h.x; }
static inline float __high2float(__half2 h) { return (float)h.y; }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }
static inline __half __ushort_as_half(unsigned short bits) { return cusim_bits<__half>(bits); }

static inline float __bfloat162float(__nv_bfloat16 b) { return (float)b; }
static inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
static inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return cusim_bits<__nv_bfloat16>(bits); }
