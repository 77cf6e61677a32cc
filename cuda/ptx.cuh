// The one header with inline PTX: what CUDA C++ has no intrinsic for, under names that the kernel emulator of the tests
// implements too (CUSIM). It also makes the float16 headers of the CUDA toolkit unnecessary: kernels hold float16 and
// bfloat16 as `unsigned short` bits.
//
// Fragment layouts, for lane l of a warp with g = l / 4, t = l % 4 (x.lo, x.hi: the halves of a 32-bit register):
//   m16n8k16, 16-bit:  a[r].lo, .hi = A[g + 8 * (r & 1)][2 * t + 8 * (r >> 1)], and the next column
//                      b[r].lo, .hi = B[2 * t + 8 * r][g], and the next row
//   m16n8k32, int8:    byte i of a[r] = A[g + 8 * (r & 1)][4 * t + i + 16 * (r >> 1)]
//                      byte i of b[r] = B[4 * t + i + 16 * r][g]
//   m16n8k16, int8:    as the first half of that: a[0], a[1] and b[0]
//   all:               c[i] = C[g + 8 * (i >> 1)][2 * t + (i & 1)]
#pragma once

#ifdef CUSIM
#include "cusim/ptx.h"
#else

#define PTX static __device__ __forceinline__

// --- tensor cores; all 32 lanes together ---

// float16 inputs: c += A * B. The order in which the hardware adds the 16 products is not specified.
PTX void mma_m16n8k16_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// bfloat16 inputs: c += A * B
PTX void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// int8 inputs, exact int32 sums: c = A * B
PTX void mma_m16n8k32_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0));
}
PTX void mma_m16n8k16_s8(int (&c)[4], const unsigned (&a)[2], unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%7,%7,%7,%7};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b), "r"(0));
}

// --- 8x8 matrices of 16-bit elements from shared memory, spread over the warp ---
//
// Lane 8 * j + i gives the address of row i of matrix j: 16 bytes, 16-byte aligned (x2: lanes 16 to 31 give none).
// r[j] is row g, columns 2 * t and 2 * t + 1 of matrix j; transposed: column g, rows 2 * t and 2 * t + 1.

PTX unsigned shared_address_(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

PTX void ldmatrix_x4(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address_(row))
                 : "memory");
}
PTX void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address_(row))
                 : "memory");
}
PTX void ldmatrix_x2(unsigned (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address_(row))
                 : "memory");
}
PTX void ldmatrix_x2_trans(unsigned (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address_(row))
                 : "memory");
}

// --- bytes ---

// Byte i of the result is byte n & 7 of the eight (a's first), n being nibble i of the selector; if n & 8, that byte's top
// bit eight times. The upper half of the selector does not matter.
PTX unsigned permute(unsigned a, unsigned b, unsigned selector) {
    unsigned v;
    asm("prmt.b32 %0,%1,%2,%3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
    return v;
}

// --- asynchronous copies from global to shared memory ---
//
// A thread's copies since its last commit form a group; `cp_async_wait<N>` returns when all but its latest N groups have
// landed. Other threads see the bytes only after a barrier that follows the wait.

// 16 bytes, both addresses 16-byte aligned, past the L1 cache
PTX void cp_async16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(shared_address_(shared)), "l"(global) : "memory");
}
// Reads only the first n_valid bytes (0 to 16) and fills the rest with zeros.
PTX void cp_async16_zfill(void *shared, const void *global, unsigned n_valid) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared_address_(shared)), "l"(global), "r"(n_valid)
                 : "memory");
}
// 4 bytes, both addresses 4-byte aligned
PTX void cp_async4(void *shared, const void *global) {
    asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(shared_address_(shared)), "l"(global) : "memory");
}
PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> PTX void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// --- memory ---

// Reads weights that nobody writes during the kernel and nobody reads twice: 16 bytes, 16-byte aligned.
PTX uint4 ld_stream16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// Flags shared with the host: what was stored before the release is seen after the acquire that reads it.
PTX unsigned ld_acquire_sys(const unsigned *p) {
    unsigned v;
    asm volatile("ld.acquire.sys.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
PTX void st_release_sys(unsigned *p, unsigned v) {
    asm volatile("st.release.sys.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}

// Counts up to `last`, then from 0 again; returns the number before. What a block stored before (and met at a barrier) is
// seen by the block that sees this count.
PTX unsigned atomic_inc_acq_rel(unsigned *p, unsigned last) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0,[%1],%2;" : "=r"(before) : "l"(p), "r"(last) : "memory");
    return before;
}

// --- kernels that overlap, from Hopper on (elsewhere one begins when the one before is over) ---

// Waits until the kernel before is over and its results can be seen.
PTX void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the kernel after begin once every block has called this.
PTX void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- registers ---

// The same number, but the compiler no longer knows what it is: nothing that depends on it is computed before a loop, to be
// kept in registers that others need more.
PTX int unknown(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// --- float16 and bfloat16, rounded to nearest even; NaN becomes 0x7fff ---

PTX float f16_to_f32(unsigned short bits) {
    float v;
    asm("cvt.f32.f16 %0,%1;" : "=f"(v) : "h"(bits));
    return v;
}
PTX unsigned short f32_to_f16(float v) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0,%1;" : "=h"(bits) : "f"(v));
    return bits;
}
PTX unsigned f32_to_f16x2(float lo, float hi) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(bits) : "f"(hi), "f"(lo));
    return bits;
}
// Two numbers in a word at a time.
PTX unsigned add_f16x2(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0,%1,%2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
PTX unsigned mul_f16x2(unsigned a, unsigned b) {
    unsigned product;
    asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
PTX float bf16_to_f32(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
PTX unsigned short f32_to_bf16(float v) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(bits) : "f"(v));
    return bits;
}

#undef PTX
#endif
