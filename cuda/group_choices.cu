// Sorts the choices of a step by expert and cuts them into tiles; `expert_tiles.cuh` says what they are.
//
// Each thread finds the place of its expert by adding up what all others have before it: no scan, and the same order
// whatever the schedule.
#include "expert_tiles.cuh"

constexpr int THREADS = 512, PLACERS = 256;

DEVICE int n_tiles(int n) { return (n + TILE_TOKENS - 1) / TILE_TOKENS; }

// first_choice [n_experts]: where the choices of each expert begin, sorted. tiles: group by group, in each by expert.
// first_tile [n_groups + 1]: where the tiles of each group begin. Grid: 1. Dynamic shared memory: 2 * n_experts words.
KERNEL(THREADS)
group_choices(const int *ids, const int *places, int n_used, int n_experts, int at_once, int n_groups, int *first_choice,
              ExpertTile *tiles, int *first_tile, const int *n_tokens) {
    begin_kernel();
    extern __shared__ __align__(16) int counts[];
    int *groups = counts + n_experts;
    const int thread = threadIdx.x, n = *n_tokens * n_used;
    for (int e = thread; e < n_experts; e += THREADS) {
        counts[e] = 0;
        groups[e] = group_of(places[e], at_once);
    }
    __syncthreads();
    for (int i = thread; i < n; i += THREADS)
        if (ids[i] >= 0)
            atomicAdd(&counts[ids[i]], 1);
    __syncthreads();
    for (int e = thread; e < n_experts; e += THREADS) {
        const int group = groups[e];
        int first = 0, tile = 0;
        for (int other = 0; other < n_experts; other++) {
            first += other < e ? counts[other] : 0;
            if (groups[other] >= 0 && (groups[other] < group || (groups[other] == group && other < e)))
                tile += n_tiles(counts[other]);
        }
        first_choice[e] = first;
        if (group < 0)
            continue;
        const int place = group ? (-2 - places[e]) % at_once : places[e];
        for (int done = 0; done < counts[e]; done += TILE_TOKENS)
            tiles[tile++] = {e, place, first + done, min(TILE_TOKENS, counts[e] - done)};
    }
    for (int group = thread; group <= n_groups; group += THREADS) {
        int tile = 0;
        for (int e = 0; e < n_experts; e++)
            if (groups[e] >= 0 && groups[e] < group)
                tile += n_tiles(counts[e]);
        first_tile[group] = tile;
    }
}

// choices: sorted by expert, those of one in rising order. Grid: n_experts.
KERNEL(PLACERS)
place_choices(const int *ids, int n_used, const int *first_choice, int *choices, const int *n_tokens) {
    begin_kernel();
    __shared__ int found[2][PLACERS / WARP];
    const int expert = blockIdx.x, thread = threadIdx.x, warp = thread / WARP, n = *n_tokens * n_used;
    int to = first_choice[expert];
    for (int first = 0, turn = 0; first < n; first += PLACERS, turn ^= 1) {
        const int i = first + thread;
        const bool is_own = i < n && ids[i] == expert;
        const unsigned mine = __ballot_sync(ALL_LANES, is_own);
        if (thread % WARP == 0)
            found[turn][warp] = __popc(mine);
        __syncthreads(); // two turns apart, so one barrier is enough
        int before = __popc(mine & ((1u << thread % WARP) - 1)), all = 0;
        for (int w = 0; w < PLACERS / WARP; w++) {
            before += w < warp ? found[turn][w] : 0;
            all += found[turn][w];
        }
        if (is_own)
            choices[to + before] = i;
        to += all;
    }
}
