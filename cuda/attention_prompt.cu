// Attention of a prompt's tokens over the cache of keys and values, with the bits of `attention.cu`: see there what a token
// sees, how positions are divided into tiles and parts, and of which products and sums a result is made.
//
// Compiled as `attention.cu` says, for values of up to 256, without lists and shared rows (TOP_K and PERIOD are 0), and for
// UNITS.
//
// A unit is 16 rows for the tensor cores: heads of a token that share keys or, where fewer do, those of several tokens. A
// block works at UNITS of them and fetches a tile of keys and values once for all. A unit has two warps. Each multiplies two
// quarters of the queries with all keys of the tile, and gives the other what it found; then each has the scores of all rows
// in its registers, goes on as if it were alone, and adds up half of the values' columns.
#include "attention_tiles.cuh"

constexpr int WARPS = 2, THREADS = UNITS * WARPS * WARP;
constexpr int PAIRS = (VALUE_DIM + 16 * WARPS - 1) / (16 * WARPS);              // a warp's sixteens of a value's values
constexpr int TOKENS = GROUP < HEADS ? HEADS / GROUP : 1;                       // of a unit
constexpr int EIGHTS = TILE / 8;                                                // positions whose scores are one product's
constexpr int BLOCKS = VALUE_DIM <= 64 && KEY_DIM <= 64 && PLANES == 1 ? 2 : 1; // of a multiprocessor

struct Tile {
    union {
        __align__(16) uint16_t keys[PLANES][TILE][KEY_STRIDE];
        __align__(16) uint16_t values[PLANES][TILE][VALUE_STRIDE]; // once all have seen the keys
    };
    __align__(16) uint16_t queries[UNITS][2][HEADS][KEY_STRIDE]; // float16 numbers, and what they miss
    __align__(16) float4 scores[UNITS][WARPS][EIGHTS][WARP];     // from each warp's quarters, as its lanes have them
};

// What a unit's rows are: of which token and head, counted from the end, for the last tokens have most to do.
struct Unit {
    int first_token, first_head; // of the heads that share keys

    __device__ __forceinline__ Unit(int index, int n_tokens)
        : first_token(n_tokens - (index / N_TILES + 1) * TOKENS), first_head(index % N_TILES * HEADS) {}
    __device__ __forceinline__ int token(int row) const { return first_token + (GROUP < HEADS ? row / GROUP : 0); }
    __device__ __forceinline__ int head(int row) const { return first_head + (GROUP < HEADS ? row % GROUP : row); }
    __device__ __forceinline__ bool exists(int row) const {
        return token(row) >= 0 && (GROUP < HEADS ? row < TOKENS * GROUP : head(row) < GROUP);
    }
};

// What some tokens of one sequence see together, and what each of them surely sees: the positions from `latest` to `earliest`.
struct Sight {
    int from = 0x7fffffff, position = -1, latest = 0, earliest = 0x7fffffff;
    int n_parts, first_part; // that the first tile belongs to

    __device__ __forceinline__ void add(int first, int last) {
        from = min(from, first), position = max(position, last), latest = max(latest, first), earliest = min(earliest, last);
    }
    __device__ __forceinline__ void divide(int n) { n_parts = n, first_part = from / TILE % n; }
    // The first tile of a part that has a position in sight, by its position; the next part that has such a tile.
    __device__ __forceinline__ int start(int part) const {
        return from / TILE * TILE + (part - first_part + (part < first_part ? n_parts : 0)) * TILE;
    }
    __device__ __forceinline__ int part_after(int part) const {
        part++;
        if (part < n_parts && start(part) > position) // none up to the part that the first tile belongs to
            part = part < first_part ? first_part : n_parts;
        return part;
    }
};

// Grid: (n_kv_heads, blocks of units from `first_block` on).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attend_prompt(const float *q, int64_t q_stride, Cache cache, const int *positions, const int *slots, float scale, int window,
              int chunk, int n_parts, const float *sinks, float *out, int64_t out_stride, int first_block,
              const int *n_tokens) {
    begin_kernel();
    extern __shared__ __align__(16) uint8_t dynamic[];
    Tile &tile = *(Tile *)dynamic;
    const int n = *n_tokens, kv_head = blockIdx.x, first_unit = (first_block + blockIdx.y) * UNITS;
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP % WARPS, own = thread / WARP / WARPS;
    const int highest = n - 1 - first_unit / N_TILES * TOKENS;
    const int lowest = max(0, n - ((first_unit + UNITS - 1) / N_TILES + 1) * TOKENS);
    if (highest < 0)
        return;
    auto first_seen = [&](int position) {
        return max(window ? max(0, position - window + 1) : 0, chunk ? position / chunk * chunk : 0);
    };

    for (int i = thread; i < UNITS * HEADS * 32 * KEY_STEPS; i += THREADS) {
        const int u = i / (HEADS * 32 * KEY_STEPS), row = i / (32 * KEY_STEPS) % HEADS, column = i % (32 * KEY_STEPS) * 2;
        const Unit unit(first_unit + u, n);
        float2 x = make_float2(0.0f, 0.0f);
        if (unit.exists(row) && column < KEY_DIM)
            x = *(const float2 *)(q + unit.token(row) * q_stride + (kv_head * GROUP + unit.head(row)) * KEY_DIM + column);
        split_halves(x.x * scale, x.y * scale, *(unsigned *)&tile.queries[u][0][row][column],
                     *(unsigned *)&tile.queries[u][1][row][column]);
    }

    const Unit unit(first_unit + own, n);
    const int rows[2] = {lane / 4, lane / 4 + 8}; // the lane's
    Pieces<KEY_DIM, THREADS> keys;
#if !SHARED
    Pieces<VALUE_DIM, THREADS> values;
#endif
    for (int last = highest, before; last >= lowest; last = before) { // the tokens of one sequence
        const int slot = slots[last];
        Sight sight;
        for (before = last; before >= lowest && slots[before] == slot; before--)
            sight.add(first_seen(positions[before]), positions[before]);
        sight.divide(n_parts);
        const Side<KEY_DIM> key_side = keys_of(cache, slot, kv_head);
#if !SHARED
        const Side<VALUE_DIM> value_side = values_of(cache, slot, kv_head);
#endif
        auto load = [&](int first) {
            const int begin = max(sight.from - first, 0), end = min(TILE, sight.position + 1 - first);
            keys.load(unknown(thread), key_side, key_side, nullptr, 0, 0, first, begin, end);
#if !SHARED
            values.load(unknown(thread), value_side, value_side, nullptr, 0, 0, first, begin, end);
#endif
        };
        const bool works = unit.first_token <= last && unit.first_token + TOKENS - 1 > before; // the unit has some of them
        int position[2], from[2];
        Merged merged[2];
        SumsOf<PAIRS> acc = {};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int token = unit.token(rows[r]);
            const bool exists = unit.exists(rows[r]) && token > before && token <= last;
            position[r] = exists ? positions[token] : -1;
            from[r] = exists ? first_seen(position[r]) : 0;
            merged[r] = before_parts(sinks, kv_head * GROUP + (exists ? unit.head(rows[r]) : 0));
        }

        int part = sight.part_after(-1);
        load(sight.start(part));
        while (part < n_parts) {
            const int part_behind = sight.part_after(part);
            SumsOf<PAIRS> sums = {};
            Part total[2] = {{NEVER, 0.0f}, {NEVER, 0.0f}};
            for (int first = sight.start(part); first <= sight.position; first += n_parts * TILE) {
                clear_beyond_keys<THREADS>(tile.keys); // where values were
                keys.put(unknown(thread), tile.keys);
                __syncthreads();

                float scores[EIGHTS][4];
                if (works) {
                    float found[2][EIGHTS][4] = {}; // of each quarter
#pragma unroll
                    for (int i = 0; i < 2 * KEY_STEPS; i++) {
                        const int column = (warp * 2 * KEY_STEPS + i) * 16;
                        unsigned a[2][4];
#pragma unroll
                        for (int plane = 0; plane < 2; plane++)
                            ldmatrix_x4(a[plane], &tile.queries[own][plane][lane % 16][column + lane / 16 * 8]);
#pragma unroll
                        for (int half = 0; half < TILE / 16; half++) {
                            unsigned b[PLANES][4];
#pragma unroll
                            for (int plane = 0; plane < PLANES; plane++)
                                ldmatrix_x4(b[plane],
                                            &tile.keys[plane][16 * half + lane % 8 + lane / 16 * 8][column + lane / 8 % 2 * 8]);
                            add_products(found[i / KEY_STEPS][2 * half], a, b, 0);
                            add_products(found[i / KEY_STEPS][2 * half + 1], a, b, 1);
                        }
                    }
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++) {
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            scores[e][i] = found[0][e][i] + found[1][e][i];
                        tile.scores[own][warp][e][lane] = make_float4(scores[e][0], scores[e][1], scores[e][2], scores[e][3]);
                    }
                }
                __syncthreads();
#if !SHARED
                clear_beyond_values<THREADS>(tile.values);
                values.put(unknown(thread), tile.values);
#endif
                // The next tile is on the way from here on; before, there are no registers for it.
                if (first + n_parts * TILE <= sight.position)
                    load(first + n_parts * TILE);
                else if (part_behind < n_parts)
                    load(sight.start(part_behind));
                float keep[2];
                if (works) {
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++) {
                        const float4 of_other = tile.scores[own][1 - warp][e][lane];
                        const float others[4] = {of_other.x, of_other.y, of_other.z, of_other.w};
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            scores[e][i] += others[i];
                            if (CAP > 0.0f)
                                scores[e][i] = soft_cap(scores[e][i], CAP);
                        }
                    }
                    const bool is_whole = first >= sight.latest && first + TILE - 1 <= sight.earliest; // nothing is hidden
                    auto sees = [&](int e, int i) {
                        const int p = first + 8 * e + lane % 4 * 2 + i % 2;
                        return p >= from[i / 2] && p <= position[i / 2];
                    };
                    float largest[2] = {total[0].largest, total[1].largest}, sum[2];
                    auto hide = [&](float value) {
                        if (!is_whole)
#pragma unroll
                            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                                for (int i = 0; i < 4; i++)
                                    scores[e][i] = sees(e, i) ? scores[e][i] : value;
                    };
                    hide(NEVER);
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            largest[i / 2] = fmaxf(largest[i / 2], scores[e][i]);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        for (int lanes = 2; lanes; lanes /= 2)
                            largest[r] = fmaxf(largest[r], __shfl_xor_sync(ALL_LANES, largest[r], lanes));
                        keep[r] = exp_canonical(total[r].largest - largest[r]);
                    }
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            scores[e][i] = exp_canonical(scores[e][i] - largest[i / 2]);
                    hide(0.0f);
#pragma unroll
                    for (int r = 0; r < 2; r++) { // as a butterfly over sixteen lanes that have two each
                        auto two = [&](int e) { return scores[e][2 * r] + scores[e][2 * r + 1]; };
                        sum[r] = (two(0) + two(2)) + (two(1) + two(3));
                        for (int lanes = 2; lanes; lanes /= 2)
                            sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], lanes);
                        total[r] = {largest[r], __fmaf_rn(total[r].sum, keep[r], sum[r])};
                    }
                }
#if !SHARED
                __syncthreads();
#endif
                if (works) {
                    unsigned weights[TILE / 16][2][4];
#pragma unroll
                    for (int k = 0; k < TILE / 16; k++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float *two = &scores[2 * k + i / 2][i % 2 * 2];
                            split_halves(two[0], two[1], weights[k][0][i], weights[k][1][i]);
                        }
                    add_values<PAIRS>(sums, keep, weights, tile.values, warp);
                }
                __syncthreads();
            }
#pragma unroll
            for (int r = 0; r < 2; r++)
                merged[r] = with_part(merged[r], total[r]);
            merge_sums<PAIRS>(acc, sums, merged);
            part = part_behind;
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int r = i % 4 / 2, column = column_of_pair<PAIRS>(warp, pair) + i / 4 * 8 + lane % 4 * 2 + i % 2;
                if (position[r] >= 0 && column < VALUE_DIM)
                    out[unit.token(rows[r]) * out_stride + (kv_head * GROUP + unit.head(rows[r])) * VALUE_DIM + column] =
                        __fdiv_rn(acc[pair][i / 4][i % 4], merged[r].sum);
            }
    }
}
