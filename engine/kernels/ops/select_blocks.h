// The choice of the blocks of positions that attention looks at: each head of small queries scores all positions with
// small keys that all heads share, a block counts as much as its best position, and those that count most are kept
// (`SelectBlocks` in devices/graph.py).
//
// The newest blocks are taken whatever they count, so only whole blocks are ever scored. Tasks as in
// `select_positions.h`; a chunk is some whole blocks.
#ifndef ENGINE_OPS_SELECT_BLOCKS_H
#define ENGINE_OPS_SELECT_BLOCKS_H

#include "select_positions.h"

// Blocks that a token must choose among: all before the newest ones. 0 if it takes all that there are.
static inline int blocks_to_score(const select_blocks_args *a, const step_view *step, int token) {
    const int n_blocks = step->positions[token] / a->block_size + 1;
    return n_blocks <= a->top_k ? 0 : n_blocks - a->n_newest;
}

static inline int blocks_of_chunk(const select_blocks_args *a) {
    return a->block_size < ATTENTION_CHUNK ? ATTENTION_CHUNK / a->block_size : 1;
}

static inline int block_tasks_of_token(const select_blocks_args *a, const step_view *step, int token) {
    const int n_blocks = blocks_to_score(a, step, token), of_chunk = blocks_of_chunk(a);
    return n_blocks ? (n_blocks + of_chunk - 1) / of_chunk : 1;
}

static inline int64_t blocks_of_context(const select_blocks_args *a) {
    return (a->cache.n_rows + (int64_t)a->block_size - 1) / a->block_size;
}

// scores[head][block] for blocks from `block` up to `end`, for n_q heads from `head` on.
static inline __attribute__((always_inline)) void score_blocks_of(const select_blocks_args *a, int token, int slot,
                                                                  int head, int n_q, int block, int end, int type,
                                                                  float *scores) {
    const float *q = a->q.at + token * a->q.stride + head * a->cache.head_dim;
    const int64_t n_kept = blocks_of_context(a);
    const int first = block * a->block_size, last = end * a->block_size;
    for (int i = 0; i < n_q; i++)
        for (int b = block; b < end; b++)
            scores[(head + i) * n_kept + b] = -INFINITY;
    for (int group = first / KV_LANES * KV_LANES; group < last; group += KV_LANES) {
        float of_group[ATTENTION_TILE * KV_LANES];
        score_group(q, n_q, kv_keys(&a->cache, slot, 0, group), type, a->cache.head_dim, 1.0f, of_group, KV_LANES);
        const int from = group < first ? first : group, to = group + KV_LANES < last ? group + KV_LANES : last;
        for (int i = 0; i < n_q; i++)
            for (int p = from; p < to; p++) {
                float *best = &scores[(head + i) * n_kept + p / a->block_size];
                const float score = of_group[i * KV_LANES + p - group];
                *best = score > *best ? score : *best;
            }
    }
}

// The same for all heads. Written out for every type of cache.
static void score_blocks(const select_blocks_args *a, int token, int slot, int block, int end, float *scores) {
    int head = 0;
#define SCORE_HEADS(n)                                                                                                 \
    for (; head + n <= a->n_heads; head += n)                                                                          \
        if (a->cache.type == KV_F32)                                                                                   \
            score_blocks_of(a, token, slot, head, n, block, end, KV_F32, scores);                                      \
        else if (a->cache.type == KV_F16)                                                                              \
            score_blocks_of(a, token, slot, head, n, block, end, KV_F16, scores);                                      \
        else                                                                                                           \
            score_blocks_of(a, token, slot, head, n, block, end, KV_Q8_0, scores);
    SCORE_HEADS(ATTENTION_TILE)
    SCORE_HEADS(1)
#undef SCORE_HEADS
}

static void choose_blocks(const select_blocks_args *a, const step_view *step, int token, const float *scores) {
    const int n_blocks = step->positions[token] / a->block_size + 1, n_scored = blocks_to_score(a, step, token);
    const int n_chosen = n_scored ? a->top_k - a->n_newest : 0;
    for (int head = 0; head < a->n_heads; head++) {
        int32_t *out = a->out + token * a->out_stride + (int64_t)head * a->top_k;
        if (n_chosen)
            highest_scores(scores + head * blocks_of_context(a), n_scored, n_chosen, out);
        for (int block = n_scored; block < n_blocks; block++)
            out[n_chosen + block - n_scored] = block;
    }
}

static int select_blocks_begin(const op_args *args, const worker *w) {
    const select_blocks_args *a = &args->select_blocks;
    const step_view *step = w->step;
    if (step->n_tokens > SPLIT_ATTENTION_TOKENS)
        return step->n_tokens;
    int n_tasks = 0;
    for (int token = 0; token < step->n_tokens; token++)
        n_tasks += block_tasks_of_token(a, step, token);
    return n_tasks;
}

static void select_blocks_run(const op_args *args, const worker *w, int task) {
    const select_blocks_args *a = &args->select_blocks;
    const step_view *step = w->step;
    const bool splits = step->n_tokens <= SPLIT_ATTENTION_TOKENS;
    int token = splits ? 0 : step->n_tokens - 1 - task; // the last tokens have most to do: they go first
    for (; splits && task >= block_tasks_of_token(a, step, token); token++)
        task -= block_tasks_of_token(a, step, token);
    const int n_scored = blocks_to_score(a, step, token);
    float *scores = a->scores + (splits ? token : w->thread) * a->n_heads * blocks_of_context(a);
    if (splits) {
        const int of_chunk = blocks_of_chunk(a), first = task * of_chunk;
        score_blocks(a, token, step->slots[token], first, first + of_chunk < n_scored ? first + of_chunk : n_scored,
                     scores);
        atomic_int *n_done = &a->n_done[token].value;
        if (atomic_fetch_add_explicit(n_done, 1, memory_order_acq_rel) != block_tasks_of_token(a, step, token) - 1)
            return;
        atomic_store_explicit(n_done, 0, memory_order_relaxed); // ready for the next layer; a barrier lies between
    } else
        score_blocks(a, token, step->slots[token], 0, n_scored, scores);
    choose_blocks(a, step, token, scores);
}

#endif
