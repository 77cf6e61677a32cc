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

// Where tiles begin to pay.
#if defined(__AVX512VNNI__)
enum { TILE_MIN_TOKENS = FEW_TOKENS + 1 };
#else
enum { TILE_MIN_TOKENS = 4 };
#endif

#define MATMUL_ARGUMENTS                                                                                               \
    const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols, const void *const *x, int n_x, float *const *y,       \
        const weight_rows *next

#define INTEGER_DEQUANTIZE(NAME, HAS_MIN)                                                                              \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_integer(unpack_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, HAS_MIN, w, out, n_cols);             \
    }

// A format without vector code.
#define INTEGER_FORMAT(NAME, HAS_MIN)                                                                                  \
    enum { is_fast_##NAME = 0 };                                                                                       \
    INTEGER_DEQUANTIZE(NAME, HAS_MIN)                                                                                  \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        (void)next;                                                                                                    \
        matmul_integer(unpack_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, HAS_MIN, NAME##_ACTIVATION, w, row_bytes, \
                       n_rows, n_cols, x, n_x, y);                                                                     \
    }

#if defined(__AVX2__)
enum { HAS_VECTORS = 1 };

// The best way for a number of tokens; all give the same bits.
ALWAYS_INLINE void matmul_vectors(vector_format f, MATMUL_ARGUMENTS) {
#if defined(__AVX512VNNI__)
    if (n_x >= few_min_tokens(f) && n_x <= FEW_TOKENS) {
        matmul_few(f, w, row_bytes, n_rows, n_cols, x, n_x, y);
        return;
    }
#endif
    if (n_x < TILE_MIN_TOKENS)
        matmul_decode(f, w, row_bytes, n_rows, n_cols, x, n_x, y, next);
    else
        matmul_tiles(f, w, row_bytes, n_rows, n_cols, x, n_x, y);
}

// What each level's products with one token need.
#if defined(__AVX512VNNI__)
#define PER_LEVEL(ON_AVX2, ...) __VA_ARGS__
#define WIDE(NAME) .wide = wide_##NAME,
#else
#define PER_LEVEL(ON_AVX2, ...) ON_AVX2
#define WIDE(NAME)
#endif

#define FORMAT_WITH(NAME, HAS_MIN, ...)                                                                                \
    enum { is_fast_##NAME = 1 };                                                                                       \
    INTEGER_DEQUANTIZE(NAME, HAS_MIN)                                                                                  \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        const vector_format f = {.block_size = NAME##_BLOCK_SIZE,                                                      \
                                 .block_bytes = NAME##_BLOCK_BYTES,                                                    \
                                 .activation = NAME##_ACTIVATION,                                                      \
                                 .has_min = HAS_MIN,                                                                   \
                                 .d = d_##NAME,                                                                        \
                                 __VA_ARGS__};                                                                         \
        matmul_vectors(f, w, row_bytes, n_rows, n_cols, x, n_x, y, next);                                              \
    }
#define VECTOR_FORMAT(NAME, HAS_MIN, ...) FORMAT_WITH(NAME, HAS_MIN, .chunk = chunk_##NAME, WIDE(NAME) __VA_ARGS__)

#define GRID_FORMAT(NAME, IS_SIGNED, ...)                                                                              \
    FORMAT_WITH(NAME, 0, .scales = scales_##NAME, .is_signed = IS_SIGNED, .points = points_##NAME,                     \
                .layout = layout_##NAME, ON_GRIDS(NAME, IS_SIGNED) __VA_ARGS__)
#if defined(__AVX512VBMI__)
#define ON_GRIDS(NAME, IS_SIGNED) .order = COLUMNS,
#elif defined(__AVX512VNNI__)
#define ON_GRIDS(NAME, IS_SIGNED) .wide = wide_##NAME, .order = IN_ORDER, .has_signs = IS_SIGNED,
#else
#define ON_GRIDS(NAME, IS_SIGNED)
#endif
#else
enum { HAS_VECTORS = 0 };
#define VECTOR_FORMAT(NAME, HAS_MIN, ...) INTEGER_FORMAT(NAME, HAS_MIN)
#define GRID_FORMAT(NAME, ...) INTEGER_FORMAT(NAME, 0)
#endif

#define D_AT(NAME)                                                                                                     \
    static inline __m128 d_##NAME(const uint8_t *const blocks[4]) {                                                    \
        return halves_of_4(blocks, offsetof(block_##NAME, d));                                                         \
    }
#define SCALED_D_AT(NAME, FACTOR)                                                                                      \
    static inline __m128 d_##NAME(const uint8_t *const blocks[4]) {                                                    \
        return _mm_mul_ps(halves_of_4(blocks, offsetof(block_##NAME, d)), _mm_set1_ps(FACTOR));                        \
    }
// d at the beginning of blocks that scales_4 reads the heads of, too.
#define D_IN_HEAD(NAME)                                                                                                \
    static inline __m128 d_##NAME(const uint8_t *const blocks[4]) {                                                    \
        return _mm256_castps256_ps128(halves_of_heads(heads_of_4(blocks)));                                            \
    }
#define D_AND_MIN_IN_HEAD(NAME)                                                                                        \
    D_IN_HEAD(NAME)                                                                                                    \
    static inline __m128 min_d_##NAME(const uint8_t *const blocks[4]) {                                                \
        return _mm_xor_ps(_mm256_extractf128_ps(halves_of_heads(heads_of_4(blocks)), 1), _mm_set1_ps(-0.0f));          \
    }
// Formats with a minimum have it next to d, so that both are read at once.
#define D_AND_MIN_AT(NAME, SIGN)                                                                                       \
    static inline __m128 d_##NAME(const uint8_t *const blocks[4]) {                                                    \
        return lower_of_pairs(pairs_of_4(blocks, offsetof(block_##NAME, d)));                                          \
    }                                                                                                                  \
    static inline __m128 min_d_##NAME(const uint8_t *const blocks[4]) {                                                \
        return _mm_xor_ps(upper_of_pairs(pairs_of_4(blocks, offsetof(block_##NAME, d))), _mm_set1_ps(SIGN));           \
    }

// Of four blocks of 32 of four rows.
#define D_16_AT(NAME)                                                                                                  \
    static inline __m512 d_16_##NAME(const uint8_t *const blocks[4], int at) {                                         \
        return halves_of_16(blocks, at + (int)offsetof(block_##NAME, d), NAME##_BLOCK_BYTES);                          \
    }
#define D_AND_MIN_16_AT(NAME)                                                                                          \
    D_16_AT(NAME)                                                                                                      \
    static inline __m512 min_d_16_##NAME(const uint8_t *const blocks[4], int at) {                                     \
        return halves_of_16(blocks, at + (int)offsetof(block_##NAME, m), NAME##_BLOCK_BYTES);                          \
    }

#define FLOAT_FORMAT(NAME)                                                                                             \
    enum { is_fast_##NAME = HAS_VECTORS };                                                                             \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        matmul_float(load_##NAME, NAME##_BLOCK_BYTES, w, row_bytes, n_rows, n_cols, x, n_x, y, next);                  \
    }                                                                                                                  \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_float(load_##NAME, NAME##_BLOCK_BYTES, w, out, n_cols);                                             \
    }

#define EXPANDED_FORMAT(NAME)                                                                                          \
    enum { is_fast_##NAME = 0 };                                                                                       \
    static void matmul_##NAME(MATMUL_ARGUMENTS) {                                                                      \
        (void)next;                                                                                                    \
        matmul_expanded(expand_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, w, row_bytes, n_rows, n_cols, x, n_x,    \
                        y);                                                                                            \
    }                                                                                                                  \
    static void dequantize_##NAME(const uint8_t *w, float *out, int n_cols) {                                          \
        dequantize_expanded(expand_##NAME, NAME##_BLOCK_SIZE, NAME##_BLOCK_BYTES, w, out, n_cols);                     \
    }

// clang-format off
#if defined(__AVX2__)
D_AT(Q4_0) D_AT(Q5_0) D_AT(Q8_0) D_AT(IQ4_NL) D_AT(Q3_K) D_AT(Q6_K) D_AT(IQ3_S)
SCALED_D_AT(IQ2_XXS, 0.125f) SCALED_D_AT(IQ2_XS, 0.125f) SCALED_D_AT(IQ2_S, 0.125f)
SCALED_D_AT(IQ3_XXS, 0.25f) SCALED_D_AT(IQ1_S, 0.125f)
D_AND_MIN_AT(Q4_1, 0.0f) D_AND_MIN_AT(Q5_1, 0.0f) D_AND_MIN_AT(Q2_K, -0.0f)
#endif
#if defined(__AVX512VNNI__)
D_16_AT(Q4_0) D_16_AT(IQ4_NL) D_AND_MIN_16_AT(Q4_1)
D_AND_MIN_IN_HEAD(Q4_K) D_AND_MIN_IN_HEAD(Q5_K) D_IN_HEAD(IQ4_XS)
#elif defined(__AVX2__)
D_AND_MIN_AT(Q4_K, -0.0f) D_AND_MIN_AT(Q5_K, -0.0f) D_AT(IQ4_XS)
#endif

FLOAT_FORMAT(F32)
FLOAT_FORMAT(F16)
FLOAT_FORMAT(BF16)
EXPANDED_FORMAT(TQ1_0)
EXPANDED_FORMAT(TQ2_0)
EXPANDED_FORMAT(NVFP4)
EXPANDED_FORMAT(Q1_0)
EXPANDED_FORMAT(Q2_0)
VECTOR_FORMAT(Q4_0, 0, .sub_block = 32, .largest = 15, .offset = 8, PER_LEVEL(.runs = runs_Q4_0, .order = BY_2, .d_16 = d_16_Q4_0))
VECTOR_FORMAT(Q4_1, 1, .sub_block = 32, .largest = 15, .min_d = min_d_Q4_1, PER_LEVEL(.runs = runs_Q4_1, .order = BY_2, .d_16 = d_16_Q4_1, .min_d_16 = min_d_16_Q4_1))
VECTOR_FORMAT(Q5_0, 0, .sub_block = 32, .largest = 31, .offset = 16, PER_LEVEL(.runs = runs_Q5_0, .order = BY_2))
VECTOR_FORMAT(Q5_1, 1, .sub_block = 32, .largest = 31, .min_d = min_d_Q5_1, PER_LEVEL(.runs = runs_Q5_1, .order = BY_2))
VECTOR_FORMAT(Q8_0, 0, .sub_block = 32, .is_signed = 1, .largest = 128, PER_LEVEL(.runs = runs_Q8_0, .order = BY_2))
VECTOR_FORMAT(IQ4_NL, 0, .sub_block = 32, .is_signed = 1, .largest = 127, PER_LEVEL(.runs = runs_IQ4_NL, .order = BY_2, .d_16 = d_16_IQ4_NL))
VECTOR_FORMAT(MXFP4, 0, .sub_block = 32, .largest = 24, .offset = 12, PER_LEVEL(.runs = runs_MXFP4, .order = BY_2, .d_16 = d_16_MXFP4))
VECTOR_FORMAT(Q2_K, 1, .sub_block = 16, .scales = scales_Q2_K, .largest = 3, .min_d = min_d_Q2_K, PER_LEVEL(.runs = NULL, .order = HALVES))
VECTOR_FORMAT(Q3_K, 0, .sub_block = 16, .scales = scales_Q3_K, .largest = 7, .offset = 4, PER_LEVEL(.runs = NULL, .order = HALVES))
VECTOR_FORMAT(Q4_K, 1, .sub_block = 32, .scales = scales_Q4_K, .largest = 15, .min_d = min_d_Q4_K, PER_LEVEL(.runs = NULL, .order = BY_4, .scales_4 = scales_4_of_q4_k, .second_shift = 4))
VECTOR_FORMAT(Q5_K, 1, .sub_block = 32, .scales = scales_Q5_K, .largest = 31, .min_d = min_d_Q5_K, PER_LEVEL(.runs = NULL, .order = BY_4, .scales_4 = scales_4_of_q4_k))
VECTOR_FORMAT(Q6_K, 0, .sub_block = 16, .scales = scales_Q6_K, .largest = 63, .offset = 32, PER_LEVEL(.runs = NULL, .order = IN_ORDER))
VECTOR_FORMAT(IQ4_XS, 0, .sub_block = 32, .scales = scales_IQ4_XS, .is_signed = 1, .largest = 127, PER_LEVEL(.runs = runs_IQ4_XS, .order = BY_2, .scales_4 = scales_4_of_iq4_xs))
GRID_FORMAT(IQ2_XXS, 1, .sub_block = 32, .largest = 43)
GRID_FORMAT(IQ2_XS, 1, .sub_block = 16, .largest = 43)
GRID_FORMAT(IQ2_S, 1, .sub_block = 16, .largest = 43)
GRID_FORMAT(IQ3_XXS, 1, .sub_block = 32, .largest = 62)
GRID_FORMAT(IQ3_S, 1, .sub_block = 32, .largest = 15)
GRID_FORMAT(IQ1_S, 0, .sub_block = 32, .largest = 18, .offset = 9)
GRID_FORMAT(IQ1_M, 0, .sub_block = 16, .largest = 18, .offset = 9)

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
