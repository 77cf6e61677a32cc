// Activations in the form that integer formats take, made by the lanes that hold them: d = amax / 127 for each group,
// q = x * (127 / amax) rounded to nearest even. A NaN counts as nothing in amax and becomes -127.
#pragma once

#include "common.cuh"

template <int N> DEVICE void set_four(float (&v)[N], int i, float4 four) {
    v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
}

// N consecutive values of a 16-byte aligned row.
template <int N> DEVICE void load_floats(const float *p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
        set_four(v, i, *(const float4 *)(p + i));
}

// The same of memory that other blocks or somebody outside the GPU may have written.
template <int N> DEVICE void load_floats_past_cache(const float *p, float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
        set_four(v, i, __ldcv((const float4 *)(p + i)));
}

template <int N> DEVICE void store_floats(float *p, const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
        *(float4 *)(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}

// What eight consecutive values of each lane become: q, four to a word, the sum of q over the sixteen of two lanes, and d.
// A group's lanes stand together; whole warps only.
template <int SIZE> DEVICE void quantize_8(const float (&v)[8], uint2 &q, int &sum, float &d) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++)
        amax = fmaxf(amax, fabsf(v[i]));
    for (int step = SIZE / 16; step; step /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(ALL_LANES, amax, step));
    const float ratio = amax > 0.0f ? __fdiv_rn(127.0f, amax) : 0.0f;

    unsigned packed[2] = {0, 0};
    sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int value = __float2int_rn(fminf(fmaxf(rintf(v[i] * ratio), -127.0f), 127.0f));
        sum += value;
        packed[i / 4] |= (unsigned)(value & 255) << 8 * (i % 4);
    }
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    q = make_uint2(packed[0], packed[1]);
    d = __fdiv_rn(amax, 127.0f);
}

// Eight consecutive values of each lane to a row. Groups exist as a whole (a row is whole groups); `at` is beyond n_cols
// for lanes without values, which take part all the same. Whole warps only.
template <int SIZE> DEVICE void store_quantized(uint8_t *row, const float (&v)[8], int at, int n_cols) {
    uint2 q;
    int sum;
    float d;
    quantize_8<SIZE>(v, q, sum, d);
    if (at >= n_cols)
        return;
    const Activation out = activation_view(row, SIZE, n_cols);
    *(uint2 *)(out.q + at) = q;
    if (at % 16 == 0)
        out.sums[at / 16] = (int16_t)sum;
    if (at % SIZE == 0)
        out.d[at / SIZE] = d;
}

// Where the rows of both forms go, for kernels that make them beside their float32 result.
struct Forms {
    uint8_t *q256, *q32;
    int64_t q256_row_bytes, q32_row_bytes;

    // WANTED is a sum of 1 for groups of 256 and 2 for groups of 32.
    template <int WANTED> __device__ __forceinline__ void store(const float (&v)[8], int row, int at, int n_cols) const {
        if (WANTED & 1)
            store_quantized<256>(q256 + row * q256_row_bytes, v, at, n_cols);
        if (WANTED & 2)
            store_quantized<32>(q32 + row * q32_row_bytes, v, at, n_cols);
    }
};
