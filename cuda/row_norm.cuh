// The norm of a whole row that a block holds, eight columns a thread in each of some rounds, in all forms.
#pragma once

#include "quantize.cuh"

// The first of a thread's columns in a round.
DEVICE int column_of(int round) { return (round * blockDim.x + threadIdx.x) * 8; }

// Eight values for each of a thread's columns, from a row of n_cols.
template <int N> DEVICE void load_columns(const float *from, int n_cols, float (&v)[N][8]) {
#pragma unroll
    for (int round = 0; round < N; round++)
        if (column_of(round) < n_cols)
            load_floats(from + column_of(round), v[round]);
}

// The sum over a row that a block goes through in some rounds, of what each thread has of each: with the bits of `block_sum`
// in a block that takes the row in one round. `partial` is shared, one value for each warp and round, a warp's at most.
template <int N> DEVICE float sum_of_rounds(const float (&values)[N], float *partial) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
#pragma unroll
    for (int round = 0; round < N; round++) {
        const float value = warp_sum(values[round]);
        if (lane == 0)
            partial[round * n_warps + warp] = value;
    }
    __syncthreads();
    return warp_sum(lane < N * n_warps ? partial[lane] : 0.0f);
}

// What a row is multiplied by, from the sum of its squares.
DEVICE float norm_factor(float squares, int n_cols, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, (float)n_cols) + eps));
}

// Eight columns of a norm without a bias; `has_weight`: whether there is a w.
DEVICE void normalize(const float (&x)[8], const float (&w)[8], bool has_weight, float factor, float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++)
        y[i] = has_weight ? x[i] * factor * w[i] : x[i] * factor;
}

// out = x * w / sqrt(mean(x^2) + eps) + bias, and that in the forms that are wanted; `has_weight`: whether there is a w. bias:
// null for none. `partial` is shared, one value for each warp.
template <int N, int WANTED>
DEVICE void normalize_row(const float (&x)[N][8], const float (&w)[N][8], bool has_weight, const float *bias, float eps,
                          float *out, const Forms &forms, int row, int n_cols, float *partial) {
    float squares = 0.0f;
#pragma unroll
    for (int round = 0; round < N; round++)
        if (column_of(round) < n_cols)
#pragma unroll
            for (int i = 0; i < 8; i++)
                squares = __fmaf_rn(x[round][i], x[round][i], squares);
    const float factor = norm_factor(block_sum(squares, partial), n_cols, eps);
#pragma unroll
    for (int round = 0; round < N; round++) {
        const int at = column_of(round);
        const bool exists = at < n_cols;
        float y[8] = {};
        if (exists)
            normalize(x[round], w[round], has_weight, factor, y);
        if (exists && bias) {
            float added[8];
            load_floats(bias + at, added);
#pragma unroll
            for (int i = 0; i < 8; i++)
                y[i] += added[i];
        }
        if (exists)
            store_floats(out + at, y);
        forms.store<WANTED>(y, row, at, n_cols);
    }
}
