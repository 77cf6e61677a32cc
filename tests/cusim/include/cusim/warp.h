// Barriers and warp intrinsics. Each warp intrinsic is one `cusim_collective`: every lane of the mask hands over a
// payload, the last one to arrive runs the exchange for all of them.
#pragma once

#include "runtime.h"

static inline void __syncthreads(cusim_site site = CUSIM_SITE("__syncthreads")) {
    cusim_barrier(CUSIM_BARRIER, 0, site);
}
static inline int __syncthreads_count(int p, cusim_site site = CUSIM_SITE("__syncthreads_count")) {
    return cusim_barrier(CUSIM_BARRIER_COUNT, p, site);
}
static inline int __syncthreads_and(int p, cusim_site site = CUSIM_SITE("__syncthreads_and")) {
    return cusim_barrier(CUSIM_BARRIER_AND, p, site);
}
static inline int __syncthreads_or(int p, cusim_site site = CUSIM_SITE("__syncthreads_or")) {
    return cusim_barrier(CUSIM_BARRIER_OR, p, site);
}

static inline void cusim_exchange_nothing(void **, unsigned) {}
static inline void __syncwarp(unsigned mask = 0xffffffffu, cusim_site site = CUSIM_SITE("__syncwarp")) {
    cusim_collective(mask, cusim_exchange_nothing, nullptr, true, site);
}
static inline unsigned __activemask() { return cusim_activemask(); }

// --- shuffles: values of up to 8 bytes ---
struct cusim_shuffled {
    uint64_t value, result;
    int source;
};

static inline void cusim_exchange_shuffle(void **payloads, unsigned lanes) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        cusim_shuffled *own = (cusim_shuffled *)payloads[lane];
        if (!(lanes >> own->source & 1))
            cusim_fail("lane %d shuffles from lane %d, which is not in the mask or has exited (lanes %08x)", lane,
                       own->source, lanes);
        own->result = ((cusim_shuffled *)payloads[own->source])->value;
    }
}

template <class T> static inline T cusim_shuffle(unsigned mask, T value, int source, cusim_site site) {
    static_assert(sizeof(T) <= 8 && __is_trivially_copyable(T), "a shuffle moves up to 8 bytes");
    cusim_shuffled own = {0, 0, source};
    memcpy(&own.value, &value, sizeof(T));
    cusim_collective(mask, cusim_exchange_shuffle, &own, false, site);
    memcpy((void *)&value, &own.result, sizeof(T));
    return value;
}

template <class T>
static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, cusim_site site = CUSIM_SITE("__shfl_sync")) {
    int first = (int)cusim_current->lane & ~(width - 1);
    return cusim_shuffle(mask, v, first | (source & (width - 1)), site);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32,
                                cusim_site site = CUSIM_SITE("__shfl_xor_sync")) {
    int lane = (int)cusim_current->lane, last = lane | (width - 1), source = lane ^ bits;
    return cusim_shuffle(mask, v, source > last ? lane : source, site);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32,
                                 cusim_site site = CUSIM_SITE("__shfl_down_sync")) {
    int lane = (int)cusim_current->lane, last = lane | (width - 1), source = lane + (int)by;
    return cusim_shuffle(mask, v, source > last ? lane : source, site);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32,
                               cusim_site site = CUSIM_SITE("__shfl_up_sync")) {
    int lane = (int)cusim_current->lane, first = lane & ~(width - 1), source = lane - (int)by;
    return cusim_shuffle(mask, v, source < first ? lane : source, site);
}

// --- votes and matches ---
struct cusim_vote {
    uint64_t value;
    unsigned result, voters;
};

static inline void cusim_exchange_vote(void **payloads, unsigned lanes) {
    unsigned yes = 0;
    for (int lane = 0; lane < 32; lane++)
        if (lanes >> lane & 1)
            yes |= (((cusim_vote *)payloads[lane])->value ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; lane++)
        if (lanes >> lane & 1) {
            ((cusim_vote *)payloads[lane])->result = yes;
            ((cusim_vote *)payloads[lane])->voters = lanes;
        }
}
static inline cusim_vote cusim_take_vote(unsigned mask, int predicate, cusim_site site) {
    cusim_vote vote = {(uint64_t)(predicate != 0), 0, 0};
    cusim_collective(mask, cusim_exchange_vote, &vote, false, site);
    return vote;
}
static inline unsigned __ballot_sync(unsigned mask, int p, cusim_site site = CUSIM_SITE("__ballot_sync")) {
    return cusim_take_vote(mask, p, site).result;
}
static inline int __any_sync(unsigned mask, int p, cusim_site site = CUSIM_SITE("__any_sync")) {
    return cusim_take_vote(mask, p, site).result != 0;
}
static inline int __all_sync(unsigned mask, int p, cusim_site site = CUSIM_SITE("__all_sync")) {
    cusim_vote vote = cusim_take_vote(mask, p, site);
    return vote.result == vote.voters;
}

static inline void cusim_exchange_match(void **payloads, unsigned lanes) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        cusim_vote *own = (cusim_vote *)payloads[lane];
        for (int other = 0; other < 32; other++)
            if ((lanes >> other & 1) && ((cusim_vote *)payloads[other])->value == own->value)
                own->result |= 1u << other;
    }
}
template <class T>
static inline unsigned __match_any_sync(unsigned mask, T v, cusim_site site = CUSIM_SITE("__match_any_sync")) {
    cusim_vote vote = {0, 0, 0};
    memcpy(&vote.value, &v, sizeof v);
    cusim_collective(mask, cusim_exchange_match, &vote, false, site);
    return vote.result;
}

// --- reductions of 32-bit integers ---
template <class T, class Combine> static void cusim_exchange_reduce(void **payloads, unsigned lanes) {
    int first = __builtin_ctz(lanes);
    T total = *(T *)payloads[first];
    for (int lane = first + 1; lane < 32; lane++)
        if (lanes >> lane & 1)
            total = Combine()(total, *(T *)payloads[lane]);
    for (int lane = first; lane < 32; lane++)
        if (lanes >> lane & 1)
            *(T *)payloads[lane] = total;
}

#define CUSIM_REDUCTION(T, name, expression)                                                                           \
    struct cusim_##name##_##T {                                                                                        \
        T operator()(T a, T b) const { return (T)(expression); }                                                       \
    };                                                                                                                 \
    static inline T __reduce_##name##_sync(unsigned mask, T v,                                                         \
                                           cusim_site site = CUSIM_SITE("__reduce_" #name "_sync")) {                  \
        cusim_collective(mask, cusim_exchange_reduce<T, cusim_##name##_##T>, &v, false, site);                         \
        return v;                                                                                                      \
    }
CUSIM_REDUCTION(int, add, (unsigned)a + (unsigned)b)
CUSIM_REDUCTION(int, min, b < a ? b : a)
CUSIM_REDUCTION(int, max, b > a ? b : a)
CUSIM_REDUCTION(unsigned, add, a + b)
CUSIM_REDUCTION(unsigned, min, b < a ? b : a)
CUSIM_REDUCTION(unsigned, max, b > a ? b : a)
CUSIM_REDUCTION(unsigned, and, a & b)
CUSIM_REDUCTION(unsigned, or, a | b)
CUSIM_REDUCTION(unsigned, xor, a ^ b)
