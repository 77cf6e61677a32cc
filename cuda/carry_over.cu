// Rows of the token before, of the step or of the sequence's state (`graph.CarryOver`).
#include "common.cuh"

constexpr int THREADS = 256;

// x may be null: then all rows come from the states, which stay as they are; out may be null, then they only go there.
// state [n_slots, n_kept, n_cols]: the row of position p is at p % n_kept. Tokens of one sequence stand together and in
// order. Grid: (ceil(n_cols / 256), rows): the blocks of a sequence's first token bring its last rows to the state, once they
// have read that.
KERNEL(THREADS)
carry_over(const float *x, int64_t x_stride, float *state, float *out, int64_t out_stride, int n_cols, int n_kept,
           const int *positions, const int *slots, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = blockIdx.x * THREADS + threadIdx.x, n = *n_rows;
    if (row >= n || col >= n_cols)
        return;
    const int slot = slots[row], before = positions[row] - 1;
    const bool is_first = row == 0 || slots[row - 1] != slot;
    float *own = state + (int64_t)slot * n_kept * n_cols + col;
    if (out)
        out[row * out_stride + col] = before < 0         ? 0.0f
                                      : x && !is_first ? x[(row - 1) * x_stride + col]
                                                         : own[before % n_kept * (int64_t)n_cols];
    if (!x || !is_first)
        return;
    int end = row + 1;
    while (end < n && slots[end] == slot)
        end++;
    for (int last = max(row, end - n_kept); last < end; last++)
        own[positions[last] % n_kept * (int64_t)n_cols] = x[last * x_stride + col];
}
