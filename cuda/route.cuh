// What comes of a router's logits. Compiled as `router.cuh` says.
#pragma once

#include "handshake.cuh"
#include "last_block.cuh"
#include "router.cuh"

// The last of the blocks that made the logits chooses experts, and asks the CPU for those without a slot. n_done: a word of
// device memory, 0 before and after. slots: of the experts, or null if nobody is asked. `shared`: for each warp
// `Routing::scratch_words`; what is in it is not needed any more.
DEVICE void choose_and_ask(const Routing &routing, unsigned *n_done, const int *slots, const Exchange &exchange, int n_tokens,
                           float *shared) {
    if (!is_last_block(n_done, gridDim.x))
        return;
    const int warp = threadIdx.x / WARP;
    bool is_missing = false;
#pragma unroll 1
    for (int token = warp; token < n_tokens; token += blockDim.x / WARP)
        choose(routing, token, shared + warp * routing.scratch_words(), [&](int place, int id) {
            if (slots)
                is_missing |= exchange.note(place, id, slots);
        });
    if (slots)
        exchange.ask(is_missing);
}
