// Several matrices times the same activations: out[t][r] = (W_m[r] . x[t]) * scale + bias[r].
//
// Compiled for FORMAT (a struct of formats.cuh), SECOND (`linear.cuh`), N_TOKENS (tokens that share one reading of the weights)
// and ROW_WARPS.
// Grid: (row blocks of all matrices, groups of N_TOKENS tokens, heads); a block is 4 warps, of which the first ROW_WARPS take
// `rows_per_warp` rows each: few where there are so few rows that they would leave multiprocessors without any.
// x: activation rows in the form of the format, or float32 rows for float formats, `x_row_bytes` apart.
// Heads have a matrix and an activation row each: `head_weight_bytes` and `head_x_bytes` from one to the next, and their
// results and scales follow one another. There is one head, but for multi-head latent attention.
//
// With N_EXPERTS above 0 there is `linear_and_route`, too: the last block that is done goes on and chooses experts from
// what some of the matrices gave, for one group of tokens, and asks the CPU for those without a slot.
#include "linear.cuh"

DEVICE void stage(uint8_t *shared, const uint8_t *x, int64_t x_row_bytes, int n_cols, int first_token, int n) {
#if PAIR_COLUMNS
    for (int column = threadIdx.x * 8; column < n_cols; column += blockDim.x * 8) {
        float eight[8];
        load_floats((const float *)x + column, eight);
        stage_floats(shared, column, eight);
    }
#else
    const Tokens<N_TOKENS> tokens(x, x_row_bytes, first_token, N_TOKENS == 1 ? first_token + 1 : n);
    RowDots<FORMAT, N_TOKENS>::stage(shared, tokens, n_cols);
#endif
}

KERNEL(N_WARPS *WARP)
linear(Matrices matrices, RowsOf rows, RowsOf second, int64_t head_weight_bytes, const uint8_t *x, int64_t x_row_bytes,
       int64_t head_x_bytes, int n_cols, const int *n_tokens) {
    extern __shared__ __align__(128) uint8_t shared[];
    multiply(matrices, rows, second, head_weight_bytes, n_cols, n_tokens, shared, [&](int first_token, int n) {
        stage(shared, x + blockIdx.z * head_x_bytes, x_row_bytes, n_cols, first_token, n);
    });
}

#if N_EXPERTS
#include "route.cuh"

// slots: of the experts, or null if nobody is asked; `gate` and `up` are what is sent, whether or not an expert turns out to
// be missing: by then it is there. Grid: (row blocks of all matrices). Dynamic shared memory for the choice, too.
KERNEL(N_WARPS *WARP)
linear_and_route(Matrices matrices, RowsOf rows, const uint8_t *x, int64_t x_row_bytes, int n_cols, Routing routing,
                 unsigned *n_done, const int *slots, Sent gate, Sent up, Exchange exchange, const int *n_tokens) {
    constexpr int FIRST_IDLE = ROW_WARPS % N_WARPS * WARP; // thread that has no rows, 0 if all have
    extern __shared__ __align__(128) uint8_t shared[];
    multiply(matrices, rows, rows, 0, n_cols, n_tokens, shared,
             [&](int first_token, int n) { stage(shared, x, x_row_bytes, n_cols, first_token, n); });
    const int n = *n_tokens;
    if (slots && blockIdx.x == 0 && threadIdx.x >= FIRST_IDLE) {
        gate.send(n, threadIdx.x - FIRST_IDLE, blockDim.x - FIRST_IDLE);
        up.send(n, threadIdx.x - FIRST_IDLE, blockDim.x - FIRST_IDLE);
    }
    choose_and_ask(routing, n_done, slots, exchange, n, (float *)shared);
}
#endif
