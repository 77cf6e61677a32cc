// The gated delta rule, token after token. For each value head, with q and k of its key head L2-normalised and q divided
// by sqrt(K_DIM):
//
//     S = exp(a softplus(alpha + dt_bias)) S;  S += (sigmoid(beta) (v - S k)) k^T;  out = S q
//
// Value head h has key head h / (n_v_heads / n_k_heads) if `is_grouped`, else h % n_k_heads. state
// [n_slots, n_v_heads, V_DIM, K_DIM]. Tokens of one sequence stand together and in order; one at position 0 starts its
// sequence with a zero state. The state of a sequence is read once and written once for all its tokens in the step.
//
// Compiled for K_DIM (up to 256) and V_DIM. Rows of S do not know each other. Grid: (n_v_heads, ceil(V_DIM / 8)); a block
// is 8 warps, a warp has one row of S in its registers.
#include "common.cuh"

// log(1 + exp(x)) without overflow.
DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

KERNEL(256)
delta_net(const float *q, const float *k, const float *v, int64_t qkv_stride, const float *beta, int64_t beta_stride,
          const float *alpha, int64_t alpha_stride, const float *a, const float *dt_bias, float *state, float *out,
          int64_t out_stride, int n_k_heads, int is_grouped, float eps, const int *positions, const int *slots,
          const int *n_tokens) {
    begin_kernel();
    constexpr int PER_LANE = (K_DIM + WARP - 1) / WARP;
    const int head = blockIdx.x, n_v_heads = gridDim.x, n = *n_tokens, lane = threadIdx.x % WARP;
    const int row = blockIdx.y * 8 + threadIdx.x / WARP;
    if (row >= V_DIM)
        return;
    const int key_head = is_grouped ? head / (n_v_heads / n_k_heads) : head % n_k_heads;
    float s[PER_LANE];
    for (int t = 0; t < n; t++) {
        float *kept = state + (((int64_t)slots[t] * n_v_heads + head) * V_DIM + row) * K_DIM;
        float query[PER_LANE], key[PER_LANE], query_squares = 0.0f, key_squares = 0.0f;
        const bool is_first = t == 0 || slots[t] != slots[t - 1] || positions[t] == 0;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            const int i = j * WARP + lane;
            const bool exists = i < K_DIM;
            if (is_first)
                s[j] = exists && positions[t] != 0 ? kept[i] : 0.0f;
            query[j] = exists ? q[t * qkv_stride + key_head * K_DIM + i] : 0.0f;
            key[j] = exists ? k[t * qkv_stride + key_head * K_DIM + i] : 0.0f;
            query_squares = __fmaf_rn(query[j], query[j], query_squares);
            key_squares = __fmaf_rn(key[j], key[j], key_squares);
        }
        const float query_factor = __fdiv_rn(1.0f, __fsqrt_rn((warp_sum(query_squares) + eps) * (float)K_DIM));
        const float key_factor = __fdiv_rn(1.0f, __fsqrt_rn(warp_sum(key_squares) + eps));
        const float decay = expf(a[head] * softplus(alpha[t * alpha_stride + head] + dt_bias[head]));
        float recalled = 0.0f;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            key[j] *= key_factor;
            s[j] *= decay;
            recalled = __fmaf_rn(s[j], key[j], recalled);
        }
        const float error = v[t * qkv_stride + head * V_DIM + row] - warp_sum(recalled);
        const float step = sigmoid(beta[t * beta_stride + head]) * error;
        float result = 0.0f;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            s[j] = __fmaf_rn(step, key[j], s[j]);
            result = __fmaf_rn(s[j], query[j], result);
        }
        result = warp_sum(result) * query_factor;
        if (lane == 0)
            out[t * out_stride + head * V_DIM + row] = result;
        if (t + 1 == n || slots[t + 1] != slots[t])
#pragma unroll
            for (int j = 0; j < PER_LANE; j++)
                if (j * WARP + lane < K_DIM)
                    kept[j * WARP + lane] = s[j];
    }
}
