// Embeddings of n-grams: which rows of a table hashes of the last tokens choose (`graph.HashTokens`), and the gate of what is
// made of them (`graph.GateByAgreement`).
#include "common.cuh"

constexpr int THREADS = 256;

struct Hashes {
    const uint64_t *multipliers;  // [n_hashed]
    const unsigned *sizes, *offsets; // [n_heads]
    int n_hashed, n_heads, end_id;
};

// out: int32 rows of n_heads. state [n_slots, n_hashed - 1]: the id at a position p is at p % (n_hashed - 1). Tokens of one
// sequence stand together and in order. Grid: 1: all have read the states before one of them is written.
KERNEL(THREADS)
hash_tokens(int *state, int *out, int64_t out_stride, Hashes hashes, const int *token_ids, const int *positions,
            const int *slots, const int *n_tokens, Kept kept) {
    begin_kernel();
    const int n = *n_tokens, kept_after = kept.after(), n_before = hashes.n_hashed - 1, n_heads = hashes.n_heads / n_before; // heads of a length
    for (int t = threadIdx.x; t < n; t += THREADS) {
        uint64_t mixed = (uint64_t)token_ids[t] * hashes.multipliers[0];
        bool has_ended = false;
        for (int i = 1; i <= n_before; i++) {
            const int position = positions[t] - i;
            int id = hashes.end_id;
            if (!has_ended && position >= 0)
                id = t >= i && slots[t - i] == slots[t] ? token_ids[t - i] : state[slots[t] * n_before + position % n_before];
            has_ended = id == hashes.end_id; // what lies before is not looked at any more
            mixed ^= (uint64_t)id * hashes.multipliers[i];
            for (int head = (i - 1) * n_heads; head < i * n_heads; head++)
                out[t * out_stride + head] = (int)(mixed % hashes.sizes[head] + hashes.offsets[head]);
        }
    }
    for (int i = threadIdx.x; kept_after >= 0 && i < n_before; i += THREADS) { // the last ids up to that token
        const int t = kept_after - i, position = positions[kept_after] - i, slot = slots[kept_after];
        if (position >= 0)
            ((int *)kept.to)[position % n_before] =
                t >= 0 && slots[t] == slot ? token_ids[t] : state[slot * n_before + position % n_before];
    }
    __syncthreads();
    for (int t = threadIdx.x; t < n; t += THREADS)
        if (t + n_before >= n || slots[t + n_before] != slots[t]) // the last ones of a sequence
            state[slots[t] * n_before + positions[t] % n_before] = token_ids[t];
}

// out[i] = x * sigmoid(sign(s) * sqrt(max(|s|, floor))) with s = a[i] . b[i] / sqrt(n_cols), for streams of n_cols side by
// side. Grid: (streams, rows); a block of whole warps.
KERNEL(THREADS)
gate_by_agreement(const float *a, int64_t a_stride, const float *b, int64_t b_stride, const float *x, int64_t x_stride,
                  float *out, int64_t out_stride, int n_cols, float floor, const int *n_rows) {
    begin_kernel();
    __shared__ float partial[THREADS / WARP];
    const int row = blockIdx.y, first = blockIdx.x * n_cols;
    if (row >= *n_rows)
        return;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n_cols; i += blockDim.x)
        sum = __fmaf_rn(a[row * a_stride + first + i], b[row * b_stride + first + i], sum);
    const float agreement = __fdiv_rn(block_sum(sum, partial), __fsqrt_rn((float)n_cols));
    const float root = __fsqrt_rn(fmaxf(fabsf(agreement), floor));
    const float gate = sigmoid(agreement > 0.0f ? root : agreement < 0.0f ? -root : 0.0f);
    for (int i = threadIdx.x; i < n_cols; i += blockDim.x)
        out[row * out_stride + first + i] = x[row * x_stride + i] * gate;
}
