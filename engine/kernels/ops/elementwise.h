// Operations that treat every row, or every column, alone.
#ifndef ENGINE_OPS_ELEMENTWISE_H
#define ENGINE_OPS_ELEMENTWISE_H

#include "../ops.h"
#include "../vmath.h"

static inline float *row_of(matrix m, int row) { return m.at + row * m.stride; }

// Runs `body` for every v16 of columns [first, end), then `tail` for what is left.
#define FOR_COLUMNS(c, first, end, body, tail)                                                                         \
    do {                                                                                                               \
        int c = (first);                                                                                               \
        for (; c + 16 <= (end); c += 16)                                                                               \
            body;                                                                                                      \
        if (c < (end)) {                                                                                               \
            const int n_left = (end) - c;                                                                              \
            tail;                                                                                                      \
        }                                                                                                              \
    } while (0)

static void op_embed(const op_args *args, const step_view *step, tile t) {
    const embed_args *a = &args->embed;
    for (int row = t.row; row < t.row_end; row++) {
        const int32_t *ids = a->ids ? a->ids + row * a->ids_stride : &step->token_ids[row];
        float *out = row_of(a->out, row);
        for (int col = t.col; col < t.col_end; col += a->n_cols)
            a->dequantize_row(a->table + ids[col / a->n_cols] * a->row_bytes, out + col, a->n_cols);
        if (a->scale != 1.0f)
            for (int c = t.col; c < t.col_end; c++)
                out[c] *= a->scale;
    }
}

static void op_quantize(const op_args *args, const step_view *step, tile t) {
    const quantize_args *a = &args->quantize;
    (void)step;
    for (int row = t.row; row < t.row_end; row++)
        a->quantize(row_of(a->x, row), a->out + row * a->out_row_bytes, a->n_cols, t.col, t.col_end);
}

static void op_add(const op_args *args, const step_view *step, tile t) {
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *a = row_of(args->add.a, row), *b = row_of(args->add.b, row);
        float *out = row_of(args->add.out, row);
        FOR_COLUMNS(
            c, t.col, t.col_end, v16_store(out + c, v16_add(v16_load(a + c), v16_load(b + c))),
            v16_store_first(out + c, v16_add(v16_load_first(a + c, n_left), v16_load_first(b + c, n_left)), n_left));
    }
}

static inline v16 gate_of(v16 gate, int kind) {
    switch (kind) {
    case GATE_SILU:
        return v16_silu(gate);
    case GATE_SOFTPLUS:
        return v16_softplus(gate);
    case GATE_RELU:
        return v16_relu(gate);
    case GATE_PRODUCT:
        return gate;
    case GATE_GELU:
        return v16_gelu(gate);
    default:
        return v16_sigmoid(gate);
    }
}

static inline v16 gated(const gate_args *a, v16 x, v16 gate) {
    if (a->kind == GATE_CLAMPED_SWISH)
        return v16_clamped_swish(gate, x);
    if (a->kind == GATE_SITU)
        return v16_situ(gate, x, a->limit, a->own_limit);
    if (a->kind == GATE_CLAMPED_SILU)
        return v16_mul(v16_silu(v16_min(gate, v16_set(a->limit))), v16_within(x, a->limit));
    const v16 factor = gate_of(gate, a->kind);
    return a->limit > 0.0f ? v16_mul(v16_min(factor, v16_set(a->limit)), v16_within(x, a->limit)) : v16_mul(factor, x);
}

// The gate of n columns from c on, at most 16.
static inline v16 load_gate(const float *gate, int c, int n, int span) {
    float values[16] = {0};
    if (span == 1)
        return n == 16 ? v16_load(gate + c) : v16_load_first(gate + c, n);
    for (int i = 0; i < n; i++)
        values[i] = gate[(c + i) / span];
    return v16_load(values);
}

// n columns from c on, at most 16, of x with its gate; of several streams their sum.
static inline __attribute__((always_inline)) v16 gated_columns(const gate_args *a, const float *x, const float *gate,
                                                               int c, int n) {
    v16 sum = gated(a, n == 16 ? v16_load(x + c) : v16_load_first(x + c, n), load_gate(gate, c, n, a->span));
    for (int i = 1, at = c + a->n_cols; i < a->n_streams; i++, at += a->n_cols)
        sum = v16_add(
            sum, gated(a, n == 16 ? v16_load(x + at) : v16_load_first(x + at, n), load_gate(gate, at, n, a->span)));
    return sum;
}

static void op_gate(const op_args *args, const step_view *step, tile t) {
    const gate_args *a = &args->gate;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *x = row_of(a->x, row), *gate = row_of(a->gate, row);
        float *out = row_of(a->out, row);
        FOR_COLUMNS(c, t.col, t.col_end, v16_store(out + c, gated_columns(a, x, gate, c, 16)),
                    v16_store_first(out + c, gated_columns(a, x, gate, c, n_left), n_left));
    }
}

static void op_scale(const op_args *args, const step_view *step, tile t) {
    const scale_args *a = &args->scale;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *x = row_of(a->x, row);
        const v16 factor = v16_set(a->by.at ? a->factor * *row_of(a->by, row) : a->factor);
        float *out = row_of(a->out, row);
        FOR_COLUMNS(c, t.col, t.col_end, v16_store(out + c, v16_mul(v16_load(x + c), factor)),
                    v16_store_first(out + c, v16_mul(v16_load_first(x + c, n_left), factor), n_left));
    }
}

static void op_soft_cap(const op_args *args, const step_view *step, tile t) {
    const soft_cap_args *a = &args->soft_cap;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *x = row_of(a->x, row);
        float *out = row_of(a->out, row);
        FOR_COLUMNS(c, t.col, t.col_end, v16_store(out + c, v16_soft_cap(v16_load(x + c), a->cap)),
                    v16_store_first(out + c, v16_soft_cap(v16_load_first(x + c, n_left), a->cap), n_left));
    }
}

static void op_clamp(const op_args *args, const step_view *step, tile t) {
    const clamp_args *a = &args->clamp;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *x = row_of(a->x, row);
        float *out = row_of(a->out, row);
        FOR_COLUMNS(c, t.col, t.col_end, v16_store(out + c, v16_within(v16_load(x + c), a->limit)),
                    v16_store_first(out + c, v16_within(v16_load_first(x + c, n_left), a->limit), n_left));
    }
}

static void op_scale_by_position(const op_args *args, const step_view *step, tile t) {
    const scale_by_position_args *a = &args->scale_by_position;
    for (int row = t.row; row < t.row_end; row++) {
        const int periods = (step->positions[row] + a->offset) / a->period;
        const float factor = (float)(1.0 + (double)a->slope * log1p((double)periods));
        for (int c = t.col; c < t.col_end; c++)
            row_of(a->x, row)[c] *= factor;
    }
}

// Columns are those of `first`.
static void op_split_heads(const op_args *args, const step_view *step, tile t) {
    const heads_args *a = &args->heads;
    (void)step;
    for (int row = t.row; row < t.row_end; row++)
        for (int head = t.col / a->first_dim; head < t.col_end / a->first_dim; head++) {
            const float *joined = row_of(a->joined, row) + (int64_t)head * (a->first_dim + a->second_dim);
            memcpy(row_of(a->first, row) + head * a->first_dim, joined, (size_t)a->first_dim * sizeof(float));
            memcpy(row_of(a->second, row) + head * a->second_dim, joined + a->first_dim,
                   (size_t)a->second_dim * sizeof(float));
        }
}

// Columns are those of `joined`.
static void op_join_heads(const op_args *args, const step_view *step, tile t) {
    const heads_args *a = &args->heads;
    const int dim = a->first_dim + a->second_dim;
    (void)step;
    for (int row = t.row; row < t.row_end; row++)
        for (int head = t.col / dim; head < t.col_end / dim; head++) {
            float *joined = row_of(a->joined, row) + head * dim;
            memcpy(joined, row_of(a->first, row) + head * a->first_dim, (size_t)a->first_dim * sizeof(float));
            memcpy(joined + a->first_dim, row_of(a->second, row) + head * a->second_dim,
                   (size_t)a->second_dim * sizeof(float));
        }
}

static void op_select_outputs(const op_args *args, const step_view *step, tile t) {
    const select_outputs_args *a = &args->select_outputs;
    for (int row = t.row; row < t.row_end; row++)
        memcpy(row_of(a->out, row), row_of(a->x, step->output_rows[row]), (size_t)a->n_cols * sizeof(float));
}

// out = x less its mean, for n values; in place allowed.
static inline void center(const float *x, float *out, int n) {
    v16 sum = v16_set(0.0f);
    FOR_COLUMNS(c, 0, n, sum = v16_add(sum, v16_load(x + c)), sum = v16_add(sum, v16_load_first(x + c, n_left)));
    const v16 minus_mean = v16_set(-(v16_sum(sum) / (float)n));
    FOR_COLUMNS(c, 0, n, v16_store(out + c, v16_add(v16_load(x + c), minus_mean)),
                v16_store_first(out + c, v16_add(v16_load_first(x + c, n_left), minus_mean), n_left));
}

// Groups of columns (a head, or the whole row) are normalised one by one.
static void op_rms_norm(const op_args *args, const step_view *step, tile t) {
    const rms_norm_args *a = &args->rms_norm;
    const int n = a->group_size;
    (void)step;
    for (int row = t.row; row < t.row_end; row++)
        for (int group = t.col; group < t.col_end; group += n) {
            const float *x = row_of(a->x, row) + group, *weight = a->weight + group / n * a->weight_step;
            float *out = row_of(a->out, row) + group;
            if (a->centers) {
                center(x, out, n);
                x = out;
            }
            const float mean = dot_f32(x, x, n) / (float)n;
            const v16 factor = v16_set(1.0f / sqrtf(mean + a->eps));
            FOR_COLUMNS(c, 0, n, v16_store(out + c, v16_mul(v16_mul(v16_load(x + c), factor), v16_load(weight + c))),
                        v16_store_first(
                            out + c,
                            v16_mul(v16_mul(v16_load_first(x + c, n_left), factor), v16_load_first(weight + c, n_left)),
                            n_left));
            if (a->bias) {
                const float *bias = a->bias + group / n * a->weight_step;
                FOR_COLUMNS(c, 0, n, v16_store(out + c, v16_add(v16_load(out + c), v16_load(bias + c))),
                            v16_store_first(out + c,
                                            v16_add(v16_load_first(out + c, n_left), v16_load_first(bias + c, n_left)),
                                            n_left));
            }
        }
}

// Ranks one after another from rank 0, then the shared expert, then the residual stream: one stated order.
static inline __attribute__((always_inline)) v16 combined(const combine_args *a, const float *expert_out,
                                                          const float *weights, const float *shared, v16 shared_weight,
                                                          const float *residual, int c, int n) {
    v16 sum = v16_set(0.0f);
    for (int rank = 0; rank < a->n_experts_used; rank++)
        sum = v16_fma(v16_set(weights ? weights[rank] : 1.0f),
                      v16_load_first(expert_out + (int64_t)rank * a->n_cols + c, n), sum);
    if (shared) {
        const v16 value = v16_load_first(shared + c, n);
        sum = a->shared_gate.at ? v16_fma(shared_weight, value, sum) : v16_add(sum, value);
    }
    return v16_add(residual ? v16_load_first(residual + c, n) : v16_set(0.0f), v16_mul(v16_set(a->scale), sum));
}

static void op_combine(const op_args *args, const step_view *step, tile t) {
    const combine_args *a = &args->combine;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const float *expert_out = row_of(a->expert_out, row);
        const float *residual = a->residual.at ? row_of(a->residual, row) : NULL;
        const float *weights = a->weights ? a->weights + (int64_t)row * a->n_experts_used : NULL;
        const float *shared = a->shared.at ? row_of(a->shared, row) : NULL;
        const v16 shared_weight = v16_set(a->shared_gate.at ? sigmoid_one(*row_of(a->shared_gate, row)) : 1.0f);
        float *out = row_of(a->out, row);
        FOR_COLUMNS(c, t.col, t.col_end,
                    v16_store(out + c, combined(a, expert_out, weights, shared, shared_weight, residual, c, 16)),
                    v16_store_first(
                        out + c, combined(a, expert_out, weights, shared, shared_weight, residual, c, n_left), n_left));
    }
}

#endif
