// What kernels, the runtime, the stand-in driver and Python agree on.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "vector_types.h"

// Where a barrier or intrinsic was called, for messages and to tell two calls apart. As a default argument,
// CUSIM_SITE is the caller's line: through a function, since g++ gives the builtins in braces their own line.
struct cusim_site {
    const char *intrinsic, *file;
    int line;
};
static constexpr cusim_site cusim_here(const char *intrinsic, const char *file = __builtin_FILE(),
                                       int line = __builtin_LINE()) {
    return {intrinsic, file, line};
}
#define CUSIM_SITE(name) cusim_here(name)

// The CUDA thread that runs now: what threadIdx, blockIdx, ... read.
struct cusim_thread {
    uint3 thread_index, block_index;
    dim3 block_dim, grid_dim;
    unsigned linear, lane, warp; // index in the block, x fastest; linear % 32; linear / 32
};

enum cusim_barrier_kind { CUSIM_BARRIER, CUSIM_BARRIER_COUNT, CUSIM_BARRIER_AND, CUSIM_BARRIER_OR };

// Runs once for a whole warp intrinsic, in the last lane to arrive: `payloads[lane]` for each lane whose bit is set.
typedef void (*cusim_exchange)(void **payloads, unsigned lanes);

struct cusim_param {
    size_t size;
    char kind; // 'p' pointer, 'f' floating point, 'i' integer, 's' anything else, passed by value
};

// Modules end their table `cusim_kernels` with a kernel without a name.
struct cusim_kernel {
    const char *name;
    void (*entry)(void **params);
    size_t n_params;
    const struct cusim_param *params;
};

enum cusim_order { CUSIM_FORWARD, CUSIM_REVERSE, CUSIM_RANDOM };

extern "C" {
extern __thread cusim_thread *cusim_current __attribute__((tls_model("initial-exec")));

// --- called by kernels, through the headers beside this one ---
int cusim_barrier(cusim_barrier_kind kind, int predicate, cusim_site site);
void cusim_collective(unsigned mask, cusim_exchange exchange, void *payload, bool orders_memory, cusim_site site);
unsigned cusim_activemask(void);
void cusim_yield(void); // lets the other threads of the block run
void cusim_fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void *cusim_dynamic_shared(void);
void cusim_copy_async(void *to, const void *from, size_t n_bytes, size_t n_valid, void *pc);
void cusim_copy_commit(void);
void cusim_copy_wait(unsigned n_pending);
// Copies from shared memory on behalf of another lane of the warp, for intrinsics in which lanes read together.
void cusim_read_for_lane(unsigned lane, void *to, const void *from, size_t n_bytes, void *pc);

// --- called by launchers; one launch runs at a time, others wait ---
// Runs a kernel to its end. `static_shared` is any address in the module's thread-local block (module function
// `cusim_static_shared`). Returns 0, or 1 with a message in `error`.
int cusim_launch(const cusim_kernel *kernel, void **params, const unsigned grid[3], const unsigned block[3],
                 size_t dynamic_bytes, void *static_shared, char *error, size_t error_size);
void cusim_configure(int order, uint64_t seed, double spin_limit_s);
}
