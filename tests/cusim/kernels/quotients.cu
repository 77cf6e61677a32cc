// Several values by one divisor: what `divide` of `common.cuh` makes of them. Grid: (divisors); a warp for 256 values of each.
#include "common.cuh"

extern "C" __global__ void quotients(const float *x, const float *divisors, float *out) {
    float values[8];
    for (int i = 0; i < 8; i++)
        values[i] = x[(blockIdx.x * 8 + i) * WARP + threadIdx.x];
    divide(values, divisors[blockIdx.x]);
    for (int i = 0; i < 8; i++)
        out[(blockIdx.x * 8 + i) * WARP + threadIdx.x] = values[i];
}
