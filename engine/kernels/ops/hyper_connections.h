// The small operations of hyper-connections. Streams are reduced by `op_combine`, as experts are.
#ifndef ENGINE_OPS_HYPER_CONNECTIONS_H
#define ENGINE_OPS_HYPER_CONNECTIONS_H

#include "../ops.h"
#include "../vmath.h"
#include "elementwise.h"

static void op_stream_weights(const op_args *args, const step_view *step, tile t) {
    const stream_weights_args *a = &args->stream_weights;
    const int n = a->n_streams, n_mixes = a->gates.at ? 2 * n : n;
    float scales[2 * MAX_STREAMS] = {0}, magnitudes[2 * MAX_STREAMS] = {0}, found[2 * MAX_STREAMS];
    (void)step;
    for (int i = 0; i < n_mixes; i++) {
        scales[i] = a->scale[i / n];
        magnitudes[i] = i < n ? 1.0f : a->magnitude;
    }
    const v16 scale = v16_load(scales), magnitude = v16_load(magnitudes), base = v16_load_first(a->base, n_mixes);
    for (int row = t.row; row < t.row_end; row++) {
        const v16 mixes = v16_load_first(row_of(a->mixes, row), n_mixes);
        v16_store(found, v16_fma(magnitude, v16_sigmoid(v16_fma(scale, mixes, base)), v16_set(a->offset)));
        memcpy(a->weights + (int64_t)row * n, found, (size_t)n * sizeof(float));
        if (a->gates.at)
            memcpy(row_of(a->gates, row), found + n, (size_t)n * sizeof(float));
    }
}

static void op_add_to_streams(const op_args *args, const step_view *step, tile t) {
    const add_to_streams_args *a = &args->add_to_streams;
    (void)step;
    for (int row = t.row; row < t.row_end; row++)
        for (int col = t.col, end; col < t.col_end; col = end) { // the part of one stream
            const int stream = col / a->n_cols, first = stream * a->n_cols;
            end = t.col_end < first + a->n_cols ? t.col_end : first + a->n_cols;
            const float *x = row_of(a->x, row), *added = row_of(a->added, row) - first;
            const v16 gate = v16_set(row_of(a->gates, row)[stream]);
            float *out = row_of(a->out, row);
            FOR_COLUMNS(c, col, end, v16_store(out + c, v16_fma(gate, v16_load(added + c), v16_load(x + c))),
                        v16_store_first(out + c,
                                        v16_fma(gate, v16_load_first(added + c, n_left), v16_load_first(x + c, n_left)),
                                        n_left));
        }
}

#endif
