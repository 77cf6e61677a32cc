// Weights from code books on AVX2, and for batches on AVX-512 without VBMI. The points of a 256-block are looked up 32
// weights at a time, and signs stay apart from magnitudes, so that a product can give them to the activations.
//
// Points are loaded one by one: gathering them takes more than twice as long on Zen, and on Intel since its microcode
// keeps gathers from leaking. Loads are then what there is too little of, so indexes come several in a word.
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
        _Alignas(32) uint32_t minus[8]; // a bit for each weight
        _Alignas(32) int8_t shifts[32]; // one for eight weights
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

// Keeps the compiler from copying a register that is shifted step by step, or reading it again.
#define KEEP_SHIFTED(word) __asm__("" : "+r"(word))

ALWAYS_INLINE uint64_t load_word(const void *p) {
    uint64_t word = load_u64(p);
    KEEP_SHIFTED(word);
    return word;
}

// The lowest number of a word, which is shifted to the next.
ALWAYS_INLINE size_t next_number(uint64_t *word, int bits) {
    size_t number = *word & ((1u << bits) - 1);
    KEEP_SHIFTED(number);
    *word >>= bits;
    KEEP_SHIFTED(*word);
    return number;
}

// 32 magnitudes, or weights before they are shifted, from the k-th 32 on.
ALWAYS_INLINE __m256i look_up_points(point_layout l, const uint8_t *block, const block_points *points, int k) {
    const int n_half = 16 / l.n_values, bits = l.first_byte ? 8 : 16;
    const char *grid = l.grid;
    uint64_t word =
        l.first_byte ? load_word(block + l.first_byte + 8 * k) : load_word(points->indexes + 2 * n_half * k);
    __m128i halves[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        if (l.n_values == 8) {
            halves[h] = _mm_loadl_epi64((const void *)(grid + 8 * next_number(&word, bits)));
            halves[h] = _mm_castps_si128(
                _mm_loadh_pi(_mm_castsi128_ps(halves[h]), (const void *)(grid + 8 * next_number(&word, bits))));
        } else { // each with its neighbours, in its place at once
            if (h == 1 && !l.first_byte)
                word = load_word(points->indexes + n_half * (2 * k + 1));
            halves[h] = _mm_cvtsi32_si128(load_i32(grid + 4 * next_number(&word, bits)));
            halves[h] = _mm_blend_epi32(halves[h], load_128(grid + 4 * next_number(&word, bits) - 4), 2);
            halves[h] = _mm_blend_epi32(halves[h], load_128(grid + 4 * next_number(&word, bits) - 8), 4);
            halves[h] = _mm_blend_epi32(halves[h], load_128(grid + 4 * next_number(&word, bits) - 12), 8);
        }
    }
    return _mm256_setr_m128i(halves[0], halves[1]);
}

static inline __m256i negate_where(__m256i minus, __m256i x) {
    return _mm256_sub_epi8(_mm256_xor_si256(x, minus), minus);
}

// All ones in the bytes of weights with a minus.
static inline __m256i minus_of_points(const block_points *points, int k) { return bytes_of_bits(points->minus[k]); }

static inline __m256i shifts_of_points(const block_points *points, int k) {
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(load_i32(points->shifts + 4 * k)), byte_of);
}

// 32 weights: signed if the format is, else shifted.
ALWAYS_INLINE __m256i chunk_of_points(point_layout l, int is_signed, const uint8_t *block, const block_points *points,
                                      int k) {
    const __m256i values = look_up_points(l, block, points, k);
    return is_signed ? negate_where(minus_of_points(points, k), values)
                     : _mm256_add_epi8(values, shifts_of_points(points, k));
}

#endif
#endif
