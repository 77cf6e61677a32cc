// What the kernels share that multiply several matrices with the same activations: out[t][r] = (W_m[r] . x[t]) * scale +
// bias[r].
//
// Heads have a matrix and an activation row each, and their results and scales follow one another. There is one head, but
// for multi-head latent attention.
#pragma once

#include "common.cuh"

constexpr int MAX_MATRICES = 8;

struct Matrix {
    const uint8_t *weights;
    float *out;
    const float *bias;  // [n_rows] or null
    const float *scale; // [heads] or null
    int n_rows;
    int out_stride;
    int first_block; // of the grid
    int is_second;   // of the two formats that `linear.cuh` is compiled for

    __device__ __forceinline__ void put(int head, int row, int token, float value) const {
        if (scale)
            value *= scale[head];
        if (bias)
            value += bias[row];
        out[(int64_t)token * out_stride + head * n_rows + row] = value;
    }
};

struct Matrices {
    Matrix list[MAX_MATRICES];
    int n;
    int unused;
};

// The matrix that a block of the grid works at.
DEVICE const Matrix &matrix_of(const Matrices &matrices, int block) {
    int m = 0;
    while (m + 1 < matrices.n && block >= matrices.list[m + 1].first_block)
        m++;
    return matrices.list[m];
}
