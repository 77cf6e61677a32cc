// Every instruction that CUDA C++ has no name for. Inline PTX lives here and nowhere else: the emulator of the tests
// compiles all other code as it stands and brings its own version of these functions.
#pragma once

#ifdef CUSIM
#include "ptx.h"
#else

#define PTX_FUNCTION static __device__ __forceinline__

PTX_FUNCTION float half_to_float(unsigned short half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

// Rounds to nearest even.
PTX_FUNCTION unsigned short float_to_half(float value) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

// Copies 16 bytes, aligned on both sides, to shared memory; the thread goes on. Done after `cp_async_wait`.
PTX_FUNCTION void cp_async16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global)
                 : "memory");
}

// Makes one group of this thread's copies since the last commit.
PTX_FUNCTION void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest N groups of this thread are done.
template <int N> PTX_FUNCTION void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Reads and writes that order all memory of the system around them, for flags shared with the CPU.
PTX_FUNCTION unsigned ld_acquire_sys(const unsigned *address) {
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
PTX_FUNCTION void st_release_sys(unsigned *address, unsigned value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// c[16x8] += a[16x32] b[32x8], int8 to int32, the fragments spread over a warp as the PTX manual says.
PTX_FUNCTION void mma_m16n8k32_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
