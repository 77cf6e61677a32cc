// The residual streams of hyper-connections, between two sub-layers: what one gave is added to each stream, times the stream's
// gate; of the streams then come the weights that they are reduced by for the next one, and the gates of what that will give.
//
//     x[i] = streams[i] + gates[i] * added                         for each stream i; without `added` (null) x = streams;
//                                                                  with a magnitude of gates, that * sigmoid(gates[i])
//     mixes = matrix . x / sqrt(mean(x^2) + eps)                   the mean is that of all streams
//     weights = sigmoid(scale[0] * mixes[:N_STREAMS] + base[:N_STREAMS]) + offset
//     gates = magnitude * sigmoid(scale[1] * mixes[N_STREAMS:] + base[N_STREAMS:]) + offset
//
// MIXES: streams are mixed before something is added, x[i] = gates[i] * added + sum over j of mixing[j, i] * streams[j]. Where
// there are N_STREAMS^2 mixes more, the next mixing is made of these (`graph.ReduceStreams`), and gates have no offset.
//
// The sum of the streams by these weights is `residual.cu`'s, as if they were experts.
//
// Compiled for N_STREAMS, which lie side by side, n_cols each, a multiple of 4, MIXES, and N_MIXES: as many as streams, with
// gates twice as many, with mixing N_STREAMS^2 more, or 0 if only the sum is wanted. matrix [N_MIXES, N_STREAMS * n_cols],
// base [N_MIXES].
//
// Grid: (blocks of 1024 columns, rows at a time); a thread has four columns of the matrix in registers, for one row after the
// other. The last block of a row adds up what all found.
#include "last_block.cuh"
#include "quantize.cuh"

constexpr int THREADS = 256, COLUMNS = 4;
constexpr int N_SUMS = N_MIXES + 1; // the last: of squares
constexpr bool MAKES_MIXING = N_MIXES > 2 * N_STREAMS;

struct Mixing {
    const float *matrix, *scale, *base;
    float *partial;   // [rows, blocks, N_SUMS]
    unsigned *n_done; // [rows], 0 before and after
    float *weights;   // [rows, N_STREAMS]
    float *gates;     // [rows, N_STREAMS]
    float *mixing;    // [rows, N_STREAMS^2]
    float eps, offset, magnitude;
    int n_normalizations;
};

// Lane i of the first N_STREAMS^2 has a value of a matrix; returns the sum over those that it stands in a column with
// (`step` N_STREAMS), or in a row (1), in order. A whole warp.
DEVICE float sum_of_line(float value, int step) {
    const int i = threadIdx.x % (N_STREAMS * N_STREAMS);
    const int first = step == 1 ? i / N_STREAMS * N_STREAMS : i % N_STREAMS;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N_STREAMS; j++)
        sum += __shfl_sync(ALL_LANES, value, first + j * step);
    return sum;
}

// How much streams keep of each other, by the first warp; mix: lane i's, times its scale, with its base.
DEVICE float mixing_of(const Mixing &m, float mix) {
    const int i = threadIdx.x % (N_STREAMS * N_STREAMS), first = i / N_STREAMS * N_STREAMS;
    float largest = NEVER;
#pragma unroll
    for (int j = 0; j < N_STREAMS; j++)
        largest = fmaxf(largest, __shfl_sync(ALL_LANES, mix, first + j));
    const float e = exp_canonical(mix - largest);
    float value = __fdiv_rn(e, sum_of_line(e, 1)) + m.offset;
    for (int j = 0; j < 2 * m.n_normalizations - 1; j++)
        value = __fdiv_rn(value, sum_of_line(value, j % 2 ? 1 : N_STREAMS) + m.offset);
    return value;
}

// What the blocks found of a row becomes weights and gates. By the whole block.
DEVICE void finish_row(const Mixing &m, int row, int n_cols, float *totals) {
    const int i = threadIdx.x;
    if (i < N_SUMS) {
        float total = 0.0f;
        for (int block = 0; block < (int)gridDim.x; block++)
            total += __ldcv(m.partial + ((int64_t)row * gridDim.x + block) * N_SUMS + i);
        totals[i] = total;
    }
    __syncthreads();
    const float mean = __fdiv_rn(totals[N_MIXES], (float)(N_STREAMS * n_cols));
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + m.eps));
    constexpr int N_GATED = MAKES_MIXING ? 2 * N_STREAMS : N_MIXES; // weights, then gates
    if (i < N_GATED) {
        const float found = sigmoid(__fmaf_rn(m.scale[i / N_STREAMS], totals[i] * factor, m.base[i]));
        if (i < N_STREAMS)
            m.weights[row * N_STREAMS + i] = found + m.offset;
        else
            m.gates[row * N_STREAMS + i - N_STREAMS] = __fmaf_rn(m.magnitude, found, MAKES_MIXING ? 0.0f : m.offset);
    }
    if (MAKES_MIXING && i < WARP) {
        const int at = N_GATED + i % (N_STREAMS * N_STREAMS);
        const float value = mixing_of(m, __fmaf_rn(m.scale[2], totals[at] * factor, m.base[at]));
        if (i < N_STREAMS * N_STREAMS)
            m.mixing[row * N_STREAMS * N_STREAMS + i] = value;
    }
}

KERNEL(THREADS)
hyper_connections(const float *streams, int64_t streams_stride, const float *added, int64_t added_stride, const float *gates,
                  int64_t gates_stride, float gate_magnitude, const float *mixed, int64_t mixed_stride, float *out,
                  int64_t out_stride, int n_cols, Mixing mixing, const int *n_rows) {
    __shared__ float sums_of_warps[THREADS / WARP][N_SUMS], totals[N_SUMS];
    const int width = N_STREAMS * n_cols, at = (blockIdx.x * THREADS + threadIdx.x) * COLUMNS;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, stream = at / n_cols, n = *n_rows;
    const bool exists = at < width;
    float w[N_SUMS][COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < N_MIXES; i++)
        if (exists)
            load_floats(mixing.matrix + (int64_t)i * width + at, w[i]);
    begin_kernel();
    for (int row = blockIdx.y; row < n; row += gridDim.y) {
        float x[COLUMNS] = {};
        if (exists && MIXES && added) {
            const float *of_streams = streams + row * streams_stride + at - stream * n_cols;
            const float *kept = mixed + row * mixed_stride + stream;
#pragma unroll
            for (int j = 0; j < N_STREAMS; j++) {
                float y[COLUMNS];
                load_floats(of_streams + j * n_cols, y);
                const float factor = kept[j * N_STREAMS];
#pragma unroll
                for (int i = 0; i < COLUMNS; i++)
                    x[i] = __fmaf_rn(factor, y[i], x[i]);
            }
        } else if (exists)
            load_floats(streams + row * streams_stride + at, x);
        if (exists && added) {
            float y[COLUMNS];
            load_floats(added + row * added_stride + at - stream * n_cols, y);
            const float own = gates[row * gates_stride + stream];
            const float gate = gate_magnitude > 0.0f ? gate_magnitude * sigmoid(own) : own;
#pragma unroll
            for (int i = 0; i < COLUMNS; i++)
                x[i] = __fmaf_rn(gate, y[i], x[i]);
            store_floats(out + row * out_stride + at, x);
        }
        if (N_MIXES == 0)
            continue;
#pragma unroll
        for (int i = 0; i < N_SUMS; i++) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                sum = __fmaf_rn(i < N_MIXES ? w[i][j] : x[j], x[j], sum);
            sum = warp_sum(sum);
            if (lane == 0)
                sums_of_warps[warp][i] = sum;
        }
        __syncthreads();
        if (threadIdx.x < N_SUMS) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < THREADS / WARP; i++)
                sum += sums_of_warps[i][threadIdx.x];
            mixing.partial[((int64_t)row * gridDim.x + blockIdx.x) * N_SUMS + threadIdx.x] = sum;
        }
        if (is_last_block(mixing.n_done + row, gridDim.x))
            finish_row(mixing, row, n_cols, totals);
    }
}
