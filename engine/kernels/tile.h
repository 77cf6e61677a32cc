// Products with many tokens on vector levels: a tile of weights is unpacked once and meets all tokens.
//
// A tile is TILE_ROWS rows by TILE_COLS columns, with rows side by side in the lanes of a register, so a lane is an
// output: no horizontal sums, and the canonical chain of multiply-adds runs on whole registers. Two layouts:
//
//   bytes  four weights of a row in each 32-bit lane, as u8 with an offset; AVX2 sums products in int16 for as long as
//          they fit and then widens them with the scale, VNNI sums to int32 at once.
//   words  two weights in each 32-bit lane, as int16 already multiplied by their scale; for signed weights
//          too large for the first layout on AVX2.
//
// Either way the integer sum of a block is exact, so it is that of decode.h and matmul.h.
#ifndef ENGINE_TILE_H
#define ENGINE_TILE_H

#include "decode.h"

#if defined(__AVX2__)

#if defined(__AVX512VNNI__)
typedef __m512i lanes;
typedef __m512 float_lanes;
enum { N_LANES = 16 };
static inline lanes lanes_zero(void) { return _mm512_setzero_si512(); }
static inline lanes lanes_load(const void *p) { return _mm512_load_si512(p); }
static inline lanes lanes_set(int32_t a) { return _mm512_set1_epi32(a); }
static inline lanes lanes_sub(lanes a, lanes b) { return _mm512_sub_epi32(a, b); }
static inline lanes lanes_add_dot_u8(lanes part, lanes u, lanes s) { return _mm512_dpbusd_epi32(part, u, s); }
static inline lanes lanes_widen(lanes sum, lanes part, lanes scale) {
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(part, scale));
}
static inline lanes lanes_widen_unscaled(lanes sum, lanes part) { return _mm512_add_epi32(sum, part); }
static inline lanes lanes_add_dot_i16(lanes sum, lanes a, lanes b) { return _mm512_dpwssd_epi32(sum, a, b); }
static inline float_lanes lanes_to_float(lanes a) { return _mm512_cvtepi32_ps(a); }
static inline float_lanes float_lanes_load(const float *p) { return _mm512_load_ps(p); }
static inline void float_lanes_store(float *p, float_lanes a) { _mm512_store_ps(p, a); }
static inline float_lanes float_lanes_scale(float_lanes a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
static inline float_lanes float_lanes_fma(float_lanes a, float_lanes b, float_lanes c) {
    return _mm512_fmadd_ps(a, b, c);
}
#else
typedef __m256i lanes;
typedef __m256 float_lanes;
enum { N_LANES = 8 };
static inline lanes lanes_zero(void) { return _mm256_setzero_si256(); }
static inline lanes lanes_load(const void *p) { return _mm256_load_si256(p); }
static inline lanes lanes_set(int32_t a) { return _mm256_set1_epi32(a); }
static inline lanes lanes_sub(lanes a, lanes b) { return _mm256_sub_epi32(a, b); }
static inline lanes lanes_add_dot_u8(lanes part, lanes u, lanes s) {
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(u, s));
}
static inline lanes lanes_widen(lanes sum, lanes part, lanes scale) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(part, scale));
}
static inline lanes lanes_widen_unscaled(lanes sum, lanes part) { return lanes_widen(sum, part, _mm256_set1_epi16(1)); }
static inline lanes lanes_add_dot_i16(lanes sum, lanes a, lanes b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
static inline float_lanes lanes_to_float(lanes a) { return _mm256_cvtepi32_ps(a); }
static inline float_lanes float_lanes_load(const float *p) { return _mm256_load_ps(p); }
static inline void float_lanes_store(float *p, float_lanes a) { _mm256_store_ps(p, a); }
static inline float_lanes float_lanes_scale(float_lanes a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
static inline float_lanes float_lanes_fma(float_lanes a, float_lanes b, float_lanes c) {
    return _mm256_fmadd_ps(a, b, c);
}
#endif

// Keeps a running sum in its register: the compiler would regroup the additions of an unrolled loop into a tree, and
// spill.
#define KEEP_IN_REGISTER(a) __asm__("" : "+v"(a))

enum {
    TILE_VECTORS = 2, // registers side by side
    TILE_ROWS = TILE_VECTORS * N_LANES,
    TILE_COLS = 256,
    TILE_TOKENS = 128, // that meet one unpacked tile
    BYTE_TOKENS = 3,   // in registers at a time, bytes layout
    WORD_TOKENS = 4,   // words layout
    N_SUB_BLOCKS = TILE_COLS / 16,
};

typedef struct {
    union {
        _Alignas(64) uint8_t bytes[TILE_COLS / 4][TILE_ROWS][4];
        _Alignas(64) int16_t words[TILE_COLS / 2][TILE_ROWS][2];
    };
    _Alignas(64) int32_t scales[N_SUB_BLOCKS][TILE_ROWS];      // as lanes_widen takes them
    _Alignas(64) int16_t mins[N_SUB_BLOCKS / 2][TILE_ROWS][2]; // minimums, or offset * scale
    _Alignas(64) float d[TILE_COLS / 32][TILE_ROWS], min_d[TILE_COLS / 32][TILE_ROWS];
} weight_tile;

// How a format is laid out on this level.
typedef struct {
    int words;  // else bytes
    int offset; // of the bytes
    int group;  // quads whose products add up before they are widened
} tile_layout;

ALWAYS_INLINE tile_layout layout_of(vector_format f) {
#if defined(__AVX512VNNI__)
    return (tile_layout){0, f.is_signed ? 128 : f.offset, f.sub_block / 4};
#else
    const int largest = f.is_signed ? 2 * f.largest : f.largest; // as a byte
    const int fit = 32767 / (2 * 127 * largest);                 // pair sums that an int16 holds
    const int group = fit >= 8 ? 8 : fit >= 4 ? 4 : 2;
    return (tile_layout){.words = f.is_signed && fit < 4,
                         .offset = f.is_signed ? f.largest : f.offset,
                         .group = group < f.sub_block / 4 ? group : f.sub_block / 4};
#endif
}

// out[j][r] = in[r][j] for eight rows of eight 32-bit values.
static inline void transpose_8x8(const void *in, int64_t row_stride, void *out, int64_t column_stride) {
    __m256i a[8], b[8];
    for (int r = 0; r < 8; r++)
        a[r] = load_256((const char *)in + r * row_stride);
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
        for (int i = 0; i < 2; i++) {
            a[r + 2 * i] = _mm256_unpacklo_epi64(b[r + i], b[r + i + 2]);
            a[r + 2 * i + 1] = _mm256_unpackhi_epi64(b[r + i], b[r + i + 2]);
        }
    for (int j = 0; j < 4; j++) {
        _mm256_store_si256((void *)((char *)out + j * column_stride), _mm256_permute2x128_si256(a[j], a[j + 4], 0x20));
        _mm256_store_si256((void *)((char *)out + (j + 4) * column_stride),
                           _mm256_permute2x128_si256(a[j], a[j + 4], 0x31));
    }
}

// Eight weight rows taken apart, row by row, before they are interleaved.
typedef struct {
    union {
        _Alignas(64) uint8_t bytes[8][TILE_COLS];
        _Alignas(64) int16_t words[8][TILE_COLS];
    };
    _Alignas(64) int32_t scales[8][N_SUB_BLOCKS];
    _Alignas(64) int16_t mins[8][N_SUB_BLOCKS];
} unpacked_rows;

ALWAYS_INLINE void unpack_row_256(vector_format f, tile_layout layout, const uint8_t *block, const block_points *points,
                                  unpacked_rows *out, int r) {
    __m256i mins = _mm256_setzero_si256();
    const __m256i scales = one_a_sub_block(f, f.scales(block, &mins));
    if (layout.words) {
        _Alignas(32) int16_t scale[16];
        _mm256_store_si256((void *)scale, scales);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            const __m256i q = chunk_of(f, block, points, k);
            const __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q));
            const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(q, 1));
            __m256i *words = (__m256i *)(out->words[r] + 32 * k);
            _mm256_store_si256(words, _mm256_mullo_epi16(low, _mm256_set1_epi16(scale[2 * k])));
            _mm256_store_si256(words + 1, _mm256_mullo_epi16(high, _mm256_set1_epi16(scale[2 * k + 1])));
        }
        return;
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
        _mm256_store_si256((__m256i *)(out->bytes[r] + 32 * k), unsigned_chunk(f, layout.offset, block, points, k));
#if defined(__AVX512VNNI__)
    _mm512_store_si512((void *)out->scales[r], _mm512_cvtepi16_epi32(scales));
#else
    const __m256i ordered = _mm256_permute4x64_epi64(scales, 0xd8); // unpacking works on halves
    _mm256_store_si256((__m256i *)out->scales[r], _mm256_unpacklo_epi16(ordered, ordered));
    _mm256_store_si256((__m256i *)out->scales[r] + 1, _mm256_unpackhi_epi16(ordered, ordered));
#endif
    if (f.has_min)
        _mm256_store_si256((__m256i *)out->mins[r], one_a_sub_block(f, mins));
    else if (layout.offset)
        _mm256_store_si256((__m256i *)out->mins[r],
                           _mm256_mullo_epi16(scales, _mm256_set1_epi16((short)layout.offset)));
}

ALWAYS_INLINE void unpack_row_32(vector_format f, tile_layout layout, const uint8_t *block, unpacked_rows *out, int r,
                                 int index) {
    if (layout.words) {
        const __m256i q = f.chunk(block, 0);
        __m256i *words = (__m256i *)(out->words[r] + 32 * index);
        _mm256_store_si256(words, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q)));
        _mm256_store_si256(words + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(q, 1)));
    } else
        _mm256_store_si256((__m256i *)(out->bytes[r] + 32 * index), unsigned_chunk(f, layout.offset, block, NULL, 0));
}

// Unpacks `n_blocks` blocks of each row, TILE_COLS columns or fewer.
ALWAYS_INLINE void fill_tile(vector_format f, tile_layout layout, const uint8_t *const rows[TILE_ROWS], int64_t at,
                             int n_blocks, weight_tile *tile) {
    const int n_columns = n_blocks * f.block_size;
    for (int first = 0; first < TILE_ROWS; first += 8) {
        unpacked_rows unpacked;
        for (int r = 0; r < 8; r += 4)
            for (int b = 0; b < n_blocks; b++) {
                const uint8_t *blocks[4];
                block_points points[4];
                for (int i = 0; i < 4; i++)
                    blocks[i] = rows[first + r + i] + at + b * f.block_bytes;
                if (f.block_size == 256)
                    begin_chunks(f, blocks, points);
                for (int i = 0; i < 4; i++)
                    if (f.block_size == 256)
                        unpack_row_256(f, layout, blocks[i], &points[i], &unpacked, r + i);
                    else
                        unpack_row_32(f, layout, blocks[i], &unpacked, r + i, b);
            }
        if (layout.words)
            for (int c = 0; c < n_columns; c += 16)
                transpose_8x8(&unpacked.words[0][c], sizeof unpacked.words[0], tile->words[c / 2][first],
                              sizeof tile->words[0]);
        else
            for (int c = 0; c < n_columns; c += 32)
                transpose_8x8(&unpacked.bytes[0][c], sizeof unpacked.bytes[0], tile->bytes[c / 4][first],
                              sizeof tile->bytes[0]);
        if (f.block_size == 256 && !layout.words) {
            for (int u = 0; u < N_SUB_BLOCKS; u += 8)
                transpose_8x8(&unpacked.scales[0][u], sizeof unpacked.scales[0], &tile->scales[u][first],
                              sizeof tile->scales[0]);
            if (f.has_min || layout.offset)
                transpose_8x8(unpacked.mins, sizeof unpacked.mins[0], tile->mins[0][first], sizeof tile->mins[0]);
        }
        for (int b = 0; b < n_blocks; b++)
            for (int r = first; r < first + 8; r += 4) {
                const int64_t block = at + b * f.block_bytes;
                const uint8_t *const blocks[4] = {rows[r] + block, rows[r + 1] + block, rows[r + 2] + block,
                                                  rows[r + 3] + block};
                _mm_store_ps(&tile->d[b][r], f.d(blocks));
                if (f.has_min)
                    _mm_store_ps(&tile->min_d[b][r], f.min_d(blocks));
            }
    }
}

static inline lanes lanes_set_4_bytes(const void *p) {
    int32_t bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return lanes_set(bytes);
}

// One block of the tile times n activations: adds to the rows' running sums of each token.
ALWAYS_INLINE void multiply_block(vector_format f, tile_layout layout, const weight_tile *tile, int block, int n,
                                  const activation_row *x, int64_t group, float (*acc)[TILE_ROWS]) {
    enum { MAX_TOKENS = WORD_TOKENS > BYTE_TOKENS ? WORD_TOKENS : BYTE_TOKENS };
    const int n_quads = f.block_size / 4;
    lanes sums[MAX_TOKENS][TILE_VECTORS], min_sums[MAX_TOKENS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int t = 0; t < n; t++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++)
            sums[t][v] = lanes_zero();
    if (layout.words) {
        _Alignas(32) int16_t wide[MAX_TOKENS][256];
#pragma GCC unroll 8
        for (int t = 0; t < n; t++)
            for (int i = 0; i < f.block_size; i += 16)
                _mm256_store_si256((void *)(wide[t] + i),
                                   _mm256_cvtepi8_epi16(load_128(x[t].q + group * f.block_size + i)));
        for (int pair = 0; pair < f.block_size / 2; pair++) {
            const int16_t (*weights)[2] = tile->words[block * (f.block_size / 2) + pair];
#pragma GCC unroll 8
            for (int t = 0; t < n; t++) {
                const lanes values = lanes_set_4_bytes(wide[t] + 2 * pair);
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++)
                    sums[t][v] = lanes_add_dot_i16(sums[t][v], lanes_load(weights[v * N_LANES]), values);
                for (int v = 0; v < TILE_VECTORS; v++)
                    KEEP_IN_REGISTER(sums[t][v]);
            }
        }
    } else {
        for (int first = 0; first < n_quads; first += layout.group) {
            lanes parts[MAX_TOKENS][TILE_VECTORS];
#pragma GCC unroll 8
            for (int t = 0; t < n; t++)
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++)
                    parts[t][v] = lanes_zero();
#pragma GCC unroll 8
            for (int quad = first; quad < first + layout.group; quad++) {
                lanes weights[TILE_VECTORS];
#pragma GCC unroll 8
                for (int v = 0; v < TILE_VECTORS; v++) {
                    weights[v] = lanes_load(tile->bytes[block * n_quads + quad][v * N_LANES]);
                    KEEP_IN_REGISTER(weights[v]); // for all tokens: loads are scarce, too
                }
#pragma GCC unroll 8
                for (int t = 0; t < n; t++) {
                    const lanes values = lanes_set_4_bytes(x[t].q + group * f.block_size + 4 * quad);
#pragma GCC unroll 8
                    for (int v = 0; v < TILE_VECTORS; v++)
                        parts[t][v] = lanes_add_dot_u8(parts[t][v], weights[v], values);
                    for (int v = 0; v < TILE_VECTORS; v++)
                        KEEP_IN_REGISTER(parts[t][v]);
                }
            }
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++)
#pragma GCC unroll 8
                for (int t = 0; t < n; t++)
                    sums[t][v] = f.block_size == 32 ? lanes_widen_unscaled(sums[t][v], parts[t][v])
                                                    : lanes_widen(sums[t][v], parts[t][v],
                                                                  lanes_load(&tile->scales[first / 4][v * N_LANES]));
        }
    }
    if (f.has_min || (layout.offset && !layout.words)) {
#pragma GCC unroll 8
        for (int t = 0; t < n; t++) {
            const int16_t *x_sums = x[t].sums + group * (f.block_size / 16);
#pragma GCC unroll 8
            for (int v = 0; v < TILE_VECTORS; v++) {
                lanes total = lanes_zero();
                if (f.block_size == 32)
                    total = lanes_set((x_sums[0] + x_sums[1]) * (f.has_min ? 1 : layout.offset));
                else
                    for (int u = 0; u < N_SUB_BLOCKS / 2; u++)
                        total = lanes_add_dot_i16(total, lanes_load(tile->mins[u][v * N_LANES]),
                                                  lanes_set_4_bytes(x_sums + 2 * u));
                min_sums[t][v] = total;
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < n; t++)
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; v++) {
            const int r = v * N_LANES;
            const float d_x = x[t].d[group];
            lanes sum = sums[t][v];
            if (layout.offset && !layout.words)
                sum = lanes_sub(sum, min_sums[t][v]);
            float_lanes total = float_lanes_load(acc[t] + r);
            total = float_lanes_fma(float_lanes_scale(float_lanes_load(tile->d[block] + r), d_x), lanes_to_float(sum),
                                    total);
            if (f.has_min)
                total = float_lanes_fma(float_lanes_scale(float_lanes_load(tile->min_d[block] + r), d_x),
                                        lanes_to_float(min_sums[t][v]), total);
            float_lanes_store(acc[t] + r, total);
        }
}

ALWAYS_INLINE void multiply_tile(vector_format f, tile_layout layout, const weight_tile *tile, int first_block,
                                 int n_blocks, int n, const activation_row *x, float (*acc)[TILE_ROWS]) {
    for (int b = 0; b < n_blocks; b++)
        multiply_block(f, layout, tile, b, n, x, first_block + b, acc);
}

ALWAYS_INLINE void matmul_tiles(vector_format f, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                                const void *const *x, int n_x, float *const *y) {
    const tile_layout layout = layout_of(f);
    const int n_blocks = n_cols / f.block_size, tile_blocks = TILE_COLS / f.block_size;
    const int together = layout.words ? WORD_TOKENS : BYTE_TOKENS;
    for (int first_row = 0; first_row < n_rows; first_row += TILE_ROWS) {
        const int rows_left = n_rows - first_row < TILE_ROWS ? n_rows - first_row : TILE_ROWS;
        const uint8_t *rows[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) // a tile that is not full repeats its last row
            rows[r] = w + (first_row + (r < rows_left ? r : rows_left - 1)) * row_bytes;
        for (int first_x = 0; first_x < n_x; first_x += TILE_TOKENS) {
            const int n_tokens = n_x - first_x < TILE_TOKENS ? n_x - first_x : TILE_TOKENS;
            _Alignas(64) float acc[TILE_TOKENS][TILE_ROWS];
            activation_row tokens[TILE_TOKENS];
            memset(acc, 0, (size_t)n_tokens * sizeof acc[0]);
            for (int t = 0; t < n_tokens; t++)
                tokens[t] = activation_view(x[first_x + t], f.activation, n_cols);
            for (int b = 0; b < n_blocks; b += tile_blocks) {
                const int n = n_blocks - b < tile_blocks ? n_blocks - b : tile_blocks;
                const int n_bytes = TILE_ROWS * n * f.block_bytes;
                // Of the next rows, of which one long stream is fetched meanwhile, some lines with each few tokens.
                const uint8_t *next = rows[0] + TILE_ROWS * (row_bytes + (int64_t)b * f.block_bytes);
                weight_tile tile;
                fill_tile(f, layout, rows, (int64_t)b * f.block_bytes, n, &tile);
                int t = 0;
                for (; t + together <= n_tokens; t += together) {
                    fetch(next + n_bytes * t / n_tokens, n_bytes * together / n_tokens);
                    multiply_tile(f, layout, &tile, b, n, together, tokens + t, acc + t);
                }
                for (; t < n_tokens; t++) {
                    fetch(next + n_bytes * t / n_tokens, n_bytes / n_tokens);
                    multiply_tile(f, layout, &tile, b, n, 1, tokens + t, acc + t);
                }
            }
            for (int t = 0; t < n_tokens; t++)
                memcpy(y[first_x + t] + first_row, acc[t], (size_t)rows_left * sizeof(float));
        }
    }
}

#endif
#endif
