// What one instruction-set level offers. Everything above this header is compiled once for each level, everything
// below it (program, sampling, the Cython boundary) once.
#ifndef ENGINE_TABLE_H
#define ENGINE_TABLE_H

#include <stdint.h>

#define N_GGML_TYPES 43 // weight formats are indexed by the type id of the file; holes are NULL

enum { ACTIVATION_F32, ACTIVATION_Q8_256, ACTIVATION_Q8_32, N_ACTIVATIONS };

typedef struct {
    const uint8_t *first;
    int64_t row_bytes;
    int n_rows;
} weight_rows;

// y[i][r] = w_r . x[i] for n_rows weight rows that stand row_bytes apart and n_x activation rows, in the form the
// format takes. Every y[i][r] is computed whole by this call, in the canonical order: the split of rows over threads
// and of tokens over calls cannot change a bit. `next`: what this thread will read after it, to be fetched ahead; NULL
// for the rows behind.
typedef void (*matmul_fn)(const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols, const void *const *x, int n_x,
                          float *const *y, const weight_rows *next);

typedef void (*dequantize_fn)(const uint8_t *w, float *out, int n_cols);

// Turns the values from `first` to `end` (whole groups) of a row of n_cols into their places in an activation row.
typedef void (*quantize_fn)(const float *x, void *row, int n_cols, int first, int end);

// out[i] = exp((x[i] - shift) * scale), by the polynomial of vmath.h.
typedef void (*exponentials_fn)(const float *x, int n, float shift, float scale, float *out);

// quant_level.h fills this one
typedef struct {
    matmul_fn matmul[N_GGML_TYPES];
    uint8_t is_fast[N_GGML_TYPES]; // has vector code of its own on this level
    dequantize_fn dequantize_row[N_GGML_TYPES];
    quantize_fn quantize[N_ACTIVATIONS];
} quant_table;

struct ops_table; // ops_level.h fills this one, see ops.h

typedef struct {
    const char *name;
    const quant_table *quant;
    const struct ops_table *ops;
} kernel_table;

// The table of a level by name, or of the best level this CPU can run for NULL; NULL if it cannot run it.
const kernel_table *engine_kernels(const char *isa);

// The levels this CPU can run, slowest first; returns how many.
enum { N_LEVELS = 4 };
int engine_levels(const char *names[N_LEVELS]);

typedef struct {
    int block_size, block_bytes, activation; // block_size 0: no such format
} format_facts;
extern const format_facts engine_formats[N_GGML_TYPES]; // formats.c

// Bytes of one activation row, a multiple of 64.
int64_t engine_activation_bytes(int activation, int n_cols);

#endif
