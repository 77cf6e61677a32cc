// Runs CUDA kernels on one CPU core: each CUDA thread is a fiber, blocks run one after another, and a fiber runs until
// it waits for others (barrier, warp intrinsic, spinning) or ends. The order in which fibers and blocks run is a
// setting; a correct kernel gives the same result in every order.
#include "../include/cusim/runtime.h"
#include "fiber.h"
#include "race.h"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <link.h>
#include <memory>
#include <mutex>
#include <sched.h>
#include <string>
#include <vector>

#ifdef CUSIM_ASAN
#include <sanitizer/asan_interface.h>
#endif

#define API extern "C" __attribute__((visibility("default")))

__thread cusim_thread *cusim_current __attribute__((tls_model("initial-exec"), visibility("default")));

namespace {

const size_t MAX_DYNAMIC_BYTES = 227 << 10; // the most that any supported GPU gives a block
const unsigned MAX_THREADS = 1024;          // of a block
const int POISON = 0xff;                    // NaN in every float format

enum class State : uint8_t { Ready, AtBarrier, InCollective, Exited };

struct AsyncCopy {
    void *to;
    const void *from;
    size_t n_bytes, n_valid;
    void *pc;
    bool is_done;
};

struct Fiber : cusim_thread {
    Context context;
    State state;
    cusim_site site; // where it waits
    cusim_barrier_kind kind;
    int predicate, result; // of the barrier
    unsigned mask;         // of the collective, like the next three
    cusim_exchange exchange;
    void *payload;
    bool orders_memory;
    std::vector<AsyncCopy> copies;
    std::vector<size_t> groups; // how many of `copies` belong to each committed group or one before
};

struct Warp {
    unsigned exists, alive, waiting; // bits: lanes
    uint32_t epoch;
};

struct Scheduler {
    // settings
    cusim_order order = CUSIM_FORWARD;
    uint64_t random_state = 1;
    double spin_limit_s = 20;
    // the launch
    const cusim_kernel *kernel;
    void **params;
    Context main;
    std::vector<std::unique_ptr<Fiber>> fibers; // at least as many as the block has threads; kept
    std::string error;
    std::chrono::steady_clock::time_point started;
    unsigned n_yields;
    // the block
    int n_threads, n_alive, n_at_barrier;
    std::vector<Warp> warps;
    const Fiber *first_at_barrier;
    Fiber *running = nullptr;
    Fiber *ready[MAX_THREADS]; // a ring, the next one at `ready_head`
    unsigned ready_head, n_ready;
    uint32_t epoch = 0; // never goes back, so marks of former blocks and launches are always old
} s;

std::mutex launch_mutex;
alignas(1024) char dynamic_shared[MAX_DYNAMIC_BYTES];

uint64_t random_number() {
    uint64_t x = s.random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return s.random_state = x;
}

// --- who runs next ---

Fiber *&ready_at(unsigned i) { return s.ready[(s.ready_head + i) % MAX_THREADS]; }

// After all that are ready.
void make_ready(Fiber &fiber) {
    fiber.state = State::Ready;
    ready_at(s.n_ready++) = &fiber;
}

// Before all that are ready: the stacks of a warp that goes on at once are still in the CPU's caches.
void make_next(Fiber &fiber) {
    fiber.state = State::Ready;
    s.ready_head = (s.ready_head + MAX_THREADS - 1) % MAX_THREADS;
    s.n_ready++;
    ready_at(0) = &fiber;
}

// Takes a fiber out of the ready ones, the first or a random one; null if there is none.
Fiber *next_ready() {
    if (!s.n_ready)
        return nullptr;
    if (s.order == CUSIM_RANDOM)
        std::swap(ready_at(0), ready_at((unsigned)(random_number() % s.n_ready)));
    s.n_ready--;
    return s.ready[s.ready_head++ % MAX_THREADS];
}

void run(Context *from, Fiber *fiber) {
    s.running = fiber;
    cusim_current = fiber;
    context_switch(from, &fiber->context, false);
}

[[noreturn]] void abandon_launch(const std::string &error) {
    if (s.error.empty())
        s.error = error;
    context_switch(&s.running->context, &s.main, true);
    __builtin_unreachable();
}

std::string describe_waiting(const Fiber &fiber) {
    char text[512];
    switch (fiber.state) {
    case State::Exited:
        return "have exited";
    case State::InCollective:
        snprintf(text, sizeof text, "wait in %s with mask %08x (%s:%d)", fiber.site.intrinsic, fiber.mask,
                 fiber.site.file, fiber.site.line);
        return text;
    default:
        snprintf(text, sizeof text, "wait at %s (%s:%d)", fiber.site.intrinsic, fiber.site.file, fiber.site.line);
        return text;
    }
}

std::string describe_deadlock() {
    std::string text = "deadlock: ";
    const int max_groups = 8;
    int n_groups = 0;
    for (int first = 0, end; first < s.n_threads && n_groups < max_groups; first = end, n_groups++) {
        std::string what = describe_waiting(*s.fibers[first]);
        for (end = first + 1; end < s.n_threads && describe_waiting(*s.fibers[end]) == what;)
            end++;
        char range[64];
        snprintf(range, sizeof range, "%sthreads %d..%d ", n_groups ? "; " : "", first, end - 1);
        text += range + what;
    }
    return text;
}

// Lets others run until the running fiber is ready again and its turn comes.
void wait_for_turn(Fiber &self) {
    Fiber *next = next_ready();
    if (!next)
        abandon_launch(describe_deadlock());
    if (next != &self)
        run(&self.context, next);
}

// --- barriers and collectives ---

// Calls `visit` for the indices 0 .. n - 1, last first in the reverse order.
template <class F> void in_order(int n, F visit) {
    for (int i = 0; i < n; i++)
        visit(s.order == CUSIM_REVERSE ? n - 1 - i : i);
}

void open_barrier() {
    int n_true = 0, n_waiting = s.n_at_barrier;
    for (int i = 0; i < s.n_threads; i++)
        n_true += s.fibers[i]->state == State::AtBarrier && s.fibers[i]->predicate;
    s.n_at_barrier = 0;
    s.epoch++;
    in_order(s.n_threads, [&](int i) {
        Fiber &fiber = *s.fibers[i];
        if (fiber.state != State::AtBarrier)
            return;
        fiber.result = fiber.kind == CUSIM_BARRIER_COUNT ? n_true
                       : fiber.kind == CUSIM_BARRIER_AND ? n_true == n_waiting
                                                         : n_true != 0;
        make_ready(fiber);
    });
}

bool is_same_text(const char *a, const char *b) { return a == b || !strcmp(a, b); }

bool is_same_site(const cusim_site &a, const cusim_site &b) {
    return a.line == b.line && is_same_text(a.file, b.file) && is_same_text(a.intrinsic, b.intrinsic);
}

Fiber &lane_of(unsigned warp, unsigned lane) { return *s.fibers[32 * warp + lane]; }

// Completes the collective with this mask if every living lane of the mask waits in it.
void try_collective(unsigned warp_index, unsigned mask) {
    Warp &warp = s.warps[warp_index];
    unsigned lanes = mask & warp.alive;
    if (!lanes || (warp.waiting & lanes) != lanes)
        return;
    void *payloads[32];
    Fiber &first = lane_of(warp_index, (unsigned)__builtin_ctz(lanes));
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        Fiber &fiber = lane_of(warp_index, lane);
        if (fiber.mask != mask)
            return; // waits in another one: a deadlock, unless that completes first
        if (!is_same_site(fiber.site, first.site))
            cusim_fail(
                "lanes of warp %u with the same mask %08x are in different warp intrinsics: %s (%s:%d) and %s (%s:%d)",
                warp_index, mask, first.site.intrinsic, first.site.file, first.site.line, fiber.site.intrinsic,
                fiber.site.file, fiber.site.line);
        payloads[lane] = fiber.payload;
    }
    first.exchange(payloads, lanes);
    warp.waiting &= ~lanes;
    if (first.orders_memory && lanes == warp.alive)
        warp.epoch++;
    in_order(32, [&](int i) {
        unsigned lane = 31 - (unsigned)i; // the last one first, as each comes before the others
        if (lanes >> lane & 1)
            make_next(lane_of(warp_index, lane));
    });
}

// --- a thread's life ---

void thread_ends(Fiber &fiber) {
    fiber.state = State::Exited;
    s.n_alive--;
    Warp &warp = s.warps[fiber.warp];
    warp.alive &= ~(1u << fiber.lane);
    if (!fiber.copies.empty())
        cusim_fail("thread ends with cp_async copies that it never waited for");
    fiber.groups.clear();
    // the others may have waited for this one only
    if (s.n_alive && s.n_at_barrier == s.n_alive)
        open_barrier();
    for (unsigned lane = 0; lane < 32; lane++)
        if (warp.waiting >> lane & 1)
            try_collective(fiber.warp, lane_of(fiber.warp, lane).mask);
}

// A fiber outlives its thread: it runs one thread of each block.
void fiber_main() {
    context_entered();
    for (;;) {
        s.kernel->entry(s.params);
        Fiber &self = *s.running;
        thread_ends(self);
        Fiber *next = next_ready();
        if (next)
            run(&self.context, next);
        else if (s.n_alive)
            abandon_launch(describe_deadlock());
        else
            context_switch(&self.context, &s.main, false);
    }
}

void finish_copies(Fiber &fiber, size_t n) {
    for (size_t i = 0; i < n; i++) {
        AsyncCopy &copy = fiber.copies[i];
        if (!copy.is_done) {
            memcpy(copy.to, copy.from, copy.n_valid);
            memset((char *)copy.to + copy.n_valid, 0, copy.n_bytes - copy.n_valid);
        }
        Moment moment = {s.epoch, s.warps[fiber.warp].epoch, (uint16_t)fiber.linear, (uint16_t)fiber.warp};
        race_access(moment, copy.to, copy.n_bytes, true, false, copy.pc);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + (ptrdiff_t)n);
    for (size_t &end : fiber.groups)
        end -= n;
}

// --- the launch ---

struct Memory {
    char *start = nullptr;
    size_t n_bytes = 0;
};

// The thread-local block, of this OS thread, that holds `address`: the static shared memory of a module.
Memory thread_local_block(void *address) {
    struct Search {
        char *address;
        Memory found;
    } search = {(char *)address, {}};
    auto visit = [](dl_phdr_info *info, size_t, void *data) {
        Search &search = *(Search *)data;
        for (int i = 0; i < info->dlpi_phnum; i++) {
            char *start = (char *)info->dlpi_tls_data;
            size_t n_bytes = info->dlpi_phdr[i].p_memsz;
            if (info->dlpi_phdr[i].p_type == PT_TLS && start && search.address >= start &&
                search.address < start + n_bytes)
                search.found = {start, n_bytes};
        }
        return 0;
    };
    if (address)
        dl_iterate_phdr(visit, &search);
    return search.found;
}

void begin_block(uint3 index, dim3 grid, dim3 block, Memory static_shared, size_t dynamic_bytes) {
    if (static_shared.n_bytes)
        memset(static_shared.start, POISON, static_shared.n_bytes);
    memset(dynamic_shared, POISON, dynamic_bytes);
    s.n_alive = s.n_threads;
    s.n_at_barrier = 0;
    s.epoch++;
    s.ready_head = s.n_ready = 0;
    s.warps.assign((size_t)(s.n_threads + 31) / 32, Warp{0, 0, 0, 0});
    for (unsigned i = 0; i < (unsigned)s.n_threads; i++) {
        Fiber &fiber = *s.fibers[i];
        fiber.thread_index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        fiber.block_index = index;
        fiber.block_dim = block;
        fiber.grid_dim = grid;
        fiber.linear = i;
        fiber.lane = i % 32;
        fiber.warp = i / 32;
        s.warps[fiber.warp].exists |= 1u << fiber.lane;
        s.warps[fiber.warp].alive |= 1u << fiber.lane;
    }
    in_order(s.n_threads, [](int i) { make_ready(*s.fibers[i]); });
}

std::vector<uint64_t> order_of_blocks(uint64_t n) {
    std::vector<uint64_t> order(n);
    for (uint64_t i = 0; i < n; i++)
        order[i] = s.order == CUSIM_REVERSE ? n - 1 - i : i;
    if (s.order == CUSIM_RANDOM)
        for (uint64_t i = n; i > 1; i--)
            std::swap(order[i - 1], order[random_number() % i]);
    return order;
}

void reset_fibers() {
    for (auto &fiber : s.fibers) {
        context_prepare(&fiber->context, fiber_main);
        fiber->copies.clear();
        fiber->groups.clear();
    }
}

std::string check_geometry(const unsigned grid[3], const unsigned block[3], size_t dynamic_bytes) {
    uint64_t n_threads = (uint64_t)block[0] * block[1] * block[2];
    char text[160] = "";
    if (n_threads < 1 || n_threads > MAX_THREADS || block[2] > 64)
        snprintf(text, sizeof text, "a block of %u x %u x %u threads: 1 to 1024 are possible, 64 in z", block[0],
                 block[1], block[2]);
    else if (!grid[0] || !grid[1] || !grid[2] || grid[0] > (unsigned)INT32_MAX || grid[1] > 65535 || grid[2] > 65535)
        snprintf(text, sizeof text, "a grid of %u x %u x %u blocks: 1 to 2147483647 x 65535 x 65535 are possible",
                 grid[0], grid[1], grid[2]);
    else if (dynamic_bytes > MAX_DYNAMIC_BYTES)
        snprintf(text, sizeof text, "%zu bytes of dynamic shared memory: %zu are possible", dynamic_bytes,
                 MAX_DYNAMIC_BYTES);
    return text;
}

void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, Memory static_shared) {
    s.n_threads = (int)(block.x * block.y * block.z);
    while ((int)s.fibers.size() < s.n_threads) {
        s.fibers.push_back(std::make_unique<Fiber>());
        context_allocate(&s.fibers.back()->context);
        context_prepare(&s.fibers.back()->context, fiber_main);
    }
    s.started = std::chrono::steady_clock::now();
    s.n_yields = 0;
    for (uint64_t i : order_of_blocks((uint64_t)grid.x * grid.y * grid.z)) {
        uint3 index = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
        begin_block(index, grid, block, static_shared, dynamic_bytes);
        run(&s.main, next_ready());
        if (!s.error.empty())
            break;
    }
    s.running = nullptr;
    cusim_current = nullptr;
    if (!s.error.empty())
        reset_fibers();
}

} // namespace

#ifdef CUSIM_RACE
bool race_moment(Moment *moment) {
    const Fiber *self = s.running;
    if (!self || cusim_current != self)
        return false;
    *moment = {s.epoch, s.warps[self->warp].epoch, (uint16_t)self->linear, (uint16_t)self->warp};
    return true;
}
#endif

// --- what kernels call ---

API int cusim_barrier(cusim_barrier_kind kind, int predicate, cusim_site site) {
    Fiber &self = *s.running;
    if (!s.n_at_barrier)
        s.first_at_barrier = &self;
    const Fiber &first = *s.first_at_barrier; // with which all that came before have been compared
    if (s.n_at_barrier && !is_same_site(first.site, site))
        cusim_fail("divergent barrier: thread %d waits at %s (%s:%d), this one at %s (%s:%d)", first.linear,
                   first.site.intrinsic, first.site.file, first.site.line, site.intrinsic, site.file, site.line);
    self.kind = kind;
    self.predicate = predicate != 0;
    self.site = site;
    self.state = State::AtBarrier;
    if (++s.n_at_barrier == s.n_alive)
        open_barrier();
    wait_for_turn(self);
    return self.result;
}

API void cusim_collective(unsigned mask, cusim_exchange exchange, void *payload, bool orders_memory, cusim_site site) {
    Fiber &self = *s.running;
    Warp &warp = s.warps[self.warp];
    mask &= warp.exists;
    if (!(mask >> self.lane & 1))
        cusim_fail("%s (%s:%d) with mask %08x, which does not name the calling lane %u", site.intrinsic, site.file,
                   site.line, mask, self.lane);
    self.mask = mask;
    self.exchange = exchange;
    self.payload = payload;
    self.orders_memory = orders_memory;
    self.site = site;
    self.state = State::InCollective;
    warp.waiting |= 1u << self.lane;
    try_collective(self.warp, mask);
    wait_for_turn(self);
}

// Only the caller: legal, and it reveals code that relies on lanes running together.
API unsigned cusim_activemask(void) { return 1u << s.running->lane; }

API void cusim_yield(void) {
    Fiber &self = *s.running;
    if (++s.n_yields % 64 == 0) {
        sched_yield(); // the host thread that this kernel waits for may need the core
        std::chrono::duration<double> waited = std::chrono::steady_clock::now() - s.started;
        if (waited.count() > s.spin_limit_s)
            cusim_fail("kernel spins for more than %g s", s.spin_limit_s);
    }
    make_ready(self);
    wait_for_turn(self);
}

API void cusim_fail(const char *format, ...) {
    char text[1024], where[128];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    const Fiber &self = *s.running;
    snprintf(where, sizeof where, "block (%u, %u, %u), thread %u: ", self.block_index.x, self.block_index.y,
             self.block_index.z, self.linear);
    abandon_launch(where + std::string(text));
}

API void *cusim_dynamic_shared(void) { return dynamic_shared; }

// The hardware copies at some time between issue and wait. The orders try both ends: late shows a missing wait, early a
// buffer that was still being read.
API void cusim_copy_async(void *to, const void *from, size_t n_bytes, size_t n_valid, void *pc) {
    Fiber &self = *s.running;
    bool now = s.order == CUSIM_REVERSE || (s.order == CUSIM_RANDOM && random_number() % 2);
    if (now) {
        memcpy(to, from, n_valid);
        memset((char *)to + n_valid, 0, n_bytes - n_valid);
    }
    Moment moment = {s.epoch, s.warps[self.warp].epoch, (uint16_t)self.linear, (uint16_t)self.warp};
    race_access(moment, to, n_bytes, true, false, pc);
    self.copies.push_back({to, from, n_bytes, n_valid, pc, now});
}

API void cusim_copy_commit(void) { s.running->groups.push_back(s.running->copies.size()); }

API void cusim_copy_wait(unsigned n_pending) {
    Fiber &self = *s.running;
    if (self.groups.size() <= n_pending)
        return;
    size_t n_groups = self.groups.size() - n_pending, n_copies = self.groups[n_groups - 1];
    self.groups.erase(self.groups.begin(), self.groups.begin() + (ptrdiff_t)n_groups);
    finish_copies(self, n_copies);
}

API void cusim_read_for_lane(unsigned lane, void *to, const void *from, size_t n_bytes, void *pc) {
    unsigned warp = s.running->warp;
    Moment moment = {s.epoch, s.warps[warp].epoch, (uint16_t)(32 * warp + lane), (uint16_t)warp};
    race_access(moment, from, n_bytes, false, false, pc);
    memcpy(to, from, n_bytes);
}

// --- what launchers call ---

API void cusim_configure(int order, uint64_t seed, double spin_limit_s) {
    std::lock_guard<std::mutex> lock(launch_mutex);
    s.order = (cusim_order)order;
    s.random_state = seed * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u;
    s.random_state += !s.random_state;
    s.spin_limit_s = spin_limit_s;
}

API int cusim_launch(const cusim_kernel *kernel, void **params, const unsigned grid[3], const unsigned block[3],
                     size_t dynamic_bytes, void *static_shared, char *error, size_t error_size) {
    std::lock_guard<std::mutex> lock(launch_mutex);
    s.error = check_geometry(grid, block, dynamic_bytes);
    if (s.error.empty()) {
        s.kernel = kernel;
        s.params = params;
        context_adopt_thread(&s.main);
        Memory shared = thread_local_block(static_shared);
        race_begin(shared.start, shared.n_bytes, dynamic_shared, dynamic_bytes);
#ifdef CUSIM_ASAN
        __asan_poison_memory_region(dynamic_shared + dynamic_bytes, MAX_DYNAMIC_BYTES - dynamic_bytes);
#endif
        run_grid(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), dynamic_bytes, shared);
#ifdef CUSIM_ASAN
        __asan_unpoison_memory_region(dynamic_shared, MAX_DYNAMIC_BYTES);
#endif
    }
    if (s.error.empty())
        s.error = race_report();
    snprintf(error, error_size, "%s", s.error.c_str());
    return !s.error.empty();
}
