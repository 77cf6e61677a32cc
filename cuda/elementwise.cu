// The small operations between the matrix products. Matrices are float32, row-major, `*_stride` values from row to row.
// Row t exists if t < *n_rows; the grids are as large as the largest step and the blocks of missing rows return.
#include "rope.cuh"

constexpr int THREADS = 256;

// Column of an element-wise operation. Grid: (ceil(n_cols / 256), rows).
DEVICE int column() { return blockIdx.x * THREADS + threadIdx.x; }

// out = a + b; in place allowed.
KERNEL(THREADS)
add(const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *out, int64_t out_stride, int n_cols,
    const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = column();
    if (row < *n_rows && col < n_cols)
        out[row * out_stride + col] = a[row * a_stride + col] + b[row * b_stride + col];
}

// out = x * (factor * by), with one value of `by` for each row (a stride of 0: for all), or x * factor if it is null; in
// place allowed.
KERNEL(THREADS)
scale(const float *x, int64_t x_stride, const float *by, int64_t by_stride, float *out, int64_t out_stride, int n_cols,
      float factor, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = column();
    if (row < *n_rows && col < n_cols)
        out[row * out_stride + col] = x[row * x_stride + col] * (by ? factor * by[row * by_stride] : factor);
}

// out = cap * tanh(x / cap); in place allowed.
KERNEL(THREADS)
soft_caps(const float *x, int64_t x_stride, float *out, int64_t out_stride, int n_cols, float cap, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = column();
    if (row < *n_rows && col < n_cols)
        out[row * out_stride + col] = soft_cap(x[row * x_stride + col], cap);
}

// out = x, but no farther from 0 than `limit`; in place allowed.
KERNEL(THREADS)
clamp(const float *x, int64_t x_stride, float *out, int64_t out_stride, int n_cols, float limit, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = column();
    if (row < *n_rows && col < n_cols)
        out[row * out_stride + col] = within(x[row * x_stride + col], limit);
}

// x *= 1 + slope * ln(1 + floor((position + offset) / period)), in place.
KERNEL(THREADS)
scale_by_position(float *x, int64_t x_stride, const int *positions, int n_cols, int offset, int period, float slope,
                  const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = column();
    if (row < *n_rows && col < n_cols)
        x[row * x_stride + col] *= (float)(1.0 + (double)slope * log1p((double)((positions[row] + offset) / period)));
}

// `joined` holds, for each head, `first_dim` values that are also in `first`, and after them `second_dim` that are in
// `second`: taken apart, or put together if `is_join`. Grid: over the columns of `joined`.
KERNEL(THREADS)
split_or_join_heads(float *joined, int64_t joined_stride, float *first, int64_t first_stride, float *second,
                    int64_t second_stride, int n_heads, int first_dim, int second_dim, int is_join, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, col = column(), dim = first_dim + second_dim;
    if (row >= *n_rows || col >= n_heads * dim)
        return;
    const int head = col / dim, i = col % dim;
    float *whole = joined + row * joined_stride + col;
    float *part = i < first_dim ? first + row * first_stride + head * first_dim + i
                                : second + row * second_stride + head * second_dim + i - first_dim;
    if (is_join)
        *whole = *part;
    else
        *part = *whole;
}

// out[i] = x[output_rows[i]]
KERNEL(THREADS)
select_outputs(const float *x, int64_t x_stride, const int *output_rows, float *out, int64_t out_stride, int n_cols,
               const int *n_outputs) {
    begin_kernel();
    const int row = blockIdx.y, col = column();
    if (row < *n_outputs && col < n_cols)
        out[row * out_stride + col] = x[output_rows[row] * x_stride + col];
}

// Rotates, in place, the first n_rot values of each head (`rope.cuh`), by positions rounded down to multiples of `period`.
// Grid: (ceil(n_heads * n_rot / 2 / 256), rows).
KERNEL(THREADS)
rope(float *x, int64_t x_stride, const int *positions, const float *frequencies, int n_heads, int head_dim, int n_rot,
     int is_adjacent, float magnitude, int period, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, n_pairs = n_rot / 2, head = column() / n_pairs, i = column() % n_pairs;
    if (row >= *n_rows || head >= n_heads)
        return;
    const Turn turn = turn_of(positions[row] / period * period, frequencies[i], magnitude);
    rotate(x + row * x_stride + head * head_dim, i, n_rot, is_adjacent, turn);
}

// out = weight * x / sqrt(mean(x^2) + eps) + bias for each group of `group_size` columns, without weight (null) times 1,
// without bias (null) plus nothing; those of the next group lie `weight_step` further. With `centers` x is what is left of a
// group when its mean is taken from it. In place allowed.
// Grid: (groups, rows); a block of whole warps takes one group.
KERNEL(THREADS)
rms_norm(const float *x, int64_t x_stride, const float *weight, const float *bias, float *out, int64_t out_stride,
         int group_size, int weight_step, int centers, float eps, const int *n_rows) {
    begin_kernel();
    __shared__ float partial[THREADS / WARP];
    const int row = blockIdx.y;
    if (row >= *n_rows)
        return;
    const float *values = x + row * x_stride + blockIdx.x * group_size;
    float center = 0.0f, squares = 0.0f;
    if (centers) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < group_size; i += blockDim.x)
            sum += values[i];
        center = __fdiv_rn(block_sum(sum, partial), (float)group_size);
        __syncthreads(); // `partial` is used again
    }
    for (int i = threadIdx.x; i < group_size; i += blockDim.x) {
        const float value = values[i] - center;
        squares = __fmaf_rn(value, value, squares);
    }
    const float mean = __fdiv_rn(block_sum(squares, partial), (float)group_size);
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + eps));
    float *result = out + row * out_stride + blockIdx.x * group_size;
    for (int i = threadIdx.x; i < group_size; i += blockDim.x) {
        const int at = blockIdx.x * weight_step + i;
        const float value = (values[i] - center) * factor * (weight ? weight[at] : 1.0f);
        result[i] = bias ? value + bias[at] : value;
    }
}
