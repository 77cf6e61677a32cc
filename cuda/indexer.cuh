// What an indexer is made of: small queries and keys that are multiplied on tensor cores, and the choice of the highest
// scores.
//
// Compiled as `kv_cache.cuh` says, for a cache without values of one head, and for N_HEADS (of the queries).
//
// Sixteen heads and sixteen positions are a matter of tensor cores, with a query as the sum of two float16 numbers and
// float32 sums, as in `attention.cu`. A warp takes the heads of one of M_TILES tiles and some of the positions of a tile of
// 128.
#pragma once

#include "kv_cache.cuh"

constexpr int N_WARPS = 16, THREADS = N_WARPS * WARP;
constexpr int TILE = 128, AT_ONCE = 16; // positions: of a tile, and those that a warp scores together
constexpr int HEADS = 16, M_TILES = (N_HEADS + HEADS - 1) / HEADS, WARPS_PER_TILE = N_WARPS / M_TILES;
constexpr int KEY_STEPS = (KEY_DIM + 15) / 16;
constexpr int KEY_STRIDE = 16 * KEY_STEPS + 8; // ldmatrix then meets no bank twice; what is beyond a key is zero
constexpr int DIGIT = 11, N_DIGITS = 3;        // of a rank, the last one of 10 bits

// The keys of a tile of positions.
struct Keys {
    __align__(16) uint16_t of[PLANES][TILE][KEY_STRIDE];

    // Zeroes what is beyond the keys, once; a barrier follows.
    __device__ __forceinline__ void clear_margins() {
        constexpr int N = KEY_STRIDE - KEY_DIM;
        for (int i = threadIdx.x; i < PLANES * TILE * N; i += THREADS)
            of[i / (TILE * N)][i / N % TILE][KEY_DIM + i % N] = 0;
    }

    // Brings those from position `first` up to `end` from the cache; whole block. Zeros from there on. Ends with a barrier.
    __device__ __forceinline__ void load(const Side<KEY_DIM> &side, int first, int end) {
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE * (KEY_DIM / VECTOR); i += THREADS) {
            const int p = i / (KEY_DIM / VECTOR), column = i % (KEY_DIM / VECTOR) * VECTOR;
            const Piece piece = first + p < end ? side.load(first + p, column) : Piece{};
            piece.put(&of[0][p][column], TILE * KEY_STRIDE);
        }
        __syncthreads();
    }
};

// The first head of the tile that a warp takes.
DEVICE int first_head() { return threadIdx.x / WARP / WARPS_PER_TILE * HEADS; }

// A lane's share of its warp's heads, rows g and g + 8 of matrices that tensor cores take.
struct Queries {
    unsigned halves[KEY_STEPS][2][4]; // [][0]: float16 numbers, [][1]: what they miss

    // q: those of a token.
    __device__ __forceinline__ Queries(const float *q) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int step = 0; step < KEY_STEPS; step++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int head = first_head() + lane / 4 + r % 2 * 8, i = step * 16 + lane % 4 * 2 + r / 2 * 8;
                const bool exists = head < N_HEADS && i < KEY_DIM;
                const float2 x = exists ? *(const float2 *)(q + head * KEY_DIM + i) : make_float2(0.0f, 0.0f);
                split_halves(x.x, x.y, halves[step][0][r], halves[step][1][r]);
            }
    }

    // Products with the sixteen keys from place p of a tile on: those of two eights of positions, [][i] as in `ptx.cuh`.
    __device__ __forceinline__ void multiply(const Keys &keys, int p, float (&products)[2][4]) const {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int step = 0; step < KEY_STEPS; step++) {
            unsigned b[PLANES][4];
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
                ldmatrix_x4(b[plane], &keys.of[plane][p + lane % 8 + lane / 16 * 8][step * 16 + lane / 8 % 2 * 8]);
            add_products(products[0], halves[step], b, 0);
            add_products(products[1], halves[step], b, 1);
        }
    }
};

// What a block shares while it looks for the highest scores.
struct Choice {
    int counts[1 << DIGIT];
    int n_above[N_WARPS], n_equal[N_WARPS]; // scores of each warp's stretch
    unsigned lowest;                        // digits of the lowest rank that is chosen
    int n_left;                             // of those that agree with them
};

// A number that is larger for a larger score; NaNs are at the ends.
DEVICE unsigned rank_of(float score) {
    const unsigned bits = __float_as_uint(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Lane 0 has the highest 1/32 of the digits: finds the one that the n_left-th highest rank has. The first warp.
DEVICE void find_digit(Choice &s, int width) {
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

// Writes the places of the n_wanted highest of n scores, which are more, in rising order, of equal ones the lower; whole
// block. Begins with all scores visible to it.
DEVICE void choose(Choice &s, const float *scores, int n, int n_wanted, int *out) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (threadIdx.x == 0)
        s.lowest = 0, s.n_left = n_wanted;
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

// Writes all places from `first` up to `end`.
DEVICE void choose_all(int first, int end, int *out) {
    for (int i = first + threadIdx.x; i < end; i += THREADS)
        out[i - first] = i;
}
