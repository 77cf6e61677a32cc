// A race detector for shared memory. Kernels are compiled with -fsanitize=thread and linked with the hooks below
// instead of libtsan. A race is two accesses to one byte by two threads, at least one a write and not both atomic, that
// no __syncthreads and (within a warp) no __syncwarp separates. So the verdict does not depend on the schedule.
#include "race.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <vector>

namespace {

struct Access {
    Moment moment;
    void *pc;
    bool is_atomic;
};

// The last write of a byte, its last read, and the last read by another warp, or at least another thread, than that.
// Those suffice: a write is ordered after all reads of this epoch only if it is ordered after these two.
struct Shadow {
    Access write, read, other_read;
};

struct Region {
    const char *name, *start;
    size_t n_bytes;
    std::vector<Shadow> shadow;
};

struct Report {
    bool first_writes, second_writes;
    Access first, second;
    const Region *region;
    size_t offset;
};

Region regions[2] = {{"static", nullptr, 0, {}}, {"dynamic", nullptr, 0, {}}};
std::vector<Report> reports;

bool are_ordered(const Access &before, const Access &now) {
    const Moment &a = before.moment, &b = now.moment;
    return a.block_epoch != b.block_epoch || a.thread == b.thread || (a.warp == b.warp && a.warp_epoch < b.warp_epoch) ||
           (before.is_atomic && now.is_atomic);
}

void report(const Access &first, bool first_writes, const Access &second, bool second_writes, const Region &region,
            size_t offset) {
    for (const Report &known : reports)
        if (known.first.pc == first.pc && known.second.pc == second.pc && known.first_writes == first_writes)
            return;
    reports.push_back({first_writes, second_writes, first, second, &region, offset});
}

void access_byte(Region &region, size_t offset, const Access &now, bool is_write) {
    Shadow &byte = region.shadow[offset];
    if (!are_ordered(byte.write, now))
        report(byte.write, true, now, is_write, region, offset);
    if (is_write) {
        for (const Access *read : {&byte.read, &byte.other_read})
            if (!are_ordered(*read, now)) {
                report(*read, false, now, true, region, offset);
                break;
            }
        byte.write = now;
        return;
    }
    if (byte.read.moment.block_epoch == now.moment.block_epoch && byte.read.moment.thread != now.moment.thread) {
        bool other_is_in_another_warp = byte.other_read.moment.block_epoch == now.moment.block_epoch &&
                                        byte.other_read.moment.warp != now.moment.warp;
        if (byte.read.moment.warp != now.moment.warp || !other_is_in_another_warp)
            byte.other_read = byte.read;
    }
    byte.read = now;
}

std::string place(void *pc) {
    Dl_info info;
    char text[512];
    if (!dladdr(pc, &info) || !info.dli_fname)
        return "[unknown]";
    snprintf(text, sizeof text, "[%s+0x%zx]", info.dli_fname, (size_t)((char *)pc - (char *)info.dli_fbase - 1));
    return text;
}

} // namespace

void race_begin(char *static_shared, size_t static_bytes, char *dynamic_shared, size_t dynamic_bytes) {
    reports.clear();
    regions[0].start = static_shared;
    regions[0].n_bytes = static_bytes;
    regions[1].start = dynamic_shared;
    regions[1].n_bytes = dynamic_bytes;
    for (Region &region : regions)
        region.shadow.resize(std::max(region.shadow.size(), region.n_bytes)); // epochs of former launches are long past
}

void race_access(const Moment &moment, const void *p, size_t n_bytes, bool is_write, bool is_atomic, void *pc) {
    for (Region &region : regions) {
        size_t offset = (size_t)((const char *)p - region.start);
        if (offset >= region.n_bytes)
            continue;
        for (size_t i = offset; i < std::min(offset + n_bytes, region.n_bytes); i++)
            access_byte(region, i, {moment, pc, is_atomic}, is_write);
        return;
    }
}

std::string race_report() {
    std::string text;
    for (const Report &r : reports) {
        char line[256];
        snprintf(line, sizeof line, "race in %s shared memory +%zu: thread %u %s at ", r.region->name, r.offset,
                 r.first.moment.thread, r.first_writes ? "writes" : "reads");
        text += line + place(r.first.pc);
        snprintf(line, sizeof line, ", thread %u %s at ", r.second.moment.thread, r.second_writes ? "writes" : "reads");
        text += line + place(r.second.pc) + ", no barrier between\n";
    }
    return text;
}

// --- the hooks that gcc calls for -fsanitize=thread ---

static inline void hook(const volatile void *p, size_t n_bytes, bool is_write, bool is_atomic, void *pc) {
    Moment moment;
    if (race_moment(&moment))
        race_access(moment, (const void *)p, n_bytes, is_write, is_atomic, pc);
}

#define HOOK extern "C" __attribute__((visibility("default")))
#define PC __builtin_return_address(0)

#define HOOKS_OF_SIZE(n)                                                                                               \
    HOOK void __tsan_read##n(void *p) { hook(p, n, false, false, PC); }                                                \
    HOOK void __tsan_write##n(void *p) { hook(p, n, true, false, PC); }                                                \
    HOOK void __tsan_unaligned_read##n(void *p) { hook(p, n, false, false, PC); }                                      \
    HOOK void __tsan_unaligned_write##n(void *p) { hook(p, n, true, false, PC); }                                      \
    HOOK void __tsan_volatile_read##n(void *p) { hook(p, n, false, false, PC); }                                       \
    HOOK void __tsan_volatile_write##n(void *p) { hook(p, n, true, false, PC); }
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)

HOOK void __tsan_read_range(void *p, size_t n) { hook(p, n, false, false, PC); }
HOOK void __tsan_write_range(void *p, size_t n) { hook(p, n, true, false, PC); }
HOOK void *__tsan_memcpy(void *to, const void *from, size_t n) {
    hook(from, n, false, false, PC);
    hook(to, n, true, false, PC);
    return memcpy(to, from, n);
}
HOOK void *__tsan_memmove(void *to, const void *from, size_t n) {
    hook(from, n, false, false, PC);
    hook(to, n, true, false, PC);
    return memmove(to, from, n);
}
HOOK void *__tsan_memset(void *to, int value, size_t n) {
    hook(to, n, true, false, PC);
    return memset(to, value, n);
}

#define ATOMIC_HOOKS(bits, T)                                                                                          \
    HOOK T __tsan_atomic##bits##_load(const volatile T *p, int) {                                                      \
        hook(p, sizeof(T), false, true, PC);                                                                           \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                   \
    }                                                                                                                  \
    HOOK void __tsan_atomic##bits##_store(volatile T *p, T v, int) {                                                   \
        hook(p, sizeof(T), true, true, PC);                                                                            \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                      \
    }                                                                                                                  \
    HOOK bool __tsan_atomic##bits##_compare_exchange_strong(volatile T *p, T *expected, T v, int, int) {               \
        hook(p, sizeof(T), true, true, PC);                                                                            \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
    }                                                                                                                  \
    HOOK bool __tsan_atomic##bits##_compare_exchange_weak(volatile T *p, T *expected, T v, int, int) {                 \
        hook(p, sizeof(T), true, true, PC);                                                                            \
        return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
    }                                                                                                                  \
    ATOMIC_UPDATE_HOOK(bits, T, exchange, __atomic_exchange_n)                                                         \
    ATOMIC_UPDATE_HOOK(bits, T, fetch_add, __atomic_fetch_add)                                                         \
    ATOMIC_UPDATE_HOOK(bits, T, fetch_sub, __atomic_fetch_sub)                                                         \
    ATOMIC_UPDATE_HOOK(bits, T, fetch_and, __atomic_fetch_and)                                                         \
    ATOMIC_UPDATE_HOOK(bits, T, fetch_or, __atomic_fetch_or)                                                           \
    ATOMIC_UPDATE_HOOK(bits, T, fetch_xor, __atomic_fetch_xor)
#define ATOMIC_UPDATE_HOOK(bits, T, name, builtin)                                                                     \
    HOOK T __tsan_atomic##bits##_##name(volatile T *p, T v, int) {                                                     \
        hook(p, sizeof(T), true, true, PC);                                                                            \
        return builtin(p, v, __ATOMIC_SEQ_CST);                                                                        \
    }
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)

HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void *) {}
HOOK void __tsan_func_exit() {}
