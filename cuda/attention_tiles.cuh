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
