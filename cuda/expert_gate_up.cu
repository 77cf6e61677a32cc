// First half of the chosen experts' feed-forward network, for experts that have a slot:
// h[t][rank][r] = activated(gate_e[r] . x[t], up_e[r] . x[t]), e = ids[t][rank].
//
// Compiled for GATE_FORMAT, UP_FORMAT and ACTIVATION (0 silu(g) * u; 1 the clamped swish of gpt-oss). Grid: (row blocks,
// tokens * n_used); a block is 4 warps of `rows_per_warp` rows. Experts without a slot (slots[e] < 0) and ids below 0 are left alone: somebody else computes them.
// x_gate and x_up are the same activations, each in the form its format takes. h is float32 [tokens * n_used, ffn_size].
#include "experts.cuh"

constexpr int N_WARPS = 4;
constexpr int MAX_ROWS = 16; // of a warp

KERNEL(N_WARPS *WARP)
expert_gate_up(const int *ids, const int *slots, int n_used, ExpertMatrix gate, ExpertMatrix up, const uint8_t *x_gate,
               int64_t x_gate_row_bytes, const uint8_t *x_up, int64_t x_up_row_bytes, int hidden_size, int ffn_size,
               float *h, const int8_t *gate_grid, const int8_t *up_grid, int rows_per_warp, const int *n_tokens) {
    using Gate = RowDots<GATE_FORMAT, 1>;
    using Up = RowDots<UP_FORMAT, 1>;
    union Scratch { // the second pass begins when the first is over
        typename Gate::Scratch gate;
        typename Up::Scratch up;
    };
    __shared__ Scratch scratch[N_WARPS];
    __shared__ float gates[N_WARPS][MAX_ROWS], ups[N_WARPS][MAX_ROWS];

    const int choice = blockIdx.y, token = choice / n_used; // of all tokens' ranks
    if (token >= *n_tokens)
        return;
    const int expert = ids[choice], slot = slot_of(ids, slots, choice);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_row = ((int)blockIdx.x * N_WARPS + warp) * rows_per_warp;
    const int n_rows = min(rows_per_warp, ffn_size - first_row);
    if (slot < 0 || n_rows <= 0)
        return;

    Gate::run(gate.slots + slot * gate.slot_bytes + first_row * gate.row_bytes, gate.row_bytes, n_rows, hidden_size,
              Tokens<1>(x_gate, x_gate_row_bytes, token, token + 1), gate_grid, scratch[warp].gate, gates[warp]);
    Up::run(up.slots + slot * up.slot_bytes + first_row * up.row_bytes, up.row_bytes, n_rows, hidden_size,
            Tokens<1>(x_up, x_up_row_bytes, token, token + 1), up_grid, scratch[warp].up, ups[warp]);
    if (lane < n_rows) {
        const int row = first_row + lane;
        h[(int64_t)choice * ffn_size + row] = activated(ACTIVATION, projected(gates[warp][lane], gate, expert, ffn_size, row),
                                                        projected(ups[warp][lane], up, expert, ffn_size, row));
    }
}
