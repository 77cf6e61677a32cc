// Attention residuals, before a sub-layer: a row is made of the residual stream and of what it was before, and normalised.
//
//     x[i] = residuals[i]; the last one is a + b if there is a b (null for none), and is then stored first
//     weights = softmax over i of (scorer . x[i]) / sqrt(mean(x[i]^2) + score_eps)
//     mix = sum over i, in order, of weights[i] * x[i]
//     out = weight * mix / sqrt(mean(mix^2) + eps), and out in the forms that integer formats take
//
// Compiled for N_RESIDUALS, MOST_RESIDUALS (there is room for), NORMALIZE (0: the mix is all that is wanted), FORMS
// (`quantize.cuh`), N_COLS and THREADS (`row_norm.cuh`).
// Grid: (residuals, rows); a block takes the score of one, the last block of a row goes on with all.
#include "last_block.cuh"
#include "row_norm.cuh"

struct Residuals {
    float *rows[MOST_RESIDUALS];
    int64_t strides[MOST_RESIDUALS];
};

// Of one residual, by the whole block.
DEVICE float score_of(const float (&x)[ROUNDS][8], const float (&scorer)[ROUNDS][8], float eps, float *partial) {
    float product = 0.0f, squares = 0.0f;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++)
        if (is_column(column_of(round)))
#pragma unroll
            for (int i = 0; i < 8; i++) {
                product = __fmaf_rn(scorer[round][i], x[round][i], product);
                squares = __fmaf_rn(x[round][i], x[round][i], squares);
            }
    product = block_sum(product, partial);
    __syncthreads(); // `partial` is used again
    const float mean = __fdiv_rn(block_sum(squares, partial), (float)N_COLS);
    return __fdiv_rn(product, __fsqrt_rn(mean + eps));
}

// Scores become weights; they were stored by other blocks.
DEVICE void softmax(const float *scores, float (&weights)[N_RESIDUALS]) {
    float largest = NEVER, total = 0.0f;
#pragma unroll
    for (int i = 0; i < N_RESIDUALS; i++) {
        weights[i] = __ldcv(scores + i);
        largest = fmaxf(largest, weights[i]);
    }
#pragma unroll
    for (int i = 0; i < N_RESIDUALS; i++)
        total += weights[i] = exp_canonical(weights[i] - largest);
#pragma unroll
    for (int i = 0; i < N_RESIDUALS; i++)
        weights[i] = __fdiv_rn(weights[i], total);
}

KERNEL(THREADS)
mix_residuals(Residuals residuals, const float *a, int64_t a_stride, const float *b, int64_t b_stride, const float *scorer,
              float score_eps, float *scores, unsigned *n_done, float *mix, int64_t mix_stride, const float *weight, float eps,
              float *out, int64_t out_stride, Forms forms, const int *n_rows) {
    __shared__ float partial[32];
    const int own = blockIdx.x, row = blockIdx.y, n = *n_rows; // as the caller gave it: old
    float x[ROUNDS][8], w[ROUNDS][8];
    load_columns(scorer, w);
    begin_kernel();
    if (row >= n)
        return;
    float *of_block = residuals.rows[own] + row * residuals.strides[own];
    const bool adds = b && own == N_RESIDUALS - 1;
    load_columns(adds ? a + row * a_stride : of_block, x);
    if (adds)
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
            if (is_column(column_of(round))) {
                float added[8];
                load_floats(b + row * b_stride + column_of(round), added);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    x[round][i] += added[i];
                store_floats(of_block + column_of(round), x[round]);
            }
    const float score = score_of(x, w, score_eps, partial);
    if (threadIdx.x == 0)
        scores[row * N_RESIDUALS + own] = score;
    if (!is_last_block(n_done + row, N_RESIDUALS))
        return;

    float weights[N_RESIDUALS];
    softmax(scores + row * N_RESIDUALS, weights);
    if (NORMALIZE && weight)
        load_columns(weight, w);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int at = column_of(round);
        if (!is_column(at))
            continue;
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[round][i] = 0.0f;
#pragma unroll
        for (int r = 0; r < N_RESIDUALS; r++) {
            const float *from = residuals.rows[r] + row * residuals.strides[r] + at;
            float value[8];
            if (r < N_RESIDUALS - 1)
                load_floats(from, value);
            else
                load_floats_past_cache(from, value); // another block may have stored it
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[round][i] = __fmaf_rn(weights[r], value[i], x[round][i]);
        }
        store_floats(mix + row * mix_stride + at, x[round]);
    }
    if (NORMALIZE)
        normalize_row<FORMS>(x, w, weight, nullptr, eps, out + row * out_stride, forms, row, partial);
}
