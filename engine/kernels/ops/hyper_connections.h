// The small operations of hyper-connections. Streams are reduced by `op_combine`, as experts are.
#ifndef ENGINE_OPS_HYPER_CONNECTIONS_H
#define ENGINE_OPS_HYPER_CONNECTIONS_H

#include "../ops.h"
#include "../vmath.h"
#include "elementwise.h"

// Divides every value of a matrix by the sum, plus `offset`, of those that stand `step` apart with it; sums stand
// `between` apart.
static inline void divide_by_sums(float *matrix, int n, int step, int between, float offset) {
    for (int i = 0; i < n; i++) {
        float sum = 0.0f;
        for (int j = 0; j < n; j++)
            sum += matrix[i * between + j * step];
        for (int j = 0; j < n; j++)
            matrix[i * between + j * step] /= sum + offset;
    }
}

// How much streams keep of each other, from n * n mixes (`ReduceStreams` in devices/graph.py).
static inline void stream_mixing(const stream_weights_args *a, const float *mixes, float *mixing) {
    const int n = a->n_streams;
    for (int i = 0; i < n; i++) {
        float *row = mixing + i * n, largest = -INFINITY, sum = 0.0f;
        for (int j = 0; j < n; j++) {
            row[j] = fmaf(a->scale[2], mixes[i * n + j], a->base[2 * n + i * n + j]);
            largest = row[j] > largest ? row[j] : largest;
        }
        for (int j = 0; j < n; j++)
            sum += row[j] = exp_one(row[j] - largest);
        for (int j = 0; j < n; j++)
            row[j] = row[j] / sum + a->offset;
    }
    for (int i = 0; i < 2 * a->n_normalizations - 1; i++)
        divide_by_sums(mixing, n, i % 2 ? 1 : n, i % 2 ? n : 1, a->offset);
}

static void op_stream_weights(const op_args *args, const step_view *step, tile t) {
    const stream_weights_args *a = &args->stream_weights;
    const int n = a->n_streams, n_mixes = a->gates.at ? 2 * n : n;
    float scales[2 * MAX_STREAMS] = {0}, magnitudes[2 * MAX_STREAMS] = {0}, offsets[2 * MAX_STREAMS] = {0};
    float found[2 * MAX_STREAMS];
    (void)step;
    for (int i = 0; i < n_mixes; i++) {
        scales[i] = a->scale[i / n];
        magnitudes[i] = i < n ? 1.0f : a->magnitude;
        offsets[i] = i < n || !a->mixing.at ? a->offset : 0.0f;
    }
    const v16 scale = v16_load(scales), magnitude = v16_load(magnitudes), base = v16_load_first(a->base, n_mixes);
    for (int row = t.row; row < t.row_end; row++) {
        const v16 mixes = v16_load_first(row_of(a->mixes, row), n_mixes);
        v16_store(found, v16_fma(magnitude, v16_sigmoid(v16_fma(scale, mixes, base)), v16_load(offsets)));
        memcpy(a->weights + (int64_t)row * n, found, (size_t)n * sizeof(float));
        if (a->gates.at)
            memcpy(row_of(a->gates, row), found + n, (size_t)n * sizeof(float));
        if (a->mixing.at)
            stream_mixing(a, row_of(a->mixes, row) + 2 * n, row_of(a->mixing, row));
    }
}

// n columns of a stream from c on, at most 16, times what the stream keeps; without mixing as they are.
static inline v16 load_mixed(const add_to_streams_args *a, int row, int stream, int c, int n) {
    const float *x = row_of(a->x, row) + c;
    if (!a->mixing.at)
        return n == 16 ? v16_load(x) : v16_load_first(x, n);
    const float *mixing = row_of(a->mixing, row) + stream;
    v16 sum = v16_set(0.0f);
    for (int i = 0; i < a->n_streams; i++) {
        const float *from = x + (i - stream) * a->n_cols;
        sum = v16_fma(v16_set(mixing[i * a->n_streams]), n == 16 ? v16_load(from) : v16_load_first(from, n), sum);
    }
    return sum;
}

static void op_add_to_streams(const op_args *args, const step_view *step, tile t) {
    const add_to_streams_args *a = &args->add_to_streams;
    (void)step;
    for (int row = t.row; row < t.row_end; row++)
        for (int col = t.col, end; col < t.col_end; col = end) { // the part of one stream
            const int stream = col / a->n_cols, first = stream * a->n_cols;
            end = t.col_end < first + a->n_cols ? t.col_end : first + a->n_cols;
            const float *added = row_of(a->added, row) - first;
            const v16 own = v16_set(row_of(a->gates, row)[stream]);
            const v16 gate = a->magnitude > 0.0f ? v16_mul(v16_set(a->magnitude), v16_sigmoid(own)) : own;
            float *out = row_of(a->out, row);
            FOR_COLUMNS(
                c, col, end, v16_store(out + c, v16_fma(gate, v16_load(added + c), load_mixed(a, row, stream, c, 16))),
                v16_store_first(out + c,
                                v16_fma(gate, v16_load_first(added + c, n_left), load_mixed(a, row, stream, c, n_left)),
                                n_left));
        }
}

#endif
