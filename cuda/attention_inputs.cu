// What attention reads: heads of queries, keys and values as the projections make them, normalised if wanted (weight * x /
// sqrt(mean(x^2) + eps)), then rotated if wanted; queries go to rows of their own, keys and values to the cache. Keys are
// rotated by their position rounded down to a multiple of `rope_period`.
//
// Compiled as `kv_cache.cuh` says. Grid: (ceil(heads / 4), tokens), where heads are those of the queries (none if they stay
// as they are), then of the keys, then of the values, if there are any; a warp takes one.
#include "kv_cache.cuh"
#include "rope.cuh"

constexpr int N_WARPS = 4;
constexpr int MAX_DIM = KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM;
constexpr int PER_LANE = (MAX_DIM + WARP - 1) / WARP, PAIRS = (KEY_DIM / 2 + WARP - 1) / WARP;

// Heads of all tokens, and what is done with them.
struct Heads {
    const float *x;      // float32 rows
    int64_t stride;      // values from token to token
    const float *weight; // of the norm, for each value of a head; null for 1
    int n;               // of a token
    int step;            // values from head to head
    int normalize, rotate;
};

KERNEL(N_WARPS *WARP)
attention_inputs(Heads q, float *q_out, int64_t q_out_stride, Heads k, Heads v, float eps, const float *frequencies, int n_rot,
                 int is_adjacent, float magnitude, int rope_period, Cache cache, const int *positions, const int *slots,
                 const int *n_tokens) {
    __shared__ float heads[N_WARPS][MAX_DIM];
    __shared__ Turn turns[N_WARPS][PAIRS * WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, token = blockIdx.y, unit = blockIdx.x * N_WARPS + warp;
    const bool exists = token < *n_tokens && unit < q.n + k.n + v.n;
    const int kind = unit < q.n ? 0 : unit < q.n + k.n ? 1 : 2, head = unit - (kind > 0 ? q.n : 0) - (kind > 1 ? k.n : 0);
    const Heads own = kind == 0 ? q : kind == 1 ? k : v;
    const int dim = kind == 2 ? VALUE_DIM : KEY_DIM, position = exists ? positions[token] : 0, slot = exists ? slots[token] : 0;

    const int angle_at = kind == 0 ? position : position / rope_period * rope_period;

    // What does not depend on the kernel before.
    float weight[PER_LANE];
    const bool has_weight = exists && own.normalize && own.weight;
    if (has_weight)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            weight[j] = j * WARP + lane < dim ? own.weight[j * WARP + lane] : 0.0f;
    if (exists && own.rotate)
#pragma unroll 1
        for (int i = lane; i < n_rot / 2; i += WARP)
            turns[warp][i] = turn_of(angle_at, frequencies[i], magnitude);
    begin_kernel();
    if (!exists)
        return;

    const float *from = own.x + token * own.stride + head * own.step;
    float *x = heads[warp], values[PER_LANE], squares = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        values[j] = j * WARP + lane < dim ? from[j * WARP + lane] : 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        squares = __fmaf_rn(values[j], values[j], squares);
    const float factor =
        own.normalize ? __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(warp_sum(squares), (float)dim) + eps)) : 1.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        if (j * WARP + lane < dim)
            x[j * WARP + lane] = has_weight ? values[j] * factor * weight[j] : values[j] * factor;
    __syncwarp();
    if (own.rotate)
#pragma unroll 1
        for (int i = lane; i < n_rot / 2; i += WARP)
            rotate(x, i, n_rot, is_adjacent, turns[warp][i]);
    __syncwarp();
    if (kind == 0)
        for (int i = lane; i < KEY_DIM; i += WARP)
            q_out[token * q_out_stride + head * KEY_DIM + i] = x[i];
    else if ((position + 1) % cache.period == 0) {
        const int row = position / cache.period;
        if (kind == 1) {
            const Side<KEY_DIM> keys = keys_of(cache, slot, head);
            keys.store(keys.row_of(row), x);
        } else {
            const Side<VALUE_DIM> values = values_of(cache, slot, head);
            values.store(values.row_of(row), x);
        }
    }
}
