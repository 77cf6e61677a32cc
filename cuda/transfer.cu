// Copies words of host memory into device memory or the other way, some pieces at a time. A copy engine could do it, but
// would do so in its turn: after experts that are on their way into slots.
//
// Grid: (ceil(words of the longest piece / 256), pieces), 256 threads, a word each. The host memory is pinned, and the
// host leaves it alone while the kernel runs. A step that was begun before the host knew its tokens has numbers below 0 for
// them: -1 - i is what row i of the step before drew, in the same memory.
#include "common.cuh"

constexpr int MAX_PIECES = 128;

struct Piece {
    const volatile int *from; // read from the host, whatever a cache has of it
    int *to;
    int n, is_tokens;
};

struct Pieces {
    Piece list[MAX_PIECES];
    const volatile int *drawn; // by the step before
};

KERNEL(256) transfer(const Pieces pieces) {
    begin_kernel();
    const Piece piece = pieces.list[blockIdx.y];
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= piece.n)
        return;
    const int word = piece.from[i];
    piece.to[i] = piece.is_tokens && word < 0 ? pieces.drawn[-1 - word] : word;
}
