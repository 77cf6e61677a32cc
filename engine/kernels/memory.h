// Moving and reading much memory with several threads.
#ifndef ENGINE_MEMORY_H
#define ENGINE_MEMORY_H

#include "table.h"

void parallel_copy(const void *src, void *dst, int64_t n_bytes, int n_threads);

// Returns the best of `repeats` passes over a buffer, in bytes a second. Each is written anew before, past the caches.
double read_bandwidth(const kernel_table *kernels, uint8_t *bytes, int64_t n_bytes, int n_threads, int repeats);

#endif
