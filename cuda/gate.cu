// Eight columns a lane: out = x * f(gate), where x may first be normalised head by head, and out in the forms that integer
// formats take.
//
// Compiled for GATING, LIMIT, OWN_LIMIT and HEAD_SIZE (`gate.cuh`), PER_HEAD, FORMS (`quantize.cuh`) and N_STREAMS: with more
// than one of them, of n_cols side by side in x, out is their sum. The gate has `gate_width` values for each head, `gate_step`
// apart; with PER_HEAD it is one value for so many columns. In place allowed.
// Grid: (ceil(n_cols / 1024), rows); n_cols is a multiple of 8, and of HEAD_SIZE.
#include "gate.cuh"
#include "quantize.cuh"

KERNEL(4 * WARP)
gate(const float *x, int64_t x_stride, const float *gate, int64_t gate_stride, int gate_width, int gate_step,
     const float *weight, float eps, float *out, int64_t out_stride, Forms forms, int n_cols, const int *n_rows) {
    const int row = blockIdx.y, at = (blockIdx.x * 4 * WARP + threadIdx.x) * 8, n = *n_rows; // as the caller gave it: old
    begin_kernel();
    if (row >= n || at - threadIdx.x % WARP * 8 >= n_cols)
        return;
    const bool exists = at < n_cols;
    float v[8] = {};
#pragma unroll
    for (int stream = 0; stream < N_STREAMS; stream++) {
        const int from = stream * n_cols + at;
        float own[8] = {}, g[8] = {};
        if (exists) {
            load_floats(x + row * x_stride + from, own);
            const float *own_gate = gate_at<PER_HEAD>(gate + row * gate_stride, from, gate_width, gate_step);
            if (!PER_HEAD)
                load_floats(own_gate, g);
            else
#pragma unroll
                for (int i = 0; i < 8; i++)
                    g[i] = *own_gate;
        }
        if constexpr (HEAD_SIZE > 0)
            normalize_heads<HEAD_SIZE>(own, at, weight, eps);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float value = gated<GATING>(own[i], g[i], LIMIT, OWN_LIMIT);
            v[i] = stream ? v[i] + value : value;
        }
    }
    if (exists)
        store_floats(out + row * out_stride + at, v);
    forms.store<FORMS>(v, row, at, n_cols);
}
