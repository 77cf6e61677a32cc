// The selective scan of Mamba: a state of some values for each channel. Tokens of a step pass in order, channels do not
// know each other, and a sum over a state runs from its first value up, so columns may be cut in any way.
#ifndef ENGINE_OPS_SELECTIVE_SCAN_H
#define ENGINE_OPS_SELECTIVE_SCAN_H

#include "../ops.h"
#include "../vmath.h"

// n (1..16) channels from `col` of one run of tokens.
static inline __attribute__((always_inline)) void scan_channels(const selective_scan_args *args, const step_view *step,
                                                                const token_run *run, int col, int n) {
    const int n_channels = args->n_channels, size = args->state_size;
    v16 state[MAX_SCAN_STATE], rates[MAX_SCAN_STATE]; // together, for in memory rows of them are far apart
    const v16 skip = v16_load_first(args->skip + col, n);
    float *own = args->state + (int64_t)run->slot * size * n_channels + col;
    for (int i = 0; i < size; i++) {
        const int64_t at = (int64_t)i * n_channels;
        state[i] = starts_afresh(step, run) ? v16_set(0.0f) : v16_load_first(own + at, n);
        rates[i] = v16_load_first(args->a + at + col, n);
    }
    for (int row = run->first; row < run->end; row++) {
        const float *b = args->b.at + row * args->b.stride, *c = args->c.at + row * args->c.stride;
        const v16 x = v16_load_first(args->x.at + row * args->x.stride + col, n);
        const v16 dt = v16_softplus(v16_load_first(args->dt.at + row * args->dt.stride + col, n));
        const v16 input = v16_mul(dt, x);
        v16 sum = v16_set(0.0f);
        for (int i = 0; i < size; i++) {
            const v16 decay = v16_exp(v16_mul(dt, rates[i]));
            state[i] = v16_fma(input, v16_set(b[i]), v16_mul(decay, state[i]));
            sum = v16_fma(state[i], v16_set(c[i]), sum);
        }
        v16_store_first(args->out.at + row * args->out.stride + col, v16_fma(skip, x, sum), n);
    }
    for (int i = 0; i < size; i++) {
        v16_store_first(own + (int64_t)i * n_channels, state[i], n);
        if (run->keeps)
            v16_store_first(args->kept + (int64_t)i * n_channels + col, state[i], n);
    }
}

static void op_selective_scan(const op_args *args, const step_view *step, tile t) {
    for (int i = 0; i < step->n_runs; i++) {
        int col = t.col;
        for (; col + 16 <= t.col_end; col += 16)
            scan_channels(&args->selective_scan, step, &step->runs[i], col, 16);
        if (col < t.col_end)
            scan_channels(&args->selective_scan, step, &step->runs[i], col, t.col_end - col);
    }
}

#endif
