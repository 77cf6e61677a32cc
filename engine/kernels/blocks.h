// The blocks that weight rows are made of, byte for byte as they stand in a GGUF file.
//
// Multi-byte fields are little-endian and may stand at any address (a row of odd-sized blocks aligns nothing), so every
// struct is packed and the compiler emits unaligned loads.
#ifndef ENGINE_BLOCKS_H
#define ENGINE_BLOCKS_H

#include "table.h"

#include <assert.h>
#include <stdint.h>

// X(NAME, ggml type, weights in a block, bytes of a block, activation form): the same table as quants/formats.py.
#define EACH_FORMAT(X)                                                                                                 \
    X(F32, 0, 1, 4, F32)                                                                                               \
    X(F16, 1, 1, 2, F32)                                                                                               \
    X(Q4_0, 2, 32, 18, Q8_32)                                                                                          \
    X(Q4_1, 3, 32, 20, Q8_32)                                                                                          \
    X(Q5_0, 6, 32, 22, Q8_32)                                                                                          \
    X(Q5_1, 7, 32, 24, Q8_32)                                                                                          \
    X(Q8_0, 8, 32, 34, Q8_32)                                                                                          \
    X(Q2_K, 10, 256, 84, Q8_256)                                                                                       \
    X(Q3_K, 11, 256, 110, Q8_256)                                                                                      \
    X(Q4_K, 12, 256, 144, Q8_256)                                                                                      \
    X(Q5_K, 13, 256, 176, Q8_256)                                                                                      \
    X(Q6_K, 14, 256, 210, Q8_256)                                                                                      \
    X(IQ2_XXS, 16, 256, 66, Q8_256)                                                                                    \
    X(IQ2_XS, 17, 256, 74, Q8_256)                                                                                     \
    X(IQ3_XXS, 18, 256, 98, Q8_256)                                                                                    \
    X(IQ1_S, 19, 256, 50, Q8_256)                                                                                      \
    X(IQ4_NL, 20, 32, 18, Q8_32)                                                                                       \
    X(IQ3_S, 21, 256, 110, Q8_256)                                                                                     \
    X(IQ2_S, 22, 256, 82, Q8_256)                                                                                      \
    X(IQ4_XS, 23, 256, 136, Q8_256)                                                                                    \
    X(IQ1_M, 29, 256, 56, Q8_256)                                                                                      \
    X(BF16, 30, 1, 2, F32)                                                                                             \
    X(TQ1_0, 34, 256, 54, F32)                                                                                         \
    X(TQ2_0, 35, 256, 66, F32)                                                                                         \
    X(MXFP4, 39, 32, 17, Q8_32)                                                                                        \
    X(NVFP4, 40, 64, 36, F32)                                                                                          \
    X(Q1_0, 41, 128, 18, F32)                                                                                          \
    X(Q2_0, 42, 64, 18, F32)

#define BLOCK_ENUM(NAME, TYPE, SIZE, BYTES, ACTIVATION)                                                                \
    NAME##_BLOCK_SIZE = SIZE, NAME##_BLOCK_BYTES = BYTES, NAME##_ACTIVATION = ACTIVATION_##ACTIVATION,
enum { EACH_FORMAT(BLOCK_ENUM) };
#undef BLOCK_ENUM

// `d`, `dmin` and `m` are half floats. A nibble byte i holds weight i in its low and weight i + 16 in its high half
// unless the format's unpack function says otherwise.
#define BLOCK(NAME, ...)                                                                                               \
    typedef struct __attribute__((packed)) {                                                                           \
        __VA_ARGS__                                                                                                    \
    } block_##NAME;                                                                                                    \
    static_assert(sizeof(block_##NAME) == NAME##_BLOCK_BYTES, #NAME)

BLOCK(F32, float value;);
BLOCK(F16, uint16_t value;);
BLOCK(BF16, uint16_t value;);
BLOCK(Q4_0, uint16_t d; uint8_t qs[16];);
BLOCK(Q4_1, uint16_t d, m; uint8_t qs[16];);
BLOCK(Q5_0, uint16_t d; uint32_t qh; uint8_t qs[16];);
BLOCK(Q5_1, uint16_t d, m; uint32_t qh; uint8_t qs[16];);
BLOCK(Q8_0, uint16_t d; int8_t qs[32];);
BLOCK(IQ4_NL, uint16_t d; uint8_t qs[16];);
BLOCK(MXFP4, uint8_t e; uint8_t qs[16];);
BLOCK(NVFP4, uint8_t scales[4]; uint8_t qs[32];);
BLOCK(Q2_K, uint8_t scales[16]; uint8_t qs[64]; uint16_t d, dmin;);
BLOCK(Q3_K, uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; uint16_t d;);
BLOCK(Q4_K, uint16_t d, dmin; uint8_t scales[12]; uint8_t qs[128];);
BLOCK(Q5_K, uint16_t d, dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128];);
BLOCK(Q6_K, uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; uint16_t d;);
BLOCK(IQ4_XS, uint16_t d, scales_h; uint8_t scales_l[4]; uint8_t qs[128];);
BLOCK(
    IQ2_XXS, uint16_t d; struct __attribute__((packed)) {
        uint8_t index[4];
        uint32_t signs_scale;
    } group[8];);
BLOCK(IQ2_XS, uint16_t d; uint16_t qs[32]; uint8_t scales[8];);
BLOCK(IQ2_S, uint16_t d; uint8_t qs[32]; uint8_t signs[32]; uint8_t qh[8]; uint8_t scales[8];);
BLOCK(IQ3_XXS, uint16_t d; uint8_t qs[64]; uint32_t signs_scale[8];);
BLOCK(IQ3_S, uint16_t d; uint8_t qs[64]; uint8_t qh[8]; uint8_t signs[32]; uint8_t scales[4];);
BLOCK(IQ1_S, uint16_t d; uint8_t qs[32]; uint16_t qh[8];);
BLOCK(IQ1_M, uint8_t qs[32]; uint8_t qh[16]; uint16_t scales[4];);
BLOCK(TQ1_0, uint8_t qs[48]; uint8_t qh[4]; uint16_t d;);
BLOCK(TQ2_0, uint8_t qs[64]; uint16_t d;);
BLOCK(Q1_0, uint16_t d; uint8_t qs[16];);
BLOCK(Q2_0, uint16_t d; uint8_t qs[16];);
#undef BLOCK

#endif
