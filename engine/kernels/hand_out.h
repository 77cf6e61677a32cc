// Hands out tasks to the threads of a team. Each thread has a range of its own, which it takes in order: what it reads
// is then one stream, and what it fetches ahead is its own. When its range is done it helps the others.
//
// Groups of tasks come in rounds, whose numbers rise. A counter says how much of its thread's range is taken in which
// round; whoever comes first in a round starts it, so nobody has to reset the counters and no barrier is needed.
#ifndef ENGINE_HAND_OUT_H
#define ENGINE_HAND_OUT_H

#include "team.h"

#include <stdint.h>

enum { BITS_OF_COUNT = 24, LARGEST_COUNT = (1 << BITS_OF_COUNT) - 1 };

// round << BITS_OF_COUNT | what is counted in it; zero before the first round, which is 1.
typedef struct {
    _Alignas(2 * CACHE_LINE) _Atomic uint64_t value;
} round_counter;

static inline uint64_t count_in_round(uint64_t round, int64_t count) {
    return round << BITS_OF_COUNT | (uint64_t)count;
}

// The count of a value in a round, 0 where it is one of an earlier round, -1 of a later one.
static inline int64_t count_of(uint64_t value, uint64_t round) {
    const uint64_t its_round = value >> BITS_OF_COUNT;
    return its_round == round ? (int64_t)(value & LARGEST_COUNT) : its_round < round ? 0 : -1;
}

// Adds to what is counted in a round, and returns that. What others did before they added is visible then.
static inline int64_t add_in_round(round_counter *counter, uint64_t round, int64_t n) {
    uint64_t seen = atomic_load_explicit(&counter->value, memory_order_relaxed);
    for (;;) {
        const int64_t count = count_of(seen, round) + n;
        if (atomic_compare_exchange_weak_explicit(&counter->value, &seen, count_in_round(round, count),
                                                  memory_order_acq_rel, memory_order_relaxed))
            return count;
    }
}

static inline int64_t take_from_range(round_counter *counter, uint64_t round, int64_t n_tasks) {
    uint64_t seen = atomic_load_explicit(&counter->value, memory_order_relaxed);
    for (;;) {
        const int64_t n_taken = count_of(seen, round);
        if (n_taken < 0 || n_taken >= n_tasks) // a later round begins only when nothing is left of this one
            return -1;
        if (atomic_compare_exchange_weak_explicit(&counter->value, &seen, count_in_round(round, n_taken + 1),
                                                  memory_order_relaxed, memory_order_relaxed))
            return n_taken;
    }
}

// The next task of 0..n_tasks - 1 for a thread, -1 if none is left. n_tasks must be below 2^24 * n_threads.
static inline int take_task(round_counter *counters, uint64_t round, int n_tasks, int thread, int n_threads) {
    for (int i = 0; i < n_threads; i++) {
        const int owner = (thread + i) % n_threads;
        const int64_t first = (int64_t)n_tasks * owner / n_threads, end = (int64_t)n_tasks * (owner + 1) / n_threads;
        const int64_t task = take_from_range(&counters[owner], round, end - first);
        if (task >= 0)
            return (int)(first + task);
    }
    return -1;
}

#endif
