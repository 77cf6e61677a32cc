// The selective scan of Mamba, token after token. Each channel has a state s of STATE_SIZE values:
//
//     dt = softplus(dt);  s = exp(a dt) s + dt x b;  out = s . c + skip x
//
// a [n_channels, STATE_SIZE], skip [n_channels]; b and c have STATE_SIZE values for each token, which all channels share. state
// [n_slots, n_channels, STATE_SIZE]. Tokens of one sequence stand together and in order; one at position 0 starts its sequence
// with a zero state. The state of a sequence is read once and written once for all its tokens in the step.
//
// Compiled for STATE_SIZE (up to 256) and CHANNEL_LANES: so many lanes of a warp, a power of two, have the state of a channel
// in their registers. Grid: (ceil(n_channels / CHANNELS)); a block is 8 warps, which fetch some tokens ahead (cp.async).
#include "common.cuh"

constexpr int THREADS = 8 * WARP;
constexpr int PER_LANE = (STATE_SIZE + CHANNEL_LANES - 1) / CHANNEL_LANES;
constexpr int CHANNELS = THREADS / CHANNEL_LANES; // of a block
constexpr int AT_ONCE = 8;                // tokens that are fetched together

struct Tokens {
    float x[AT_ONCE][CHANNELS], dt[AT_ONCE][CHANNELS], b[AT_ONCE][STATE_SIZE], c[AT_ONCE][STATE_SIZE];
    int slots[AT_ONCE], positions[AT_ONCE];
};

KERNEL(THREADS)
selective_scan(const float *x, int64_t x_stride, const float *dt, int64_t dt_stride, const float *b, int64_t b_stride,
               const float *c, int64_t c_stride, const float *a, const float *skip, float *state, float *out,
               int64_t out_stride, int n_channels, const int *positions, const int *slots, const int *n_tokens, Kept copy) {
    __shared__ Tokens fetched[2];
    const int thread = threadIdx.x, n = *n_tokens, lane = thread % CHANNEL_LANES, own = thread / CHANNEL_LANES;
    const int first_channel = blockIdx.x * CHANNELS, channel = first_channel + own;
    const bool exists = channel < n_channels;
    const int kept_after = copy.after();

    auto state_of = [&](int slot) { return state + ((int64_t)slot * n_channels + channel) * STATE_SIZE; };
    auto fetch = [&](int first) {
        Tokens &to = fetched[first / AT_ONCE % 2];
        const int n_now = min(AT_ONCE, n - first);
        for (int i = thread; i < n_now * CHANNELS; i += THREADS) {
            const int t = i / CHANNELS, j = i % CHANNELS;
            if (first_channel + j < n_channels) {
                cp_async4(&to.x[t][j], x + (first + t) * x_stride + first_channel + j);
                cp_async4(&to.dt[t][j], dt + (first + t) * dt_stride + first_channel + j);
            }
        }
        for (int i = thread; i < n_now * STATE_SIZE; i += THREADS) {
            const int t = i / STATE_SIZE, j = i % STATE_SIZE;
            cp_async4(&to.b[t][j], b + (first + t) * b_stride + j);
            cp_async4(&to.c[t][j], c + (first + t) * c_stride + j);
        }
        if (thread < n_now) {
            cp_async4(&to.slots[thread], slots + first + thread);
            cp_async4(&to.positions[thread], positions + first + thread);
        }
        cp_async_commit();
    };

    // Parameters, and the first token's state, are older than this step: they come while the kernel before still computes.
    float s[PER_LANE], rates[PER_LANE];
    const bool goes_on = positions[0] != 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        const int i = j * CHANNEL_LANES + lane;
        rates[j] = exists && i < STATE_SIZE ? a[channel * STATE_SIZE + i] : 0.0f;
        s[j] = exists && goes_on && i < STATE_SIZE ? state_of(slots[0])[i] : 0.0f;
    }
    const float skipped = exists ? skip[channel] : 0.0f;
    begin_kernel();
    fetch(0);
    int slot_before = slots[0];
    for (int first = 0; first < n; first += AT_ONCE) {
        const int n_now = min(AT_ONCE, n - first);
        Tokens &tokens = fetched[first / AT_ONCE % 2];
        __syncthreads(); // everybody is done with the tokens before
        if (first + AT_ONCE < n)
            fetch(first + AT_ONCE);
        else
            cp_async_commit(); // so that the count of groups stays in step
        cp_async_wait<1>();
        __syncthreads();
        for (int i = thread; i < n_now * CHANNELS; i += THREADS) {
            float &step = tokens.dt[i / CHANNELS][i % CHANNELS];
            if (first_channel + i % CHANNELS < n_channels)
                step = softplus(step);
        }
        __syncthreads();
        for (int t = 0; t < n_now; t++) {
            const int slot = tokens.slots[t];
            const bool is_fresh = tokens.positions[t] == 0;
            if (exists && (slot != slot_before || (is_fresh && first + t))) {
#pragma unroll
                for (int j = 0; j < PER_LANE; j++) {
                    const int i = j * CHANNEL_LANES + lane;
                    if (i < STATE_SIZE) {
                        if (slot != slot_before)
                            state_of(slot_before)[i] = s[j];
                        s[j] = is_fresh ? 0.0f : state_of(slot)[i];
                    }
                }
            }
            slot_before = slot;
            const float input = exists ? tokens.x[t][own] : 0.0f, step = exists ? tokens.dt[t][own] : 0.0f;
            const float added = step * input;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) {
                const int i = j * CHANNEL_LANES + lane;
                if (i < STATE_SIZE) {
                    s[j] = __fmaf_rn(added, tokens.b[t][i], expf(rates[j] * step) * s[j]);
                    sum = __fmaf_rn(s[j], tokens.c[t][i], sum);
                }
            }
#pragma unroll
            for (int apart = CHANNEL_LANES / 2; apart; apart /= 2)
                sum += __shfl_xor_sync(ALL_LANES, sum, apart);
            if (exists && lane == 0)
                out[(first + t) * out_stride + channel] = __fmaf_rn(skipped, input, sum);
            if (exists && first + t == kept_after)
#pragma unroll
                for (int j = 0; j < PER_LANE; j++)
                    if (j * CHANNEL_LANES + lane < STATE_SIZE)
                        copy.to[(int64_t)channel * STATE_SIZE + j * CHANNEL_LANES + lane] = s[j];
        }
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        const int i = j * CHANNEL_LANES + lane;
        if (exists && i < STATE_SIZE)
            state_of(slot_before)[i] = s[j];
    }
}
