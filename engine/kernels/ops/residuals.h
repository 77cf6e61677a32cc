// Attention residuals: a row is a mean of others, weighted by a softmax over what each of them scores.
#ifndef ENGINE_OPS_RESIDUALS_H
#define ENGINE_OPS_RESIDUALS_H

#include "../ops.h"
#include "../vmath.h"
#include "elementwise.h"
#include "router.h"

static inline v16 mixed(const float *const *x, const float *weights, int n_residuals, int c, int n) {
    v16 sum = v16_set(0.0f);
    for (int i = 0; i < n_residuals; i++)
        sum = v16_fma(v16_set(weights[i]), v16_load_first(x[i] + c, n), sum);
    return sum;
}

// A tile has whole rows.
static void op_mix_residuals(const op_args *args, const step_view *step, tile t) {
    const mix_residuals_args *a = &args->mix_residuals;
    const int n = a->n_residuals, n_cols = a->n_cols;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *x[MAX_RESIDUALS];
        float weights[MAX_RESIDUALS];
        float *out = row_of(a->out, row);
        for (int i = 0; i < n; i++) {
            x[i] = row_of(a->residuals[i], row);
            const float mean = dot_f32(x[i], x[i], n_cols) / (float)n_cols;
            weights[i] = dot_f32(a->scorer, x[i], n_cols) / sqrtf(mean + a->eps);
        }
        softmax(weights, n);
        FOR_COLUMNS(c, 0, n_cols, v16_store(out + c, mixed(x, weights, n, c, 16)),
                    v16_store_first(out + c, mixed(x, weights, n, c, n_left), n_left));
    }
}

#endif
