// Matrix products in the canonical arithmetic, for any format, from its unpack, load or expand function.
//
// These are the plain definitions: they say what every faster version computes. The functions are inlined into one
// instance a format, so that the function arguments cost nothing.
#ifndef ENGINE_MATMUL_H
#define ENGINE_MATMUL_H

#include "activations.h"
#include "integer_block.h"
#include "simd.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef void unpack_fn(const void *block, integer_block *out);
typedef void expand_fn(const void *block, float *out);
typedef v16 load_fn(const uint8_t *weights);

// One row: a single chain of one fused multiply-add a block (two with minimums), blocks in order.
ALWAYS_INLINE float dot_integer(unpack_fn unpack, int block_size, int block_bytes, int has_min, const uint8_t *w,
                                int n_cols, activation_row x) {
    float acc = 0.0f;
    for (int b = 0; b < n_cols / block_size; b++) {
        integer_block block;
        const int8_t *q = x.q + (int64_t)b * block_size;
        const int16_t *sums = x.sums + (int64_t)b * (block_size / 16);
        int32_t isum = 0, imin = 0;
        unpack(w + (int64_t)b * block_bytes, &block);
        for (int u = 0; u < block_size / 16; u++) {
            int32_t dot = 0;
            for (int i = 16 * u; i < 16 * u + 16; i++)
                dot += block.q[i] * q[i];
            isum += block.scale[u] * dot;
            if (has_min)
                imin += block.min[u] * sums[u];
        }
        acc = fmaf(block.d * x.d[b], (float)isum, acc);
        if (has_min)
            acc = fmaf(block.min_d * x.d[b], (float)imin, acc);
    }
    return acc;
}

ALWAYS_INLINE void matmul_integer(unpack_fn unpack, int block_size, int block_bytes, int has_min, int activation,
                                  const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols, const void *const *x,
                                  int n_x, float *const *y) {
    for (int t = 0; t < n_x; t++) {
        const activation_row row = activation_view(x[t], activation, n_cols);
        for (int r = 0; r < n_rows; r++)
            y[t][r] = dot_integer(unpack, block_size, block_bytes, has_min, w + r * row_bytes, n_cols, row);
    }
}

ALWAYS_INLINE void dequantize_integer(unpack_fn unpack, int block_size, int block_bytes, int has_min, const uint8_t *w,
                                      float *out, int n_cols) {
    for (int b = 0; b < n_cols / block_size; b++) {
        integer_block block;
        unpack(w + (int64_t)b * block_bytes, &block);
        for (int i = 0; i < block_size; i++) {
            const float value = block.d * (float)block.scale[i / 16] * (float)block.q[i];
            out[(int64_t)b * block_size + i] = has_min ? value + block.min_d * (float)block.min[i / 16] : value;
        }
    }
}

// Where to fetch weights into the second-level cache while others are computed with: at least this far ahead.
enum { BYTES_AHEAD = 16 << 10 };
static inline int64_t rows_ahead(int64_t row_bytes, int together) {
    return (BYTES_AHEAD / (together * row_bytes) + 1) * together;
}
ALWAYS_INLINE void fetch(const uint8_t *first, int n_bytes) {
    for (int line = 0; line < n_bytes; line += 64)
        __builtin_prefetch(first + line, 0, 2);
}

// Rows and tokens whose sums are in registers together.
#if defined(__AVX512F__)
enum { FLOAT_ROWS = 4, FLOAT_TOKENS = 4 };
#elif defined(__AVX2__)
enum { FLOAT_ROWS = 2, FLOAT_TOKENS = 2 };
#else
enum { FLOAT_ROWS = 1, FLOAT_TOKENS = 1 };
#endif

ALWAYS_INLINE void dot_float(load_fn load, int weight_bytes, const uint8_t *const rows[FLOAT_ROWS], const uint8_t *next,
                             int n_cols, int n, const float *const x[FLOAT_TOKENS],
                             float sums[FLOAT_TOKENS][FLOAT_ROWS]) {
    const int tail = n_cols % 16, whole = n_cols - tail;
    v16 acc[FLOAT_TOKENS][FLOAT_ROWS], w[FLOAT_ROWS];
    for (int t = 0; t < n; t++)
        for (int r = 0; r < FLOAT_ROWS; r++)
            acc[t][r] = v16_set(0.0f);
    for (int i = 0; i < whole; i += 16) {
        if (next)
            fetch(next + (int64_t)i * weight_bytes * FLOAT_ROWS, 16 * weight_bytes * FLOAT_ROWS);
        for (int r = 0; r < FLOAT_ROWS; r++)
            w[r] = load(rows[r] + (int64_t)i * weight_bytes);
        for (int t = 0; t < n; t++) {
            const v16 values = v16_load(x[t] + i);
            for (int r = 0; r < FLOAT_ROWS; r++)
                acc[t][r] = v16_fma(w[r], values, acc[t][r]);
        }
    }
    for (int r = 0; r < FLOAT_ROWS; r++) {
        if (tail) {
            uint8_t padded[64] = {0};
            memcpy(padded, rows[r] + (int64_t)whole * weight_bytes, (size_t)(tail * weight_bytes));
            for (int t = 0; t < n; t++)
                acc[t][r] = v16_fma(load(padded), v16_load_first(x[t] + whole, tail), acc[t][r]);
        }
        for (int t = 0; t < n; t++)
            sums[t][r] = v16_sum(acc[t][r]);
    }
}

// Float formats: sixteen chains, chain i takes the weights i, i + 16, ...; then the tree of v16_sum.
ALWAYS_INLINE void matmul_float(load_fn load, int weight_bytes, const uint8_t *w, int64_t row_bytes, int n_rows,
                                int n_cols, const void *const *x, int n_x, float *const *y) {
    const int64_t ahead = rows_ahead(row_bytes, FLOAT_ROWS) * row_bytes;
    for (int first = 0; first < n_rows; first += FLOAT_ROWS) {
        const int n = n_rows - first < FLOAT_ROWS ? n_rows - first : FLOAT_ROWS;
        const uint8_t *rows[FLOAT_ROWS];
        for (int r = 0; r < FLOAT_ROWS; r++) // what is missing repeats the last row
            rows[r] = w + (first + (r < n ? r : n - 1)) * row_bytes;
        for (int t = 0; t < n_x;) {
            const float *values[FLOAT_TOKENS] = {x[t]};
            float sums[FLOAT_TOKENS][FLOAT_ROWS];
            const int together = n_x - t < FLOAT_TOKENS ? 1 : FLOAT_TOKENS;
            for (int i = 0; i < together; i++)
                values[i] = x[t + i];
            if (together == FLOAT_TOKENS)
                dot_float(load, weight_bytes, rows, NULL, n_cols, FLOAT_TOKENS, values, sums);
            else
                dot_float(load, weight_bytes, rows, n_x == 1 ? rows[0] + ahead : NULL, n_cols, 1, values, sums);
            for (int i = 0; i < together; i++)
                memcpy(y[t + i] + first, sums[i], (size_t)n * sizeof(float));
            t += together;
        }
    }
}

ALWAYS_INLINE void dequantize_float(load_fn load, int weight_bytes, const uint8_t *w, float *out, int n_cols) {
    const int tail = n_cols % 16, whole = n_cols - tail;
    for (int i = 0; i < whole; i += 16)
        v16_store(out + i, load(w + (int64_t)i * weight_bytes));
    if (tail) {
        uint8_t padded[64] = {0};
        memcpy(padded, w + (int64_t)whole * weight_bytes, (size_t)(tail * weight_bytes));
        v16_store_first(out + whole, load(padded), tail);
    }
}

// Formats that are made float32 a block at a time.
ALWAYS_INLINE void matmul_expanded(expand_fn expand, int block_size, int block_bytes, const uint8_t *w,
                                   int64_t row_bytes, int n_rows, int n_cols, const void *const *x, int n_x,
                                   float *const *y) {
    enum { TOKENS = 16 }; // that share one expansion of a block
    for (int r = 0; r < n_rows; r++)
        for (int first = 0; first < n_x; first += TOKENS) {
            const int n = n_x - first < TOKENS ? n_x - first : TOKENS;
            v16 acc[TOKENS];
            for (int t = 0; t < n; t++)
                acc[t] = v16_set(0.0f);
            for (int b = 0; b < n_cols / block_size; b++) {
                _Alignas(64) float weights[256];
                expand(w + r * row_bytes + (int64_t)b * block_bytes, weights);
                for (int t = 0; t < n; t++) {
                    const float *values = (const float *)x[first + t] + (int64_t)b * block_size;
                    for (int i = 0; i < block_size; i += 16)
                        acc[t] = v16_fma(v16_load(weights + i), v16_load(values + i), acc[t]);
                }
            }
            for (int t = 0; t < n; t++)
                y[first + t][r] = v16_sum(acc[t]);
        }
}

ALWAYS_INLINE void dequantize_expanded(expand_fn expand, int block_size, int block_bytes, const uint8_t *w, float *out,
                                       int n_cols) {
    for (int b = 0; b < n_cols / block_size; b++)
        expand(w + (int64_t)b * block_bytes, out + (int64_t)b * block_size);
}

#endif
