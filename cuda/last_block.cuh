// The last of some blocks to be done goes on with what they made together; nobody waits.
#pragma once

#include "common.cuh"

// Whether the calling block is the last of `n` to come here, by the whole block; it then sees what the others stored before
// (past the first-level cache, where it may have old contents). `n_done`: a word of device memory for these blocks, 0
// before and after.
DEVICE bool is_last_block(unsigned *n_done, unsigned n) {
    __shared__ int is_last;
    __syncthreads();
    if (threadIdx.x == 0)
        is_last = atomic_inc_acq_rel(n_done, n - 1) == n - 1; // which makes it 0 again
    __syncthreads();
    return is_last;
}
