// Reads words of host memory into device memory, some pieces at a time. The copy engine could do it, but would do so in
// its turn: after all experts that are on their way into slots.
//
// Grid: (ceil(words of the longest piece / 256), pieces), 256 threads, a word each. The host memory is pinned, and not
// written while the kernel runs.
#include "common.cuh"

constexpr int MAX_PIECES = 128;

struct Piece {
    const volatile int *from; // read from the host, whatever a cache has of it
    int *to;
    int n, unused;
};

struct Pieces {
    Piece list[MAX_PIECES];
};

KERNEL(256) fetch(const Pieces pieces) {
    begin_kernel();
    const Piece piece = pieces.list[blockIdx.y];
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < piece.n)
        piece.to[i] = piece.from[i];
}
