// IQ1_S and IQ1_M: grid points of eight values in {-1, 0, 1}, shifted by an eighth; weight = d / 8 * (2 scale + 1) *
// (8 g + 1 or 8 g - 1).
#ifndef ENGINE_FORMATS_IQ1_H
#define ENGINE_FORMATS_IQ1_H

#include "../grids.h"
#include "../integer_block.h"

static inline void set_shifted_iq1(int8_t *q, int index, int shift) {
    for (int i = 0; i < 8; i++)
        q[i] = (int8_t)(8 * engine_grid_iq1[index][i] + shift);
}

static inline void unpack_IQ1_S(const void *block, integer_block *out) {
    const block_IQ1_S *b = block;
    for (int s = 0; s < 8; s++) {
        const int h = b->qh[s];
        for (int o = 0; o < 4; o++)
            set_shifted_iq1(out->q + 32 * s + 8 * o, b->qs[4 * s + o] | (h >> 3 * o & 7) << 8, h & 0x8000 ? -1 : 1);
        set_sub_blocks(out->scale, s, 32, 2 * (h >> 12 & 7) + 1);
    }
    out->d = f16_to_f32(b->d) * 0.125f;
}

// The half-float scale is spread over the top nibbles of the four scale words.
static inline void unpack_IQ1_M(const void *block, integer_block *out) {
    const block_IQ1_M *b = block;
    for (int o = 0; o < 32; o++) {
        const int h = b->qh[o / 2] >> 4 * (o % 2);
        set_shifted_iq1(out->q + 8 * o, b->qs[o] | (h & 7) << 8, h & 8 ? -1 : 1);
    }
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)(2 * (b->scales[u / 4] >> 3 * (u % 4) & 7) + 1);
    const int d = b->scales[0] >> 12 | b->scales[1] >> 12 << 4 | b->scales[2] >> 12 << 8 | b->scales[3] >> 12 << 12;
    out->d = f16_to_f32((uint16_t)d) * 0.125f;
}

#endif
