// Float32 rows to activation rows (`common.cuh`), in groups of GROUP (256 or 32) values:
// d = amax / 127, q = x * (127 / amax) rounded to nearest even. A NaN counts as nothing in amax and becomes -127.
//
// Compiled for GROUP. Grid: (ceil(n_cols / 1024), rows); a block is 4 warps, a warp takes 256 columns, a lane eight.
// The number of rows is *n_tokens * rows_per_token.
#include "common.cuh"

KERNEL(4 * WARP)
quantize(const float *x, int64_t x_stride, int n_cols, uint8_t *out, int64_t out_row_bytes, int rows_per_token,
         const int *n_tokens) {
    const int row = blockIdx.y, lane = threadIdx.x % WARP;
    const int first = (blockIdx.x * 4 + threadIdx.x / WARP) * 256;
    if (row >= *n_tokens * rows_per_token || first >= n_cols)
        return;
    const int at = first + 8 * lane;
    const bool exists = at < n_cols; // n_cols is whole groups, so a group's lanes exist together
    const float *values = x + row * x_stride + at;
    float v[8], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = exists ? values[i] : 0.0f;
        amax = fmaxf(amax, fabsf(v[i]));
    }
    for (int step = GROUP / 16; step; step /= 2)
        amax = fmaxf(amax, __shfl_xor_sync(ALL_LANES, amax, step));
    const float ratio = amax > 0.0f ? __fdiv_rn(127.0f, amax) : 0.0f;

    int sum = 0;
    unsigned packed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int q = __float2int_rn(fminf(fmaxf(rintf(v[i] * ratio), -127.0f), 127.0f));
        sum += q;
        packed[i / 4] |= (unsigned)(q & 255) << 8 * (i % 4);
    }
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    if (!exists)
        return;
    const Activation row_out = activation_view(out + row * out_row_bytes, GROUP, n_cols);
    *(uint2 *)(row_out.q + at) = make_uint2(packed[0], packed[1]);
    if (lane % 2 == 0)
        row_out.sums[at / 16] = (int16_t)sum;
    if (at % GROUP == 0)
        row_out.d[at / GROUP] = __fdiv_rn(amax, 127.0f);
}
