// Parts of the positions that a token attends to: what is known of each, and how they are merged. Compiled for TOP_K,
// BLOCK, TAIL, PERIOD and WINDOW (`attention.cu`).
#pragma once

#include "common.cuh"

constexpr int TILE = 32; // positions

// The softmax over some positions, not yet divided: sum_p exp(score_p - largest) v_p, and sum_p exp(score_p - largest).
struct Part {
    float largest, sum;
};

// The shared rows that a token at a position sees, if there are any (PERIOD > 0).
DEVICE int shared_rows(int position) {
    const int n = PERIOD ? (position + 1) / (PERIOD ? PERIOD : 1) : 0;
    return TOP_K && n > TOP_K ? TOP_K : n;
}

// The last position, or place, that a token at one looks at.
DEVICE int last_position(int position) {
    if (PERIOD)
        return shared_rows(position) + (WINDOW && position >= WINDOW ? WINDOW - 1 : position);
    const int of_newest = TAIL ? (position + 1) % BLOCK : position % BLOCK + 1; // all others are whole
    const int most = (TOP_K - 1) * BLOCK + of_newest;
    return TOP_K && position >= most ? most - 1 : position;
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
DEVICE float merged_value(float keep, float take, float before, float of_part) {
    return __fmaf_rn(of_part, take, before * keep);
}
