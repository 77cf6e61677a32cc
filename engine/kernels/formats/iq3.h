// IQ3_XXS and IQ3_S: grid points of four magnitudes with signs; weight = d (or d / 4) * (2 scale + 1) * magnitude.
#ifndef ENGINE_FORMATS_IQ3_H
#define ENGINE_FORMATS_IQ3_H

#include "iq2.h"

static inline void unpack_IQ3_XXS(const void *block, integer_block *out) {
    const block_IQ3_XXS *b = block;
    for (int s = 0; s < 8; s++) {
        const uint32_t a = b->signs_scale[s];
        for (int o = 0; o < 4; o++) {
            const unsigned signs = signs_of_7_bits(a >> 7 * o & 127);
            int8_t *q = out->q + 32 * s + 8 * o;
            set_signed(q, engine_grid_iq3_xxs[b->qs[8 * s + 2 * o]], signs, 4);
            set_signed(q + 4, engine_grid_iq3_xxs[b->qs[8 * s + 2 * o + 1]], signs >> 4, 4);
        }
        set_sub_blocks(out->scale, s, 32, 2 * (int)(a >> 28) + 1);
    }
    out->d = f16_to_f32(b->d) * 0.25f;
}

static inline void unpack_IQ3_S(const void *block, integer_block *out) {
    const block_IQ3_S *b = block;
    for (int i = 0; i < 64; i++) {
        const int index = b->qs[i] | (b->qh[i / 8] >> (i % 8) & 1) << 8;
        set_signed(out->q + 4 * i, engine_grid_iq3_s[index], (unsigned)b->signs[i / 2] >> 4 * (i % 2), 4);
    }
    for (int s = 0; s < 8; s++)
        set_sub_blocks(out->scale, s, 32, 2 * (b->scales[s / 2] >> 4 * (s % 2) & 15) + 1);
    out->d = f16_to_f32(b->d);
}

#endif
