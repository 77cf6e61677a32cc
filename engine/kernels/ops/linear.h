// Products with weight matrices: several matrices on the same activations are one set of tasks.
#ifndef ENGINE_OPS_LINEAR_H
#define ENGINE_OPS_LINEAR_H

#include "../ops.h"
#include "../simd.h"

// Rows of one task: small enough that all threads end at about the same time, large enough to stream, and whole tiles
// (`tile.h`) where there are many tokens.
static inline int rows_of_task(int64_t n_rows, int n_tokens, int n_threads, int most) {
    enum { FEW = 8, ROWS_FOR_FEW = 8, ROWS_FOR_MANY = 32, TASKS_PER_THREAD = 8 };
    const int multiple = n_tokens <= FEW ? ROWS_FOR_FEW : ROWS_FOR_MANY;
    const int64_t wanted = n_rows / ((int64_t)n_threads * TASKS_PER_THREAD);
    const int64_t rows = (wanted + multiple - 1) / multiple * multiple;
    return rows < multiple ? multiple : rows > most ? most : (int)rows;
}

static inline int tasks_of(int n_rows, int rows_per_task) { return (n_rows + rows_per_task - 1) / rows_per_task; }

static inline int linear_tokens(const linear_args *a, const step_view *step) {
    return a->rows == ROWS_TOKENS ? step->n_tokens : step->n_outputs;
}

// Long tasks, for what a call prepares for its rows, unless these must stay in the cache for another call.
static inline int linear_rows_per_task(const linear_args *a, const worker *w) {
    const int most = linear_tokens(a, w->step) <= TOKENS_PER_CALL ? LONE_CALL_ROWS : ROWS_PER_TASK;
    int64_t n_rows = 0;
    for (int i = 0; i < a->n_weights; i++)
        n_rows += a->weights[i].n_rows;
    return rows_of_task(n_rows, linear_tokens(a, w->step), w->n_threads, most);
}

static int linear_begin(const op_args *args, const worker *w) {
    const linear_args *a = &args->linear;
    if (linear_tokens(a, w->step) == 0)
        return 0;
    int n_tasks = 0;
    for (int i = 0; i < a->n_weights; i++)
        n_tasks += tasks_of(a->weights[i].n_rows, linear_rows_per_task(a, w));
    return n_tasks;
}

static void linear_run(const op_args *args, const worker *w, int task) {
    const linear_args *a = &args->linear;
    const int rows_per_task = linear_rows_per_task(a, w), n_tokens = linear_tokens(a, w->step);
    const linear_weight *weight = a->weights;
    for (; task >= tasks_of(weight->n_rows, rows_per_task); weight++)
        task -= tasks_of(weight->n_rows, rows_per_task);
    const int first = task * rows_per_task;
    const int n_rows = weight->n_rows - first < rows_per_task ? weight->n_rows - first : rows_per_task;

    for (int token = 0; token < n_tokens; token += TOKENS_PER_CALL) {
        const int n = n_tokens - token < TOKENS_PER_CALL ? n_tokens - token : TOKENS_PER_CALL;
        const void *x[TOKENS_PER_CALL];
        float *y[TOKENS_PER_CALL];
        for (int i = 0; i < n; i++) {
            x[i] = a->x + (token + i) * a->x_row_bytes;
            y[i] = weight->out.at + (token + i) * weight->out.stride + first;
        }
        weight->matmul(weight->weight + first * weight->row_bytes, weight->row_bytes, n_rows, a->n_cols, x, n, y, NULL);
        if (weight->scale)
            for (int i = 0; i < n; i++)
                for (int r = 0; r < n_rows; r++)
                    y[i][r] *= weight->scale[0];
        if (weight->bias)
            for (int i = 0; i < n; i++)
                for (int r = 0; r < n_rows; r++)
                    y[i][r] += weight->bias[first + r];
    }
}

#endif
