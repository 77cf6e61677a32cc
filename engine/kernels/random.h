// Random weights: valid blocks of every format, for models of true size without a file.
#ifndef ENGINE_RANDOM_H
#define ENGINE_RANDOM_H

#include <stdint.h>

// Fills n_rows rows of n_cols weights with blocks whose values have a mean of about 0 and a standard deviation of about
// n_cols^-0.5. Every byte depends on the seed and its place alone, not on the number of threads. The code books of the
// IQ formats must have been set.
void fill_random_blocks(int ggml_type, uint8_t *rows, int64_t n_rows, int n_cols, uint64_t seed, int n_threads);

#endif
