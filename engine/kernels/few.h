// Products with some tokens on AVX-512 VNNI: eight tokens side by side.
//
// A register holds eight columns of each of eight tokens, one token in each 64 bits, and meets eight weights of a row,
// repeated eight times. So a row is unpacked once for all tokens, the two lanes of a token are added up only when a
// block is over, and the chain of multiply-adds runs on eight tokens of two rows. For fewer tokens most lanes would be
// idle (decode.h); for many, a lane is a row (tile.h). Integer sums are exact, so all three agree.
#ifndef ENGINE_FEW_H
#define ENGINE_FEW_H

#include "tile.h"

#if defined(__AVX512VNNI__)

enum {
    FEW_TOKENS = 8,
    FEW_ROWS = 512, // of a call, whose running sums are kept at a time
    FEW_UNITS = 8,  // of 256 columns, whose activations are kept side by side at a time
};

// 256 columns of eight tokens.
typedef struct {
    _Alignas(64) int8_t q[32][FEW_TOKENS][8];
    union {
        _Alignas(64) int16_t sums[4][FEW_TOKENS][4];    // of four sub-blocks
        _Alignas(64) int32_t starts[16][FEW_TOKENS][2]; // of sub-blocks: what the offset takes off the lanes
        _Alignas(64) float x_sums[8][FEW_TOKENS][2];    // of blocks of 32 with minimums
    };
    _Alignas(64) float d[8][FEW_TOKENS][2]; // one, or one for each block of 32
} few_activations;

// A 256-block of four rows, taken apart.
typedef struct {
    _Alignas(64) uint8_t bytes[4][256];
    union {
        _Alignas(64) int32_t scales[4][16];
        _Alignas(64) int16_t small_scales[4][16]; // if lanes fit
    };
    _Alignas(64) int16_t mins[4][16]; // minimums, or -offset * scale
    block_points points[4];
} unpacked_blocks;

static inline __m512i eight_times(const void *p) {
    int64_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return _mm512_set1_epi64(bytes);
}

// Where this begins to pay: later for formats that decode.h is fastest with, those with grids, and those of 32 weights
// in 16 bytes, or 32, and no minimums.
ALWAYS_INLINE int few_min_tokens(vector_format f) {
    if (f.order == COLUMNS)
        return f.sub_block == 32 ? 7 : 6;
    return f.order == BY_2 && !f.has_min ? 7 : 5;
}

ALWAYS_INLINE int few_offset(vector_format f) { return f.is_signed ? 128 : f.offset; }

// Whether what a lane gets of a sub-block of a 256-block fits in an int16 whatever the activations are. Then two lanes
// meet their scales in one instruction; offsets are taken off before.
ALWAYS_INLINE int lanes_fit(vector_format f) {
    const int largest = f.offset > f.largest - f.offset ? f.offset : f.largest - f.offset;
    return !f.is_signed && f.sub_block / 2 * 127 * largest <= 32767;
}

ALWAYS_INLINE int offset_in_starts(vector_format f) {
    return !f.has_min && few_offset(f) && (f.block_size == 32 || lanes_fit(f));
}

// out[j] = the j-th 64 bits of each of the eight.
static inline void transpose_8x8_64(const __m512i in[8], __m512i out[8]) {
    __m512i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm512_unpacklo_epi64(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi64(in[i], in[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { // pairs of rows 0-3 and 4-7: even 128 bits, then odd ones
        const int r = i / 2 * 4 + i % 2;
        b[i] = _mm512_shuffle_i64x2(a[r], a[r + 2], 0x88);
        b[i + 4] = _mm512_shuffle_i64x2(a[r], a[r + 2], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int r = i / 2 * 4 + i % 2, j = i / 2 * 2 + i % 2;
        out[j] = _mm512_shuffle_i64x2(b[r], b[r + 2], 0x88);
        out[j + 4] = _mm512_shuffle_i64x2(b[r], b[r + 2], 0xdd);
    }
}

// Columns from `first` on, n_cols of them; tokens that are not there are zeros.
ALWAYS_INLINE void set_side_by_side(vector_format f, const activation_row *x, int n, int first, int n_cols,
                                    few_activations *out) {
    for (int c = 0; c < n_cols; c += 64) {
        const __mmask64 left = n_cols - c < 64 ? ((__mmask64)1 << (n_cols - c)) - 1 : ~(__mmask64)0;
        __m512i rows[FEW_TOKENS], columns[8];
        for (int t = 0; t < FEW_TOKENS; t++)
            rows[t] = t < n ? _mm512_maskz_loadu_epi8(left, x[t].q + first + c) : _mm512_setzero_si512();
        transpose_8x8_64(rows, columns);
        for (int i = 0; i < 8; i++)
            _mm512_store_si512((void *)out->q[c / 8 + i], columns[i]);
    }
    if (n < FEW_TOKENS) {
        memset(out->x_sums, 0, sizeof out->x_sums);
        memset(out->d, 0, sizeof out->d);
    }
    for (int t = 0; t < n; t++) {
        for (int b = 0; b < n_cols / f.block_size; b++)
            out->d[b][t][0] = out->d[b][t][1] = x[t].d[first / f.block_size + b];
        const int16_t *sums = x[t].sums + first / 16;
        if (f.block_size == 32 && f.has_min)
            for (int b = 0; b < n_cols / 32; b++)
                out->x_sums[b][t][0] = out->x_sums[b][t][1] = (float)(sums[2 * b] + sums[2 * b + 1]);
        else if (!offset_in_starts(f)) {
            const __m256i sums_32 = _mm256_madd_epi16(load_256(sums), _mm256_set1_epi16(1));
            _Alignas(32) int16_t of_token[16];
            _mm256_store_si256((void *)of_token, f.sub_block == 16
                                                     ? load_256(sums)
                                                     : _mm256_castsi128_si256(_mm256_cvtepi32_epi16(sums_32)));
            for (int i = 0; i < 64 / f.sub_block; i++)
                memcpy(out->sums[i][t], of_token + 4 * i, sizeof out->sums[i][t]);
        }
    }
    if (offset_in_starts(f))
        for (int i = 0; i < n_cols / f.sub_block; i++) {
            __m512i start = _mm512_setzero_si512();
            for (int c = i * f.sub_block / 8; c < (i + 1) * f.sub_block / 8; c++)
                start = _mm512_dpbusd_epi32(start, _mm512_set1_epi8((char)few_offset(f)), _mm512_load_si512(out->q[c]));
            _mm512_store_si512((void *)out->starts[i], _mm512_sub_epi32(_mm512_setzero_si512(), start));
        }
}

// Part of `n` parts of the block of row r, after those of the rows before; scales with the first.
ALWAYS_INLINE void unpack_part(vector_format f, const uint8_t *const blocks[4], int r, int part, int n,
                               unpacked_blocks *out) {
    const uint8_t *block = blocks[r];
    if (r == 0 && part == 0)
        begin_chunks(f, blocks, out->points);
#pragma GCC unroll 8
    for (int k = 8 / n * part; k < 8 / n * (part + 1); k++)
        _mm256_store_si256((void *)(out->bytes[r] + 32 * k),
                           unsigned_chunk(f, few_offset(f), block, &out->points[r], k));
    if (part)
        return;
    __m256i mins = _mm256_setzero_si256();
    const __m256i scales = f.scales(block, &mins);
    if (lanes_fit(f))
        _mm256_store_si256((void *)out->small_scales[r], scales);
    else
        _mm512_store_si512((void *)out->scales[r], _mm512_cvtepi16_epi32(scales));
    if (f.has_min)
        _mm256_store_si256((void *)out->mins[r], mins);
    else if (few_offset(f) && !offset_in_starts(f))
        _mm256_store_si256((void *)out->mins[r], _mm256_mullo_epi16(scales, _mm256_set1_epi16((short)-few_offset(f))));
}

// Adds the two lanes of each token: those of row a to the even lanes, those of row b to the odd ones.
static inline __m512i sum_tokens_of_2(__m512i a, __m512i b) {
    const __m512i crossed = _mm512_shuffle_epi32(_mm512_mask_blend_epi32(0xaaaa, b, a), _MM_PERM_CDAB);
    return _mm512_add_epi32(_mm512_mask_blend_epi32(0xaaaa, a, b), crossed);
}

// Adds a block of four rows to their chains. `sums` and `min_sums` have two lanes a token, or `min_sums` is NULL.
ALWAYS_INLINE void add_few(vector_format f, const uint8_t *const blocks[4], const float *d_x, const __m512i sums[4],
                           const __m512 min_sums[2], float (*acc)[16]) {
    const __m512 d_tokens = _mm512_load_ps(d_x);
    _Alignas(16) float d[4], min_d[4];
    _mm_store_ps(d, f.d(blocks));
    KEEP_IN_MEMORY(d);
    if (f.has_min) {
        _mm_store_ps(min_d, f.min_d(blocks));
        KEEP_IN_MEMORY(min_d);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const __m512 d_rows = _mm512_castsi512_ps(eight_times(d + 2 * i));
        __m512 total =
            _mm512_fmadd_ps(_mm512_mul_ps(d_rows, d_tokens),
                            _mm512_cvtepi32_ps(sum_tokens_of_2(sums[2 * i], sums[2 * i + 1])), _mm512_load_ps(acc[i]));
        if (f.has_min)
            total = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_castsi512_ps(eight_times(min_d + 2 * i)), d_tokens),
                                    min_sums[i], total);
        _mm512_store_ps(acc[i], total);
    }
}

// `w` holds `blocks` taken apart. The next ones are taken apart into `next_w` meanwhile, some bytes after each run of
// multiplications: the schedulers of a core hold too few operations to mix the two by themselves.
ALWAYS_INLINE void multiply_few_256(vector_format f, const uint8_t *const blocks[4], unpacked_blocks *w,
                                    const uint8_t *const next_blocks[4], unpacked_blocks *next_w,
                                    const few_activations *x, float (*acc)[16]) {
    const int registers = f.sub_block / 8, n_sub_blocks = 256 / f.sub_block; // registers of a sub-block
    KEEP_IN_MEMORY(*w);
    __m512i sums[4], min_sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        min_sums[r] = _mm512_setzero_si512();
        if (f.has_min || (few_offset(f) && !offset_in_starts(f)))
            for (int i = 0; i < 64 / f.sub_block; i++)
                min_sums[r] =
                    _mm512_dpwssd_epi32(min_sums[r], eight_times(w->mins[r] + 4 * i), _mm512_load_si512(x->sums[i]));
        sums[r] = f.has_min ? _mm512_setzero_si512() : min_sums[r];
    }
#pragma GCC unroll 8
    for (int s = 0; s < n_sub_blocks; s += 2) {
        __m512i values[2][4], starts[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            starts[i] = offset_in_starts(f) ? _mm512_load_si512(x->starts[s + i]) : _mm512_setzero_si512();
            KEEP_IN_REGISTER_512(starts[i]);
#pragma GCC unroll 4
            for (int c = 0; c < registers; c++) {
                values[i][c] = _mm512_load_si512(x->q[registers * (s + i) + c]);
                KEEP_IN_REGISTER_512(values[i][c]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const int n_parts = n_sub_blocks / 2, part = 2 * s + r; // of each of the next four rows
            unpack_part(f, next_blocks, part / n_parts, part % n_parts, n_parts, next_w);
            __m512i parts[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                parts[i] = starts[i];
#pragma GCC unroll 4
                for (int c = 0; c < registers; c++)
                    parts[i] = _mm512_dpbusd_epi32(parts[i], eight_times(w->bytes[r] + 8 * (registers * (s + i) + c)),
                                                   values[i][c]);
            }
            if (lanes_fit(f)) {
                const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, parts[0], _mm512_slli_epi32(parts[1], 16));
                sums[r] = _mm512_dpwssd_epi32(sums[r], both, _mm512_set1_epi32(load_i32(&w->small_scales[r][s])));
            } else
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++)
                    sums[r] =
                        _mm512_add_epi32(sums[r], _mm512_mullo_epi32(parts[i], _mm512_set1_epi32(w->scales[r][s + i])));
            KEEP_IN_REGISTER(sums[r]);
        }
    }
    const __m512 mins[2] = {_mm512_cvtepi32_ps(sum_tokens_of_2(min_sums[0], min_sums[1])),
                            _mm512_cvtepi32_ps(sum_tokens_of_2(min_sums[2], min_sums[3]))};
    add_few(f, blocks, x->d[0][0], sums, mins, acc);
}

// Block b of 32 of the unit.
ALWAYS_INLINE void multiply_few_32(vector_format f, const uint8_t *const blocks[4], const few_activations *x, int b,
                                   float (*acc)[16]) {
    _Alignas(32) uint8_t bytes[4][32];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        _mm256_store_si256((void *)bytes[r], unsigned_chunk(f, few_offset(f), blocks[r], NULL, 0));
    KEEP_IN_MEMORY(bytes);
    const __m512i start = f.has_min ? _mm512_setzero_si512() : _mm512_load_si512(x->starts[b]);
    __m512i sums[4], values[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        values[c] = _mm512_load_si512(x->q[4 * b + c]);
        KEEP_IN_REGISTER_512(values[c]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        sums[r] = start;
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++)
            sums[r] = _mm512_dpbusd_epi32(sums[r], eight_times(bytes[r] + 8 * c), values[c]);
    }
    const __m512 x_sums = _mm512_load_ps(x->x_sums[b]), mins[2] = {x_sums, x_sums};
    add_few(f, blocks, x->d[b][0], sums, mins, acc);
}

// The weight rows of a call.
typedef struct {
    const uint8_t *first;
    int64_t row_bytes;
    int n;
} few_rows;

// The blocks of rows r to r + 3 at a column; what is missing repeats the last row.
ALWAYS_INLINE void set_blocks(vector_format f, few_rows rows, int r, int column, const uint8_t *blocks[4]) {
    for (int i = 0; i < 4; i++) {
        const int row = r + i < rows.n ? r + i : rows.n - 1;
        blocks[i] = rows.first + row * rows.row_bytes + (int64_t)(column / f.block_size) * f.block_bytes;
    }
}

// Fetches from rows further down what `blocks` are of these; as one stream where the columns are all of theirs.
ALWAYS_INLINE void fetch_few(vector_format f, few_rows rows, int r, int64_t ahead, const uint8_t *const blocks[4],
                             int first, int end, int column) {
    const int64_t row = r * rows.row_bytes, at = (int64_t)((column - first) / f.block_size) * f.block_bytes;
    if ((int64_t)((end - first) / f.block_size) * f.block_bytes == rows.row_bytes)
        fetch(rows.first + row + ahead + 4 * at, 4 * f.block_bytes);
    else
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            fetch(blocks[i] + ahead, f.block_bytes);
}

ALWAYS_INLINE void multiply_rows_256(vector_format f, few_rows rows, int64_t ahead, const few_activations *units,
                                     int first, int end, float (*acc)[16]) {
    unpacked_blocks unpacked[2], *w = &unpacked[0], *next_w = &unpacked[1];
    const uint8_t *blocks[4];
    set_blocks(f, rows, 0, first, blocks);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        unpack_part(f, blocks, r, 0, 1, w);
    for (int r = 0; r < rows.n; r += 4)
        for (int column = first; column < end; column += 256) {
            const uint8_t *next[4];
            const int at_end = column + 256 == end;
            fetch_few(f, rows, r, ahead, blocks, first, end, column);
            set_blocks(f, rows, at_end ? r + 4 : r, at_end ? first : column + 256, next);
            multiply_few_256(f, blocks, w, next, next_w, &units[(column - first) / 256], acc + r / 2);
            memcpy(blocks, next, sizeof next);
            unpacked_blocks *const free_w = w;
            w = next_w;
            next_w = free_w;
        }
}

ALWAYS_INLINE void multiply_rows_32(vector_format f, few_rows rows, int64_t ahead, const few_activations *units,
                                    int first, int end, float (*acc)[16]) {
    for (int r = 0; r < rows.n; r += 4) {
        const uint8_t *blocks[4];
        set_blocks(f, rows, r, first, blocks);
        for (int column = first; column < end; column += 32) {
            fetch_few(f, rows, r, ahead, blocks, first, end, column);
            multiply_few_32(f, blocks, &units[(column - first) / 256], (column - first) % 256 / 32, acc + r / 2);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                blocks[i] += f.block_bytes;
        }
    }
}

// At most FEW_TOKENS.
ALWAYS_INLINE void matmul_few(vector_format f, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                              const void *const *x, int n_x, float *const *y) {
    enum { BYTES_AHEAD = 16 << 10 }; // at least, where weights are fetched as one stream
    const int64_t four_rows = 4 * row_bytes, ahead = (BYTES_AHEAD / four_rows + 1) * four_rows;
    activation_row tokens[FEW_TOKENS];
    for (int t = 0; t < n_x; t++)
        tokens[t] = activation_view(x[t], f.activation, n_cols);
    for (int first_row = 0; first_row < n_rows; first_row += FEW_ROWS) {
        const int rows_left = n_rows - first_row < FEW_ROWS ? n_rows - first_row : FEW_ROWS;
        _Alignas(64) float acc[FEW_ROWS / 2][16]; // two rows of each token side by side
        const few_rows rows = {w + first_row * row_bytes, row_bytes, rows_left};
        memset(acc, 0, sizeof acc);
        for (int first = 0; first < n_cols; first += 256 * FEW_UNITS) {
            const int end = n_cols - first < 256 * FEW_UNITS ? n_cols : first + 256 * FEW_UNITS;
            few_activations together[FEW_UNITS];
            for (int column = first; column < end; column += 256)
                set_side_by_side(f, tokens, n_x, column, end - column < 256 ? end - column : 256,
                                 &together[(column - first) / 256]);
            if (f.block_size == 256)
                multiply_rows_256(f, rows, ahead, together, first, end, acc);
            else
                multiply_rows_32(f, rows, ahead, together, first, end, acc);
        }
        for (int r = 0; r < rows_left; r += 16) {
            __m512i pairs[8], of_tokens[8];
            for (int i = 0; i < 8; i++)
                pairs[i] = _mm512_load_si512(acc[r / 2 + i]);
            transpose_8x8_64(pairs, of_tokens);
            const __mmask16 left = rows_left - r < 16 ? (__mmask16)((1 << (rows_left - r)) - 1) : (__mmask16)~0;
#pragma GCC unroll 8
            for (int t = 0; t < FEW_TOKENS; t++)
                if (t < n_x)
                    _mm512_mask_storeu_epi32(y[t] + first_row + r, left, of_tokens[t]);
        }
    }
}

#endif
#endif
