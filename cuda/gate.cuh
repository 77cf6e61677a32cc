// How a gate acts, and the norm of heads before it.
#pragma once

#include "common.cuh"

// Where the gate of a column is, in a row of `width` values for each head, `step` apart, or of one value for so many columns.
template <int IS_PER_HEAD> DEVICE const float *gate_at(const float *row, int column, int width, int step) {
    return row + column / width * step + (IS_PER_HEAD ? 0 : column % width);
}

// Whether a gate without limits is a factor, which what it acts on has no part in.
template <int KIND> constexpr bool IS_FACTOR = KIND < 6;

// What x is multiplied by; KIND: 0 sigmoid, 1 SiLU, 2 softplus, 3 what is above 0, 4 itself, 5 GELU.
template <int KIND> DEVICE float gate_of(float g) {
    if constexpr (KIND == 5)
        return gelu(g);
    return KIND == 4 ? g : KIND == 3 ? fmaxf(g, 0.0f) : KIND == 2 ? softplus(g) : KIND == 1 ? silu(g) : sigmoid(g);
}

// x * gate_of(g), with a `limit` above 0 clamped, see `graph.Gate`; KIND 6: the clamped swish of both, 7: SiTU, with
// `own_limit` for x; 8: SiLU of a clamped g.
template <int KIND> DEVICE float gated(float x, float g, float limit = 0.0f, float own_limit = 0.0f) {
    if constexpr (KIND == 6)
        return clamped_swish(g, x);
    if constexpr (KIND == 7)
        return situ(g, x, limit, own_limit);
    if constexpr (KIND == 8)
        return silu(g < limit ? g : limit) * within(x, limit);
    const float factor = gate_of<KIND>(g);
    return limit > 0.0f ? (factor < limit ? factor : limit) * within(x, limit) : x * factor;
}

// x = weight * x / sqrt(mean(x^2) + eps) over heads of SIZE columns (a power of two from 8 to 256), whose lanes stand together.
// `at`: the lane's first column. weight [SIZE] or null. Whole warps only.
template <int SIZE> DEVICE void normalize_heads(float (&x)[8], int at, const float *weight, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++)
        squares = __fmaf_rn(x[i], x[i], squares);
    for (int step = SIZE / 16; step; step /= 2)
        squares += __shfl_xor_sync(ALL_LANES, squares, step);
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(squares * (1.0f / SIZE) + eps));
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = weight ? x[i] * factor * weight[(at + i) % SIZE] : x[i] * factor;
}
