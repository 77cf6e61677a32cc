// Several matrices of one format times the same activations: out[t][r] = (W_m[r] . x[t]) * scale + bias[r].
//
// Compiled for FORMAT (a struct of formats.cuh), N_TOKENS (tokens that share one reading of the weights) and ROW_WARPS.
// Grid: (row blocks of all matrices, groups of N_TOKENS tokens, heads); a block is 4 warps, of which the first ROW_WARPS take
// `rows_per_warp` rows each: few where there are so few rows that they would leave multiprocessors without any.
// x: activation rows in the form of the format, or float32 rows for float formats, `x_row_bytes` apart.
// Heads have a matrix and an activation row each: `head_weight_bytes` and `head_x_bytes` from one to the next, and their
// results and scales follow one another. There is one head, but for multi-head latent attention.
//
// With N_EXPERTS above 0 there is `linear_and_route`, too: the last block that is done goes on and chooses experts from
// what some of the matrices gave, for one group of tokens, and asks the CPU for those without a slot.
#include "matrices.cuh"
#include "rows.cuh"

constexpr int N_WARPS = 4;

DEVICE void multiply(const Matrices &matrices, int64_t row_bytes, int64_t head_weight_bytes, const uint8_t *x,
                     int64_t x_row_bytes, int64_t head_x_bytes, int n_cols, const int8_t *grid, int rows_per_warp,
                     const int *n_tokens, uint8_t *shared) {
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
    const Tokens<N_TOKENS> tokens(x + head * head_x_bytes, x_row_bytes, first_token, N_TOKENS == 1 ? first_token + 1 : n);
    Dots::stage(shared, tokens, n_cols);
    __syncthreads();
    dots.run(shared, grid, N_TOKENS == 1 ? 1 : n - first_token, [&](int i, int t, float value) {
        const int row = first_row + i, token = first_token + t;
        if (token >= n)
            return;
        matrix.put(head, row, token, value);
    });
}

KERNEL(N_WARPS *WARP)
linear(Matrices matrices, int64_t row_bytes, int64_t head_weight_bytes, const uint8_t *x, int64_t x_row_bytes,
       int64_t head_x_bytes, int n_cols, const int8_t *grid, int rows_per_warp, const int *n_tokens) {
    extern __shared__ __align__(128) uint8_t shared[];
    multiply(matrices, row_bytes, head_weight_bytes, x, x_row_bytes, head_x_bytes, n_cols, grid, rows_per_warp, n_tokens,
             shared);
}

#if N_EXPERTS
#include "handshake.cuh"
#include "last_block.cuh"
#include "router.cuh"

// n_done: a word of device memory, 0 before and after. slots: of the experts, or null if nobody is asked; `gate` and `up` are
// what is sent, whether or not an expert turns out to be missing: by then it is there. Grid: (row blocks of all matrices).
// Dynamic shared memory for the choice, too: for each warp `Routing::scratch_words`.
KERNEL(N_WARPS *WARP)
linear_and_route(Matrices matrices, int64_t row_bytes, const uint8_t *x, int64_t x_row_bytes, int n_cols, const int8_t *grid,
                 int rows_per_warp, Routing routing, unsigned *n_done, const int *slots, Sent gate, Sent up, Exchange exchange,
                 const int *n_tokens) {
    constexpr int FIRST_IDLE = ROW_WARPS % N_WARPS * WARP; // thread that has no rows, 0 if all have
    extern __shared__ __align__(128) uint8_t shared[];
    multiply(matrices, row_bytes, 0, x, x_row_bytes, 0, n_cols, grid, rows_per_warp, n_tokens, shared);
    const int warp = threadIdx.x / WARP, n = *n_tokens;
    if (slots && blockIdx.x == 0 && threadIdx.x >= FIRST_IDLE) {
        gate.send(n, threadIdx.x - FIRST_IDLE, blockDim.x - FIRST_IDLE);
        up.send(n, threadIdx.x - FIRST_IDLE, blockDim.x - FIRST_IDLE);
    }
    if (!is_last_block(n_done, gridDim.x))
        return;
#pragma unroll 1
    for (int token = warp; token < n; token += N_WARPS)
        choose(routing, token, (float *)shared + warp * routing.scratch_words());
    __syncthreads();
    if (slots)
        exchange.ask(routing.ids, slots, routing.n_used, n);
}
#endif
