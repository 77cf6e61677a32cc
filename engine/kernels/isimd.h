// Integer vectors of 256 bits for the weight kernels: exact sums of 8-bit products. Integer sums are exact, so lanes
// and instructions never show in the result.
#ifndef ENGINE_ISIMD_H
#define ENGINE_ISIMD_H

#if defined(__AVX2__)
#include <immintrin.h>
#include <stdint.h>

static inline __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }
static inline __m128i load_128(const void *p) { return _mm_loadu_si128(p); }
static inline __m256i load_128_twice(const void *p) { return _mm256_broadcastsi128_si256(load_128(p)); }

// Two runs of 32 weights side by side: the first sixteen of each, and the last sixteen of each.
typedef struct {
    __m256i low, high;
} two_runs;

static inline __m256i load_two_128(const void *first, const void *second) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(first)), load_128(second), 1);
}

// The nibbles of two times 16 bytes.
static inline two_runs nibbles_of_runs(__m256i packed) {
    const __m256i mask = _mm256_set1_epi8(15);
    return (two_runs){_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask)};
}

// Nibbles of 16 bytes: low halves first.
static inline __m256i nibbles_32(const uint8_t *packed) {
    const __m256i shifted = _mm256_srlv_epi64(load_128_twice(packed), _mm256_setr_epi64x(0, 0, 4, 4));
    return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
}

// All ones in each byte whose bit is set.
static inline __m256i bytes_of_bits(uint32_t bits) {
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte_of);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
}

static inline int32_t load_i32(const void *p) {
    int32_t value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

static inline uint64_t load_u64(const void *p) {
    uint64_t value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

// Eight small int32, one a sub-block of 32, as int16, all in each half.
static inline __m256i scales_from_i32(__m256i scales) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(scales, scales), 0x88);
}

// 2 * scale + 1, in lanes of 16 bits.
static inline __m256i odd_scales(__m256i scales) {
    return _mm256_add_epi16(_mm256_add_epi16(scales, scales), _mm256_set1_epi16(1));
}

// Sums of two neighbouring products to int16: exact while 2 * 127 * max(u) fits, that is u <= 129.
static inline __m256i dot_pairs_u8(__m256i u, __m256i s) { return _mm256_maddubs_epi16(u, s); }

// Four vectors to one: lane r is the sum of the eight lanes of a_r. Blends run on more ports than shuffles, so each
// step gathers by blending and needs one shuffle.
static inline __m128i sum_lanes_of_4(__m256i a0, __m256i a1, __m256i a2, __m256i a3) {
    const __m256i even_01 = _mm256_blend_epi32(a0, a1, 0xaa), odd_01 = _mm256_blend_epi32(a1, a0, 0xaa);
    const __m256i even_23 = _mm256_blend_epi32(a2, a3, 0xaa), odd_23 = _mm256_blend_epi32(a3, a2, 0xaa);
    const __m256i s01 = _mm256_add_epi32(even_01, _mm256_shuffle_epi32(odd_01, 0xb1));
    const __m256i s23 = _mm256_add_epi32(even_23, _mm256_shuffle_epi32(odd_23, 0xb1));
    const __m256i low = _mm256_blend_epi32(s01, s23, 0xcc), high = _mm256_blend_epi32(s23, s01, 0xcc);
    const __m256i sums = _mm256_add_epi32(low, _mm256_shuffle_epi32(high, 0x4e));
    return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

// The same for the halves of four vectors: lane r of a half is the sum of that half of a_r.
static inline __m256i sum_halves_of_4(__m256i a0, __m256i a1, __m256i a2, __m256i a3) {
    const __m256i s01 = _mm256_add_epi32(_mm256_blend_epi32(a0, a1, 0xaa),
                                         _mm256_shuffle_epi32(_mm256_blend_epi32(a1, a0, 0xaa), 0xb1));
    const __m256i s23 = _mm256_add_epi32(_mm256_blend_epi32(a2, a3, 0xaa),
                                         _mm256_shuffle_epi32(_mm256_blend_epi32(a3, a2, 0xaa), 0xb1));
    return _mm256_add_epi32(_mm256_blend_epi32(s01, s23, 0xcc),
                            _mm256_shuffle_epi32(_mm256_blend_epi32(s23, s01, 0xcc), 0x4e));
}

// The same for vectors of four lanes.
static inline __m128i sum_lanes_of_4_halves(__m128i a0, __m128i a1, __m128i a2, __m128i a3) {
    const __m128i s01 =
        _mm_add_epi32(_mm_blend_epi32(a0, a1, 0xa), _mm_shuffle_epi32(_mm_blend_epi32(a1, a0, 0xa), 0xb1));
    const __m128i s23 =
        _mm_add_epi32(_mm_blend_epi32(a2, a3, 0xa), _mm_shuffle_epi32(_mm_blend_epi32(a3, a2, 0xa), 0xb1));
    return _mm_add_epi32(_mm_blend_epi32(s01, s23, 0xc), _mm_shuffle_epi32(_mm_blend_epi32(s23, s01, 0xc), 0x4e));
}

// The half float at `offset` of each of four blocks, put together by the scalar units.
static inline __m128 halves_of_4(const uint8_t *const w[4], int offset) {
    uint64_t halves = 0;
    for (int r = 0; r < 4; r++) {
        uint16_t half;
        __builtin_memcpy(&half, w[r] + offset, 2);
        halves |= (uint64_t)half << 16 * r;
    }
    return _mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)halves));
}

// The two half floats at `offset` of each of four blocks, as they lie, one pair a lane; and the lower or upper ones.
static inline __m128i pairs_of_4(const uint8_t *const w[4], int offset) {
    const __m128i a = _mm_insert_epi32(_mm_cvtsi32_si128(load_i32(w[0] + offset)), load_i32(w[1] + offset), 1);
    return _mm_insert_epi32(_mm_insert_epi32(a, load_i32(w[2] + offset), 2), load_i32(w[3] + offset), 3);
}
static inline __m128 lower_of_pairs(__m128i pairs) {
    const __m128i lower = _mm_blend_epi16(pairs, _mm_setzero_si128(), 0xaa);
    return _mm_cvtph_ps(_mm_packus_epi32(lower, lower));
}
static inline __m128 upper_of_pairs(__m128i pairs) {
    const __m128i upper = _mm_srli_epi32(pairs, 16);
    return _mm_cvtph_ps(_mm_packus_epi32(upper, upper));
}

// Two int16 scales spread over the products of a chunk of 32 weights: the first over the lower half. `scales` holds the
// eight scales of this half of the block in each of its halves.
static inline __m256i spread_two_scales(__m256i scales, int first) {
    const int low = (2 * first + 1) * 256 + 2 * first, high = low + 0x0202;
    return _mm256_shuffle_epi8(scales, _mm256_setr_m128i(_mm_set1_epi16((short)low), _mm_set1_epi16((short)high)));
}

// One int16 scale spread over all products.
static inline __m256i spread_scale(__m256i scales, int index) {
    return _mm256_shuffle_epi8(scales, _mm256_set1_epi16((short)((2 * index + 1) * 256 + 2 * index)));
}

static inline __m256i low_half_twice(__m256i a) { return _mm256_permute2x128_si256(a, a, 0x00); }
static inline __m256i high_half_twice(__m256i a) { return _mm256_permute2x128_si256(a, a, 0x11); }

#endif
#endif
