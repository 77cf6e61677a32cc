// Rows that the tokens of a period share (`Compress` in devices/graph.py): for each channel a sum of values, weighted
// by the softmax of scores, which grows from token to token. Tokens pass in order, channels do not know each other, so
// columns may be cut in any way.
//
// A part of the state is what a sum holds so far: its largest score m, the sum l of exp(score - m), and the sum o of
// exp(score - m) * value. Where rows are made of two periods' tokens there are two: the one of this period's row, which
// goes on with second halves, and that of the next one's, which begins with first halves.
#ifndef ENGINE_OPS_COMPRESS_H
#define ENGINE_OPS_COMPRESS_H

#include "../ops.h"
#include "../vmath.h"

typedef struct {
    v16 m, l, o;
} weighted_sum;

static inline weighted_sum first_of_sum(v16 score, v16 value) { return (weighted_sum){score, v16_set(1.0f), value}; }

static inline weighted_sum add_to_sum(weighted_sum sum, v16 score, v16 value) {
    const v16 largest = v16_max(score, sum.m);
    const v16 keep = v16_exp(v16_sub(sum.m, largest)), take = v16_exp(v16_sub(score, largest));
    return (weighted_sum){largest, v16_fma(sum.l, keep, take), v16_fma(take, value, v16_mul(sum.o, keep))};
}

static inline weighted_sum load_sum(const float *state, int n_channels, int n) {
    return (weighted_sum){v16_load_first(state, n), v16_load_first(state + n_channels, n),
                          v16_load_first(state + 2 * (int64_t)n_channels, n)};
}

static inline void store_sum(float *state, int n_channels, int n, weighted_sum sum) {
    v16_store_first(state, sum.m, n);
    v16_store_first(state + n_channels, sum.l, n);
    v16_store_first(state + 2 * (int64_t)n_channels, sum.o, n);
}

// The scores of n (1..16) columns from `col` on of a token at a place of its period; 0 where there are none.
static inline v16 scores_at(const compress_args *a, int row, int place, int col, int n) {
    if (!a->scores.at)
        return v16_set(0.0f);
    const float *biases = a->biases + place * (int64_t)(a->n_parts * a->n_channels);
    return v16_add(v16_load_first(a->scores.at + row * a->scores.stride + col, n), v16_load_first(biases + col, n));
}

// n (1..16) channels from `col` of one run of tokens.
static inline __attribute__((always_inline)) void compress_channels(const compress_args *a, const step_view *step,
                                                                    const token_run *run, int col, int n) {
    const int n_channels = a->n_channels, width = a->n_parts * n_channels;
    const bool overlaps = a->n_parts == 2;
    const int own = overlaps ? n_channels + col : col; // of the half that this period's row is made of
    float *state = a->state + run->slot * 3 * (int64_t)width + col;
    weighted_sum sum = load_sum(state, n_channels, n), next = sum;
    if (overlaps)
        next = load_sum(state + 3 * (int64_t)n_channels, n_channels, n);
    for (int row = run->first; row < run->end; row++) {
        const int position = step->positions[row], place = position % a->period;
        const float *values = a->values.at + row * a->values.stride;
        const v16 score = scores_at(a, row, place, own, n);
        const v16 value = v16_load_first(values + own, n);
        if (place == 0 && overlaps && position > 0)
            sum = next;
        sum = place == 0 && !(overlaps && position > 0) ? first_of_sum(score, value) : add_to_sum(sum, score, value);
        if (overlaps) {
            const v16 next_score = scores_at(a, row, place, col, n);
            const v16 next_value = v16_load_first(values + col, n);
            next = place == 0 ? first_of_sum(next_score, next_value) : add_to_sum(next, next_score, next_value);
        }
        v16_store_first(a->out.at + row * a->out.stride + col, v16_div(sum.o, sum.l), n);
    }
    for (int copy = 0; copy <= run->keeps; copy++) {
        float *to = copy ? a->kept + col : state;
        store_sum(to, n_channels, n, sum);
        if (overlaps)
            store_sum(to + 3 * (int64_t)n_channels, n_channels, n, next);
    }
}

static void op_compress(const op_args *args, const step_view *step, tile t) {
    for (int i = 0; i < step->n_runs; i++) {
        int col = t.col;
        for (; col + 16 <= t.col_end; col += 16)
            compress_channels(&args->compress, step, &step->runs[i], col, 16);
        if (col < t.col_end)
            compress_channels(&args->compress, step, &step->runs[i], col, t.col_end - col);
    }
}

#endif
