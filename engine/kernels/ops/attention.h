// Causal attention over a cache.
//
// One stated order, whoever computes what: positions are cut into chunks of ATTENTION_CHUNK from 0. Each chunk gives,
// for each query, its largest score m, the sum l of exp(score - m), and the sum o of exp(score - m) * value; the chunks
// are then merged in order, and a sink, which is a score without a value, after them. So neither the cut of a prompt
// nor the number of threads can change a bit.
//
// Where a token also sees rows that some tokens share, their chunks come first.
//
// A long prompt is cut into tasks of a few tokens and one key/value head, which go through the chunks one after
// another. A few tokens are cut into chunks instead; whoever finishes the last chunk of a query merges all.
#ifndef ENGINE_OPS_ATTENTION_H
#define ENGINE_OPS_ATTENTION_H

#include "../vmath.h"
#include "kv_cache.h"

typedef struct {
    float m[ATTENTION_TILE], l[ATTENTION_TILE];
    float o[ATTENTION_TILE][MAX_HEAD_DIM];
} attention_partial;

static inline int heads_in_tile(const attention_args *a, int first) {
    const int left = a->n_heads / a->cache.n_kv_heads - first;
    return left < ATTENTION_TILE ? left : ATTENTION_TILE;
}
static inline int tiles_of_group(const attention_args *a) {
    return (a->n_heads / a->cache.n_kv_heads + ATTENTION_TILE - 1) / ATTENTION_TILE;
}

// scores[i][j] = scale * (q_i . k_j) for n_q queries, which follow one another, and one group of sixteen keys. Chains
// of 32 products, then their sums.
static inline __attribute__((always_inline)) void score_group(const float *q, int n_q, const uint8_t *keys, int type,
                                                              int head_dim, float scale, float *scores, int stride) {
    v16 total[ATTENTION_TILE];
    const uint16_t *scales = (const uint16_t *)(keys + (int64_t)head_dim * KV_LANES * kv_element_bytes(type));
    for (int i = 0; i < n_q; i++)
        total[i] = v16_set(0.0f);
    for (int block = 0; block * KV_BLOCK < head_dim; block++) {
        const int end = (block + 1) * KV_BLOCK < head_dim ? (block + 1) * KV_BLOCK : head_dim;
        v16 sum[ATTENTION_TILE];
        for (int i = 0; i < n_q; i++)
            sum[i] = v16_set(0.0f);
        for (int d = block * KV_BLOCK; d < end; d++) {
            const v16 k = kv_load(keys, (int64_t)d * KV_LANES, type);
            for (int i = 0; i < n_q; i++)
                sum[i] = v16_fma(v16_set(q[i * head_dim + d]), k, sum[i]);
        }
        for (int i = 0; i < n_q; i++)
            total[i] = type == KV_Q8_0 ? v16_fma(v16_from_f16(scales + block * KV_LANES), sum[i], total[i])
                                       : v16_add(total[i], sum[i]);
    }
    for (int i = 0; i < n_q; i++)
        v16_store(scores + (int64_t)i * stride, v16_mul(total[i], v16_set(scale)));
}

static inline void cap_scores(float *scores, int n_positions, float cap) {
    for (int j = 0; j < n_positions; j += KV_LANES)
        v16_store(scores + j, v16_soft_cap(v16_load(scores + j), cap));
}

// The same for n positions of a list in rising order, with keys from position 0 on: a group that has some of them is
// scored once.
static inline __attribute__((always_inline)) void score_selected(const float *q, int n_q, const uint8_t *keys, int type,
                                                                 int head_dim, float scale, const int32_t *selected,
                                                                 int n, float *scores, int stride) {
    const int64_t group_bytes = kv_key_group_bytes(type, head_dim);
    float of_group[ATTENTION_TILE * KV_LANES];
    for (int j = 0, scored = -1; j < n; j++) {
        const int group = selected[j] / KV_LANES;
        if (group != scored)
            score_group(q, n_q, keys + group * group_bytes, type, head_dim, scale, of_group, KV_LANES);
        scored = group;
        for (int i = 0; i < n_q; i++)
            scores[(int64_t)i * stride + j] = of_group[i * KV_LANES + selected[j] % KV_LANES];
    }
}

// o_i[d] = sum over positions of weights[i][j] * value_j[d], in rising order, for sixteen columns. Position j is the
// j-th from where `values` begins on, or of a list.
static inline __attribute__((always_inline)) void weigh_values(const float *weights, int stride, int n_q,
                                                               const uint8_t *values, const int32_t *selected,
                                                               int n_positions, int type, int value_dim, int d,
                                                               attention_partial *out) {
    const int64_t row_bytes = kv_value_row_bytes(type, value_dim);
    v16 sum[ATTENTION_TILE];
    for (int i = 0; i < n_q; i++)
        sum[i] = v16_set(0.0f);
    for (int j = 0; j < n_positions; j++) {
        const uint8_t *row = values + (selected ? selected[j] : j) * row_bytes;
        const v16 v = kv_load(row, d, type);
        const float scale =
            type == KV_Q8_0 ? f16_to_f32(((const uint16_t *)(row + kv_padded(value_dim)))[d / KV_BLOCK]) : 1.0f;
        for (int i = 0; i < n_q; i++) {
            const float weight = weights[(int64_t)i * stride + j];
            sum[i] = v16_fma(v16_set(type == KV_Q8_0 ? weight * scale : weight), v, sum[i]);
        }
    }
    for (int i = 0; i < n_q; i++)
        v16_store(out->o[i] + d, sum[i]);
}

// Turns n_positions scores into exp(score - largest), the first n_hidden into 0; returns through m and l.
static inline void exponentials(float *scores, int n_hidden, int n_positions, float *m, float *l) {
    const int padded = kv_padded(n_positions);
    v16 largest = v16_set(-INFINITY), sum = v16_set(0.0f);
    for (int j = 0; j < n_hidden; j++)
        scores[j] = -INFINITY;
    for (int j = n_positions; j < padded; j++)
        scores[j] = -INFINITY;
    for (int j = 0; j < padded; j += KV_LANES)
        largest = v16_max(v16_load(scores + j), largest);
    *m = v16_largest(largest);
    const v16 shift = v16_set(*m);
    for (int j = 0; j < padded; j += KV_LANES)
        v16_store(scores + j, v16_exp(v16_sub(v16_load(scores + j), shift)));
    for (int j = 0; j < n_hidden; j++)
        scores[j] = 0.0f;
    for (int j = n_positions; j < padded; j++)
        scores[j] = 0.0f;
    for (int j = 0; j < padded; j += KV_LANES)
        sum = v16_add(sum, v16_load(scores + j));
    *l = v16_sum(sum);
}

static inline __attribute__((always_inline)) void
attend_chunk_of(const attention_args *a, const kv_cache *cache, const float *q, int n_q, int slot, int kv_head,
                int first, int n_hidden, int n_positions, const int32_t *selected, int type, attention_partial *out) {
    float scores[ATTENTION_TILE * ATTENTION_CHUNK];
    const int head_dim = cache->head_dim, value_dim = cache->value_dim, base = selected ? 0 : first;
    const uint8_t *keys = kv_keys(cache, slot, kv_head, base);
    const int64_t group_bytes = kv_key_group_bytes(type, head_dim);
    if (selected)
        score_selected(q, n_q, keys, type, head_dim, a->scale, selected, n_positions, scores, ATTENTION_CHUNK);
    else
        for (int j = 0; j < n_positions; j += KV_LANES)
            score_group(q, n_q, keys + j / KV_LANES * group_bytes, type, head_dim, a->scale, scores + j,
                        ATTENTION_CHUNK);
    if (a->cap > 0.0f)
        for (int i = 0; i < n_q; i++)
            cap_scores(scores + i * ATTENTION_CHUNK, n_positions, a->cap);
    for (int i = 0; i < n_q; i++)
        exponentials(scores + i * ATTENTION_CHUNK, n_hidden, n_positions, &out->m[i], &out->l[i]);
    const uint8_t *values = kv_values(cache, slot, kv_head, base);
    for (int d = 0; d < value_dim; d += KV_LANES)
        weigh_values(scores, ATTENTION_CHUNK, n_q, values, selected, n_positions, type, value_dim, d, out);
}

// What a token sees: positions from `first` on, in chunks from `chunk` to `end_chunk`, none of them empty. Where blocks
// of positions are selected, these are places: place i is in block i / block_size of the list. Before them come the
// chunks of n_shared rows, or of places in a list of them.
typedef struct {
    int first, n_positions, chunk, end_chunk, n_shared;
    const int32_t *selected; // the token's lists, or NULL
} attention_view;

static inline int chunks_of(attention_view view) {
    return attention_chunks(view.n_shared) + view.end_chunk - view.chunk;
}

// How many positions the blocks have that a token at `position` looks at: all are whole but the newest, which is always
// chosen; with a tail, unless it is whole.
static inline int selected_positions(const attention_args *a, int position) {
    const int size = a->block_size, n_whole = (a->top_k - 1) * size;
    const int of_newest = a->has_tail ? (position + 1) % size : position % size + 1;
    return position < n_whole + of_newest ? position + 1 : n_whole + of_newest;
}

// Writes the positions at n places of a list from `first` on.
static inline void positions_of_blocks(const int32_t *blocks, int block_size, int first, int n, int32_t *positions) {
    int block = first / block_size, at = first % block_size;
    for (int i = 0; i < n; i++) {
        positions[i] = blocks[block] * block_size + at;
        if (++at == block_size) {
            at = 0;
            block++;
        }
    }
}

static inline attention_view view_of(const attention_args *a, const step_view *step, int token) {
    const int position = step->positions[token];
    const int32_t *selected = a->selected ? a->selected + token * a->selected_stride : NULL;
    if (selected && !a->shared.keys) {
        const int n = selected_positions(a, position);
        return (attention_view){0, n, 0, attention_chunks(n), 0, selected};
    }
    int n_shared = a->shared.keys ? rows_up_to(&a->shared, position) : 0;
    if (selected && a->top_k < n_shared)
        n_shared = a->top_k;
    int first = a->window && position >= a->window ? position + 1 - a->window : 0;
    if (a->chunk && position / a->chunk * a->chunk > first)
        first = position / a->chunk * a->chunk;
    return (attention_view){first,    position + 1, first / ATTENTION_CHUNK, attention_chunks(position + 1),
                            n_shared, selected};
}

// The i-th chunk for n_q heads of one token that share keys and values. Written out for every tile size and cache type.
static void attend_chunk(const attention_args *a, const float *q, int n_q, int slot, int kv_head, attention_view view,
                         int i, attention_partial *out) {
    const int n_shared = attention_chunks(view.n_shared), chunk = i < n_shared ? i : view.chunk + i - n_shared;
    const kv_cache *cache = i < n_shared ? &a->shared : &a->cache;
    const int first = chunk * ATTENTION_CHUNK, n_seen = i < n_shared ? view.n_shared : view.n_positions;
    const int n_hidden = i >= n_shared && view.first > first ? view.first - first : 0;
    const int n_positions = n_seen - first < ATTENTION_CHUNK ? n_seen - first : ATTENTION_CHUNK;
    const bool is_listed = view.selected && (i < n_shared || !a->shared.keys);
    int32_t selected[ATTENTION_CHUNK];
    if (is_listed)
        positions_of_blocks(view.selected + (a->n_lists > 1 ? kv_head : 0) * (int64_t)a->top_k, a->block_size, first,
                            n_positions, selected);
    switch (n_q * N_KV_TYPES + a->cache.type) {
#define CASE(n, type)                                                                                                  \
    case n *N_KV_TYPES + type:                                                                                         \
        if (is_listed)                                                                                                 \
            attend_chunk_of(a, cache, q, n, slot, kv_head, first, 0, n_positions, selected, type, out);                \
        else                                                                                                           \
            attend_chunk_of(a, cache, q, n, slot, kv_head, first, n_hidden, n_positions, NULL, type, out);             \
        break
        CASE(1, KV_F32);
        CASE(1, KV_F16);
        CASE(1, KV_Q8_0);
        CASE(2, KV_F32);
        CASE(2, KV_F16);
        CASE(2, KV_Q8_0);
        CASE(3, KV_F32);
        CASE(3, KV_F16);
        CASE(3, KV_Q8_0);
        CASE(4, KV_F32);
        CASE(4, KV_F16);
        CASE(4, KV_Q8_0);
#undef CASE
    }
}

// (m, l, o) <- (m, l, o) merged with the next chunk's result; o has room for a multiple of 16.
static inline void merge_partial(float *m, float *l, float *o, float next_m, float next_l, const float *next_o, int n) {
    const float largest = next_m > *m ? next_m : *m;
    const float keep = exp_one(*m - largest), take = exp_one(next_m - largest);
    const v16 keeping = v16_set(keep), taking = v16_set(take);
    *m = largest;
    *l = fmaf(next_l, take, *l * keep);
    for (int d = 0; d < n; d += 16)
        v16_store(o + d, v16_fma(v16_load(next_o + d), taking, v16_mul(v16_load(o + d), keeping)));
}

// Merges head's sink, if there are sinks, and writes o / l.
static inline void finish_attention(const attention_args *a, int head, float *m, float *l_sum, float *o, float *out) {
    static const float no_value[MAX_HEAD_DIM];
    const int n = a->cache.value_dim;
    int d = 0;
    if (a->sinks)
        merge_partial(m, l_sum, o, a->sinks[head], 1.0f, no_value, kv_padded(n));
    const float l = *l_sum;
    for (; d + 16 <= n; d += 16)
        v16_store(out + d, v16_div(v16_load(o + d), v16_set(l)));
    if (d < n)
        v16_store_first(out + d, v16_div(v16_load_first(o + d, n - d), v16_set(l)), n - d);
}

// -- many tokens: a task is one key/value head and a few tokens ----------------------------------------------------

static void attend_token(const attention_args *a, const step_view *step, int token, int kv_head, int first) {
    const int n_q = heads_in_tile(a, first), n = a->cache.value_dim;
    const int head = kv_head * (a->n_heads / a->cache.n_kv_heads) + first;
    const attention_view view = view_of(a, step, token);
    const float *q = a->q.at + token * a->q.stride + head * a->cache.head_dim;
    attention_partial sum, next;
    attend_chunk(a, q, n_q, step->slots[token], kv_head, view, 0, &sum);
    for (int chunk = 1; chunk < chunks_of(view); chunk++) {
        attend_chunk(a, q, n_q, step->slots[token], kv_head, view, chunk, &next);
        for (int i = 0; i < n_q; i++)
            merge_partial(&sum.m[i], &sum.l[i], sum.o[i], next.m[i], next.l[i], next.o[i], kv_padded(n));
    }
    for (int i = 0; i < n_q; i++)
        finish_attention(a, head + i, &sum.m[i], &sum.l[i], sum.o[i],
                         a->out.at + token * a->out.stride + (head + i) * n);
}

// -- few tokens: a task is one chunk of one tile of heads of one token ----------------------------------------------

static void attend_split(const attention_args *a, const step_view *step, int token, int kv_head, int tile_index,
                         int chunk) {
    const int first = tile_index * ATTENTION_TILE, n_q = heads_in_tile(a, first), n = a->cache.value_dim;
    const int head = kv_head * (a->n_heads / a->cache.n_kv_heads) + first;
    const attention_view view = view_of(a, step, token);
    const int n_chunks = chunks_of(view), most = most_chunks(a);
    const float *q = a->q.at + token * a->q.stride + head * a->cache.head_dim;
    float *out = a->out.at + token * a->out.stride + head * n;
    attention_partial result;
    attend_chunk(a, q, n_q, step->slots[token], kv_head, view, chunk, &result);
    if (n_chunks == 1) {
        for (int i = 0; i < n_q; i++)
            finish_attention(a, head + i, &result.m[i], &result.l[i], result.o[i], out + i * n);
        return;
    }
    const int64_t size = partial_size(n);
    float *stored = a->partials + ((int64_t)token * a->n_heads + head) * most * size;
    for (int i = 0; i < n_q; i++) {
        float *own = stored + ((int64_t)i * most + chunk) * size;
        own[0] = result.m[i];
        own[1] = result.l[i];
        memcpy(own + PARTIAL_HEADER, result.o[i], (size_t)kv_padded(n) * sizeof(float));
    }
    atomic_int *n_done = &a->n_done[(token * a->cache.n_kv_heads + kv_head) * tiles_of_group(a) + tile_index].value;
    if (atomic_fetch_add_explicit(n_done, 1, memory_order_acq_rel) != n_chunks - 1)
        return;
    atomic_store_explicit(n_done, 0, memory_order_relaxed); // ready for the next attention; a barrier lies between
    for (int i = 0; i < n_q; i++) {
        float *sum = stored + (int64_t)i * most * size;
        for (int next = 1; next < n_chunks; next++)
            merge_partial(&sum[0], &sum[1], sum + PARTIAL_HEADER, sum[next * size], sum[next * size + 1],
                          sum + next * size + PARTIAL_HEADER, kv_padded(n));
        finish_attention(a, head + i, &sum[0], &sum[1], sum + PARTIAL_HEADER, out + i * n);
    }
}

static inline int chunks_of_token(const attention_args *a, const step_view *step, int token) {
    return chunks_of(view_of(a, step, token));
}

static int attention_begin(const op_args *args, const worker *w) {
    const attention_args *a = &args->attention;
    const step_view *step = w->step;
    if (step->n_tokens > SPLIT_ATTENTION_TOKENS)
        return (step->n_tokens + ATTENTION_TOKENS - 1) / ATTENTION_TOKENS * a->cache.n_kv_heads;
    int n_tasks = 0;
    for (int token = 0; token < step->n_tokens; token++)
        n_tasks += chunks_of_token(a, step, token) * a->cache.n_kv_heads * tiles_of_group(a);
    return n_tasks;
}

static void attention_run(const op_args *args, const worker *w, int task) {
    const attention_args *a = &args->attention;
    const step_view *step = w->step;
    const int n_kv_heads = a->cache.n_kv_heads, n_tiles = tiles_of_group(a);
    if (step->n_tokens >
        SPLIT_ATTENTION_TOKENS) { // the last tokens see most: they go first, so that threads end together
        const int n_blocks = (step->n_tokens + ATTENTION_TOKENS - 1) / ATTENTION_TOKENS;
        const int first = (n_blocks - 1 - task / n_kv_heads) * ATTENTION_TOKENS;
        const int end = first + ATTENTION_TOKENS < step->n_tokens ? first + ATTENTION_TOKENS : step->n_tokens;
        for (int tile_index = 0; tile_index < n_tiles; tile_index++)
            for (int token = first; token < end; token++)
                attend_token(a, step, token, task % n_kv_heads, tile_index * ATTENTION_TILE);
        return;
    }
    int token = 0;
    for (;; token++) {
        const int tasks_of_token = chunks_of_token(a, step, token) * n_kv_heads * n_tiles;
        if (task < tasks_of_token)
            break;
        task -= tasks_of_token;
    }
    attend_split(a, step, token, task / n_tiles % n_kv_heads, task % n_tiles, task / n_tiles / n_kv_heads);
}

#endif
