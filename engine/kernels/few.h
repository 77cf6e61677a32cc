// Products with four to eight tokens on AVX-512 VNNI: a token is a lane.
//
// The activations of all tokens are interleaved, four columns of eight tokens in a register, so that four weights of a
// row, unpacked once for all tokens, meet them in one instruction. There are no horizontal sums, and the canonical
// chain of multiply-adds runs on the eight tokens of a row. For fewer tokens that is a waste (decode.h); for more, a
// lane is a row and the weights are interleaved instead (tile.h). Integer sums are exact, so all three agree.
#ifndef ENGINE_FEW_H
#define ENGINE_FEW_H

#include "tile.h"

#if defined(__AVX512VNNI__)

enum {
    FEW_MIN_TOKENS = 4, // where this begins to pay
    FEW_TOKENS = 8,
    FEW_ROWS = 64,  // of a call, whose running sums are kept at a time
    FEW_BLOCKS = 8, // of 256 columns, whose activations are kept interleaved at a time
};

// Eight tokens side by side, for FEW_BLOCKS * 256 columns.
typedef struct {
    _Alignas(32) int8_t quads[FEW_BLOCKS][64][FEW_TOKENS][4];
    _Alignas(32) int16_t sums[FEW_BLOCKS][8][FEW_TOKENS][2]; // of sub-blocks, two in a lane
    _Alignas(32) float d[FEW_BLOCKS][FEW_TOKENS];
} interleaved_tokens;

// A block of four rows, taken apart.
typedef struct {
    _Alignas(32) uint8_t bytes[4][256];
    _Alignas(64) int32_t scales[4][16];
    _Alignas(32) int16_t mins[4][16]; // minimums, or offset * scale
} unpacked_blocks;

// Tokens that are not there are zeros.
ALWAYS_INLINE void interleave_tokens(vector_format f, const activation_row *x, int n, int first_block, int n_blocks,
                                     interleaved_tokens *out) {
    _Alignas(32) int8_t rows[FEW_TOKENS][32] = {0};
    for (int b = 0; b < n_blocks; b++) {
        const int64_t block = first_block + b;
        for (int k = 0; k < 8; k++) {
            for (int t = 0; t < n; t++)
                _mm256_store_si256((void *)rows[t], load_256(x[t].q + 256 * block + 32 * k));
            transpose_8x8(rows, sizeof rows[0], out->quads[b][8 * k], sizeof out->quads[b][0]);
        }
        _Alignas(32) int16_t sums[FEW_TOKENS][16] = {0};
        for (int t = 0; t < n; t++)
            for (int u = 0; u < 16; u++)
                sums[t][f.sub_block == 16 ? u : u / 2] += x[t].sums[16 * block + u];
        transpose_8x8(sums, sizeof sums[0], out->sums[b], sizeof out->sums[b][0]);
        for (int t = 0; t < FEW_TOKENS; t++)
            out->d[b][t] = t < n ? x[t].d[block] : 0.0f;
    }
}

ALWAYS_INLINE void unpack_4_blocks(vector_format f, int offset, const uint8_t *const blocks[4], unpacked_blocks *out) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        __m256i mins = _mm256_setzero_si256();
        const __m256i scales = f.scales(blocks[r], &mins);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            const __m256i u = f.chunk(blocks[r], k);
            _mm256_store_si256((void *)(out->bytes[r] + 32 * k),
                               f.is_signed ? _mm256_xor_si256(u, _mm256_set1_epi8((char)128)) : u);
        }
        _mm512_store_si512((void *)out->scales[r], _mm512_cvtepi16_epi32(scales));
        if (f.has_min)
            _mm256_store_si256((void *)out->mins[r], mins);
        else if (offset)
            _mm256_store_si256((void *)out->mins[r], _mm256_mullo_epi16(scales, _mm256_set1_epi16((short)offset)));
    }
}

// Adds a block of four rows to their running sums of each token.
ALWAYS_INLINE void multiply_few(vector_format f, const uint8_t *const blocks[4], const interleaved_tokens *x, int block,
                                float (*acc)[FEW_TOKENS]) {
    enum { QUADS = 64 };
    const int offset = f.is_signed ? 128 : f.offset, n_sub_blocks = 256 / f.sub_block, quads = QUADS / n_sub_blocks;
    unpacked_blocks w;
    unpack_4_blocks(f, offset, blocks, &w);
    __m256i sums[4], min_sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        sums[r] = min_sums[r] = _mm256_setzero_si256();
    for (int u = 0; u < n_sub_blocks; u++) {
        __m256i parts[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            parts[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < quads; i++) {
            const __m256i values = load_256(x->quads[block][u * quads + i]);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                parts[r] = _mm256_dpbusd_epi32(parts[r], _mm256_set1_epi32(load_i32(w.bytes[r] + 4 * (u * quads + i))),
                                               values);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sums[r] = _mm256_add_epi32(sums[r], _mm256_mullo_epi32(parts[r], _mm256_set1_epi32(w.scales[r][u])));
    }
    if (f.has_min || offset)
#pragma GCC unroll 8
        for (int j = 0; j < n_sub_blocks / 2; j++) {
            const __m256i of_tokens = load_256(x->sums[block][j]);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                min_sums[r] =
                    _mm256_dpwssd_epi32(min_sums[r], _mm256_set1_epi32(load_i32(&w.mins[r][2 * j])), of_tokens);
        }
    _Alignas(16) float d[4], min_d[4];
    _mm_store_ps(d, f.d(blocks));
    if (f.has_min)
        _mm_store_ps(min_d, f.min_d(blocks));
    const __m256 d_x = _mm256_load_ps(x->d[block]);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        const __m256i sum = offset ? _mm256_sub_epi32(sums[r], min_sums[r]) : sums[r];
        __m256 total = _mm256_load_ps(acc[r]);
        total = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(d[r]), d_x), _mm256_cvtepi32_ps(sum), total);
        if (f.has_min)
            total =
                _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(min_d[r]), d_x), _mm256_cvtepi32_ps(min_sums[r]), total);
        _mm256_store_ps(acc[r], total);
    }
}

// For 256-blocks.
ALWAYS_INLINE void matmul_few(vector_format f, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                              const void *const *x, int n_x, float *const *y) {
    const int n_blocks = n_cols / 256;
    activation_row tokens[FEW_TOKENS];
    for (int t = 0; t < n_x; t++)
        tokens[t] = activation_view(x[t], f.activation, n_cols);
    for (int first_row = 0; first_row < n_rows; first_row += FEW_ROWS) {
        const int rows_left = n_rows - first_row < FEW_ROWS ? n_rows - first_row : FEW_ROWS;
        _Alignas(32) float acc[FEW_ROWS][FEW_TOKENS];
        memset(acc, 0, sizeof acc);
        for (int first = 0; first < n_blocks; first += FEW_BLOCKS) {
            const int n = n_blocks - first < FEW_BLOCKS ? n_blocks - first : FEW_BLOCKS;
            interleaved_tokens together;
            interleave_tokens(f, tokens, n_x, first, n, &together);
            for (int r = 0; r < rows_left; r += 4) {
                const uint8_t *rows[4];
                for (int i = 0; i < 4; i++) // a group that is not full repeats its last row
                    rows[i] = w + (first_row + (r + i < rows_left ? r + i : rows_left - 1)) * row_bytes +
                              (int64_t)first * f.block_bytes;
                for (int b = 0; b < n; b++) {
                    const int64_t at = (int64_t)b * f.block_bytes;
                    const uint8_t *const blocks[4] = {rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at};
                    for (int line = 0; line < 4 * f.block_bytes; line += 64) // what comes next, as one stream
                        _mm_prefetch((const char *)rows[0] + 4 * (row_bytes + at) + line, _MM_HINT_T0);
                    multiply_few(f, blocks, &together, b, acc + r);
                }
            }
        }
        for (int t = 0; t < n_x; t++)
            for (int r = 0; r < rows_left; r++)
                y[t][first_row + r] = acc[r][t];
    }
}

#endif
#endif
