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

// Collects the ids whose logits are at most `depth` below the largest, never one that is -infinity or NaN.
static void collect(candidates *c, const float *logits, int n, float largest, float depth) {
    const float lowest = largest - depth >= -FLT_MAX ? largest - depth : -FLT_MAX;
    c->n = c->n_popped = 0;
    for (int first = 0; first < n; first += 64) { // groups, so that those without any candidate pass quickly
        const int end = first + 64 < n ? first + 64 : n;
        int n_found = 0;
        for (int i = first; i < end; i++)
            n_found += logits[i] >= lowest;
        for (int i = first; n_found; i++)
            if (logits[i] >= lowest) {
                c->heap[c->n++] = (candidate){logits[i], i};
                n_found--;
            }
    }
    c->is_all = lowest == -FLT_MAX;
    for (int parent = c->n / 2 - 1; parent >= 0; parent--)
        sift_down(c->heap, c->n, parent);
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

// -- all logits ------------------------------------------------------------------------------------------------------

enum { LANES = 16, MAX_BLOCK = 1024 };

static float largest_of(const float *x, int n) {
    float lanes[LANES];
    for (int j = 0; j < LANES; j++)
        lanes[j] = -INFINITY;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (; i < n; i++)
        lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    for (int j = 1; j < LANES; j++)
        lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
    return lanes[0];
}

int largest_logit(const float *logits, int n) {
    int best = 0;
    float largest = -INFINITY;
    for (int first = 0; first < n; first += MAX_BLOCK) {
        const float found = largest_of(logits + first, first + MAX_BLOCK < n ? MAX_BLOCK : n - first);
        if (found > largest) {
            largest = found;
            best = first;
        }
    }
    while (largest > -INFINITY && logits[best] != largest)
        best++;
    return best;
}

static double sum_of(const float *x, int n) {
    double lanes[LANES] = {0.0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lanes[j] += (double)x[i + j];
    for (; i < n; i++)
        lanes[0] += (double)x[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++)
            lanes[j] += lanes[j + half];
    return lanes[0];
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

// Draws one of the candidates; `all` is the sum of all n weights. NOT_ENOUGH if that takes more than were collected.
static int draw(candidates *c, int n, const float *weights, double all, const sampling_params *params, double uniform) {
    const int n_top = params->top_k > 0 && params->top_k < n ? params->top_k : n;
    double total = all;
    const candidate *at;
    if (n_top < n) {
        total = 0.0;
        for (int rank = 0; rank < n_top && (at = ranked(c, rank)); rank++)
            total += (double)weights[at->id];
        if (c->n < n_top && !c->is_all)
            return NOT_ENOUGH;
    }
    int n_kept = n_top;
    if (params->top_p < 1.0 || params->min_p > 0.0) {
        const double wanted = params->top_p < 1.0 ? params->top_p * total : INFINITY;
        double sum = 0.0;
        for (n_kept = 0; n_kept < n_top && (at = ranked(c, n_kept)); n_kept++) {
            const double weight = (double)weights[at->id];
            if (n_kept > 0 && (sum >= wanted || weight < params->min_p))
                break;
            sum += weight;
        }
        if (n_kept < n_top && n_kept == c->n && !c->is_all)
            return NOT_ENOUGH;
        total = sum;
    }
    double sum = 0.0;
    int id = 0;
    for (int rank = 0; rank < n_kept && (at = ranked(c, rank)); rank++) {
        id = at->id;
        sum += (double)weights[id];
        if (sum > uniform * total)
            return id;
    }
    return n_kept <= c->n || c->is_all ? id : NOT_ENOUGH; // the last one: uniform was next to 1
}

static int draw_token(exponentials_fn exponentials, const float *logits, int n, const sampling_params *params,
                      double uniform) {
    const int best = largest_logit(logits, n);
    if (params->temperature <= 0.0 || !isfinite(logits[best])) // nothing to weigh
        return best;
    float *weights = malloc((size_t)n * sizeof *weights);
    candidates c = {.heap = malloc((size_t)n * sizeof *c.heap)};
    int id = -1;
    if (weights && c.heap) {
        const double inverse = 1.0 / params->temperature;
        exponentials(logits, n, logits[best], inverse < (double)FLT_MAX ? (float)inverse : FLT_MAX, weights);
        const double all = sum_of(weights, n);
        float depth = (float)(8.0 * params->temperature);
        do {
            collect(&c, logits, n, logits[best], depth);
            id = draw(&c, n, weights, all, params, uniform);
            depth *= 4.0f;
        } while (id == NOT_ENOUGH);
    }
    free(weights);
    free(c.heap);
    return id;
}

int sample_token(exponentials_fn exponentials, const float *logits, int n, const int32_t *recent, int n_recent,
                 const sampling_params *params, double uniform) {
    if (n_recent == 0)
        return draw_token(exponentials, logits, n, params, uniform);
    float *own = malloc((size_t)n * sizeof *own);
    int32_t *sorted = malloc((size_t)n_recent * sizeof *sorted);
    int id = -1;
    if (own && sorted) {
        memcpy(own, logits, (size_t)n * sizeof *own);
        memcpy(sorted, recent, (size_t)n_recent * sizeof *sorted);
        penalize(own, n, sorted, n_recent, params);
        id = draw_token(exponentials, own, n, params, uniform);
    }
    free(own);
    free(sorted);
    return id;
}

int best_log_probabilities(exponentials_fn exponentials, const float *logits, int n, int n_top, int32_t *ids,
                           float *values, double *log_sum) {
    const float largest = logits[largest_logit(logits, n)];
    float *weights = malloc((size_t)n * sizeof *weights);
    candidates c = {.heap = malloc((size_t)n * sizeof *c.heap)};
    const bool has_memory = weights && c.heap;
    if (has_memory) {
        exponentials(logits, n, largest, 1.0f, weights);
        *log_sum = (double)largest + log(sum_of(weights, n));
        float depth = 8.0f;
        do {
            collect(&c, logits, n, largest, depth);
            depth *= 4.0f;
        } while (c.n < n_top && !c.is_all);
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
    free(weights);
    free(c.heap);
    return has_memory ? 0 : -1;
}
