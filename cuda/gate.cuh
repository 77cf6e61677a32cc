// A gate over eight columns of a lane, and the norm of heads before it.
#pragma once

#include "common.cuh"

// x = x * silu(g) if SILU, else x * sigmoid(g); before that, with a SIZE (a power of two from 8 to 256; 0: not), x = weight * x /
// sqrt(mean(x^2) + eps) over the columns of its head, whose lanes stand together. `at`: the lane's first column. weight
// [SIZE] or null. Whole warps only.
template <int SIZE, bool SILU>
DEVICE void normalize_and_gate(float (&x)[8], const float (&g)[8], int at, const float *weight, float eps) {
    if constexpr (SIZE > 0) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++)
            squares = __fmaf_rn(x[i], x[i], squares);
        for (int step = SIZE / 16; step; step /= 2)
            squares += __shfl_xor_sync(ALL_LANES, squares, step);
        const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, (float)SIZE) + eps));
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = weight ? x[i] * factor * weight[(at + i) % SIZE] : x[i] * factor;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] *= SILU ? silu(g[i]) : sigmoid(g[i]);
}
