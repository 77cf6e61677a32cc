// Several matrices of one format times the same activations: out[t][r] = (W_m[r] . x[t]) * scale + bias[r].
//
// Compiled for FORMAT (a struct of formats.cuh) and N_TOKENS (tokens that share one reading of the weights).
// Grid: (row blocks of all matrices, groups of N_TOKENS tokens, heads); a block is 4 warps of `rows_per_warp` rows each.
// x: activation rows in the form of the format, or float32 rows for float formats, `x_row_bytes` apart.
// Heads have a matrix and an activation row each: `head_weight_bytes` and `head_x_bytes` from one to the next, and their
// results and scales follow one another. There is one head, but for multi-head latent attention.
#include "matrices.cuh"
#include "rows.cuh"

constexpr int N_WARPS = 4;
KERNEL(N_WARPS *WARP)
linear(Matrices matrices, int64_t row_bytes, int64_t head_weight_bytes, const uint8_t *x, int64_t x_row_bytes,
       int64_t head_x_bytes, int n_cols, const int8_t *grid, int rows_per_warp, const int *n_tokens) {
    using Dots = RowDots<FORMAT, N_TOKENS>;
    extern __shared__ __align__(16) uint8_t shared[];
    const int warp = threadIdx.x / WARP, head = blockIdx.z;
    const Matrix &matrix = matrix_of(matrices, blockIdx.x);
    const int first_row = (((int)blockIdx.x - matrix.first_block) * N_WARPS + warp) * rows_per_warp;
    const int n_rows = max(0, min(rows_per_warp, matrix.n_rows - first_row));

    uint8_t *scratch = shared + Dots::staged_bytes(n_cols) + warp * Dots::SCRATCH_BYTES;
    Dots dots(matrix.weights + head * head_weight_bytes + first_row * row_bytes, row_bytes, n_rows, n_cols, scratch);
    begin_kernel();

    const int first_token = blockIdx.y * N_TOKENS, n = *n_tokens;
    if (first_token >= n) {
        cp_async_wait<0>(); // what was begun must end before the block does
        return;
    }
    const Tokens<N_TOKENS> tokens(x + head * head_x_bytes, x_row_bytes, first_token, n);
    Dots::stage(shared, tokens, n_cols);
    __syncthreads();
    dots.run(shared, tokens, grid, [&](int i, int t, float value) {
        const int row = first_row + i, token = first_token + t;
        if (token >= n)
            return;
        matrix.put(head, row, token, value);
    });
}
