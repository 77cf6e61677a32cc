// Choosing a token from logits.
//
// The distribution of `sample_token`, in this order:
//
//     penalties    for each id that occurs c > 0 times in `recent`:
//                  l = l > 0 ? l / repetition : l * repetition;  l = l - presence - frequency * c
//     temperature  w = exp((l - max l) * (1 / temperature)), the exp of vmath.h; in sums rounded to a multiple of
//     2^-40, so
//                  that these are exact and the same in whatever order they are made (on a GPU: `cuda/draw.cu`)
//     top-k        the k largest
//     top-p        the fewest of those, largest first, whose sum reaches p of theirs
//     min-p        of those with w >= min_p * the largest
//
// What is left is always a prefix of the ids in order of falling logit (ties: lower id first), and the token is the
// first whose running sum is above uniform * the sum of the prefix. A NaN counts as -infinity, which is never drawn
// unless there is nothing else.
#ifndef ENGINE_SAMPLING_H
#define ENGINE_SAMPLING_H

#include "ops.h"

typedef struct {
    double temperature, top_p, min_p;
    double repetition_penalty, presence_penalty, frequency_penalty;
    int top_k; // 0: all
} sampling_params;

// Returns the id of the largest (ties: the lower one); `ops` are those of any level, here and below.
int largest_logit(const ops_table *ops, const float *logits, int n);

// Returns the id, or -1 without memory.
int sample_token(const ops_table *ops, const float *logits, int n, const int32_t *recent, int n_recent,
                 const sampling_params *params, double uniform);

// Writes the n_top best ids and ln p of each; returns ln sum exp(logit) through log_sum. Returns -1 without memory.
int best_log_probabilities(const ops_table *ops, const float *logits, int n, int n_top, int32_t *ids, float *values,
                           double *log_sum);

#endif
