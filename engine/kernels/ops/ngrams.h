// Embeddings of n-grams: rows of a table that hashes of the last tokens choose (`HashTokens` in devices/graph.py), and
// the gate of what is made of them (`GateByAgreement`).
#ifndef ENGINE_OPS_NGRAMS_H
#define ENGINE_OPS_NGRAMS_H

#include "../ops.h"
#include "../vmath.h"
#include "elementwise.h"

// ids[i] of the token i before the one in `row`; `last`: what the sequence's state holds.
static inline void last_ids(const hash_tokens_args *a, const step_view *step, const token_run *run, int row,
                            const int32_t *last, int32_t *ids) {
    ids[0] = step->token_ids[row];
    bool has_ended = false;
    for (int i = 1; i < a->n_hashed; i++) {
        const int position = step->positions[row] - i;
        int32_t id = a->end_id;
        if (!has_ended && position >= 0)
            id = row - i >= run->first ? step->token_ids[row - i] : last[position % (a->n_hashed - 1)];
        has_ended = id == a->end_id; // what lies before is not looked at any more
        ids[i] = id;
    }
}

// The state is read by all heads and written once: a tile is a whole step.
static void op_hash_tokens(const op_args *args, const step_view *step, tile t) {
    const hash_tokens_args *a = &args->hash_tokens;
    const int n_before = a->n_hashed - 1, n_heads = a->n_heads / n_before; // heads of an n
    (void)t;
    for (int i = 0; i < step->n_runs; i++) {
        const token_run *run = &step->runs[i];
        int32_t *last = a->state + run->slot * (int64_t)n_before;
        for (int row = run->first; row < run->end; row++) {
            int32_t ids[MAX_HASHED], *out = a->out + row * a->out_stride;
            last_ids(a, step, run, row, last, ids);
            uint64_t mixed = (uint64_t)ids[0] * a->multipliers[0];
            for (int n = 1; n <= n_before; n++) {
                mixed ^= (uint64_t)ids[n] * a->multipliers[n];
                for (int head = (n - 1) * n_heads; head < n * n_heads; head++)
                    out[head] = (int32_t)(mixed % a->sizes[head] + a->offsets[head]);
            }
        }
        for (int row = run->end - n_before > run->first ? run->end - n_before : run->first; row < run->end; row++)
            last[step->positions[row] % n_before] = step->token_ids[row];
        if (run->keeps)
            memcpy(a->kept, last, (size_t)n_before * sizeof(int32_t));
    }
}

// Columns of a tile are those of whole streams.
static void op_gate_by_agreement(const op_args *args, const step_view *step, tile t) {
    const gate_by_agreement_args *a = &args->gate_by_agreement;
    const int n = a->n_cols;
    (void)step;
    for (int row = t.row; row < t.row_end; row++)
        for (int col = t.col; col < t.col_end; col += n) {
            const float *x = row_of(a->x, row);
            float *out = row_of(a->out, row) + col;
            const float agreement = dot_f32(row_of(a->a, row) + col, row_of(a->b, row) + col, n) / sqrtf((float)n);
            const float root = sqrtf(fabsf(agreement) > a->floor ? fabsf(agreement) : a->floor);
            const float sign = agreement > 0.0f ? 1.0f : agreement < 0.0f ? -1.0f : 0.0f;
            const v16 gate = v16_sigmoid(v16_set(sign * root));
            FOR_COLUMNS(c, 0, n, v16_store(out + c, v16_mul(v16_load(x + c), gate)),
                        v16_store_first(out + c, v16_mul(v16_load_first(x + c, n_left), gate), n_left));
        }
}

#endif
