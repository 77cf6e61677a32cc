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
extern int8_t engine_grid_iq3_xxs[256][4];
extern int8_t engine_grid_iq3_s[512][4];
extern int8_t engine_grid_iq1[2048][8]; // IQ1_S and IQ1_M

// Copies the grid of a format, by its name. Returns 0, or -1 for a name without a grid or a wrong number of bytes.
int engine_set_grid(const char *format, const int8_t *values, size_t n_bytes);

#endif
