// Activation rows in the form integer weights meet them.
//
// A quantised row of n_cols values, in groups of g = 256 (Q8_256) or 32 (Q8_32):
//
//     int8  q[n_cols]            at 0; in [-127, 127]
//     float d[n_cols / g]        at the next multiple of 64: x ~ d * q
//     int16 sums[n_cols / 16]    at the next multiple of 64: sums of q over 16 values, for formats with a minimum or
//     offset
//
// padded to a multiple of 64 bytes. An F32 row is the float32 values themselves.
#ifndef ENGINE_ACTIVATIONS_H
#define ENGINE_ACTIVATIONS_H

#include "table.h"

#include <stdint.h>

static inline int64_t round_up_64(int64_t n) { return (n + 63) & ~(int64_t)63; }

static inline int activation_group(int activation) { return activation == ACTIVATION_Q8_256 ? 256 : 32; }

static inline int64_t activation_sums_offset(int activation, int n_cols) {
    return round_up_64(n_cols) + round_up_64(n_cols / activation_group(activation) * (int64_t)sizeof(float));
}

// Views into one quantised row.
typedef struct {
    const int8_t *q;
    const float *d;
    const int16_t *sums;
} activation_row;

static inline activation_row activation_view(const void *row, int activation, int n_cols) {
    const char *base = row;
    return (activation_row){(const int8_t *)base, (const float *)(base + round_up_64(n_cols)),
                            (const int16_t *)(base + activation_sums_offset(activation, n_cols))};
}

#endif
