// Float32 rows to activation rows (`quantize.cuh`), in groups of GROUP (256 or 32) values.
//
// Compiled for GROUP. Grid: (rows, ceil(n_cols / 1024)), for only the first may be large: a token has many rows where heads
// are multiplied apart. A block is 4 warps, a warp takes 256 columns, a lane eight. There are *n_tokens * rows_per_token rows.
#include "quantize.cuh"

KERNEL(4 * WARP)
quantize(const float *x, int64_t x_stride, int n_cols, uint8_t *out, int64_t out_row_bytes, int rows_per_token,
         const int *n_tokens) {
    const int row = blockIdx.x, at = (blockIdx.y * 4 * WARP + threadIdx.x) * 8, n = *n_tokens; // as the caller gave it: old
    begin_kernel();
    if (row >= n * rows_per_token || at - threadIdx.x % WARP * 8 >= n_cols)
        return;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = at < n_cols ? x[row * x_stride + at + i] : 0.0f;
    store_quantized<GROUP>(out + row * out_row_bytes, v, at, n_cols);
}
