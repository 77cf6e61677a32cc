// Weights from code books on AVX2, and for batches on AVX-512 without VBMI. The points of a 256-block are looked up 32
// weights at a time, and signs stay apart from magnitudes, so that a product can give them to the activations.
//
// Points are loaded one by one: with gathers a product takes nearly twice as long on Zen 3, and Intel's are slow, too,
// where microcode has to keep them from leaking. What there is too little of then are loads, so that indexes come
// several in a word, and instructions on vectors.
#ifndef ENGINE_POINTS256_H
#define ENGINE_POINTS256_H

#include "grids.h"
#include "isimd.h"
#include "matmul.h"

#if defined(__AVX2__) && !defined(__AVX512VBMI__)

// What has to be known of a 256-block before its points are looked up.
typedef struct {
    _Alignas(32) uint16_t indexes[64]; // unless they are bytes of the block
    union {
        _Alignas(32) uint64_t signs[2][4]; // of 32 weights and, above, the same a bit lower
        _Alignas(32) int8_t shifts[32];    // one for eight weights
    };
} block_points;

// A format's points, how many values they have (8 or 4), and where in a block the bytes are, if there are any, that
// index the first 32 weights; those of the next 32 are 8 bytes further on.
typedef struct {
    const void *grid;
    int n_values, first_byte;
} point_layout;

// Four 7-bit numbers below 4 bits of something else, in each of eight words: all in bytes of their own.
static inline __m256i bytes_of_7_bits(__m256i words) {
    const __m256i halves = _mm256_blend_epi16(words, _mm256_slli_epi32(words, 2), 0xaa); // two in the lowest 14 bits
    return _mm256_or_si256(_mm256_and_si256(halves, _mm256_set1_epi16(0x7f)),
                           _mm256_and_si256(_mm256_slli_epi16(halves, 1), _mm256_set1_epi16(0x7f00)));
}

// Eight signs from each 7 bits, whose parity is the eighth.
static inline __m256i bytes_with_parity(__m256i signs) {
    const __m256i parity = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
    const __m256i folded = _mm256_and_si256(_mm256_xor_si256(signs, _mm256_srli_epi16(signs, 4)), _mm256_set1_epi8(15));
    return _mm256_or_si256(signs, _mm256_shuffle_epi8(parity, folded));
}

// Sixteen indexes from their lower bytes and, in place, the bits above.
static inline void set_indexes(block_points *out, int first, const uint8_t *low, __m256i high) {
    _mm256_store_si256((void *)(out->indexes + first), _mm256_or_si256(_mm256_cvtepu8_epi16(load_128(low)), high));
}

typedef struct {
    size_t first, second;
} two_indexes;

// Works out a value where it is written.
#define KEEP_HERE(value) __asm__("" : "+r"(value))

// Two indexes off the lower end of a word, which may be its `last`. Left alone, the compiler copies the word for each
// shift, or loads it again.
ALWAYS_INLINE two_indexes next_two(uint64_t *word, int bits, int last) {
    two_indexes at;
    if (bits == 8) {
        __asm__("" : "+Q"(*word)); // one of the registers whose second byte has a name
        at = (two_indexes){(uint8_t)*word, (uint8_t)(*word >> 8)};
        KEEP_HERE(at.first);
        KEEP_HERE(at.second);
        *word >>= 16;
        return at;
    }
    KEEP_HERE(*word);
    at.first = (uint16_t)*word;
    KEEP_HERE(at.first);
    *word >>= 16;
    KEEP_HERE(*word);
    at.second = last ? *word : (uint16_t)*word;
    KEEP_HERE(at.second);
    *word >>= 16;
    return at;
}

// 32 magnitudes, or weights before they are shifted, from the k-th 32 on.
ALWAYS_INLINE __m256i look_up_points(point_layout l, const uint8_t *block, const block_points *points, int k) {
    const int n_points = 32 / l.n_values, bits = l.first_byte ? 8 : 16;
    const char *grid = l.grid;
    const void *indexes = points->indexes + n_points * k;
    if (l.first_byte)
        indexes = block + l.first_byte + 8 * k;
    uint64_t word = 0;
    __m128i halves[2];
#pragma GCC unroll 4
    for (int i = 0; i < n_points; i += 2) {
        if (i * bits % 64 == 0)
            word = load_u64((const char *)indexes + i * bits / 8);
        const two_indexes at = next_two(&word, bits, (i + 2) * bits % 64 == 0);
        __m128i *half = &halves[2 * i / n_points];
        if (l.n_values == 8) {
            *half = _mm_loadl_epi64((const void *)(grid + 8 * at.first));
            *half = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(*half), (const void *)(grid + 8 * at.second)));
        } else if (i % 4 == 0) { // each with its neighbours, in its place at once
            *half = _mm_cvtsi32_si128(load_i32(grid + 4 * at.first));
            *half = _mm_blend_epi32(*half, load_128(grid + 4 * at.second - 4), 2);
        } else {
            *half = _mm_blend_epi32(*half, load_128(grid + 4 * at.first - 8), 4);
            *half = _mm_blend_epi32(*half, load_128(grid + 4 * at.second - 12), 8);
        }
    }
    return _mm256_setr_m128i(halves[0], halves[1]);
}

// Signs from 32 in each of eight words.
static inline void set_signs(block_points *out, __m256i words) {
    const __m256i shifted = _mm256_srli_epi32(words, 1);
    _mm256_store_si256((void *)out->signs[0], _mm256_unpacklo_epi32(words, shifted));
    _mm256_store_si256((void *)out->signs[1], _mm256_unpackhi_epi32(words, shifted));
}

// The signs of 32 weights in the top bits of bytes. One multiplication shifts for the two bytes of a lane, of which the
// second has its signs one bit lower.
static inline __m256i signs_of_points(const block_points *points, int k) {
    const uint64_t word = points->signs[k / 2 % 2][k / 4 * 2 + k % 2];
    const __m256i byte_of =
        _mm256_setr_epi64x(0x0400040004000400, 0x0501050105010501, 0x0602060206020602, 0x0703070307030703);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi64x((int64_t)word), byte_of);
    return _mm256_mullo_epi16(spread, _mm256_set1_epi64x(0x0002000800200080));
}

static inline __m256i give_signs(__m256i signs, __m256i x) {
    return _mm256_sign_epi8(x, _mm256_or_si256(signs, _mm256_set1_epi8(1)));
}

static inline __m256i shifts_of_points(const block_points *points, int k) {
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(load_i32(points->shifts + 4 * k)), byte_of);
}

// 32 weights: signed if the format is, else shifted.
ALWAYS_INLINE __m256i chunk_of_points(point_layout l, int is_signed, const uint8_t *block, const block_points *points,
                                      int k) {
    const __m256i values = look_up_points(l, block, points, k);
    return is_signed ? give_signs(signs_of_points(points, k), values)
                     : _mm256_add_epi8(values, shifts_of_points(points, k));
}

#endif
#endif
