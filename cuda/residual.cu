// The residual stream and its norm: out = weight * x / sqrt(mean(x^2) + eps), and out in the forms that integer formats
// take, for a whole row.
//
// Compiled for SOURCE, where x comes from (what is made is also kept in `sum`):
//     0  a
//     1  a + b
//     2  a + scale * (experts in rank order, one fma a rank, + sigmoid(shared_gate) * shared), N_USED experts
// NORMALIZE (0: the sum is all that is wanted), FORMS, a sum of 1 (groups of 256) and 2 (groups of 32), THREADS of a block
// and ROUNDS of eight columns that each of them takes.
// Grid: (1, rows); a block has a warp for each 256 columns, at most 32 of them. n_cols is a multiple of 8.
#include "handshake.cuh"
#include "quantize.cuh"

struct Experts {
    const float *out; // [tokens, n_used, n_cols]
    int64_t out_stride;
    const float *answers; // of experts without a slot, in host memory, [tokens, n_used, n_cols]; null if all have one
    const int *ids, *slots;
    const float *weights; // [tokens, n_used]; null for all 1
    const float *shared;  // null for none
    int64_t shared_stride;
    const float *shared_gate; // [tokens]; null for ungated
    int64_t shared_gate_stride;
    Exchange exchange; // where they come from
    float scale;
};

// The experts' part for eight columns.
DEVICE void combined(const Experts &e, int row, int at, int n_cols, float (&acc)[8]) {
    constexpr int AT_ONCE = N_USED < 1 ? 1 : N_USED < 8 ? N_USED : 8; // ranks that are on the way together: host memory is far
    float shared[8], gate = 0.0f;
    if (e.shared)
        load_8(e.shared + row * e.shared_stride + at, shared);
    if (e.shared_gate)
        gate = sigmoid(e.shared_gate[row * e.shared_gate_stride]);
#pragma unroll
    for (int i = 0; i < 8; i++)
        acc[i] = 0.0f;
    for (int first = 0; first < N_USED; first += AT_ONCE) {
        const float *from[AT_ONCE];
        float values[AT_ONCE][8], weights[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int rank = min(first + j, N_USED - 1), choice = row * N_USED + rank;
            weights[j] = e.weights ? e.weights[choice] : 1.0f;
            from[j] = e.out + row * e.out_stride + (int64_t)rank * n_cols + at;
            if (e.answers && e.slots[e.ids[choice]] < 0)
                from[j] = e.answers + (int64_t)choice * n_cols + at;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            load_8_past_cache(from[j], values[j]);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (first + j < N_USED)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    acc[i] = __fmaf_rn(weights[j], values[j][i], acc[i]);
    }
    if (e.shared)
#pragma unroll
        for (int i = 0; i < 8; i++)
            acc[i] = e.shared_gate ? __fmaf_rn(gate, shared[i], acc[i]) : acc[i] + shared[i];
#pragma unroll
    for (int i = 0; i < 8; i++)
        acc[i] *= e.scale;
}

KERNEL(THREADS)
residual(const float *a, int64_t a_stride, const float *b, int64_t b_stride, Experts experts, float *sum, int64_t sum_stride,
     const float *weight, float eps, float *out, int64_t out_stride, Forms forms, int n_cols, const int *n_rows) {
    __shared__ float partial[32];
    float w[ROUNDS][8];
    if (NORMALIZE && weight)
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int at = (round * blockDim.x + threadIdx.x) * 8;
            if (at < n_cols)
                load_8(weight + at, w[round]);
        }
    const int row = blockIdx.y, n = *n_rows; // as the caller gave it: old
    begin_kernel();
    if (row >= n)
        return;
    if (SOURCE == 2 && experts.answers)
        experts.exchange.await();
    float x[ROUNDS][8], squares = 0.0f;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int at = (round * blockDim.x + threadIdx.x) * 8;
        if (at >= n_cols)
            continue;
        load_8(a + row * a_stride + at, x[round]);
        if (SOURCE) {
            float added[8];
            if (SOURCE == 1)
                load_8(b + row * b_stride + at, added);
            else
                combined(experts, row, at, n_cols, added);
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[round][i] += added[i];
            store_8(sum + row * sum_stride + at, x[round]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            squares = __fmaf_rn(x[round][i], x[round][i], squares);
    }
    if (!NORMALIZE)
        return;
    const float mean = __fdiv_rn(block_sum(squares, partial), (float)n_cols);
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + eps));
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int at = (round * blockDim.x + threadIdx.x) * 8;
        const bool exists = at < n_cols;
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            y[i] = !exists ? 0.0f : weight ? x[round][i] * factor * w[round][i] : x[round][i] * factor;
        if (exists)
            store_8(out + row * out_stride + at, y);
        forms.store<FORMS>(y, row, at, n_cols);
    }
}
