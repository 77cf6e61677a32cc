// Rotation by position, for one pair of values.
#pragma once

#include "common.cuh"

// A rotation by position * frequency: cosine and sine, both times `magnitude`.
struct Turn {
    float c, s;
};

DEVICE Turn turn_of(int position, float frequency, float magnitude) {
    // The angle is kept as a float and what rounding it lost, which for long contexts is not small.
    const float angle = (float)position * frequency, lost = __fmaf_rn((float)position, frequency, -angle);
    const float c = cosf(angle), s = sinf(angle);
    return {__fmaf_rn(-s, lost, c) * magnitude, __fmaf_rn(c, lost, s) * magnitude};
}

// Turns pair i of the first n_rot values of a head: (i, i + n_rot / 2), or (2i, 2i + 1) if `is_adjacent`.
DEVICE void rotate(float *head, int i, int n_rot, int is_adjacent, Turn turn) {
    float *first = head + (is_adjacent ? 2 * i : i), *second = head + (is_adjacent ? 2 * i + 1 : i + n_rot / 2);
    const float a = *first, b = *second;
    *first = __fmaf_rn(a, turn.c, -b * turn.s);
    *second = __fmaf_rn(a, turn.s, b * turn.c);
}
