// Rows of a weight matrix times up to N activation rows, by one warp, in the canonical arithmetic.
//
// Integer formats. The bytes of a row are brought to shared memory in 16-byte pieces, several chunks of blocks ahead of
// the arithmetic (cp.async), so any block size and alignment is read at full width and enough bytes are on the way
// without registers for them. BLOCK / 32 lanes share a block: each multiplies 32 weights, and their integer sums are
// added up exactly. One lane for each token then runs the chain the arithmetic asks for, one fused multiply-add a
// block (two with minimums), in order.
//
// The 16-byte pieces reach up to 15 bytes beyond both ends of a matrix: that memory must exist (the device's arenas
// see to it); its contents do not matter.
//
// Float formats. Sixteen lanes are the sixteen chains; a warp takes two rows at a time.
#pragma once

#include "formats.cuh"

// The activation rows of one group of N tokens.
template <int N> struct Tokens {
    const uint8_t *row[N]; // those beyond the last token repeat it; their results are thrown away

    __device__ __forceinline__ Tokens(const uint8_t *x, int64_t row_bytes, int first, int n_tokens) {
#pragma unroll
        for (int t = 0; t < N; t++)
            row[t] = x + (int64_t)min(first + t, n_tokens - 1) * row_bytes;
    }
};

template <class Format, int N, bool INTEGER = Format::INTEGER> struct RowDots;

template <class Format, int N> struct RowDots<Format, N, true> {
    static constexpr int LANES = Format::BLOCK / 32; // that share a block
    static constexpr int AT_ONCE = WARP / LANES;     // blocks
    static constexpr int CHUNK = Format::BLOCK == 32 ? 32 : 8; // blocks that are fetched together
    static constexpr int STAGES = 4;                           // chunks on the way or in use
    static constexpr int STAGE_BYTES = (CHUNK * Format::BYTES + 30) / 16 * 16;

    // What a block adds to the chain: d * isum, and min_d * imin.
    struct Term {
        float d, isum, min_d, imin;
    };

    struct Scratch { // of one warp
        __align__(16) uint8_t stage[STAGES][STAGE_BYTES];
        Term terms[CHUNK][N];
    };

    static __device__ __forceinline__ void fetch(uint8_t *stage, const uint8_t *from, int n_bytes) {
        const uint8_t *aligned = (const uint8_t *)((uint64_t)from & ~(uint64_t)15);
        const int n_pieces = ((int)(from - aligned) + n_bytes + 15) / 16;
        for (int i = threadIdx.x % WARP; i < n_pieces; i += WARP)
            cp_async16(stage + 16 * i, aligned + 16 * i);
    }

    // results[row * N + token] (shared) for n_rows rows that lie row_bytes apart from `weights` on. Whole warps only.
    static __device__ __forceinline__ void run(const uint8_t *weights, int64_t row_bytes, int n_rows, int n_cols,
                                               const Tokens<N> &tokens, const int8_t *grid, Scratch &scratch,
                                               float *results) {
        const int lane = threadIdx.x % WARP, part = lane % LANES;
        const int n_blocks = n_cols / Format::BLOCK;
        const int n_chunks = (n_blocks + CHUNK - 1) / CHUNK, n_steps = n_rows * n_chunks;

        int fetch_row = 0, fetch_chunk = 0, fetch_stage = 0;
        auto fetch_next = [&]() {
            if (fetch_row < n_rows) {
                const int first = fetch_chunk * CHUNK, n = min(CHUNK, n_blocks - first);
                fetch(scratch.stage[fetch_stage], weights + fetch_row * row_bytes + first * Format::BYTES, n * Format::BYTES);
                fetch_stage = fetch_stage + 1 == STAGES ? 0 : fetch_stage + 1;
                if (++fetch_chunk == n_chunks)
                    fetch_chunk = 0, fetch_row++;
            }
            cp_async_commit(); // also when empty, so that the count of groups stays in step
        };
        for (int i = 0; i < STAGES - 1; i++)
            fetch_next();

        int row = 0, chunk = 0, stage = 0;
        float acc = 0.0f; // of token `lane`
        for (int step = 0; step < n_steps; step++) {
            fetch_next();
            cp_async_wait<STAGES - 1>();
            __syncwarp();
            const int first = chunk * CHUNK, n = min(CHUNK, n_blocks - first);
            const uint64_t misalignment = (uint64_t)(weights + row * row_bytes + first * Format::BYTES) & 15;
            const uint8_t *blocks = scratch.stage[stage] + misalignment;
#pragma unroll 2
            for (int base = 0; base < n; base += AT_ONCE) {
                const int b = base + lane / LANES;
                const bool exists = b < n; // the lanes of missing blocks still take part in the sums
                int isum[N], imin[N];
                multiply(blocks + (exists ? b : 0) * Format::BYTES, part, first + (exists ? b : 0), n_cols, tokens, grid,
                         isum, imin);
#pragma unroll
                for (int t = 0; t < N; t++)
                    for (int step = LANES / 2; step; step /= 2) {
                        isum[t] += __shfl_xor_sync(ALL_LANES, isum[t], step);
                        if (Format::HAS_MIN)
                            imin[t] += __shfl_xor_sync(ALL_LANES, imin[t], step);
                    }
                if (exists && part == 0)
                    store_terms(blocks + b * Format::BYTES, first + b, n_cols, tokens, isum, imin, scratch.terms[b]);
            }
            __syncwarp();
            if (lane < N)
                for (int b = 0; b < n; b++) {
                    const Term term = scratch.terms[b][lane];
                    acc = __fmaf_rn(term.d, term.isum, acc);
                    if (Format::HAS_MIN)
                        acc = __fmaf_rn(term.min_d, term.imin, acc);
                }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            if (++chunk == n_chunks) {
                if (lane < N)
                    results[row * N + lane] = acc;
                acc = 0.0f, chunk = 0, row++;
            }
        }
        __syncwarp(); // results are there for the whole warp, and the scratch is free
    }

    // The integer sums of part `part` of a block with the same values of each token.
    static __device__ __forceinline__ void multiply(const uint8_t *block, int part, int index, int n_cols,
                                                    const Tokens<N> &tokens, const int8_t *grid, int (&isum)[N],
                                                    int (&imin)[N]) {
        Part w;
        Format::unpack(block, part, grid, w);
        const int at = index * Format::BLOCK + 32 * part;
#pragma unroll
        for (int t = 0; t < N; t++) {
            const Activation x = activation_view((uint8_t *)tokens.row[t], Format::BLOCK, n_cols);
            const int4 *q = (const int4 *)(x.q + at);
            const int4 first = q[0], second = q[1];
            const int low = __dp4a(w.q[3], first.w, __dp4a(w.q[2], first.z, __dp4a(w.q[1], first.y, __dp4a(w.q[0], first.x, 0))));
            const int high = __dp4a(w.q[7], second.w, __dp4a(w.q[6], second.z, __dp4a(w.q[5], second.y, __dp4a(w.q[4], second.x, 0))));
            isum[t] = low * w.scale[0] + high * w.scale[1];
            imin[t] = 0;
            if (Format::HAS_MIN) {
                const int16_t *sums = x.sums + at / 16;
                imin[t] = sums[0] * w.min[0] + sums[1] * w.min[1];
            }
        }
    }

    static __device__ __forceinline__ void store_terms(const uint8_t *block, int index, int n_cols,
                                                       const Tokens<N> &tokens, const int (&isum)[N],
                                                       const int (&imin)[N], Term (&terms)[N]) {
        const float d = Format::d(block), min_d = Format::min_d(block);
#pragma unroll
        for (int t = 0; t < N; t++) {
            const float d_x = activation_view((uint8_t *)tokens.row[t], Format::BLOCK, n_cols).d[index];
            terms[t] = {d * d_x, (float)isum[t], min_d * d_x, (float)imin[t]};
        }
    }
};

template <class Format, int N> struct RowDots<Format, N, false> {
    struct Scratch {};

    static __device__ __forceinline__ void run(const uint8_t *weights, int64_t row_bytes, int n_rows, int n_cols,
                                               const Tokens<N> &tokens, const int8_t *, Scratch &, float *results) {
        const int chain = threadIdx.x % 16, half = threadIdx.x % WARP / 16;
        for (int first = 0; first < n_rows; first += 2) {
            const int row = first + half;
            const uint8_t *w = weights + (row < n_rows ? row : first) * row_bytes;
            float acc[N];
#pragma unroll
            for (int t = 0; t < N; t++)
                acc[t] = 0.0f;
#pragma unroll 8
            for (int i = chain; i < n_cols; i += 16) {
                const float value = Format::value(w + (int64_t)(i / Format::BLOCK) * Format::BYTES, i % Format::BLOCK);
#pragma unroll
                for (int t = 0; t < N; t++)
                    acc[t] = __fmaf_rn(value, ((const float *)tokens.row[t])[i], acc[t]);
            }
#pragma unroll
            for (int t = 0; t < N; t++) {
                for (int step = 8; step; step /= 2)
                    acc[t] += __shfl_xor_sync(ALL_LANES, acc[t], step);
                if (chain == 0 && row < n_rows)
                    results[row * N + t] = acc[t];
            }
        }
        __syncwarp();
    }
};
