// Integer and floating-point intrinsics. Those with a rounding in their name are exact (kernels are compiled without
// contraction); the approximate ones (__expf, rsqrtf, ...) are better here than on a GPU.
#pragma once

#include "runtime.h"

// --- bits ---
template <class To, class From> static inline To cusim_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "");
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}
static inline float __int_as_float(int v) { return cusim_bits<float>(v); }
static inline int __float_as_int(float v) { return cusim_bits<int>(v); }
static inline float __uint_as_float(unsigned v) { return cusim_bits<float>(v); }
static inline unsigned __float_as_uint(float v) { return cusim_bits<unsigned>(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __ffsll(long long v) { return __builtin_ffsll(v); }
static inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++)
        r |= (v >> i & 1u) << (31 - i);
    return r;
}
// Each nibble of `selector` picks one of the eight bytes of b:a; its top bit replicates that byte's sign instead.
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned nibble = selector >> 4 * i & 15u;
        unsigned byte = (unsigned)(bytes >> 8 * (nibble & 7)) & 255u;
        if (nibble & 8)
            byte = byte & 128 ? 255 : 0;
        r |= byte << 8 * i;
    }
    return r;
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
    return (unsigned)(((uint64_t)hi << 32 | lo) >> (by & 31));
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
    return (unsigned)(((uint64_t)hi << 32 | lo) << (by & 31) >> 32);
}

// --- integers ---
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }

// c + the sum of four byte products, modulo 2^32
static inline int __dp4a(int a, int b, int c) {
    unsigned sum = (unsigned)c;
    for (int i = 0; i < 4; i++)
        sum += (unsigned)((int)(int8_t)((unsigned)a >> 8 * i) * (int)(int8_t)((unsigned)b >> 8 * i));
    return (int)sum;
}
// Two int16 of a times the two lower, or upper, int8 of b.
static inline int __dp2a_lo(int a, int b, int c) { return c + (int16_t)a * (int8_t)b + (int16_t)(a >> 16) * (int8_t)(b >> 8); }
static inline int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++)
        c += (a >> 8 * i & 255u) * (b >> 8 * i & 255u);
    return c;
}

static inline int cusim_saturate_s8(int v) { return v > 127 ? 127 : v < -128 ? -128 : v; }

// Four independent bytes in a register; x and y are the bytes as T.
#define CUSIM_BYTEWISE(name, T, expression)                                                                            \
    static inline unsigned name(unsigned a, unsigned b) {                                                              \
        unsigned r = 0;                                                                                                \
        for (int i = 0; i < 4; i++) {                                                                                  \
            int x = (T)(a >> 8 * i), y = (T)(b >> 8 * i);                                                              \
            r |= ((unsigned)(expression) & 255u) << 8 * i;                                                             \
        }                                                                                                              \
        return r;                                                                                                      \
    }
CUSIM_BYTEWISE(__vadd4, uint8_t, x + y)
CUSIM_BYTEWISE(__vsub4, uint8_t, x - y)
CUSIM_BYTEWISE(__vaddss4, int8_t, cusim_saturate_s8(x + y))
CUSIM_BYTEWISE(__vsubss4, int8_t, cusim_saturate_s8(x - y))
CUSIM_BYTEWISE(__vcmpeq4, uint8_t, x == y ? 255 : 0)
CUSIM_BYTEWISE(__vcmpne4, uint8_t, x != y ? 255 : 0)
CUSIM_BYTEWISE(__vmins4, int8_t, x < y ? x : y)
CUSIM_BYTEWISE(__vmaxs4, int8_t, x > y ? x : y)

#define CUSIM_MIN_MAX(A, B, T)                                                                                         \
    static inline T min(A a, B b) { return (T)b < (T)a ? (T)b : (T)a; }                                                \
    static inline T max(A a, B b) { return (T)a < (T)b ? (T)b : (T)a; }
CUSIM_MIN_MAX(int, int, int)
CUSIM_MIN_MAX(unsigned, unsigned, unsigned)
CUSIM_MIN_MAX(int, unsigned, unsigned)
CUSIM_MIN_MAX(unsigned, int, unsigned)
CUSIM_MIN_MAX(long, long, long)
CUSIM_MIN_MAX(unsigned long, unsigned long, unsigned long)
CUSIM_MIN_MAX(long long, long long, long long)
CUSIM_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

// --- floating point, rounded to nearest even ---
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __frsqrt_rn(float a) { return (float)(1.0 / sqrt((double)a)); }
static inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; } // NaN gives 0

// Conversions saturate, and NaN gives 0, where a C++ cast would be undefined.
static inline int cusim_to_int(float whole) {
    if (!(whole >= -0x1p31f))
        return whole != whole ? 0 : INT_MIN;
    return whole >= 0x1p31f ? INT_MAX : (int)whole;
}
static inline unsigned cusim_to_uint(float whole) {
    if (!(whole > 0.0f))
        return 0;
    return whole >= 0x1p32f ? UINT_MAX : (unsigned)whole;
}
static inline int __float2int_rn(float a) { return cusim_to_int(rintf(a)); }
static inline int __float2int_rz(float a) { return cusim_to_int(truncf(a)); }
static inline int __float2int_rd(float a) { return cusim_to_int(floorf(a)); }
static inline int __float2int_ru(float a) { return cusim_to_int(ceilf(a)); }
static inline unsigned __float2uint_rn(float a) { return cusim_to_uint(rintf(a)); }
static inline unsigned __float2uint_rz(float a) { return cusim_to_uint(truncf(a)); }
static inline float __int2float_rn(int a) { return (float)a; }
static inline float __uint2float_rn(unsigned a) { return (float)a; }

// --- approximations on a GPU, exact to a rounding here ---
extern "C" {
float exp10f(float) noexcept; // not of the standard
void sincosf(float, float *, float *) noexcept;
}
static inline float rsqrtf(float a) { return __frsqrt_rn(a); }
static inline float __fdividef(float a, float b) { return a / b; }
// macros, because glibc declares functions of these names
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(a, b) powf(a, b)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanhf(x) tanhf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)
