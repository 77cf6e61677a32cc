// The choice of experts.
#ifndef ENGINE_OPS_ROUTER_H
#define ENGINE_OPS_ROUTER_H

#include "../ops.h"
#include "../vmath.h"

#include <float.h>

enum { PADDED_EXPERTS = MAX_EXPERTS + 16 };

// softmax of n values; `x` has room for a multiple of 16.
static inline void softmax(float *x, int n) {
    v16 largest = v16_set(-INFINITY), sum = v16_set(0.0f);
    const int padded = (n + 15) & ~15;
    for (int i = n; i < padded; i++)
        x[i] = -INFINITY;
    for (int i = 0; i < padded; i += 16)
        largest = v16_max(v16_load(x + i), largest);
    const v16 shift = v16_set(v16_largest(largest));
    for (int i = 0; i < padded; i += 16)
        v16_store(x + i, v16_exp(v16_sub(v16_load(x + i), shift)));
    for (int i = n; i < padded; i++)
        x[i] = 0.0f;
    for (int i = 0; i < padded; i += 16)
        sum = v16_add(sum, v16_load(x + i));
    const v16 total = v16_set(v16_sum(sum));
    for (int i = 0; i < padded; i += 16)
        v16_store(x + i, v16_div(v16_load(x + i), total));
}

// The index of the largest of n values (a multiple of 16), the lowest on a tie. No value is NaN.
static inline int index_of_largest(const float *x, int n) {
    v16 largest = v16_load(x);
    for (int i = 16; i < n; i += 16)
        largest = v16_max(v16_load(x + i), largest);
    const float wanted = v16_largest(largest);
    int index = 0;
    while (x[index] != wanted)
        index++;
    return index;
}

// Finds the `n_wanted` largest of n values, best first, the lower index on a tie; `x` has room for a multiple of 16 and
// is used up. NaN and -inf come after every number.
static inline void largest_first(float *x, int n, int n_wanted, int32_t *indices) {
    const int padded = (n + 15) & ~15;
    for (int i = 0; i < n; i++)
        x[i] = x[i] > -FLT_MAX ? x[i] : -FLT_MAX;
    for (int i = n; i < padded; i++)
        x[i] = -INFINITY;
    for (int i = 0; i < n_wanted; i++) {
        indices[i] = index_of_largest(x, padded);
        x[indices[i]] = -INFINITY;
    }
}

// Leaves only the groups with the best sums of their two best values.
static inline void mask_groups(const router_args *a, float *choice) {
    const int size = a->n_experts / a->n_groups;
    float sums[PADDED_EXPERTS];
    int32_t best_groups[MAX_EXPERTS];
    bool is_kept[MAX_EXPERTS] = {false};
    for (int group = 0; group < a->n_groups; group++) {
        float best = -FLT_MAX, second = -FLT_MAX;
        for (int i = group * size; i < (group + 1) * size; i++)
            if (choice[i] > best) {
                second = best;
                best = choice[i];
            } else if (choice[i] > second)
                second = choice[i];
        sums[group] = size > 1 ? best + second : best;
    }
    largest_first(sums, a->n_groups, a->n_groups_used, best_groups);
    for (int i = 0; i < a->n_groups_used; i++)
        is_kept[best_groups[i]] = true;
    for (int i = 0; i < a->n_experts; i++)
        if (!is_kept[i / size])
            choice[i] = -INFINITY;
}

// `table`: the experts of the token, or NULL.
static void route(const router_args *a, const float *logits, const int32_t *table, int32_t *ids, float *weights) {
    float scores[PADDED_EXPERTS] = {0}, choice[PADDED_EXPERTS];
    const int n = a->n_experts, n_used = a->n_experts_used;
    memcpy(scores, logits, (size_t)n * sizeof(float));
    if (a->scoring == SCORE_SOFTMAX)
        softmax(scores, n);
    else if (a->scoring == SCORE_SIGMOID)
        for (int i = 0; i < n; i += 16)
            v16_store(scores + i, v16_sigmoid(v16_load(scores + i)));
    else if (a->scoring == SCORE_SQRT_SOFTPLUS) {
        for (int i = 0; i < n; i += 16)
            v16_store(scores + i, v16_softplus(v16_load(scores + i)));
        for (int i = 0; i < n; i++)
            scores[i] = sqrtf(scores[i]);
    }
    if (table)
        memcpy(ids, table, (size_t)n_used * sizeof *ids);
    else {
        for (int i = 0; i < n; i++)
            choice[i] = a->bias ? scores[i] + a->bias[i] : scores[i];
        if (a->n_groups > 1)
            mask_groups(a, choice);
        largest_first(choice, n, n_used, ids);
    }

    float chosen[PADDED_EXPERTS], sum = 0.0f;
    for (int i = 0; i < n_used; i++)
        chosen[i] = scores[ids[i]];
    if (a->scoring == SCORE_SOFTMAX_TOPK)
        softmax(chosen, n_used);
    for (int i = 0; i < n_used; i++)
        sum += chosen[i];
    const float divisor = a->normalize ? (sum > 0x1p-14f ? sum : 0x1p-14f) : 1.0f;
    for (int i = 0; i < n_used; i++)
        weights[i] = chosen[i] / divisor * a->scale;
}

static void op_router(const op_args *args, const step_view *step, tile t) {
    const router_args *a = &args->router;
    const int64_t n_used = a->n_experts_used;
    for (int row = t.row; row < t.row_end; row++)
        route(a, a->logits.at + row * a->logits.stride, a->table ? a->table + step->token_ids[row] * n_used : NULL,
              a->ids + row * n_used, a->weights + row * n_used);
}

// The experts that groups of others share, each with the score that the router has for its number.
static void op_group_router(const op_args *args, const step_view *step, tile t) {
    const group_router_args *a = &args->group_router;
    const int n_used = a->n_experts_used;
    (void)step;
    for (int row = t.row; row < t.row_end; row++) {
        const int32_t *ids = a->ids + (int64_t)row * n_used;
        int32_t *group_ids = a->group_ids + (int64_t)row * n_used;
        float scores[PADDED_EXPERTS], *weights = a->weights + (int64_t)row * n_used, sum = 0.0f;
        memcpy(scores, row_of(a->logits, row), (size_t)a->n_experts * sizeof(float));
        softmax(scores, a->n_experts);
        for (int i = 0; i < n_used; i++) {
            group_ids[i] = ids[i] / a->group_size;
            sum += scores[group_ids[i]];
        }
        for (int i = 0; i < n_used; i++)
            weights[i] = scores[group_ids[i]] / (sum > 0x1p-14f ? sum : 0x1p-14f);
    }
}

#endif
