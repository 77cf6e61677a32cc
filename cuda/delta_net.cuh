// The gated delta rule. For each value head, with q and k of its key head L2-normalised and q divided by sqrt(K_DIM):
//
//     S = exp(a softplus(alpha + dt_bias)) S;  S += (sigmoid(beta) (v - S k)) k^T;  out = S q
//
// With a `decay_bound` below 0 the factor of S is exp(decay_bound sigmoid(|a| (alpha + dt_bias))) instead.
//
// Value head h has key head h / (n_v_heads / n_k_heads) if `is_grouped`, else h % n_k_heads. state
// [n_slots, n_v_heads, V_DIM, K_DIM]. Compiled for K_DIM (up to 256) and V_DIM, and for BY_CHANNEL: whether alpha, dt_bias and
// with them the factor of S have a value for each of K_DIM channels. Rows of S do not know each other; a warp holds whole
// rows, lane l the values l, l + 32, ...
#pragma once

#include "common.cuh"

constexpr int PER_LANE = (K_DIM + WARP - 1) / WARP; // values of a row

DEVICE int key_head_of(int head, int n_k_heads, int n_v_heads, int is_grouped) {
    return is_grouped ? head / (n_v_heads / n_k_heads) : head % n_k_heads;
}

// log(1 + exp(x)) without overflow, more exact than `softplus`: it decides how long the state remembers.
DEVICE float exact_softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

DEVICE float decay_of(float a, float alpha, float dt_bias, float decay_bound) {
    const float x = alpha + dt_bias;
    if (decay_bound < 0.0f)
        return expf(__fdiv_rn(decay_bound, 1.0f + expf(-fabsf(a) * x)));
    return expf(a * exact_softplus(x));
}

// What queries and keys are multiplied by, from the sum of their squares: queries are divided by the root of K_DIM, too.
DEVICE float unit_factor(float squares, float eps, float scale) { return __fdiv_rn(1.0f, __fsqrt_rn((squares + eps) * scale)); }
DEVICE float factor_of_query(float squares, float eps) { return unit_factor(squares, eps, (float)K_DIM); }
DEVICE float factor_of_key(float squares, float eps) { return unit_factor(squares, eps, 1.0f); }
