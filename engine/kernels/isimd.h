// Integer vectors of 256 bits for the weight kernels: exact sums of 8-bit products.
//
// The AVX-512 level keeps this width for single tokens, where memory is the limit, and gains VNNI's fused dot products;
// its batches use full registers (tile.h). Integer sums are exact, so lanes and instructions never show in the result.
#ifndef ENGINE_ISIMD_H
#define ENGINE_ISIMD_H

#if defined(__AVX2__)
#include <immintrin.h>
#include <stdint.h>

static inline __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }
static inline __m128i load_128(const void *p) { return _mm_loadu_si128(p); }
static inline __m256i load_128_twice(const void *p) { return _mm256_broadcastsi128_si256(load_128(p)); }

// acc[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1], int16 to int32.
static inline __m256i add_dot_i16(__m256i acc, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__)
    return _mm256_dpwssd_epi32(acc, a, b);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}

// Sums of two neighbouring products to int16: exact while 2 * 127 * max(u) fits, that is u <= 129.
static inline __m256i dot_pairs_u8(__m256i u, __m256i s) { return _mm256_maddubs_epi16(u, s); }

// Sums of four neighbouring products to int32, with u <= 129.
static inline __m256i dot_fours_u8(__m256i u, __m256i s) {
#if defined(__AVX512VNNI__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), u, s);
#else
    return _mm256_madd_epi16(dot_pairs_u8(u, s), _mm256_set1_epi16(1));
#endif
}

// Four vectors to one: lane r is the sum of the eight lanes of a_r.
static inline __m128i sum_lanes_of_4(__m256i a0, __m256i a1, __m256i a2, __m256i a3) {
    const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a0, a1), _mm256_hadd_epi32(a2, a3));
    return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

// The half float at `offset` of each of four blocks.
static inline __m128 halves_of_4(const uint8_t *const w[4], int offset) {
    uint16_t h[4];
    for (int r = 0; r < 4; r++)
        __builtin_memcpy(h + r, w[r] + offset, 2);
    return _mm_cvtph_ps(_mm_setr_epi16((short)h[0], (short)h[1], (short)h[2], (short)h[3], 0, 0, 0, 0));
}

// The value of a row's pair of sub-blocks (int16 scales of 16 weights) spread over the products of 32 weights.
static inline __m256i spread_scales(__m256i scales, int pair) {
    const __m256i half = _mm256_permute4x64_epi64(scales, pair < 4 ? 0x44 : 0xee);
    const int low = (pair % 4 * 4 + 1) * 256 + pair % 4 * 4, high = low + 0x0202;
    return _mm256_shuffle_epi8(half, _mm256_setr_m128i(_mm_set1_epi16((short)low), _mm_set1_epi16((short)high)));
}

// Eight bytes, each twice, as sixteen int16: scales of sub-blocks of 32 to those of 16.
static inline __m256i twice_each_i16(__m128i bytes) { return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(bytes, bytes)); }

#endif
#endif
