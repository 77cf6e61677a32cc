// Attention of a step's tokens over the cache of keys and values: store the new keys and values; then, for few tokens,
// attend over parts of the positions and merge the parts, or, for many, both in one kernel.
//
// Compiled for KV_TYPE (0 float32, 1 float16, 2 int8 with a float16 scale for each 32 values), KEY_DIM and VALUE_DIM (of
// a head), GROUP (query heads that share a key head), HEADS (of a group that a block takes) and SHARED (1: there are no
// values of their own, a head's value is the first VALUE_DIM values of its key). A cache holds K and then V, each
// [n_slots, context_length, n_kv_heads, KEY_DIM or VALUE_DIM] of its type, and for int8 then the scales of K and of V,
// [n_slots, context_length, n_kv_heads, ceil(dim / 32)].
//
// A token at position p sees positions from max(0, p - window + 1), and from p rounded down to a multiple of `chunk`, to p;
// 0 sets no limit. Positions are taken in tiles of 32, tile i by part i % n_parts, and parts are merged in order: what a
// token's result is made of depends on its position alone, not on how a prompt was cut or what else is in the step.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int N_WARPS = THREADS / WARP;
constexpr int TILE = 32;
constexpr int VECTOR = 8;      // values that a lane reads at once
constexpr int MAX_PARTS = 256; // see `n_attention_parts`
constexpr int N_TILES = (GROUP + HEADS - 1) / HEADS; // of heads

// How the rows of a tile are shared out among the lanes of a block, DIM values of each.
template <int DIM> struct Split {
    static constexpr int LANES = DIM <= 32 ? 4 : DIM <= 64 ? 8 : DIM <= 128 ? 16 : 32; // that share a row
    static constexpr int PIECES = (DIM + LANES * VECTOR - 1) / (LANES * VECTOR);       // that each of them reads
    static constexpr int ROWS = N_WARPS * WARP / LANES;                                // that a block reads at once
    static constexpr int ROUNDS = TILE / ROWS;
    static constexpr int WISH = 8 / (PIECES * (KV_TYPE == 0 ? 2 : 1)); // as many as the registers allow
    static constexpr int AT_ONCE = WISH < 1 ? 1 : WISH < ROUNDS ? WISH : ROUNDS; // rounds that are on the way together

    static __device__ __forceinline__ int row(int round) { return round * ROWS + threadIdx.x / LANES; }
    static __device__ __forceinline__ int column(int piece) { return (piece * LANES + threadIdx.x % LANES) * VECTOR; }
};

// VECTOR values as they are stored. All zero bits are zeros.
struct Piece {
#if KV_TYPE == 0
    float4 low, high;
#elif KV_TYPE == 1
    uint4 halves;
#else
    uint2 bytes;
    uint16_t scale;
#endif

    __device__ __forceinline__ void unpack(float (&x)[VECTOR]) const {
#if KV_TYPE == 0
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
#elif KV_TYPE == 1
        const unsigned words[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            x[i] = f16_to_f32((uint16_t)(words[i / 2] >> 16 * (i % 2)));
#else
        const unsigned words[2] = {bytes.x, bytes.y};
        const float d = f16_to_f32(scale);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            x[i] = d * (float)(int8_t)(words[i / 4] >> 8 * (i % 4));
#endif
    }
};

// Keys or values, of DIM values each, of all positions of one sequence and one head.
template <int DIM> struct Side {
    static constexpr int N_SCALES = (DIM + 31) / 32;
    uint8_t *values;  // of position 0
    uint16_t *scales; // likewise
    int n_kv_heads;

    // Values i to i + VECTOR - 1; i is a multiple of VECTOR.
    __device__ __forceinline__ Piece load(int position, int i) const {
        const int64_t row = (int64_t)position * n_kv_heads;
#if KV_TYPE == 0
        const float4 *from = (const float4 *)((const float *)values + row * DIM + i);
        return {from[0], from[1]};
#elif KV_TYPE == 1
        return {*(const uint4 *)((const uint16_t *)values + row * DIM + i)};
#else
        return {*(const uint2 *)(values + row * DIM + i), scales[row * N_SCALES + i / 32]};
#endif
    }
};

// The cache of one layer.
struct Cache {
    uint8_t *address;
    int n_slots, context_length, n_kv_heads;
};

// `before` and `scales_before`: values and scales of one head that lie before this side of the cache, for each head.
template <int DIM> DEVICE Side<DIM> side_of(const Cache &c, int before, int scales_before, int slot, int head) {
    constexpr int BYTES = KV_TYPE == 0 ? 4 : KV_TYPE == 1 ? 2 : 1;
    const int64_t n = (int64_t)c.n_slots * c.context_length * c.n_kv_heads; // heads
    const int64_t first = (int64_t)slot * c.context_length * c.n_kv_heads + head;
    uint16_t *scales = (uint16_t *)(c.address + n * (KEY_DIM + (SHARED ? 0 : VALUE_DIM)) * BYTES);
    return {c.address + (n * before + first * DIM) * BYTES,
            scales + n * scales_before + first * Side<DIM>::N_SCALES, c.n_kv_heads};
}
DEVICE Side<KEY_DIM> keys_of(const Cache &cache, int slot, int head) {
    return side_of<KEY_DIM>(cache, 0, 0, slot, head);
}
#if SHARED
using Values = Side<KEY_DIM>;
DEVICE Values values_of(const Cache &cache, int slot, int head) { return keys_of(cache, slot, head); }
#else
using Values = Side<VALUE_DIM>;
DEVICE Values values_of(const Cache &cache, int slot, int head) {
    return side_of<VALUE_DIM>(cache, KEY_DIM, Side<KEY_DIM>::N_SCALES, slot, head);
}
#endif

// Stores value i of a head, by a block of whole warps. Those beyond the head are zeros and help with the scales.
template <int DIM> DEVICE void store(const Side<DIM> &out, int position, int i, const float *x) {
    const int64_t row = (int64_t)position * out.n_kv_heads;
    const float value = i < DIM ? x[i] : 0.0f;
#if KV_TYPE == 0
    if (i < DIM)
        ((float *)out.values)[row * DIM + i] = value;
#elif KV_TYPE == 1
    if (i < DIM)
        ((uint16_t *)out.values)[row * DIM + i] = f32_to_f16(value);
#else
    const uint16_t stored = f32_to_f16(__fdiv_rn(warp_max(fabsf(value)), 127.0f));
    const float d = f16_to_f32(stored), q = d > 0.0f ? rintf(__fdiv_rn(value, d)) : 0.0f;
    if (i < DIM) { // a NaN becomes -127
        ((int8_t *)out.values)[row * DIM + i] = (int8_t)__float2int_rn(fminf(fmaxf(q, -127.0f), 127.0f));
        if (i % 32 == 0)
            out.scales[row * Side<DIM>::N_SCALES + i / 32] = stored;
    }
#endif
}

// Grid: (n_kv_heads, tokens, 2: k and v; 1 without values). A block is one warp for each 32 values of a head, a thread a
// value.
KERNEL(1024)
store_kv(const float *k, int64_t k_stride, const float *v, int64_t v_stride, Cache cache, const int *positions,
         const int *slots, const int *n_tokens) {
    begin_kernel();
    const int head = blockIdx.x, token = blockIdx.y, i = threadIdx.x;
    if (token >= *n_tokens)
        return;
    if (blockIdx.z == 0)
        store(keys_of(cache, slots[token], head), positions[token], i, k + token * k_stride + head * KEY_DIM);
    else
        store(values_of(cache, slots[token], head), positions[token], i, v + token * v_stride + head * VALUE_DIM);
}

// The softmax over some positions, not yet divided: sum_p exp(score_p - largest) v_p, and sum_p exp(score_p - largest).
struct Part {
    float largest, sum;
};

// Fetches some rounds of a tile that begins at position `first`; rows outside of [begin, end) become zeros.
template <int DIM, int STORED_DIM>
DEVICE void fetch(const Side<STORED_DIM> &side, int first, int begin, int end, int first_round,
                  Piece (&out)[Split<DIM>::AT_ONCE][Split<DIM>::PIECES]) {
    using Shares = Split<DIM>;
#pragma unroll
    for (int r = 0; r < Shares::AT_ONCE; r++)
#pragma unroll
        for (int c = 0; c < Shares::PIECES; c++) {
            const int p = Shares::row(first_round + r), i = Shares::column(c);
            out[r][c] = p >= begin && p < end && i < DIM ? side.load(first + p, i) : Piece{};
        }
}

// What a block shares while it goes through positions.
struct Shared {
    __align__(16) float queries[HEADS][KEY_DIM];
    __align__(16) float sums[HEADS][VALUE_DIM]; // of a part
    float scores[HEADS][TILE];                  // of a tile; then their exponentials
    float rescale[HEADS];                       // of what was added up before the tile
    Part totals[HEADS];
};

// Puts a token's queries, times `scale`, where the block shares them; zeros for heads that do not exist.
DEVICE void load_queries(Shared &shared, const float *q, int n_heads, float scale) {
    for (int i = threadIdx.x; i < HEADS * KEY_DIM; i += THREADS)
        shared.queries[i / KEY_DIM][i % KEY_DIM] = i / KEY_DIM < n_heads ? q[i] * scale : 0.0f;
}

// Attends over every n_parts-th tile of positions from `first_tile` on, as far as the token at `position` sees them, from
// `from` on. Whole block. Leaves `sums` and `totals`, to be read after it and before the next call's first barrier.
DEVICE void attend_part(Shared &shared, const Side<KEY_DIM> &keys, const Values &vals, int first_tile, int n_parts, int from,
                        int position) {
    using Keys = Split<KEY_DIM>;
    using Vals = Split<VALUE_DIM>;
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    auto &queries = shared.queries;
    auto &sums = shared.sums;
    auto &scores = shared.scores;
    auto &rescale = shared.rescale;
    auto &totals = shared.totals;
    if (thread < HEADS)
        totals[thread] = {NEVER, 0.0f};
    float acc[HEADS][Vals::PIECES][VECTOR] = {}; // of the positions that this thread reads
    __syncthreads();
    for (int first = first_tile * TILE; first <= position; first += n_parts * TILE) {
        const int begin = max(from - first, 0), end = min(TILE, position + 1 - first); // of what is seen of the tile
#pragma unroll
        for (int round = 0; round < Keys::ROUNDS; round += Keys::AT_ONCE) {
            Piece fetched[Keys::AT_ONCE][Keys::PIECES];
            fetch<KEY_DIM>(keys, first, begin, end, round, fetched);
            float key[Keys::AT_ONCE][Keys::PIECES][VECTOR];
#pragma unroll
            for (int r = 0; r < Keys::AT_ONCE; r++)
#pragma unroll
                for (int c = 0; c < Keys::PIECES; c++)
                    fetched[r][c].unpack(key[r][c]);
#pragma unroll
            for (int g = 0; g < HEADS; g++) {
                float dots[Keys::AT_ONCE] = {};
#pragma unroll
                for (int c = 0; c < Keys::PIECES; c++) {
                    if (Keys::column(c) >= KEY_DIM)
                        continue;
                    const float4 *query = (const float4 *)&queries[g][Keys::column(c)];
                    const float4 low = query[0], high = query[1];
                    const float by[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                    for (int r = 0; r < Keys::AT_ONCE; r++)
#pragma unroll
                        for (int i = 0; i < VECTOR; i++)
                            dots[r] = __fmaf_rn(key[r][c][i], by[i], dots[r]);
                }
                add_over_lanes<Keys::LANES, Keys::AT_ONCE>(dots);
                constexpr int OWN = Keys::AT_ONCE > Keys::LANES ? Keys::AT_ONCE / Keys::LANES : 1;
                const int first_own = lane % Keys::LANES * Keys::AT_ONCE / Keys::LANES;
#pragma unroll
                for (int r = 0; r < OWN; r++) {
                    const int p = Keys::row(round + first_own + r);
                    if (lane * Keys::AT_ONCE % Keys::LANES == 0)
                        scores[g][p] = p >= begin && p < end ? dots[r] : NEVER;
                }
            }
        }
        Piece fetched[Vals::AT_ONCE][Vals::PIECES]; // on the way while the exponentials are taken
        fetch<VALUE_DIM>(vals, first, begin, end, 0, fetched);
        __syncthreads();
        for (int g = warp; g < HEADS; g += N_WARPS) { // a warp takes the exponentials of one query
            const Part before = totals[g];
            const float score = scores[g][lane], largest = fmaxf(before.largest, warp_max(score));
            const float e = lane >= begin && lane < end ? exp_canonical(score - largest) : 0.0f;
            const float sum = warp_sum(e);
            scores[g][lane] = e;
            __syncwarp(); // all have read the old total
            if (lane == 0) {
                rescale[g] = exp_canonical(before.largest - largest);
                totals[g] = {largest, __fmaf_rn(before.sum, exp_canonical(before.largest - largest), sum)};
            }
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < HEADS; g++)
#pragma unroll
            for (int c = 0; c < Vals::PIECES; c++)
#pragma unroll
                for (int i = 0; i < VECTOR; i++)
                    acc[g][c][i] *= rescale[g];
#pragma unroll
        for (int round = 0; round < Vals::ROUNDS; round += Vals::AT_ONCE) {
            if (round)
                fetch<VALUE_DIM>(vals, first, begin, end, round, fetched);
#pragma unroll
            for (int r = 0; r < Vals::AT_ONCE; r++)
#pragma unroll
                for (int c = 0; c < Vals::PIECES; c++) {
                    float value[VECTOR];
                    fetched[r][c].unpack(value);
#pragma unroll
                    for (int g = 0; g < HEADS; g++)
#pragma unroll
                        for (int i = 0; i < VECTOR; i++)
                            acc[g][c][i] = __fmaf_rn(scores[g][Vals::row(round + r)], value[i], acc[g][c][i]);
                }
        }
        __syncthreads();
    }

    // Add up what the threads have: within a warp, then warp after warp.
#pragma unroll
    for (int g = 0; g < HEADS; g++)
#pragma unroll
        for (int c = 0; c < Vals::PIECES; c++)
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
#pragma unroll
                for (int step = WARP / 2; step >= Vals::LANES; step /= 2)
                    acc[g][c][i] += __shfl_xor_sync(ALL_LANES, acc[g][c][i], step);
    for (int turn = 0; turn < N_WARPS; turn++) {
        if (warp == turn && lane < Vals::LANES)
#pragma unroll
            for (int c = 0; c < Vals::PIECES; c++)
                if (Vals::column(c) < VALUE_DIM)
#pragma unroll
                    for (int g = 0; g < HEADS; g++)
#pragma unroll
                        for (int i = 0; i < VECTOR; i += 4) {
                            float4 &sum = *(float4 *)&sums[g][Vals::column(c) + i];
                            const float *own = &acc[g][c][i];
                            sum = turn ? make_float4(sum.x + own[0], sum.y + own[1], sum.z + own[2], sum.w + own[3])
                                       : make_float4(own[0], own[1], own[2], own[3]);
                        }
        __syncthreads();
    }
}

// Grid: (n_kv_heads * N_TILES, n_parts, tokens from `first_token` on). values: float
// [grid tokens, n_heads, n_parts, VALUE_DIM]; parts: [grid tokens, n_heads, n_parts]. Parts beyond a token's last tile
// are left alone.
KERNEL(THREADS)
attend(const float *q, int64_t q_stride, Cache cache, const int *positions, const int *slots, float scale, int window,
       int chunk, float *values, Part *parts, int first_token, const int *n_tokens) {
    begin_kernel();
    __shared__ Shared shared;
    const int kv_head = blockIdx.x / N_TILES, first_head = blockIdx.x % N_TILES * HEADS;
    const int n_heads = min(HEADS, GROUP - first_head), head = kv_head * GROUP + first_head;
    const int part = blockIdx.y, n_parts = gridDim.y, token = first_token + blockIdx.z;
    if (token >= *n_tokens)
        return;
    const int position = positions[token], slot = slots[token];
    if (part > position / TILE)
        return;
    const int from = max(window ? max(0, position - window + 1) : 0, chunk ? position / chunk * chunk : 0);
    const int thread = threadIdx.x;
    load_queries(shared, q + token * q_stride + head * KEY_DIM, n_heads, scale);
    // the first tile of this part that has a position in sight
    const int first_tile = from / TILE + (part - from / TILE % n_parts + n_parts) % n_parts;
    attend_part(shared, keys_of(cache, slot, kv_head), values_of(cache, slot, kv_head), first_tile, n_parts, from,
                position);

    const int64_t first_result = (int64_t)blockIdx.z * cache.n_kv_heads * GROUP + head;
    for (int i = thread; i < n_heads * VALUE_DIM; i += THREADS) {
        const int g = i / VALUE_DIM, column = i % VALUE_DIM;
        values[((first_result + g) * n_parts + part) * VALUE_DIM + column] = shared.sums[g][column];
    }
    if (thread < n_heads)
        parts[(first_result + thread) * n_parts + part] = shared.totals[thread];
}

// What is known of a softmax after some parts: the largest score, the sum of the exponentials, and by what the values
// must be multiplied when a part is added.
struct Merged {
    float largest, sum, keep, take;
};

// A sink is a score without a value.
DEVICE Merged before_parts(const float *sinks, int head) {
    return {sinks ? sinks[head] : NEVER, sinks ? 1.0f : 0.0f, 0.0f, 0.0f};
}
DEVICE Merged with_part(const Merged &before, const Part &part) {
    const float largest = fmaxf(before.largest, part.largest);
    const float keep = exp_canonical(before.largest - largest), take = exp_canonical(part.largest - largest);
    return {largest, __fmaf_rn(part.sum, take, before.sum * keep), keep, take};
}
DEVICE float merged_value(const Merged &merged, float before, float of_part) {
    return __fmaf_rn(of_part, merged.take, before * merged.keep);
}

// Grid: (n_heads, tokens from `first_token` on). out: float32 rows of n_heads * VALUE_DIM. sinks: a score for each head
// that has no value, or null.
KERNEL(THREADS)
merge_parts(const float *values, const Part *parts, int n_parts, const float *sinks, const int *positions, float *out,
            int64_t out_stride, int first_token, const int *n_tokens) {
    begin_kernel();
    constexpr int THREAD_DIMS = (VALUE_DIM + THREADS - 1) / THREADS;
    __shared__ Merged merged[MAX_PARTS];
    const int head = blockIdx.x, token = first_token + blockIdx.y, thread = threadIdx.x;
    if (token >= *n_tokens)
        return;
    const int64_t first = ((int64_t)blockIdx.y * gridDim.x + head) * n_parts;
    const int n = min(n_parts, positions[token] / TILE + 1); // those that `attend` has filled
    if (thread < WARP) { // a warp takes the running maximum of 32 parts at a time
        float largest = sinks ? sinks[head] : NEVER;
        for (int base = 0; base < n; base += WARP) {
            const Part part = base + thread < n ? parts[first + base + thread] : Part{NEVER, 0.0f};
            float up_to = part.largest;
            for (int step = 1; step < WARP; step *= 2) {
                const float other = __shfl_up_sync(ALL_LANES, up_to, step);
                up_to = thread >= step ? fmaxf(up_to, other) : up_to;
            }
            up_to = fmaxf(up_to, largest);
            const float before = __shfl_up_sync(ALL_LANES, up_to, 1);
            const Merged added = with_part({thread ? before : largest, 0.0f, 0.0f, 0.0f}, part);
            if (base + thread < n)
                merged[base + thread] = {added.largest, part.sum, added.keep, added.take};
            largest = __shfl_sync(ALL_LANES, up_to, WARP - 1);
        }
    }
    __syncthreads();
    float acc[THREAD_DIMS] = {}, sum = before_parts(sinks, head).sum;
#pragma unroll 8
    for (int i = 0; i < n; i++) {
        const Merged part = merged[i];
        sum = __fmaf_rn(part.sum, part.take, sum * part.keep);
#pragma unroll
        for (int d = 0; d < THREAD_DIMS; d++)
            if (d * THREADS + thread < VALUE_DIM) {
                const float added = merged_value(part, acc[d], values[(first + i) * VALUE_DIM + d * THREADS + thread]);
                acc[d] = part.sum == 0.0f ? acc[d] : added; // nothing in sight
            }
    }
#pragma unroll
    for (int d = 0; d < THREAD_DIMS; d++)
        if (d * THREADS + thread < VALUE_DIM)
            out[token * out_stride + head * VALUE_DIM + d * THREADS + thread] = __fdiv_rn(acc[d], sum);
}

// Both for many tokens: a block takes HEADS heads of one token through all parts, the same way and in the same order.
// Grid: (n_kv_heads * N_TILES, tokens, the last one first: it has most to do).
extern "C" __global__ void __launch_bounds__(THREADS, VALUE_DIM <= 256 ? 3 : 1)
attend_all(const float *q, int64_t q_stride, Cache cache, const int *positions, const int *slots, float scale, int window,
           int chunk, int n_parts, const float *sinks, float *out, int64_t out_stride, const int *n_tokens) {
    begin_kernel();
    constexpr int QUADS = HEADS * VALUE_DIM / 4, OWN = (QUADS + THREADS - 1) / THREADS;
    __shared__ Shared shared;
    __shared__ Merged merged[HEADS];
    const int kv_head = blockIdx.x / N_TILES, first_head = blockIdx.x % N_TILES * HEADS;
    const int n_heads = min(HEADS, GROUP - first_head), head = kv_head * GROUP + first_head;
    const int token = *n_tokens - 1 - (int)blockIdx.y, thread = threadIdx.x;
    if (token < 0)
        return;
    const int position = positions[token], slot = slots[token];
    const int from = max(window ? max(0, position - window + 1) : 0, chunk ? position / chunk * chunk : 0);
    const Side<KEY_DIM> keys = keys_of(cache, slot, kv_head);
    const Values vals = values_of(cache, slot, kv_head);
    load_queries(shared, q + token * q_stride + head * KEY_DIM, n_heads, scale);
    if (thread < HEADS)
        merged[thread] = before_parts(sinks, min(head + thread, head + n_heads - 1));
    float4 acc[OWN] = {}; // of the values of all heads, every THREADS-th four
    for (int part = 0; part < n_parts && part <= position / TILE; part++) {
        // the first tile of this part that has a position in sight
        const int first_tile = from / TILE + (part - from / TILE % n_parts + n_parts) % n_parts;
        if (first_tile * TILE > position)
            continue; // nothing in sight
        attend_part(shared, keys, vals, first_tile, n_parts, from, position);
        if (thread < HEADS)
            merged[thread] = with_part(merged[thread], shared.totals[thread]);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const int i = k * THREADS + thread;
            if (i >= QUADS)
                break;
            const Merged added = merged[i / (VALUE_DIM / 4)];
            const float4 sums = ((const float4 *)shared.sums)[i];
            acc[k] = make_float4(merged_value(added, acc[k].x, sums.x), merged_value(added, acc[k].y, sums.y),
                                 merged_value(added, acc[k].z, sums.z), merged_value(added, acc[k].w, sums.w));
        }
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < OWN; k++) {
        const int i = k * THREADS + thread, g = i / (VALUE_DIM / 4);
        if (i >= QUADS || g >= n_heads)
            break;
        const float sum = merged[g].sum;
        float *to = out + token * out_stride + head * VALUE_DIM + 4 * i;
        to[0] = __fdiv_rn(acc[k].x, sum), to[1] = __fdiv_rn(acc[k].y, sum);
        to[2] = __fdiv_rn(acc[k].z, sum), to[3] = __fdiv_rn(acc[k].w, sum);
    }
}
