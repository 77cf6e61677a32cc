// The two operations that carry state from token to token: they take all tokens of a step in order, cut by columns
// only.
#ifndef ENGINE_OPS_DELTA_NET_H
#define ENGINE_OPS_DELTA_NET_H

#include "../ops.h"
#include "../vmath.h"

static inline bool starts_afresh(const step_view *step, const token_run *run) {
    return step->positions[run->first] == 0;
}

// -- causal convolution ----------------------------------------------------------------------------------------------

// n (1..16) channels from `c` of one run of tokens. `window` holds the kernel_size - 1 inputs before the token at hand.
static inline void convolve(const causal_conv_args *a, const step_view *step, const token_run *run, int c, int n) {
    v16 window[MAX_CONV_KERNEL];
    const int n_before = a->kernel_size - 1;
    float *state = a->state + (int64_t)run->slot * n_before * a->n_channels + c;
    for (int j = 0; j < n_before; j++)
        window[j] = starts_afresh(step, run) ? v16_set(0.0f) : v16_load_first(state + (int64_t)j * a->n_channels, n);
    for (int row = run->first; row < run->end; row++) {
        const v16 x = v16_load_first(a->x.at + row * a->x.stride + c, n);
        v16 sum = v16_set(0.0f);
        for (int j = 0; j < n_before; j++)
            sum = v16_fma(window[j], v16_load_first(a->weight + (int64_t)j * a->n_channels + c, n), sum);
        sum = v16_fma(x, v16_load_first(a->weight + (int64_t)n_before * a->n_channels + c, n), sum);
        v16_store_first(a->out.at + row * a->out.stride + c, v16_silu(sum), n);
        for (int j = 0; j + 1 < n_before; j++)
            window[j] = window[j + 1];
        window[n_before - 1] = x;
    }
    for (int j = 0; j < n_before; j++)
        v16_store_first(state + (int64_t)j * a->n_channels, window[j], n);
}

static void op_causal_conv(const op_args *args, const step_view *step, tile t) {
    for (int i = 0; i < step->n_runs; i++)
        for (int c = t.col; c < t.col_end; c += 16)
            convolve(&args->causal_conv, step, &step->runs[i], c, t.col_end - c < 16 ? t.col_end - c : 16);
}

// -- gated delta rule ------------------------------------------------------------------------------------------------

// ln(1 + e^x) in double: it decides how long the state remembers.
static inline double softplus(double x) { return x > 30.0 ? x : log1p(exp(x)); }

// out = x * factor / sqrt(x . x + eps)
static inline void unit_vector(float *out, const float *x, int n, float eps, float factor) {
    const float scale = factor / sqrtf(dot_f32(x, x, n) + eps);
    for (int i = 0; i < n; i++)
        out[i] = x[i] * scale;
}

// n (1..16) value columns of one head's state: decay, then one rank-one update, then what q reads.
// Sums over k run from 0 upwards in each lane; four partial chains would hide latency but cost accuracy nothing either:
// the state of sixteen columns is small enough that two columns of registers keep the units busy.
static inline void delta_step(float *state, int64_t stride, const float *q, const float *k, int k_dim, const float *v,
                              float decay, float beta, float *out, int n) {
    const v16 keep = v16_set(decay);
    v16 read = v16_set(0.0f), result = v16_set(0.0f);
    for (int i = 0; i < k_dim; i++)
        read = v16_fma(v16_mul(v16_load_first(state + i * stride, n), keep), v16_set(k[i]), read);
    const v16 delta = v16_mul(v16_sub(v16_load_first(v, n), read), v16_set(beta));
    for (int i = 0; i < k_dim; i++) {
        float *s = state + i * stride;
        const v16 updated = v16_fma(v16_set(k[i]), delta, v16_mul(v16_load_first(s, n), keep));
        v16_store_first(s, updated, n);
        result = v16_fma(v16_set(q[i]), updated, result);
    }
    v16_store_first(out, result, n);
}

static void op_delta_net(const op_args *args, const step_view *step, tile t) {
    const delta_net_args *a = &args->delta_net;
    float q[MAX_HEAD_DIM], k[MAX_HEAD_DIM];
    const int group = a->n_v_heads / a->n_k_heads;
    const float q_scale = 1.0f / sqrtf((float)a->k_dim);
    for (int i = 0; i < step->n_runs; i++) {
        const token_run *run = &step->runs[i];
        for (int head = t.col / a->v_dim; head < t.col_end / a->v_dim; head++) {
            const int k_head = a->grouped ? head / group : head % a->n_k_heads;
            float *state = a->state + ((int64_t)run->slot * a->n_v_heads + head) * a->k_dim * a->v_dim;
            if (starts_afresh(step, run))
                memset(state, 0, (size_t)a->k_dim * a->v_dim * sizeof(float));
            for (int row = run->first; row < run->end; row++) {
                const int64_t at = row * a->qkv_stride;
                unit_vector(q, a->q + at + k_head * a->k_dim, a->k_dim, a->eps, q_scale);
                unit_vector(k, a->k + at + k_head * a->k_dim, a->k_dim, a->eps, 1.0f);
                const float beta = sigmoid_one(a->beta.at[row * a->beta.stride + head]);
                const double alpha = (double)(a->alpha.at[row * a->alpha.stride + head] + a->dt_bias[head]);
                const float decay = (float)exp((double)a->a[head] * softplus(alpha));
                const float *v = a->v + at + head * a->v_dim;
                float *out = a->out.at + row * a->out.stride + head * a->v_dim;
                int c = 0;
                for (; c + 16 <= a->v_dim; c += 16)
                    delta_step(state + c, a->v_dim, q, k, a->k_dim, v + c, decay, beta, out + c, 16);
                if (c < a->v_dim)
                    delta_step(state + c, a->v_dim, q, k, a->k_dim, v + c, decay, beta, out + c, a->v_dim - c);
            }
        }
    }
}

#endif
