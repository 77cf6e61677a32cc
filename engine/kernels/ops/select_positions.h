// The choice of the positions that attention looks at: every position is scored with small queries and keys, and those
// of the highest scores are kept (`SelectPositions` in devices/graph.py).
//
// Of a few tokens the positions are cut into chunks, and whoever scores the last one of a token chooses; of many, a
// task is a token. A score is computed whole by one call either way, so neither changes a bit.
#ifndef ENGINE_OPS_SELECT_POSITIONS_H
#define ENGINE_OPS_SELECT_POSITIONS_H

#include "attention.h"

// scores[i] of sixteen positions gets those of n_q heads from `head` on, one head after the other.
static inline __attribute__((always_inline)) v16 add_head_scores(const select_positions_args *a, const float *q,
                                                                 const float *weights, int head, int n_q,
                                                                 const uint8_t *keys, int type, v16 sum) {
    float scores[ATTENTION_TILE * KV_LANES];
    score_group(q + head * a->cache.head_dim, n_q, keys, type, a->cache.head_dim, 1.0f, scores, KV_LANES);
    for (int i = 0; i < n_q; i++)
        sum = v16_fma(v16_set((weights ? weights[head + i] : 1.0f) * a->scale),
                      v16_max(v16_load(scores + i * KV_LANES), v16_set(0.0f)), sum);
    return sum;
}

static inline __attribute__((always_inline)) void
score_positions_of(const select_positions_args *a, int token, int slot, int first, int end, int type, float *scores) {
    const float *q = a->q.at + token * a->q.stride;
    const float *weights = a->weights.at ? a->weights.at + token * a->weights.stride : NULL;
    for (int position = first; position < end; position += KV_LANES) {
        const uint8_t *keys = kv_keys(&a->cache, slot, 0, position);
        v16 sum = v16_set(0.0f);
        int head = 0;
        for (; head + ATTENTION_TILE <= a->n_heads; head += ATTENTION_TILE)
            sum = add_head_scores(a, q, weights, head, ATTENTION_TILE, keys, type, sum);
        for (; head < a->n_heads; head++)
            sum = add_head_scores(a, q, weights, head, 1, keys, type, sum);
        v16_store(scores + position, sum);
    }
}

// Scores positions from `first`, a multiple of 16, up to `end`, and perhaps some behind that. Written out for every
// type of cache.
static void score_positions(const select_positions_args *a, int token, int slot, int first, int end, float *scores) {
    if (a->cache.type == KV_F32)
        score_positions_of(a, token, slot, first, end, KV_F32, scores);
    else if (a->cache.type == KV_F16)
        score_positions_of(a, token, slot, first, end, KV_F16, scores);
    else
        score_positions_of(a, token, slot, first, end, KV_Q8_0, scores);
}

// A number that is larger for a larger score; NaNs are at the ends.
static inline uint32_t rank_of_score(float score) {
    const uint32_t bits = bits_of_float(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Writes the places of the n_wanted highest of n scores, fewer than n, in rising order; of equal ones the earlier. The
// rank of the lowest of them is found digit by digit: each time those are counted that agree in the digits before.
static void highest_scores(const float *scores, int n, int n_wanted, int32_t *places) {
    enum { DIGIT = 11, N_DIGITS = 3, LAST_DIGIT = 32 - (N_DIGITS - 1) * DIGIT };
    uint32_t lowest = 0;
    int n_left = n_wanted; // of those that agree with `lowest` so far
    for (int i = 0, shift = 32; i < N_DIGITS; i++) {
        const int width = i < N_DIGITS - 1 ? DIGIT : LAST_DIGIT;
        int counts[1 << DIGIT] = {0};
        shift -= width;
        for (int j = 0; j < n; j++) {
            const uint32_t rank = rank_of_score(scores[j]);
            if ((uint64_t)rank >> (shift + width) == lowest)
                counts[rank >> shift & ((1u << width) - 1)]++;
        }
        int digit = (1 << width) - 1;
        for (; counts[digit] < n_left; digit--)
            n_left -= counts[digit];
        lowest = lowest << width | (uint32_t)digit;
    }
    for (int j = 0, n_found = 0; n_found < n_wanted; j++) {
        const uint32_t rank = rank_of_score(scores[j]);
        if (rank > lowest || (rank == lowest && n_left-- > 0))
            places[n_found++] = j;
    }
}

static int select_tasks_of_token(const select_positions_args *a, const step_view *step, int token) {
    const int n = rows_up_to(&a->cache, step->positions[token]);
    return n <= a->top_k ? 1 : attention_chunks(n);
}

static int select_positions_begin(const op_args *args, const worker *w) {
    const select_positions_args *a = &args->select_positions;
    const step_view *step = w->step;
    if (step->n_tokens > SPLIT_ATTENTION_TOKENS)
        return step->n_tokens;
    int n_tasks = 0;
    for (int token = 0; token < step->n_tokens; token++)
        n_tasks += select_tasks_of_token(a, step, token);
    return n_tasks;
}

static void select_positions_run(const op_args *args, const worker *w, int task) {
    const select_positions_args *a = &args->select_positions;
    const step_view *step = w->step;
    const bool splits = step->n_tokens <= SPLIT_ATTENTION_TOKENS;
    int token = splits ? 0 : step->n_tokens - 1 - task; // the last tokens have most to do: they go first
    for (; splits && task >= select_tasks_of_token(a, step, token); token++)
        task -= select_tasks_of_token(a, step, token);
    int32_t *out = a->out + token * a->out_stride;
    const int n = rows_up_to(&a->cache, step->positions[token]), n_chunks = attention_chunks(n);
    if (n <= a->top_k) {
        for (int i = 0; i < n + a->has_tail; i++)
            out[i] = i;
        return;
    }
    float *scores = a->scores + (splits ? token : w->thread) * (int64_t)kv_padded(a->cache.n_rows);
    if (splits) {
        const int first = task * ATTENTION_CHUNK, end = first + ATTENTION_CHUNK < n ? first + ATTENTION_CHUNK : n;
        score_positions(a, token, step->slots[token], first, end, scores);
        atomic_int *n_done = &a->n_done[token].value;
        if (atomic_fetch_add_explicit(n_done, 1, memory_order_acq_rel) != n_chunks - 1)
            return;
        atomic_store_explicit(n_done, 0, memory_order_relaxed); // ready for the next layer; a barrier lies between
    } else
        score_positions(a, token, step->slots[token], 0, n, scores);
    highest_scores(scores, n, a->top_k, out);
    if (a->has_tail)
        out[a->top_k] = n;
}

#endif
