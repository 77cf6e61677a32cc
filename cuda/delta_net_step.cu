// One token of a delta-net layer, all that lies between its two products: the causal convolution of queries, keys and values,
// the gated delta rule (`delta_net.cuh`), the norm of its heads, their gate, and the forms that the next product takes.
// With the bits of `causal_conv.cu`, `delta_net.cu` and `gate.cu` one after another.
//
// Compiled as `causal_conv.cuh`, `delta_net.cuh` and `gate.cuh` say (V_DIM is the size of a head) and for FORMS. Grid:
// (n_v_heads, ceil(V_DIM / 32)); a block takes 32 rows of S, a warp four, in registers. All that is older than the step is
// fetched while the kernel before still runs.
//
// Blocks of value heads that share a key head all read what the convolution has kept of it: the last of them to have read it
// writes what is kept now. The last block of each 256 columns normalises and gates them.
#include "causal_conv.cuh"
#include "delta_net.cuh"
#include "gate.cuh"
#include "last_block.cuh"
#include "quantize.cuh"

constexpr int N_WARPS = 8, THREADS = N_WARPS * WARP;
constexpr int ROWS_PER_WARP = 4, ROWS = N_WARPS * ROWS_PER_WARP;
constexpr int GATED = 256;                          // columns that are gated together
constexpr int CHANNELS = 2 * K_DIM + ROWS;          // of the convolution that a block needs: query, key, values
constexpr int N_DECAYS = BY_CHANNEL ? K_DIM : 1;
constexpr int PER_THREAD = (CHANNELS + THREADS - 1) / THREADS;
static_assert(GATED == THREADS && IS_FACTOR<GATING>, "a thread works out the gate of a column before that is there");

// Each summed over the warp, all at the same time.
DEVICE void warp_sums(float (&values)[ROWS_PER_WARP]) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2)
#pragma unroll
        for (int r = 0; r < ROWS_PER_WARP; r++)
            values[r] += __shfl_xor_sync(ALL_LANES, values[r], step);
}

// The layer's inputs and parameters. x: what is convolved, queries of all key heads, then keys, then values.
struct Layer {
    const float *x, *beta, *alpha, *gate;
    const float *conv_weight, *a, *dt_bias, *norm_weight;
    float *conv_state, *state;
    int n_k_heads, is_grouped;
    float decay_bound, eps, norm_eps;
};

// found: [n_v_heads * V_DIM], as `delta_net` gives it; out: the same gated. n_done: n_k_heads + ceil(n_v_heads * V_DIM / 256)
// words, 0 before and after.
KERNEL(THREADS)
delta_net_step(Layer layer, float *found, float *out, Forms forms, unsigned *n_done, const int *positions, const int *slots) {
    __shared__ float convolved_values[CHANNELS];
    __shared__ int is_last_reader;
    __shared__ __align__(16) float factors[GATED]; // of the group's columns, a thread each
    __shared__ float norm_weight[V_DIM], decays[N_DECAYS], shared_rate;
    const int head = blockIdx.x, n_v_heads = gridDim.x, n_k_heads = layer.n_k_heads, n_cols = n_v_heads * V_DIM;
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int first_row = blockIdx.y * ROWS, own_row = first_row + warp * ROWS_PER_WARP;
    const int key_head = key_head_of(head, n_k_heads, n_v_heads, layer.is_grouped);
    const int slot = slots[0], n_channels = 2 * n_k_heads * K_DIM + n_cols;
    const bool goes_on = positions[0] != 0;

    float *state = layer.state + (((int64_t)slot * n_v_heads + head) * V_DIM + own_row) * K_DIM + lane;
    float s[ROWS_PER_WARP][PER_LANE];
    auto is_row = [&](int r) { return V_DIM % ROWS == 0 || own_row + r < V_DIM; };
    auto holds = [&](int r, int j) { return is_row(r) && (K_DIM % WARP == 0 || j * WARP + lane < K_DIM); };
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            s[r][j] = goes_on && holds(r, j) ? state[r * K_DIM + j * WARP] : 0.0f;

    // The thread's channels of the convolution.
    float w[PER_THREAD][KERNEL_SIZE], past[PER_THREAD][BEFORE], now[PER_THREAD];
    int channel[PER_THREAD]; // -1: none
    float *kept = layer.conv_state + (int64_t)slot * BEFORE * n_channels;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int c = i * THREADS + thread, row = first_row + c - 2 * K_DIM;
        channel[i] = c < K_DIM       ? key_head * K_DIM + c
                     : c < 2 * K_DIM ? (n_k_heads - 1 + key_head) * K_DIM + c
                     : c < CHANNELS && row < V_DIM ? 2 * n_k_heads * K_DIM + head * V_DIM + row
                                                   : -1;
        if (channel[i] < 0)
            continue;
        load_weights(w[i], layer.conv_weight, channel[i]);
#pragma unroll
        for (int j = 0; j < BEFORE; j++)
            past[i][j] = goes_on ? kept[j * n_channels + channel[i]] : 0.0f;
    }
    // What there is one of for a head or a channel is worked out by one thread, here and there.
    const int own_decay = THREADS - 1 - thread;
    const bool has_decay = own_decay < N_DECAYS, has_rate = thread == WARP;
    const int decay_at = head * N_DECAYS + own_decay;
    const float a = has_decay ? layer.a[head] : 0.0f, dt_bias = has_decay ? layer.dt_bias[decay_at] : 0.0f;
    const float own_weight = layer.norm_weight && thread < V_DIM ? layer.norm_weight[thread] : 0.0f;
    await_previous_kernel();

    const float beta = has_rate ? layer.beta[head] : 0.0f, alpha = has_decay ? layer.alpha[decay_at] : 0.0f;
    const int group = head * V_DIM / GATED, column = group * GATED + thread; // that the thread gates
    const float gate = column < n_cols ? layer.gate[column] : 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
        now[i] = channel[i] < 0 ? 0.0f : layer.x[channel[i]];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int c = i * THREADS + thread;
        if (channel[i] < 0)
            continue;
        convolved_values[c] = convolved(past[i], now[i], w[i]);
        move_on(past[i], now[i]);
    }
    factors[thread] = gate_of<GATING>(gate); // here it takes no time of its own
    if (thread < V_DIM)
        norm_weight[thread] = own_weight;
    if (has_decay)
        decays[own_decay] = decay_of(a, alpha, dt_bias, layer.decay_bound);
    if (has_rate)
        shared_rate = sigmoid(beta);
    __syncthreads();
    const unsigned n_readers = n_v_heads / n_k_heads * gridDim.y;
    unsigned n_before = 0;
    if (thread == 0)
        n_before = atomicInc(n_done + key_head, n_readers - 1); // which makes it 0 again; looked at when it is back

    float query[PER_LANE], key[PER_LANE], query_squares = 0.0f, key_squares = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        const int i = j * WARP + lane;
        query[j] = i < K_DIM ? convolved_values[i] : 0.0f, key[j] = i < K_DIM ? convolved_values[K_DIM + i] : 0.0f;
        query_squares = __fmaf_rn(query[j], query[j], query_squares);
        key_squares = __fmaf_rn(key[j], key[j], key_squares);
    }
    query_squares = warp_sum(query_squares), key_squares = warp_sum(key_squares);
    const bool is_query = lane < WARP / 2; // half the lanes work out the one's factor, half the other's
    const float factor = unit_factor(is_query ? query_squares : key_squares, layer.eps, is_query ? (float)K_DIM : 1.0f);
    const float query_factor = __shfl_sync(ALL_LANES, factor, 0), key_factor = __shfl_sync(ALL_LANES, factor, WARP - 1);
    const float rate = shared_rate;
    float decay[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        decay[j] = BY_CHANNEL ? decays[min(j * WARP + lane, K_DIM - 1)] : decays[0];
    float recalled[ROWS_PER_WARP] = {}, result[ROWS_PER_WARP] = {};
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        key[j] *= key_factor;
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            s[r][j] *= decay[j];
            recalled[r] = __fmaf_rn(s[r][j], key[j], recalled[r]);
        }
    warp_sums(recalled);
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++) {
        const float step = rate * (convolved_values[2 * K_DIM + warp * ROWS_PER_WARP + r] - recalled[r]);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            s[r][j] = __fmaf_rn(step, key[j], s[r][j]);
            result[r] = __fmaf_rn(s[r][j], query[j], result[r]);
        }
    }
    warp_sums(result);
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++)
        if (lane == 0 && is_row(r))
            found[head * V_DIM + own_row + r] = result[r] * query_factor;

    if (thread == 0)
        is_last_reader = n_before == n_readers - 1;
    const int n_heads = min(GATED / V_DIM, n_v_heads - group * (GATED / V_DIM));
    const bool is_last = is_last_block(n_done + n_k_heads + group, n_heads * gridDim.y);
    let_next_kernel_begin(); // not earlier, for its weights would be in the way of what blocks tell each other
    // What nobody waits for comes last.
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            if (holds(r, j))
                state[r * K_DIM + j * WARP] = s[r][j];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
        if (channel[i] >= 0 && (is_last_reader || i * THREADS + thread >= 2 * K_DIM)) // values are this block's alone
#pragma unroll
            for (int j = 0; j < BEFORE; j++)
                kept[j * n_channels + channel[i]] = past[i][j];
    if (!is_last || warp)
        return;
    const int at = group * GATED + lane * 8;
    float x[8] = {}, gates[8];
    if (at < n_cols)
        load_floats_past_cache(found + at, x);
    normalize_heads<V_DIM>(x, at, layer.norm_weight ? norm_weight : nullptr, layer.norm_eps);
    load_floats(&factors[lane * 8], gates);
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] *= gates[i];
    if (at < n_cols)
        store_floats(out + at, x);
    forms.store<FORMS>(x, 0, at, n_cols);
}
