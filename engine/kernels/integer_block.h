// One block of integer weights taken apart: what every integer format is, once its bits are unpacked.
//
// weight i = d * scale[i / 16] * q[i] + min_d * min[i / 16]
//
// with `min_d` and `min` unused by formats without minimum. Formats whose sub-blocks are longer than 16 repeat the
// scale.
#ifndef ENGINE_INTEGER_BLOCK_H
#define ENGINE_INTEGER_BLOCK_H

#include "blocks.h"
#include "fp.h"

#include <stdint.h>

typedef struct {
    _Alignas(64) int8_t q[256];
    _Alignas(32) int16_t scale[16];
    _Alignas(32) int16_t min[16];
    float d, min_d;
} integer_block;

// Sets the scale (or minimum) of sub-blocks that are `length` weights long.
static inline void set_sub_blocks(int16_t *values, int index, int length, int value) {
    for (int i = 0; i < length / 16; i++)
        values[index * (length / 16) + i] = (int16_t)value;
}

#endif
