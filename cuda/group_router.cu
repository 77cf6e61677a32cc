// Chooses the experts that groups of others share, one for each expert that was chosen: its id divided by the size of a group.
// Its weight is the score that the router has for that number, softmax over all logits, divided by the sum of a token's, or
// by 2^-14 if that is smaller. ids, group_ids and weights are [tokens, n_used]. A warp takes one token. Grid: (1, tokens).
#include "common.cuh"

KERNEL(WARP)
group_router(const float *logits, int64_t logits_stride, const int *ids, int *group_ids, float *weights, int n_experts,
             int n_used, int group_size, const int *n_tokens) {
    begin_kernel();
    const int token = blockIdx.y, lane = threadIdx.x;
    if (token >= *n_tokens)
        return;
    logits += token * logits_stride, ids += token * n_used, group_ids += token * n_used, weights += token * n_used;
    float largest = NEVER, sum = 0.0f, total = 0.0f;
    for (int i = lane; i < n_experts; i += WARP)
        largest = fmaxf(largest, logits[i]);
    largest = warp_max(largest);
    for (int i = lane; i < n_experts; i += WARP)
        sum += exp_canonical(logits[i] - largest);
    sum = warp_sum(sum);
    for (int rank = lane; rank < n_used; rank += WARP) {
        const int id = ids[rank] / group_size;
        const float score = __fdiv_rn(exp_canonical(logits[id] - largest), sum);
        group_ids[rank] = id;
        weights[rank] = score;
        total += score;
    }
    const float divisor = fmaxf(warp_sum(total), 0x1p-14f);
    for (int rank = lane; rank < n_used; rank += WARP)
        weights[rank] = __fdiv_rn(weights[rank], divisor);
}
