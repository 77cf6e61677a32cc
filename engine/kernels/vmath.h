// exp, sigmoid, SiLU, GELU, softplus and a soft cap on sixteen floats: polynomials, the same bits everywhere.
#ifndef ENGINE_VMATH_H
#define ENGINE_VMATH_H

#include "simd.h"

// e^x for x clamped to [-87, 88]; a few units in the last place. Cephes' expf: n = round(x / ln 2), a polynomial on
// the rest, times 2^n. This is e^r - 1 of the rest r. The two constants of the second step are ln 2 in two parts, so
// that n * ln 2 is nearly exact.
static inline v16 v16_exp_of_rest(v16 x, v16 *n) {
    x = v16_min(v16_max(x, v16_set(-87.0f)), v16_set(88.0f));
    *n = v16_round(v16_mul(x, v16_set(0x1.715476p+0f)));
    v16 r = v16_fma(*n, v16_set(-0.693359375f), x);
    r = v16_fma(*n, v16_set(2.12194440e-4f), r);
    v16 p = v16_set(1.9875691500e-4f);
    p = v16_fma(p, r, v16_set(1.3981999507e-3f));
    p = v16_fma(p, r, v16_set(8.3334519073e-3f));
    p = v16_fma(p, r, v16_set(4.1665795894e-2f));
    p = v16_fma(p, r, v16_set(1.6666665459e-1f));
    p = v16_fma(p, r, v16_set(5.0000001201e-1f));
    return v16_fma(p, v16_mul(r, r), r);
}

static inline v16 v16_exp(v16 x) {
    v16 n;
    const v16 y = v16_add(v16_exp_of_rest(x, &n), v16_set(1.0f));
    return v16_scale_by_power(y, n);
}

// e^x - 1, to a few units in the last place of that, however near 0.
static inline v16 v16_expm1(v16 x) {
    v16 n;
    const v16 y = v16_exp_of_rest(x, &n), power = v16_scale_by_power(v16_set(1.0f), n);
    return v16_fma(power, y, v16_sub(power, v16_set(1.0f)));
}

static inline v16 v16_neg(v16 x) { return v16_sub(v16_set(-0.0f), x); }

static inline v16 v16_sigmoid(v16 x) {
    const v16 one = v16_set(1.0f);
    return v16_div(one, v16_add(one, v16_exp(v16_neg(x))));
}

static inline v16 v16_silu(v16 x) { return v16_div(x, v16_add(v16_set(1.0f), v16_exp(v16_neg(x)))); }

// GELU in its tanh form, x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, which is x * sigmoid(u) with twice what
// tanh takes as u.
static inline v16 v16_gelu(v16 x) {
    const v16 u = v16_mul(x, v16_fma(v16_set(0.0713548163f), v16_mul(x, x), v16_set(1.59576912f)));
    return v16_div(x, v16_add(v16_set(1.0f), v16_exp(v16_neg(u))));
}

// cap * tanh(x / cap), as cap * m / (m + 2) with m = e^(2 x / cap) - 1.
static inline v16 v16_soft_cap(v16 x, float cap) {
    const v16 m = v16_expm1(v16_mul(v16_set(2.0f / cap), x));
    return v16_mul(v16_set(cap), v16_div(m, v16_add(m, v16_set(2.0f))));
}

// ln(1 + e^x) = max(x, 0) + ln(1 + z) with z = e^-|x|, and ln(1 + z) = 2 artanh(s) with s = z / (z + 2), at most a
// third.
static inline v16 v16_softplus(v16 x) {
    const v16 z = v16_exp(v16_neg(v16_max(x, v16_neg(x)))), s = v16_div(z, v16_add(z, v16_set(2.0f)));
    const v16 squared = v16_mul(s, s);
    v16 p = v16_set(1.0f / 15);
    for (int n = 13; n > 0; n -= 2)
        p = v16_fma(p, squared, v16_set(1.0f / (float)n));
    return v16_fma(v16_add(s, s), p, v16_max(x, v16_set(0.0f)));
}

static inline v16 v16_relu(v16 x) { return v16_max(x, v16_set(0.0f)); }

// x, but no farther from 0 than `limit`.
static inline v16 v16_within(v16 x, float limit) { return v16_max(v16_min(x, v16_set(limit)), v16_set(-limit)); }

// SiTU: limit * tanh(gate / limit) * sigmoid(gate) * up, with up brought to within its own limit in the same way if
// that is above 0.
static inline v16 v16_situ(v16 gate, v16 up, float limit, float up_limit) {
    const v16 factor = v16_mul(v16_soft_cap(gate, limit), v16_sigmoid(gate));
    return v16_mul(factor, up_limit > 0.0f ? v16_soft_cap(up, up_limit) : up);
}

// The clamped swish of gpt-oss: g * sigmoid(1.702 g) * (u + 1), with the gate g up to 7 and u within 7 of 0.
static inline v16 v16_clamped_swish(v16 gate, v16 up) {
    const v16 g = v16_min(gate, v16_set(7.0f)), u = v16_within(up, 7.0f);
    return v16_mul(v16_mul(g, v16_sigmoid(v16_mul(v16_set(1.702f), g))), v16_add(u, v16_set(1.0f)));
}

static inline float first_lane(v16 x) {
    float t[16];
    v16_store(t, x);
    return t[0];
}

static inline float exp_one(float x) { return first_lane(v16_exp(v16_set(x))); }
static inline float sigmoid_one(float x) { return first_lane(v16_sigmoid(v16_set(x))); }

// The sum of n products, in the order of the canonical arithmetic for float formats: sixteen chains, then a tree.
static inline float dot_f32(const float *a, const float *b, int n) {
    v16 sum = v16_set(0.0f);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        sum = v16_fma(v16_load(a + i), v16_load(b + i), sum);
    if (i < n)
        sum = v16_fma(v16_load_first(a + i, n - i), v16_load_first(b + i, n - i), sum);
    return v16_sum(sum);
}

#endif
