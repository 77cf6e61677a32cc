// The norm of a whole row that a block holds, eight columns a thread in each of some rounds, in all forms. Compiled for N_COLS
// of a row, a multiple of 8, and THREADS of a block.
#pragma once

#include "quantize.cuh"

constexpr int ROUNDS = (N_COLS + 8 * THREADS - 1) / (8 * THREADS);

// The first of a thread's columns in a round, and whether there are any from there on.
DEVICE int column_of(int round) { return (round * THREADS + threadIdx.x) * 8; }
DEVICE bool is_column(int column) { return N_COLS % (8 * THREADS) == 0 || column < N_COLS; }

// A thread's columns of a row.
DEVICE void load_columns(const float *from, float (&v)[ROUNDS][8]) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++)
        if (is_column(column_of(round)))
            load_floats(from + column_of(round), v[round]);
}

// The sum over a row that a block goes through in some rounds, of what each thread has of each: with the bits of `block_sum`
// in a block that takes the row in one round. `partial` is shared, one value for each warp and round, a warp's at most.
DEVICE float sum_of_rounds(const float (&values)[ROUNDS], float *partial) {
    constexpr int N_WARPS = THREADS / WARP;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const float value = warp_sum(values[round]);
        if (lane == 0)
            partial[round * N_WARPS + warp] = value;
    }
    __syncthreads();
    return warp_sum(lane < ROUNDS * N_WARPS ? partial[lane] : 0.0f);
}

// What a row is multiplied by, from the sum of its squares.
DEVICE float norm_factor(float squares, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(squares, (float)N_COLS) + eps));
}

// Eight columns of a norm without a bias; `has_weight`: whether there is a w.
DEVICE void normalize(const float (&x)[8], const float (&w)[8], bool has_weight, float factor, float (&y)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++)
        y[i] = has_weight ? x[i] * factor * w[i] : x[i] * factor;
}

// out = x * w / sqrt(mean(x^2) + eps) + bias, and that in the forms that are wanted; `has_weight`: whether there is a w. bias:
// null for none. `partial` is shared, one value for each warp.
template <int WANTED>
DEVICE void normalize_row(const float (&x)[ROUNDS][8], const float (&w)[ROUNDS][8], bool has_weight, const float *bias,
                          float eps, float *out, const Forms &forms, int row, float *partial) {
    float squares = 0.0f;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++)
        if (is_column(column_of(round)))
#pragma unroll
            for (int i = 0; i < 8; i++)
                squares = __fmaf_rn(x[round][i], x[round][i], squares);
    const float factor = norm_factor(block_sum(squares, partial), eps);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int at = column_of(round);
        const bool exists = is_column(at);
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
        forms.store<WANTED>(y, row, at, N_COLS);
    }
}
