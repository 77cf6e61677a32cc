// As `linear.cu`, for many tokens: out[t][r] = (W_m[r] . x[t]) * scale + bias[r], by tiles of rows and 64 tokens.
//
// Compiled for FORMAT, an integer one, and TILE_WARPS. Grid: (row blocks of all matrices, groups of 64 tokens, heads). Dynamic shared
// memory: `TileDots<FORMAT>::Shared`.
#include "matrices.cuh"
#include "tiles.cuh"

TILE_KERNEL(TILE_BLOCKS)
linear_tiles(Matrices matrices, int64_t row_bytes, int64_t head_weight_bytes, const uint8_t *x, int64_t x_row_bytes,
             int64_t head_x_bytes, int n_cols, const int8_t *grid, const int *n_tokens) {
    begin_kernel();
    using Dots = TileDots<FORMAT>;
    extern __shared__ __align__(16) uint8_t dynamic[];
    __shared__ const uint8_t *rows[TILE_TOKENS];

    const int first_token = blockIdx.y * TILE_TOKENS, head = blockIdx.z, n = min(TILE_TOKENS, *n_tokens - first_token);
    if (n <= 0)
        return;
    const Matrix &matrix = matrix_of(matrices, blockIdx.x);
    const int first_row = ((int)blockIdx.x - matrix.first_block) * TILE_ROWS;
    if (threadIdx.x < TILE_TOKENS)
        rows[threadIdx.x] = x + head * head_x_bytes + (first_token + min((int)threadIdx.x, n - 1)) * x_row_bytes;
    __syncthreads();

    TileSums acc;
    Dots::run(matrix.weights + head * head_weight_bytes, row_bytes, first_row, matrix.n_rows, n_cols, rows, n, grid,
              *(Dots::Shared *)dynamic, acc);
#pragma unroll
    for (int j = 0; j < EIGHTS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = first_row + tile_row(i), token = tile_token(j, i);
            if (row < matrix.n_rows && token < n)
                matrix.put(head, row, first_token + token, acc[j][i]);
        }
}
