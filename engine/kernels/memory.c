#include "memory.h"
#include "ops.h"

#include <omp.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#ifdef __x86_64__
#include <emmintrin.h>
#endif

enum {
    COPY_PIECE = 1 << 20,
    // What a thread reads at a time, in four streams, as a product's task is read. Streams that are a power of two
    // apart get in each other's way (a tenth to a fifth slower), and the last pieces of large ones are waited for.
    READ_PIECE = 160 << 10
};

void parallel_copy(const void *src, void *dst, int64_t n_bytes, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
    for (int64_t at = 0; at < n_bytes; at += COPY_PIECE) {
        const int64_t n = n_bytes - at < COPY_PIECE ? n_bytes - at : COPY_PIECE;
        memcpy((char *)dst + at, (const char *)src + at, (size_t)n);
    }
}

// Fills `bytes` so that no cache holds them afterwards, whatever its size; where that cannot be said, they may.
static void write_past_caches(uint8_t *bytes, int64_t n_bytes) {
#ifdef __x86_64__
    const int64_t n_before = -(intptr_t)bytes & 15, n_lanes = n_bytes > n_before ? (n_bytes - n_before) / 16 : 0;
    for (int64_t i = 0; i < n_lanes; i++)
        _mm_stream_si128((__m128i *)(bytes + n_before) + i, _mm_set1_epi8(1));
    _mm_sfence();
#else
    memset(bytes, 1, (size_t)n_bytes);
#endif
}

double read_bandwidth(const kernel_table *kernels, uint8_t *bytes, int64_t n_bytes, int n_threads, int repeats) {
    const int64_t n_pieces = (n_bytes + READ_PIECE - 1) / READ_PIECE;
    double best = 0.0;
    volatile float sink = 0.0f; // keeps the reads from being left out
    for (int i = 0; i < repeats; i++) {
        struct timespec begin, end;
        float total = 0.0f;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
        for (int64_t piece = 0; piece < n_pieces; piece++) {
            const int64_t at = piece * READ_PIECE, left = n_bytes - at;
            write_past_caches(bytes + at, left < READ_PIECE ? left : READ_PIECE);
        }
        clock_gettime(CLOCK_MONOTONIC, &begin);
        // Handed out, as products' rows are: the threads of a shared machine are not equally fast. Each takes its next
        // piece before it reads one: what it fetches ahead is then what it reads.
        atomic_llong n_taken = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
        for (int64_t piece = atomic_fetch_add(&n_taken, 1); piece < n_pieces;) {
            const int64_t following = atomic_fetch_add(&n_taken, 1), at = piece * READ_PIECE, left = n_bytes - at;
            const uint8_t *next = bytes + (following < n_pieces ? following : piece) * READ_PIECE;
            total += kernels->ops->read_all(bytes + at, left < READ_PIECE ? left : READ_PIECE, next);
            piece = following;
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        sink = sink + total;
        const double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
        if (seconds > 0.0 && (double)n_bytes / seconds > best)
            best = (double)n_bytes / seconds;
    }
    return best;
}
