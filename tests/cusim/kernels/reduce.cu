// Row sums and normalisation with the usual ways to exchange values in a block, and the usual ways to get them wrong.

// One block per row; a partial sum per warp in dynamic shared memory.
extern "C" __global__ void rms_norm(const float *x, float *y, int n, float eps) {
    extern __shared__ float partial[];
    const float *row = x + (size_t)blockIdx.x * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        sum += row[i] * row[i];
#pragma unroll
    for (int by = 16; by; by /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = sum;
#ifndef BUG_NO_BARRIER
    __syncthreads();
#endif
    sum = 0.0f;
    for (int i = 0; i < (int)blockDim.x / 32; i++)
        sum += partial[i];
    const float scale = rsqrtf(sum / n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        y[(size_t)blockIdx.x * n + i] = row[i] * scale;
}

// The same through a tree in static shared memory, 128 threads.
extern "C" __global__ void rms_norm_tree(const float *x, float *y, int n, float eps) {
    __shared__ float sums[128];
    const float *row = x + (size_t)blockIdx.x * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        sum += row[i] * row[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if ((int)threadIdx.x < half)
            sums[threadIdx.x] += sums[threadIdx.x + half];
#ifndef BUG_NO_TREE_BARRIER
        __syncthreads();
#endif
    }
    const float scale = rsqrtf(sums[0] / n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        y[(size_t)blockIdx.x * n + i] = row[i] * scale;
}
