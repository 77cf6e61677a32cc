// As `expert_gate_up.cu`, for one group of experts and many tokens: h[choice][r] = activated(gate_e[r] . x[t], up_e[r] . x[t])
// for each choice of token t and expert e.
//
// Compiled for GATE_FORMAT, UP_FORMAT (integer ones), ACTIVATION, LIMIT and UP_LIMIT (`experts.cuh`), and TILE_WARPS. Grid: (row blocks,
// tiles that are computed at the same time). Dynamic shared memory: the larger `Shared` of both formats. `gate` and `up`
// are where the group's experts are: the slots, or a staging buffer.
#include "expert_tiles.cuh"
#include "tiles.cuh"

template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;

DEVICE void copy(const TileSums &from, TileSums &to) {
#pragma unroll
    for (int j = 0; j < EIGHTS; j++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            to[j][k] = from[j][k];
}

template <class Dots>
DEVICE void multiply(const ExpertMatrix &matrix, const ExpertTile &tile, int first_row, int n_rows, int n_cols,
                     const uint8_t *const *rows, const int8_t *grid, uint8_t *shared, TileSums &acc) {
    Dots::run(matrix.slots + tile.place * matrix.slot_bytes, matrix.row_bytes, first_row, n_rows, n_cols, rows, tile.n, grid,
              *(typename Dots::Shared *)shared, acc);
}

TILE_KERNEL(1)
expert_gate_up_tiles(const ExpertTile *tiles, const int *first_tile, int group, const int *choices, int n_used,
                     ExpertMatrix gate, ExpertMatrix up, const uint8_t *x_gate, int64_t x_gate_row_bytes,
                     const uint8_t *x_up, int64_t x_up_row_bytes, int hidden_size, int ffn_size, float *h,
                     const int8_t *gate_grid, const int8_t *up_grid) {
    begin_kernel();
    using Gate = TileDots<GATE_FORMAT>;
    using Up = TileDots<UP_FORMAT>;
    extern __shared__ __align__(16) uint8_t dynamic[];
    __shared__ const uint8_t *gate_rows[TILE_TOKENS], *up_rows[TILE_TOKENS];
    const int first_row = blockIdx.x * TILE_ROWS, end = first_tile[group + 1];
    for (int i = first_tile[group] + blockIdx.y; i < end; i += gridDim.y) {
        const ExpertTile tile = tiles[i];
        set_rows(gate_rows, tile, choices, [&](int choice) { return x_gate + choice / n_used * x_gate_row_bytes; });
        set_rows(up_rows, tile, choices, [&](int choice) { return x_up + choice / n_used * x_up_row_bytes; });
        __syncthreads();
        TileSums gates, ups;
        if constexpr (is_same<Gate, Up>) { // the code once, run twice
#pragma unroll 1
            for (int pass = 0; pass < 2; pass++) {
                if (pass)
                    copy(ups, gates);
                multiply<Gate>(pass ? up : gate, tile, first_row, ffn_size, hidden_size, pass ? up_rows : gate_rows,
                               gate_grid, dynamic, ups);
            }
        } else {
            multiply<Gate>(gate, tile, first_row, ffn_size, hidden_size, gate_rows, gate_grid, dynamic, gates);
            multiply<Up>(up, tile, first_row, ffn_size, hidden_size, up_rows, up_grid, dynamic, ups);
        }
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int row = first_row + tile_row(k), token = tile_token(j, k);
                if (row < ffn_size && token < tile.n)
                    h[(int64_t)choices[tile.first + token] * ffn_size + row] =
                        activated(ACTIVATION, LIMIT, UP_LIMIT, projected(gates[j][k], gate, tile.expert, ffn_size, row),
                                  projected(ups[j][k], up, tile.expert, ffn_size, row));
            }
    }
}
