// IQ4_NL, IQ4_XS, MXFP4: nibbles that index a table of sixteen values.
#ifndef ENGINE_FORMATS_IQ4_H
#define ENGINE_FORMATS_IQ4_H

#include "../integer_block.h"

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; // twice E2M1

static inline void unpack_table_32(const uint8_t *qs, const int8_t *table, int8_t *q) {
    for (int i = 0; i < 16; i++) {
        q[i] = table[qs[i] & 15];
        q[i + 16] = table[qs[i] >> 4];
    }
}

// 2^(e - 128), exact: the two smallest are subnormal.
static inline float mxfp4_scale(uint8_t e) {
    return float_of_bits(e < 2 ? (uint32_t)0x200000 << e : (uint32_t)(e - 1) << 23);
}

static inline void unpack_IQ4_NL(const void *block, integer_block *out) {
    const block_IQ4_NL *b = block;
    unpack_table_32(b->qs, iq4_values, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    out->d = f16_to_f32(b->d);
}

static inline void unpack_MXFP4(const void *block, integer_block *out) {
    const block_MXFP4 *b = block;
    unpack_table_32(b->qs, mxfp4_values, out->q);
    set_sub_blocks(out->scale, 0, 32, 1);
    out->d = mxfp4_scale(b->e);
}

static inline void unpack_IQ4_XS(const void *block, integer_block *out) {
    const block_IQ4_XS *b = block;
    for (int s = 0; s < 8; s++) {
        const int scale = (b->scales_l[s / 2] >> 4 * (s % 2) & 15) | (b->scales_h >> 2 * s & 3) << 4;
        unpack_table_32(b->qs + 16 * s, iq4_values, out->q + 32 * s);
        set_sub_blocks(out->scale, s, 32, scale - 32);
    }
    out->d = f16_to_f32(b->d);
}

#endif
