// Loads and stores with cache hints, fences, and what kernels do while they wait.
#pragma once

#include "runtime.h"

#define CUSIM_LOAD(name)                                                                                               \
    template <class T> static inline T name(const T *p) { return *p; }
CUSIM_LOAD(__ldg)
CUSIM_LOAD(__ldca)
CUSIM_LOAD(__ldcg)
CUSIM_LOAD(__ldcs)
CUSIM_LOAD(__ldlu)

// Reads memory that somebody else may change, so never from a register.
template <class T> static inline T __ldcv(const T *p) {
    __asm__ volatile("" ::: "memory");
    return *p;
}

#define CUSIM_STORE(name)                                                                                              \
    template <class T> static inline void name(T *p, T v) { *p = v; }
CUSIM_STORE(__stwb)
CUSIM_STORE(__stcg)
CUSIM_STORE(__stcs)
CUSIM_STORE(__stwt)

static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline void __nanosleep(unsigned) { cusim_yield(); }
static inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
[[noreturn]] static inline void __trap() { cusim_fail("__trap()"); }
