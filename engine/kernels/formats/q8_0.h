// Q8_0: 32 weights of 8 bits with one scale.
#ifndef ENGINE_FORMATS_Q8_0_H
#define ENGINE_FORMATS_Q8_0_H

#include "../integer_block.h"
#include "../isimd.h"

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
    const __m256i offset = _mm256_set1_epi8((char)SIGNED_OFFSET);
    (void)index;
    return (two_runs){_mm256_xor_si256(load_two_128(a->qs, b->qs), offset),
                      _mm256_xor_si256(load_two_128(a->qs + 16, b->qs + 16), offset)};
}
#endif

#endif
