// Q2_K and Q3_K: 256 weights of 2 or 3 bits in sub-blocks of 16.
#ifndef ENGINE_FORMATS_Q2_K_H
#define ENGINE_FORMATS_Q2_K_H

#include "../integer_block.h"

// The 2-bit part of both: half h of the block is 32 bytes, whose bit pairs j hold weights 128 h + 32 j + 0..31.
static inline int two_bits_of(const uint8_t *qs, int i) { return qs[i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3; }

static inline void unpack_Q2_K(const void *block, integer_block *out) {
    const block_Q2_K *b = block;
    for (int i = 0; i < 256; i++)
        out->q[i] = (int8_t)two_bits_of(b->qs, i);
    for (int u = 0; u < 16; u++) {
        out->scale[u] = b->scales[u] & 15;
        out->min[u] = b->scales[u] >> 4;
    }
    out->d = f16_to_f32(b->d);
    out->min_d = -f16_to_f32(b->dmin);
}

// Scales are 6 bits: low nibbles in bytes 0-7, high pairs in bytes 8-11.
static inline int q3_k_scale(const uint8_t *scales, int u) {
    const int low = u < 8 ? scales[u] & 15 : scales[u - 8] >> 4;
    return (low | (scales[8 + u % 4] >> 2 * (u / 4) & 3) << 4) - 32;
}

static inline void unpack_Q3_K(const void *block, integer_block *out) {
    const block_Q3_K *b = block;
    for (int i = 0; i < 256; i++) {
        const int high = b->hmask[i % 32] >> (i / 32) & 1; // a set bit means that 4 is not taken off
        out->q[i] = (int8_t)(two_bits_of(b->qs, i) - (high ? 0 : 4));
    }
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)q3_k_scale(b->scales, u);
    out->d = f16_to_f32(b->d);
}

#endif
