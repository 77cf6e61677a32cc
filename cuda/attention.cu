// Attention of a step's tokens over the cache of keys and values, in three kernels: store the new keys and values,
// attend over parts of the positions, merge the parts.
//
// Compiled for KV_TYPE (0 float32, 1 float16, 2 int8 with a float16 scale for each 32 values), KEY_DIM and VALUE_DIM (of
// a head), GROUP (query heads that share a key head), HEADS (of a group that a block takes) and SHARED (1: there are no
// values of their own, a head's value is the first VALUE_DIM values of its key). A cache holds K and then V, each
// [n_slots, context_length, n_kv_heads, KEY_DIM or VALUE_DIM] of its type, and for int8 then the scales of K and of V,
// [n_slots, context_length, n_kv_heads, ceil(dim / 32)].
//
// A token at position p sees positions from max(0, p - window + 1), and from p rounded down to a multiple of `chunk`, to p;
// 0 sets no limit. Positions are taken in tiles of 32, tile i by part i % n_parts, and parts are merged in order: what a
// token's result is made of depends on its position alone, not on how a prompt was cut or what else is in the step.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int N_WARPS = THREADS / WARP;
constexpr int TILE = 32;
constexpr int LANE_DIMS = (KEY_DIM + WARP - 1) / WARP;           // of a key that a lane reads
constexpr int THREAD_DIMS = (VALUE_DIM + THREADS - 1) / THREADS; // of a value that a thread adds up
constexpr int N_TILES = (GROUP + HEADS - 1) / HEADS;             // of heads

// Keys or values, of DIM values each, of all positions of one sequence and one head.
template <int DIM> struct Side {
    static constexpr int N_SCALES = (DIM + 31) / 32;
    uint8_t *values;  // of position 0
    uint16_t *scales; // likewise
    int n_kv_heads;

    __device__ __forceinline__ float load(int position, int i) const {
        const int64_t row = (int64_t)position * n_kv_heads;
#if KV_TYPE == 0
        return ((const float *)values)[row * DIM + i];
#elif KV_TYPE == 1
        return f16_to_f32(((const uint16_t *)values)[row * DIM + i]);
#else
        return f16_to_f32(scales[row * N_SCALES + i / 32]) * (float)((const int8_t *)values)[row * DIM + i];
#endif
    }
};

// The cache of one layer.
struct Cache {
    uint8_t *address;
    int n_slots, context_length, n_kv_heads;
};

// `before` and `scales_before`: values and scales of one head that lie before this side of the cache, for each head.
template <int DIM> DEVICE Side<DIM> side_of(const Cache &c, int before, int scales_before, int slot, int head) {
    constexpr int BYTES = KV_TYPE == 0 ? 4 : KV_TYPE == 1 ? 2 : 1;
    const int64_t n = (int64_t)c.n_slots * c.context_length * c.n_kv_heads; // heads
    const int64_t first = (int64_t)slot * c.context_length * c.n_kv_heads + head;
    uint16_t *scales = (uint16_t *)(c.address + n * (KEY_DIM + (SHARED ? 0 : VALUE_DIM)) * BYTES);
    return {c.address + (n * before + first * DIM) * BYTES,
            scales + n * scales_before + first * Side<DIM>::N_SCALES, c.n_kv_heads};
}
DEVICE Side<KEY_DIM> keys_of(const Cache &cache, int slot, int head) {
    return side_of<KEY_DIM>(cache, 0, 0, slot, head);
}
#if SHARED
using Values = Side<KEY_DIM>;
DEVICE Values values_of(const Cache &cache, int slot, int head) { return keys_of(cache, slot, head); }
#else
using Values = Side<VALUE_DIM>;
DEVICE Values values_of(const Cache &cache, int slot, int head) {
    return side_of<VALUE_DIM>(cache, KEY_DIM, Side<KEY_DIM>::N_SCALES, slot, head);
}
#endif

// Stores value i of a head, by a block of whole warps. Those beyond the head are zeros and help with the scales.
template <int DIM> DEVICE void store(const Side<DIM> &out, int position, int i, const float *x) {
    const int64_t row = (int64_t)position * out.n_kv_heads;
    const float value = i < DIM ? x[i] : 0.0f;
#if KV_TYPE == 0
    if (i < DIM)
        ((float *)out.values)[row * DIM + i] = value;
#elif KV_TYPE == 1
    if (i < DIM)
        ((uint16_t *)out.values)[row * DIM + i] = f32_to_f16(value);
#else
    const uint16_t stored = f32_to_f16(__fdiv_rn(warp_max(fabsf(value)), 127.0f));
    const float d = f16_to_f32(stored), q = d > 0.0f ? rintf(__fdiv_rn(value, d)) : 0.0f;
    if (i < DIM) { // a NaN becomes -127
        ((int8_t *)out.values)[row * DIM + i] = (int8_t)__float2int_rn(fminf(fmaxf(q, -127.0f), 127.0f));
        if (i % 32 == 0)
            out.scales[row * Side<DIM>::N_SCALES + i / 32] = stored;
    }
#endif
}

// Grid: (n_kv_heads, tokens, 2: k and v; 1 without values). A block is one warp for each 32 values of a head, a thread a
// value.
KERNEL(1024)
store_kv(const float *k, int64_t k_stride, const float *v, int64_t v_stride, Cache cache, const int *positions,
         const int *slots, const int *n_tokens) {
    const int head = blockIdx.x, token = blockIdx.y, i = threadIdx.x;
    if (token >= *n_tokens)
        return;
    if (blockIdx.z == 0)
        store(keys_of(cache, slots[token], head), positions[token], i, k + token * k_stride + head * KEY_DIM);
    else
        store(values_of(cache, slots[token], head), positions[token], i, v + token * v_stride + head * VALUE_DIM);
}

// The softmax over some positions, not yet divided: sum_p exp(score_p - largest) v_p, and sum_p exp(score_p - largest).
struct Part {
    float largest, sum;
};

// Grid: (n_kv_heads * N_TILES, n_parts, tokens from `first_token` on). values: float
// [grid tokens, n_heads, n_parts, VALUE_DIM]; parts: [grid tokens, n_heads, n_parts].
KERNEL(THREADS)
attend(const float *q, int64_t q_stride, Cache cache, const int *positions, const int *slots, float scale, int window,
       int chunk, float *values, Part *parts, int first_token, const int *n_tokens) {
    __shared__ float queries[HEADS][KEY_DIM];
    __shared__ float scores[HEADS][TILE]; // of a tile; then their exponentials
    __shared__ float rescale[HEADS];      // of what was added up before the tile
    __shared__ Part totals[HEADS];
    const int kv_head = blockIdx.x / N_TILES, first_head = blockIdx.x % N_TILES * HEADS, n_heads = min(HEADS, GROUP - first_head);
    const int part = blockIdx.y, n_parts = gridDim.y, token = first_token + blockIdx.z;
    if (token >= *n_tokens)
        return;
    const int position = positions[token], slot = slots[token], head = kv_head * GROUP + first_head;
    const int from = max(window ? max(0, position - window + 1) : 0, chunk ? position / chunk * chunk : 0);
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const Side<KEY_DIM> keys = keys_of(cache, slot, kv_head);
    const Values vals = values_of(cache, slot, kv_head);

    for (int i = thread; i < HEADS * KEY_DIM; i += THREADS)
        queries[i / KEY_DIM][i % KEY_DIM] = i / KEY_DIM < n_heads ? q[token * q_stride + head * KEY_DIM + i] * scale : 0.0f;
    if (thread < HEADS)
        totals[thread] = {NEVER, 0.0f};
    float acc[HEADS][THREAD_DIMS];
#pragma unroll
    for (int g = 0; g < HEADS; g++)
#pragma unroll
        for (int d = 0; d < THREAD_DIMS; d++)
            acc[g][d] = 0.0f;
    __syncthreads();

    // the first tile of this part that has a position in sight
    const int first_tile = from / TILE + (part - from / TILE % n_parts + n_parts) % n_parts;
    for (int first = first_tile * TILE; first <= position; first += n_parts * TILE) {
        const int begin = max(from - first, 0), end = min(TILE, position + 1 - first); // of what is seen of the tile
        for (int p = warp; p < TILE; p += N_WARPS) { // a warp multiplies one key with all queries
            const bool is_seen = p >= begin && p < end;
            float key[LANE_DIMS];
#pragma unroll
            for (int d = 0; d < LANE_DIMS; d++)
                key[d] = is_seen && d * WARP + lane < KEY_DIM ? keys.load(first + p, d * WARP + lane) : 0.0f;
#pragma unroll
            for (int g = 0; g < HEADS; g++) {
                float dot = 0.0f;
#pragma unroll
                for (int d = 0; d < LANE_DIMS; d++)
                    if (d * WARP + lane < KEY_DIM)
                        dot = __fmaf_rn(key[d], queries[g][d * WARP + lane], dot);
                dot = warp_sum(dot);
                if (lane == 0)
                    scores[g][p] = is_seen ? dot : NEVER;
            }
        }
        __syncthreads();
        for (int g = warp; g < HEADS; g += N_WARPS) { // a warp takes the exponentials of one query
            const Part before = totals[g];
            const float score = scores[g][lane], largest = fmaxf(before.largest, warp_max(score));
            const float e = lane >= begin && lane < end ? exp_canonical(score - largest) : 0.0f;
            const float sum = warp_sum(e);
            scores[g][lane] = e;
            __syncwarp(); // all have read the old total
            if (lane == 0) {
                rescale[g] = exp_canonical(before.largest - largest);
                totals[g] = {largest, __fmaf_rn(before.sum, exp_canonical(before.largest - largest), sum)};
            }
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < HEADS; g++)
#pragma unroll
            for (int d = 0; d < THREAD_DIMS; d++)
                acc[g][d] *= rescale[g];
#pragma unroll 4
        for (int p = begin; p < end; p++)
#pragma unroll
            for (int d = 0; d < THREAD_DIMS; d++)
                if (d * THREADS + thread < VALUE_DIM) {
                    const float value = vals.load(first + p, d * THREADS + thread);
#pragma unroll
                    for (int g = 0; g < HEADS; g++)
                        acc[g][d] = __fmaf_rn(scores[g][p], value, acc[g][d]);
                }
        __syncthreads();
    }

    const int64_t first_result = (int64_t)blockIdx.z * cache.n_kv_heads * GROUP + head;
#pragma unroll
    for (int g = 0; g < HEADS; g++) {
        const int64_t at = (first_result + g) * n_parts + part;
        if (g >= n_heads)
            continue;
        if (thread == 0)
            parts[at] = totals[g];
#pragma unroll
        for (int d = 0; d < THREAD_DIMS; d++)
            if (d * THREADS + thread < VALUE_DIM)
                values[at * VALUE_DIM + d * THREADS + thread] = acc[g][d];
    }
}

// Grid: (n_heads, tokens from `first_token` on). out: float32 rows of n_heads * VALUE_DIM. sinks: a score for each head
// that has no value, or null.
KERNEL(THREADS)
merge_parts(const float *values, const Part *parts, int n_parts, const float *sinks, float *out, int64_t out_stride,
            int first_token, const int *n_tokens) {
    const int head = blockIdx.x, token = first_token + blockIdx.y;
    if (token >= *n_tokens)
        return;
    const int64_t first = ((int64_t)blockIdx.y * gridDim.x + head) * n_parts;
    float largest = sinks ? sinks[head] : NEVER;
    for (int i = 0; i < n_parts; i++)
        largest = fmaxf(largest, parts[first + i].largest);
    float acc[THREAD_DIMS], sum = sinks ? exp_canonical(sinks[head] - largest) : 0.0f;
#pragma unroll
    for (int d = 0; d < THREAD_DIMS; d++)
        acc[d] = 0.0f;
    for (int i = 0; i < n_parts; i++) {
        const Part part = parts[first + i];
        if (part.sum == 0.0f) // no positions
            continue;
        const float factor = exp_canonical(part.largest - largest);
        sum = __fmaf_rn(part.sum, factor, sum);
#pragma unroll
        for (int d = 0; d < THREAD_DIMS; d++)
            if (d * THREADS + (int)threadIdx.x < VALUE_DIM)
                acc[d] = __fmaf_rn(values[(first + i) * VALUE_DIM + d * THREADS + threadIdx.x], factor, acc[d]);
    }
#pragma unroll
    for (int d = 0; d < THREAD_DIMS; d++)
        if (d * THREADS + (int)threadIdx.x < VALUE_DIM)
            out[token * out_stride + head * VALUE_DIM + d * THREADS + threadIdx.x] = __fdiv_rn(acc[d], sum);
}
