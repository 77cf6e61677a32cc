// Convolution over time and the gated delta rule carry state from token to token: they take all tokens of a step in
// order, cut by columns only.
#ifndef ENGINE_OPS_DELTA_NET_H
#define ENGINE_OPS_DELTA_NET_H

#include "../ops.h"
#include "../vmath.h"

// -- causal convolution ----------------------------------------------------------------------------------------------

// n (1..16) channels from `c` of one run of tokens. `window` holds the inputs before the token at hand. The dilation is
// given, for it is 1 as a rule.
static inline __attribute__((always_inline)) void convolve(const causal_conv_args *a, const step_view *step,
                                                           const token_run *run, int dilation, int c, int n) {
    v16 window[MAX_CONVOLVED], weights[MAX_CONV_KERNEL];
    const v16 bias = a->bias ? v16_load_first(a->bias + c, n) : v16_set(0.0f);
    const int last = a->kernel_size - 1, n_before = last * dilation;
    float *state = a->state + (int64_t)run->slot * n_before * a->n_channels + c;
    for (int j = 0; j < n_before; j++)
        window[j] = starts_afresh(step, run) ? v16_set(0.0f) : v16_load_first(state + (int64_t)j * a->n_channels, n);
    for (int j = 0; j <= last; j++)
        weights[j] = v16_load_first(a->weight + (int64_t)j * a->n_channels + c, n);
    for (int row = run->first; row < run->end; row++) {
        const v16 x = v16_load_first(a->x.at + row * a->x.stride + c, n);
        v16 sum = v16_set(0.0f);
        for (int j = 0; j < last; j++)
            sum = v16_fma(window[j * dilation], weights[j], sum);
        sum = v16_add(v16_fma(x, weights[last], sum), bias);
        v16_store_first(a->out.at + row * a->out.stride + c, a->activates ? v16_silu(sum) : sum, n);
        for (int j = 0; j + 1 < n_before; j++)
            window[j] = window[j + 1];
        window[n_before - 1] = x;
    }
    for (int j = 0; j < n_before; j++) {
        v16_store_first(state + (int64_t)j * a->n_channels, window[j], n);
        if (run->keeps)
            v16_store_first(a->kept + (int64_t)j * a->n_channels + c, window[j], n);
    }
}

static inline __attribute__((always_inline)) void convolve_runs(const causal_conv_args *a, const step_view *step,
                                                                tile t, int dilation) {
    for (int i = 0; i < step->n_runs; i++) {
        int c = t.col;
        for (; c + 16 <= t.col_end; c += 16)
            convolve(a, step, &step->runs[i], dilation, c, 16);
        if (c < t.col_end)
            convolve(a, step, &step->runs[i], dilation, c, t.col_end - c);
    }
}

static void op_causal_conv(const op_args *args, const step_view *step, tile t) {
    const causal_conv_args *a = &args->causal_conv;
    if (a->dilation == 1)
        convolve_runs(a, step, t, 1);
    else
        convolve_runs(a, step, t, a->dilation);
}

// -- gated delta rule ------------------------------------------------------------------------------------------------
//
// With S the state [k_dim, v_dim] of a head:  r = S'k  and  p = S'q,  d = beta (v - decay r),
// S <- decay S + k d',  out = decay p + (k.q) d,  which is what q reads from the new S. Sums over k_dim run from 0 up
// in each column, so columns may be cut in any way. A block of columns stays in the first-level cache while some tokens
// pass, and one pass over it updates it for a token and takes the sums of the next.
//
// A state-space model is the same without what is recalled: d = dt v, with q and k as they are, and out + skip v.
// Lightning attention is that with d = v, nothing skipped, and the same decay for every token.
//
// Where each channel of the key has a decay of its own, rows of S have: r and p are then taken with k and q times the
// decays, which is the same, and no factor is left for them.

enum { DELTA_TOKENS = 8, DELTA_BLOCK = 32 };

// What the tokens at hand bring to one head.
typedef struct {
    float q[DELTA_TOKENS][MAX_HEAD_DIM], k[DELTA_TOKENS][MAX_HEAD_DIM];
    float kq[DELTA_TOKENS], beta[DELTA_TOKENS], decay[DELTA_TOKENS];
    // Where channels decay apart; q is then decayed, too, and decay is 1.
    float channel_decays[DELTA_TOKENS][MAX_HEAD_DIM], decayed_k[DELTA_TOKENS][MAX_HEAD_DIM];
    float skip;
    bool recalls; // whether it is a delta rule
    const float *v[DELTA_TOKENS];
    float *out[DELTA_TOKENS];
    int n_tokens;
} delta_inputs;

// ln(1 + e^x) in double: it decides how long the state remembers.
static inline double softplus(double x) { return x > 30.0 ? x : log1p(exp(x)); }

// out = x * factor / sqrt(x . x + eps)
static inline void unit_vector(float *out, const float *x, int n, float eps, float factor) {
    const float scale = factor / sqrtf(dot_f32(x, x, n) + eps);
    for (int i = 0; i < n; i++)
        out[i] = x[i] * scale;
}

// What a head's decays grow with; where they are bounded its sign says nothing.
static inline float rate_of(const delta_net_args *a, int head) {
    return a->decay_bound < 0.0f ? fabsf(a->a[head]) : a->a[head];
}

// The decays of a head's channels for one token, in float32, for there are many; q and k are multiplied by them.
static void decay_by_channel(const delta_net_args *a, int row, int head, delta_inputs *in, int t) {
    const int at = head * a->k_dim;
    const float *alpha = a->alpha.at + row * a->alpha.stride + at, *dt_bias = a->dt_bias + at;
    const float bound = a->decay_bound;
    const v16 rate = v16_set(rate_of(a, head));
    for (int i = 0; i < a->k_dim; i += 16) {
        const int n = a->k_dim - i < 16 ? a->k_dim - i : 16;
        const v16 x = v16_add(v16_load_first(alpha + i, n), v16_load_first(dt_bias + i, n));
        const v16 exponent =
            bound < 0.0f ? v16_mul(v16_set(bound), v16_sigmoid(v16_mul(rate, x))) : v16_mul(rate, v16_softplus(x));
        const v16 decay = v16_exp(exponent);
        v16_store_first(in->channel_decays[t] + i, decay, n);
        v16_store_first(in->decayed_k[t] + i, v16_mul(decay, v16_load_first(in->k[t] + i, n)), n);
        v16_store_first(in->q[t] + i, v16_mul(decay, v16_load_first(in->q[t] + i, n)), n);
    }
    in->decay[t] = 1.0f;
}

static void gather_delta_inputs(const delta_net_args *a, int first, int n, int head, delta_inputs *in) {
    const int k_head = a->grouped ? head / (a->n_v_heads / a->n_k_heads) : head % a->n_k_heads;
    in->n_tokens = n;
    in->recalls = a->beta.at != NULL;
    in->skip = a->skip ? a->skip[head] : 0.0f;
    for (int t = 0; t < n; t++) {
        const int row = first + t;
        const int64_t at = row * a->qkv_stride;
        const float *q = a->q + at + k_head * a->k_dim, *k = a->k + at + k_head * a->k_dim;
        double dt = 0.0;
        if (!a->alpha.at) {
            dt = 1.0;
            in->decay[t] = a->a[head];
        } else if (a->decay_dim == 1) {
            const double x = (double)(a->alpha.at[row * a->alpha.stride + head] + a->dt_bias[head]);
            const double bound = (double)a->decay_bound, rate = (double)rate_of(a, head);
            dt = softplus(x);
            in->decay[t] = (float)exp(bound < 0.0 ? bound / (1.0 + exp(-rate * x)) : rate * dt);
        }
        if (in->recalls) {
            unit_vector(in->q[t], q, a->k_dim, a->eps, 1.0f / sqrtf((float)a->k_dim));
            unit_vector(in->k[t], k, a->k_dim, a->eps, 1.0f);
            in->beta[t] = sigmoid_one(a->beta.at[row * a->beta.stride + head]);
        } else {
            memcpy(in->q[t], q, (size_t)a->k_dim * sizeof *q);
            memcpy(in->k[t], k, (size_t)a->k_dim * sizeof *k);
            in->beta[t] = (float)dt;
        }
        in->kq[t] = dot_f32(in->k[t], in->q[t], a->k_dim);
        if (a->decay_dim > 1)
            decay_by_channel(a, row, head, in, t);
        in->v[t] = a->v + at + head * a->v_dim;
        in->out[t] = a->out.at + row * a->out.stride + head * a->v_dim;
    }
}

// All tokens at hand through n_vectors times 16 columns of a state from `c`, of which the last n (1..16) are there.
static inline __attribute__((always_inline)) void delta_block(const delta_inputs *in, float *state, int64_t stride,
                                                              int k_dim, int c, int n_vectors, int n, bool by_channel) {
    const float (*recall)[MAX_HEAD_DIM] = by_channel ? in->decayed_k : in->k;
    v16 r[2], p[2], d[2];
#define COLUMNS(w) ((w) + 1 < n_vectors ? 16 : n)
    for (int w = 0; w < n_vectors; w++)
        r[w] = p[w] = v16_set(0.0f);
    for (int i = 0; i < k_dim; i++)
        for (int w = 0; w < n_vectors; w++) {
            const v16 s = v16_load_first(state + i * stride + c + 16 * w, COLUMNS(w));
            r[w] = v16_fma(s, v16_set(recall[0][i]), r[w]);
            p[w] = v16_fma(s, v16_set(in->q[0][i]), p[w]);
        }
    for (int t = 0; t < in->n_tokens; t++) {
        const v16 keep = v16_set(in->decay[t]);
        const float *k = in->k[t], *decays = in->channel_decays[t];
        for (int w = 0; w < n_vectors; w++) {
            const v16 v = v16_load_first(in->v[t] + c + 16 * w, COLUMNS(w));
            d[w] = v16_mul(in->recalls ? v16_sub(v, v16_mul(keep, r[w])) : v, v16_set(in->beta[t]));
            const v16 out = v16_fma(v16_set(in->kq[t]), d[w], v16_mul(keep, p[w]));
            v16_store_first(in->out[t] + c + 16 * w, in->recalls ? out : v16_fma(v16_set(in->skip), v, out),
                            COLUMNS(w));
            r[w] = p[w] = v16_set(0.0f);
        }
        const bool is_last = t + 1 == in->n_tokens;
        const float *next_k = recall[is_last ? t : t + 1], *next_q = in->q[is_last ? t : t + 1];
        for (int i = 0; i < k_dim; i++)
            for (int w = 0; w < n_vectors; w++) {
                float *at = state + i * stride + c + 16 * w;
                const v16 kept = v16_mul(by_channel ? v16_set(decays[i]) : keep, v16_load_first(at, COLUMNS(w)));
                const v16 s = v16_fma(v16_set(k[i]), d[w], kept);
                v16_store_first(at, s, COLUMNS(w));
                r[w] = v16_fma(s, v16_set(next_k[i]), r[w]);
                p[w] = v16_fma(s, v16_set(next_q[i]), p[w]);
            }
    }
#undef COLUMNS
}

// All tokens at hand through the state of a head.
static inline __attribute__((always_inline)) void delta_head(const delta_inputs *in, float *state, int k_dim, int v_dim,
                                                             bool by_channel) {
    int c = 0;
    for (; c + DELTA_BLOCK <= v_dim; c += DELTA_BLOCK)
        delta_block(in, state, v_dim, k_dim, c, 2, 16, by_channel);
    for (; c + 16 <= v_dim; c += 16)
        delta_block(in, state, v_dim, k_dim, c, 1, 16, by_channel);
    if (c < v_dim)
        delta_block(in, state, v_dim, k_dim, c, 1, v_dim - c, by_channel);
}

static void op_delta_net(const op_args *args, const step_view *step, tile t) {
    const delta_net_args *a = &args->delta_net;
    const int64_t size = a->k_dim * (int64_t)a->v_dim; // of the state of a head
    delta_inputs in;
    for (int head = t.col / a->v_dim; head < t.col_end / a->v_dim; head++) {
        for (int i = 0; i < step->n_runs; i++) {
            const token_run *run = &step->runs[i];
            float *state = a->state + ((int64_t)run->slot * a->n_v_heads + head) * size;
            if (starts_afresh(step, run))
                memset(state, 0, (size_t)size * sizeof(float));
            for (int row = run->first; row < run->end; row += DELTA_TOKENS) {
                const int n = run->end - row < DELTA_TOKENS ? run->end - row : DELTA_TOKENS;
                gather_delta_inputs(a, row, n, head, &in);
                if (a->decay_dim > 1)
                    delta_head(&in, state, a->k_dim, a->v_dim, true);
                else
                    delta_head(&in, state, a->k_dim, a->v_dim, false);
            }
            if (run->keeps)
                memcpy(a->kept + head * size, state, (size_t)size * sizeof(float));
        }
    }
}

#endif
