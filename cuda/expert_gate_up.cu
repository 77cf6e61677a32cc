// First half of the chosen experts' feed-forward network, for experts that have a slot:
// h[t][rank][r] = activated(gate_e[r] . x[t], up_e[r] . x[t]), e = ids[t][rank].
//
// Compiled for GATE_FORMAT, UP_FORMAT, ACTIVATION, LIMIT and UP_LIMIT (`activated` in `experts.cuh`). Grid: (row blocks,
// tokens * ranks); a block is 4 warps: the first two take `rows_per_warp` rows of gate each, the others the same rows of
// up. Experts without a slot (slots[e] < 0) and ids below 0 are left alone: somebody else computes them. There are n_used
// ranks, and one more for a shared expert, if there is one (its matrices then are not null).
// x_gate and x_up are the same activations, each in the form its format takes. h is float32 [tokens * ranks, ffn_size].
#include "experts.cuh"

constexpr int N_WARPS = 4;
constexpr int MAX_ROWS = WARP; // of a warp

// What the block shares, after the activations: `x_up` are the same as `x_gate` where both formats take the same form, and
// lie there once if in the same order, too.
struct Share {
    int expert, slot, first_row, n_rows, most_rows; // of a warp
    int hidden_size, ffn_size;
};

template <class Dots>
DEVICE void project(const ExpertMatrix &matrix, const Share &own, const uint8_t *records, const int8_t *grid, uint8_t *scratch,
                    float *values) {
    const uint8_t *first = matrix.slots + own.slot * matrix.slot_bytes + own.first_row * matrix.row_bytes;
    Dots dots(first, matrix.row_bytes, own.n_rows, own.hidden_size, own.most_rows, scratch);
    __syncthreads(); // the activations are there
    dots.run(records, grid, 1, [&](int i, int, float value) {
        values[i] = projected(value, matrix, own.expert, own.ffn_size, own.first_row + i);
    });
}

KERNEL(N_WARPS *WARP)
expert_gate_up(const int *ids, const int *slots, int n_used, ExpertMatrix gate, ExpertMatrix up, ExpertMatrix shared_gate,
               ExpertMatrix shared_up, const uint8_t *x_gate, int64_t x_gate_row_bytes, const uint8_t *x_up,
               int64_t x_up_row_bytes, int hidden_size, int ffn_size, float *h, const int8_t *gate_grid, const int8_t *up_grid,
               int rows_per_warp, const int *n_tokens) {
    using Gate = RowDots<GATE_FORMAT, 1>;
    using Up = RowDots<UP_FORMAT, 1>;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float gates[N_WARPS / 2][MAX_ROWS], ups[N_WARPS / 2][MAX_ROWS];

    begin_kernel();
    const Choice choice(n_used, shared_gate.slots != nullptr);
    if (choice.token > 0 && choice.token >= *n_tokens) // there always is a first token, which need not wait for their number
        return;
    const int expert = choice.expert(ids), token = choice.token;
    const Tokens<1> gate_tokens(x_gate, x_gate_row_bytes, token, token + 1), up_tokens(x_up, x_up_row_bytes, token, token + 1);
    const bool same_records = x_up == x_gate && Up::FORM == Gate::FORM;
    uint8_t *up_records = shared + (same_records ? 0 : Gate::staged_bytes(hidden_size));
    Gate::stage(shared, gate_tokens, hidden_size);
    if (!same_records)
        Up::stage(up_records, up_tokens, hidden_size);
    const int slot = choice.slot(expert, slots);
    if (slot < 0)
        return;
    const int warp = threadIdx.x / WARP, pair = warp % (N_WARPS / 2);
    const int first_row = ((int)blockIdx.x * N_WARPS / 2 + pair) * rows_per_warp;
    const int n_rows = max(0, min(rows_per_warp, ffn_size - first_row));

    const int scratch_bytes =
        max(Gate::scratch_bytes(rows_per_warp, hidden_size), Up::scratch_bytes(rows_per_warp, hidden_size));
    uint8_t *scratch = up_records + Up::staged_bytes(hidden_size) + warp * scratch_bytes;
    const Share own{expert, slot, first_row, n_rows, rows_per_warp, hidden_size, ffn_size};
    const ExpertMatrix own_gate = one_of(choice.is_shared, shared_gate, gate), own_up = one_of(choice.is_shared, shared_up, up);
    const bool is_gate = warp < N_WARPS / 2;
    float *values = is_gate ? gates[pair] : ups[pair];
    if constexpr (IS_SAME<Gate, Up>) // one code for both: a multiprocessor has to fetch half as much of it
        project<Gate>(one_of(is_gate, own_gate, own_up), own, is_gate ? shared : up_records, is_gate ? gate_grid : up_grid,
                      scratch, values);
    else if (is_gate)
        project<Gate>(own_gate, own, shared, gate_grid, scratch, values);
    else
        project<Up>(own_up, own, up_records, up_grid, scratch, values);
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    if (is_gate && lane < n_rows)
        h[(int64_t)blockIdx.y * ffn_size + first_row + lane] =
            activated(ACTIVATION, LIMIT, UP_LIMIT, gates[pair][lane], ups[pair][lane]);
}
