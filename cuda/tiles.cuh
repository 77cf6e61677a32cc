// A tile of a quantised matrix times a tile of activation rows, for steps of many tokens: 16 rows for each warp of a block by
// up to 64 tokens, on the int8 tensor cores, with the bits of `rows.cuh`. Compiled for TILE_WARPS: as many as have room on
// GPUs with 100 KB of shared memory, where a multiprocessor has but one such block.
//
// The columns are taken 256 at a time. A warp has 16 rows: their bytes come as they are to shared memory, one step ahead
// of the arithmetic (cp.async), are unpacked there once for all tokens (or where they lie), and go to registers. The activations of 64 tokens
// are fetched the same way, for all warps together. Products of 32 (or 16) columns that share a scale are summed by one `mma`
// in int32, times that scale added up over the block, exactly; then each lane runs the chains of its own outputs, one
// fused multiply-add a block (two with minimums), in order. The minimums of a block times the sums of its activations
// are one more product of int8 matrices, with the sums in two parts of six and seven bits.
//
// Reads up to 15 bytes beyond both ends of a matrix, like `rows.cuh`. Only eights of tokens that exist are computed.
#pragma once

#include "formats.cuh"
#include "tile_sizes.cuh"

constexpr int TILE_THREADS = TILE_WARPS * WARP;
constexpr int WARP_ROWS = 16, TILE_ROWS = TILE_WARPS * WARP_ROWS; // rows of the matrix
constexpr int EIGHTS = TILE_TOKENS / 8;
constexpr int STEP = 256;          // columns
constexpr int PARTS = STEP / 32;   // that are unpacked at once
constexpr int STRIDE = STEP + 16;  // bytes from row to row in shared memory: ldmatrix then meets no bank twice

#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr int TILE_BLOCKS = 1; // of a multiprocessor
#else
constexpr int TILE_BLOCKS = 2; // these have more shared memory
#endif
#define TILE_KERNEL(blocks) extern "C" __global__ void __launch_bounds__(TILE_THREADS, TILE_WARPS > 8 ? 1 : blocks)

// What a lane has of its warp's 16 rows and of the tile's tokens: [eight][i] is row g + 8 * (i / 2) of the warp and token
// 8 * eight + 2 * t + i % 2, with g = lane / 4 and t = lane % 4.
using TileSums = float[EIGHTS][4];

DEVICE int tile_row(int i) { return threadIdx.x / WARP * WARP_ROWS + threadIdx.x % WARP / 4 + 8 * (i / 2); }
DEVICE int tile_token(int eight, int i) { return 8 * eight + threadIdx.x % 4 * 2 + i % 2; }

template <class Format> struct TileDots {
    static constexpr int BLOCKS = STEP / Format::BLOCK; // in a step: 1 or 8
    static constexpr int RAW_BYTES = BLOCKS * Format::BYTES + (Format::ALIGNMENT == 16 ? 0 : 30);
    static constexpr int RAW_STRIDE = RAW_BYTES / 16 * 16;

    // Whether bytes go to registers as they are: a lane finds its own weights in them.
    static constexpr bool IN_PLACE = Format::HAS_FRAGMENTS;

    using Raw = uint8_t[WARP_ROWS][RAW_STRIDE]; // bytes of a warp's rows, from the 16-byte piece where each begins
    using Unpacked = int8_t[IN_PLACE ? 1 : WARP_ROWS][IN_PLACE ? 16 : STRIDE];
    using Scales = int8_t[BLOCKS == 1 && !IN_PLACE ? WARP_ROWS : 1][STEP / 16]; // of each row; blocks of 32 have none

    struct Shared {
        __align__(16) int8_t x[2][TILE_TOKENS][STRIDE];
        __align__(16) float d_x[2][TILE_TOKENS][BLOCKS];
        __align__(16) int16_t sums[Format::HAS_MIN ? 2 : 1][Format::HAS_MIN ? TILE_TOKENS : 1][STEP / 16];
        struct {
            __align__(16) Raw raw;
            Unpacked q;
            Scales scales, mins;
        } warp[TILE_WARPS];
    };

    // d and min_d of the lane's two rows, g and g + 8.
    struct Factors {
        float d[2][BLOCKS], min_d[2][BLOCKS];
    };

    static __device__ __forceinline__ int n_parts_of(int n_cols, int step) { return min(PARTS, (n_cols - step * STEP) / 32); }

    // One step of a warp's 16 rows, of a matrix of n_rows, from first_row on.
    struct Rows {
        const uint8_t *weights;
        int64_t row_bytes;
        int first_row, n_rows, step;

        __device__ __forceinline__ const uint8_t *at(int row) const { // those beyond the matrix repeat its last one
            return weights + min(first_row + row, n_rows - 1) * row_bytes + (int64_t)step * BLOCKS * Format::BYTES;
        }
        __device__ __forceinline__ const uint8_t *block(const Raw &raw, int row, int block) const {
            return &raw[row][(uint64_t)at(row) & 15] + block * Format::BYTES;
        }

        __device__ __forceinline__ void fetch(Raw &raw, int n_parts) const {
            constexpr int PIECES = RAW_STRIDE / 16;
            const int n_bytes = n_parts * 32 / Format::BLOCK * Format::BYTES;
            for (int i = threadIdx.x % WARP; i < WARP_ROWS * PIECES; i += WARP) {
                const uint8_t *from = at(i / PIECES), *aligned = (const uint8_t *)((uint64_t)from & ~(uint64_t)15);
                const int piece = i % PIECES;
                if (aligned + 16 * piece < from + n_bytes)
                    cp_async16(raw[i / PIECES] + 16 * piece, aligned + 16 * piece);
            }
        }

        // To int8, with the scales of large blocks.
        __device__ __forceinline__ void unpack(const Raw &raw, int n_parts, const int8_t *grid, Unpacked &q, Scales &scales,
                                               Scales &mins) const {
            const int lane = threadIdx.x % WARP;
#pragma unroll
            for (int k = 0; k < WARP_ROWS * PARTS / WARP; k++) {
                const int row = k * (WARP / PARTS) + lane / PARTS, part = lane % PARTS;
                if (part >= n_parts)
                    continue;
                Part w;
                unpack_weights<Format>(block(raw, row, part * 32 / Format::BLOCK), part % (Format::BLOCK / 32), grid, w);
                uint4 *to = (uint4 *)&q[row][32 * part];
                to[0] = make_uint4((unsigned)w.q[0], (unsigned)w.q[1], (unsigned)w.q[2], (unsigned)w.q[3]);
                to[1] = make_uint4((unsigned)w.q[4], (unsigned)w.q[5], (unsigned)w.q[6], (unsigned)w.q[7]);
                if (BLOCKS == 1)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        scales[row][2 * part + half] = (int8_t)w.scale[half];
                        if (Format::HAS_MIN)
                            mins[row][2 * part + half] = (int8_t)w.min[half];
                    }
            }
        }

        __device__ __forceinline__ void load_factors(const Raw &raw, int n_parts, Factors &factors) const {
            const int g = threadIdx.x % WARP / 4;
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
                    if (BLOCKS == 1 || b < n_parts) {
                        factors.d[i][b] = Format::d(block(raw, g + 8 * i, b));
                        factors.min_d[i][b] = Format::min_d(block(raw, g + 8 * i, b));
                    }
        }
    };

    // The fragments of unpacked rows.
    static __device__ __forceinline__ void load_rows(const Unpacked &q, int n_parts, unsigned (&a)[PARTS][4]) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (part < n_parts)
                ldmatrix_x4(a[part], &q[lane % 16][32 * part + lane / 16 * 16]);
    }

    // Fetches the activations of one step; `rows` are those of the tile's tokens.
    static __device__ __forceinline__ void fetch_x(Shared &shared, int buffer, const uint8_t *const *rows, int n_tokens,
                                                   int n_cols, int step) {
        const int n_rows = (n_tokens + 7) / 8 * 8, first = step * STEP, n = min(STEP, n_cols - first);
        const int64_t d_at = round_up_64(n_cols);
        for (int i = threadIdx.x; i < n_rows * (STEP / 16); i += TILE_THREADS) {
            const int token = i / (STEP / 16), at = i % (STEP / 16) * 16;
            if (at < n)
                cp_async16(&shared.x[buffer][token][at], rows[token] + first + at);
        }
        for (int i = threadIdx.x; i < n_rows * BLOCKS; i += TILE_THREADS) {
            const int token = i / BLOCKS, block = i % BLOCKS;
            if (block * Format::BLOCK < n)
                cp_async4(&shared.d_x[buffer][token][block], rows[token] + d_at + 4 * (step * BLOCKS + block));
        }
        if (!Format::HAS_MIN)
            return;
        const int64_t sums_at = d_at + round_up_64(n_cols / Format::BLOCK * (int64_t)sizeof(float));
        for (int i = threadIdx.x; i < n_rows * PARTS; i += TILE_THREADS) {
            const int token = i / PARTS, part = i % PARTS;
            if (part * 32 < n)
                cp_async4(&shared.sums[buffer][token][2 * part], rows[token] + sums_at + 4 * (step * PARTS + part));
        }
    }

    // acc = rows `first_row` + 16 * warp and on of a matrix of n_rows, times the activation rows `rows` (in shared
    // memory, TILE_TOKENS of them, those beyond n_tokens up to the next multiple of 8 may repeat others). By the whole
    // block; begins and ends with everybody done with `shared`, which needs no preparation.
    static __device__ __forceinline__ void run(const uint8_t *weights, int64_t row_bytes, int first_row, int n_rows,
                                               int n_cols, const uint8_t *const *rows, int n_tokens, const int8_t *grid,
                                               Shared &shared, TileSums &acc) {
        auto &own = shared.warp[threadIdx.x / WARP];
        const int own_row = first_row + threadIdx.x / WARP * WARP_ROWS;
        const int n_steps = (n_cols + STEP - 1) / STEP, n_eights = (n_tokens + 7) / 8;
        auto fetch_raw = [&](int step) {
            Rows{weights, row_bytes, own_row, n_rows, step}.fetch(own.raw, n_parts_of(n_cols, step));
        };
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                acc[j][i] = 0.0f;
        fetch_raw(0);
        fetch_x(shared, 0, rows, n_tokens, n_cols, 0);
        cp_async_commit();
        for (int step = 0; step < n_steps; step++) {
            cp_async_wait<0>();
            __syncthreads(); // this step is there, and everybody is done with the one before
            const int buffer = step % 2, n_parts = n_parts_of(n_cols, step);
            if (step + 1 < n_steps)
                fetch_x(shared, buffer ^ 1, rows, n_tokens, n_cols, step + 1);
            Factors factors;
            unsigned a[PARTS][4];
            const Rows rows_of_step = {weights, row_bytes, own_row, n_rows, step};
            rows_of_step.load_factors(own.raw, n_parts, factors);
            auto fetch_next = [&] {
                __syncwarp(); // all have read the bytes, which can be overwritten
                if (step + 1 < n_steps)
                    fetch_raw(step + 1);
                cp_async_commit();
            };
            if constexpr (IN_PLACE) {
                const int g = threadIdx.x % WARP / 4;
                const uint8_t *const blocks[2] = {rows_of_step.block(own.raw, g, 0), rows_of_step.block(own.raw, g + 8, 0)};
                const BlockScales scales(blocks);
                Format::fragments(blocks, a);
                fetch_next();
                add_large_block(shared, buffer, scales, factors, a, n_eights, acc);
            } else {
                rows_of_step.unpack(own.raw, n_parts, grid, own.q, own.scales, own.mins);
                fetch_next();
                load_rows(own.q, n_parts, a);
                if constexpr (BLOCKS == 1)
                    add_large_block(shared, buffer, BlockScales(own.scales, own.mins), factors, a, n_eights, acc);
                else
                    add_small_blocks(shared, buffer, factors, a, n_parts, n_eights, acc);
            }
        }
        __syncthreads();
    }

    // The fragments of eight tokens for parts 2 * pair and the next: b[2 * i] and b[2 * i + 1] are those of the i-th. x: the
    // first token's 256 values in shared memory, STRIDE bytes from one token to the next.
    static __device__ __forceinline__ void load_x(const int8_t *x, int pair, unsigned (&b)[4]) {
        const int lane = threadIdx.x % WARP;
        ldmatrix_x4(b, x + lane % 8 * STRIDE + 64 * pair + lane / 8 * 16);
    }

    // The scales of the lane's two rows of one block of 256, and the words of the minimums that it multiplies.
    struct BlockScales {
        static constexpr int N = STEP / Format::PER_SCALE;
        int scale[2][N];
        unsigned mins[2];

        __device__ __forceinline__ BlockScales(const Scales &scales, const Scales &minimums) {
            const int g = threadIdx.x % WARP / 4, t = threadIdx.x % WARP % 4;
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int s = 0; s < N; s++)
                    scale[i][s] = scales[g + 8 * i][s * (Format::PER_SCALE / 16)];
                mins[i] = Format::HAS_MIN ? *(const unsigned *)&minimums[g + 8 * i][4 * t] : 0;
            }
        }

        // From blocks as they are.
        __device__ __forceinline__ explicit BlockScales(const uint8_t *const (&blocks)[2]) {
            const int t = threadIdx.x % WARP % 4;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                Format::all_scales(blocks[i], scale[i]);
                mins[i] = Format::four_mins(blocks[i], t);
            }
        }
    };

    // isum of one block of 256 with eight tokens.
    static __device__ __forceinline__ void multiply_large(const int8_t *x, const BlockScales &scales,
                                                          const unsigned (&a)[PARTS][4], int (&isum)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            isum[i] = 0;
#pragma unroll
        for (int pair = 0; pair < PARTS / 2; pair++) {
            unsigned b[4];
            load_x(x, pair, b);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const unsigned(&w)[4] = a[2 * pair + h];
                if constexpr (Format::PER_SCALE == 32) {
                    int sums[4];
                    const unsigned of_x[2] = {b[2 * h], b[2 * h + 1]};
                    mma_m16n8k32_s8(sums, w, of_x);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        isum[i] += scales.scale[i / 2][2 * pair + h] * sums[i];
                } else {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int sums[4];
                        const unsigned rows[2] = {w[2 * half], w[2 * half + 1]};
                        mma_m16n8k16_s8(sums, rows, b[2 * h + half]);
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            isum[i] += scales.scale[i / 2][2 * (2 * pair + h) + half] * sums[i];
                    }
                }
            }
        }
    }

    // imin of it; sums: the 16 sums of token g.
    static __device__ __forceinline__ void multiply_mins(const int16_t *sums, const BlockScales &scales, int (&imin)[4]) {
        // four sums, each 64 * (a byte from -32 to 31) + (0 to 63)
        const uint2 four = *(const uint2 *)&sums[4 * (threadIdx.x % 4)];
        const unsigned far = __byte_perm(four.x >> 6, four.y >> 6, 0x6420);
        const unsigned near = __byte_perm(four.x & 0x003f003fu, four.y & 0x003f003fu, 0x6420);
        int far_sums[4];
        mma_m16n8k16_s8(far_sums, scales.mins, far);
        mma_m16n8k16_s8(imin, scales.mins, near);
#pragma unroll
        for (int i = 0; i < 4; i++)
            imin[i] += 64 * far_sums[i];
    }

    // Adds the one block of 256 columns.
    static __device__ __forceinline__ void add_large_block(const Shared &shared, int buffer, const BlockScales &own,
                                                           const Factors &factors, const unsigned (&a)[PARTS][4],
                                                           int n_eights, TileSums &acc) {
        const float d[2] = {factors.d[0][0], factors.d[1][0]}, min_d[2] = {factors.min_d[0][0], factors.min_d[1][0]};
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            if (j >= n_eights)
                break;
            int isum[4];
            multiply_large(shared.x[buffer][8 * j], own, a, isum);
            const float d_x[2] = {shared.d_x[buffer][tile_token(j, 0)][0], shared.d_x[buffer][tile_token(j, 1)][0]};
#pragma unroll
            for (int i = 0; i < 4; i++)
                acc[j][i] = __fmaf_rn(d[i / 2] * d_x[i % 2], (float)isum[i], acc[j][i]);
            if constexpr (Format::HAS_MIN) {
                int imin[4];
                multiply_mins(shared.sums[buffer][8 * j + threadIdx.x % WARP / 4], own, imin);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    acc[j][i] = __fmaf_rn(min_d[i / 2] * d_x[i % 2], (float)imin[i], acc[j][i]);
            }
        }
    }

    // Adds up to eight blocks of 32 columns, which have no scales of their own.
    static __device__ __forceinline__ void add_small_blocks(const Shared &shared, int buffer, const Factors &factors,
                                                            const unsigned (&a)[PARTS][4], int n_parts, int n_eights,
                                                            TileSums &acc) {
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            if (j >= n_eights)
                break;
            const int token[2] = {tile_token(j, 0), tile_token(j, 1)};
#pragma unroll
            for (int four = 0; four < PARTS; four += 4) {
                if (four >= n_parts)
                    break;
                const float4 low = *(const float4 *)&shared.d_x[buffer][token[0]][four];
                const float4 high = *(const float4 *)&shared.d_x[buffer][token[1]][four];
                const float d_x[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
                for (int pair = four / 2; pair < four / 2 + 2; pair++) {
                    if (2 * pair >= n_parts)
                        break;
                    unsigned b[4];
                    load_x(shared.x[buffer][8 * j], pair, b);
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int part = 2 * pair + h;
                        if (part >= n_parts)
                            break;
                        int sums[4];
                        const unsigned x[2] = {b[2 * h], b[2 * h + 1]};
                        mma_m16n8k32_s8(sums, a[part], x);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float d = d_x[i % 2][part % 4];
                            acc[j][i] = __fmaf_rn(factors.d[i / 2][part] * d, (float)sums[i], acc[j][i]);
                            if constexpr (Format::HAS_MIN) {
                                const int16_t *of_x = &shared.sums[buffer][token[i % 2]][2 * part];
                                const float imin = (float)(of_x[0] + of_x[1]);
                                acc[j][i] = __fmaf_rn(factors.min_d[i / 2][part] * d, imin, acc[j][i]);
                            }
                        }
                    }
                }
            }
        }
    }
};
