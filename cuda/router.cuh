// Chooses experts: ids and weights [tokens, n_used], falling score, ties to the lower id.
//
// SCORING: 0 softmax over all experts, 1 a sigmoid for each, 2 softmax over the chosen ones only, 3 the square root of
// softplus. `bias` (or null) is added to the scores for choosing only. With groups (N_GROUPS > 1), only the experts of the
// best `n_groups_used` groups can be chosen; a group is as good as its two best experts together. With a `table` ids are
// those of the token's row, in its order. `normalize` divides the weights by their sum, or by 2^-14 if that is smaller;
// then they are multiplied by `scale`.
//
// Compiled for N_EXPERTS, SCORING and N_GROUPS: what a model does not use costs nothing.
#pragma once

#include "quantize.cuh"

struct Routing {
    const float *logits;
    int64_t logits_stride;
    const float *bias;
    int *ids;
    float *weights;
    const int *table; // [n_vocab, n_used], or null
    const int *token_ids;
    int n_used, n_groups_used, normalize;
    float scale;
    int n_vocab; // an id outside takes the first row: the host has checked them

    // Four-byte words that `choose` needs.
    __device__ __forceinline__ int scratch_words() const { return 2 * (N_EXPERTS + N_GROUPS) + n_used; }
};

// Keys of which a warp takes the best away, one after another: lane l has those from l * PER_LANE on, and knows which of
// them is best. 0 is nobody's.
template <int PER_LANE> struct Ranking {
    unsigned keys[PER_LANE], best, next; // keys: without the lane's best; next: the best of those
    int best_place, next_place;

    __device__ __forceinline__ void find_next() {
        unsigned key[PER_LANE];
        int at[PER_LANE];
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            key[j] = keys[j], at[j] = j;
#pragma unroll
        for (int step = 1; step < PER_LANE; step *= 2) // a tree, the lower one on a tie
#pragma unroll
            for (int j = 0; j + step < PER_LANE; j += 2 * step)
                if (key[j + step] > key[j])
                    key[j] = key[j + step], at[j] = at[j + step];
        next = key[0], next_place = at[0];
    }

    // If the lane's best is taken, the next is its best.
    __device__ __forceinline__ void go_on(bool is_taken) {
        best = is_taken ? next : best, best_place = is_taken ? next_place : best_place;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            keys[j] = is_taken && j == next_place ? 0 : keys[j];
    }

    __device__ __forceinline__ void begin() {
        find_next();
        go_on(true);
    }

    // Stores the index of the best, the lowest on a tie. Some key must be left.
    __device__ __forceinline__ void take_best(int *to) {
        const int lane = threadIdx.x % WARP;
        const unsigned largest = __reduce_max_sync(ALL_LANES, best);
        find_next(); // while the warp agrees on the largest
        const unsigned owners = __ballot_sync(ALL_LANES, best == largest), own = 1u << lane;
        const bool is_owner = (owners & (own | (own - 1))) == own;
        if (is_owner)
            *to = lane * PER_LANE + best_place;
        go_on(is_owner);
    }
};

// A float as a number that compares as it does; 0 is nobody's, and NaN counts as the smallest float.
DEVICE unsigned key_of(float value) {
    const unsigned bits = (unsigned)__float_as_int(value > NEVER ? value + 0.0f : NEVER); // + 0: no minus zero
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The largest of the lanes' values, one of them not NaN.
DEVICE float largest_of_warp(float value) {
    const unsigned key = __reduce_max_sync(ALL_LANES, key_of(value));
    return __int_as_float((int)(key & 0x80000000u ? key & 0x7fffffffu : ~key));
}

// A lane's logits, from lane * N on, which other blocks may have written a moment ago; nobody's are NEVER.
template <int N> DEVICE void load_logits(const float *logits, float (&x)[N]) {
    const int first = threadIdx.x % WARP * N;
    if constexpr (N_EXPERTS % (4 * WARP) == 0)
        load_floats_past_cache(logits + first, x);
    else
#pragma unroll
        for (int j = 0; j < N; j++)
            x[j] = first + j < N_EXPERTS ? __ldcv(logits + first + j) : NEVER;
}

// Lets only experts of the best groups have a choice that is not NEVER. `groups` is shared, two words for each.
DEVICE void choose_groups(float *choices, float *groups, int n_groups_used) {
    constexpr int SIZE = N_EXPERTS / N_GROUPS;
    const int lane = threadIdx.x % WARP;
    int *taken = (int *)(groups + N_GROUPS);
    for (int g = lane; g < N_GROUPS; g += WARP) {
        float first = NEVER, second = NEVER;
        for (int i = g * SIZE; i < (g + 1) * SIZE; i++)
            if (choices[i] > first)
                second = first, first = choices[i];
            else if (choices[i] > second)
                second = choices[i];
        groups[g] = SIZE > 1 ? first + second : first;
        taken[g] = 0;
    }
    __syncwarp();
    for (int k = 0; k < n_groups_used; k++)
        if (lane == 0) {
            int best = -1;
            for (int g = 0; g < N_GROUPS; g++)
                if (!taken[g] && (best < 0 || groups[g] > groups[best]))
                    best = g;
            taken[best] = 1;
        }
    __syncwarp();
    for (int i = lane; i < N_EXPERTS; i += WARP)
        if (!taken[i / SIZE])
            choices[i] = NEVER;
    __syncwarp();
}

// Chooses for one token, by a warp. Each choice is also told to `chosen(place, id)`, by some lane; place: in the ids of all
// tokens. `scratch` is shared, `Routing::scratch_words`.
template <class Chosen> DEVICE void choose(const Routing &routing, int token, float *scratch, Chosen chosen) {
    constexpr int PER_LANE = (N_EXPERTS + WARP - 1) / WARP;
    const int lane = threadIdx.x % WARP, first = lane * PER_LANE, n_used = routing.n_used;
    float *scores = scratch, *choices = scores + N_EXPERTS;
    float x[PER_LANE], bias[PER_LANE];
    load_logits(routing.logits + token * routing.logits_stride, x);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        bias[j] = first + j < N_EXPERTS && routing.bias ? routing.bias[first + j] : 0.0f;
    const unsigned token_id = routing.table ? (unsigned)routing.token_ids[token] : 0;

    if (SCORING == 0) { // asked once, so that the exponentials need not wait for each other
        float largest = NEVER, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            largest = fmaxf(largest, x[j]);
        largest = largest_of_warp(largest);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            x[j] = first + j < N_EXPERTS ? exp_canonical(x[j] - largest) : 0.0f;
            sum += x[j];
        }
        divide(x, warp_sum(sum));
    } else if (SCORING == 1)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            x[j] = sigmoid(x[j]);
    else if (SCORING == 3)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            x[j] = __fsqrt_rn(softplus(x[j]));

#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        if (first + j < N_EXPERTS)
            scores[first + j] = x[j];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        x[j] = routing.bias ? x[j] + bias[j] : x[j];
    if (N_GROUPS > 1) {
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            if (first + j < N_EXPERTS)
                choices[first + j] = x[j];
        __syncwarp();
        choose_groups(choices, choices + N_EXPERTS, routing.n_groups_used);
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            x[j] = first + j < N_EXPERTS ? choices[first + j] : NEVER;
        __syncwarp();
    }

    int *ids = (int *)choices; // which are known by their keys from here on
    if (routing.table) {
        const int *own = routing.table + (token_id < (unsigned)routing.n_vocab ? token_id : 0) * (int64_t)n_used;
#pragma unroll 1
        for (int rank = lane; rank < n_used; rank += WARP)
            ids[rank] = own[rank];
    } else {
        Ranking<PER_LANE> left;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            left.keys[j] = first + j < N_EXPERTS ? key_of(x[j]) : 0;
        left.begin();
#pragma unroll 1
        for (int rank = 0; rank < n_used; rank++)
            left.take_best(ids + rank);
    }
    __syncwarp();

    float *weights = choices + N_EXPERTS + 2 * N_GROUPS, total = 0.0f;
    const float best = SCORING == 2 ? scores[ids[0]] : 0.0f; // the largest
#pragma unroll 1
    for (int rank = lane; rank < n_used; rank += WARP) {
        const float score = scores[ids[rank]];
        weights[rank] = SCORING == 2 ? exp_canonical(score - best) : score;
    }
    __syncwarp();
#pragma unroll 4
    for (int rank = 0; rank < n_used; rank++)
        total += weights[rank];
    const float softmax_sum = total;
    if (SCORING == 2)
        total = __fdiv_rn(total, softmax_sum);
    const float divisor = fmaxf(total, 0x1p-14f);
#pragma unroll 1
    for (int rank = lane; rank < n_used; rank += WARP) {
        const int id = ids[rank], place = token * n_used + rank;
        float weight = weights[rank];
        if (SCORING == 2)
            weight = __fdiv_rn(weight, softmax_sum);
        if (routing.normalize)
            weight = __fdiv_rn(weight, divisor);
        routing.ids[place] = id;
        routing.weights[place] = weight * routing.scale;
        chosen(place, id);
    }
}
