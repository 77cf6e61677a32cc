// The residual stream and its norm: out = weight * x / sqrt(mean(x^2) + eps) + bias (null for none), and out in the forms
// that integer formats take, for a whole row.
//
// Compiled for SOURCE, where x comes from (what is made is also kept in `sum`):
//     0  a
//     1  a + b
//     2  a (null for 0) + scale * (experts in rank order, one fma a rank, + sigmoid(shared_gate) * shared), N_USED experts
// NORMALIZE (0: the sum is all that is wanted), CENTER (1: the mean of the row is taken from x before it is normalised),
// FORMS, a sum of 1 (groups of 256) and 2 (groups of 32), THREADS of a block and ROUNDS of eight columns that each of them
// takes.
// Grid: (1, rows); a block has a thread for each eight columns, with experts for each four, at most 1024 of them. n_cols is a
// multiple of 8. With experts and a norm there are n_cols floats of dynamic shared memory.
#include "handshake.cuh"
#include "row_norm.cuh"

// Columns that a thread takes of the experts: a warp so reads 512 bytes on end, for host memory is slow in smaller pieces.
constexpr int COLUMNS = 4;

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
    int chosen_early; // ids, slots and weights are older than the kernel before
};

// What is the same for a whole row: where the values of each rank begin, and their weights.
struct Ranks {
    const float *from[N_USED + 1];
    float weights[N_USED + 1]; // one more, for there may be none

    // By the whole block; to be seen after a barrier.
    __device__ __forceinline__ void find(const Experts &e, int row, int n_cols) {
#pragma unroll 1
        for (int rank = threadIdx.x; rank < N_USED; rank += blockDim.x) {
            const int64_t choice = (int64_t)row * N_USED + rank;
            const bool is_answer = e.answers && e.slots[e.ids[choice]] < 0;
            from[rank] = is_answer ? e.answers + choice * n_cols : e.out + row * e.out_stride + (int64_t)rank * n_cols;
            weights[rank] = e.weights ? e.weights[choice] : 1.0f;
        }
    }
};

// The experts' part for some columns.
DEVICE void combined(const Experts &e, const Ranks &ranks, int row, int at, float (&acc)[COLUMNS]) {
    constexpr int AT_ONCE = N_USED < 1 ? 1 : N_USED < 8 ? N_USED : 8; // ranks that are on the way together: host memory is far
    float shared[COLUMNS], gate = 0.0f;
    if (e.shared)
        load_floats(e.shared + row * e.shared_stride + at, shared);
    if (e.shared_gate)
        gate = sigmoid(e.shared_gate[row * e.shared_gate_stride]);
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
        acc[i] = 0.0f;
    for (int first = 0; first < N_USED; first += AT_ONCE) {
        float values[AT_ONCE][COLUMNS];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            load_floats_past_cache(ranks.from[min(first + j, N_USED - 1)] + at, values[j]);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (first + j < N_USED)
#pragma unroll
                for (int i = 0; i < COLUMNS; i++)
                    acc[i] = __fmaf_rn(ranks.weights[first + j], values[j][i], acc[i]);
    }
    if (e.shared)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++)
            acc[i] = e.shared_gate ? __fmaf_rn(gate, shared[i], acc[i]) : acc[i] + shared[i];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
        acc[i] *= e.scale;
}

template <int N> DEVICE void add(float (&x)[N], const float (&y)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] += y[i];
}

KERNEL(THREADS)
residual(const float *a, int64_t a_stride, const float *b, int64_t b_stride, Experts experts, float *sum, int64_t sum_stride,
     const float *weight, const float *bias, float eps, float *out, int64_t out_stride, Forms forms, int n_cols,
     const int *n_rows) {
    extern __shared__ __align__(16) float combined_row[];
    __shared__ float partial[32];
    __shared__ Ranks ranks;
    float w[ROUNDS][8];
    if (NORMALIZE && weight)
        load_columns(weight, n_cols, w);
    const int row = blockIdx.y, n = *n_rows; // as the caller gave it: old
    if (SOURCE == 2 && experts.chosen_early && row < n)
        ranks.find(experts, row, n_cols);
    begin_kernel();
    if (row >= n)
        return;
    a += row * a_stride, b += row * b_stride, sum += row * sum_stride;
    if (SOURCE == 2) {
        if (!experts.chosen_early)
            ranks.find(experts, row, n_cols);
        if (experts.answers)
            experts.exchange.await();
        __syncthreads();
#pragma unroll 1
        for (int at = threadIdx.x * COLUMNS; at < n_cols; at += blockDim.x * COLUMNS) {
            float x[COLUMNS] = {}, added[COLUMNS];
            if (a)
                load_floats(a + at, x);
            combined(experts, ranks, row, at, added);
            add(x, added);
            store_floats(sum + at, x);
            if (NORMALIZE)
                store_floats(combined_row + at, x);
        }
        __syncthreads();
    }
    float x[ROUNDS][8], total = 0.0f;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int at = column_of(round);
        if (at >= n_cols)
            continue;
        load_floats(SOURCE == 2 ? combined_row + at : a + at, x[round]);
        if (SOURCE == 1) {
            float added[8];
            load_floats(b + at, added);
            add(x[round], added);
            store_floats(sum + at, x[round]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            total += x[round][i];
    }
    if (!NORMALIZE)
        return;
    if (CENTER) {
        const float center = __fdiv_rn(block_sum(total, partial), (float)n_cols);
        __syncthreads(); // `partial` is used again
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
            if (column_of(round) < n_cols)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    x[round][i] -= center;
    }
    normalize_row<ROUNDS, FORMS>(x, w, weight, bias, eps, out + row * out_stride, forms, row, n_cols, partial);
}
