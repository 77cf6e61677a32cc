// Chooses experts from logits (`router.cuh`). A warp takes one token. Grid: (1, tokens). Dynamic shared memory:
// `Routing::scratch_words`.
#include "router.cuh"

KERNEL(WARP)
router(Routing routing, const int *n_tokens) {
    extern __shared__ float shared[];
    begin_kernel();
    if ((int)blockIdx.y < *n_tokens)
        choose(routing, blockIdx.y, shared, [](int, int) {});
}
