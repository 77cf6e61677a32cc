// The choice of the positions that attention looks at (`graph.SelectPositions`): small queries and keys give every position a
// score, the highest are kept.
//
// Compiled as `kv_cache.cuh` says, for a cache without values, and for N_HEADS (of the queries).
//
// A tile is 32 positions, a lane of each warp takes one. The warps share the heads, and add up what they have in order: a
// score is made of the same sums whatever the step. For few tokens many blocks score and one of each token chooses; for
// many tokens a block does both for one token after the other, with scores in a row of its own.
//
// A token at position p < top_k chooses all positions, without scores.
#include "kv_cache.cuh"

constexpr int N_WARPS = 16, THREADS = N_WARPS * WARP;
constexpr int TILE = WARP;
constexpr int PER_WARP = (N_HEADS + N_WARPS - 1) / N_WARPS, AT_ONCE = PER_WARP < 4 ? PER_WARP : 4; // heads
constexpr int KEY_STRIDE = KEY_DIM + 4;                                                          // no bank twice
constexpr int DIGIT = 11, N_DIGITS = 3; // of a rank, the last one of 10 bits

struct Shared {
    __align__(16) float q[N_HEADS][KEY_DIM];
    __align__(16) float keys[TILE][KEY_STRIDE];
    float weights[N_HEADS], sums[N_WARPS][TILE];
    int counts[1 << DIGIT];
    int n_above[N_WARPS], n_equal[N_WARPS]; // positions of each warp's stretch
    unsigned lowest;                        // digits of the lowest rank that is chosen
    int n_left;                             // of those that agree with them
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

DEVICE void load_queries(Shared &s, const Inputs &in, int token) {
    for (int i = threadIdx.x; i < N_HEADS * KEY_DIM; i += THREADS)
        s.q[i / KEY_DIM][i % KEY_DIM] = in.q[token * in.q_stride + i];
    for (int i = threadIdx.x; i < N_HEADS; i += THREADS)
        s.weights[i] = in.weights[token * in.weights_stride + i] * in.scale;
}

// Scores the tile that begins at position `first`, of n positions; whole block. Begins with everybody done with `keys`, and
// the queries loaded before the barrier inside.
DEVICE void score_tile(Shared &s, const Side<KEY_DIM> &side, int first, int n, float *scores) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int i = threadIdx.x; i < TILE * (KEY_DIM / VECTOR); i += THREADS) {
        const int p = i / (KEY_DIM / VECTOR), column = i % (KEY_DIM / VECTOR) * VECTOR;
        float x[VECTOR] = {};
        if (first + p < n)
            side.load(first + p, column).unpack(x);
        *(float4 *)&s.keys[p][column] = make_float4(x[0], x[1], x[2], x[3]);
        *(float4 *)&s.keys[p][column + 4] = make_float4(x[4], x[5], x[6], x[7]);
    }
    __syncthreads();
    float sum = 0.0f;
    for (int head = warp * PER_WARP; head < min((warp + 1) * PER_WARP, N_HEADS); head += AT_ONCE) {
        float4 products[AT_ONCE] = {};
#pragma unroll 4
        for (int i = 0; i < KEY_DIM; i += 4) {
            const float4 k = *(const float4 *)&s.keys[lane][i];
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                const float4 q = *(const float4 *)&s.q[min(head + h, N_HEADS - 1)][i];
                products[h].x = __fmaf_rn(q.x, k.x, products[h].x);
                products[h].y = __fmaf_rn(q.y, k.y, products[h].y);
                products[h].z = __fmaf_rn(q.z, k.z, products[h].z);
                products[h].w = __fmaf_rn(q.w, k.w, products[h].w);
            }
        }
#pragma unroll
        for (int h = 0; h < AT_ONCE; h++)
            if (head + h < min((warp + 1) * PER_WARP, N_HEADS)) {
                const float4 x = products[h];
                sum = __fmaf_rn(s.weights[head + h], fmaxf((x.x + x.y) + (x.z + x.w), 0.0f), sum);
            }
    }
    s.sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && first + lane < n) {
        float score = s.sums[0][lane];
        for (int w = 1; w < N_WARPS; w++)
            score += s.sums[w][lane];
        scores[first + lane] = score;
    }
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
    load_queries(s, in, token);
    for (int first = blockIdx.x * TILE; first < n; first += gridDim.x * TILE) {
        score_tile(s, side, first, n, scores + token * scores_stride);
        __syncthreads();
    }
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
    scores += blockIdx.x * scores_stride;
    for (int token = *n_tokens - 1 - (int)blockIdx.x; token >= 0; token -= gridDim.x) {
        const int n = in.positions[token] + 1;
        if (n <= in.top_k) {
            choose_all(n - 1, out + token * out_stride);
            continue;
        }
        const Side<KEY_DIM> side = keys_of(in.cache, in.slots[token], 0);
        load_queries(s, in, token);
        for (int first = 0; first < n; first += TILE) {
            score_tile(s, side, first, n, scores);
            __syncthreads();
        }
        choose(s, scores, n, in.top_k, out + token * out_stride);
    }
}
