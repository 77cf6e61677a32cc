// Two rows of float32 weights times one token's activations, by a block: as `RowDots`, with the same bits, for matrices of so
// few rows that no block has more. Then nothing takes time but one step of a chain after the other. So the whole block has
// both rows on their way before the kernel begins, and four values of a chain are laid side by side, to be read at once.
// Compiled for PAIR_COLUMNS of a row.
#pragma once

#include "common.cuh"

class RowPair {
    static constexpr int STEPS = 4, COLS = 16 * STEPS; // of each chain, and what columns these are
    static constexpr int STRIDE = COLS + 4;            // that other steps are written to other banks
    static constexpr int N_TIMES = PAIR_COLUMNS / COLS, ROW = N_TIMES * STRIDE, AT_ONCE = 4;
    static_assert(PAIR_COLUMNS % COLS == 0 && N_TIMES >= AT_ONCE, "all steps of a chain come in fours");

    static __device__ __forceinline__ int place(int column) {
        return column / COLS * STRIDE + column % 16 * STEPS + column % COLS / 16;
    }

  public:
    static constexpr int BYTES = 3 * ROW * (int)sizeof(float); // of shared memory: the activations, then both rows

    // Has the rows under way; by the whole block of N_THREADS, each of which waits for its own.
    template <int N_THREADS> static __device__ __forceinline__ void fetch(float *shared, const float *first, int n_rows) {
        static_assert(N_THREADS % COLS == 0, "a thread's columns are all as far apart in memory");
        for (int r = 0; r < n_rows; r++) {
            float *to = shared + (1 + r) * ROW + place(threadIdx.x);
            const float *from = first + r * PAIR_COLUMNS + threadIdx.x;
#pragma unroll 4
            for (int i = threadIdx.x; i < PAIR_COLUMNS; i += N_THREADS, from += N_THREADS, to += N_THREADS / COLS * STRIDE)
                cp_async4(to, from);
        }
        cp_async_commit();
    }

    // Eight activations, from a column on that is a multiple of eight.
    static __device__ __forceinline__ void put(float *shared, int column, const float (&x)[8]) {
        float *to = shared + place(column);
#pragma unroll
        for (int i = 0; i < 8; i++)
            to[STEPS * i] = x[i];
    }

    // A row's product, from the first of its sixteen lanes, by a warp: for the other half of the lanes that of the other row,
    // if there is one.
    static __device__ __forceinline__ float product(const float *shared, int n_rows) {
        const int lane = threadIdx.x % WARP, own = min(lane / 16, n_rows - 1);
        const float4 *x_from = (const float4 *)shared + lane % 16, *w_from = x_from + (1 + own) * (ROW / 4);
        float4 x[AT_ONCE], w[AT_ONCE];
        float sum = 0.0f;
        const auto load = [&](int k, int time) {
            x[k] = x_from[time * (STRIDE / 4)], w[k] = w_from[time * (STRIDE / 4)];
        };
        const auto add = [&](int k) {
            sum = __fmaf_rn(w[k].x, x[k].x, sum), sum = __fmaf_rn(w[k].y, x[k].y, sum);
            sum = __fmaf_rn(w[k].z, x[k].z, sum), sum = __fmaf_rn(w[k].w, x[k].w, sum);
        };
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            load(k, k);
#pragma unroll 1
        for (int time = AT_ONCE; time <= N_TIMES - AT_ONCE; time += AT_ONCE) // what comes next is on its way meanwhile
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                add(k);
                load(k, time + k);
            }
        constexpr int REST = N_TIMES % AT_ONCE;
#pragma unroll
        for (int k = 0; k < AT_ONCE + REST; k++) {
            add(k % AT_ONCE);
            if (k < REST)
                load(k, N_TIMES - REST + k);
        }
        for (int lanes = 8; lanes; lanes /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
        return sum;
    }
};
