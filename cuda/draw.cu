// The next token of each row of logits: the likeliest one, or one drawn with top-k, top-p and min-p. The definition is that of
// `engine/kernels/sampling.h`, and so are the bits: weights are whole numbers, so their sums do not depend on an order.
//
// Logits are dealt out to up to 1024 hands, 32 neighbours at a time. `find_maxima` notes the largest of each; k hands have a
// logit that reaches the k-th largest of these, so k logits or a few more are candidates, and only those are sorted. If that is
// not enough for a draw (a flat distribution without top-k, for one), the answer is -1: the CPU has to look at all logits.
//
// `draws` says how, for each row; top_k 1 is greedy, -1 asks for nothing. Ids whose bit in `allowed` is 0 are never drawn.
#include "last_block.cuh"

constexpr int MOST = 1024; // hands, and candidates: one for each thread that draws
constexpr int MOST_TOP_K = 256;
constexpr int WITHOUT_TOP_K = 128; // candidates that are looked for then, at least
constexpr int FINDERS = 256;       // threads of a block that finds maxima
constexpr int EXACT_BITS = 20;     // of a limit that many hands are to reach; by the others it may be too low

DEVICE float infinity() { return __uint_as_float(0x7f800000u); }

struct Draw {
    double uniform, top_p, min_p;
    float inverse_temperature;
    int top_k; // 0: all
};

struct Logits {
    const float *rows;
    int64_t stride;
    const unsigned *allowed;  // bits
    const Draw *draws;        // [rows]
    float *maxima;            // [rows, MOST], of the hands
    unsigned long long *sums; // [rows] of all weights; 0 before and after
    unsigned *n_done;         // [rows], likewise
    int n, n_hands;

    // Of how many the best a draw is, all included.
    __device__ __forceinline__ int n_top(const Draw &draw) const { return draw.top_k > 0 && draw.top_k < n ? draw.top_k : n; }
    __device__ __forceinline__ bool asks(int row) const { return draws[row].top_k >= 0 && draws[row].top_k <= MOST_TOP_K; }

    // Of a hand, the lane's in some round; there are so many rounds.
    __device__ __forceinline__ int id(int hand, int round) const {
        return (round * n_hands + hand) * WARP + (int)threadIdx.x % WARP;
    }
    __device__ __forceinline__ int n_rounds() const { return (n + n_hands * WARP - 1) / (n_hands * WARP); }

    // One that can be drawn, or -infinity.
    __device__ __forceinline__ float at(int row, int id) const {
        if (id >= n)
            return -infinity();
        const float logit = rows[row * stride + id];
        return (allowed[id / 32] >> id % 32 & 1) && logit >= NEVER ? logit : -infinity();
    }
};

// A number that is larger for a larger logit; 0 for what cannot be drawn.
DEVICE unsigned order_of(float logit) {
    const unsigned bits = __float_as_uint(logit + 0.0f); // + 0: no minus zero
    return !(logit >= NEVER) ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One that is larger for what comes first: the larger logit, the lower id.
DEVICE unsigned long long key_of(unsigned order, int id) { return (unsigned long long)order << 32 | (unsigned)~id; }

DEVICE int id_of(unsigned long long key) { return (int)~(unsigned)key; }

DEVICE float logit_of(unsigned long long key) {
    const unsigned order = (unsigned)(key >> 32);
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

struct Weighing {
    float largest, inverse_temperature;

    __device__ __forceinline__ float weight(float logit) const {
        return exp_canonical((logit - largest) * inverse_temperature);
    }
};

// A weight as a multiple of 2^-40.
DEVICE long long units(float weight) { return (long long)rintf(weight * 0x1p40f); }

// Grid: (ceil(hands / 8), rows).
KERNEL(FINDERS) find_maxima(Logits logits, const int *n_rows) {
    begin_kernel();
    const int row = blockIdx.y, hand = (blockIdx.x * FINDERS + threadIdx.x) / WARP;
    if (row >= *n_rows || hand >= logits.n_hands || !logits.asks(row))
        return;
    float largest = -infinity();
    for (int round = 0; round < logits.n_rounds(); round++)
        largest = fmaxf(largest, logits.at(row, logits.id(hand, round)));
    largest = warp_max(largest);
    if (threadIdx.x % WARP == 0)
        logits.maxima[row * MOST + hand] = largest;
}

// Candidates, what is known of each, and what a block needs besides.
struct Candidates {
    unsigned long long found[MOST], keys[MOST]; // as they were found, and sorted
    long long sums[MOST];                       // of the weights up to each
    int hands[MOST];
    int n, n_hands, first_out, chosen;
    unsigned long long all;        // weights
    long long totals[MOST / WARP]; // of the weights of each warp
    float maxima[MOST / WARP];
};

// Collects and sorts k candidates or some more, by the whole block; returns whether they are all that can be drawn.
// `largest`: of the thread's hand. More than MOST are counted, but not kept.
DEVICE bool collect(const Logits &logits, int row, int k, float largest, Candidates &c) {
    constexpr int AT_ONCE = 8; // logits of a lane that are on the way together
    const int thread = threadIdx.x;
    const unsigned own = order_of(largest);
    const int n_hands = __syncthreads_count(own != 0);
    k = min(k, (n_hands * 7 + 7) / 8); // what the worst of them reach, too many logits do
    unsigned lowest = 0; // the largest number that k hands reach, bit by bit; any, if all logits can be kept
    for (int bit = 31; bit >= 32 - EXACT_BITS && logits.n > MOST; bit--)
        if (__syncthreads_count(own >= (lowest | 1u << bit)) >= k)
            lowest |= 1u << bit;
    if (thread == 0)
        c.n = c.n_hands = 0;
    __syncthreads();
    if (own && own >= lowest)
        c.hands[atomicAdd(&c.n_hands, 1)] = thread;
    __syncthreads();
    for (int i = thread / WARP; i < c.n_hands; i += MOST / WARP)
        for (int round = 0; round < logits.n_rounds(); round += AT_ONCE) {
            float x[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                x[j] = logits.at(row, logits.id(c.hands[i], round + j));
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const unsigned order = order_of(x[j]);
                if (!order || order < lowest)
                    continue;
                const int at = atomicAdd(&c.n, 1);
                if (at < MOST)
                    c.found[at] = key_of(order, logits.id(c.hands[i], round + j));
            }
        }
    __syncthreads();
    const int n = min(c.n, MOST);
    if (thread < n) { // its place is the number of those before it
        const unsigned long long key = c.found[thread];
        int rank = 0;
#pragma unroll 8
        for (int i = 0; i < n; i++)
            rank += c.found[i] > key;
        c.keys[rank] = key;
    }
    __syncthreads();
    return lowest == 0;
}

// Draws one of the candidates, by the whole block, as `draw` of sampling.c does: its id, or -1 if it takes more than these. A
// thread has the candidate of its rank.
DEVICE int draw_one(const Draw &draw, const Weighing &w, int n_top, int n_logits, bool is_all, Candidates &c) {
    const int n = c.n, rank = threadIdx.x, warp = rank / WARP, lane = rank % WARP;
    const float weight = rank < n ? w.weight(logit_of(c.keys[rank])) : 0.0f;
    long long sum = units(weight);
    for (int step = 1; step < WARP; step *= 2) {
        const long long before = __shfl_up_sync(ALL_LANES, sum, step);
        sum += lane >= step ? before : 0;
    }
    if (lane == WARP - 1)
        c.totals[warp] = sum;
    if (rank == 0)
        c.first_out = c.chosen = MOST;
    __syncthreads();
    for (int i = 0; i < warp; i++)
        sum += c.totals[i];
    c.sums[rank] = sum;
    __syncthreads();

    const bool has_top_k = n_top < n_logits;
    if (has_top_k && n < n_top && !is_all)
        return -1;
    long long total = has_top_k ? c.sums[min(n_top, n) - 1] : (long long)c.all;
    int n_kept = n_top;
    if (draw.top_p < 1.0 || draw.min_p > 0.0) {
        const double wanted = draw.top_p * (double)total;
        if (rank > 0 && rank < min(n_top, n) &&
            ((draw.top_p < 1.0 && (double)c.sums[rank - 1] >= wanted) || (double)weight < draw.min_p))
            atomicMin(&c.first_out, rank);
        __syncthreads();
        n_kept = min(c.first_out, min(n_top, n));
        if (n_kept < n_top && n_kept == n && !is_all)
            return -1;
        total = c.sums[n_kept - 1];
    }
    const int n_ranked = min(n_kept, n);
    if (rank < n_ranked && (double)sum > draw.uniform * (double)total)
        atomicMin(&c.chosen, rank);
    __syncthreads();
    if (c.chosen < n_ranked)
        return id_of(c.keys[c.chosen]);
    return n_kept <= n || is_all ? id_of(c.keys[n_ranked - 1]) : -1; // the last one: uniform was next to 1
}

// chosen: [rows], in host memory. Grid: (any number, rows); the last block of a row draws.
KERNEL(MOST) draw(Logits logits, int *chosen, const int *n_rows) {
    __shared__ Candidates c;
    begin_kernel();
    const int row = blockIdx.y, thread = threadIdx.x, lane = thread % WARP;
    if (row >= *n_rows || !logits.asks(row))
        return;
    const Draw draw = logits.draws[row];
    const int n_top = logits.n_top(draw);
    const float own = thread < logits.n_hands ? logits.maxima[row * MOST + thread] : -infinity();
    const float of_warp = warp_max(own);
    if (lane == 0)
        c.maxima[thread / WARP] = of_warp;
    if (thread == 0)
        c.all = 0;
    __syncthreads();
    const Weighing weighing = {warp_max(c.maxima[lane]), draw.inverse_temperature};
    const bool can_weigh = weighing.largest >= NEVER && weighing.largest < infinity();

    if (can_weigh && n_top == logits.n) {
        long long sum = 0;
        for (int id = blockIdx.x * MOST + thread; id < logits.n; id += gridDim.x * MOST)
            sum += units(weighing.weight(logits.at(row, id)));
        for (int step = WARP / 2; step; step /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, step);
        if (lane == 0)
            atomicAdd(&c.all, (unsigned long long)sum);
        __syncthreads();
        if (thread == 0)
            atomicAdd(logits.sums + row, c.all);
    }
    if (!is_last_block(logits.n_done + row, gridDim.x))
        return;
    if (thread == 0)
        c.all = atomicExch(logits.sums + row, 0ull);
    int id = -1;
    if (can_weigh) {
        const bool is_all = collect(logits, row, draw.top_k ? draw.top_k : WITHOUT_TOP_K, own, c);
        if (c.n <= MOST)
            id = draw_one(draw, weighing, n_top, logits.n, is_all, c);
    }
    if (thread == 0)
        chosen[row] = id;
}
