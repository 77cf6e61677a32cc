// A barrier for threads that meet every few microseconds: it spins, gives the core away only after a while, so that
// more threads than cores still get on, and sleeps in between when it has waited for longer than any step of decoding
// does.
#ifndef ENGINE_TEAM_H
#define ENGINE_TEAM_H

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <strings.h>
#include <time.h>

#if defined(__x86_64__) || defined(_M_X64)
#define CPU_PAUSE() __builtin_ia32_pause()
#else
#define CPU_PAUSE() atomic_signal_fence(memory_order_seq_cst)
#endif

enum { CACHE_LINE = 64, SPINS_BEFORE_YIELD = 2000, PASSIVE_SPINS = 20, NAP_NS = 50000 };

#define PATIENCE_S 0.003 // several layers of a large model on a GPU, or its output head

static inline double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// For a thread that has waited for so many seconds: others get its core, for at least a moment.
static inline void give_core_away(double waited_s) {
    if (waited_s < PATIENCE_S)
        sched_yield();
    else
        nanosleep(&(struct timespec){0, NAP_NS}, NULL);
}

// How often a waiting thread looks before it gives its core away: hardly ever where OpenMP's own threads are told to
// wait passively, because other processes need the cores.
static inline int spins_before_yield(void) {
    const char *policy = getenv("OMP_WAIT_POLICY");
    return policy && !strcasecmp(policy, "passive") ? PASSIVE_SPINS : SPINS_BEFORE_YIELD;
}

// What a thread does between two looks at what it waits for: it spins, and gives its core away after so many looks.
typedef struct {
    int n_spins, n_looks;
    double since;
} waiting;

static inline void wait_a_moment(waiting *w) {
    if (w->n_looks++ < w->n_spins) {
        CPU_PAUSE();
        return;
    }
    const double now = seconds_now();
    w->since = w->n_looks == w->n_spins + 1 ? now : w->since;
    give_core_away(now - w->since);
}

// A counter with two cache lines of its own (prefetchers fetch lines in pairs).
typedef struct {
    _Alignas(2 * CACHE_LINE) atomic_int value;
} padded_counter;

typedef struct {
    padded_counter arrived, generation;
    int n_spins; // see spins_before_yield
} team_barrier;

// Returns when all n_threads have called it; what they wrote before is visible after.
static inline void team_meet(team_barrier *barrier, int n_threads) {
    if (n_threads == 1)
        return;
    const int generation = atomic_load_explicit(&barrier->generation.value, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived.value, 1, memory_order_acq_rel) == n_threads - 1) {
        atomic_store_explicit(&barrier->arrived.value, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->generation.value, generation + 1, memory_order_release);
        return;
    }
    waiting w = {barrier->n_spins, 0, 0.0};
    while (atomic_load_explicit(&barrier->generation.value, memory_order_acquire) == generation)
        wait_a_moment(&w);
}

#endif
