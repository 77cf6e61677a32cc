// Asks the CPU for experts (`handshake.cuh`), and tells it after the last ones.
#include "handshake.cuh"

// Grid: 1 block.
KERNEL(512)
publish_misses(const int *ids, const int *slots, int n_used, Sent gate, Sent up, Exchange exchange, const int *n_tokens) {
    begin_kernel();
    const int n = *n_tokens;
    gate.send(n, threadIdx.x, blockDim.x);
    up.send(n, threadIdx.x, blockDim.x);
    bool is_missing = false;
    for (int i = threadIdx.x; i < n * n_used; i += blockDim.x)
        is_missing |= exchange.note(i, ids[i], slots);
    exchange.ask(is_missing);
}

// Grid: 1 block of 1 thread. After the last layer, before the output head: lets the CPU's loop end. `layer` is the number
// of layers.
KERNEL(1)
publish_end(Exchange exchange) {
    begin_kernel();
    st_release_sys(exchange.requested, exchange.number());
}
