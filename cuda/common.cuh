// What all kernels share: fixed-width names, warp sums, and the functions of the canonical arithmetic.
//
// Bits matter here. Contraction is off (`--fmad=false`), so a multiply-add is one rounding exactly where `__fmaf_rn`
// is written; division and square root are IEEE.
#pragma once

#ifdef __CUDACC_RTC__ // NVRTC has no <stdint.h>
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#include "ptx.cuh"

#define DEVICE static __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float NEVER = -3.402823466e38f; // the smallest float: what everything is at least as large as

template <class A, class B> constexpr bool IS_SAME = false;
template <class A> constexpr bool IS_SAME<A, A> = true;

// Every kernel calls this, in every thread, before it reads what kernels write or returns, or does both by itself, the second
// not before the first. From Hopper on it may be under way before the kernel before it is over (`Launch` in launch.py), but
// only when the one before that is: what is read earlier must be older than the kernel before.
DEVICE void begin_kernel() {
    await_previous_kernel();
    let_next_kernel_begin();
}

// Room for a copy of the state of one sequence, which is laid out as one of `state`, and after which token of the step that is
// made; -1, or no address for it: none is.
struct Kept {
    float *to;
    const int *row;

    __device__ __forceinline__ int after() const { return row ? *row : -1; }
};

DEVICE int64_t round_up_64(int64_t n) { return (n + 63) & ~(int64_t)63; }

DEVICE float warp_sum(float value) {
    for (int step = WARP / 2; step; step /= 2)
        value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// Adds up N values, each over the LANES neighbouring lanes, in the order of a butterfly from LANES / 2 down. Lane l of
// them ends with the values from l * N / LANES on, one at least; each exchange halves what is left to add.
template <int LANES, int N, int STEP = LANES / 2> DEVICE void add_over_lanes(float *values) {
    if constexpr (STEP > 0 && N > 1) {
        const bool is_upper = threadIdx.x & STEP;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float kept = is_upper ? values[i + N / 2] : values[i], given = is_upper ? values[i] : values[i + N / 2];
            values[i] = kept + __shfl_xor_sync(ALL_LANES, given, STEP);
        }
        add_over_lanes<LANES, N / 2, STEP / 2>(values);
    } else if constexpr (STEP > 0) {
        values[0] += __shfl_xor_sync(ALL_LANES, values[0], STEP);
        add_over_lanes<LANES, 1, STEP / 2>(values);
    }
}

DEVICE float warp_max(float value) {
    for (int step = WARP / 2; step; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// The sum over a block of whole warps, for every thread. `partial` is shared, one value for each warp.
DEVICE float block_sum(float value, float *partial) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0)
        partial[threadIdx.x / WARP] = value;
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    return warp_sum(lane < (int)blockDim.x / WARP ? partial[lane] : 0.0f);
}

// x / divisor for values from 0 to 1 and a divisor from 1 to 2^20, by the whole warp, with the bits of `__fdiv_rn`, of which
// one for each value would be long: what the correctly rounded reciprocal leaves is added twice (Markstein, IBM J. Res. Dev.
// 34, 1990), which is exact as long as nothing comes near the smallest floats.
template <int N> DEVICE void divide(float (&x)[N], float divisor) {
    bool is_small = false;
#pragma unroll
    for (int i = 0; i < N; i++)
        is_small |= x[i] > 0.0f && x[i] < 0x1p-80f;
    if (__any_sync(ALL_LANES, is_small)) {
#pragma unroll
        for (int i = 0; i < N; i++)
            x[i] = __fdiv_rn(x[i], divisor);
        return;
    }
    const float reciprocal = __fdiv_rn(1.0f, divisor);
#pragma unroll
    for (int i = 0; i < N; i++) {
        float q = x[i] * reciprocal;
        q = __fmaf_rn(__fmaf_rn(-q, divisor, x[i]), reciprocal, q);
        x[i] = __fmaf_rn(__fmaf_rn(-q, divisor, x[i]), reciprocal, q);
    }
}

// exp(x) for x clamped to [-87, 88], the same bits as `vmath.h` on the CPU: 2^n times a polynomial in the remainder. This
// is the exponential of that, less 1.
DEVICE float exp_of_rest(float x, float &power) {
    x = fminf(fmaxf(x, -87.0f), 88.0f);
    const float n = rintf(x * 0x1.715476p+0f);
    power = __int_as_float(((int)n + 127) << 23);
    float r = __fmaf_rn(n, -0.693359375f, x);
    r = __fmaf_rn(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __fmaf_rn(p, r, 1.3981999507e-3f);
    p = __fmaf_rn(p, r, 8.3334519073e-3f);
    p = __fmaf_rn(p, r, 4.1665795894e-2f);
    p = __fmaf_rn(p, r, 1.6666665459e-1f);
    p = __fmaf_rn(p, r, 5.0000001201e-1f);
    return __fmaf_rn(p, r * r, r);
}

DEVICE float exp_canonical(float x) {
    float power;
    const float y = exp_of_rest(x, power) + 1.0f;
    return y * power;
}

// e^x - 1, the bits of `vmath.h`.
DEVICE float expm1_canonical(float x) {
    float power;
    const float y = exp_of_rest(x, power);
    return __fmaf_rn(power, y, power - 1.0f);
}

DEVICE float sigmoid(float x) { return __fdiv_rn(1.0f, 1.0f + exp_canonical(-x)); }

DEVICE float silu(float x) { return __fdiv_rn(x, 1.0f + exp_canonical(-x)); }

// GELU by tanh and cap * tanh(x / cap), the bits of `vmath.h`.
DEVICE float gelu(float x) {
    const float u = x * __fmaf_rn(0.0713548163f, x * x, 1.59576912f);
    return __fdiv_rn(x, 1.0f + exp_canonical(-u));
}

DEVICE float soft_cap(float x, float cap) {
    const float m = expm1_canonical(__fdiv_rn(2.0f, cap) * x);
    return cap * __fdiv_rn(m, m + 2.0f);
}

// ln(1 + e^x), the bits of `vmath.h`: 2 artanh(z / (z + 2)) with z = e^-|x|, and x if that is above 0.
DEVICE float softplus(float x) {
    const float z = exp_canonical(-fmaxf(x, -x)), s = __fdiv_rn(z, z + 2.0f), squared = s * s;
    float p = 1.0f / 15;
#pragma unroll
    for (int n = 13; n > 0; n -= 2)
        p = __fmaf_rn(p, squared, 1.0f / (float)n);
    return __fmaf_rn(s + s, p, fmaxf(x, 0.0f));
}

// x, but no farther from 0 than `limit`; of a NaN what the CPU makes of it.
DEVICE float within(float x, float limit) {
    const float below = x < limit ? x : limit;
    return below > -limit ? below : -limit;
}

// SiTU, the bits of `vmath.h`.
DEVICE float situ(float gate, float up, float limit, float up_limit) {
    const float factor = soft_cap(gate, limit) * sigmoid(gate);
    return factor * (up_limit > 0.0f ? soft_cap(up, up_limit) : up);
}

// The clamped swish of gpt-oss, the bits of `vmath.h`.
DEVICE float clamped_swish(float gate, float up) {
    const float g = gate < 7.0f ? gate : 7.0f; // as the CPU does with a NaN
    return g * sigmoid(1.702f * g) * (within(up, 7.0f) + 1.0f);
}

// Views into one activation row; layout as in `engine/kernels/activations.h`: int8 q[n_cols], float d for each group of
// `group` values, int16 sums of q over 16 values, each part from a multiple of 64 bytes on.
struct Activation {
    int8_t *q;
    float *d;
    int16_t *sums;
};

DEVICE Activation activation_view(uint8_t *row, int group, int n_cols) {
    uint8_t *d = row + round_up_64(n_cols);
    return {(int8_t *)row, (float *)d, (int16_t *)(d + round_up_64(n_cols / group * (int64_t)sizeof(float)))};
}
