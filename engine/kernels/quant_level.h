// The weight formats of one instruction-set level: a product and a dequantisation for each, and the activation forms.
#ifndef ENGINE_QUANT_LEVEL_H
#define ENGINE_QUANT_LEVEL_H

#include "formats/float32.h"
#include "formats/iq1.h"
#include "formats/iq2.h"
#include "formats/iq3.h"
#include "formats/iq4.h"
#include "formats/q2_k.h"
#include "formats/q4_0.h"
#include "formats/q4_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"
#include "matmul.h"
#include "quantize.h"

#define MATMUL_ARGUMENTS                                                                                               \
    const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols, const void *const *x, int n_x, float *const *y

#define INTEGER_FORMAT(NAME, HAS_MIN, ACTIVATION)                                                                      \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        matmul_integer(unpack_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, HAS_MIN, ACTIVATION_##ACTIVATION, w,      \
                       row_bytes, n_rows, n_cols, x, n_x, y);                                                          \
    }                                                                                                                  \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_integer(unpack_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, HAS_MIN, w, out, n_cols);             \
    }

#define FLOAT_FORMAT(NAME)                                                                                             \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        matmul_float(load_##NAME, NAME##_BLOCK_BYTES, w, row_bytes, n_rows, n_cols, x, n_x, y);                        \
    }                                                                                                                  \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_float(load_##NAME, NAME##_BLOCK_BYTES, w, out, n_cols);                                             \
    }

#define EXPANDED_FORMAT(NAME)                                                                                          \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        matmul_expanded(expand_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, w, row_bytes, n_rows, n_cols, x, n_x,    \
                        y);                                                                                            \
    }                                                                                                                  \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_expanded(expand_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, w, out, n_cols);                     \
    }

FLOAT_FORMAT(F32)
FLOAT_FORMAT(F16)
FLOAT_FORMAT(BF16)
EXPANDED_FORMAT(TQ1_0)
EXPANDED_FORMAT(TQ2_0)
EXPANDED_FORMAT(NVFP4)
EXPANDED_FORMAT(Q1_0)
EXPANDED_FORMAT(Q2_0)
INTEGER_FORMAT(Q4_0, 0, Q8_32)
INTEGER_FORMAT(Q4_1, 1, Q8_32)
INTEGER_FORMAT(Q5_0, 0, Q8_32)
INTEGER_FORMAT(Q5_1, 1, Q8_32)
INTEGER_FORMAT(Q8_0, 0, Q8_32)
INTEGER_FORMAT(IQ4_NL, 0, Q8_32)
INTEGER_FORMAT(MXFP4, 0, Q8_32)
INTEGER_FORMAT(Q2_K, 1, Q8_256)
INTEGER_FORMAT(Q3_K, 0, Q8_256)
INTEGER_FORMAT(Q4_K, 1, Q8_256)
INTEGER_FORMAT(Q5_K, 1, Q8_256)
INTEGER_FORMAT(Q6_K, 0, Q8_256)
INTEGER_FORMAT(IQ4_XS, 0, Q8_256)
INTEGER_FORMAT(IQ2_XXS, 0, Q8_256)
INTEGER_FORMAT(IQ2_XS, 0, Q8_256)
INTEGER_FORMAT(IQ2_S, 0, Q8_256)
INTEGER_FORMAT(IQ3_XXS, 0, Q8_256)
INTEGER_FORMAT(IQ3_S, 0, Q8_256)
INTEGER_FORMAT(IQ1_S, 0, Q8_256)
INTEGER_FORMAT(IQ1_M, 0, Q8_256)

#define MATMUL_ENTRY(NAME, TYPE, SIZE, BYTES, ACTIVATION) [TYPE] = matmul_##NAME,
#define DEQUANTIZE_ENTRY(NAME, TYPE, SIZE, BYTES, ACTIVATION) [TYPE] = dequantize_##NAME,
static const quant_table level_quant = {
    .matmul = {EACH_FORMAT(MATMUL_ENTRY)},
    .is_fast = {0},
    .dequantize_row = {EACH_FORMAT(DEQUANTIZE_ENTRY)},
    .quantize_row = {quantize_row_F32, quantize_row_Q8_256, quantize_row_Q8_32},
};

#endif
