// Sizes of caches, for those who give them memory.
#include "ops/kv_layout.h"

static int64_t whole_lines(int64_t n_bytes) { return (n_bytes + 63) & ~(int64_t)63; }

int64_t kv_key_bytes(int type, int n_slots, int n_rows, int n_kv_heads, int head_dim) {
    const int64_t groups = (int64_t)n_slots * n_kv_heads * (kv_padded(n_rows) / KV_LANES);
    return whole_lines(groups * kv_key_group_bytes(type, head_dim));
}

int64_t kv_value_bytes(int type, int n_slots, int n_rows, int n_kv_heads, int value_dim) {
    return whole_lines((int64_t)n_slots * n_kv_heads * kv_padded(n_rows) * kv_value_row_bytes(type, value_dim));
}

int64_t attention_partial_bytes(const attention_args *args) {
    return args->n_heads * (int64_t)most_chunks(args) * partial_size(args->cache.value_dim) * 4;
}
