// Rows of a weight matrix times up to N activation rows, by one warp, in the canonical arithmetic.
//
// Integer formats. The blocks of a warp's rows lie one behind the other in memory. They are brought to shared memory in
// 16-byte pieces, chunks ahead of the arithmetic (cp.async), so any block size and alignment is read at full width and
// enough bytes are on the way without registers for them. A lane multiplies whole blocks, which of its warp's rows they
// are of does not matter, and leaves what each adds to its row in shared memory, for every token. Some chunks later one lane
// for each row and token runs the chain the arithmetic asks for: one fused multiply-add a block (two with minimums), in order.
//
// The 16-byte pieces reach up to 15 bytes beyond both ends of a matrix: that memory must exist (the device's arenas
// see to it); its contents do not matter.
//
// Float formats. Sixteen lanes are the sixteen chains; a warp takes two rows at a time, piece by piece as above.
//
// Everything before `run` reads weights only, which no kernel writes: it may be done while the kernel before still runs.
// The sizes of shared memory are computed in `kernels.py`, too.
#pragma once

#include "formats.cuh"
#include "quantize.cuh"

// The activation rows of one group of N tokens.
template <int N> struct Tokens {
    const uint8_t *row[N]; // those beyond the last token repeat it; their results are thrown away

    __device__ __forceinline__ Tokens(const uint8_t *x, int64_t row_bytes, int first, int n_tokens) {
#pragma unroll
        for (int t = 0; t < N; t++)
            row[t] = x + (int64_t)min(first + t, n_tokens - 1) * row_bytes;
    }
};

constexpr __device__ int round_up_128(int n) { return (n + 127) / 128 * 128; }

// How activations lie in shared memory: for each block of BLOCK values a record of them and of their sums, then the blocks'
// scales. The size of a record keeps what eight neighbouring lanes read of eight neighbouring ones in different banks.
template <int BLOCK, bool INTERLEAVED> struct Record {
    static constexpr int SUMS = BLOCK, PART_SUMS = SUMS + BLOCK / 8, BYTES = BLOCK == 256 ? PART_SUMS + 16 : 48;

    static __device__ __forceinline__ int staged_bytes(int n_cols) { return round_up_128(n_cols / BLOCK * (BYTES + 4)); }
    static __device__ __forceinline__ int scales_at(int n_cols) { return n_cols / BLOCK * BYTES; }

    // The two sums of a part, int16 each.
    static __device__ __forceinline__ int sums(const uint8_t *record, int part) {
        if constexpr (BLOCK == 32)
            return *(const int *)(record + SUMS);
        const int4 four = *(const int4 *)(record + SUMS + part / 4 * 16);
        return part % 4 == 0 ? four.x : part % 4 == 1 ? four.y : part % 4 == 2 ? four.z : four.w;
    }

    // Of a large block: the sums of part s and the three after it, int16 each.
    static __device__ __forceinline__ int2 part_sums(const uint8_t *record, int s) {
        return *(const int2 *)(record + PART_SUMS + 2 * s);
    }

    // Of N tokens, whose records follow one another. By the whole block; the others see it after a barrier.
    template <int N> static __device__ __forceinline__ void stage(uint8_t *staged, const Tokens<N> &tokens, int n_cols) {
        constexpr int AT_ONCE = N == 1 ? 2 : N; // parts of a thread that are on the way together
        constexpr int STEPS = AT_ONCE / N;      // of each token
#pragma unroll 1
        for (int first = 32 * threadIdx.x; first < n_cols; first += STEPS * 32 * blockDim.x) {
            uint4 low[AT_ONCE], high[AT_ONCE];
            int sums[AT_ONCE];
            float d[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int at = first + i / N * 32 * blockDim.x;
                if (at < n_cols) {
                    const Activation x = activation_view((uint8_t *)tokens.row[i % N], BLOCK, n_cols);
                    low[i] = *(const uint4 *)(x.q + at), high[i] = *(const uint4 *)(x.q + at + 16);
                    sums[i] = *(const int *)(x.sums + at / 16), d[i] = x.d[at / BLOCK];
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int at = first + i / N * 32 * blockDim.x;
                if (at >= n_cols)
                    break;
                uint8_t *records = staged + i % N * staged_bytes(n_cols), *record = records + at / BLOCK * BYTES;
                uint4 *to = (uint4 *)(record + at % BLOCK);
                if (INTERLEAVED)
                    interleave(low[i], high[i], to[0], to[1]);
                else
                    to[0] = low[i], to[1] = high[i];
                *(int *)(record + SUMS + at % BLOCK / 8) = sums[i];
                if (BLOCK == 256)
                    *(int16_t *)(record + PART_SUMS + at % BLOCK / 16) = (int16_t)(sums[i] + (sums[i] >> 16));
                if (at % BLOCK == 0)
                    *(float *)(records + scales_at(n_cols) + at / BLOCK * 4) = d[i];
            }
        }
    }

    // The same for a row of float32 values, which are put into the form on the way.
    static __device__ __forceinline__ void quantize(uint8_t *records, const float *x, int n_cols) {
#pragma unroll 1
        for (int first = threadIdx.x / WARP * WARP * 8; first < n_cols; first += 8 * blockDim.x) {
            const int at = first + threadIdx.x % WARP * 8;
            float v[8] = {}, d;
            uint2 q;
            int sum;
            if (at < n_cols)
                load_floats(x + at, v);
            quantize_8<BLOCK>(v, q, sum, d);
            const int in_part = INTERLEAVED ? interleaved(q) : at % 32;
            const int sum_behind = BLOCK == 256 ? __shfl_down_sync(ALL_LANES, sum, 2) : 0;
            if (at >= n_cols)
                continue;
            uint8_t *record = records + at / BLOCK * BYTES;
            *(uint2 *)(record + at % BLOCK / 32 * 32 + in_part) = q;
            if (at % 16 == 0)
                *(int16_t *)(record + SUMS + at % BLOCK / 8) = (int16_t)sum;
            if (BLOCK == 256 && at % 32 == 0)
                *(int16_t *)(record + PART_SUMS + at % BLOCK / 16) = (int16_t)(sum + sum_behind);
            if (at % BLOCK == 0)
                *(float *)(records + scales_at(n_cols) + at / BLOCK * 4) = d;
        }
    }

  private:
    // Of the four lanes that hold a part each exchanges four values with the one that holds what they lie in turn with;
    // returns where its eight are.
    static __device__ __forceinline__ int interleaved(uint2 &q) {
        const bool is_high = threadIdx.x & 2;
        const unsigned got = __shfl_xor_sync(ALL_LANES, is_high ? q.x : q.y, 2);
        q = is_high ? interleave(got, q.y) : interleave(q.x, got);
        return 16 * (threadIdx.x & 1) + 8 * is_high;
    }
};

// Brings n_bytes from anywhere to 16-byte aligned shared memory; returns where the first one will be. A warp's pieces cost
// least where they begin on a multiple of 128.
DEVICE const uint8_t *fetch_bytes(uint8_t *to, const uint8_t *from, int n_bytes, int thread, int n_threads) {
    const int misalignment = (int)((uint64_t)from & 15), n_pieces = (misalignment + n_bytes + 15) / 16;
#pragma unroll 1
    for (int i = thread; i < n_pieces; i += n_threads)
        cp_async16(to + 16 * i, from - misalignment + 16 * i);
    return to + misalignment;
}

// What a block adds to a chain: d * isum, and min_d * imin.
template <bool HAS_MIN> struct BlockTerm;
template <> struct __align__(16) BlockTerm<true> {
    float d, isum, min_d, imin;
};
template <> struct __align__(8) BlockTerm<false> {
    float d, isum;
};

template <class Format, int N, bool INTEGER = Format::INTEGER> class RowDots;

template <class Format, int N> class RowDots<Format, N, true> {
    using X = Record<Format::BLOCK, Format::HAS_CODES>;

    static constexpr int PER_LANE = Format::BLOCK == 256 ? 1 : 4, CHUNK = WARP * PER_LANE; // blocks
    static constexpr int STAGES = 2; // chunks on the way or in use; more of them would leave a multiprocessor fewer warps
    static constexpr int CHUNK_BYTES = CHUNK * Format::BYTES, STAGE_BYTES = round_up_128(CHUNK_BYTES + 16);
    static constexpr int CHUNKS_KEPT = ((Format::BLOCK == 256 ? 4 : 6) + N / 2) / N; // before the chains go on
    static constexpr int ROWS_AT_ONCE = WARP / N; // whose chains go on together
    static constexpr int MOST_ROWS = N == 1 ? WARP : 16;

    using Term = BlockTerm<Format::HAS_MIN>;

    int n_rows, n_columns, n_blocks, n_items, n_chunks; // items: blocks of all rows
    int token_terms;                                    // from the terms of one token to those of the next
    uint8_t *stages;
    Term *terms;
    const uint8_t *to_fetch;
    int n_to_fetch, fetch_stage = 0;

    // Of two small numbers, without the long way of an integer division.
    static __device__ __forceinline__ int quotient(int a, int b) { return (int)__fdividef((float)a + 0.5f, (float)b); }

    static __device__ __forceinline__ int chunks_of(int rows, int n_cols) {
        return (rows * (n_cols / Format::BLOCK) + CHUNK - 1) / CHUNK;
    }

    // Terms of a token that are kept, of so many rows and chunks.
    static __device__ __forceinline__ int terms_of(int rows, int n) { return min(CHUNKS_KEPT, n) * CHUNK + rows; }

    // Where the terms are in the scratch of a warp that has so many chunks.
    static __device__ __forceinline__ int terms_at(int n) { return min(STAGES, n) * STAGE_BYTES; }

    __device__ __forceinline__ void fetch_next() {
        uint8_t *to = stages + fetch_stage * STAGE_BYTES;
        if (n_to_fetch >= CHUNK)
            fetch_whole(to + 16 * (threadIdx.x % WARP));
        else if (n_to_fetch > 0)
            fetch_bytes(to, to_fetch, n_to_fetch * Format::BYTES, threadIdx.x % WARP, WARP);
        n_to_fetch -= CHUNK, to_fetch += CHUNK_BYTES;
        fetch_stage = fetch_stage + 1 == STAGES ? 0 : fetch_stage + 1;
        cp_async_commit(); // also when empty, so that the count of groups stays in step
    }

    // `fetch_bytes` of a whole chunk; `to` is the lane's first piece.
    __device__ __forceinline__ void fetch_whole(uint8_t *to) const {
        const int at = 16 * (threadIdx.x % WARP), misalignment = (int)((uint64_t)to_fetch & 15);
        const uint8_t *from = to_fetch - misalignment + at;
        constexpr int STRIDE = 16 * WARP, FETCHED = CHUNK_BYTES / STRIDE * STRIDE;
#pragma unroll
        for (int i = 0; i < FETCHED; i += STRIDE)
            cp_async16(to + i, from + i);
        if (at < CHUNK_BYTES - FETCHED + misalignment)
            cp_async16(to + FETCHED, from + FETCHED);
    }

    // Whether the minimums of four parts meet their sums together.
    static constexpr bool PART_MINS = Format::HAS_MIN && Format::BLOCK == 256 && Format::PER_SCALE == 32;

    // Sixteen weights times as many activations, four to a word.
    static __device__ __forceinline__ int dot_16(const int *q, int4 x) {
        return __dp4a(q[3], x.w, __dp4a(q[2], x.z, __dp4a(q[1], x.y, __dp4a(q[0], x.x, 0))));
    }

    // The terms of one block with the first M tokens. `record` is its first token's, and `d_x` the scale of that; those of the
    // next token lie `token_bytes` behind.
    template <int M>
    static __device__ __forceinline__ void multiply(const uint8_t *block, const uint8_t *record, const uint8_t *d_x,
                                                    int token_bytes, const int8_t *grid, const unsigned (&table)[4],
                                                    Term (&terms)[N]) {
        constexpr int N_PARTS = Format::BLOCK / 32;
        int isum[M] = {}, imin[M] = {}, offsets[M] = {};
#pragma unroll
        for (int part = 0; part < N_PARTS; part++) {
            unsigned codes[4];
            Part w;
            if constexpr (Format::HAS_CODES)
                Format::codes(block, part, codes);
            else
                Format::unpack(block, part, grid, w);
#pragma unroll
            for (int t = 0; t < M; t++) {
                const uint8_t *of_token = record + t * token_bytes, *x = of_token + 32 * part;
                const int4 first = *(const int4 *)x, second = *(const int4 *)(x + 16);
                if constexpr (Format::HAS_CODES) {
                    int low = Format::dot(codes[0], table, first.x, first.y, 0);
                    low = Format::dot(codes[1], table, first.z, first.w, low);
                    int high = Format::dot(codes[2], table, second.x, second.y, 0);
                    high = Format::dot(codes[3], table, second.z, second.w, high);
                    isum[t] += (low + high) * Format::scale(block, part);
                } else {
                    const int low = dot_16(w.q, first), high = dot_16(w.q + 4, second);
                    if (Format::PER_SCALE == 32)
                        isum[t] += (low + high) * w.scale[0];
                    else
                        isum[t] += low * w.scale[0] + high * w.scale[1];
                    if (Format::HAS_MIN && !PART_MINS)
                        imin[t] = __dp2a_lo(X::sums(of_token, part), w.min[0] | w.min[1] << 8, imin[t]);
                    if (Format::OFFSET)
                        offsets[t] = __dp2a_lo(X::sums(of_token, part), w.scale[0] & 255 | w.scale[1] * 256, offsets[t]);
                }
            }
        }
        if constexpr (PART_MINS) {
#pragma unroll
            for (int part = 0; part < N_PARTS; part += 4) {
                const int mins = (int)Format::mins(block, part);
#pragma unroll
                for (int t = 0; t < M; t++) {
                    const int2 sums = X::part_sums(record + t * token_bytes, part);
                    imin[t] = __dp2a_hi(sums.y, mins, __dp2a_lo(sums.x, mins, imin[t]));
                }
            }
        }
#pragma unroll
        for (int t = 0; t < M; t++) {
            const float scale = *(const float *)(d_x + t * token_bytes);
            terms[t].d = Format::d(block) * scale, terms[t].isum = (float)(isum[t] - Format::OFFSET * offsets[t]);
            if constexpr (Format::HAS_MIN)
                terms[t].min_d = Format::min_d(block) * scale, terms[t].imin = (float)imin[t];
        }
    }

  public:
    // Shared memory of a warp of so many rows.
    static __device__ __forceinline__ int scratch_bytes(int rows, int n_cols) {
        const int n = chunks_of(rows, n_cols);
        return round_up_128(terms_at(n) + N * terms_of(rows, n) * (int)sizeof(Term));
    }

    // A warp's rows, one behind the other from `first` on, perhaps none; `most_rows` is what its scratch is for.
    __device__ __forceinline__ RowDots(const uint8_t *first, int64_t, int rows, int n_cols, int most_rows, uint8_t *scratch)
        : n_rows(rows), n_columns(n_cols), n_blocks(n_cols / Format::BLOCK), n_items(rows * n_blocks),
          n_chunks(chunks_of(rows, n_cols)), token_terms(terms_of(most_rows, chunks_of(most_rows, n_cols))), stages(scratch),
          terms((Term *)(scratch + terms_at(chunks_of(most_rows, n_cols)))),
          to_fetch(first), n_to_fetch(n_items) {
#pragma unroll 1
        for (int i = 0; i < STAGES; i++)
            fetch_next();
    }

    // Two of these can share activations in shared memory if this is equal.
    static constexpr int FORM = Format::BLOCK + Format::HAS_CODES;

    // Bytes of the activations in shared memory.
    static __device__ __forceinline__ int staged_bytes(int n_cols) { return N * X::staged_bytes(n_cols); }
    static __device__ __forceinline__ void stage(uint8_t *shared, const Tokens<N> &tokens, int n_cols) {
        X::stage(shared, tokens, n_cols);
    }
    // From float32 values.
    static __device__ __forceinline__ void stage_values(uint8_t *shared, const float *x, int n_cols) {
        X::quantize(shared, x, n_cols);
    }

    // Calls emit(row, token, value) once for each, from some lane. `records` is what `stage` made, of n_tokens that exist.
    // Whole warps only.
    template <class Emit>
    __device__ __forceinline__ void run(const uint8_t *records, const int8_t *grid, int n_tokens, Emit emit) {
        const int lane = threadIdx.x % WARP, misalignment = (int)((uint64_t)to_fetch & 15);
        const int token_bytes = X::staged_bytes(n_columns);
        const uint8_t *d_x = records + X::scales_at(n_columns);
        const int rows_on = quotient(WARP, n_blocks), columns_on = WARP - rows_on * n_blocks; // from a lane's block to its next
        int row = quotient(lane, n_blocks), column = lane - row * n_blocks;                   // of the lane's block
        constexpr int N_CHAINS = MOST_ROWS / ROWS_AT_ONCE; // of a lane
        float acc[N_CHAINS];
#pragma unroll
        for (int i = 0; i < N_CHAINS; i++)
            acc[i] = 0.0f;
        unsigned table[4];
        if constexpr (Format::HAS_CODES)
            load_table<Format>(table, n_columns);
        for (int chunk = 0, kept = 0, kept_row = 0, stage = 0; chunk < n_chunks; chunk++) {
            cp_async_wait<STAGES - 1>();
            __syncwarp();
            const uint8_t *blocks = stages + stage * STAGE_BYTES + misalignment;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                const int in_chunk = WARP * i + lane, item = chunk * CHUNK + in_chunk;
                if (chunk * CHUNK + WARP * i >= n_items)
                    break;
                // Behind the last block lie no weights: what comes of them is left alone. Terms have a gap after each row, so
                // that the chains find theirs in different banks.
                const uint8_t *block = blocks + in_chunk * Format::BYTES;
                const uint8_t *record = records + column * X::BYTES, *scale = d_x + column * 4;
                const bool are_few = N > 2 && n_tokens <= N / 2;
                Term found[N];
                if (are_few)
                    multiply<(N + 1) / 2>(block, record, scale, token_bytes, grid, table, found);
                else
                    multiply<N>(block, record, scale, token_bytes, grid, table, found);
                if (item < n_items)
#pragma unroll
                    for (int t = 0; t < N; t++)
                        if (!are_few || t < N / 2)
                            terms[t * token_terms + item - kept + row - kept_row] = found[t];
                row += rows_on, column += columns_on;
                if (column >= n_blocks)
                    column -= n_blocks, row++;
            }
            __syncwarp();
            fetch_next();
            if ((chunk + 1) % CHUNKS_KEPT && chunk + 1 < n_chunks)
                continue;
#pragma unroll
            for (int i = 0; i < N_CHAINS; i++) { // a lane goes on with the chain of a row and token
                const int own_row = i * ROWS_AT_ONCE + lane / N, first = max(kept, own_row * n_blocks);
                const int end = min(min((chunk + 1) * CHUNK, n_items), (own_row + 1) * n_blocks);
                const Term *own = terms + lane % N * token_terms + first - kept + own_row - kept_row;
#pragma unroll 8
                for (int item = first; item < end; item++, own++) {
                    const Term term = *own;
                    acc[i] = __fmaf_rn(term.d, term.isum, acc[i]);
                    if constexpr (Format::HAS_MIN)
                        acc[i] = __fmaf_rn(term.min_d, term.imin, acc[i]);
                }
            }
            kept += CHUNKS_KEPT * CHUNK, kept_row = __shfl_sync(ALL_LANES, row, 0); // of the first block of the next chunk
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < N_CHAINS; i++)
            if (i * ROWS_AT_ONCE + lane / N < n_rows)
                emit(i * ROWS_AT_ONCE + lane / N, lane % N, acc[i]);
        cp_async_wait<0>();
    }
};

template <class Format, int N> class RowDots<Format, N, false> {
    static constexpr int COLS = 512, ROWS = 2; // of a piece
    static constexpr int STAGES = 4;
    static constexpr int PIECE_BYTES = COLS / Format::BLOCK * Format::BYTES;
    static constexpr int ROW_STAGE_BYTES = (PIECE_BYTES + 45) / 16 * 16; // 15 bytes before and after

    const uint8_t *weights;
    int64_t row_bytes;
    int n_rows, n_cols, n_pieces;
    uint8_t *stages;
    int fetch_row = 0, fetch_piece = 0, fetch_stage = 0;

    // The lane's half of a stage.
    __device__ __forceinline__ uint8_t *stage_at(int stage) const {
        return stages + (stage * ROWS + threadIdx.x % WARP / 16) * ROW_STAGE_BYTES;
    }

    // Where a piece begins, of the row that the lane's half of the warp takes.
    __device__ __forceinline__ const uint8_t *piece_at(int row, int piece) const {
        return weights + min(row + (int)threadIdx.x % WARP / 16, n_rows - 1) * row_bytes + piece * PIECE_BYTES;
    }

    __device__ __forceinline__ void fetch_next() {
        if (fetch_row < n_rows) {
            const int n = min(COLS, n_cols - fetch_piece * COLS) / Format::BLOCK * Format::BYTES;
            fetch_bytes(stage_at(fetch_stage), piece_at(fetch_row, fetch_piece), n, threadIdx.x % 16, 16);
            fetch_stage = fetch_stage + 1 == STAGES ? 0 : fetch_stage + 1;
            if (++fetch_piece == n_pieces)
                fetch_piece = 0, fetch_row += ROWS;
        }
        cp_async_commit();
    }

  public:
    static __device__ __forceinline__ int scratch_bytes(int, int) { return STAGES * ROWS * ROW_STAGE_BYTES; }

    __device__ __forceinline__ RowDots(const uint8_t *first, int64_t bytes, int rows, int cols, int, uint8_t *scratch)
        : weights(first), row_bytes(bytes), n_rows(rows), n_cols(cols), n_pieces((cols + COLS - 1) / COLS), stages(scratch) {
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; i++)
            fetch_next();
    }

    static constexpr int FORM = 0;

    static __device__ __forceinline__ int staged_bytes(int n_cols) { return (N * n_cols * (int)sizeof(float) + 15) / 16 * 16; }
    static __device__ __forceinline__ void stage(uint8_t *shared, const Tokens<N> &tokens, int n_cols) {
#pragma unroll
        for (int t = 0; t < N; t++) {
            const float *from = (const float *)tokens.row[t];
            float *to = (float *)shared + t * n_cols;
            if (n_cols % 4) {
#pragma unroll 1
                for (int i = threadIdx.x; i < n_cols; i += blockDim.x)
                    to[i] = from[i];
                continue;
            }
            constexpr int AT_ONCE = 8; // on the way together
#pragma unroll 1
            for (int first = threadIdx.x; first < n_cols / 4; first += AT_ONCE * blockDim.x) {
                float4 some[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if (first + i * (int)blockDim.x < n_cols / 4)
                        some[i] = ((const float4 *)from)[first + i * blockDim.x];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if (first + i * (int)blockDim.x < n_cols / 4)
                        ((float4 *)to)[first + i * blockDim.x] = some[i];
            }
        }
    }

    static __device__ __forceinline__ void stage_values(uint8_t *shared, const float *x, int n_cols) {
        stage(shared, Tokens<N>((const uint8_t *)x, 0, 0, 1), n_cols);
    }

    template <class Emit>
    __device__ __forceinline__ void run(const uint8_t *staged, const int8_t *, int, Emit emit) {
        const float *x = (const float *)staged;
        const int chain = threadIdx.x % 16, half = threadIdx.x % WARP / 16;
        float acc[N];
        for (int row = 0, stage = 0; row < n_rows; row += ROWS) {
#pragma unroll
            for (int t = 0; t < N; t++)
                acc[t] = 0.0f;
            for (int piece = 0; piece < n_pieces; piece++) {
                fetch_next();
                cp_async_wait<STAGES - 1>();
                __syncwarp();
                const int first = piece * COLS, end = min(COLS, n_cols - first);
                const uint8_t *w = stage_at(stage) + ((uint64_t)piece_at(row, piece) & 15);
#pragma unroll 8
                for (int i = chain; i < end; i += 16) {
                    const float value = Format::value(w + i / Format::BLOCK * Format::BYTES, i % Format::BLOCK);
#pragma unroll
                    for (int t = 0; t < N; t++)
                        acc[t] = __fmaf_rn(value, x[t * n_cols + first + i], acc[t]);
                }
                __syncwarp();
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
#pragma unroll
            for (int t = 0; t < N; t++) {
                for (int lanes = 8; lanes; lanes /= 2)
                    acc[t] += __shfl_xor_sync(ALL_LANES, acc[t], lanes);
                if (chain == 0 && row + half < n_rows)
                    emit(row + half, t, acc[t]);
            }
        }
        cp_async_wait<0>();
    }
};
