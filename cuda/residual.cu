// The residual stream and its norm: out = weight * x / sqrt(mean(x^2) + eps) + bias (null for none), and out in the forms
// that integer formats take, for a whole row.
//
// Compiled for SOURCE, where x comes from (what is made is also kept in `sum`):
//     0  a
//     1  a + b
//     2  a (null for 0) + scale * (experts in rank order, one fma a rank, + sigmoid(shared_gate) * shared), N_USED experts
// NORMALIZE (0: the sum is all that is wanted), CENTER (1: the mean of the row is taken from x before it is normalised),
// FORMS, a sum of 1 (groups of 256) and 2 (groups of 32), and N_COLS and THREADS (`row_norm.cuh`).
// Grid: (1, rows); a block has a thread for each eight columns, with experts for each four, at most 1024 of them. With experts
// and a norm there are N_COLS floats of dynamic shared memory.
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
    int is_answer[N_USED + 1];

    // By the whole block; to be seen after a barrier.
    __device__ __forceinline__ void find(const Experts &e, int row) {
#pragma unroll 1
        for (int rank = threadIdx.x; rank < N_USED; rank += THREADS) {
            const int64_t choice = (int64_t)row * N_USED + rank;
            is_answer[rank] = e.answers && e.slots[e.ids[choice]] < 0;
            from[rank] = is_answer[rank] ? e.answers + choice * N_COLS : e.out + row * e.out_stride + (int64_t)rank * N_COLS;
            weights[rank] = e.weights ? e.weights[choice] : 1.0f;
        }
    }
};

// What is added up in some columns: what the device made is on its way before the answers are there.
struct Summands {
    static constexpr int AT_ONCE = N_USED < 1 ? 1 : N_USED < 8 ? N_USED : 8; // ranks that are on the way together
    float x[COLUMNS], shared[COLUMNS], of_ranks[AT_ONCE][COLUMNS];

    __device__ __forceinline__ void load_ranks(const Ranks &ranks, int first, int at) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (first + j < N_USED && !ranks.is_answer[first + j])
                load_floats(ranks.from[first + j] + at, of_ranks[j]);
    }

    __device__ __forceinline__ void load_answers(const Ranks &ranks, int first, int at) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (first + j < N_USED && ranks.is_answer[first + j])
                load_floats_past_cache(ranks.from[first + j] + at, of_ranks[j]);
    }

    __device__ __forceinline__ void load(const Experts &e, const Ranks &ranks, const float *a, int row, int at) {
        if (a)
            load_floats(a + at, x);
        if (e.shared)
            load_floats(e.shared + row * e.shared_stride + at, shared);
        load_ranks(ranks, 0, at);
    }

    // Adds all up to x, or to 0 if there is no x.
    __device__ __forceinline__ void add_up(const Experts &e, const Ranks &ranks, bool has_x, float gate, int at) {
        float acc[COLUMNS] = {};
        for (int first = 0; first < N_USED; first += AT_ONCE) {
            if (first)
                load_ranks(ranks, first, at);
            if (e.answers)
                load_answers(ranks, first, at);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (first + j < N_USED)
#pragma unroll
                    for (int i = 0; i < COLUMNS; i++)
                        acc[i] = __fmaf_rn(ranks.weights[first + j], of_ranks[j][i], acc[i]);
        }
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            if (e.shared)
                acc[i] = e.shared_gate ? __fmaf_rn(gate, shared[i], acc[i]) : acc[i] + shared[i];
            acc[i] *= e.scale;
            x[i] = has_x ? x[i] + acc[i] : 0.0f + acc[i];
        }
    }
};

template <int N> DEVICE void add(float (&x)[N], const float (&y)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] += y[i];
}

KERNEL(THREADS)
residual(const float *a, int64_t a_stride, const float *b, int64_t b_stride, Experts experts, float *sum, int64_t sum_stride,
     const float *weight, const float *bias, float eps, float *out, int64_t out_stride, Forms forms, const int *n_rows) {
    extern __shared__ __align__(16) float combined_row[];
    __shared__ float partial[32];
    __shared__ Ranks ranks;
    float w[ROUNDS][8];
    if (NORMALIZE && weight)
        load_columns(weight, w);
    const int row = blockIdx.y, n = *n_rows; // as the caller gave it: old
    if (SOURCE == 2 && experts.chosen_early && row < n)
        ranks.find(experts, row);
    await_previous_kernel();
    if (SOURCE != 2) // if it is, what the next kernel fetches would be in the way of the one block that reads all this
        let_next_kernel_begin();
    if (row >= n)
        return;
    a += row * a_stride, b += row * b_stride, sum += row * sum_stride;
    if (SOURCE == 2) {
        if (!experts.chosen_early)
            ranks.find(experts, row);
        __syncthreads();
        const float gate = experts.shared_gate ? sigmoid(experts.shared_gate[row * experts.shared_gate_stride]) : 0.0f;
#pragma unroll 1
        for (int first = 0; first < N_COLS; first += THREADS * COLUMNS) {
            const int at = first + threadIdx.x * COLUMNS;
            const bool exists = N_COLS % (THREADS * COLUMNS) == 0 || at < N_COLS;
            Summands summands;
            if (exists)
                summands.load(experts, ranks, a, row, at);
            if (first == 0 && experts.answers) {
                let_next_kernel_begin(); // it has time to fetch
                experts.exchange.await();
            }
            if (!exists)
                continue;
            summands.add_up(experts, ranks, a, gate, at);
            store_floats(sum + at, summands.x);
            if (NORMALIZE)
                store_floats(combined_row + at, summands.x);
        }
        let_next_kernel_begin();
        __syncthreads();
    }
    float x[ROUNDS][8], total = 0.0f;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int at = column_of(round);
        if (!is_column(at))
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
        const float center = __fdiv_rn(block_sum(total, partial), (float)N_COLS);
        __syncthreads(); // `partial` is used again
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
            if (is_column(column_of(round)))
#pragma unroll
                for (int i = 0; i < 8; i++)
                    x[round][i] -= center;
    }
    normalize_row<FORMS>(x, w, weight, bias, eps, out + row * out_stride, forms, row, partial);
}
