// Q6_K: 256 weights of 6 bits in sub-blocks of 16, with 8-bit scales.
#ifndef ENGINE_FORMATS_Q6_K_H
#define ENGINE_FORMATS_Q6_K_H

#include "../integer_block.h"
#include "../isimd512.h"

// Half h of the block: 64 bytes of low nibbles (bytes 0-63 low halves: weights 0-63; high halves: 64-127) and 32 bytes
// of high bit pairs (pair j: weights 32 j + 0..31).
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

#if defined(__AVX2__)
static inline __m256i chunk_Q6_K(const void *block, int k) {
    const block_Q6_K *b = block;
    const int half = k / 4, j = k % 4;
    const __m256i packed = load_256(b->ql + 64 * half + 32 * (j % 2));
    const __m256i low = _mm256_and_si256(j / 2 ? _mm256_srli_epi16(packed, 4) : packed, _mm256_set1_epi8(15));
    const __m256i pairs = _mm256_and_si256(load_256(b->qh + 32 * half), _mm256_set1_epi8((char)(3 << 2 * j)));
    return _mm256_or_si256(low, j < 3 ? _mm256_slli_epi16(pairs, 4 - 2 * j) : _mm256_srli_epi16(pairs, 2));
}

static inline __m256i scales_Q6_K(const void *block, __m256i *mins) {
    (void)mins;
    return _mm256_cvtepi8_epi16(load_128(((const block_Q6_K *)block)->scales));
}
#endif

#if defined(__AVX512VNNI__)
static inline weights_256 wide_Q6_K(const uint8_t *block) {
    const block_Q6_K *b = (const void *)block;
    weights_256 w;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        // pairs 0 and 1, and four bits further 2 and 3
        const __m512i pairs =
            _mm512_srlv_epi64(load_256_twice(b->qh + 32 * half), _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2));
        __m512i *u = w.u + 2 * half;
        set_nibbles(u, load_512(b->ql + 64 * half));
        u[0] = with_bits(u[0], _mm512_slli_epi16(pairs, 4), 0x30);
        u[1] = with_bits(u[1], pairs, 0x30);
    }
    return w;
}
#endif

#endif
