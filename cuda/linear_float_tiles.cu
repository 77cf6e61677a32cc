// As `linear.cu`, for many tokens and float formats, by tiles of 32 rows and 16 tokens.
//
// Compiled for FORMAT. x: float32 rows. Grid: (row blocks of all matrices, groups of 16 tokens, heads). Half a warp takes 8
// rows and 8 tokens; its lanes are the sixteen chains of each of these 64 results. The block unpacks the weights of 64
// columns once for all its tokens.
#include "formats.cuh"
#include "matrices.cuh"

constexpr int THREADS = 128;
constexpr int ROWS = 32, TOKENS = 16, OWN = 8; // of the block; of half a warp, each
constexpr int STEP = 64;                       // columns
constexpr int STRIDE = STEP + 2;               // eight rows apart is then sixteen banks apart
constexpr int N_WEIGHTS = ROWS * STEP / THREADS, N_VALUES = TOKENS * STEP / THREADS; // that a thread fetches

KERNEL(THREADS)
linear_float_tiles(Matrices matrices, int64_t row_bytes, int64_t head_weight_bytes, const uint8_t *x, int64_t x_row_bytes,
                   int64_t head_x_bytes, int n_cols, const int8_t *, const int *n_tokens) {
    begin_kernel();
    __shared__ float weights[ROWS][STRIDE], values[TOKENS][STRIDE];
    const int first_token = blockIdx.y * TOKENS, head = blockIdx.z, n = min(TOKENS, *n_tokens - first_token);
    if (n <= 0)
        return;
    const Matrix &matrix = matrix_of(matrices, blockIdx.x);
    const int first_row = ((int)blockIdx.x - matrix.first_block) * ROWS, n_rows = min(ROWS, matrix.n_rows - first_row);
    const uint8_t *from = matrix.weights + head * head_weight_bytes + first_row * row_bytes;
    const uint8_t *x_from = x + head * head_x_bytes + first_token * x_row_bytes;
    const int thread = threadIdx.x, chain = thread % 16, half = thread / 16;
    const int own_row = half % (ROWS / OWN) * OWN, own_token = half / (ROWS / OWN) * OWN;

    // Rows and tokens that do not exist repeat the last one.
    float next_weights[N_WEIGHTS], next_values[N_VALUES];
    auto fetch = [&](int first) {
#pragma unroll
        for (int k = 0; k < N_WEIGHTS; k++) {
            const int i = k * THREADS + thread, col = first + i % STEP;
            if (col < n_cols) {
                const uint8_t *row = from + min(i / STEP, n_rows - 1) * row_bytes;
                next_weights[k] = FORMAT::value(row + (int64_t)(col / FORMAT::BLOCK) * FORMAT::BYTES, col % FORMAT::BLOCK);
            }
        }
#pragma unroll
        for (int k = 0; k < N_VALUES; k++) {
            const int i = k * THREADS + thread, col = first + i % STEP;
            if (col < n_cols)
                next_values[k] = ((const float *)(x_from + min(i / STEP, n - 1) * x_row_bytes))[col];
        }
    };
    float acc[OWN * OWN];
#pragma unroll
    for (int i = 0; i < OWN * OWN; i++)
        acc[i] = 0.0f;
    fetch(0);
    for (int first = 0; first < n_cols; first += STEP) {
        __syncthreads(); // everybody is done with the step before
#pragma unroll
        for (int k = 0; k < N_WEIGHTS; k++)
            weights[(k * THREADS + thread) / STEP][thread % STEP] = next_weights[k];
#pragma unroll
        for (int k = 0; k < N_VALUES; k++)
            values[(k * THREADS + thread) / STEP][thread % STEP] = next_values[k];
        __syncthreads();
        if (first + STEP < n_cols)
            fetch(first + STEP);
#pragma unroll
        for (int at = 0; at < STEP; at += 16) {
            const int col = at + chain;
            if (first + col >= n_cols)
                break;
            float w[OWN], v[OWN];
#pragma unroll
            for (int i = 0; i < OWN; i++)
                w[i] = weights[own_row + i][col], v[i] = values[own_token + i][col];
#pragma unroll
            for (int r = 0; r < OWN; r++)
#pragma unroll
                for (int t = 0; t < OWN; t++)
                    acc[r * OWN + t] = __fmaf_rn(w[r], v[t], acc[r * OWN + t]);
        }
    }
    add_over_lanes<16, OWN * OWN>(acc);
#pragma unroll
    for (int i = 0; i < OWN * OWN / 16; i++) {
        const int own = chain * (OWN * OWN / 16) + i, row = own_row + own / OWN, token = own_token + own % OWN;
        if (row < n_rows && token < n)
            matrix.put(head, first_row + row, first_token + token, acc[i]);
    }
}
