// What lies between attention and the experts, for one token: a sum into the residual stream, the norm of that, products of it
// with float matrices, and the choice of experts. With the bits of `residual.cu` and `linear_and_route` one after the other.
//
// Compiled for FORMAT (a float one), ROW_WARPS, N_EXPERTS, SCORING and N_GROUPS (`linear.cu`), FORMS (`quantize.cuh`), and
// N_COLS and THREADS (`row_norm.cuh`). Every block adds up and normalises the whole row for itself,
// which takes less time than to have it done by a kernel before. Grid: (row blocks of all matrices, and one more, which has no
// rows of them: it writes sum and norm, and sends what the CPU needs).
#define N_TOKENS 1
#include "linear.cuh"
#include "route.cuh"
#include "row_norm.cuh"

static_assert(THREADS == N_WARPS * WARP && ROUNDS * N_WARPS <= WARP, "a lane sums up what a warp found");

// A sum and its norm, of the columns that a thread has.
struct NormedRow {
    float x[ROUNDS][8], y[ROUNDS][8];

    // By the whole block; w: of the norm's weight, if it has one.
    __device__ __forceinline__ NormedRow(const float *a, const float *b, bool has_weight, const float (&w)[ROUNDS][8], float eps) {
        __shared__ float partial[WARP];
        float added[ROUNDS][8], squares[ROUNDS];
        load_columns(a, x);
        load_columns(b, added);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            squares[round] = 0.0f;
            if (!is_column(column_of(round)))
                continue;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[round][i] += added[round][i];
                squares[round] = __fmaf_rn(x[round][i], x[round][i], squares[round]);
            }
        }
        const float factor = norm_factor(sum_of_rounds(squares, partial), eps);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
            if (is_column(column_of(round)))
                normalize(x[round], w[round], has_weight, factor, y[round]);
            else
#pragma unroll
                for (int i = 0; i < 8; i++)
                    y[round][i] = 0.0f;
    }
};

KERNEL(THREADS)
norm_and_route(Matrices matrices, RowsOf rows, const float *a, const float *b, float *sum, const float *weight, float eps,
               float *out, Forms forms, Routing routing, unsigned *n_done, const int *slots, Sent gate, Sent up,
               Exchange exchange, const int *n_tokens) {
    extern __shared__ __align__(128) uint8_t shared[];
    float w[ROUNDS][8];
    if (weight)
        load_columns(weight, w);
    if (blockIdx.x == gridDim.x - 1) {
        begin_kernel();
        const NormedRow row(a, b, weight, w, eps);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int at = column_of(round);
            if (is_column(at)) {
                store_floats(sum + at, row.x[round]);
                store_floats(out + at, row.y[round]);
            }
            forms.store<FORMS>(row.y[round], 0, at, N_COLS);
        }
        if (slots) {
            __syncthreads();
            gate.send(1, threadIdx.x, blockDim.x);
            up.send(1, threadIdx.x, blockDim.x);
        }
    } else
        multiply(matrices, rows, rows, 0, N_COLS, n_tokens, shared, [&](int, int) {
            const NormedRow row(a, b, weight, w, eps);
#pragma unroll
            for (int round = 0; round < ROUNDS; round++)
                if (is_column(column_of(round)))
                    stage_floats(shared, column_of(round), row.y[round]);
        });
    choose_and_ask(routing, n_done, slots, exchange, 1, (float *)shared);
}
