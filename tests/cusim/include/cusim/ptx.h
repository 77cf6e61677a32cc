// The emulation of cuda/ptx.cuh, which documents each function. Included by it alone.
#pragma once

#include "half.h"
#include "runtime.h"

#define CUSIM_PC __builtin_return_address(0)

// --- tensor cores ---
struct cusim_mma {
    const unsigned *a, *b;
    void *c;
};

static inline void cusim_need_whole_warp(const char *what, unsigned lanes) {
    if (lanes != ~0u)
        cusim_fail("%s needs all 32 lanes, has %08x", what, lanes);
}

// Both operands from the fragments of all lanes: A [16][K], B transposed [8][K].
template <int K, class T, class Element>
static inline void cusim_gather(void **payloads, T (&A)[16][K], T (&B)[8][K], Element element) {
    const int per_register = K / 8;
    for (int lane = 0; lane < 32; lane++) {
        const cusim_mma *own = (const cusim_mma *)payloads[lane];
        int g = lane >> 2, t = lane & 3;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < per_register; i++)
                A[g + 8 * (r & 1)][per_register * t + i + K / 2 * (r >> 1)] = element(own->a[r], i);
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < per_register; i++)
                B[g][per_register * t + i + K / 2 * r] = element(own->b[r], i);
    }
}

// c += A * B, spread over the lanes; Sum is the accumulator's type.
template <int K, class T, class Sum>
static inline void cusim_multiply(void **payloads, const T (&A)[16][K], const T (&B)[8][K], Sum) {
    for (int lane = 0; lane < 32; lane++) {
        int g = lane >> 2, t = lane & 3;
        for (int i = 0; i < 4; i++) {
            const T *row = A[g + 8 * (i >> 1)], *column = B[2 * t + (i & 1)];
            Sum sum = 0;
            for (int k = 0; k < K; k++)
                sum += (Sum)row[k] * (Sum)column[k];
            Sum *c = (Sum *)((const cusim_mma *)payloads[lane])->c + i;
            *c = *c + sum;
        }
    }
}

static inline void cusim_exchange_mma_f16(void **payloads, unsigned lanes) {
    cusim_need_whole_warp("mma", lanes);
    float A[16][16], B[8][16];
    cusim_gather(payloads, A, B, [](unsigned r, int i) { return cusim_half_to_float((uint16_t)(r >> 16 * i)); });
    cusim_multiply(payloads, A, B, 0.0f);
}
static inline void cusim_exchange_mma_bf16(void **payloads, unsigned lanes) {
    cusim_need_whole_warp("mma", lanes);
    float A[16][16], B[8][16];
    cusim_gather(payloads, A, B, [](unsigned r, int i) { return cusim_bfloat16_to_float((uint16_t)(r >> 16 * i)); });
    cusim_multiply(payloads, A, B, 0.0f);
}
static inline void cusim_exchange_mma_s8(void **payloads, unsigned lanes) {
    cusim_need_whole_warp("mma", lanes);
    int8_t A[16][32], B[8][32];
    cusim_gather(payloads, A, B, [](unsigned r, int i) { return (int8_t)(r >> 8 * i); });
    cusim_multiply(payloads, A, B, 0);
}

static inline void mma_m16n8k16_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    cusim_site site = CUSIM_SITE("mma_m16n8k16_f16")) {
    cusim_mma own = {a, b, c};
    cusim_collective(~0u, cusim_exchange_mma_f16, &own, false, site);
}
static inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                     cusim_site site = CUSIM_SITE("mma_m16n8k16_bf16")) {
    cusim_mma own = {a, b, c};
    cusim_collective(~0u, cusim_exchange_mma_bf16, &own, false, site);
}
static inline void mma_m16n8k32_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                   cusim_site site = CUSIM_SITE("mma_m16n8k32_s8")) {
    c[0] = c[1] = c[2] = c[3] = 0;
    cusim_mma own = {a, b, c};
    cusim_collective(~0u, cusim_exchange_mma_s8, &own, false, site);
}
// The first half of the longer one.
static inline void mma_m16n8k16_s8(int (&c)[4], const unsigned (&a)[2], unsigned b,
                                   cusim_site site = CUSIM_SITE("mma_m16n8k16_s8")) {
    const unsigned padded_a[4] = {a[0], a[1], 0, 0}, padded_b[2] = {b, 0};
    mma_m16n8k32_s8(c, padded_a, padded_b, site);
}

// --- ldmatrix ---
struct cusim_ldmatrix {
    const char *row;
    unsigned *r;
    void *pc;
};

template <int N_MATRICES, bool TRANSPOSED> static inline void cusim_exchange_ldmatrix(void **payloads, unsigned lanes) {
    cusim_need_whole_warp("ldmatrix", lanes);
    for (unsigned lane = 0; lane < 32; lane++) {
        cusim_ldmatrix *own = (cusim_ldmatrix *)payloads[lane];
        unsigned g = lane >> 2, t = lane & 3;
        for (unsigned j = 0; j < N_MATRICES; j++) {
            uint16_t pair[2];
            for (unsigned i = 0; i < 2; i++) {
                unsigned row = TRANSPOSED ? 2 * t + i : g, column = TRANSPOSED ? g : 2 * t + i;
                const cusim_ldmatrix *source = (const cusim_ldmatrix *)payloads[8 * j + row];
                cusim_read_for_lane(lane, &pair[i], source->row + 2 * column, 2, own->pc);
            }
            own->r[j] = pair[0] | (unsigned)pair[1] << 16;
        }
    }
}

template <int N_MATRICES, bool TRANSPOSED>
static inline void cusim_load_matrices(unsigned *r, const void *row, void *pc, cusim_site site) {
    if (cusim_current->lane < 8 * N_MATRICES && (uintptr_t)row % 16)
        cusim_fail("ldmatrix: row address %p is not 16-byte aligned", row);
    cusim_ldmatrix own = {(const char *)row, r, pc};
    cusim_collective(~0u, cusim_exchange_ldmatrix<N_MATRICES, TRANSPOSED>, &own, false, site);
}

// Not inlined, so that CUSIM_PC is a place in the kernel.
#define CUSIM_LDMATRIX(name, n, transposed)                                                                            \
    __attribute__((noinline, unused)) static void name(unsigned(&r)[n], const void *row,                               \
                                                       cusim_site site = CUSIM_SITE(#name)) {                          \
        cusim_load_matrices<n, transposed>(r, row, CUSIM_PC, site);                                                    \
    }
CUSIM_LDMATRIX(ldmatrix_x4, 4, false)
CUSIM_LDMATRIX(ldmatrix_x4_trans, 4, true)
CUSIM_LDMATRIX(ldmatrix_x2, 2, false)
CUSIM_LDMATRIX(ldmatrix_x2_trans, 2, true)

// --- asynchronous copies ---
__attribute__((noinline, unused)) static void cp_async16_zfill(void *shared, const void *global, unsigned n_valid) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16)
        cusim_fail("cp_async16: %p <- %p, one of them is not 16-byte aligned", shared, global);
    if (n_valid > 16)
        cusim_fail("cp_async16_zfill: %u valid bytes of 16", n_valid);
    cusim_copy_async(shared, global, 16, n_valid, CUSIM_PC);
}
__attribute__((noinline, unused)) static void cp_async16(void *shared, const void *global) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16)
        cusim_fail("cp_async16: %p <- %p, one of them is not 16-byte aligned", shared, global);
    cusim_copy_async(shared, global, 16, 16, CUSIM_PC);
}
__attribute__((noinline, unused)) static void cp_async4(void *shared, const void *global) {
    if ((uintptr_t)shared % 4 || (uintptr_t)global % 4)
        cusim_fail("cp_async4: %p <- %p, one of them is not 4-byte aligned", shared, global);
    cusim_copy_async(shared, global, 4, 4, CUSIM_PC);
}
static inline void cp_async_commit() { cusim_copy_commit(); }
template <int N> static inline void cp_async_wait() { cusim_copy_wait(N); }

// --- memory ---
static inline uint4 ld_stream16(const void *p) {
    if ((uintptr_t)p % 16)
        cusim_fail("ld_stream16: address %p is not 16-byte aligned", p);
    return *(const uint4 *)p;
}
// The other threads of the block run before each look, so a loop around it cannot hang the emulator.
static inline unsigned ld_acquire_sys(const unsigned *p) {
    cusim_yield();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline void st_release_sys(unsigned *p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline unsigned atomic_inc_acq_rel(unsigned *p, unsigned last) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    const unsigned before = atomicInc(p, last);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return before;
}

// --- float16 and bfloat16 ---
static inline unsigned permute(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }

static inline float f16_to_f32(unsigned short bits) { return cusim_half_to_float(bits); }
static inline unsigned short f32_to_f16(float v) { return cusim_float_to_half(v); }
static inline unsigned f32_to_f16x2(float lo, float hi) {
    return cusim_float_to_half(lo) | (unsigned)cusim_float_to_half(hi) << 16;
}
static inline unsigned add_f16x2(unsigned a, unsigned b) {
    return f32_to_f16x2(f16_to_f32((unsigned short)a) + f16_to_f32((unsigned short)b),
                        f16_to_f32((unsigned short)(a >> 16)) + f16_to_f32((unsigned short)(b >> 16)));
}
static inline unsigned mul_f16x2(unsigned a, unsigned b) {
    return f32_to_f16x2(f16_to_f32((unsigned short)a) * f16_to_f32((unsigned short)b),
                        f16_to_f32((unsigned short)(a >> 16)) * f16_to_f32((unsigned short)(b >> 16)));
}
static inline float bf16_to_f32(unsigned short bits) { return cusim_bfloat16_to_float(bits); }
static inline unsigned short f32_to_bf16(float v) { return cusim_float_to_bfloat16(v); }

// --- kernels that overlap: here none do ---
static inline void await_previous_kernel() {}
static inline void let_next_kernel_begin() {}

// --- registers: here there are enough ---
static inline int unknown(int number) { return number; }
