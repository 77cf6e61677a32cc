// Attention of a step's tokens over the cache of keys and values, in three kernels: store the new keys and values,
// attend over parts of the positions, merge the parts.
//
// Compiled for KV_TYPE (0 float32, 1 float16, 2 int8 with a float16 scale for each 32 values), HEAD_DIM (a multiple of
// 8 up to 256) and GROUP (query heads that share a key head). A cache holds K and then V, each
// [n_slots, context_length, n_kv_heads, HEAD_DIM] of its type, and for int8 then the scales of K and of V,
// [n_slots, context_length, n_kv_heads, ceil(HEAD_DIM / 32)].
//
// Positions are taken in tiles of 32, tile i by part i % n_parts, and parts are merged in order: what a token's result
// is made of depends on its position alone, not on how a prompt was cut or what else is in the step.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int N_WARPS = THREADS / WARP;
constexpr int TILE = 32;
constexpr int N_SCALES = (HEAD_DIM + 31) / 32;                // of one head of int8
constexpr int LANE_DIMS = (HEAD_DIM + WARP - 1) / WARP;       // of a head that a lane reads
constexpr int THREAD_DIMS = (HEAD_DIM + THREADS - 1) / THREADS; // of a head that a thread adds up

// Keys or values of all positions of one sequence and one head.
struct Side {
    uint8_t *values;  // of position 0
    uint16_t *scales; // likewise
    int n_kv_heads;

    __device__ __forceinline__ float load(int position, int i) const {
        const int64_t row = (int64_t)position * n_kv_heads;
#if KV_TYPE == 0
        return ((const float *)values)[row * HEAD_DIM + i];
#elif KV_TYPE == 1
        return f16_to_f32(((const uint16_t *)values)[row * HEAD_DIM + i]);
#else
        return f16_to_f32(scales[row * N_SCALES + i / 32]) * (float)((const int8_t *)values)[row * HEAD_DIM + i];
#endif
    }
};

// side: 0 keys, 1 values.
DEVICE Side cache_side(uint8_t *cache, int side, int n_slots, int context_length, int n_kv_heads, int slot, int head) {
    constexpr int BYTES = KV_TYPE == 0 ? 4 : KV_TYPE == 1 ? 2 : 1;
    const int64_t n = (int64_t)n_slots * context_length * n_kv_heads; // heads in one side
    const int64_t first = (int64_t)slot * context_length * n_kv_heads + head;
    uint16_t *scales = (uint16_t *)(cache + 2 * n * HEAD_DIM * BYTES);
    return {cache + (side * n + first) * HEAD_DIM * BYTES, scales + (side * n + first) * N_SCALES, n_kv_heads};
}

// Grid: (n_kv_heads, tokens, 2: k and v). A block is one warp for each 32 values of a head, a thread a value.
KERNEL(256)
store_kv(const float *k, int64_t k_stride, const float *v, int64_t v_stride, uint8_t *cache, const int *positions,
         const int *slots, int n_slots, int context_length, int n_kv_heads, const int *n_tokens) {
    const int head = blockIdx.x, token = blockIdx.y, side = blockIdx.z, i = threadIdx.x;
    if (token >= *n_tokens)
        return;
    const Side out = cache_side(cache, side, n_slots, context_length, n_kv_heads, slots[token], head);
    const float *x = (side ? v + token * v_stride : k + token * k_stride) + head * HEAD_DIM;
    const int64_t row = (int64_t)positions[token] * n_kv_heads;
    const float value = i < HEAD_DIM ? x[i] : 0.0f;
#if KV_TYPE == 0
    if (i < HEAD_DIM)
        ((float *)out.values)[row * HEAD_DIM + i] = value;
#elif KV_TYPE == 1
    if (i < HEAD_DIM)
        ((uint16_t *)out.values)[row * HEAD_DIM + i] = f32_to_f16(value);
#else
    const uint16_t stored = f32_to_f16(__fdiv_rn(warp_max(fabsf(value)), 127.0f));
    const float d = f16_to_f32(stored), q = d > 0.0f ? rintf(__fdiv_rn(value, d)) : 0.0f;
    if (i < HEAD_DIM) // a NaN becomes -127
        ((int8_t *)out.values)[row * HEAD_DIM + i] = (int8_t)__float2int_rn(fminf(fmaxf(q, -127.0f), 127.0f));
    if (i % 32 == 0)
        out.scales[row * N_SCALES + i / 32] = stored;
#endif
}

// The softmax over some positions, not yet divided: sum_p exp(score_p - largest) v_p, and sum_p exp(score_p - largest).
struct Part {
    float largest, sum;
};

// Grid: (n_kv_heads, n_parts, tokens from `first_token` on). values: float [grid tokens, n_heads, n_parts, HEAD_DIM];
// parts: [grid tokens, n_heads, n_parts].
KERNEL(THREADS)
attend(const float *q, int64_t q_stride, uint8_t *cache, const int *positions, const int *slots, int n_slots,
       int context_length, int n_kv_heads, float scale, float *values, Part *parts, int first_token,
       const int *n_tokens) {
    __shared__ float queries[GROUP][HEAD_DIM];
    __shared__ float scores[GROUP][TILE]; // of a tile; then their exponentials
    __shared__ float rescale[GROUP];      // of what was added up before the tile
    __shared__ Part totals[GROUP];
    const int kv_head = blockIdx.x, part = blockIdx.y, n_parts = gridDim.y, token = first_token + blockIdx.z;
    if (token >= *n_tokens)
        return;
    const int n_positions = positions[token] + 1, slot = slots[token];
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const Side keys = cache_side(cache, 0, n_slots, context_length, n_kv_heads, slot, kv_head);
    const Side vals = cache_side(cache, 1, n_slots, context_length, n_kv_heads, slot, kv_head);

    for (int i = thread; i < GROUP * HEAD_DIM; i += THREADS)
        queries[i / HEAD_DIM][i % HEAD_DIM] = q[token * q_stride + kv_head * GROUP * HEAD_DIM + i] * scale;
    if (thread < GROUP)
        totals[thread] = {NEVER, 0.0f};
    float acc[GROUP][THREAD_DIMS];
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int d = 0; d < THREAD_DIMS; d++)
            acc[g][d] = 0.0f;
    __syncthreads();

    for (int first = part * TILE; first < n_positions; first += n_parts * TILE) {
        const int n = min(TILE, n_positions - first);
        for (int p = warp; p < TILE; p += N_WARPS) { // a warp multiplies one key with all queries
            float key[LANE_DIMS];
#pragma unroll
            for (int d = 0; d < LANE_DIMS; d++)
                key[d] = p < n && d * WARP + lane < HEAD_DIM ? keys.load(first + p, d * WARP + lane) : 0.0f;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float dot = 0.0f;
#pragma unroll
                for (int d = 0; d < LANE_DIMS; d++)
                    if (d * WARP + lane < HEAD_DIM)
                        dot = __fmaf_rn(key[d], queries[g][d * WARP + lane], dot);
                dot = warp_sum(dot);
                if (lane == 0)
                    scores[g][p] = p < n ? dot : NEVER;
            }
        }
        __syncthreads();
        for (int g = warp; g < GROUP; g += N_WARPS) { // a warp takes the exponentials of one query
            const Part before = totals[g];
            const float score = scores[g][lane], largest = fmaxf(before.largest, warp_max(score));
            const float e = lane < n ? exp_canonical(score - largest) : 0.0f;
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
        for (int g = 0; g < GROUP; g++)
#pragma unroll
            for (int d = 0; d < THREAD_DIMS; d++)
                acc[g][d] *= rescale[g];
        for (int p = 0; p < n; p++)
#pragma unroll
            for (int d = 0; d < THREAD_DIMS; d++)
                if (d * THREADS + thread < HEAD_DIM) {
                    const float value = vals.load(first + p, d * THREADS + thread);
#pragma unroll
                    for (int g = 0; g < GROUP; g++)
                        acc[g][d] = __fmaf_rn(scores[g][p], value, acc[g][d]);
                }
        __syncthreads();
    }

    const int64_t head = ((int64_t)blockIdx.z * n_kv_heads + kv_head) * GROUP;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const int64_t at = (head + g) * n_parts + part;
        if (thread == 0)
            parts[at] = totals[g];
#pragma unroll
        for (int d = 0; d < THREAD_DIMS; d++)
            if (d * THREADS + thread < HEAD_DIM)
                values[at * HEAD_DIM + d * THREADS + thread] = acc[g][d];
    }
}

// Grid: (n_heads, tokens from `first_token` on). out: float32 rows of n_heads * HEAD_DIM.
KERNEL(THREADS)
merge_parts(const float *values, const Part *parts, int n_parts, float *out, int64_t out_stride, int first_token,
            const int *n_tokens) {
    const int head = blockIdx.x, token = first_token + blockIdx.y;
    if (token >= *n_tokens)
        return;
    const int64_t first = ((int64_t)blockIdx.y * gridDim.x + head) * n_parts;
    float largest = NEVER;
    for (int i = 0; i < n_parts; i++)
        largest = fmaxf(largest, parts[first + i].largest);
    float acc[THREAD_DIMS], sum = 0.0f;
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
            if (d * THREADS + (int)threadIdx.x < HEAD_DIM)
                acc[d] = __fmaf_rn(values[(first + i) * HEAD_DIM + d * THREADS + threadIdx.x], factor, acc[d]);
    }
#pragma unroll
    for (int d = 0; d < THREAD_DIMS; d++)
        if (d * THREADS + (int)threadIdx.x < HEAD_DIM)
            out[token * out_stride + head * HEAD_DIM + d * THREADS + threadIdx.x] = __fdiv_rn(acc[d], sum);
}
