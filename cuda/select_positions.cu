// The choice of the positions that attention looks at (`graph.SelectPositions`): small queries and keys give every position a
// score, the highest are kept.
//
// Compiled as `kv_cache.cuh` says, for a cache without values, and for N_HEADS (of the queries).
//
// Sixteen heads and sixteen positions are a matter of tensor cores, with a query as the sum of two float16 numbers and
// float32 sums, as in `attention.cu`. A warp takes the heads of one of M_TILES tiles and some of the positions of a tile of
// 128; what the tiles of heads give is added up in order, so a score is made of the same sums whatever the step. For few
// tokens many blocks score and one of each token chooses; for many tokens a block does both for one token after the other,
// with scores in a row of its own.
//
// A token at position p < top_k chooses all positions, without scores.
#include "kv_cache.cuh"

constexpr int N_WARPS = 16, THREADS = N_WARPS * WARP;
constexpr int TILE = 128, AT_ONCE = 16; // positions: of a tile, and those that a warp scores together
constexpr int HEADS = 16, M_TILES = (N_HEADS + HEADS - 1) / HEADS, WARPS_PER_TILE = N_WARPS / M_TILES;
constexpr int KEY_STEPS = (KEY_DIM + 15) / 16;
constexpr int KEY_STRIDE = 16 * KEY_STEPS + 8; // ldmatrix then meets no bank twice; what is beyond a key is zero
constexpr int DIGIT = 11, N_DIGITS = 3;        // of a rank, the last one of 10 bits

struct Shared {
    __align__(16) uint16_t keys[PLANES][TILE][KEY_STRIDE];
    float sums[M_TILES][TILE];
    int counts[1 << DIGIT];
    int n_above[N_WARPS], n_equal[N_WARPS]; // positions of each warp's stretch
    unsigned lowest;                        // digits of the lowest rank that is chosen
    int n_left;                             // of those that agree with them

    // Zeroes what is beyond the keys, once; a barrier follows.
    __device__ __forceinline__ void clear_margins() {
        constexpr int N = KEY_STRIDE - KEY_DIM;
        for (int i = threadIdx.x; i < PLANES * TILE * N; i += THREADS)
            keys[i / (TILE * N)][i / N % TILE][KEY_DIM + i % N] = 0;
    }
};

// What both kernels are given: where queries, weights and keys are, and how many positions are chosen.
struct Inputs {
    const float *q;
    int64_t q_stride;
    const float *weights;
    int64_t weights_stride;
    Cache cache;
    const int *positions, *slots;
    float scale;
    int top_k;
};

// A lane's share of its warp's heads, rows g and g + 8 of matrices that tensor cores take, and their weights.
struct Queries {
    unsigned halves[KEY_STEPS][2][4]; // [][0]: float16 numbers, [][1]: what they miss
    float weights[2];

    __device__ __forceinline__ Queries(const Inputs &in, int token) {
        const int lane = threadIdx.x % WARP, first_head = threadIdx.x / WARP / WARPS_PER_TILE * HEADS;
        const float *q = in.q + token * in.q_stride, *w = in.weights + token * in.weights_stride;
#pragma unroll
        for (int step = 0; step < KEY_STEPS; step++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int head = first_head + lane / 4 + r % 2 * 8, i = step * 16 + lane % 4 * 2 + r / 2 * 8;
                const bool exists = head < N_HEADS && i < KEY_DIM;
                const float2 x = exists ? *(const float2 *)(q + head * KEY_DIM + i) : make_float2(0.0f, 0.0f);
                split_halves(x.x, x.y, halves[step][0][r], halves[step][1][r]);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int head = first_head + lane / 4 + r * 8;
            weights[r] = head < N_HEADS ? w[head] * in.scale : 0.0f;
        }
    }
};

// Scores the tile that begins at position `first`, of n positions; whole block. Begins and ends with everybody done with
// `keys` and `sums`.
DEVICE void score_tile(Shared &s, const Queries &queries, const Side<KEY_DIM> &side, int first, int n, float *scores) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, heads = warp / WARPS_PER_TILE;
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * (KEY_DIM / VECTOR); i += THREADS) {
        const int p = i / (KEY_DIM / VECTOR), column = i % (KEY_DIM / VECTOR) * VECTOR;
        const Piece piece = first + p < n ? side.load(first + p, column) : Piece{};
        piece.put(&s.keys[0][p][column], TILE * KEY_STRIDE);
    }
    __syncthreads();
    if (heads < M_TILES)
        for (int p = warp % WARPS_PER_TILE * AT_ONCE; p < TILE && first + p < n; p += WARPS_PER_TILE * AT_ONCE) {
            float products[2][4] = {};
#pragma unroll
            for (int step = 0; step < KEY_STEPS; step++) {
                unsigned b[PLANES][4];
#pragma unroll
                for (int plane = 0; plane < PLANES; plane++)
                    ldmatrix_x4(b[plane], &s.keys[plane][p + lane % 8 + lane / 16 * 8][step * 16 + lane / 8 % 2 * 8]);
                add_products(products[0], queries.halves[step], b, 0);
                add_products(products[1], queries.halves[step], b, 1);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *two = &products[i / 2][i % 2];
                float sum = __fmaf_rn(queries.weights[1], fmaxf(two[2], 0.0f), queries.weights[0] * fmaxf(two[0], 0.0f));
                for (int lanes = 4; lanes < WARP; lanes *= 2)
                    sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
                if (lane < 4)
                    s.sums[heads][p + i / 2 * 8 + lane * 2 + i % 2] = sum;
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

// A number that is larger for a larger score; NaNs are at the ends.
DEVICE unsigned rank_of(float score) {
    const unsigned bits = __float_as_uint(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Lane 0 has the highest 1/32 of the digits: finds the one that the n_left-th highest rank has. The first warp.
DEVICE void find_digit(Shared &s, int width) {
    const int lane = threadIdx.x % WARP, n_own = (1 << width) / WARP, top = (1 << width) - 1 - lane * n_own;
    int own = 0;
    for (int i = 0; i < n_own; i++)
        own += s.counts[top - i];
    int up_to = own;
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, up_to, step);
        up_to += lane >= step ? other : 0;
    }
    int n_left = s.n_left - (up_to - own);
    __syncwarp();
    if (n_left <= 0 || n_left > own)
        return;
    int digit = top;
    for (; s.counts[digit] < n_left; digit--)
        n_left -= s.counts[digit];
    s.lowest = s.lowest << width | (unsigned)digit;
    s.n_left = n_left;
}

// Writes the top_k highest of n scores, which are more; whole block. Begins with all scores visible to it.
DEVICE void choose(Shared &s, const float *scores, int n, int top_k, int *out) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0)
        s.lowest = 0, s.n_left = top_k;
    for (int i = 0, shift = 32; i < N_DIGITS; i++) {
        const int width = i < N_DIGITS - 1 ? DIGIT : 32 - (N_DIGITS - 1) * DIGIT;
        shift -= width;
        for (int j = threadIdx.x; j < 1 << DIGIT; j += THREADS)
            s.counts[j] = 0;
        __syncthreads();
        const unsigned lowest = s.lowest;
#pragma unroll 4
        for (int p = threadIdx.x; p < n; p += THREADS) {
            const unsigned rank = rank_of(scores[p]);
            if (i == 0 || rank >> (shift + width) == lowest)
                atomicAdd(&s.counts[rank >> shift & ((1u << width) - 1)], 1);
        }
        __syncthreads();
        if (warp == 0)
            find_digit(s, width);
        __syncthreads();
    }
    // Each warp takes a stretch of positions: first it counts, then it knows where to write.
    const unsigned lowest = s.lowest, before_lane = (1u << lane) - 1;
    const int n_left = s.n_left, stretch = (n + THREADS - 1) / THREADS * WARP;
    const int begin = min(warp * stretch, n), end = min(begin + stretch, n);
    int above = 0, equal = 0;
#pragma unroll 4
    for (int first = begin; first < end; first += WARP) {
        const unsigned rank = first + lane < end ? rank_of(scores[first + lane]) : 0;
        above += __popc(__ballot_sync(ALL_LANES, rank > lowest));
        equal += __popc(__ballot_sync(ALL_LANES, first + lane < end && rank == lowest));
    }
    if (lane == 0)
        s.n_above[warp] = above, s.n_equal[warp] = equal;
    __syncthreads();
    above = equal = 0;
    for (int w = 0; w < warp; w++)
        above += s.n_above[w], equal += s.n_equal[w];
    for (int first = begin; first < end; first += WARP) {
        const unsigned rank = first + lane < end ? rank_of(scores[first + lane]) : 0;
        const bool is_above = rank > lowest, is_equal = first + lane < end && rank == lowest;
        const unsigned all_above = __ballot_sync(ALL_LANES, is_above), all_equal = __ballot_sync(ALL_LANES, is_equal);
        const int n_equal = equal + __popc(all_equal & before_lane);
        if (is_above || (is_equal && n_equal < n_left))
            out[above + __popc(all_above & before_lane) + min(n_equal, n_left)] = first + lane;
        above += __popc(all_above), equal += __popc(all_equal);
    }
    __syncthreads();
}

DEVICE void choose_all(int position, int *out) {
    for (int p = threadIdx.x; p <= position; p += THREADS)
        out[p] = p;
}

// scores: float [tokens, scores_stride]. Grid: (blocks, tokens); a block takes every n-th tile.
KERNEL(THREADS)
score_positions(Inputs in, float *scores, int64_t scores_stride, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    const int token = blockIdx.y, n = token < *n_tokens ? in.positions[token] + 1 : 0;
    if (n <= in.top_k || (int)blockIdx.x * TILE >= n)
        return;
    const Side<KEY_DIM> side = keys_of(in.cache, in.slots[token], 0);
    const Queries queries(in, token);
    s.clear_margins();
    for (int first = blockIdx.x * TILE; first < n; first += gridDim.x * TILE)
        score_tile(s, queries, side, first, n, scores + token * scores_stride);
}

// out: int32 [tokens, out_stride], top_k of them. Grid: tokens.
KERNEL(THREADS)
choose_positions(const float *scores, int64_t scores_stride, const int *positions, int top_k, int *out, int64_t out_stride,
                 const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    const int token = blockIdx.x;
    if (token >= *n_tokens)
        return;
    if (positions[token] < top_k)
        choose_all(positions[token], out + token * out_stride);
    else
        choose(s, scores + token * scores_stride, positions[token] + 1, top_k, out + token * out_stride);
}

// Both, for many tokens, the last ones first: they have most to do. scores: a row for each block. Grid: blocks.
KERNEL(THREADS)
select_positions(Inputs in, float *scores, int64_t scores_stride, int *out, int64_t out_stride, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &s = *(Shared *)dynamic;
    begin_kernel();
    s.clear_margins();
    scores += blockIdx.x * scores_stride;
    for (int token = *n_tokens - 1 - (int)blockIdx.x; token >= 0; token -= gridDim.x) {
        const int n = in.positions[token] + 1;
        if (n <= in.top_k) {
            choose_all(n - 1, out + token * out_stride);
            continue;
        }
        const Side<KEY_DIM> side = keys_of(in.cache, in.slots[token], 0);
        const Queries queries(in, token);
        for (int first = 0; first < n; first += TILE)
            score_tile(s, queries, side, first, n, scores);
        choose(s, scores, n, in.top_k, out + token * out_stride);
    }
}
