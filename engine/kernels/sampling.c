#include "sampling.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

// Larger logit first, then lower id.
typedef struct {
    float logit;
    int32_t id;
} candidate;

// The best ids of many, as a heap with the best one on top: most draws look at a few of a hundred thousand, so that
// sorting all, or only putting all into a heap, would be waste.
typedef struct {
    candidate *heap; // those popped stand behind it, the first one last
    int n, n_popped;
    bool is_all; // of the ids that can be drawn
} candidates;

enum { BLOCK = 256 }; // logits: most blocks have no candidate, and are read once

// How a logit becomes a weight.
typedef struct {
    exponentials_fn exponentials;
    float largest, scale;
} weighing;

// The same bits for one logit as for many.
static float weight_of(const weighing *w, float logit) {
    float weight;
    w->exponentials(&logit, 1, w->largest, w->scale, &weight);
    return weight;
}

// A weight, at most 1, as a multiple of 2^-40: the last bits of its sum with a number whose last bit is that much.
static int64_t units(float weight) {
    const double large = 0x1.8p12, sum = (double)weight + large;
    int64_t bits, bits_of_large;
    memcpy(&bits, &sum, sizeof bits);
    memcpy(&bits_of_large, &large, sizeof bits_of_large);
    return bits - bits_of_large;
}

// -- candidates ------------------------------------------------------------------------------------------------------

static bool comes_before(candidate a, candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

static void sift_down(candidate *heap, int n, int parent) {
    const candidate moved = heap[parent];
    for (int child; (child = 2 * parent + 1) < n; parent = child) {
        if (child + 1 < n && comes_before(heap[child + 1], heap[child]))
            child++;
        if (!comes_before(heap[child], moved))
            break;
        heap[parent] = heap[child];
    }
    heap[parent] = moved;
}

static void heapify(candidates *c, int n) {
    c->n = n;
    c->n_popped = 0;
    for (int parent = n / 2 - 1; parent >= 0; parent--)
        sift_down(c->heap, n, parent);
}

// The candidate of a rank; the ranks before it have been asked for. NULL if none is left.
static const candidate *ranked(candidates *c, int rank) {
    if (rank < c->n_popped)
        return &c->heap[c->n - 1 - rank];
    if (c->n_popped == c->n)
        return NULL;
    const int last = c->n - 1 - c->n_popped++;
    const candidate best = c->heap[0];
    c->heap[0] = c->heap[last];
    c->heap[last] = best;
    sift_down(c->heap, last, 0);
    return &c->heap[last];
}

// Collects the ids whose logits are `lowest` or more, never one that is -infinity or NaN.
static void collect(candidates *c, const float *logits, int n, const float *maxima, float lowest) {
    lowest = lowest >= -FLT_MAX ? lowest : -FLT_MAX;
    int n_found = 0;
    for (int first = 0; first < n; first += BLOCK) {
        const int end = maxima[first / BLOCK] < lowest ? first : first + BLOCK < n ? first + BLOCK : n;
        for (int i = first; i < end; i++)
            if (logits[i] >= lowest)
                c->heap[n_found++] = (candidate){logits[i], i};
    }
    c->is_all = lowest == -FLT_MAX;
    heapify(c, n_found);
}

// Collects k ids or a few more: as many blocks have one each that reaches the k-th largest of their maxima.
static void collect_best(candidates *c, const float *logits, int n, const float *maxima, int k) {
    const int n_blocks = (n + BLOCK - 1) / BLOCK;
    for (int i = 0; i < n_blocks; i++)
        c->heap[i] = (candidate){maxima[i], i};
    heapify(c, n_blocks);
    float lowest = -INFINITY; // too few blocks: all ids
    for (int rank = 0; rank < k && k <= n_blocks; rank++)
        lowest = ranked(c, rank)->logit;
    collect(c, logits, n, maxima, lowest);
}

// -- all logits ------------------------------------------------------------------------------------------------------

// Returns the id of the largest logit, the lower one of two. maxima: gets those of all blocks, or null.
static int find_largest(const ops_table *ops, const float *logits, int n, float *maxima) {
    int best = 0;
    float largest = -INFINITY;
    for (int first = 0; first < n; first += BLOCK) {
        const float found = ops->largest(logits + first, first + BLOCK < n ? BLOCK : n - first);
        if (maxima)
            maxima[first / BLOCK] = found;
        if (found > largest) {
            largest = found;
            best = first;
        }
    }
    while (largest > -INFINITY && logits[best] != largest)
        best++;
    return best;
}

int largest_logit(const ops_table *ops, const float *logits, int n) { return find_largest(ops, logits, n, NULL); }

static float *maxima_for(int n) { return malloc((size_t)(n / BLOCK + 1) * sizeof(float)); }

static int64_t sum_of_weights(const weighing *w, const float *logits, int n) {
    float weights[BLOCK];
    int64_t sum = 0;
    for (int first = 0; first < n; first += BLOCK) {
        const int n_block = first + BLOCK < n ? BLOCK : n - first;
        w->exponentials(logits + first, n_block, w->largest, w->scale, weights);
        for (int i = 0; i < n_block; i++)
            sum += units(weights[i]);
    }
    return sum;
}

static int compare_ids(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

// `recent` is sorted in place.
static void penalize(float *logits, int n, int32_t *recent, int n_recent, const sampling_params *params) {
    qsort(recent, (size_t)n_recent, sizeof *recent, compare_ids);
    for (int i = 0, next; i < n_recent; i = next) {
        for (next = i + 1; next < n_recent && recent[next] == recent[i]; next++) {
        }
        if (recent[i] < 0 || recent[i] >= n)
            continue;
        double logit = (double)logits[recent[i]];
        logit = logit > 0 ? logit / params->repetition_penalty : logit * params->repetition_penalty;
        logit -= params->presence_penalty + params->frequency_penalty * (next - i);
        logits[recent[i]] = (float)logit;
    }
}

// -- drawing ---------------------------------------------------------------------------------------------------------

enum { NOT_ENOUGH = -2 };

// Draws one of the candidates; `all` is the sum of all n weights, if no top-k is asked for. NOT_ENOUGH if that takes
// more than were collected.
static int draw(candidates *c, const weighing *w, int n, int64_t all, const sampling_params *params, double uniform) {
    const int n_top = params->top_k > 0 && params->top_k < n ? params->top_k : n;
    int64_t total = all;
    const candidate *at;
    if (n_top < n) {
        total = 0;
        for (int rank = 0; rank < n_top && (at = ranked(c, rank)); rank++)
            total += units(weight_of(w, at->logit));
        if (c->n < n_top && !c->is_all)
            return NOT_ENOUGH;
    }
    int n_kept = n_top;
    if (params->top_p < 1.0 || params->min_p > 0.0) {
        const double wanted = params->top_p < 1.0 ? params->top_p * (double)total : INFINITY;
        int64_t sum = 0;
        for (n_kept = 0; n_kept < n_top && (at = ranked(c, n_kept)); n_kept++) {
            const float weight = weight_of(w, at->logit);
            if (n_kept > 0 && ((double)sum >= wanted || (double)weight < params->min_p))
                break;
            sum += units(weight);
        }
        if (n_kept < n_top && n_kept == c->n && !c->is_all)
            return NOT_ENOUGH;
        total = sum;
    }
    int64_t sum = 0;
    int id = 0;
    for (int rank = 0; rank < n_kept && (at = ranked(c, rank)); rank++) {
        id = at->id;
        sum += units(weight_of(w, at->logit));
        if ((double)sum > uniform * (double)total)
            return id;
    }
    return n_kept <= c->n || c->is_all ? id : NOT_ENOUGH; // the last one: uniform was next to 1
}

static int draw_token(const ops_table *ops, const float *logits, int n, const sampling_params *params, double uniform) {
    if (params->temperature <= 0.0)
        return largest_logit(ops, logits, n);
    float *maxima = maxima_for(n);
    candidates c = {.heap = malloc((size_t)n * sizeof *c.heap)};
    int id = -1;
    if (maxima && c.heap) {
        const int best = id = find_largest(ops, logits, n, maxima);
        const double inverse = 1.0 / params->temperature;
        const weighing w = {ops->exponentials, logits[best], inverse < (double)FLT_MAX ? (float)inverse : FLT_MAX};
        const bool needs_all = params->top_k == 0 || params->top_k >= n, can_weigh = isfinite(w.largest);
        const int64_t all = needs_all && can_weigh ? sum_of_weights(&w, logits, n) : 0;
        // Less than the distance to the next float would be no step at all, however often it is doubled.
        float depth = fmaxf((float)(8.0 * params->temperature), fmaxf(FLT_MIN, fabsf(w.largest) * FLT_EPSILON));
        if (can_weigh)
            do {
                if (params->top_k > 0 && params->top_k <= n / BLOCK)
                    collect_best(&c, logits, n, maxima, params->top_k);
                else
                    collect(&c, logits, n, maxima, w.largest - depth);
                id = draw(&c, &w, n, all, params, uniform);
                depth *= 2.0f;
            } while (id == NOT_ENOUGH);
    }
    free(maxima);
    free(c.heap);
    return id;
}

int sample_token(const ops_table *ops, const float *logits, int n, const int32_t *recent, int n_recent,
                 const sampling_params *params, double uniform) {
    if (n_recent == 0)
        return draw_token(ops, logits, n, params, uniform);
    float *own = malloc((size_t)n * sizeof *own);
    int32_t *sorted = malloc((size_t)n_recent * sizeof *sorted);
    int id = -1;
    if (own && sorted) {
        memcpy(own, logits, (size_t)n * sizeof *own);
        memcpy(sorted, recent, (size_t)n_recent * sizeof *sorted);
        penalize(own, n, sorted, n_recent, params);
        id = draw_token(ops, own, n, params, uniform);
    }
    free(own);
    free(sorted);
    return id;
}

int best_log_probabilities(const ops_table *ops, const float *logits, int n, int n_top, int32_t *ids, float *values,
                           double *log_sum) {
    float *maxima = maxima_for(n);
    candidates c = {.heap = malloc((size_t)n * sizeof *c.heap)};
    const bool has_memory = maxima && c.heap;
    if (has_memory) {
        const weighing w = {ops->exponentials, logits[find_largest(ops, logits, n, maxima)], 1.0f};
        *log_sum = (double)w.largest + log(0x1p-40 * (double)sum_of_weights(&w, logits, n));
        collect_best(&c, logits, n, maxima, n_top);
        int rank = 0;
        for (const candidate *at; rank < n_top && (at = ranked(&c, rank)); rank++) {
            ids[rank] = at->id;
            values[rank] = (float)((double)at->logit - *log_sum);
        }
        for (int id = 0; rank < n_top; id++) // no more numbers: -infinity and NaN
            if (!(logits[id] >= -FLT_MAX)) {
                ids[rank] = id;
                values[rank++] = -INFINITY;
            }
    }
    free(maxima);
    free(c.heap);
    return has_memory ? 0 : -1;
}
