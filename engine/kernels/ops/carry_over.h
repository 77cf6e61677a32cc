// Rows of the token before, of the step or of the sequence's state (`CarryOver` in devices/graph.py).
#ifndef ENGINE_OPS_CARRY_OVER_H
#define ENGINE_OPS_CARRY_OVER_H

#include "../ops.h"

#include <string.h>

static void op_carry_over(const op_args *args, const step_view *step, tile t) {
    const carry_over_args *a = &args->carry_over;
    const size_t n_bytes = (size_t)(t.col_end - t.col) * sizeof(float);
    for (int i = 0; i < step->n_runs; i++) {
        const token_run *run = &step->runs[i];
        float *state = a->state + (int64_t)run->slot * a->n_kept * a->n_channels + t.col;
        for (int row = run->first; a->out.at && row < run->end; row++) {
            const int before = step->positions[row] - 1;
            float *out = a->out.at + row * a->out.stride + t.col;
            if (before < 0)
                memset(out, 0, n_bytes);
            else if (a->x.at && row > run->first)
                memcpy(out, a->x.at + (row - 1) * a->x.stride + t.col, n_bytes);
            else
                memcpy(out, state + before % a->n_kept * (int64_t)a->n_channels, n_bytes);
        }
        const int first = run->end - a->n_kept > run->first ? run->end - a->n_kept : run->first;
        for (int row = first; a->x.at && row < run->end; row++)
            memcpy(state + step->positions[row] % a->n_kept * (int64_t)a->n_channels,
                   a->x.at + row * a->x.stride + t.col, n_bytes);
    }
}

#endif
