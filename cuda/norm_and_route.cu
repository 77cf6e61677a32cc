// What lies between attention and the experts, for one token: a sum into the residual stream, the norm of that, products of it
// with float matrices, and the choice of experts. With the bits of `residual.cu` and `linear_and_route` one after the other.
//
// Compiled for FORMAT (a float one), ROW_WARPS, N_EXPERTS, SCORING and N_GROUPS (`linear.cu`), FORMS (`quantize.cuh`), and
// ROUNDS of eight columns that a thread takes, four at most. Every block adds up and normalises the whole row for itself,
// which takes less time than to have it done by a kernel before. Grid: (row blocks of all matrices, and one more, which has no
// rows: it writes sum and norm, and sends what the CPU needs).
#define N_TOKENS 1
#include "linear.cuh"
#include "route.cuh"
#include "row_norm.cuh"

static_assert(ROUNDS * N_WARPS <= WARP, "a lane sums up what a warp found");

KERNEL(N_WARPS *WARP)
norm_and_route(Matrices matrices, RowsOf rows, const float *a, const float *b, float *sum, const float *weight, float eps,
               float *out, Forms forms, int n_cols, Routing routing, unsigned *n_done, const int *slots, Sent gate, Sent up,
               Exchange exchange, const int *n_tokens) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float partial[WARP];
    const bool writes = blockIdx.x == gridDim.x - 1;
    float w[ROUNDS][8];
    if (weight)
        load_columns(weight, n_cols, w);
    multiply(matrices, rows, rows, 0, n_cols, n_tokens, shared, [&](int, int) {
        float x[ROUNDS][8], added[ROUNDS][8], squares[ROUNDS];
        load_columns(a, n_cols, x);
        load_columns(b, n_cols, added);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            squares[round] = 0.0f;
            if (column_of(round) >= n_cols)
                continue;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[round][i] += added[round][i];
                squares[round] = __fmaf_rn(x[round][i], x[round][i], squares[round]);
            }
        }
        const float factor = norm_factor(sum_of_rounds(squares, partial), n_cols, eps);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int at = column_of(round);
            float y[8] = {};
            if (at < n_cols) {
                normalize(x[round], w[round], weight, factor, y);
                store_floats((float *)shared + at, y);
            }
            if (!writes)
                continue;
            if (at < n_cols) {
                store_floats(sum + at, x[round]);
                store_floats(out + at, y);
            }
            forms.store<FORMS>(y, 0, at, n_cols);
        }
    });
    if (slots && writes) {
        gate.send(1, threadIdx.x, blockDim.x);
        up.send(1, threadIdx.x, blockDim.x);
    }
    choose_and_ask(routing, n_done, slots, exchange, 1, (float *)shared);
}
