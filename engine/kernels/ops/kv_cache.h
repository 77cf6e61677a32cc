// How keys and values get into a cache, and out of it.
#ifndef ENGINE_OPS_KV_CACHE_H
#define ENGINE_OPS_KV_CACHE_H

#include "../fp.h"
#include "../simd.h"
#include "kv_layout.h"

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

// Puts rows of keys or values, one tile of heads, at their tokens' positions, or in the rows that tokens share.
static void op_kv_store(const op_args *args, const step_view *step, tile t) {
    const kv_store_args *a = &args->kv_store;
    const kv_cache *cache = &a->cache;
    const int n = a->is_value ? cache->value_dim : cache->head_dim, bytes = kv_element_bytes(cache->type);
    for (int row = t.row; row < t.row_end; row++) {
        const int slot = step->slots[row], position = step->positions[row] / cache->period, lane = position % KV_LANES;
        if ((step->positions[row] + 1) % cache->period)
            continue; // the last token of a period brings the row of all of them
        for (int head = t.col / n; head < t.col_end / n; head++) {
            const float *x = a->x.at + row * a->x.stride + head * n;
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
}

// Sixteen stored values as floats, Q8_0 without its scale.
static inline v16 kv_load(const uint8_t *p, int64_t i, int type) {
    return type == KV_F32   ? v16_load((const float *)p + i)
           : type == KV_F16 ? v16_from_f16((const uint16_t *)p + i)
                            : v16_from_i8((const int8_t *)p + i);
}

#endif
