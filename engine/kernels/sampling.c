#include "sampling.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

// Larger logit first, then lower id.
typedef struct {
    float logit;
    int32_t id;
} candidate;

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

// A heap with the best candidate on top: most draws look at a few of a hundred thousand, so sorting all would be waste.
static candidate *make_heap(const float *logits, int n) {
    candidate *heap = malloc((size_t)n * sizeof *heap); // n is at least 1
    if (!heap)
        return NULL;
    for (int i = 0; i < n; i++)
        heap[i] = (candidate){isnan(logits[i]) ? -INFINITY : logits[i], i};
    for (int parent = n / 2 - 1; parent >= 0; parent--)
        sift_down(heap, n, parent);
    return heap;
}

// Moves the best of n candidates to the end of the heap.
static candidate pop(candidate *heap, int n) {
    const candidate best = heap[0];
    heap[0] = heap[n - 1];
    heap[n - 1] = best;
    sift_down(heap, n - 1, 0);
    return best;
}

int largest_logit(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best] || isnan(logits[best]))
            best = i;
    return best;
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

// Draws from a heap of n candidates, which is used up.
static int draw(candidate *heap, int n, const sampling_params *params, double uniform) {
    const double largest = (double)heap[0].logit, scale = 1.0 / params->temperature;
    if (!isfinite(largest)) // all -inf, or an infinite one: nothing to weigh
        return heap[0].id;
#define WEIGHT(candidate) exp(((double)(candidate).logit - largest) * scale)
    const int n_top = params->top_k > 0 && params->top_k < n ? params->top_k : n;
    double total = 0.0;
    int n_popped = 0; // heap[n - 1], heap[n - 2] ... are the best, in order
    if (n_top < n)
        for (; n_popped < n_top; n_popped++)
            total += WEIGHT(pop(heap, n - n_popped));
    else
        for (int i = 0; i < n; i++)
            total += WEIGHT(heap[i]);

    int n_kept = n_top;
    if (params->top_p < 1.0 || params->min_p > 0.0) {
        double sum = 0.0;
        for (n_kept = 0; n_kept < n_top; n_kept++) {
            if (n_kept == n_popped)
                pop(heap, n - n_popped++);
            const double weight = WEIGHT(heap[n - 1 - n_kept]);
            if (n_kept > 0 && (sum >= params->top_p * total || weight < params->min_p))
                break;
            sum += weight;
        }
        total = sum;
    }
    double sum = 0.0;
    for (int i = 0; i < n_kept; i++) {
        if (i == n_popped)
            pop(heap, n - n_popped++);
        sum += WEIGHT(heap[n - 1 - i]);
        if (sum > uniform * total)
            return heap[n - 1 - i].id;
    }
#undef WEIGHT
    return heap[n - n_kept].id; // rounding: uniform was next to 1
}

int sample_token(const float *logits, int n, const int32_t *recent, int n_recent, const sampling_params *params,
                 double uniform) {
    float *own = malloc((size_t)n * sizeof *own);
    int32_t *sorted = malloc((size_t)(n_recent + 1) * sizeof *sorted);
    int id = -1;
    if (own && sorted) {
        memcpy(own, logits, (size_t)n * sizeof *own);
        memcpy(sorted, recent, (size_t)n_recent * sizeof *sorted);
        penalize(own, n, sorted, n_recent, params);
        if (params->temperature <= 0.0) {
            id = largest_logit(own, n);
        } else {
            candidate *heap = make_heap(own, n);
            id = heap ? draw(heap, n, params, uniform) : -1;
            free(heap);
        }
    }
    free(own);
    free(sorted);
    return id;
}

int best_log_probabilities(const float *logits, int n, int n_top, int32_t *ids, float *values, double *log_sum) {
    candidate *heap = make_heap(logits, n);
    if (!heap)
        return -1;
    const double largest = (double)heap[0].logit;
    double sum = 0.0;
    for (int i = 0; i < n; i++)
        sum += exp((double)heap[i].logit - largest);
    *log_sum = largest + log(sum);
    for (int i = 0; i < n_top; i++) {
        const candidate best = pop(heap, n - i);
        ids[i] = best.id;
        values[i] = (float)((double)best.logit - *log_sum);
    }
    free(heap);
    return 0;
}
