// Q4_K and Q5_K: 256 weights of 4 or 5 bits in sub-blocks of 32, with 6-bit scales and minimums.
#ifndef ENGINE_FORMATS_Q4_K_H
#define ENGINE_FORMATS_Q4_K_H

#include "../integer_block.h"

// Twelve bytes hold eight scales and eight minimums of 6 bits: bytes 0-3 and 4-7 the first four of each, with the high
// pairs of the last four on top; bytes 8-11 the low nibbles of the last four.
static inline void unpack_scales_q4_k(const uint8_t *packed, integer_block *out) {
    for (int s = 0; s < 4; s++) {
        set_sub_blocks(out->scale, s, 32, packed[s] & 63);
        set_sub_blocks(out->min, s, 32, packed[s + 4] & 63);
        set_sub_blocks(out->scale, s + 4, 32, (packed[s + 8] & 15) | packed[s] >> 6 << 4);
        set_sub_blocks(out->min, s + 4, 32, packed[s + 8] >> 4 | packed[s + 4] >> 6 << 4);
    }
}

// Each 32 bytes of nibbles hold 64 weights: low halves, then high halves.
static inline void unpack_Q4_K(const void *block, integer_block *out) {
    const block_Q4_K *b = block;
    for (int i = 0; i < 256; i++)
        out->q[i] = (int8_t)(b->qs[i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15);
    unpack_scales_q4_k(b->scales, out);
    out->d = f16_to_f32(b->d);
    out->min_d = -f16_to_f32(b->dmin);
}

static inline void unpack_Q5_K(const void *block, integer_block *out) {
    const block_Q5_K *b = block;
    for (int i = 0; i < 256; i++) {
        const int high = b->qh[i % 32] >> (i / 32) & 1;
        out->q[i] = (int8_t)((b->qs[i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15) | high << 4);
    }
    unpack_scales_q4_k(b->scales, out);
    out->d = f16_to_f32(b->d);
    out->min_d = -f16_to_f32(b->dmin);
}

#endif
