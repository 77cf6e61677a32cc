// Depthwise causal convolution over time, then SiLU, token after token.
//
// weight [n_channels, KERNEL_SIZE]; state [n_slots, KERNEL_SIZE - 1, n_channels], oldest first. Tokens of one sequence
// stand together and in order; one at position 0 starts its sequence with a zero state. The state of a sequence is read
// once and written once for all its tokens in the step.
//
// Compiled for KERNEL_SIZE. Grid: (ceil(n_channels / 256)); a thread takes a channel.
#include "common.cuh"

KERNEL(256)
causal_conv(const float *x, int64_t x_stride, const float *weight, float *state, float *out, int64_t out_stride,
            int n_channels, const int *positions, const int *slots, const int *n_tokens) {
    begin_kernel();
    constexpr int BEFORE = KERNEL_SIZE - 1;
    const int channel = blockIdx.x * 256 + threadIdx.x, n = *n_tokens;
    if (channel >= n_channels)
        return;
    float w[KERNEL_SIZE], past[BEFORE];
#pragma unroll
    for (int j = 0; j < KERNEL_SIZE; j++)
        w[j] = weight[channel * KERNEL_SIZE + j];
    for (int t = 0; t < n; t++) {
        float *kept = state + (int64_t)slots[t] * BEFORE * n_channels + channel;
        if (t == 0 || slots[t] != slots[t - 1] || positions[t] == 0)
#pragma unroll
            for (int j = 0; j < BEFORE; j++)
                past[j] = positions[t] == 0 ? 0.0f : kept[j * n_channels];
        const float now = x[t * x_stride + channel];
        float acc = 0.0f;
#pragma unroll
        for (int j = 0; j < BEFORE; j++)
            acc = __fmaf_rn(past[j], w[j], acc);
        acc = __fmaf_rn(now, w[BEFORE], acc);
        out[t * out_stride + channel] = silu(acc);
#pragma unroll
        for (int j = 0; j + 1 < BEFORE; j++)
            past[j] = past[j + 1];
        past[BEFORE - 1] = now;
        if (t + 1 == n || slots[t + 1] != slots[t])
#pragma unroll
            for (int j = 0; j < BEFORE; j++)
                kept[j * n_channels] = past[j];
    }
}
