// What attention reads: heads of queries, keys and values as the projections make them, normalised if wanted (weight * x /
// sqrt(mean(x^2) + eps)), then rotated if wanted; queries go to rows of their own, keys and values to the cache.
//
// Compiled as `kv_cache.cuh` says. Grid: (ceil(heads / 4), tokens), where heads are those of the queries (none if they stay
// as they are), then of the keys, then of the values, if there are any; a warp takes one.
#include "kv_cache.cuh"
#include "rope.cuh"

constexpr int N_WARPS = 4;
constexpr int MAX_DIM = KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM;

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
                 int is_adjacent, float magnitude, Cache cache, const int *positions, const int *slots, const int *n_tokens) {
    begin_kernel();
    __shared__ float heads[N_WARPS][MAX_DIM];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, token = blockIdx.y, unit = blockIdx.x * N_WARPS + warp;
    if (token >= *n_tokens || unit >= q.n + k.n + v.n)
        return;
    const int kind = unit < q.n ? 0 : unit < q.n + k.n ? 1 : 2, head = unit - (kind > 0 ? q.n : 0) - (kind > 1 ? k.n : 0);
    const Heads own = kind == 0 ? q : kind == 1 ? k : v;
    const int dim = kind == 2 ? VALUE_DIM : KEY_DIM, position = positions[token], slot = slots[token];

    const float *from = own.x + token * own.stride + head * own.step;
    float *x = heads[warp], squares = 0.0f;
    for (int i = lane; i < dim; i += WARP) {
        x[i] = from[i];
        squares = __fmaf_rn(x[i], x[i], squares);
    }
    if (own.normalize) {
        const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(warp_sum(squares), (float)dim) + eps));
        for (int i = lane; i < dim; i += WARP)
            x[i] = own.weight ? x[i] * factor * own.weight[i] : x[i] * factor;
    }
    __syncwarp();
    if (own.rotate)
        for (int i = lane; i < n_rot / 2; i += WARP)
            rotate(x, i, n_rot, is_adjacent, position, frequencies[i], magnitude);
    __syncwarp();
    if (kind == 0)
        for (int i = lane; i < KEY_DIM; i += WARP)
            q_out[token * q_out_stride + head * KEY_DIM + i] = x[i];
    else if (kind == 1)
        keys_of(cache, slot, head).store(position, x);
    else
        values_of(cache, slot, head).store(position, x);
}
