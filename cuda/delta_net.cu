// The gated delta rule (`delta_net.cuh`), token after token. Tokens of one sequence stand together and in order; one at
// position 0 starts its sequence with a zero state. The state of a sequence is read once and written once for all its tokens
// in the step.
//
// Without IS_DELTA it is a state-space model: S = exp(a dt) S + dt v k^T, out = S q + skip v, with q and k as they are and
// dt = softplus(alpha + dt_bias). Without alpha (null), dt_bias and skip it is lightning attention: S = a S + v k^T, out = S q.
//
// Grid: (n_v_heads, ceil(V_DIM / 8)); a block is 8 warps, a warp has one row of S in its registers. Only what needs S is done
// token after token: the block fetches some tokens ahead (cp.async), and its warps share what can be known of them
// beforehand.
#include "delta_net.cuh"

constexpr int ROWS = 8;                                       // of S, one for each warp
constexpr int AT_ONCE = 1024 / K_DIM < 8 ? 1024 / K_DIM : 8; // tokens that are prepared together

struct Token {
    float query_factor, decay, step; // decay: if the head has one; step: sigmoid(beta), or dt
    int begins, ends, slot;          // whether S is to be read (2), zero (1) or kept on (0), and written
};

struct Tokens {
    float queries[AT_ONCE][K_DIM], keys[AT_ONCE][K_DIM], values[AT_ONCE][ROWS];
    float decays[BY_CHANNEL ? AT_ONCE : 1][BY_CHANNEL ? K_DIM : 1]; // fetched as alpha
};

KERNEL(ROWS *WARP)
delta_net(const float *q, const float *k, const float *v, int64_t qkv_stride, const float *beta, int64_t beta_stride,
          const float *alpha, int64_t alpha_stride, const float *a, const float *dt_bias, const float *skip, float *state,
          float *out, int64_t out_stride, int n_k_heads, int is_grouped, float decay_bound, float eps,
          const int *positions, const int *slots, const int *n_tokens, Kept copy) {
    __shared__ Tokens fetched[2];
    __shared__ Token tokens[AT_ONCE];
    const int head = blockIdx.x, n_v_heads = gridDim.x, n = *n_tokens;
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int first_row = blockIdx.y * ROWS, row = first_row + warp;
    const int key_head = key_head_of(head, n_k_heads, n_v_heads, is_grouped), kept_after = copy.after();

    auto state_of = [&](int slot) { return state + (((int64_t)slot * n_v_heads + head) * V_DIM + row) * K_DIM; };
    auto fetch = [&](int first) {
        Tokens &to = fetched[first / AT_ONCE % 2];
        const int n_values = min(AT_ONCE, n - first) * K_DIM;
        for (int i = thread; i < n_values; i += ROWS * WARP) {
            const int64_t from = (first + i / K_DIM) * qkv_stride + key_head * K_DIM + i % K_DIM;
            cp_async4(&to.queries[i / K_DIM][i % K_DIM], q + from);
            cp_async4(&to.keys[i / K_DIM][i % K_DIM], k + from);
            if (BY_CHANNEL)
                cp_async4(&to.decays[i / K_DIM][i % K_DIM],
                          alpha + (first + i / K_DIM) * alpha_stride + head * K_DIM + i % K_DIM);
        }
        if (thread < AT_ONCE * ROWS) {
            const int t = first + thread / ROWS, own_row = thread % ROWS;
            if (t < n && first_row + own_row < V_DIM)
                cp_async4(&to.values[thread / ROWS][own_row], v + t * qkv_stride + head * V_DIM + first_row + own_row);
        }
        cp_async_commit();
    };
    // What does not depend on S. Keys are normalised where they lie; so are decays found.
    auto prepare = [&](Tokens &own, int i, int t) {
        float query_squares = 0.0f, key_squares = 0.0f;
        for (int j = lane; IS_DELTA && j < K_DIM; j += WARP) {
            query_squares = __fmaf_rn(own.queries[i][j], own.queries[i][j], query_squares);
            key_squares = __fmaf_rn(own.keys[i][j], own.keys[i][j], key_squares);
        }
        const float query_factor = IS_DELTA ? factor_of_query(warp_sum(query_squares), eps) : 1.0f;
        const float key_factor = IS_DELTA ? factor_of_key(warp_sum(key_squares), eps) : 1.0f;
        for (int j = lane; IS_DELTA && j < K_DIM; j += WARP)
            own.keys[i][j] *= key_factor;
        if (lane)
            return;
        const int slot = slots[t], begins = positions[t] == 0 ? 1 : t == 0 || slots[t - 1] != slot ? 2 : 0;
        float decay = a[head], step = 1.0f;
        if (alpha) {
            const float own_alpha = alpha[t * alpha_stride + head];
            decay = BY_CHANNEL ? 0.0f : decay_of(decay, own_alpha, dt_bias[head], decay_bound);
            step = IS_DELTA ? sigmoid(beta[t * beta_stride + head]) : exact_softplus(own_alpha + dt_bias[head]);
        }
        tokens[i] = {query_factor, decay, step, begins, t + 1 == n || slots[t + 1] != slot, slot};
    };

    // The first token's state is older than this step: it comes while the kernel before still computes.
    float s[PER_LANE];
    const bool goes_on = row < V_DIM && positions[0] != 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        s[j] = goes_on && j * WARP + lane < K_DIM ? state_of(slots[0])[j * WARP + lane] : 0.0f;
    begin_kernel();
    fetch(0);
    for (int first = 0; first < n; first += AT_ONCE) {
        const int n_now = min(AT_ONCE, n - first);
        Tokens &own = fetched[first / AT_ONCE % 2];
        __syncthreads(); // everybody is done with the tokens before
        if (first + AT_ONCE < n)
            fetch(first + AT_ONCE);
        else
            cp_async_commit(); // so that the count of groups stays in step
        cp_async_wait<1>();
        __syncthreads();
        for (int i = warp; i < n_now; i += ROWS)
            prepare(own, i, first + i);
        for (int i = thread; BY_CHANNEL && i < n_now * K_DIM; i += ROWS * WARP) {
            float &decay = own.decays[i / K_DIM][i % K_DIM];
            decay = decay_of(a[head], decay, dt_bias[head * K_DIM + i % K_DIM], decay_bound);
        }
        __syncthreads();
        if (row >= V_DIM)
            continue;
        float result = 0.0f; // of the token before, not yet summed
        for (int i = 0; i <= n_now; i++) {
            const bool exists = i < n_now; // in the last round there is only the result before it
            const Token token = tokens[exists ? i : n_now - 1];
            float *kept = state_of(token.slot), key[PER_LANE], recalled = 0.0f;
            if (exists && token.begins && first + i)
#pragma unroll
                for (int j = 0; j < PER_LANE; j++)
                    s[j] = j * WARP + lane < K_DIM && token.begins == 2 ? kept[j * WARP + lane] : 0.0f;
            if (exists)
#pragma unroll
                for (int j = 0; j < PER_LANE; j++) {
                    key[j] = j * WARP + lane < K_DIM ? own.keys[i][j * WARP + lane] : 0.0f;
                    s[j] *= !BY_CHANNEL ? token.decay : j * WARP + lane < K_DIM ? own.decays[i][j * WARP + lane] : 0.0f;
                    recalled = __fmaf_rn(s[j], key[j], recalled);
                }
#pragma unroll
            for (int step = WARP / 2; step; step /= 2) { // two sums that do not wait for each other
                recalled += __shfl_xor_sync(ALL_LANES, recalled, step);
                result += __shfl_xor_sync(ALL_LANES, result, step);
            }
            if (i && lane == 0)
                out[(first + i - 1) * out_stride + head * V_DIM + row] =
                    IS_DELTA ? result * tokens[i - 1].query_factor
                    : skip   ? __fmaf_rn(skip[head], own.values[i - 1][warp], result)
                             : result;
            if (!exists)
                break;
            const float step = token.step * (IS_DELTA ? own.values[i][warp] - recalled : own.values[i][warp]);
            result = 0.0f;
#pragma unroll
            for (int j = 0; j < PER_LANE; j++) {
                s[j] = __fmaf_rn(step, key[j], s[j]);
                result = __fmaf_rn(s[j], j * WARP + lane < K_DIM ? own.queries[i][j * WARP + lane] : 0.0f, result);
            }
            auto store = [&](float *to) {
#pragma unroll
                for (int j = 0; j < PER_LANE; j++)
                    if (j * WARP + lane < K_DIM)
                        to[j * WARP + lane] = s[j];
            };
            if (token.ends)
                store(kept);
            if (first + i == kept_after)
                store(copy.to + ((int64_t)head * V_DIM + row) * K_DIM);
        }
    }
}
