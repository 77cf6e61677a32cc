// Matrix products in the canonical arithmetic, for any format, from its unpack, load or expand function.
//
// These are the plain definitions: they say what every faster version computes. The functions are inlined into one
// instance a format, so that the function arguments cost nothing.
#ifndef ENGINE_MATMUL_H
#define ENGINE_MATMUL_H

#include "activations.h"
#include "integer_block.h"
#include "simd.h"

#include <stdbool.h>

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

// Into the second-level cache, for what several tokens read.
ALWAYS_INLINE void fetch(const uint8_t *first, int n_bytes) {
    for (int line = 0; line < n_bytes; line += 64)
        __builtin_prefetch(first + line, 0, 2);
}

// What one token, or so few that they take turns, reads: some rows together, each from a stream of its own. Streams are
// equal parts of the rows of a call, so that they run through pages of their own, where a CPU that fetches ahead by
// itself sees them go on; neighbouring rows lie in one page, and look like no order at all. What comes next is fetched
// besides.
typedef struct {
    const uint8_t *first;
    int64_t row_bytes;
    int n_rows, n_each;  // rows of all streams, of each
    const uint8_t *next; // what the first stream goes on with in the next call
    int64_t next_stream_bytes;
} row_streams;

ALWAYS_INLINE row_streams streams_of(int n_streams, const uint8_t *w, int64_t row_bytes, int n_rows,
                                     const weight_rows *next) {
    const int n_each = (n_rows + n_streams - 1) / n_streams;
    if (!next)
        return (row_streams){w, row_bytes, n_rows, n_each, w + n_rows * row_bytes, n_each * row_bytes};
    return (row_streams){w,      row_bytes,   n_rows,
                         n_each, next->first, (next->n_rows + n_streams - 1) / n_streams * next->row_bytes};
}

// Row r of each stream; what the last ones lack repeats the last row.
ALWAYS_INLINE void set_rows(row_streams s, int n_streams, int r, const uint8_t **rows) {
    for (int i = 0; i < n_streams; i++) {
        const int row = i * s.n_each + r;
        rows[i] = s.first + (row < s.n_rows ? row : s.n_rows - 1) * s.row_bytes;
    }
}

ALWAYS_INLINE void load_of_rows(row_streams s, int n_streams, int r, const float *y, float *values) {
    for (int i = 0; i < n_streams; i++)
        values[i] = i * s.n_each + r < s.n_rows ? y[i * s.n_each + r] : 0.0f;
}

ALWAYS_INLINE void store_of_rows(row_streams s, int n_streams, int r, const float *values, float *y) {
    for (int i = 0; i < n_streams; i++)
        if (i * s.n_each + r < s.n_rows)
            y[i * s.n_each + r] = values[i];
}

// Fetches n_bytes of each stream, from byte `at` on; behind its end a stream goes on in the next call.
ALWAYS_INLINE void fetch_at(row_streams s, int n_streams, int64_t at, int n_bytes, bool is_near) {
    const int64_t stream_bytes = s.n_each * s.row_bytes;
    const bool is_own = at < stream_bytes;
    const uint8_t *first = is_own ? s.first + at : s.next + (at - stream_bytes);
    const int64_t apart = is_own ? stream_bytes : s.next_stream_bytes;
    for (int i = 0; i < n_streams; i++)
        for (int line = 0; line < n_bytes; line += 64)
            if (is_near)
                __builtin_prefetch(first + i * apart + line, 0, 3);
            else
                __builtin_prefetch(first + i * apart + line, 0, 2);
}

// Fetches what streams read soon after the n_bytes from byte `at` of each: what comes next into the first-level cache,
// what is farther into the second-level one, which waits for more lines at a time.
enum { NEAR_AHEAD = 1 << 9, FAR_AHEAD = 4 << 10 };
ALWAYS_INLINE void fetch_of_streams(row_streams s, int n_streams, int64_t at, int n_bytes) {
    fetch_at(s, n_streams, at + NEAR_AHEAD, n_bytes, true);
    fetch_at(s, n_streams, at + FAR_AHEAD, n_bytes, false);
}

// Rows and tokens whose sums are in registers together.
#if defined(__AVX512F__)
enum { FLOAT_ROWS = 4, FLOAT_TOKENS = 4 };
#elif defined(__AVX2__)
enum { FLOAT_ROWS = 2, FLOAT_TOKENS = 2 };
#else
enum { FLOAT_ROWS = 1, FLOAT_TOKENS = 1 };
#endif

// Of row r of each stream, with n tokens.
ALWAYS_INLINE void dot_float(load_fn load, int weight_bytes, row_streams streams, int r, int n_cols, int n,
                             const float *const x[FLOAT_TOKENS], int fetches, float sums[FLOAT_TOKENS][FLOAT_ROWS]) {
    const int tail = n_cols % 16, whole = n_cols - tail;
    const uint8_t *rows[FLOAT_ROWS];
    v16 acc[FLOAT_TOKENS][FLOAT_ROWS], w[FLOAT_ROWS];
    set_rows(streams, FLOAT_ROWS, r, rows);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < FLOAT_ROWS; i++)
            acc[t][i] = v16_set(0.0f);
    for (int c = 0; c < whole; c += 16) {
        const int64_t at = (int64_t)c * weight_bytes;
        if (fetches && at % 64 == 0)
            fetch_of_streams(streams, FLOAT_ROWS, r * streams.row_bytes + at, 64);
        for (int i = 0; i < FLOAT_ROWS; i++)
            w[i] = load(rows[i] + at);
        for (int t = 0; t < n; t++) {
            const v16 values = v16_load(x[t] + c);
            for (int i = 0; i < FLOAT_ROWS; i++)
                acc[t][i] = v16_fma(w[i], values, acc[t][i]);
        }
    }
    for (int i = 0; i < FLOAT_ROWS; i++) {
        if (tail) {
            uint8_t padded[64] = {0};
            memcpy(padded, rows[i] + (int64_t)whole * weight_bytes, (size_t)(tail * weight_bytes));
            for (int t = 0; t < n; t++)
                acc[t][i] = v16_fma(load(padded), v16_load_first(x[t] + whole, tail), acc[t][i]);
        }
        for (int t = 0; t < n; t++)
            sums[t][i] = v16_sum(acc[t][i]);
    }
}

// Float formats: sixteen chains, chain i takes the weights i, i + 16, ...; then the tree of v16_sum.
ALWAYS_INLINE void matmul_float(load_fn load, int weight_bytes, const uint8_t *w, int64_t row_bytes, int n_rows,
                                int n_cols, const void *const *x, int n_x, float *const *y, const weight_rows *next) {
    const row_streams streams = streams_of(FLOAT_ROWS, w, row_bytes, n_rows, next);
    for (int r = 0; r < streams.n_each; r++)
        for (int t = 0; t < n_x;) {
            const float *values[FLOAT_TOKENS] = {x[t]};
            float sums[FLOAT_TOKENS][FLOAT_ROWS];
            const int together = n_x - t < FLOAT_TOKENS ? 1 : FLOAT_TOKENS;
            for (int i = 0; i < together; i++)
                values[i] = x[t + i];
            if (together == FLOAT_TOKENS)
                dot_float(load, weight_bytes, streams, r, n_cols, FLOAT_TOKENS, values, t == 0, sums);
            else
                dot_float(load, weight_bytes, streams, r, n_cols, 1, values, t == 0, sums);
            for (int i = 0; i < together; i++)
                store_of_rows(streams, FLOAT_ROWS, r, sums[i], y[t + i]);
            t += together;
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
