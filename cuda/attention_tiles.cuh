// Tiles of keys and values in shared memory, as kernels of attention multiply them. Compiled as `attention.cu` says.
#pragma once

#include "attention_parts.cuh"
#include "kv_cache.cuh"

constexpr int HEADS = 16;                            // rows that tensor cores multiply
constexpr int N_TILES = (GROUP + HEADS - 1) / HEADS; // of heads that share keys
constexpr int KEY_STEPS = (KEY_DIM + 63) / 64;       // sixteens of a quarter of a key's values
// Rows of tiles in shared memory, in float16 numbers: ldmatrix then meets no bank twice. What is beyond a head is zero.
constexpr int KEY_STRIDE = 64 * KEY_STEPS + 8;
constexpr int VALUE_STRIDE = SHARED ? KEY_STRIDE : (VALUE_DIM + 15) / 16 * 16 + 8;

// Zeroes what is beyond the heads, up to where they are read, by a block of THREADS.
template <int THREADS, int FIRST, int END, int STRIDE> DEVICE void clear_columns(uint16_t (&planes)[PLANES][TILE][STRIDE]) {
    constexpr int N = END - FIRST;
    if constexpr (N > 0)
        for (int i = threadIdx.x; i < PLANES * TILE * N; i += THREADS)
            planes[i / (TILE * N)][i / N % TILE][FIRST + i % N] = 0;
}
template <int THREADS> DEVICE void clear_beyond_keys(uint16_t (&planes)[PLANES][TILE][KEY_STRIDE]) {
    clear_columns<THREADS, KEY_DIM, 64 * KEY_STEPS>(planes);
}
template <int THREADS> DEVICE void clear_beyond_values(uint16_t (&planes)[PLANES][TILE][VALUE_STRIDE]) {
    clear_columns<THREADS, VALUE_DIM, (VALUE_DIM + 15) / 16 * 16>(planes);
}

// A lane's share of sums over values of 16 rows, N_PAIRS times 16 columns: the two eights of a pair, fragments as in `ptx.cuh`.
template <int N_PAIRS> using SumsOf = float[N_PAIRS][2][4];

// The first of the 16 columns of a warp's pair, of N_PAIRS.
template <int N_PAIRS> DEVICE int column_of_pair(int warp, int pair) { return (warp * N_PAIRS + pair) * 16; }

// sums = sums * rescale + weights . values, for the columns of a warp and two rows of a lane; weights [sixteens of the tile]
// [float16 numbers, what they miss], as the tensor cores take them.
template <int N_PAIRS>
DEVICE void add_values(SumsOf<N_PAIRS> &sums, const float (&rescale)[2], const unsigned (&weights)[TILE / 16][2][4],
                       const uint16_t (&values)[PLANES][TILE][VALUE_STRIDE], int warp) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int pair = 0; pair < N_PAIRS; pair++) {
        const int column = column_of_pair<N_PAIRS>(warp, pair);
        if (column >= VALUE_DIM)
            break;
#pragma unroll
        for (int i = 0; i < 8; i++)
            sums[pair][i / 4][i % 4] *= rescale[i % 4 / 2];
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            unsigned b[PLANES][4];
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
                ldmatrix_x4_trans(b[plane], &values[plane][16 * k + lane % 16][column + lane / 16 * 8]);
            add_products(sums[pair][0], weights[k], b, 0);
            add_products(sums[pair][1], weights[k], b, 1);
        }
    }
}

// What the parts before gave, and a part's sums with it; `merged` is of the lane's two rows, that part included.
template <int N_PAIRS>
DEVICE void merge_sums(SumsOf<N_PAIRS> &acc, const SumsOf<N_PAIRS> &sums, const Merged (&merged)[2]) {
#pragma unroll
    for (int pair = 0; pair < N_PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &value = acc[pair][i / 4][i % 4];
            const Merged &of_row = merged[i % 4 / 2];
            value = merged_value(of_row.keep, of_row.take, value, sums[pair][i / 4][i % 4]);
        }
}

// The pieces of a tile that a thread brings from the cache: they are on the way while the tile before is worked at.
template <int DIM, int THREADS> struct Pieces {
    static constexpr int ROW = DIM / VECTOR, ALL = TILE * ROW, N = (ALL + THREADS - 1) / THREADS;
    Piece list[N];

    // Those of a thread, of the tile that begins at position `first`; what is outside of [begin, end) becomes zeros. With
    // PERIOD the first n_shared places are rows of `shared`, and behind them lies position `oldest`. A tile lies in one piece,
    // in a ring, too.
    __device__ __forceinline__ void load(int thread, const Side<DIM> &side, const Side<DIM> &shared, const int *selected,
                                         int n_shared, int oldest, int first, int begin, int end) {
        const int first_row = TOP_K || PERIOD ? first : side.row_of(first);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = i * THREADS + thread, p = at / ROW;
            const bool exists = p >= begin && p < end;
            const int place = first + p;
            if (PERIOD && place >= n_shared) {
                list[i] = exists ? side.load(side.row_of(oldest + place - n_shared), at % ROW * VECTOR) : Piece{};
                continue;
            }
            const int row = TOP_K && exists ? selected[place / BLOCK] * BLOCK + place % BLOCK : first_row + p;
            list[i] = exists ? (PERIOD ? shared : side).load(row, at % ROW * VECTOR) : Piece{};
        }
    }
    template <int STRIDE> __device__ __forceinline__ void put(int thread, uint16_t (*planes)[TILE][STRIDE]) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = i * THREADS + thread;
            if (at < ALL)
                list[i].put(&planes[0][at / ROW][at % ROW * VECTOR], TILE * STRIDE);
        }
    }
};
