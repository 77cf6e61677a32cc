// Misses: experts without a slot, which the CPU computes while the GPU computes the others.
//
// All of it goes through mapped host memory, one request at a time: the missing ids, the activations, the CPU's answers
// (float32 [tokens, n_used, hidden_size], the rows of misses only), and three words, each on its own cache line:
//
//     requested  written by the GPU when a request is complete
//     answered   written by the CPU when its answer is
//     abandoned  not 0 once the CPU cannot answer any more: the graph then runs to its end, with wrong values
//
// A request's number is step * (n_layers + 1) + layer + 1, and step * (n_layers + 1) + n_layers + 1 says that the step is
// over. `step` is counted up by the host and read from device memory, so one graph serves every token and no flag is
// ever reset. A layer without misses makes no request: the CPU sees from the next number that it was skipped, and it
// cannot be overtaken, since a request is written only after the one before was answered.
//
// Order: all threads store, fence and meet; then one thread stores the number with release semantics. The CPU reads the
// number (acquire), then the request; it stores its answer, then the number (release). The GPU reads that with acquire,
// and the kernels after it read the answers past their caches.
#include "common.cuh"

constexpr int THREADS = 512;

DEVICE unsigned request_number(const unsigned *step, int layer, int n_layers) {
    return *step * (unsigned)(n_layers + 1) + (unsigned)layer + 1;
}

// Grid: 1 block. missing_ids [tokens, n_used] gets the ids without a slot and -1 for the others, request_x
// [tokens, hidden_size] the activations. *n_misses (device memory) is for `await_answer`.
KERNEL(THREADS)
publish_misses(const int *ids, const int *slots, int n_used, const float *x, int64_t x_stride, int hidden_size,
               int *missing_ids, float *request_x, unsigned *requested, const unsigned *step, int layer, int n_layers,
               int *n_misses, const int *n_tokens) {
    begin_kernel();
    const int n = *n_tokens * n_used, thread = threadIdx.x;
    int is_missing = 0;
    for (int i = thread; i < n; i += THREADS)
        is_missing |= ids[i] >= 0 && slots[ids[i]] < 0;
    is_missing = __syncthreads_or(is_missing);
    if (thread == 0)
        *n_misses = is_missing;
    if (!is_missing)
        return;
    for (int i = thread; i < n; i += THREADS)
        missing_ids[i] = ids[i] >= 0 && slots[ids[i]] < 0 ? ids[i] : -1;
    for (int t = 0; t < *n_tokens; t++)
        for (int i = thread; i < hidden_size; i += THREADS)
            request_x[(int64_t)t * hidden_size + i] = x[t * x_stride + i];
    __threadfence_system();
    __syncthreads();
    if (thread == 0)
        st_release_sys(requested, request_number(step, layer, n_layers));
}

// Grid: 1 block of 1 thread.
KERNEL(1)
await_answer(const unsigned *answered, const unsigned *abandoned, const unsigned *step, int layer, int n_layers,
             const int *n_misses) {
    begin_kernel();
    if (!*n_misses)
        return;
    const unsigned number = request_number(step, layer, n_layers);
    while (ld_acquire_sys(answered) != number && !ld_acquire_sys(abandoned))
        __nanosleep(100);
}

// Grid: 1 block of 1 thread. After the last layer: lets the CPU's loop end.
KERNEL(1)
publish_end(unsigned *requested, const unsigned *step, int n_layers) {
    begin_kernel();
    st_release_sys(requested, request_number(step, n_layers, n_layers));
}
