// Q8_0: 32 weights of 8 bits with one scale.
#ifndef ENGINE_FORMATS_Q8_0_H
#define ENGINE_FORMATS_Q8_0_H

#include "../integer_block.h"
#include "../isimd512.h"

#include <string.h>

static inline void unpack_Q8_0(const void *block, integer_block *out) {
    const block_Q8_0 *b = block;
    memcpy(out->q, b->qs, sizeof b->qs);
    set_sub_blocks(out->scale, 0, 32, 1);
    out->d = f16_to_f32(b->d);
}

#if defined(__AVX2__)
static inline __m256i chunk_Q8_0(const void *block, int k) {
    (void)k;
    return load_256(((const block_Q8_0 *)block)->qs);
}

static inline two_runs runs_Q8_0(const uint8_t *first, const uint8_t *second, int index) {
    const block_Q8_0 *a = (const block_Q8_0 *)first, *b = (const block_Q8_0 *)second;
    (void)index;
    return (two_runs){load_two_128(a->qs, b->qs), load_two_128(a->qs + 16, b->qs + 16)};
}
#endif

#if defined(__AVX512VNNI__)
static inline weights_256 wide_Q8_0(const uint8_t *blocks) {
    const block_Q8_0 *b = (const void *)blocks;
    const __m512i offset = _mm512_set1_epi8((char)128);
    weights_256 w;
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
        const __m512i first = load_two_256(b[4 * p].qs, b[4 * p + 1].qs);
        const __m512i second = load_two_256(b[4 * p + 2].qs, b[4 * p + 3].qs);
        w.u[2 * p] = _mm512_xor_si512(_mm512_shuffle_i64x2(first, second, 0x88), offset);
        w.u[2 * p + 1] = _mm512_xor_si512(_mm512_shuffle_i64x2(first, second, 0xdd), offset);
    }
    return w;
}
#endif

#endif
