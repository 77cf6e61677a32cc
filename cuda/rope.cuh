// Rotation by position, for one pair of values.
#pragma once

#include "common.cuh"

// Pair i of the first n_rot values of a head, (i, i + n_rot / 2), or (2i, 2i + 1) if `is_adjacent`, by position * frequency;
// cosine and sine times `magnitude`.
DEVICE void rotate(float *head, int i, int n_rot, int is_adjacent, int position, float frequency, float magnitude) {
    // The angle is kept as a float and what rounding it lost, which for long contexts is not small.
    const float angle = (float)position * frequency, lost = __fmaf_rn((float)position, frequency, -angle);
    float c = cosf(angle), s = sinf(angle);
    const float c_rounded = c;
    c = __fmaf_rn(-s, lost, c) * magnitude;
    s = __fmaf_rn(c_rounded, lost, s) * magnitude;

    float *first = head + (is_adjacent ? 2 * i : i), *second = head + (is_adjacent ? 2 * i + 1 : i + n_rot / 2);
    const float a = *first, b = *second;
    *first = __fmaf_rn(a, c, -b * s);
    *second = __fmaf_rn(a, s, b * c);
}
