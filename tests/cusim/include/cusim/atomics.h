// Atomics on global and shared memory. Compare-and-swap also lets the other threads of the block run, so that a spin
// lock makes progress.
#pragma once

#include "runtime.h"

// *p = f(*p) in one step; gives the old value.
template <class T, class F> static inline T cusim_update(T *p, F f) {
    T old, fresh;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do
        fresh = f(old);
    while (!__atomic_compare_exchange(p, &old, &fresh, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

#define CUSIM_ATOMICS(T)                                                                                               \
    static inline T atomicAdd(T *p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }                        \
    static inline T atomicSub(T *p, T v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }                        \
    static inline T atomicAnd(T *p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }                        \
    static inline T atomicOr(T *p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }                          \
    static inline T atomicXor(T *p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); }                        \
    static inline T atomicExch(T *p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }                      \
    static inline T atomicMax(T *p, T v) {                                                                             \
        return cusim_update(p, [=](T old) { return old < v ? v : old; });                                              \
    }                                                                                                                  \
    static inline T atomicMin(T *p, T v) {                                                                             \
        return cusim_update(p, [=](T old) { return v < old ? v : old; });                                              \
    }                                                                                                                  \
    static inline T atomicCAS(T *p, T expected, T v) {                                                                 \
        cusim_yield();                                                                                                 \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                       \
        return expected;                                                                                               \
    }
CUSIM_ATOMICS(int)
CUSIM_ATOMICS(unsigned)
CUSIM_ATOMICS(unsigned long long)

static inline float atomicAdd(float *p, float v) {
    return cusim_update(p, [=](float old) { return old + v; });
}
static inline double atomicAdd(double *p, double v) {
    return cusim_update(p, [=](double old) { return old + v; });
}
static inline float atomicExch(float *p, float v) {
    return cusim_update(p, [=](float) { return v; });
}
static inline unsigned atomicInc(unsigned *p, unsigned last) {
    return cusim_update(p, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}
static inline unsigned atomicDec(unsigned *p, unsigned last) {
    return cusim_update(p, [=](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}
