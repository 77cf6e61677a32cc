// How keys and values lie in a cache, and how rows get there.
//
// Keys are stored sixteen positions side by side, so that sixteen scores are computed in the lanes of one register
// without any sum across lanes; values are stored row by row, so that sixteen columns are.
//
//     keys    [n_slots, n_kv_heads, context / 16, head_dim, 16]
//     values  [n_slots, n_kv_heads, context, padded head_dim]
//
// (context rounded up to 16, the padded head size too). Q8_0 holds int8 in those places and, after each [head_dim, 16] of
// keys and each row of values, one f16 scale for each 32 values of a position: [blocks, 16] and [blocks].
// x ~ d * q with d = f16(max |x| / 127), q = round(x / d), ties to even.
#ifndef ENGINE_OPS_KV_CACHE_H
#define ENGINE_OPS_KV_CACHE_H

#include "../ops.h"
#include "../fp.h"
#include "../simd.h"

enum { KV_LANES = 16, KV_BLOCK = 32 };

static inline int kv_value_bytes(int type) { return type == KV_F32 ? 4 : type == KV_F16 ? 2 : 1; }
static inline int kv_scales(int type, int head_dim) {
    return type == KV_Q8_0 ? (head_dim + KV_BLOCK - 1) / KV_BLOCK : 0;
}
static inline int kv_padded(int n) { return (n + KV_LANES - 1) & ~(KV_LANES - 1); }

static inline int64_t kv_key_group_bytes(int type, int head_dim) {
    return (int64_t)KV_LANES * (head_dim * kv_value_bytes(type) + 2 * kv_scales(type, head_dim));
}
static inline int64_t kv_value_row_bytes(int type, int head_dim) {
    return (int64_t)kv_padded(head_dim) * kv_value_bytes(type) + 2 * kv_scales(type, head_dim);
}

// The sixteen keys that hold `position`.
static inline uint8_t *kv_keys(const kv_cache *cache, int slot, int kv_head, int position) {
    const int64_t groups = kv_padded(cache->context_length) / KV_LANES;
    return cache->keys + ((slot * (int64_t)cache->n_kv_heads + kv_head) * groups + position / KV_LANES) *
                             kv_key_group_bytes(cache->type, cache->head_dim);
}

static inline uint8_t *kv_values(const kv_cache *cache, int slot, int kv_head, int position) {
    const int64_t rows = kv_padded(cache->context_length);
    return cache->values + ((slot * (int64_t)cache->n_kv_heads + kv_head) * rows + position) *
                               kv_value_row_bytes(cache->type, cache->head_dim);
}

// Writes n values `step` elements apart.
static inline void kv_put(const float *x, int n, int type, uint8_t *out, int64_t step, uint16_t *scales,
                          int64_t scale_step) {
    if (type == KV_F32)
        for (int i = 0; i < n; i++)
            memcpy(out + i * step * 4, x + i, 4);
    else if (type == KV_F16)
        for (int i = 0; i < n; i++) {
            const uint16_t half = f32_to_f16(x[i]);
            memcpy(out + i * step * 2, &half, 2);
        }
    else
        for (int block = 0; block * KV_BLOCK < n; block++) {
            const int first = block * KV_BLOCK, end = first + KV_BLOCK < n ? first + KV_BLOCK : n;
            float largest = 0.0f;
            for (int i = first; i < end; i++)
                largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
            const uint16_t stored = f32_to_f16(largest / 127.0f);
            const float d = f16_to_f32(stored);
            scales[block * scale_step] = stored;
            for (int i = first; i < end; i++) {
                const float q = d > 0.0f ? rintf(x[i] / d) : 0.0f;
                out[i * step] = (uint8_t)(int8_t)(q > 127.0f ? 127.0f : q > -127.0f ? q : -127.0f); // NaN: -127
            }
        }
}

// Puts rows of keys or values, one tile of heads, at their tokens' positions.
static void op_kv_store(const op_args *args, const step_view *step, tile t) {
    const kv_store_args *a = &args->kv_store;
    const kv_cache *cache = &a->cache;
    const int n = cache->head_dim, bytes = kv_value_bytes(cache->type);
    for (int row = t.row; row < t.row_end; row++)
        for (int head = t.col / n; head < t.col_end / n; head++) {
            const float *x = a->x.at + row * a->x.stride + head * n;
            const int slot = step->slots[row], position = step->positions[row], lane = position % KV_LANES;
            if (a->is_value) {
                uint8_t *out = kv_values(cache, slot, head, position);
                kv_put(x, n, cache->type, out, 1, (uint16_t *)(out + kv_padded(n) * bytes), 1);
            } else {
                uint8_t *out = kv_keys(cache, slot, head, position);
                uint16_t *scales = (uint16_t *)(out + n * KV_LANES * bytes) + lane;
                kv_put(x, n, cache->type, out + lane * bytes, KV_LANES, scales, KV_LANES);
            }
        }
}

// Sixteen stored values as floats, Q8_0 without its scale.
static inline v16 kv_load(const uint8_t *p, int64_t i, int type) {
    return type == KV_F32   ? v16_load((const float *)p + i)
           : type == KV_F16 ? v16_from_f16((const uint16_t *)p + i)
                            : v16_from_i8((const int8_t *)p + i);
}

#endif
