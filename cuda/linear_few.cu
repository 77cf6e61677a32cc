// As `linear.cu`, for two to eight tokens at once: out[t][r] = (W_m[r] . x[t]) * scale + bias[r], the eight columns of a
// matrix product on tensor cores, with the bits of `rows.cuh`. One reading of the weights, unpacked once, serves all.
//
// A block takes 16 rows. Its warps take 256 columns each, one step of TileDots (`tiles.cuh`), and leave the integer sums of
// its blocks in shared memory; then every thread goes on with the chain of one row and one token, in order. Weights and
// activations are fetched a round ahead of the arithmetic.
//
// Compiled for FORMAT, an integer one. Grid: (row blocks of all matrices, groups of 8 tokens, heads). Dynamic shared memory:
// `Shared`.
#include "matrices.cuh"
#include "rows.cuh"
#include "tiles.cuh"

using Tile = TileDots<FORMAT>;

constexpr int TOKENS = 8;
constexpr int N_WARPS = WARP_ROWS * TOKENS / WARP;  // a thread for each row and token
constexpr int ROUND = N_WARPS * STEP;               // columns
constexpr int X_STRIDE = ROUND + 16;                // bytes from token to token: ldmatrix then meets no bank twice
constexpr int ROUND_BLOCKS = ROUND / FORMAT::BLOCK; // of a row
constexpr bool HAS_MIN = FORMAT::HAS_MIN, IS_LARGE = FORMAT::BLOCK == STEP;

struct Shared {
    __align__(16) int8_t x[2][TOKENS][X_STRIDE];
    __align__(16) float d_x[2][TOKENS][ROUND_BLOCKS];
    __align__(16) int16_t sums[HAS_MIN ? 2 : 1][HAS_MIN ? TOKENS : 1][ROUND / 16];
    __align__(16) int isum[ROUND_BLOCKS][WARP_ROWS][TOKENS];
    __align__(16) int imin[HAS_MIN && IS_LARGE ? ROUND_BLOCKS : 1][WARP_ROWS][TOKENS];
    float d[ROUND_BLOCKS][WARP_ROWS], min_d[HAS_MIN ? ROUND_BLOCKS : 1][WARP_ROWS];
    struct {
        __align__(16) Tile::Raw raw[2];
        __align__(16) Tile::Unpacked q;
        __align__(4) Tile::Scales scales, mins;
    } warp[N_WARPS];
};

// Fetches the activations of one round.
DEVICE void fetch_x(Shared &shared, const Tokens<TOKENS> &tokens, int n_tokens, int n_cols, int round) {
    const int first = round * ROUND, n = min(ROUND, n_cols - first), buffer = round % 2;
    const int64_t d_at = round_up_64(n_cols), sums_at = d_at + round_up_64(n_cols / FORMAT::BLOCK * (int64_t)sizeof(float));
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        if (t >= n_tokens)
            break;
        const uint8_t *row = tokens.row[t];
        for (int at = 16 * threadIdx.x; at < n; at += 16 * N_WARPS * WARP)
            cp_async16(&shared.x[buffer][t][at], row + first + at);
        for (int i = threadIdx.x; i * FORMAT::BLOCK < n; i += N_WARPS * WARP)
            cp_async4(&shared.d_x[buffer][t][i], row + d_at + 4 * (round * ROUND_BLOCKS + i));
        if (HAS_MIN)
            for (int i = threadIdx.x; 32 * i < n; i += N_WARPS * WARP)
                cp_async4(&shared.sums[buffer * HAS_MIN][t * HAS_MIN][2 * i], row + sums_at + 4 * (round * ROUND / 32 + i));
    }
}

// A warp's share of a round: the sums of the blocks in its 256 columns.
DEVICE void multiply(Shared &shared, const Tile::Rows &rows, int n_parts, int buffer, const int8_t *grid) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    auto &own = shared.warp[warp];
    const Tile::Raw &raw = own.raw[buffer];
    rows.unpack(raw, n_parts, grid, own.q, own.scales, own.mins);
    for (int i = lane; i < Tile::BLOCKS * WARP_ROWS; i += WARP) {
        const int row = i % WARP_ROWS, block = i / WARP_ROWS, at = warp * Tile::BLOCKS + block;
        if (block * FORMAT::BLOCK >= 32 * n_parts)
            break;
        shared.d[at][row] = FORMAT::d(rows.block(raw, row, block));
        if (HAS_MIN)
            shared.min_d[at * HAS_MIN][row] = FORMAT::min_d(rows.block(raw, row, block));
    }
    __syncwarp();
    unsigned a[PARTS][4];
    Tile::load_rows(own.q, n_parts, a);
    const int8_t *x = &shared.x[buffer][0][warp * STEP];
    auto put = [&](int (&to)[WARP_ROWS][TOKENS], const int (&sums)[4]) {
        *(int2 *)&to[g][2 * t] = make_int2(sums[0], sums[1]);
        *(int2 *)&to[g + 8][2 * t] = make_int2(sums[2], sums[3]);
    };
    if constexpr (IS_LARGE) {
        const Tile::BlockScales scales(own.scales, own.mins);
        int sums[4];
        Tile::multiply_large<X_STRIDE>(x, scales, a, sums);
        put(shared.isum[warp], sums);
        if constexpr (HAS_MIN) {
            Tile::multiply_mins(&shared.sums[buffer][g][warp * STEP / 16], scales, sums);
            put(shared.imin[warp], sums);
        }
    } else {
#pragma unroll
        for (int pair = 0; pair < PARTS / 2; pair++) {
            if (2 * pair >= n_parts)
                break;
            unsigned b[4];
            Tile::load_x<X_STRIDE>(x, pair, b);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int part = 2 * pair + h;
                if (part >= n_parts)
                    break;
                int sums[4];
                const unsigned of_x[2] = {b[2 * h], b[2 * h + 1]};
                mma_m16n8k32_s8(sums, a[part], of_x);
                put(shared.isum[warp * PARTS + part], sums);
            }
        }
    }
}

// Goes on with the chain of the thread's row and token by the blocks of a round.
DEVICE float add_blocks(const Shared &shared, int n_blocks, int buffer, float acc) {
    const int row = threadIdx.x / TOKENS, token = threadIdx.x % TOKENS;
#pragma unroll 4
    for (int i = 0; i < n_blocks; i++) {
        const float d_x = shared.d_x[buffer][token][i];
        acc = __fmaf_rn(shared.d[i][row] * d_x, (float)shared.isum[i][row][token], acc);
        if constexpr (HAS_MIN) {
            const int16_t *sums = &shared.sums[buffer][token][2 * i]; // of small blocks
            const int imin = IS_LARGE ? shared.imin[IS_LARGE ? i : 0][row][token] : sums[0] + sums[1];
            acc = __fmaf_rn(shared.min_d[i][row] * d_x, (float)imin, acc);
        }
    }
    return acc;
}

extern "C" __global__ void __launch_bounds__(N_WARPS *WARP, 4)
linear_few(Matrices matrices, int64_t row_bytes, int64_t head_weight_bytes, const uint8_t *x, int64_t x_row_bytes,
           int64_t head_x_bytes, int n_cols, const int8_t *grid, const int *n_tokens) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Shared &shared = *(Shared *)dynamic;
    const int warp = threadIdx.x / WARP, head = blockIdx.z;
    const Matrix &matrix = matrix_of(matrices, blockIdx.x);
    const int first_row = ((int)blockIdx.x - matrix.first_block) * WARP_ROWS;
    const uint8_t *weights = matrix.weights + head * head_weight_bytes;
    const int n_steps = (n_cols + STEP - 1) / STEP, n_rounds = (n_steps + N_WARPS - 1) / N_WARPS;
    auto rows_of = [&](int round) { return Tile::Rows{weights, row_bytes, first_row, matrix.n_rows, round * N_WARPS + warp}; };
    auto n_parts_of = [&](int round) { return max(0, Tile::n_parts_of(n_cols, round * N_WARPS + warp)); };
    auto fetch_rows = [&](int round) {
        if (n_parts_of(round) > 0)
            rows_of(round).fetch(shared.warp[warp].raw[round % 2], n_parts_of(round));
    };
    fetch_rows(0);
    begin_kernel();

    const int first_token = blockIdx.y * TOKENS, n = min(TOKENS, *n_tokens - first_token);
    if (n <= 0) {
        cp_async_commit();
        cp_async_wait<0>(); // what was begun must end before the block does
        return;
    }
    const Tokens<TOKENS> tokens(x + head * head_x_bytes, x_row_bytes, first_token, first_token + n);
    fetch_x(shared, tokens, n, n_cols, 0);
    cp_async_commit();
    float acc = 0.0f;
    for (int round = 0; round < n_rounds; round++) {
        const int buffer = round % 2;
        cp_async_wait<0>();
        __syncthreads(); // this round is there, and everybody is done with the one before
        if (round + 1 < n_rounds) {
            fetch_rows(round + 1);
            fetch_x(shared, tokens, n, n_cols, round + 1);
        }
        cp_async_commit();
        if (n_parts_of(round) > 0)
            multiply(shared, rows_of(round), n_parts_of(round), buffer, grid);
        __syncthreads();
        acc = add_blocks(shared, min(ROUND_BLOCKS, (n_cols - round * ROUND) / FORMAT::BLOCK), buffer, acc);
    }
    const int row = first_row + threadIdx.x / TOKENS, token = threadIdx.x % TOKENS;
    if (row < matrix.n_rows && token < n)
        matrix.put(head, row, first_token + token, acc);
}
