// Rows of several matrices of one format times the same activations, by a block of 4 warps. Compiled for FORMAT, N_TOKENS and
// ROW_WARPS (`linear.cu`).
#pragma once

#include "matrices.cuh"
#include "rows.cuh"

constexpr int N_WARPS = 4;

// The block's products. Begins the kernel; before that, it fetches weights. `stage(first_token, n)` brings the activations of
// the block's tokens to `shared`, of n that the step has; a barrier follows.
template <class Stage>
DEVICE void multiply(const Matrices &matrices, int64_t row_bytes, int64_t head_weight_bytes, int n_cols, const int8_t *grid,
                     int rows_per_warp, const int *n_tokens, uint8_t *shared, Stage stage) {
    using Dots = RowDots<FORMAT, N_TOKENS>;
    const int warp = threadIdx.x / WARP, head = blockIdx.z;
    const Matrix &matrix = matrix_of(matrices, blockIdx.x);
    const int first_row = (((int)blockIdx.x - matrix.first_block) * ROW_WARPS + warp) * rows_per_warp;
    const int n_rows = warp < ROW_WARPS ? max(0, min(rows_per_warp, matrix.n_rows - first_row)) : 0;

    uint8_t *scratch = shared + Dots::staged_bytes(n_cols) + warp * Dots::scratch_bytes(rows_per_warp, n_cols);
    const uint8_t *first = matrix.weights + head * head_weight_bytes + first_row * row_bytes;
    Dots dots(first, row_bytes, n_rows, n_cols, rows_per_warp, scratch);
    begin_kernel();

    const int first_token = blockIdx.y * N_TOKENS, n = *n_tokens;
    if (first_token > 0 && first_token >= n) { // there always is a first token, so that its blocks need not wait for n
        cp_async_wait<0>(); // what was begun must end before the block does
        return;
    }
    stage(first_token, n);
    __syncthreads();
    dots.run(shared, grid, N_TOKENS == 1 ? 1 : n - first_token, [&](int i, int t, float value) {
        const int row = first_row + i, token = first_token + t;
        if (token >= n)
            return;
        matrix.put(head, row, token, value);
    });
}
