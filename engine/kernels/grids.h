// Code books of the IQ formats: one grid point (8 or 4 magnitudes) for each index.
//
// Their contents are data of the file format, not of this code: `engine.quants` hands them over once, at import, before
// any kernel runs. Until then they are zero and so are the weights they decode.
#ifndef ENGINE_GRIDS_H
#define ENGINE_GRIDS_H

#include <stddef.h>
#include <stdint.h>

extern int8_t engine_grid_iq2_xxs[256][8];
extern int8_t engine_grid_iq2_xs[512][8];
extern int8_t engine_grid_iq2_s[1024][8];
extern int8_t engine_grid_iq1[2048][8]; // IQ1_S and IQ1_M: eight times a value, and 9 more, so that none is negative

// Points of four values may be loaded with their neighbours, so there is something on both sides.
extern struct engine_grid_of_4 {
    int8_t before[64], points[512][4], after[64];
} engine_grid_iq3_xxs, engine_grid_iq3_s; // the first has 256 points

// The same in two bytes a point, for levels that look them up in registers: the lower and the upper bits of eight
// codes, or four codes of 3 bits, lowest first.
typedef struct {
    _Alignas(64) uint8_t bytes[2][2048];
    // unsigned weights, by a code and, above it, whether there is a minus: in the lower bits, and in bits 3 to 5
    _Alignas(64) uint8_t weights[2][64];
} packed_grid;

extern packed_grid engine_packed_iq2_xxs, engine_packed_iq2_xs, engine_packed_iq2_s, engine_packed_iq3_xxs,
    engine_packed_iq3_s, engine_packed_iq1;

// Copies the grid of a format, by its name. Returns 0, or -1 for a name without a grid, a wrong number of bytes, or
// more different values than its codes can tell apart.
int engine_set_grid(const char *format, const int8_t *values, size_t n_bytes);

#endif
