// How keys and values lie in a cache, and how rows get there.
//
// Keys are stored sixteen positions side by side, so that sixteen scores are computed in the lanes of one register
// without any sum across lanes; values are stored row by row, so that sixteen columns are.
//
//     keys    [n_slots, n_kv_heads, context / 16, head_dim, 16]
//     values  [n_slots, n_kv_heads, context, padded value_dim]
//
// (context: its rows, rounded up to 16, the padded value size too; in a ring their number is a multiple of
// ATTENTION_CHUNK, so that each chunk lies in one piece). Q8_0 holds int8 in those places and, after each [head_dim,
// 16] of keys and each row of values, one f16 scale for each 32 values of a position: [blocks, 16] and [blocks]. x ~ d
// * q with d = f16(max |x| / 127), q = round(x / d), ties to even.
#ifndef ENGINE_OPS_KV_LAYOUT_H
#define ENGINE_OPS_KV_LAYOUT_H

#include "../ops.h"

enum { KV_LANES = 16, KV_BLOCK = 32 };

static inline int kv_element_bytes(int type) { return type == KV_F32 ? 4 : type == KV_F16 ? 2 : 1; }
static inline int kv_scales(int type, int head_dim) {
    return type == KV_Q8_0 ? (head_dim + KV_BLOCK - 1) / KV_BLOCK : 0;
}
static inline int kv_padded(int n) { return (n + KV_LANES - 1) & ~(KV_LANES - 1); }

static inline int64_t kv_key_group_bytes(int type, int head_dim) {
    return (int64_t)KV_LANES * (head_dim * kv_element_bytes(type) + 2 * kv_scales(type, head_dim));
}
static inline int64_t kv_value_row_bytes(int type, int value_dim) {
    return (int64_t)kv_padded(value_dim) * kv_element_bytes(type) + 2 * kv_scales(type, value_dim);
}

// The row of a position, or of positions that share one.
static inline int kv_row(const kv_cache *cache, int position) {
    return cache->is_ring ? position % cache->n_rows : position;
}

// The sixteen keys that hold `position`.
static inline uint8_t *kv_keys(const kv_cache *cache, int slot, int kv_head, int position) {
    const int64_t groups = kv_padded(cache->n_rows) / KV_LANES;
    return cache->keys + ((slot * (int64_t)cache->n_kv_heads + kv_head) * groups + kv_row(cache, position) / KV_LANES) *
                             kv_key_group_bytes(cache->type, cache->head_dim);
}

static inline uint8_t *kv_values(const kv_cache *cache, int slot, int kv_head, int position) {
    const int64_t rows = kv_padded(cache->n_rows);
    return cache->values + ((slot * (int64_t)cache->n_kv_heads + kv_head) * rows + kv_row(cache, position)) *
                               kv_value_row_bytes(cache->type, cache->value_dim);
}

// A stored partial result of attention: m and l, then o from PARTIAL_HEADER on.
enum { PARTIAL_HEADER = 16 };
static inline int64_t partial_size(int value_dim) { return PARTIAL_HEADER + kv_padded(value_dim); }
static inline int attention_chunks(int n_positions) { return (n_positions + ATTENTION_CHUNK - 1) / ATTENTION_CHUNK; }

// Chunks that attention goes through for one token at most; the first and the last may lie in the same rows of a ring.
static inline int most_chunks(const attention_args *a) {
    return attention_chunks(a->cache.n_rows) + a->cache.is_ring +
           (a->shared.keys ? attention_chunks(a->shared.n_rows) : 0);
}

#endif
