#include "memory.h"
#include "ops.h"

#include <omp.h>
#include <string.h>
#include <time.h>

enum { PIECE = 1 << 20 };

void parallel_copy(const void *src, void *dst, int64_t n_bytes, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
    for (int64_t at = 0; at < n_bytes; at += PIECE) {
        const int64_t n = n_bytes - at < PIECE ? n_bytes - at : PIECE;
        memcpy((char *)dst + at, (const char *)src + at, (size_t)n);
    }
}

double read_bandwidth(const kernel_table *kernels, const uint8_t *bytes, int64_t n_bytes, int n_threads, int repeats) {
    const int64_t n_pieces = (n_bytes + PIECE - 1) / PIECE;
    double best = 0.0;
    volatile float sink = 0.0f; // keeps the reads from being left out
    for (int i = 0; i < repeats; i++) {
        struct timespec begin, end;
        float total = 0.0f;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        // handed out as products' rows are: the threads of a shared machine are not equally fast
#pragma omp parallel for num_threads(n_threads) schedule(dynamic) reduction(+ : total)
        for (int64_t piece = 0; piece < n_pieces; piece++) {
            const int64_t at = piece * PIECE, left = n_bytes - at;
            total += kernels->ops->read_all(bytes + at, left < PIECE ? left : PIECE);
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        sink = sink + total;
        const double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
        if (seconds > 0.0 && (double)n_bytes / seconds > best)
            best = (double)n_bytes / seconds;
    }
    return best;
}
