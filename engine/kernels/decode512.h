// Four rows against one activation row on AVX-512 VNNI, 64 weights in a register.
//
// The activations of 256 columns are put in the order of the format's weights once for all rows of a call. VNNI sums
// four products in a lane. From there on there are three ways:
//
//   pairs   Two registers hold the halves of four sub-blocks of 32, so that a lane gets eight products. The lanes of
//           four rows are added up and interleaved: then a register has four sub-blocks of four rows, which meet their
//           scales, or are the terms of the rows' chains.
//   columns The q-th 64 bits of the registers are of 32 weights, so that two lanes get all products of 32, or of 16.
//   others  The sums of two registers are packed to int16, where they always fit. One instruction multiplies them by
//           the scales of their sub-blocks of 16 and adds them up.
#ifndef ENGINE_DECODE512_H
#define ENGINE_DECODE512_H

#include "vector_format.h"

#if defined(__AVX512VNNI__)

enum {
    MAX_UNITS = 32,    // of 256 columns whose activations are kept in order at a time
    DECODE_TOKENS = 4, // that share what is unpacked
};

// The activations of a unit of 256 columns.
typedef struct {
    __m512i x[4];
    __m512i sums[2]; // see prepare_activations
    __m512 d[2];     // one for all, or in each 128 bits that of a block of 32
} activation_unit;

// What the bytes of `wide` are too large by.
ALWAYS_INLINE int offset_of_wide(vector_format f) { return f.is_signed && !f.has_signs ? 128 : f.offset; }

// Whether sub-blocks of 32 stand in pairs of registers.
ALWAYS_INLINE int has_pairs(vector_format f) { return f.order == BY_2 || f.order == BY_4; }

// Whether a sum of sixteen products fits in an int16 whatever the activations are.
ALWAYS_INLINE int sixteens_fit(vector_format f) {
    const int largest = f.is_signed ? 128 : f.offset > f.largest - f.offset ? f.offset : f.largest - f.offset;
    return 16 * 127 * largest <= 32767 && !f.second_shift;
}

// `sums` is what the minimums or offsets of the weights need, and starts from the sums of x over groups of 16:
//
//   pairs, minimum, 256   [0]: sums of the two sub-blocks of each lane, as int16
//   pairs, minimum, 32    sums of the blocks as float, one in each 128 bits
//   pairs, offset         what the offset takes off the eight products of each lane
//   columns               the same for sub-blocks of 16; for those of 32 [0]: off the sixteen products
//   others                [0]: the sixteen sums
ALWAYS_INLINE activation_unit prepare_unit(vector_format f, const int8_t *q, const float *d, const int16_t *x_sums) {
    const __m512i lanes = each_128(0, 1, 2, 3);
    const __m256i sums_16 = load_256(x_sums);
    const __m256i sums_32 = _mm256_madd_epi16(sums_16, _mm256_set1_epi16(1));
    const __m512i offset = _mm512_set1_epi8((char)offset_of_wide(f)), zero = _mm512_setzero_si512();
    activation_unit unit;
    if (f.block_size == 32) {
        const __m512 d_of_blocks = _mm512_castps256_ps512(_mm256_loadu_ps(d));
        unit.d[0] = _mm512_permutexvar_ps(lanes, d_of_blocks);
        unit.d[1] = _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4)), d_of_blocks);
    } else
        unit.d[0] = unit.d[1] = _mm512_set1_ps(*d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        unit.x[i] = f.order == COLUMNS
                        ? _mm512_i64gather_epi64(_mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28), q + 8 * i, 8)
                        : join_256(load_two_128(q + 16 * group_at(f.order, i, 0), q + 16 * group_at(f.order, i, 1)),
                                   load_two_128(q + 16 * group_at(f.order, i, 2), q + 16 * group_at(f.order, i, 3)));
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
        if (!has_pairs(f) && f.order != COLUMNS)
            unit.sums[p] = _mm512_castsi256_si512(sums_16);
        else if (!f.has_min) {
            const __m512i fours = _mm512_dpbusd_epi32(zero, offset, unit.x[2 * p]);
            unit.sums[p] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(fours, offset, unit.x[2 * p + 1]));
        } else if (f.block_size == 32)
            unit.sums[p] = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_permutexvar_epi32(
                _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * p)), _mm512_castsi256_si512(sums_32))));
        else
            unit.sums[p] = _mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(_mm256_cvtepi32_epi16(sums_32)));
    }
    if (f.order == COLUMNS && f.sub_block == 32)
        unit.sums[0] = _mm512_add_epi32(unit.sums[0], unit.sums[1]);
    return unit;
}

ALWAYS_INLINE void prepare_activations(vector_format f, activation_row x, int n_cols, int first, int end,
                                       activation_unit *units) {
    const int step = 256 / activation_group(f.activation);
    for (int u = first; u < end; u++) {
        const int8_t *q = x.q + 256 * (int64_t)u;
        const float *d = x.d + (int64_t)u * step;
        const int16_t *sums = x.sums + 16 * (int64_t)u;
        if (256 * (u + 1) <= n_cols)
            units[u - first] = prepare_unit(f, q, d, sums);
        else { // the end of a row of blocks of 32
            const int n = n_cols - 256 * u;
            int8_t q_padded[256] = {0};
            float d_padded[8] = {0};
            int16_t sums_padded[16] = {0};
            memcpy(q_padded, q, (size_t)n);
            memcpy(d_padded, d, (size_t)(n / 32) * sizeof *d);
            memcpy(sums_padded, sums, (size_t)(n / 16) * sizeof *sums);
            units[u - first] = prepare_unit(f, q_padded, d_padded, sums_padded);
        }
    }
}

// Adds the products of register i, four in a lane.
ALWAYS_INLINE __m512i add_dot(vector_format f, __m512i acc, const weights_256 *w, const activation_unit *a, int i) {
    const __m512i x =
        f.has_signs ? _mm512_mask_sub_epi8(a->x[i], w->minus[i], _mm512_setzero_si512(), a->x[i]) : a->x[i];
    return _mm512_dpbusd_epi32(acc, w->u[i], x);
}

// The products of eight sub-blocks of 32 of four rows: lane r of each 128 bits is of row r.
typedef struct {
    __m512i p[2];
} sub_block_sums;

ALWAYS_INLINE sub_block_sums sums_of_pairs(vector_format f, const weights_256 w[4], const activation_unit *a) {
    __m512i dots[2][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            const __m512i start = !f.has_min && offset_of_wide(f) ? a->sums[p] : _mm512_setzero_si512();
            dots[p][r] = add_dot(f, add_dot(f, start, &w[r], a, 2 * p), &w[r], a, 2 * p + 1);
        }
    if (sixteens_fit(f))
        return (sub_block_sums){{sum_small_fours_of_4(dots[0]), sum_small_fours_of_4(dots[1])}};
    return (sub_block_sums){{sum_fours_of_4(dots[0]), sum_fours_of_4(dots[1])}};
}

// One 256-block of four rows, added to their chains of n tokens.
ALWAYS_INLINE void add_block_of_pairs(vector_format f, int n, const uint8_t *const blocks[4],
                                      const activation_unit *const a[], __m128 *acc) {
    weights_256 w[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        w[r] = f.wide(blocks[r]);
    const scales_of_4 s = f.scales_4(blocks);
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) {
        const sub_block_sums sums = sums_of_pairs(f, w, a[t]);
        const __m512i first = _mm512_mullo_epi32(sums.p[0], s.scales[0]),
                      second = _mm512_mullo_epi32(sums.p[1], s.scales[1]);
        const __m128i isum =
            sum_lanes_128(_mm512_add_epi32(first, f.second_shift ? _mm512_srai_epi32(second, f.second_shift) : second));
        const __m128 d = _mm512_castps512_ps128(a[t]->d[0]);
        acc[t] = _mm_fmadd_ps(_mm_mul_ps(f.d(blocks), d), _mm_cvtepi32_ps(isum), acc[t]);
        if (f.has_min) {
            const __m128i imin = sum_lanes_128(_mm512_madd_epi16(s.mins, a[t]->sums[0]));
            acc[t] = _mm_fmadd_ps(_mm_mul_ps(f.min_d(blocks), d), _mm_cvtepi32_ps(imin), acc[t]);
        }
    }
}

// The same for sub-blocks of 16.
ALWAYS_INLINE void add_block_of_16(vector_format f, int n, const uint8_t *const blocks[4],
                                   const activation_unit *const a[], __m128 *acc) {
    const __m512i zero = _mm512_setzero_si512();
    const int offset = offset_of_wide(f);
    __m512i dots[DECODE_TOKENS][4];
    __m256i min_dots[DECODE_TOKENS][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        __m256i mins = _mm256_setzero_si256();
        const __m256i scales = one_a_sub_block(f, f.scales(blocks[r], &mins));
        const weights_256 w = f.wide(blocks[r]);
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) {
            min_dots[t][r] = _mm256_madd_epi16(f.has_min ? mins : scales, _mm512_castsi512_si256(a[t]->sums[0]));
            dots[t][r] =
                offset ? _mm512_zextsi256_si512(_mm256_mullo_epi32(min_dots[t][r], _mm256_set1_epi32(-offset))) : zero;
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                const __m512i places = places_of_scales(f.order, p);
                const __m512i fours =
                    _mm512_packs_epi32(add_dot(f, zero, &w, a[t], 2 * p), add_dot(f, zero, &w, a[t], 2 * p + 1));
                dots[t][r] = _mm512_dpwssd_epi32(dots[t][r], fours,
                                                 _mm512_permutexvar_epi16(places, _mm512_castsi256_si512(scales)));
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) {
        const __m128 d = _mm512_castps512_ps128(a[t]->d[0]);
        acc[t] =
            _mm_fmadd_ps(_mm_mul_ps(f.d(blocks), d), _mm_cvtepi32_ps(sum_lanes_128(sum_fours_of_4(dots[t]))), acc[t]);
        if (f.has_min) {
            const __m128i imin = sum_lanes_of_4(min_dots[t][0], min_dots[t][1], min_dots[t][2], min_dots[t][3]);
            acc[t] = _mm_fmadd_ps(_mm_mul_ps(f.min_d(blocks), d), _mm_cvtepi32_ps(imin), acc[t]);
        }
    }
}

#if defined(__AVX512VBMI__)
// Adds neighbouring lanes: in each 128 bits the sums of a are below those of b.
static inline __m512i sum_pairs_of_2(__m512i a, __m512i b) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

// The scales of eight sub-blocks of two rows, as sum_pairs_of_2 leaves their sums.
static inline __m512i scales_of_2(__m256i a, __m256i b) {
    const __m128i x = _mm256_castsi256_si128(a), y = _mm256_castsi256_si128(b);
    return _mm512_cvtepi16_epi32(
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi32(x, y)), _mm_unpackhi_epi32(x, y), 1));
}

// The same for formats with grids.
ALWAYS_INLINE void add_block_of_columns(vector_format f, int n, const uint8_t *const blocks[4],
                                        const activation_unit *const a[], __m128 *acc) {
    __m512i dots[DECODE_TOKENS][4];
    __m256i scales[4], mins;
    block_points points[4];
    f.points(blocks, points);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        scales[r] = f.scales(blocks[r], &mins);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) // of each 32 weights
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const __m512i first = column_of_points(f.layout, &points[r], 2 * h);
            const __m512i second = column_of_points(f.layout, &points[r], 2 * h + 1);
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) {
                const __m512i start = f.sub_block == 32 && h ? dots[t][r] : a[t]->sums[h];
                const __m512i sum =
                    _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, first, a[t]->x[2 * h]), second, a[t]->x[2 * h + 1]);
                if (f.sub_block == 32)
                    dots[t][r] = sum;
                else {
                    const __m512i all = _mm512_cvtepi16_epi32(scales[r]);
                    const __m512i scale =
                        h ? _mm512_shuffle_epi32(all, _MM_PERM_DDBB) : _mm512_shuffle_epi32(all, _MM_PERM_CCAA);
                    const __m512i scaled = _mm512_mullo_epi32(sum, scale);
                    dots[t][r] = h ? _mm512_add_epi32(dots[t][r], scaled) : scaled;
                }
            }
        }
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) {
        const __m512i *d = dots[t];
        const __m512i sums =
            f.sub_block == 32
                ? sum_pairs_of_2(_mm512_mullo_epi32(sum_pairs_of_2(d[0], d[1]), scales_of_2(scales[0], scales[1])),
                                 _mm512_mullo_epi32(sum_pairs_of_2(d[2], d[3]), scales_of_2(scales[2], scales[3])))
                : sum_fours_of_4(d);
        acc[t] = _mm_fmadd_ps(_mm_mul_ps(f.d(blocks), _mm512_castps512_ps128(a[t]->d[0])),
                              _mm_cvtepi32_ps(sum_lanes_128(sums)), acc[t]);
    }
}
#endif

enum { BLOCKS_TOGETHER = 8 }; // of 32

// The i-th 128 bits, of a register or read back from memory, which takes no port that products need.
ALWAYS_INLINE __m128 quarter(__m512 v, int i) {
    switch (i) {
    case 0:
        return _mm512_castps512_ps128(v);
    case 1:
        return _mm512_extractf32x4_ps(v, 1);
    case 2:
        return _mm512_extractf32x4_ps(v, 2);
    default:
        return _mm512_extractf32x4_ps(v, 3);
    }
}
ALWAYS_INLINE __m128 stored_quarter(const __m512 *v, int i) { return _mm_loadu_ps((const float *)v + 4 * i); }

// The first n_blocks of eight 32-blocks of four rows.
ALWAYS_INLINE void add_blocks_32(vector_format f, int n, int n_blocks, const uint8_t *const blocks[4],
                                 const activation_unit *const a[], __m128 *acc) {
    weights_256 w[4];
    __m512 d_w[2], min_d_w[2];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
        w[r] = f.wide(blocks[r]);
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++)
        if (f.d_16) {
            d_w[p] = f.d_16(blocks, 4 * p * f.block_bytes);
            min_d_w[p] = f.has_min ? f.min_d_16(blocks, 4 * p * f.block_bytes) : d_w[p];
        }
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) {
        const sub_block_sums sums = sums_of_pairs(f, w, a[t]);
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            __m512 isums = _mm512_cvtepi32_ps(sums.p[p]), d, min_d;
            if (f.d_16) {
                d = _mm512_mul_ps(d_w[p], a[t]->d[p]);
                min_d = _mm512_mul_ps(min_d_w[p], a[t]->d[p]);
                KEEP_IN_MEMORY(isums);
                KEEP_IN_MEMORY(d);
                if (f.has_min)
                    KEEP_IN_MEMORY(min_d);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int at = (4 * p + i) * f.block_bytes;
                const uint8_t *const rows[4] = {blocks[0] + at, blocks[1] + at, blocks[2] + at, blocks[3] + at};
                const __m128 d_x = stored_quarter(&a[t]->d[p], i);
                if (4 * p + i >= n_blocks)
                    break;
                acc[t] = _mm_fmadd_ps(f.d_16 ? stored_quarter(&d, i) : _mm_mul_ps(f.d(rows), d_x),
                                      f.d_16 ? stored_quarter(&isums, i) : quarter(isums, i), acc[t]);
                if (f.has_min)
                    acc[t] = _mm_fmadd_ps(f.d_16 ? stored_quarter(&min_d, i) : _mm_mul_ps(f.min_d(rows), d_x),
                                          stored_quarter((const __m512 *)&a[t]->sums[p], i), acc[t]);
            }
        }
    }
}

// The last blocks of a row, fewer than eight, in copies that can be read like eight.
ALWAYS_INLINE void add_last_blocks_32(vector_format f, int n, int n_blocks, const uint8_t *const blocks[4],
                                      const activation_unit *const a[], __m128 *acc) {
    enum { MAX_BLOCK_BYTES = 34 };
    uint8_t copies[4][BLOCKS_TOGETHER * MAX_BLOCK_BYTES] = {0};
    for (int r = 0; r < 4; r++)
        memcpy(copies[r], blocks[r], (size_t)(n_blocks * f.block_bytes));
    const uint8_t *const rows[4] = {copies[0], copies[1], copies[2], copies[3]};
    add_blocks_32(f, n, n_blocks, rows, a, acc);
}

// All rows of n tokens, which share what is unpacked.
ALWAYS_INLINE void decode_tokens(vector_format f, int n, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                                 const void *const *x, float *const *y, const weight_rows *next) {
    const int unit_blocks = 256 / f.block_size, unit_bytes = unit_blocks * f.block_bytes;
    const int n_blocks = n_cols / f.block_size, n_units = (n_blocks + unit_blocks - 1) / unit_blocks;
    const row_streams streams = streams_of(4, w, row_bytes, n_rows, next);
    activation_unit units[DECODE_TOKENS][MAX_UNITS];
    for (int first = 0; first < n_units; first += MAX_UNITS) {
        const int end = n_units - first < MAX_UNITS ? n_units : first + MAX_UNITS;
        for (int t = 0; t < n; t++)
            prepare_activations(f, activation_view(x[t], f.activation, n_cols), n_cols, first, end, units[t]);
        const int64_t other_columns = row_bytes - (int64_t)(end - first) * unit_bytes; // lie before the next row's
        for (int r = 0; r < streams.n_each; r++) {
            const uint8_t *rows[4];
            set_rows(streams, 4, r, rows);
            float sums[DECODE_TOKENS][4] = {0};
            __m128 acc[DECODE_TOKENS];
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) {
                if (first)
                    load_of_rows(streams, 4, r, y[t], sums[t]);
                acc[t] = _mm_loadu_ps(sums[t]);
            }
            for (int u = first; u < end; u++) {
                const int64_t at = (int64_t)u * unit_bytes;
                const uint8_t *blocks[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    blocks[i] = rows[i] + at;
                    KEEP_SCALAR(blocks[i]);
                }
                const activation_unit *a[DECODE_TOKENS];
#pragma GCC unroll 4
                for (int t = 0; t < n; t++)
                    a[t] = &units[t][u - first];
                const int64_t here = r * row_bytes + at, left = (end - u) * (int64_t)unit_bytes;
                fetch_at(streams, 4, here + NEAR_AHEAD + (left <= NEAR_AHEAD ? other_columns : 0), unit_bytes, true);
                fetch_at(streams, 4, here + FAR_AHEAD + (left <= FAR_AHEAD ? other_columns : 0), unit_bytes, false);
                if (f.block_size == 32)
                    u *unit_blocks + unit_blocks <= n_blocks
                        ? add_blocks_32(f, n, unit_blocks, blocks, a, acc)
                        : add_last_blocks_32(f, n, n_blocks - u * unit_blocks, blocks, a, acc);
                else if (has_pairs(f))
                    add_block_of_pairs(f, n, blocks, a, acc);
#if defined(__AVX512VBMI__)
                else if (f.order == COLUMNS)
                    add_block_of_columns(f, n, blocks, a, acc);
#endif
                else
                    add_block_of_16(f, n, blocks, a, acc);
            }
#pragma GCC unroll 4
            for (int t = 0; t < n; t++) {
                _mm_storeu_ps(sums[t], acc[t]);
                store_of_rows(streams, 4, r, sums[t], y[t]);
            }
        }
    }
}

ALWAYS_INLINE void matmul_decode(vector_format f, const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols,
                                 const void *const *x, int n_x, float *const *y, const weight_rows *next) {
    for (int t = 0; t < n_x; t += DECODE_TOKENS)
        switch (n_x - t) {
        case 1:
            decode_tokens(f, 1, w, row_bytes, n_rows, n_cols, x + t, y + t, next);
            break;
        case 2:
            decode_tokens(f, 2, w, row_bytes, n_rows, n_cols, x + t, y + t, next);
            break;
        case 3:
            decode_tokens(f, 3, w, row_bytes, n_rows, n_cols, x + t, y + t, next);
            break;
        default:
            decode_tokens(f, DECODE_TOKENS, w, row_bytes, n_rows, n_cols, x + t, y + t, next);
        }
}

#endif
#endif
