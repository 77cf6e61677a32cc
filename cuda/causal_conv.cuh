// One channel of a causal convolution over time, of tokens that are DILATION apart. Compiled for that, for KERNEL_SIZE, and
// for ACTIVATES: whether SiLU follows.
#pragma once

#include "common.cuh"

constexpr int BEFORE = (KERNEL_SIZE - 1) * DILATION; // tokens that it goes back

// The new output; `past` are the inputs before `now`, oldest first.
DEVICE float convolved(const float (&past)[BEFORE], float now, const float (&w)[KERNEL_SIZE], float bias = 0.0f) {
    float acc = 0.0f;
#pragma unroll
    for (int j = 0; j < KERNEL_SIZE - 1; j++)
        acc = __fmaf_rn(past[j * DILATION], w[j], acc);
    acc = __fmaf_rn(now, w[KERNEL_SIZE - 1], acc) + bias;
    return ACTIVATES ? silu(acc) : acc;
}

DEVICE void load_weights(float (&w)[KERNEL_SIZE], const float *weight, int channel) {
#pragma unroll
    for (int j = 0; j < KERNEL_SIZE; j++)
        w[j] = weight[channel * KERNEL_SIZE + j];
}

DEVICE void move_on(float (&past)[BEFORE], float now) {
#pragma unroll
    for (int j = 0; j + 1 < BEFORE; j++)
        past[j] = past[j + 1];
    past[BEFORE - 1] = now;
}
