// The race detector's interface to the scheduler. Without CUSIM_RACE it is nothing.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string>

// Where a thread stands in the order that barriers make.
struct Moment {
    uint32_t block_epoch; // grows with every __syncthreads and every block
    uint32_t warp_epoch;  // grows with every __syncwarp of the whole warp
    uint16_t thread, warp;
};

#ifdef CUSIM_RACE
// Forgets former reports; watches the shared memory of one launch.
void race_begin(char *static_shared, size_t static_bytes, char *dynamic_shared, size_t dynamic_bytes);
void race_access(const Moment &moment, const void *p, size_t n_bytes, bool is_write, bool is_atomic, void *pc);
// One line for each kind of conflict found, "" for none. Places are [library+0xoffset].
std::string race_report();
// The running thread; false outside a kernel. (In the scheduler.)
bool race_moment(Moment *moment);
#else
static inline void race_begin(char *, size_t, char *, size_t) {}
static inline void race_access(const Moment &, const void *, size_t, bool, bool, void *) {}
static inline std::string race_report() { return ""; }
#endif
