// Rows of several matrices times the same activations, by a block of 4 warps. Compiled for FORMAT, N_TOKENS and ROW_WARPS
// (`linear.cu`), and for SECOND, if some of the matrices are of another format, which takes activations in the same form. And
// for PAIR_COLUMNS: if that is above 0, a block has two rows of so many columns for one token (`row_pair.cuh`).
#pragma once

#include "matrices.cuh"
#include "rows.cuh"

#ifndef SECOND
#define SECOND FORMAT
#endif

#ifndef PAIR_COLUMNS
#define PAIR_COLUMNS 0
#elif PAIR_COLUMNS
#include "row_pair.cuh"
#endif

constexpr int N_WARPS = 4;

// What is the same for all matrices of a format. grid: its code book, or null.
struct RowsOf {
    int64_t row_bytes;
    const int8_t *grid;
    int rows_per_warp;
    int unused;
};

// The block's products with its matrix, of one format.
template <class Format, class Stage>
DEVICE void multiply_rows(const Matrix &matrix, const RowsOf &rows, int64_t head_weight_bytes, int n_cols,
                          const int *n_tokens, uint8_t *shared, Stage stage) {
    using Dots = RowDots<Format, N_TOKENS>;
    const int warp = threadIdx.x / WARP, head = blockIdx.z;
    const int first_row = (((int)blockIdx.x - matrix.first_block) * ROW_WARPS + warp) * rows.rows_per_warp;
    const int n_rows = warp < ROW_WARPS ? max(0, min(rows.rows_per_warp, matrix.n_rows - first_row)) : 0;

    uint8_t *scratch = shared + Dots::staged_bytes(n_cols) + warp * Dots::scratch_bytes(rows.rows_per_warp, n_cols);
    const uint8_t *first = matrix.weights + head * head_weight_bytes + first_row * rows.row_bytes;
    Dots dots(first, rows.row_bytes, n_rows, n_cols, rows.rows_per_warp, scratch);
    begin_kernel();

    const int first_token = blockIdx.y * N_TOKENS, n = *n_tokens;
    if (first_token > 0 && first_token >= n) { // there always is a first token, so that its blocks need not wait for n
        cp_async_wait<0>(); // what was begun must end before the block does
        return;
    }
    stage(first_token, n);
    __syncthreads();
    dots.run(shared, rows.grid, N_TOKENS == 1 ? 1 : n - first_token, [&](int i, int t, float value) {
        const int row = first_row + i, token = first_token + t;
        if (token >= n)
            return;
        matrix.put(head, row, token, value);
    });
}

#if PAIR_COLUMNS
// The block's products with its matrix, of two rows.
template <class Stage> DEVICE void multiply_pair(const Matrix &matrix, float *shared, Stage stage) {
    const int first_row = ((int)blockIdx.x - matrix.first_block) * 2, n_rows = min(2, matrix.n_rows - first_row);
    RowPair::fetch<N_WARPS * WARP>(shared, (const float *)matrix.weights + (int64_t)first_row * PAIR_COLUMNS, n_rows);
    begin_kernel();
    stage(0, 1);
    cp_async_wait<0>();
    __syncthreads();
    if (threadIdx.x >= WARP)
        return;
    const float product = RowPair::product(shared, n_rows);
    const int row = threadIdx.x / 16;
    if (threadIdx.x % 16 == 0 && row < n_rows)
        matrix.put(0, first_row + row, 0, product);
}
#endif

// Puts eight activations of the one token, float32, where the products take them, from a column on that is a multiple of eight.
DEVICE void stage_floats(uint8_t *shared, int column, const float (&x)[8]) {
#if PAIR_COLUMNS
    RowPair::put((float *)shared, column, x);
#else
    store_floats((float *)shared + column, x);
#endif
}

// The block's products. Begins the kernel; before that, it fetches weights. `stage(first_token, n)` brings the activations of
// the block's tokens to `shared`, of n that the step has; a barrier follows.
template <class Stage>
DEVICE void multiply(const Matrices &matrices, const RowsOf &rows, const RowsOf &second, int64_t head_weight_bytes, int n_cols,
                     const int *n_tokens, uint8_t *shared, Stage stage) {
    const Matrix &matrix = matrix_of(matrices, blockIdx.x);
#if PAIR_COLUMNS
    multiply_pair(matrix, (float *)shared, stage);
#else
    if constexpr (!IS_SAME<FORMAT, SECOND>) {
        static_assert(RowDots<FORMAT, N_TOKENS>::FORM == RowDots<SECOND, N_TOKENS>::FORM, "activations lie there once");
        if (matrix.is_second) {
            multiply_rows<SECOND>(matrix, second, head_weight_bytes, n_cols, n_tokens, shared, stage);
            return;
        }
    }
    multiply_rows<FORMAT>(matrix, rows, head_weight_bytes, n_cols, n_tokens, shared, stage);
#endif
}
