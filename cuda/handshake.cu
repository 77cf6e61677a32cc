// Asks the CPU for experts (`handshake.cuh`), and tells it when a step is over.
#include "handshake.cuh"

// Grid: 1 block.
KERNEL(512)
publish_misses(const int *ids, const int *slots, int n_used, const float *x, int64_t x_stride, int hidden_size,
               Exchange exchange, const int *n_tokens) {
    begin_kernel();
    exchange.ask(ids, slots, n_used, x, x_stride, hidden_size, *n_tokens);
}

// Grid: 1 block of 1 thread. After the last layer: lets the CPU's loop end. `layer` is the number of layers.
KERNEL(1)
publish_end(Exchange exchange) {
    begin_kernel();
    st_release_sys(exchange.requested, exchange.number());
}
