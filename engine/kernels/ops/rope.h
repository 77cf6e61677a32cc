// Rotary position embedding.
#ifndef ENGINE_OPS_ROPE_H
#define ENGINE_OPS_ROPE_H

#include "../ops.h"

// Angles are exact products in double, so that position 100,000 is as accurate as position 1.
static void op_rope_table(const op_args *args, const step_view *step, tile t) {
    const rope_table_args *a = &args->rope_table;
    for (int row = t.row; row < t.row_end; row++) {
        float *cosines = a->table + (int64_t)row * 2 * a->n_pairs, *sines = cosines + a->n_pairs;
        const int position = step->positions[row] / a->period * a->period;
        for (int i = 0; i < a->n_pairs; i++) {
            const double angle = (double)position * (double)a->frequencies[i];
            cosines[i] = (float)(cos(angle) * (double)a->magnitude);
            sines[i] = (float)(sin(angle) * (double)a->magnitude);
        }
    }
}

static void op_rope(const op_args *args, const step_view *step, tile t) {
    const rope_args *a = &args->rope;
    const int n = a->n_pairs, step_between = a->style == ROPE_NEOX ? 1 : 2, apart = a->style == ROPE_NEOX ? n : 1;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *cosines = a->table + (int64_t)row * 2 * n, *sines = cosines + n;
        for (int head = t.col; head < t.col_end; head += a->head_dim) {
            float *x = a->x.at + row * a->x.stride + head;
            for (int i = 0; i < n; i++) {
                float *first = x + i * step_between, *second = first + apart;
                const float p = *first, q = *second;
                *first = fmaf(p, cosines[i], -(q * sines[i]));
                *second = fmaf(p, sines[i], q * cosines[i]);
            }
        }
    }
}

#endif
