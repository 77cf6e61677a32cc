// The choice of the positions that attention looks at (`graph.SelectPositions`): small queries and keys give every position a
// score, the highest are kept.
//
// Compiled as `indexer.cuh` says. What its tiles of heads give is added up in order, so a score is made of the same sums
// whatever the step. For few tokens many blocks score and one of each token chooses; for many tokens a block does both for
// one token after the other, with scores in a row of its own.
//
// A token at position p < top_k chooses all positions, without scores. Where tokens share rows of the cache, these stand for
// positions, or with `has_tail` for blocks of them: behind those that are chosen stands the one that is not whole.
#include "indexer.cuh"

struct Shared {
    Keys keys;
    float sums[M_TILES][TILE];
    Choice choice;
};

// What both kernels are given: where queries, weights and keys are, and how many positions are chosen.
struct Inputs {
    const float *q;
    int64_t q_stride;
    const float *weights; // null: all 1
    int64_t weights_stride;
    Cache cache;
    const int *positions, *slots;
    float scale;
    int top_k, has_tail;
};

// A lane's share of its warp's heads, and their weights.
struct Weighted {
    Queries queries;
    float weights[2];

    __device__ __forceinline__ Weighted(const Inputs &in, int token) : queries(in.q + token * in.q_stride) {
        const float *w = in.weights + token * in.weights_stride;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int head = first_head() + threadIdx.x % WARP / 4 + r * 8;
            weights[r] = head < N_HEADS ? (in.weights ? w[head] : 1.0f) * in.scale : 0.0f;
        }
    }
};

// Scores the tile that begins at position `first`, of n positions; whole block. Begins and ends with everybody done with
// `keys` and `sums`.
DEVICE void score_tile(Shared &s, const Weighted &heads, const Side<KEY_DIM> &side, int first, int n, float *scores) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, m_tile = warp / WARPS_PER_TILE;
    s.keys.load(side, first, n);
    if (m_tile < M_TILES)
        for (int p = warp % WARPS_PER_TILE * AT_ONCE; p < TILE && first + p < n; p += WARPS_PER_TILE * AT_ONCE) {
            float products[2][4] = {};
            heads.queries.multiply(s.keys, p, products);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *two = &products[i / 2][i % 2];
                float sum = __fmaf_rn(heads.weights[1], fmaxf(two[2], 0.0f), heads.weights[0] * fmaxf(two[0], 0.0f));
                for (int lanes = 4; lanes < WARP; lanes *= 2)
                    sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
                if (lane < 4)
                    s.sums[m_tile][p + i / 2 * 8 + lane * 2 + i % 2] = sum;
            }
        }
    __syncthreads();
    const int p = threadIdx.x;
    if (p < TILE && first + p < n) {
        float score = s.sums[0][p];
        for (int m = 1; m < M_TILES; m++)
            score += s.sums[m][p];
        scores[first + p] = score;
    }
    __syncthreads();
}

// Writes which of n a token chooses, by their scores if there are more than top_k; whole block of threads.
DEVICE void choose_rows(Shared &s, const float *scores, int n, int top_k, int has_tail, int *out) {
    if (n > top_k) {
        choose(s.choice, scores, n, top_k, out);
        choose_all(n, n + has_tail, out + top_k);
    } else
        choose_all(0, n + has_tail, out);
}

// scores: float [tokens, scores_stride]. Grid: (blocks, tokens); a block takes every n-th tile.
KERNEL(THREADS)
score_positions(Inputs in, float *scores, int64_t scores_stride, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    const int token = blockIdx.y, n = token < *n_tokens ? in.cache.rows_up_to(in.positions[token]) : 0;
    if (n <= in.top_k || (int)blockIdx.x * TILE >= n)
        return;
    const Side<KEY_DIM> side = keys_of(in.cache, in.slots[token], 0);
    const Weighted heads(in, token);
    s.keys.clear_margins();
    for (int first = blockIdx.x * TILE; first < n; first += gridDim.x * TILE)
        score_tile(s, heads, side, first, n, scores + token * scores_stride);
}

// out: int32 [tokens, out_stride], top_k of them and perhaps a tail. Grid: tokens.
KERNEL(THREADS)
choose_positions(const float *scores, int64_t scores_stride, Cache cache, const int *positions, int top_k, int has_tail,
                 int *out, int64_t out_stride, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    const int token = blockIdx.x;
    scores += token * scores_stride, out += token * out_stride;
    if (token < *n_tokens)
        choose_rows(s, scores, cache.rows_up_to(positions[token]), top_k, has_tail, out);
}

// Both, for many tokens, the last ones first: they have most to do. scores: a row for each block. Grid: blocks.
KERNEL(THREADS)
select_positions(Inputs in, float *scores, int64_t scores_stride, int *out, int64_t out_stride, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    s.keys.clear_margins();
    scores += blockIdx.x * scores_stride;
    for (int token = *n_tokens - 1 - (int)blockIdx.x; token >= 0; token -= gridDim.x) {
        const int n = in.cache.rows_up_to(in.positions[token]);
        if (n > in.top_k) {
            const Side<KEY_DIM> side = keys_of(in.cache, in.slots[token], 0);
            const Weighted heads(in, token);
            for (int first = 0; first < n; first += TILE)
                score_tile(s, heads, side, first, n, scores);
        }
        choose_rows(s, scores, n, in.top_k, in.has_tail, out + token * out_stride);
    }
}
