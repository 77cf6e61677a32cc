// One result a thread of each intrinsic, for comparison with numpy.
#include "ptx.cuh"

extern "C" __global__ void warp_exchange(const int *x, int *out) {
    const int v = x[threadIdx.x];
    out[threadIdx.x] = __shfl_sync(0xffffffffu, v, 5, 8);
    out[threadIdx.x + 32] = __shfl_xor_sync(0xffffffffu, v, 3);
    out[threadIdx.x + 64] = __shfl_down_sync(0xffffffffu, v, 2, 16);
    out[threadIdx.x + 96] = __shfl_up_sync(0xffffffffu, v, 7);
    out[threadIdx.x + 128] = (int)__ballot_sync(0xffffffffu, v & 1);
    out[threadIdx.x + 160] = (int)__match_any_sync(0xffffffffu, v % 4);
    out[threadIdx.x + 192] = __reduce_add_sync(0xffffffffu, v);
    out[threadIdx.x + 224] = threadIdx.x < 16 ? __reduce_max_sync(0x0000ffffu, v) : __reduce_min_sync(0xffff0000u, v);
}

extern "C" __global__ void block_votes(const int *x, int *out) {
    out[3 * threadIdx.x] = __syncthreads_count(x[threadIdx.x]);
    out[3 * threadIdx.x + 1] = __syncthreads_and(x[threadIdx.x]);
    out[3 * threadIdx.x + 2] = __syncthreads_or(x[threadIdx.x]);
}

extern "C" __global__ void floats(const float *a, const float *b, const float *c, float *out, int *whole, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    out[i] = __fmaf_rn(a[i], b[i], c[i]);
    out[n + i] = a[i] * b[i] + c[i]; // two roundings: contraction is off
    out[2 * n + i] = __fdiv_rn(a[i], b[i]);
    out[3 * n + i] = __fsqrt_rn(fabsf(a[i]));
    whole[i] = __float2int_rn(a[i]);
}

extern "C" __global__ void halves(const float *x, unsigned short *half, unsigned short *bfloat, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        half[i] = f32_to_f16(x[i]);
        bfloat[i] = f32_to_bf16(x[i]);
    }
}
extern "C" __global__ void all_halves(float *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = f16_to_f32((unsigned short)i);
}

extern "C" __global__ void bytes(const int *a, const int *b, int *out) {
    const int i = threadIdx.x;
    out[i] = __dp4a(a[i], b[i], 7);
    out[32 + i] = (int)__vsubss4((unsigned)a[i], (unsigned)b[i]);
    out[64 + i] = (int)__byte_perm((unsigned)a[i], (unsigned)b[i], 0x6240);
    out[96 + i] = (int)permute((unsigned)a[i], (unsigned)b[i], 0x1234e51bu);
    out[128 + i] = __dp2a_hi(a[i], b[i], 7);
}

// Histogram of ids, and the sum and maximum of all values: every thread of every block adds to the same words.
extern "C" __global__ void atomics(const int *ids, int *counts, float *sum, int *largest) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&counts[ids[i]], 1);
    atomicAdd(sum, (float)ids[i]);
    atomicMax(largest, ids[i]);
}
