// As `expert_down.cu`, for one group of experts and many tokens: out[t][rank][r] = down_e[r] . h[t][rank], not yet
// weighted, for each choice of token t and expert e.
//
// Compiled for DOWN_FORMAT, an integer one. Grid and shared memory as in `expert_gate_up_tiles.cu`.
#include "expert_tiles.cuh"
#include "tiles.cuh"

TILE_KERNEL(TILE_BLOCKS)
expert_down_tiles(const ExpertTile *tiles, const int *first_tile, int group, const int *choices, int n_used,
                  ExpertMatrix down, const uint8_t *h, int64_t h_row_bytes, int hidden_size, int ffn_size, float *out,
                  int64_t out_stride, const int8_t *grid) {
    begin_kernel();
    using Dots = TileDots<DOWN_FORMAT>;
    extern __shared__ __align__(16) uint8_t dynamic[];
    __shared__ const uint8_t *rows[TILE_TOKENS];
    const int first_row = blockIdx.x * TILE_ROWS, end = first_tile[group + 1];
    for (int i = first_tile[group] + blockIdx.y; i < end; i += gridDim.y) {
        const ExpertTile tile = tiles[i];
        set_rows(rows, tile, choices, [&](int choice) { return h + choice * h_row_bytes; });
        __syncthreads();
        TileSums acc;
        Dots::run(down.slots + tile.place * down.slot_bytes, down.row_bytes, first_row, hidden_size, ffn_size, rows,
                  tile.n, grid, *(Dots::Shared *)dynamic, acc);
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int row = first_row + tile_row(k), token = tile_token(j, k);
                if (row >= hidden_size || token >= tile.n)
                    continue;
                const int choice = choices[tile.first + token];
                out[choice / n_used * out_stride + (int64_t)(choice % n_used) * hidden_size + row] =
                    projected(acc[j][k], down, tile.expert, hidden_size, row);
            }
    }
}
