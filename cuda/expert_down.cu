// Second half of the chosen experts' feed-forward network: out[t][rank][r] = down_e[r] . h[t][rank], not yet weighted.
//
// Compiled for DOWN_FORMAT. Grid: (row blocks, tokens * n_used); a block is 4 warps of `rows_per_warp` rows. Experts
// without a slot are left alone, as in `expert_gate_up`. h holds activation rows in the form the format takes, one for
// each token and rank; out is float32, `out_stride` values from token to token, hidden_size from rank to rank.
#include "experts.cuh"

constexpr int N_WARPS = 4;

KERNEL(N_WARPS *WARP)
expert_down(const int *ids, const int *slots, int n_used, ExpertMatrix down, const uint8_t *h, int64_t h_row_bytes,
            int hidden_size, int ffn_size, float *out, int64_t out_stride, const int8_t *grid, int rows_per_warp,
            const int *n_tokens) {
    using Dots = RowDots<DOWN_FORMAT, 1>;
    extern __shared__ __align__(16) uint8_t shared[];
    const int choice = blockIdx.y, token = choice / n_used, rank = choice % n_used, warp = threadIdx.x / WARP;
    const int first_row = ((int)blockIdx.x * N_WARPS + warp) * rows_per_warp;
    // The kernel before made h; the ids are older.
    const int slot = token < *n_tokens ? slot_of(ids, slots, choice) : -1;
    const int n_rows = slot < 0 ? 0 : max(0, min(rows_per_warp, hidden_size - first_row));

    uint8_t *scratch = shared + Dots::staged_bytes(ffn_size) + warp * Dots::SCRATCH_BYTES;
    Dots dots(down.slots + slot * down.slot_bytes + first_row * down.row_bytes, down.row_bytes, n_rows, ffn_size, scratch);
    begin_kernel();
    if (slot < 0)
        return;

    const Tokens<1> tokens(h, h_row_bytes, choice, choice + 1);
    Dots::stage(shared, tokens, ffn_size);
    __syncthreads();
    float *rows = out + token * out_stride + (int64_t)rank * hidden_size + first_row;
    dots.run(shared, tokens, grid, [&](int i, int, float value) {
        rows[i] = projected(value, down, ids[choice], hidden_size, first_row + i);
    });
}
