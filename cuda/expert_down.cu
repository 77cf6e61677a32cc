// Second half of the chosen experts' feed-forward network: out[t][rank][r] = down_e[r] . h[t][rank], not yet weighted.
//
// Compiled for DOWN_FORMAT. Grid: (row blocks, tokens * n_used); a block is 4 warps of `rows_per_warp` rows. Experts
// without a slot are left alone, as in `expert_gate_up`. h holds activation rows in the form the format takes, one for
// each token and rank; out is float32, `out_stride` values from token to token, hidden_size from rank to rank.
#include "experts.cuh"

constexpr int N_WARPS = 4;
constexpr int MAX_ROWS = 16; // of a warp

KERNEL(N_WARPS *WARP)
expert_down(const int *ids, const int *slots, int n_used, ExpertMatrix down, const uint8_t *h, int64_t h_row_bytes,
            int hidden_size, int ffn_size, float *out, int64_t out_stride, const int8_t *grid, int rows_per_warp,
            const int *n_tokens) {
    using Dots = RowDots<DOWN_FORMAT, 1>;
    __shared__ typename Dots::Scratch scratch[N_WARPS];
    __shared__ float results[N_WARPS][MAX_ROWS];

    const int choice = blockIdx.y, token = choice / n_used, rank = choice % n_used;
    if (token >= *n_tokens)
        return;
    const int expert = ids[choice], slot = slot_of(ids, slots, choice);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_row = ((int)blockIdx.x * N_WARPS + warp) * rows_per_warp;
    const int n_rows = min(rows_per_warp, hidden_size - first_row);
    if (slot < 0 || n_rows <= 0)
        return;

    Dots::run(down.slots + slot * down.slot_bytes + first_row * down.row_bytes, down.row_bytes, n_rows, ffn_size,
              Tokens<1>(h, h_row_bytes, choice, choice + 1), grid, scratch[warp], results[warp]);
    if (lane < n_rows) {
        const int row = first_row + lane;
        out[token * out_stride + (int64_t)rank * hidden_size + row] =
            projected(results[warp][lane], down, expert, hidden_size, row);
    }
}
