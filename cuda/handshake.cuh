// Misses: experts without a slot, which the CPU computes while the GPU computes the others.
//
// All of it goes through mapped host memory, one request at a time: the missing ids, the activations in the forms that the
// experts take (which are the CPU's, too), the CPU's answers (float32 [tokens, n_used, hidden_size], the rows of misses
// only), and three words, each on its own cache line:
//
//     requested  written by the GPU when a request is complete
//     answered   written by the CPU when its answer is
//     abandoned  not 0 once the CPU cannot answer any more: the graph then runs to its end, with wrong values
//
// A request's number is step * (n_layers + 1) + layer + 1, and step * (n_layers + 1) + n_layers + 1 says that the step asks
// for nothing more. `step` is counted up by the host and read from device memory, so one graph serves every token and no
// flag is ever reset. A layer without misses makes no request: the CPU sees from the next number that it was skipped, and
// it cannot be overtaken, since a request is written only after the one before was answered.
//
// A guess of what a later layer will ask for goes through ids and a word of its own, with the number of that request. Nobody
// answers it.
//
// Order: all threads store and meet; then one thread stores the number with release semantics, which holds for all that
// happened before: for the stores of those that it met, and of blocks whose results it has seen. The CPU reads the number
// (acquire), then the request; it stores its answer, then the number (release). The GPU reads that with acquire, and the
// kernels after it read the answers past their caches.
#pragma once

#include "common.cuh"

// Activation rows in one form, and where they go; no bytes for none.
struct Sent {
    const uint8_t *rows;
    int64_t stride;
    uint8_t *to; // one row behind the other
    int64_t row_bytes; // a multiple of 16

    // By threads first, first + 1 ... of n_threads.
    __device__ __forceinline__ void send(int n_tokens, int first, int n_threads) const {
        const int n_pieces = (int)(row_bytes / 16);
        for (int t = 0; t < n_tokens; t++)
#pragma unroll 1
            for (int i = first; i < n_pieces; i += n_threads)
                *(uint4 *)(to + t * row_bytes + 16 * i) = *(const uint4 *)(rows + t * stride + 16 * i);
    }
};

// Where a layer's request goes, and where the answer comes from.
struct Exchange {
    int *missing_ids; // [tokens, n_used]: the ids without a slot, and -1 for the others
    unsigned *requested;
    const unsigned *answered, *abandoned, *step;
    int *n_misses; // in device memory: whether there is anything to wait for
    int layer, n_layers;

    __device__ __forceinline__ unsigned number() const { return *step * (unsigned)(n_layers + 1) + (unsigned)layer + 1; }

    // Says of a choice whether it has no slot, which the CPU is told then. Every choice is noted, `place` being its place in
    // the ids of all tokens.
    __device__ __forceinline__ bool note(int place, int id, const int *slots) const {
        const bool is_missing = id >= 0 && slots[id] < 0;
        missing_ids[place] = is_missing ? id : -1;
        return is_missing;
    }

    // Asks for what was noted, by the whole block, if any of its threads knows of something; the activations are there, or
    // stored by this block.
    __device__ __forceinline__ void ask(bool is_missing) const {
        const bool asks = __syncthreads_or(is_missing);
        if (threadIdx.x == 0) {
            *n_misses = asks;
            if (asks)
                st_release_sys(requested, number());
        }
    }

    // Waits for the answer, if anything was asked, by the whole block.
    __device__ __forceinline__ void await() const {
        constexpr unsigned LOOKS = 64; // at the answer, for one at whether there will be any: all go to the host
        if (threadIdx.x == 0 && *n_misses) {
            const unsigned awaited = number();
            for (unsigned i = 1; ld_acquire_sys(answered) != awaited && (i % LOOKS || !ld_acquire_sys(abandoned)); i++)
                __nanosleep(20);
        }
        __syncthreads();
    }
};
