// The weight formats of one instruction-set level: a product and a dequantisation for each, and the activation forms.
#ifndef ENGINE_QUANT_LEVEL_H
#define ENGINE_QUANT_LEVEL_H

#include "decode.h"
#include "few.h"
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
#include "tile.h"

#include <stddef.h>

enum { TILE_MIN_TOKENS = 4 }; // where tiles begin to pay

#define MATMUL_ARGUMENTS                                                                                               \
    const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols, const void *const *x, int n_x, float *const *y

#define INTEGER_DEQUANTIZE(NAME, HAS_MIN)                                                                              \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_integer(unpack_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, HAS_MIN, w, out, n_cols);             \
    }

// A format without vector code.
#define INTEGER_FORMAT(NAME, HAS_MIN, ACTIVATION)                                                                      \
    enum { is_fast_##NAME = 0 };                                                                                       \
    INTEGER_DEQUANTIZE(NAME, HAS_MIN)                                                                                  \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        matmul_integer(unpack_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, HAS_MIN, ACTIVATION_##ACTIVATION, w,      \
                       row_bytes, n_rows, n_cols, x, n_x, y);                                                          \
    }

#if defined(__AVX2__)
enum { HAS_VECTORS = 1 };

// The best way for a number of tokens; all give the same bits.
ALWAYS_INLINE void matmul_vectors(vector_format f, MATMUL_ARGUMENTS) {
#if defined(__AVX512VNNI__)
    if (f.block_size == 256 && n_x >= FEW_MIN_TOKENS && n_x <= FEW_TOKENS) {
        matmul_few(f, w, row_bytes, n_rows, n_cols, x, n_x, y);
        return;
    }
#endif
    if (n_x < TILE_MIN_TOKENS)
        matmul_decode(f, w, row_bytes, n_rows, n_cols, x, n_x, y);
    else
        matmul_tiles(f, w, row_bytes, n_rows, n_cols, x, n_x, y);
}

#define VECTOR_FORMAT(NAME, SUB_BLOCK, HAS_MIN, ACTIVATION, SIGNED, LARGEST, OFFSET, SCALES, D, MIN_D, RUNS)           \
    enum { is_fast_##NAME = 1 };                                                                                       \
    INTEGER_DEQUANTIZE(NAME, HAS_MIN)                                                                                  \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        const vector_format f = {NAME##_BLOCK_SIZE,                                                                    \
                                 NAME##_BLOCK_BYTES,                                                                   \
                                 SUB_BLOCK,                                                                            \
                                 HAS_MIN,                                                                              \
                                 ACTIVATION_##ACTIVATION,                                                              \
                                 SIGNED,                                                                               \
                                 LARGEST,                                                                              \
                                 OFFSET,                                                                               \
                                 chunk_##NAME,                                                                         \
                                 SCALES,                                                                               \
                                 D,                                                                                    \
                                 MIN_D,                                                                                \
                                 RUNS};                                                                                \
        matmul_vectors(f, w, row_bytes, n_rows, n_cols, x, n_x, y);                                                    \
    }
#else
enum { HAS_VECTORS = 0 };
#define VECTOR_FORMAT(NAME, SUB_BLOCK, HAS_MIN, ACTIVATION, SIGNED, LARGEST, OFFSET, SCALES, D, MIN_D, RUNS)           \
    INTEGER_FORMAT(NAME, HAS_MIN, ACTIVATION)
#endif

#define D_AT(NAME)                                                                                                     \
    static inline __m128 d_##NAME(const uint8_t *const blocks[4]) {                                                    \
        return halves_of_4(blocks, offsetof(block_##NAME, d));                                                         \
    }
#define SCALED_D_AT(NAME, FACTOR)                                                                                      \
    static inline __m128 d_##NAME(const uint8_t *const blocks[4]) {                                                    \
        return _mm_mul_ps(halves_of_4(blocks, offsetof(block_##NAME, d)), _mm_set1_ps(FACTOR));                        \
    }
#define MIN_AT(NAME, FIELD, SIGN)                                                                                      \
    static inline __m128 min_d_##NAME(const uint8_t *const blocks[4]) {                                                \
        return _mm_xor_ps(halves_of_4(blocks, offsetof(block_##NAME, FIELD)), _mm_set1_ps(SIGN));                      \
    }

#define FLOAT_FORMAT(NAME)                                                                                             \
    enum { is_fast_##NAME = HAS_VECTORS };                                                                             \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        matmul_float(load_##NAME, NAME##_BLOCK_BYTES, w, row_bytes, n_rows, n_cols, x, n_x, y);                        \
    }                                                                                                                  \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_float(load_##NAME, NAME##_BLOCK_BYTES, w, out, n_cols);                                             \
    }

#define EXPANDED_FORMAT(NAME)                                                                                          \
    enum { is_fast_##NAME = 0 };                                                                                       \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        matmul_expanded(expand_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, w, row_bytes, n_rows, n_cols, x, n_x,    \
                        y);                                                                                            \
    }                                                                                                                  \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_expanded(expand_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, w, out, n_cols);                     \
    }

// clang-format off
#if defined(__AVX2__)
D_AT(Q4_0) D_AT(Q4_1) D_AT(Q5_0) D_AT(Q5_1) D_AT(Q8_0) D_AT(IQ4_NL)
D_AT(Q2_K) D_AT(Q3_K) D_AT(Q4_K) D_AT(Q5_K) D_AT(Q6_K) D_AT(IQ4_XS) D_AT(IQ3_S)
SCALED_D_AT(IQ2_XXS, 0.125f) SCALED_D_AT(IQ2_XS, 0.125f) SCALED_D_AT(IQ2_S, 0.125f)
SCALED_D_AT(IQ3_XXS, 0.25f) SCALED_D_AT(IQ1_S, 0.125f)
MIN_AT(Q4_1, m, 0.0f) MIN_AT(Q5_1, m, 0.0f) MIN_AT(Q2_K, dmin, -0.0f) MIN_AT(Q4_K, dmin, -0.0f) MIN_AT(Q5_K, dmin, -0.0f)
#endif

FLOAT_FORMAT(F32)
FLOAT_FORMAT(F16)
FLOAT_FORMAT(BF16)
EXPANDED_FORMAT(TQ1_0)
EXPANDED_FORMAT(TQ2_0)
EXPANDED_FORMAT(NVFP4)
EXPANDED_FORMAT(Q1_0)
EXPANDED_FORMAT(Q2_0)
VECTOR_FORMAT(Q4_0, 32, 0, Q8_32, 0, 15, 8, NULL, d_Q4_0, NULL, runs_Q4_0)
VECTOR_FORMAT(Q4_1, 32, 1, Q8_32, 0, 15, 0, NULL, d_Q4_1, min_d_Q4_1, runs_Q4_1)
VECTOR_FORMAT(Q5_0, 32, 0, Q8_32, 0, 31, 16, NULL, d_Q5_0, NULL, runs_Q5_0)
VECTOR_FORMAT(Q5_1, 32, 1, Q8_32, 0, 31, 0, NULL, d_Q5_1, min_d_Q5_1, runs_Q5_1)
VECTOR_FORMAT(Q8_0, 32, 0, Q8_32, 1, 128, 0, NULL, d_Q8_0, NULL, runs_Q8_0)
VECTOR_FORMAT(IQ4_NL, 32, 0, Q8_32, 1, 127, 0, NULL, d_IQ4_NL, NULL, runs_IQ4_NL)
VECTOR_FORMAT(MXFP4, 32, 0, Q8_32, 0, 24, 12, NULL, d_MXFP4, NULL, runs_MXFP4)
VECTOR_FORMAT(Q2_K, 16, 1, Q8_256, 0, 3, 0, scales_Q2_K, d_Q2_K, min_d_Q2_K, NULL)
VECTOR_FORMAT(Q3_K, 16, 0, Q8_256, 0, 7, 4, scales_Q3_K, d_Q3_K, NULL, NULL)
VECTOR_FORMAT(Q4_K, 32, 1, Q8_256, 0, 15, 0, scales_Q4_K, d_Q4_K, min_d_Q4_K, NULL)
VECTOR_FORMAT(Q5_K, 32, 1, Q8_256, 0, 31, 0, scales_Q5_K, d_Q5_K, min_d_Q5_K, NULL)
VECTOR_FORMAT(Q6_K, 16, 0, Q8_256, 0, 63, 32, scales_Q6_K, d_Q6_K, NULL, NULL)
VECTOR_FORMAT(IQ4_XS, 32, 0, Q8_256, 1, 127, 0, scales_IQ4_XS, d_IQ4_XS, NULL, runs_IQ4_XS)
VECTOR_FORMAT(IQ2_XXS, 32, 0, Q8_256, 1, 43, 0, scales_IQ2_XXS, d_IQ2_XXS, NULL, NULL)
VECTOR_FORMAT(IQ2_XS, 16, 0, Q8_256, 1, 43, 0, scales_IQ2_XS, d_IQ2_XS, NULL, NULL)
VECTOR_FORMAT(IQ2_S, 16, 0, Q8_256, 1, 43, 0, scales_IQ2_S, d_IQ2_S, NULL, NULL)
VECTOR_FORMAT(IQ3_XXS, 32, 0, Q8_256, 1, 62, 0, scales_IQ3_XXS, d_IQ3_XXS, NULL, NULL)
VECTOR_FORMAT(IQ3_S, 32, 0, Q8_256, 1, 15, 0, scales_IQ3_S, d_IQ3_S, NULL, NULL)
VECTOR_FORMAT(IQ1_S, 32, 0, Q8_256, 0, 18, 9, scales_IQ1_S, d_IQ1_S, NULL, NULL)
VECTOR_FORMAT(IQ1_M, 16, 0, Q8_256, 0, 18, 9, scales_IQ1_M, d_IQ1_M, NULL, NULL)

#define MATMUL_ENTRY(NAME, TYPE, SIZE, BYTES, ACTIVATION) [TYPE] = matmul_##NAME,
#define DEQUANTIZE_ENTRY(NAME, TYPE, SIZE, BYTES, ACTIVATION) [TYPE] = dequantize_##NAME,
#define IS_FAST_ENTRY(NAME, TYPE, SIZE, BYTES, ACTIVATION) [TYPE] = is_fast_##NAME,
static const quant_table level_quant = {
    .matmul = {EACH_FORMAT(MATMUL_ENTRY)},
    .is_fast = {EACH_FORMAT(IS_FAST_ENTRY)},
    .dequantize_row = {EACH_FORMAT(DEQUANTIZE_ENTRY)},
    .quantize = {quantize_F32, quantize_Q8_256, quantize_Q8_32},
};
// clang-format on

#endif
