// out[t] = rows ids[t] of a table, `n_ids` of them side by side, times `scale`. An id outside the table takes its first row:
// the host has checked those of tokens.
//
// Compiled for FORMAT. Grid: (ceil(n_ids * n_cols / 256), rows), 256 threads, a value each.
#include "formats.cuh"

KERNEL(256)
embed(const uint8_t *table, int64_t row_bytes, const int *ids, int64_t ids_stride, int n_ids, int n_vocab, int n_cols,
      const int8_t *grid, float *out, int64_t out_stride, float scale, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = blockIdx.x * 256 + threadIdx.x;
    if (row >= *n_rows || col >= n_ids * n_cols)
        return;
    const unsigned id = (unsigned)ids[row * ids_stride + col / n_cols];
    const uint8_t *weights = table + (id < (unsigned)n_vocab ? id : 0) * row_bytes;
    out[row * out_stride + col] = weight_value<FORMAT>(weights, col % n_cols, grid) * scale;
}
