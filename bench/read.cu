// What no kernel can be faster than: one that only reads as many bytes, and one that does nothing at all.
//
// Compiled for THREADS of a block and DEPTH, the 16-byte words that a thread has under way. A block reads `each` words on
// end, the first of them before the kernel before it is over, as products do. Grid: (blocks).
#include "common.cuh"

DEVICE void read_ahead(uint4 words[DEPTH], const uint4 *data, int64_t at, int64_t end) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        words[i] = at + i * THREADS < end ? ld_stream16(data + at + i * THREADS) : uint4{0, 0, 0, 0};
}

// out: 4 bytes, written only if what a thread finds comes to one unlikely number: so everything must be read.
KERNEL(THREADS)
read_all(const uint4 *data, int64_t n_words, int64_t each, unsigned *out) {
    const int64_t first = each * blockIdx.x, end = min(first + each, n_words);
    uint4 words[DEPTH];
    int64_t at = first + threadIdx.x;
    read_ahead(words, data, at, end);
    begin_kernel();
    unsigned sum = 0;
    while (at < end) {
        uint4 next[DEPTH];
        at += DEPTH * THREADS;
        read_ahead(next, data, at, end);
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            sum |= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
            words[i] = next[i];
        }
    }
    if (sum == 0x12345678)
        *out = sum;
}

// The next in a chain of launches.
KERNEL(1024)
nothing() { begin_kernel(); }
