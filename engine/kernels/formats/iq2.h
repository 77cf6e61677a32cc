// IQ2_XXS, IQ2_XS, IQ2_S: grid points of eight magnitudes with signs; weight = d / 8 * (2 scale + 1) * magnitude.
#ifndef ENGINE_FORMATS_IQ2_H
#define ENGINE_FORMATS_IQ2_H

#include "../grids.h"
#include "../integer_block.h"

// The eighth sign makes the number of minus signs even.
static inline unsigned signs_of_7_bits(unsigned index) { return index | (unsigned)__builtin_parity(index) << 7; }

// Copies n magnitudes, negative where bit i of `signs` is set.
static inline void set_signed(int8_t *q, const int8_t *magnitudes, unsigned signs, int n) {
    for (int i = 0; i < n; i++)
        q[i] = (int8_t)(signs >> i & 1 ? -magnitudes[i] : magnitudes[i]);
}

static inline void unpack_IQ2_XXS(const void *block, integer_block *out) {
    const block_IQ2_XXS *b = block;
    for (int s = 0; s < 8; s++) {
        const uint32_t a = b->group[s].signs_scale;
        for (int o = 0; o < 4; o++)
            set_signed(out->q + 32 * s + 8 * o, engine_grid_iq2_xxs[b->group[s].index[o]],
                       signs_of_7_bits(a >> 7 * o & 127), 8);
        set_sub_blocks(out->scale, s, 32, 2 * (int)(a >> 28) + 1);
    }
    out->d = f16_to_f32(b->d) * 0.125f;
}

static inline void unpack_IQ2_XS(const void *block, integer_block *out) {
    const block_IQ2_XS *b = block;
    for (int o = 0; o < 32; o++)
        set_signed(out->q + 8 * o, engine_grid_iq2_xs[b->qs[o] & 511], signs_of_7_bits(b->qs[o] >> 9), 8);
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)(2 * (b->scales[u / 2] >> 4 * (u % 2) & 15) + 1);
    out->d = f16_to_f32(b->d) * 0.125f;
}

static inline void unpack_IQ2_S(const void *block, integer_block *out) {
    const block_IQ2_S *b = block;
    for (int o = 0; o < 32; o++) {
        const int index = b->qs[o] | (b->qh[o / 4] >> 2 * (o % 4) & 3) << 8;
        set_signed(out->q + 8 * o, engine_grid_iq2_s[index], b->signs[o], 8);
    }
    for (int u = 0; u < 16; u++)
        out->scale[u] = (int16_t)(2 * (b->scales[u / 2] >> 4 * (u % 2) & 15) + 1);
    out->d = f16_to_f32(b->d) * 0.125f;
}

#endif
