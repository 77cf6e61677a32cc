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

#include "common.cuh"

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
    __device__ __forceinline__ int scratch_words() const { return 2 * (N_EXPERTS + N_GROUPS); }
};

// Keys of which a warp takes the best away, one after another: lane l has those from l * PER_LANE on, and knows which
// of them is best. 0 is nobody's.
template <int PER_LANE> struct Ranking {
    unsigned keys[PER_LANE], best;
    int place; // of the best

    __device__ __forceinline__ void find_own() {
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
        best = key[0], place = at[0];
    }

    // The index of the best, the lowest on a tie, for every lane. Some key must be left.
    __device__ __forceinline__ int take_best() {
        const int lane = threadIdx.x % WARP;
        const unsigned largest = __reduce_max_sync(ALL_LANES, best);
        const int owner = __ffs(__ballot_sync(ALL_LANES, best == largest)) - 1;
        const int index = __shfl_sync(ALL_LANES, lane * PER_LANE + place, owner);
        const int taken = lane == owner ? place : -1;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            keys[j] = j == taken ? 0 : keys[j];
        find_own();
        return index;
    }
};

// A float as a number that compares as it does; 0 is nobody's, and NaN counts as the smallest float.
DEVICE unsigned key_of(float value) {
    const unsigned bits = (unsigned)__float_as_int(value > NEVER ? value + 0.0f : NEVER); // + 0: no minus zero
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Chooses for one token, by a warp.
DEVICE void choose(const Routing &routing, int token, float *scratch) {
    constexpr int n_experts = N_EXPERTS, PER_LANE = (N_EXPERTS + WARP - 1) / WARP;
    const int lane = threadIdx.x % WARP, n_used = routing.n_used;
    constexpr int n_groups = N_GROUPS, scoring = SCORING;
    float *scores = scratch, *choices = scores + n_experts, *groups = choices + n_experts;
    int *groups_taken = (int *)(groups + n_groups), *ids = routing.ids + token * n_used;
    float *weights = routing.weights + token * n_used;
    float x[PER_LANE], bias[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) { // other blocks may have written logits a moment ago
        const int i = j * WARP + lane;
        x[j] = i < n_experts ? __ldcv(routing.logits + token * routing.logits_stride + i) : NEVER;
        bias[j] = i < n_experts && routing.bias ? routing.bias[i] : 0.0f;
    }

    float largest = NEVER, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        largest = fmaxf(largest, x[j]);
    largest = warp_max(largest);
    if (scoring == 0) // asked once, so that the exponentials need not wait for each other
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            x[j] = exp_canonical(x[j] - largest);
    else if (scoring == 1)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            x[j] = sigmoid(x[j]);
    else if (scoring == 3)
#pragma unroll
        for (int j = 0; j < PER_LANE; j++)
            x[j] = __fsqrt_rn(softplus(x[j]));
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        if (j * WARP + lane < n_experts)
            sum += x[j];
        else
            x[j] = 0.0f; // nobody's
    sum = warp_sum(sum);
    if (scoring == 0)
        divide(x, sum);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        const int i = j * WARP + lane;
        if (i >= n_experts)
            continue;
        scores[i] = x[j];
        choices[i] = routing.bias ? x[j] + bias[j] : x[j];
    }
    __syncwarp();

    if (n_groups > 1) {
        const int size = n_experts / n_groups;
        for (int g = lane; g < n_groups; g += WARP) {
            float first = NEVER, second = NEVER;
            for (int i = g * size; i < (g + 1) * size; i++)
                if (choices[i] > first)
                    second = first, first = choices[i];
                else if (choices[i] > second)
                    second = choices[i];
            groups[g] = size > 1 ? first + second : first;
            groups_taken[g] = 0;
        }
        __syncwarp();
        for (int k = 0; k < routing.n_groups_used; k++)
            if (lane == 0) {
                int best = -1;
                for (int g = 0; g < n_groups; g++)
                    if (!groups_taken[g] && (best < 0 || groups[g] > groups[best]))
                        best = g;
                groups_taken[best] = 1;
            }
        __syncwarp();
        for (int i = lane; i < n_experts; i += WARP)
            if (!groups_taken[i / size])
                choices[i] = NEVER;
        __syncwarp();
    }

    Ranking<PER_LANE> left;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        const int i = lane * PER_LANE + j;
        left.keys[j] = i < n_experts ? key_of(choices[i]) : 0;
    }
    left.find_own();
    const unsigned token_id = routing.table ? (unsigned)routing.token_ids[token] : 0;
    const int *own = routing.table + (token_id < (unsigned)routing.n_vocab ? token_id : 0) * (int64_t)n_used;
    __syncwarp();
    float *chosen = choices, total = 0.0f, first_score = 0.0f; // the choices are known by their keys now
#pragma unroll 1
    for (int rank = 0; rank < n_used; rank++) {
        const int id = routing.table ? own[rank] : left.take_best();
        float weight = scores[id];
        if (scoring == 2) { // the first is the largest
            first_score = rank ? first_score : weight;
            weight = exp_canonical(weight - first_score);
        }
        total += weight;
        if (lane == 0) {
            ids[rank] = id;
            chosen[rank] = weight;
        }
    }
    __syncwarp();
    const float softmax_sum = scoring == 2 ? total : 1.0f;
    const float divisor = routing.normalize ? fmaxf(__fdiv_rn(total, softmax_sum), 0x1p-14f) : 1.0f;
#pragma unroll 1
    for (int rank = lane; rank < n_used; rank += WARP) {
        float weight = chosen[rank];
        if (scoring == 2)
            weight = __fdiv_rn(weight, softmax_sum);
        if (routing.normalize)
            weight = __fdiv_rn(weight, divisor);
        weights[rank] = weight * routing.scale;
    }
}
