// Integer vectors of 512 bits for products with one token (decode512.h): 64 weights in a register.
#ifndef ENGINE_ISIMD512_H
#define ENGINE_ISIMD512_H

#include "isimd.h"

#if defined(__AVX512VNNI__)

// Which of sixteen groups of 16 weights stands in each 128-bit lane of four registers: a format's packing decides which
// order is easiest, and the activations follow it.
typedef enum {
    IN_ORDER, // 0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15
    BY_2,     // 0 2 4 6 | 1 3 5 7 | 8 10 12 14 | 9 11 13 15
    BY_4,     // 0 4 8 12 | 1 5 9 13 | 2 6 10 14 | 3 7 11 15
    HALVES,   // 0 1 8 9 | 2 3 10 11 | 4 5 12 13 | 6 7 14 15
    COLUMNS,  // 8 of each 32 weights in each register, see points512.h
} group_order;

static inline int group_at(group_order order, int i, int lane) {
    switch (order) {
    case IN_ORDER:
        return 4 * i + lane;
    case BY_2:
        return i / 2 * 8 + lane * 2 + i % 2;
    case BY_4:
        return lane * 4 + i;
    default:
        return lane / 2 * 8 + i * 2 + lane % 2;
    }
}

// 256 weights as unsigned bytes: too large by the format's offset, or magnitudes, negative where a bit of `minus` is
// set.
typedef struct {
    __m512i u[4];
    __mmask64 minus[4];
} weights_256;

// Scales of eight sub-blocks of 32 of four rows, as int32: lane r of the l-th 128 bits is of row r, and of the
// sub-block whose weights stand in the l-th 128 bits of registers 0 and 1, or 2 and 3. The minimums of both are side by
// side, as int16.
typedef struct {
    __m512i scales[2], mins;
} scales_of_4;

static inline __m512i load_512(const void *p) { return _mm512_loadu_si512(p); }
static inline __m512i join_256(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
static inline __m512i load_two_256(const void *low, const void *high) {
    return join_256(load_256(low), load_256(high));
}
static inline __m512i load_256_twice(const void *p) { return _mm512_broadcast_i64x4(load_256(p)); }
static inline __m512i four_times(__m128i a) { return _mm512_broadcast_i32x4(a); }

// One number in each 128 bits.
static inline __m512i each_128(int a, int b, int c, int d) {
    return _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
}

// Sixteen bytes from each of four places that stand `stride` apart, at least 16. Blending runs on more ports than
// insertion does.
static inline __m512i load_four_128(const uint8_t *p, int stride) {
    const uint8_t *third = p + 2 * stride;
    return join_256(_mm256_blend_epi32(load_256(p), load_256(p + stride - 16), 0xf0),
                    _mm256_blend_epi32(load_256(third), load_256(third + stride - 16), 0xf0));
}

// The first sixteen bytes of four blocks.
static inline __m512i heads_of_4(const uint8_t *const blocks[4]) {
    return join_256(load_two_128(blocks[0], blocks[1]), load_two_128(blocks[2], blocks[3]));
}

// The half floats at the beginning of four heads and, in the upper lanes, those behind them.
static inline __m256 halves_of_heads(__m512i heads) {
    const __m512i places = _mm512_castsi128_si512(_mm_setr_epi16(0, 8, 16, 24, 1, 9, 17, 25));
    return _mm256_cvtph_ps(_mm512_castsi512_si128(_mm512_permutexvar_epi16(places, heads)));
}

#if defined(__GFNI__)
// A matrix of bits that puts bit `from` of a byte in the place of bit `to`; an OR of several moves several. Products
// with such matrices run where no shuffles and shifts do.
#define BIT_TO(to, from) ((int64_t)((uint64_t)1 << (8 * (7 - (to)) + (from))))
static inline __m512i move_bits(__m512i bytes, int64_t matrix) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(matrix), 0);
}
#endif

// Keeps the compiler from loading a vector once for each use of it.
#define KEEP_IN_REGISTER_512(vector) __asm__("" : "+v"(vector))

// Keeps the compiler from computing several pointers in a vector, from which shuffles would have to take them.
#define KEEP_SCALAR(pointer) __asm__("" : "+r"(pointer))

// Keeps the compiler from loading a mask anew wherever it is used, which takes a shuffle's place.
#define KEEP_IN_MASK(mask) __asm__("" : "+k"(mask))

static inline __m512i high_nibbles(__m512i packed) {
#if defined(__GFNI__)
    return move_bits(packed, BIT_TO(0, 4) | BIT_TO(1, 5) | BIT_TO(2, 6) | BIT_TO(3, 7));
#else
    return _mm512_and_si512(_mm512_srli_epi16(packed, 4), _mm512_set1_epi8(15));
#endif
}

// Nibbles of 64 bytes: the low ones to u[0], the high ones to u[1].
static inline void set_nibbles(__m512i *u, __m512i packed) {
    KEEP_IN_REGISTER_512(packed);
    u[0] = _mm512_and_si512(packed, _mm512_set1_epi8(15));
    u[1] = high_nibbles(packed);
}

// The half floats at `at` of four blocks of four rows: a block in each 128 bits, a row in each lane. Blocks stand
// `stride` apart, at most 20, so that one load reaches those of a row.
static inline __m512 halves_of_16(const uint8_t *const blocks[4], int at, int stride) {
    const __m256i lanes = _mm256_setr_epi16(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i places = _mm512_castsi256_si512(_mm256_mullo_epi16(lanes, _mm256_set1_epi16((short)(stride / 2))));
    __m512i words = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        __mmask32 row = 0x1111 << r;
        KEEP_IN_MASK(row);
        words = _mm512_mask_permutexvar_epi16(words, row, places, load_512(blocks[r] + at));
    }
    return _mm512_cvtph_ps(_mm512_castsi512_si256(words));
}

// a, with the bits of b that are in `mask`.
static inline __m512i with_bits(__m512i a, __m512i b, int mask) {
    return _mm512_or_si512(a, _mm512_and_si512(b, _mm512_set1_epi8((char)mask)));
}

// Four vectors to one: lane r of each 128 bits is the sum of the four lanes of a_r there.
static inline __m512i sum_fours_of_4(const __m512i a[4]) {
    const __m512i s01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i s23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
}

// The same for lanes so small that a lane, and the sum of two, fit in an int16.
static inline __m512i sum_small_fours_of_4(const __m512i a[4]) {
    __m512i ones = _mm512_set1_epi16(1);
    KEEP_IN_REGISTER_512(ones);
    const __m512i s01 = _mm512_madd_epi16(_mm512_packs_epi32(a[0], a[1]), ones);
    const __m512i s23 = _mm512_madd_epi16(_mm512_packs_epi32(a[2], a[3]), ones);
    return _mm512_madd_epi16(_mm512_packs_epi32(s01, s23), ones);
}

// Adds the four lanes of 128 bits.
static inline __m128i sum_lanes_128(__m512i a) {
    const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// Where the scales of groups of 16 stand, for the int16 sums of four products of registers 2p (in the lower halves of
// 128 bits) and 2p + 1 (in the upper).
static inline __m512i places_of_scales(group_order order, int p) {
#define PLACE(i, lane) (0x0001000100010001 * group_at(order, 2 * p + (i), lane))
    return _mm512_setr_epi64(PLACE(0, 0), PLACE(1, 0), PLACE(0, 1), PLACE(1, 1), PLACE(0, 2), PLACE(1, 2), PLACE(0, 3),
                             PLACE(1, 3));
#undef PLACE
}

#endif
#endif
