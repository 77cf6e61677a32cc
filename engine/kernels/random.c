#include "random.h"
#include "blocks.h"
#include "fp.h"
#include "table.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum {
    F32_TYPE = 0,
    F16_TYPE = 1,
    BF16_TYPE = 30,
    MXFP4_TYPE = 39,
    NVFP4_TYPE = 40,
    IQ1_M_TYPE = 29,
    WORD_BYTES = 8,
    PIECE_BYTES = 1 << 19,
    SAMPLE_WEIGHTS = 1 << 14,
};

// Where a block keeps its half-float scale and offset (-1: has none), and the offset that centres the values as a
// multiple of the scale.
typedef struct {
    int d, m;
    float m_per_d;
} scale_place;

#define D(NAME) {(int)offsetof(block_##NAME, d), -1, 0.0f}
#define D_M(NAME, FIELD, RATIO) {(int)offsetof(block_##NAME, d), (int)offsetof(block_##NAME, FIELD), RATIO}
static const scale_place scale_places[N_GGML_TYPES] = {
    [2] = D(Q4_0),     [3] = D_M(Q4_1, m, -7.5f),
    [6] = D(Q5_0),     [7] = D_M(Q5_1, m, -15.5f),
    [8] = D(Q8_0),     [10] = D_M(Q2_K, dmin, 1.5f),
    [11] = D(Q3_K),    [12] = D_M(Q4_K, dmin, 7.5f),
    [14] = D(Q6_K),    [13] = D_M(Q5_K, dmin, 15.5f),
    [16] = D(IQ2_XXS), [17] = D(IQ2_XS),
    [18] = D(IQ3_XXS), [19] = D(IQ1_S),
    [20] = D(IQ4_NL),  [21] = D(IQ3_S),
    [22] = D(IQ2_S),   [23] = D(IQ4_XS),
    [34] = D(TQ1_0),   [35] = D(TQ2_0),
    [41] = D(Q1_0),    [42] = D(Q2_0),
};

// Output `index` of SplitMix64, which needs none of the outputs before.
static inline uint64_t random_word(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline uint16_t load_16(const uint8_t *at) {
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline void store_16(uint8_t *at, uint16_t value) { memcpy(at, &value, sizeof value); }

// An E4M3 number without sign, near x.
static uint8_t nearest_e4m3(float x) {
    if (x < 0x1p-6f)
        return (uint8_t)lrintf(fmaxf(x, 0x1p-9f) * 0x1p9f);
    int exponent;
    const float fraction = frexpf(fminf(x, 440.0f), &exponent); // 0.5 to 1
    return (uint8_t)(((exponent + 6) << 3) + (int)lrintf((fraction - 0.5f) * 16.0f));
}

// Turns a block of random bytes into a valid one. The scale is `unit` times 0.5 to 1.5, so that no two are the same.
static void make_valid(int type, uint8_t *block, float unit) {
    const scale_place place = scale_places[type];
    switch (type) {
    case F32_TYPE: {
        int32_t bits;
        memcpy(&bits, block, sizeof bits);
        const float value = unit * (float)bits * 0x1p-31f;
        memcpy(block, &value, sizeof value);
        return;
    }
    case F16_TYPE:
        store_16(block, f32_to_f16(unit * (float)(int16_t)load_16(block) * 0x1p-15f));
        return;
    case BF16_TYPE:
        store_16(block, (uint16_t)(bits_of_float(unit * (float)(int16_t)load_16(block) * 0x1p-15f) >> 16));
        return;
    case MXFP4_TYPE:
        ((block_MXFP4 *)block)->e = (uint8_t)(128 + lrintf(log2f(unit)) - (block[0] & 1));
        return;
    case NVFP4_TYPE:
        for (int i = 0; i < 4; i++)
            block[i] = nearest_e4m3(unit * (0.5f + (float)block[i] * 0x1p-8f));
        return;
    case IQ1_M_TYPE: { // the half float is spread over the top nibbles of four words
        block_IQ1_M *b = (block_IQ1_M *)block;
        const uint16_t d = f32_to_f16(unit * (0.5f + (float)(b->scales[0] >> 12) * 0x1p-4f));
        for (int i = 0; i < 4; i++)
            b->scales[i] = (uint16_t)((b->scales[i] & 0x0fff) | (d >> 4 * i & 0xf) << 12);
        return;
    }
    default: {
        const uint16_t bits = load_16(block + place.d);
        // Either sign, since some formats reach further on one side.
        const float d = (bits & 1 ? -unit : unit) * (0.5f + (float)bits * 0x1p-16f);
        store_16(block + place.d, f32_to_f16(d));
        if (place.m >= 0)
            store_16(block + place.m, f32_to_f16(d * place.m_per_d));
    }
    }
}

// Blocks from `first` to `end`; `first` is a multiple of 8, so that a word never crosses into it.
static void fill_blocks(int type, uint8_t *blocks, int64_t first, int64_t end, float unit, uint64_t seed) {
    const int64_t block_bytes = engine_formats[type].block_bytes, end_byte = end * block_bytes;
    for (int64_t at = first * block_bytes; at < end_byte; at += WORD_BYTES) {
        const uint64_t word = random_word(seed, (uint64_t)(at / WORD_BYTES));
        memcpy(blocks + at, &word, (size_t)(end_byte - at < WORD_BYTES ? end_byte - at : WORD_BYTES));
    }
    for (int64_t i = first; i < end; i++)
        make_valid(type, blocks + i * block_bytes, unit);
}

// Returns the standard deviation of the weights of blocks with unit 1.
static float unit_deviation(int type) {
    uint8_t blocks[SAMPLE_WEIGHTS * sizeof(float)];
    float values[SAMPLE_WEIGHTS];
    fill_blocks(type, blocks, 0, SAMPLE_WEIGHTS / engine_formats[type].block_size, 1.0f, 1);
    engine_kernels("scalar")->quant->dequantize_row[type](blocks, values, SAMPLE_WEIGHTS);
    double sum = 0.0;
    for (int i = 0; i < SAMPLE_WEIGHTS; i++)
        sum += (double)values[i] * (double)values[i];
    return (float)sqrt(sum / SAMPLE_WEIGHTS);
}

void fill_random_blocks(int ggml_type, uint8_t *rows, int64_t n_rows, int n_cols, uint64_t seed, int n_threads) {
    const format_facts *format = &engine_formats[ggml_type];
    const float unit = 1.0f / sqrtf((float)n_cols) / unit_deviation(ggml_type);
    const int64_t n_blocks = n_rows * (n_cols / format->block_size);
    const int64_t piece = PIECE_BYTES / format->block_bytes / WORD_BYTES * WORD_BYTES;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
    for (int64_t first = 0; first < n_blocks; first += piece)
        fill_blocks(ggml_type, rows, first, n_blocks - first < piece ? n_blocks : first + piece, unit, seed);
}
