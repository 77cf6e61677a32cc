// Depthwise causal convolution over time, token after token.
//
// weight [n_channels, KERNEL_SIZE], bias [n_channels] or null; state [n_slots, BEFORE, n_channels], oldest first. Tokens of
// one sequence stand together and in order; one at position 0 starts its sequence with a zero state. The state of a sequence
// is read once and written once for all its tokens in the step.
//
// Compiled as `causal_conv.cuh` says. For few tokens one kernel goes through them; for many, `convolve` takes all at the same
// time and `keep_inputs` then brings the states up to date. A thread takes a channel.
#include "causal_conv.cuh"

constexpr int AT_ONCE = 16; // tokens of a thread of `convolve`

// Grid: (ceil(n_channels / 256)).
KERNEL(256)
causal_conv(const float *x, int64_t x_stride, const float *weight, const float *bias, float *state, float *out,
            int64_t out_stride, int n_channels, const int *positions, const int *slots, const int *n_tokens, Kept kept) {
    const int channel = blockIdx.x * 256 + threadIdx.x, n = *n_tokens, kept_after = kept.after();
    float w[KERNEL_SIZE], past[BEFORE], b = 0.0f;
    auto state_of = [&](int t) { return state + (int64_t)slots[t] * BEFORE * n_channels + channel; };
    auto load_past = [&](int t) {
#pragma unroll
        for (int j = 0; j < BEFORE; j++)
            past[j] = positions[t] == 0 ? 0.0f : state_of(t)[j * n_channels];
    };
    if (channel < n_channels) { // older than this step
        load_weights(w, weight, channel);
        b = bias ? bias[channel] : 0.0f;
        load_past(0);
    }
    begin_kernel();
    if (channel >= n_channels)
        return;
    for (int t = 0; t < n; t++) {
        if (t && (slots[t] != slots[t - 1] || positions[t] == 0))
            load_past(t);
        const float now = x[t * x_stride + channel];
        out[t * out_stride + channel] = convolved(past, now, w, b);
        move_on(past, now);
        if (t + 1 == n || slots[t + 1] != slots[t])
#pragma unroll
            for (int j = 0; j < BEFORE; j++)
                state_of(t)[j * n_channels] = past[j];
        if (t == kept_after)
#pragma unroll
            for (int j = 0; j < BEFORE; j++)
                kept.to[j * n_channels + channel] = past[j];
    }
}

// Grid: (ceil(n_channels / 256), ceil(tokens / AT_ONCE)). Not in place.
KERNEL(256)
convolve(const float *x, int64_t x_stride, const float *weight, const float *bias, const float *state, float *out,
         int64_t out_stride, int n_channels, const int *positions, const int *slots, const int *n_tokens) {
    begin_kernel();
    const int channel = blockIdx.x * 256 + threadIdx.x, first = blockIdx.y * AT_ONCE, end = min(first + AT_ONCE, *n_tokens);
    if (channel >= n_channels || first >= end)
        return;
    float w[KERNEL_SIZE], past[BEFORE];
    const float b = bias ? bias[channel] : 0.0f;
    load_weights(w, weight, channel);
    const int slot = slots[first];
    const float *kept = state + (int64_t)slot * BEFORE * n_channels + channel;
    int n_own = 0; // inputs of this step before the first token, as far as they matter
    while (n_own < BEFORE && first - n_own > 0 && slots[first - n_own - 1] == slot && positions[first - n_own] != 0)
        n_own++;
#pragma unroll
    for (int j = 0; j < BEFORE; j++) {
        const int back = BEFORE - j; // tokens before the first
        past[j] = back <= n_own                      ? x[(first - back) * x_stride + channel]
                  : positions[first - n_own] == 0 ? 0.0f
                                                     : kept[(j + n_own) * n_channels];
    }
    for (int t = first; t < end; t++) {
        if (t > first && (slots[t] != slots[t - 1] || positions[t] == 0)) {
            const float *own = state + (int64_t)slots[t] * BEFORE * n_channels + channel;
#pragma unroll
            for (int j = 0; j < BEFORE; j++)
                past[j] = positions[t] == 0 ? 0.0f : own[j * n_channels];
        }
        const float now = x[t * x_stride + channel];
        out[t * out_stride + channel] = convolved(past, now, w, b);
        move_on(past, now);
    }
}

// The last inputs of each sequence to its state; before that those up to a token to the copy. Grid: (ceil(n_channels / 256)).
KERNEL(256)
keep_inputs(const float *x, int64_t x_stride, float *state, int n_channels, const int *positions, const int *slots,
            const int *n_tokens, Kept copy) {
    begin_kernel();
    const int channel = blockIdx.x * 256 + threadIdx.x, lane = threadIdx.x % WARP, n = *n_tokens;
    auto keep = [&](int last, float *to) {
        const int slot = slots[last];
        int n_own = 1; // inputs of this step, as far as they matter
        while (n_own < BEFORE && last - n_own >= 0 && slots[last - n_own] == slot && positions[last - n_own + 1] != 0)
            n_own++;
        if (channel >= n_channels)
            return;
        const bool is_fresh = positions[last - n_own + 1] == 0;
        const float *kept = state + (int64_t)slot * BEFORE * n_channels + channel;
        for (int j = 0; j < BEFORE; j++) { // rising, so that what is moved is read before it is overwritten
            const int back = BEFORE - 1 - j;
            to[j * n_channels] = back < n_own ? x[(last - back) * x_stride + channel]
                                 : is_fresh   ? 0.0f
                                              : kept[(j + n_own) * n_channels];
        }
    };
    const int kept_after = copy.after();
    if (kept_after >= 0)
        keep(kept_after, copy.to + channel);
    for (int base = 0; base < n; base += WARP) {
        const int t = base + lane;
        unsigned ends = __ballot_sync(ALL_LANES, t < n && (t + 1 == n || slots[t + 1] != slots[t]));
        for (; ends; ends &= ends - 1) {
            const int last = base + __ffs(ends) - 1;
            keep(last, state + (int64_t)slots[last] * BEFORE * n_channels + channel);
        }
    }
}
