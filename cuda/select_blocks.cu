// The choice of the blocks of positions that attention looks at (`graph.SelectBlocks`): every head of small queries gives each
// position a score with the same small keys, a block counts as much as its best position, and those that count most are kept.
//
// Compiled as `indexer.cuh` says, and for BLOCK (positions of a block). For few tokens many blocks of threads score and one
// chooses for each head of a token; for many tokens one does both for one token after the other, with scores in rows of its
// own.
//
// A token chooses its newest blocks whatever they count, so only whole blocks are scored; with no more than top_k of them it
// chooses all.
#include "indexer.cuh"

constexpr int SCORED = BLOCK <= TILE ? TILE / BLOCK : 1; // blocks that are scored together

struct Shared {
    Keys keys;
    float scores[M_TILES * HEADS][TILE];
    Choice choice;
};

// What both kernels are given: where queries and keys are, and how many blocks are chosen, the newest of them always.
struct Inputs {
    const float *q;
    int64_t q_stride;
    Cache cache;
    const int *positions, *slots;
    int top_k, n_newest;
};

// Blocks that a token at `position` must choose among: all before the newest. 0: it takes all that there are.
DEVICE int blocks_to_score(int position, int top_k, int n_newest) {
    const int n_blocks = position / BLOCK + 1;
    return n_blocks <= top_k ? 0 : n_blocks - n_newest;
}

// Scores SCORED blocks from `block` on, of n blocks, into rows of each head; whole block of threads. Begins and ends with
// everybody done with `keys` and `scores`.
DEVICE void score_together(Shared &s, const Queries &queries, const Side<KEY_DIM> &side, int block, int n, float *scores,
                           int64_t scores_stride) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int n_scored = min(SCORED, n - block), end = (block + n_scored) * BLOCK;
    for (int first = block * BLOCK; first < end; first += TILE) {
        s.keys.load(side, first, end);
        if (warp / WARPS_PER_TILE < M_TILES)
            for (int p = warp % WARPS_PER_TILE * AT_ONCE; p < TILE && first + p < end; p += WARPS_PER_TILE * AT_ONCE) {
                float products[2][4] = {};
                queries.multiply(s.keys, p, products);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    s.scores[first_head() + lane / 4 + i % 4 / 2 * 8][p + i / 4 * 8 + lane % 4 * 2 + i % 2] =
                        products[i / 4][i % 4];
            }
        __syncthreads();
        for (int i = warp; i < N_HEADS * n_scored; i += N_WARPS) { // always the same warp for a head and a block
            const int head = i / n_scored, of_tile = BLOCK <= TILE ? i % n_scored * BLOCK : 0;
            const int n_positions = min(min(BLOCK, TILE), end - first);
            float largest = NEVER;
            for (int p = lane; p < n_positions; p += WARP)
                largest = fmaxf(largest, s.scores[head][of_tile + p]);
            largest = warp_max(largest);
            float &score = scores[head * scores_stride + block + i % n_scored];
            if (lane == 0)
                score = first == block * BLOCK ? largest : fmaxf(score, largest);
        }
        __syncthreads();
    }
}

// Writes the blocks that one head chooses; whole block of threads. Begins with all scores visible to it.
DEVICE void choose_blocks(Choice &s, const float *scores, int position, int top_k, int n_newest, int *out) {
    const int n_scored = blocks_to_score(position, top_k, n_newest), n_chosen = n_scored ? top_k - n_newest : 0;
    if (n_chosen)
        choose(s, scores, n_scored, n_chosen, out);
    choose_all(n_scored, position / BLOCK + 1, out + n_chosen);
}

// scores: float [tokens, N_HEADS, scores_stride]. Grid: (blocks, tokens); a block takes every n-th SCORED blocks.
KERNEL(THREADS)
score_blocks(Inputs in, float *scores, int64_t scores_stride, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    const int token = blockIdx.y;
    const int n = token < *n_tokens ? blocks_to_score(in.positions[token], in.top_k, in.n_newest) : 0;
    if ((int)blockIdx.x * SCORED >= n)
        return;
    const Side<KEY_DIM> side = keys_of(in.cache, in.slots[token], 0);
    const Queries queries(in.q + token * in.q_stride);
    s.keys.clear_margins();
    for (int block = blockIdx.x * SCORED; block < n; block += gridDim.x * SCORED)
        score_together(s, queries, side, block, n, scores + token * N_HEADS * scores_stride, scores_stride);
}

// out: int32 [tokens, out_stride], top_k of them for each head. Grid: (N_HEADS, tokens).
KERNEL(THREADS)
choose_blocks_of_heads(Inputs in, const float *scores, int64_t scores_stride, int *out, int64_t out_stride,
                       const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    const int head = blockIdx.x, token = blockIdx.y;
    if (token < *n_tokens)
        choose_blocks(s.choice, scores + (token * N_HEADS + head) * scores_stride, in.positions[token], in.top_k, in.n_newest,
                      out + token * out_stride + head * in.top_k);
}

// Both, for many tokens, the last ones first: they have most to do. scores: rows for each block. Grid: blocks.
KERNEL(THREADS)
select_blocks(Inputs in, float *scores, int64_t scores_stride, int *out, int64_t out_stride, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    s.keys.clear_margins();
    scores += blockIdx.x * N_HEADS * scores_stride;
    for (int token = *n_tokens - 1 - (int)blockIdx.x; token >= 0; token -= gridDim.x) {
        const int position = in.positions[token], n = blocks_to_score(position, in.top_k, in.n_newest);
        if (n) {
            const Side<KEY_DIM> side = keys_of(in.cache, in.slots[token], 0);
            const Queries queries(in.q + token * in.q_stride);
            for (int block = 0; block < n; block += SCORED)
                score_together(s, queries, side, block, n, scores, scores_stride);
        }
        for (int head = 0; head < N_HEADS; head++)
            choose_blocks(s.choice, scores + head * scores_stride, position, in.top_k, in.n_newest,
                          out + token * out_stride + head * in.top_k);
    }
}
