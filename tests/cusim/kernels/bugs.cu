// Kernels that are wrong, each in one way that the emulator must find.

extern "C" __global__ void half_warp_waits(float *y) {
    float v = threadIdx.x;
    if (threadIdx.x < 16)
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    __syncthreads();
    y[threadIdx.x] = v;
}

extern "C" __global__ void divergent_barrier(float *y) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void wrong_mask(float *y) { y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }

extern "C" __global__ void shuffle_from_exited_lane(float *y) {
    if (threadIdx.x < 8)
        return;
    y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 3);
}

extern "C" __global__ void reads_before_writing(float *y) {
    __shared__ float values[64];
    if (threadIdx.x < 32)
        values[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x];
}

extern "C" __global__ void beyond_static_shared(float *y) {
    __shared__ float values[32];
    values[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x + 1];
}

extern "C" __global__ void beyond_dynamic_shared(float *y) {
    extern __shared__ float values[];
    values[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = values[threadIdx.x];
}

extern "C" __global__ void beyond_global(float *y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n)
        y[i] = 1.0f;
}

extern "C" __global__ void misaligned_load(const unsigned char *x, int *y) {
    y[threadIdx.x] = ((const int4 *)(x + 210 * threadIdx.x))->x;
}

extern "C" __global__ void cast_overflows(const float *x, int *y) { y[threadIdx.x] = (int)x[threadIdx.x]; }

extern "C" __global__ void spins(const unsigned *flag) {
    while (__ldcv(flag) != 1)
        __nanosleep(100);
}

extern "C" __global__ void traps(int *y) { assert(threadIdx.x != 3); }

// Atomic additions race with the plain read of another thread.
extern "C" __global__ void reads_atomic_counter(int *y) {
    __shared__ int counter;
    if (threadIdx.x == 0)
        counter = 0;
    __syncthreads();
    atomicAdd(&counter, 1);
    y[threadIdx.x] = counter;
}

// The warp's own barrier does not order it with other warps.
extern "C" __global__ void syncs_warp_only(float *y) {
    __shared__ float values[64];
    values[threadIdx.x] = (float)threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = values[63 - threadIdx.x];
}

// A write after reads that no barrier separates.
extern "C" __global__ void overwrites_too_early(float *y) {
    __shared__ float values[64];
    values[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = values[(threadIdx.x + 33) % 64];
    values[threadIdx.x] = 0.0f;
}
