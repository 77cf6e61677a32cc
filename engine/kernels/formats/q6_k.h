// Q6_K: 256 weights of 6 bits in sub-blocks of 16, with 8-bit scales.
#ifndef ENGINE_FORMATS_Q6_K_H
#define ENGINE_FORMATS_Q6_K_H

#include "../integer_block.h"

// Half h of the block: 64 bytes of low nibbles (bytes 0-63 low halves: weights 0-63; high halves: 64-127) and 32 bytes of
// high bit pairs (pair j: weights 32 j + 0..31).
static inline void unpack_Q6_K(const void *block, integer_block *out) {
    const block_Q6_K *b = block;
    for (int i = 0; i < 256; i++) {
        const int half = i / 128, j = i % 128 / 32;
        const int low = b->ql[64 * half + 32 * (j % 2) + i % 32] >> 4 * (j / 2) & 15;
        const int high = b->qh[32 * half + i % 32] >> 2 * j & 3;
        out->q[i] = (int8_t)((low | high << 4) - 32);
    }
    for (int u = 0; u < 16; u++)
        out->scale[u] = b->scales[u];
    out->d = f16_to_f32(b->d);
}

#endif
