// Tensor cores, ldmatrix and cp.async, one warp each.
#include "ptx.cuh"

// C [16, 8] = A [16, K] * B [8, K] transposed, float16, K a multiple of 16; tiles staged with cp.async, double-buffered.
extern "C" __global__ void matmul_f16(const unsigned short *A, const unsigned short *B, float *C, int K) {
    __shared__ __align__(16) unsigned short tile_a[2][16 * 16];
    __shared__ __align__(16) unsigned short tile_b[2][8 * 16];
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4, row = lane / 2, half = lane % 2 * 8;
    float c[4] = {0, 0, 0, 0};
    auto fetch = [&](int stage, int k) {
        cp_async16(&tile_a[stage][row * 16 + half], A + row * K + k + half);
        if (row < 8)
            cp_async16(&tile_b[stage][row * 16 + half], B + row * K + k + half);
        cp_async_commit();
    };
    fetch(0, 0);
    for (int k = 0, stage = 0; k < K; k += 16, stage ^= 1) {
        if (k + 16 < K) {
            fetch(stage ^ 1, k + 16);
#ifndef BUG_NO_WAIT
            cp_async_wait<1>();
#endif
        } else
            cp_async_wait<0>();
#ifndef BUG_NO_SYNC_AFTER_WAIT
        __syncwarp();
#endif
        unsigned a[4], b[2];
        ldmatrix_x4(a, &tile_a[stage][lane % 16 * 16 + lane / 16 * 8]);
        ldmatrix_x2(b, &tile_b[stage][lane % 8 * 16 + lane / 8 % 2 * 8]);
        mma_m16n8k16_f16(c, a, b);
#ifndef BUG_NO_SYNC_BEFORE_REUSE
        __syncwarp();
#endif
    }
    for (int i = 0; i < 4; i++)
        C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

// One mma on fragments that the caller made: a [32 lanes, 4], b [32, 2], c [32, 4].
extern "C" __global__ void fragments_f16(const unsigned *a, const unsigned *b, float *c) {
    mma_m16n8k16_f16(*(float(*)[4])(c + 4 * threadIdx.x), *(const unsigned(*)[4])(a + 4 * threadIdx.x),
                     *(const unsigned(*)[2])(b + 2 * threadIdx.x));
}
extern "C" __global__ void fragments_bf16(const unsigned *a, const unsigned *b, float *c) {
    mma_m16n8k16_bf16(*(float(*)[4])(c + 4 * threadIdx.x), *(const unsigned(*)[4])(a + 4 * threadIdx.x),
                      *(const unsigned(*)[2])(b + 2 * threadIdx.x));
}
extern "C" __global__ void fragments_s8(const unsigned *a, const unsigned *b, int *c) {
    mma_m16n8k32_s8(*(int(*)[4])(c + 4 * threadIdx.x), *(const unsigned(*)[4])(a + 4 * threadIdx.x),
                    *(const unsigned(*)[2])(b + 2 * threadIdx.x));
}
// Likewise for half as many columns: a [32, 2], b [32].
extern "C" __global__ void fragments_s8_short(const unsigned *a, const unsigned *b, int *c) {
    mma_m16n8k16_s8(*(int(*)[4])(c + 4 * threadIdx.x), *(const unsigned(*)[2])(a + 2 * threadIdx.x), b[threadIdx.x]);
}

// Loads four 8x8 matrices [4, 8, 8] plainly and transposed: out [2, 32, 4].
extern "C" __global__ void load_matrices(const unsigned short *matrices, unsigned *out) {
    __shared__ __align__(16) unsigned short rows[32][8];
    const int lane = threadIdx.x;
    for (int i = 0; i < 8; i++)
        rows[lane][i] = matrices[8 * lane + i];
    __syncwarp();
    unsigned r[4];
    ldmatrix_x4(r, rows[lane]);
    for (int i = 0; i < 4; i++)
        out[4 * lane + i] = r[i];
    ldmatrix_x4_trans(r, rows[lane]);
    for (int i = 0; i < 4; i++)
        out[128 + 4 * lane + i] = r[i];
}
