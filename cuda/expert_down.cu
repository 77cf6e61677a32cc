// Second half of the chosen experts' feed-forward network: out[t][rank][r] = down_e[r] . h[t][rank], not yet weighted.
//
// Compiled for DOWN_FORMAT. Grid: (row blocks, tokens * ranks); a block is 4 warps of `rows_per_warp` rows. Experts
// without a slot are left alone, and there may be a shared expert, as in `expert_gate_up`. h is float32
// [tokens * ranks, ffn_size]; every block puts its row into the form that the format takes. out is float32, `out_stride`
// values from token to token, hidden_size from rank to rank; what the shared expert gives goes to `shared_out`.
#include "experts.cuh"

constexpr int N_WARPS = 4;

KERNEL(N_WARPS *WARP)
expert_down(const int *ids, const int *slots, int n_used, ExpertMatrix down, ExpertMatrix shared_down, const float *h,
            int hidden_size, int ffn_size, float *out, int64_t out_stride, float *shared_out, int64_t shared_out_stride,
            const int8_t *grid, int rows_per_warp, const int *n_tokens) {
    using Dots = RowDots<DOWN_FORMAT, 1>;
    extern __shared__ __align__(128) uint8_t shared[];
    const Choice choice(n_used, shared_down.slots != nullptr);
    const int warp = threadIdx.x / WARP, first_row = ((int)blockIdx.x * N_WARPS + warp) * rows_per_warp;
    // The kernel before made h; the ids are older. There always is a first token.
    const int slot = choice.token == 0 || choice.token < *n_tokens ? choice.slot(choice.expert(ids), slots) : -1;
    const int n_rows = slot < 0 ? 0 : max(0, min(rows_per_warp, hidden_size - first_row));
    const ExpertMatrix matrix = one_of(choice.is_shared, shared_down, down);

    uint8_t *scratch = shared + Dots::staged_bytes(ffn_size) + warp * Dots::scratch_bytes(rows_per_warp, ffn_size);
    const uint8_t *first = matrix.slots + slot * matrix.slot_bytes + first_row * matrix.row_bytes;
    Dots dots(first, matrix.row_bytes, n_rows, ffn_size, rows_per_warp, scratch);
    begin_kernel();
    if (slot < 0)
        return;

    const float *row = h + (int64_t)blockIdx.y * ffn_size;
    Dots::stage_values(shared, row, ffn_size);
    __syncthreads();
    float *rows = choice.is_shared ? shared_out + choice.token * shared_out_stride
                                   : out + choice.token * out_stride + (int64_t)choice.rank * hidden_size;
    dots.run(shared, grid, 1, [&](int i, int, float value) {
        rows[first_row + i] = projected(value, matrix, choice.expert(ids), hidden_size, first_row + i);
    });
}
