// Attention of a step's tokens over the cache of keys and values (`kv_cache.cuh`), for many tokens in one kernel, for few
// over parts of the positions, which are then merged (`merge_parts.cu`).
//
// Compiled as `kv_cache.cuh` says, and for GROUP (query heads that share a key head), CAP (that scores are brought to within;
// 0.0f: they are not), TOP_K, BLOCK, TAIL, BY_HEAD, PERIOD and WINDOW (see below).
//
// A token at position p sees positions from max(0, p - window + 1), and from p rounded down to a multiple of `chunk`, to p;
// 0 sets no limit. With a TOP_K above 0 it sees those of them that are in the blocks of BLOCK positions which a list names in
// rising order (`select_positions.cu`, `select_blocks.cu`): all blocks, or TOP_K of them, its own always. With a TAIL the last
// place of a list is for its own block while that is not whole, and a list has one block less otherwise. A row of `selected`
// is one list, or BY_HEAD one for each key head. What is called a position below is then a place in the list's blocks.
//
// With a PERIOD above 0 there are, beside the last WINDOW positions (0: all), rows of another cache that so many tokens share,
// all that are whole or those in the list; `window` is 0 then. Places are those of these rows, and behind them positions.
//
// Positions are taken in tiles of 32, tile i by part i % n_parts, and parts are merged in order: what a token's result is made
// of depends on its position alone, not on how a prompt was cut or what else is in the step.
//
// A block takes up to 16 heads that share keys: the rows of matrices of float16 numbers that tensor cores multiply, with
// float32 sums. A query, and a weight of a value, is the sum of two such numbers, so is a float32 key or value; products
// of two second numbers are too small to count. The eight warps share the work on a tile three times: products with
// keys by quarters of a head's values and halves of the tile, the softmax by query, products with values by values.
#include "attention_tiles.cuh"

constexpr int N_WARPS = 8, THREADS = N_WARPS * WARP;
constexpr int MOST_TOKENS = 8;                       // of a step that is attended by parts; `attention.py`
constexpr int VALUE_PAIRS = (VALUE_DIM + 127) / 128; // a warp's sixteens of a value's

#define ATTENTION_KERNEL                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, KV_TYPE != 0 && KEY_DIM <= 256 && VALUE_DIM <= 256 ? 2 : 1)

// What a block shares while it goes through positions.
struct Tile {
    __align__(16) uint16_t keys[PLANES][TILE][KEY_STRIDE];
#if !SHARED
    __align__(16) uint16_t values[PLANES][TILE][VALUE_STRIDE];
#endif
    __align__(16) uint16_t weights[2][HEADS][TILE + 8]; // of the values
    float scores[4][HEADS][TILE + 4];                   // from each quarter of a key
    float rescale[HEADS];                               // of what was added up before the tile

    __device__ __forceinline__ auto &seen_values() const {
#if SHARED
        return keys;
#else
        return values;
#endif
    }

    // Zeroes what is beyond the heads, once; the first barrier of `attend_part` follows.
    __device__ __forceinline__ void clear_margins() {
        clear_beyond_keys<THREADS>(keys);
#if !SHARED
        clear_beyond_values<THREADS>(values);
#endif
    }
};

// Which token and heads a block works at.
struct Work {
    int position, slot, from, kv_head, head, n_heads;
    int n_shared, oldest; // with PERIOD
    const int *selected;  // with TOP_K: the list of the token, and of the key head

    __device__ __forceinline__ Work(int token, const int *positions, const int *slots, int window, int chunk,
                                    const int *selected, int64_t selected_stride)
        : position(last_position(positions[token])), slot(slots[token]),
          from(max(window ? max(0, position - window + 1) : 0, chunk ? position / chunk * chunk : 0)),
          kv_head(blockIdx.x / N_TILES), head(kv_head * GROUP + blockIdx.x % N_TILES * HEADS),
          n_heads(min(HEADS, (kv_head + 1) * GROUP - head)), n_shared(shared_rows(positions[token])),
          oldest(WINDOW ? max(0, positions[token] - WINDOW + 1) : 0),
          selected(selected + token * selected_stride + (BY_HEAD ? kv_head * TOP_K : 0)) {}

    // The first position of the first tile of a part that has a position in sight.
    __device__ __forceinline__ int start(int part, int n_parts) const {
        return (from / TILE + (part - from / TILE % n_parts + n_parts) % n_parts) * TILE;
    }
};

// Brings tiles of keys and values from the cache.
struct Fetched {
    const Work &work;
    Side<KEY_DIM> key_side, shared_side;
    Pieces<KEY_DIM, THREADS> keys;
#if !SHARED
    Side<VALUE_DIM> value_side;
    Pieces<VALUE_DIM, THREADS> values;
#endif

    __device__ __forceinline__ Fetched(const Cache &cache, const Cache &shared, const Work &w)
        : work(w), key_side(keys_of(cache, w.slot, w.kv_head)), shared_side(keys_of(shared, w.slot, w.kv_head))
#if !SHARED
          ,
          value_side(values_of(cache, w.slot, w.kv_head))
#endif
    {
    }

    // Begins to load the tile from position `first` on; what the token does not see becomes zeros.
    __device__ __forceinline__ void load(int first) {
        const int begin = max(work.from - first, 0), end = min(TILE, work.position + 1 - first);
        keys.load(threadIdx.x, key_side, shared_side, work.selected, work.n_shared, work.oldest, first, begin, end);
#if !SHARED
        values.load(threadIdx.x, value_side, value_side, work.selected, work.n_shared, work.oldest, first, begin, end);
#endif
    }

    __device__ __forceinline__ void put(Tile &tile) const {
        keys.put(threadIdx.x, tile.keys);
#if !SHARED
        values.put(threadIdx.x, tile.values);
#endif
    }
};

// A lane's share of up to 16 query heads, as the tensor cores take it: rows g and g + 8, a quarter of their values.
struct Queries {
    unsigned halves[KEY_STEPS][2][4]; // [][0]: float16 numbers, [][1]: what they miss

    __device__ __forceinline__ Queries(const float *q, int n_heads, float scale) {
        const int lane = threadIdx.x % WARP, quarter = threadIdx.x / WARP % 4;
#pragma unroll
        for (int step = 0; step < KEY_STEPS; step++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int row = lane / 4 + r % 2 * 8, i = (quarter * KEY_STEPS + step) * 16 + lane % 4 * 2 + r / 2 * 8;
                const bool exists = row < n_heads && i < KEY_DIM;
                const float2 x = exists ? *(const float2 *)(q + row * KEY_DIM + i) : make_float2(0.0f, 0.0f);
                split_halves(x.x * scale, x.y * scale, halves[step][0][r], halves[step][1][r]);
            }
    }
};

using Sums = SumsOf<VALUE_PAIRS>;

DEVICE int first_column(int pair) { return column_of_pair<VALUE_PAIRS>(threadIdx.x / WARP, pair); }

// Attends over the tiles that begin at position `first` and every `step` positions from there on, as far as the token sees
// them; the first is fetched already. Whole block; sixteen threads share a row of `total`. Begins and ends with everybody
// done with `tile`.
DEVICE void attend_part(Tile &tile, const Queries &queries, Fetched &fetched, int first, int step, Sums &sums, Part &total) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quarter = warp % 4, half = warp / 4;
    const int from = fetched.work.from, position = fetched.work.position;
    total = {NEVER, 0.0f};
#pragma unroll
    for (int pair = 0; pair < VALUE_PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            sums[pair][i / 4][i % 4] = 0.0f;
    for (; first <= position; first += step) {
        fetched.put(tile);
        __syncthreads();
        if (first + step <= position)
            fetched.load(first + step); // on the way while this one is worked at

        float scores[2][4] = {}; // of the warp's 16 positions
#pragma unroll
        for (int i = 0; i < KEY_STEPS; i++) {
            const int column = (quarter * KEY_STEPS + i) * 16 + lane / 8 % 2 * 8;
            unsigned b[PLANES][4];
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
                ldmatrix_x4(b[plane], &tile.keys[plane][16 * half + lane % 8 + lane / 16 * 8][column]);
            add_products(scores[0], queries.halves[i], b, 0);
            add_products(scores[1], queries.halves[i], b, 1);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *to = &tile.scores[quarter][lane / 4 + i % 2 * 8][16 * half + i / 2 * 8 + lane % 4 * 2];
            *(float2 *)to = make_float2(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
        }
        __syncthreads();
        {
            const int row = threadIdx.x / 16, p = threadIdx.x % 16 * 2;
            float score[2], e[2], largest = total.largest;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float a = tile.scores[0][row][p + i] + tile.scores[1][row][p + i];
                const float b = tile.scores[2][row][p + i] + tile.scores[3][row][p + i];
                const float whole = CAP > 0.0f ? soft_cap(a + b, CAP) : a + b;
                score[i] = first + p + i >= from && first + p + i <= position ? whole : NEVER;
                largest = fmaxf(largest, score[i]);
            }
            for (int lanes = 8; lanes; lanes /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
#pragma unroll
            for (int i = 0; i < 2; i++)
                e[i] = first + p + i >= from && first + p + i <= position ? exp_canonical(score[i] - largest) : 0.0f;
            float sum = e[0] + e[1];
            for (int lanes = 8; lanes; lanes /= 2)
                sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
            const float keep = exp_canonical(total.largest - largest);
            total = {largest, __fmaf_rn(total.sum, keep, sum)};
            unsigned near, rest;
            split_halves(e[0], e[1], near, rest);
            *(unsigned *)&tile.weights[0][row][p] = near;
            *(unsigned *)&tile.weights[1][row][p] = rest;
            if (p == 0)
                tile.rescale[row] = keep;
        }
        __syncthreads();

        unsigned weights[TILE / 16][2][4];
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
#pragma unroll
            for (int plane = 0; plane < 2; plane++)
                ldmatrix_x4(weights[k][plane], &tile.weights[plane][lane % 16][16 * k + lane / 16 * 8]);
        const float rescale[2] = {tile.rescale[lane / 4], tile.rescale[lane / 4 + 8]};
        add_values<VALUE_PAIRS>(sums, rescale, weights, tile.seen_values(), warp);
        __syncthreads();
    }
}

// Grid: (n_kv_heads * N_TILES, n_parts, tokens). values: float [tokens, n_heads, n_parts, VALUE_DIM]; parts:
// [tokens, n_heads, n_parts]. Parts beyond a token's last tile are left alone.
ATTENTION_KERNEL
attend(const float *q, int64_t q_stride, Cache cache, Cache shared, const int *positions, const int *slots, float scale,
       int window, int chunk, const int *selected, int64_t selected_stride, float *values, Part *parts, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Tile &tile = *(Tile *)dynamic;
    const int part = blockIdx.y, n_parts = gridDim.y, token = blockIdx.z, lane = threadIdx.x % WARP;
    const int seen = token < *n_tokens ? last_position(positions[token]) : -1; // as the caller gave them: old
    if (part > (seen >= 0 ? seen / TILE : -1)) {
        begin_kernel();
        return;
    }
    const Work work(token, positions, slots, window, chunk, selected, selected_stride);
    Fetched fetched(cache, shared, work);
    const int start = work.start(part, n_parts);
    // The kernel before stores keys and values of this step's tokens, at most MOST_TOKENS of them.
    const bool is_old = !TOP_K && !PERIOD && start + TILE <= work.position + 1 - MOST_TOKENS;
    if (is_old)
        fetched.load(start);
    begin_kernel();
    if (!is_old)
        fetched.load(start);
    const Queries queries(q + token * q_stride + work.head * KEY_DIM, work.n_heads, scale);
    tile.clear_margins();
    Sums sums;
    Part total;
    attend_part(tile, queries, fetched, start, n_parts * TILE, sums, total);

    const int64_t result = ((int64_t)token * cache.n_kv_heads * GROUP + work.head) * n_parts + part; // of the first head
    const int row = threadIdx.x / 16;
    if (threadIdx.x % 16 == 0 && row < work.n_heads)
        parts[result + row * n_parts] = total;
#pragma unroll
    for (int pair = 0; pair < VALUE_PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int g = lane / 4 + i % 2 * 8, column = first_column(pair) + i / 2 * 8 + lane % 4 * 2;
            const float2 two = make_float2(sums[pair][i / 2][i % 2 * 2], sums[pair][i / 2][i % 2 * 2 + 1]);
            if (g < work.n_heads && column < VALUE_DIM)
                *(float2 *)&values[(result + (int64_t)g * n_parts) * VALUE_DIM + column] = two;
        }
}

// Both for many tokens: a block takes heads of one token through all parts, the same way and in the same order, and leaves
// gate and forms to others. Grid: (n_kv_heads * N_TILES, tokens, the last one first: it has most to do).
ATTENTION_KERNEL
attend_all(const float *q, int64_t q_stride, Cache cache, Cache shared, const int *positions, const int *slots, float scale,
           int window, int chunk, const int *selected, int64_t selected_stride, int n_parts, const float *sinks, float *out,
           int64_t out_stride, const int *n_tokens) {
    begin_kernel();
    extern __shared__ __align__(16) uint8_t dynamic[];
    __shared__ Merged merged[HEADS];
    Tile &tile = *(Tile *)dynamic;
    const int token = *n_tokens - 1 - (int)blockIdx.y, lane = threadIdx.x % WARP, row = threadIdx.x / 16;
    if (token < 0)
        return;
    const Work work(token, positions, slots, window, chunk, selected, selected_stride);
    const Queries queries(q + token * q_stride + work.head * KEY_DIM, work.n_heads, scale);
    Fetched fetched(cache, shared, work);
    tile.clear_margins();
    if (threadIdx.x % 16 == 0)
        merged[row] = before_parts(sinks, work.head + min(row, work.n_heads - 1));
    Sums acc = {};
    for (int part = 0; part < n_parts && part <= work.position / TILE; part++) {
        const int start = work.start(part, n_parts);
        if (start > work.position)
            continue; // nothing in sight
        Sums sums;
        Part total;
        fetched.load(start);
        attend_part(tile, queries, fetched, start, n_parts * TILE, sums, total);
        if (threadIdx.x % 16 == 0)
            merged[row] = with_part(merged[row], total);
        __syncthreads();
        const Merged added[2] = {merged[lane / 4], merged[lane / 4 + 8]};
        merge_sums<VALUE_PAIRS>(acc, sums, added);
        __syncthreads();
    }
#pragma unroll
    for (int pair = 0; pair < VALUE_PAIRS; pair++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int g = lane / 4 + i % 4 / 2 * 8, column = first_column(pair) + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (g < work.n_heads && column < VALUE_DIM)
                out[token * out_stride + (work.head + g) * VALUE_DIM + column] =
                    __fdiv_rn(acc[pair][i / 4][i % 4], merged[g].sum);
        }
}
