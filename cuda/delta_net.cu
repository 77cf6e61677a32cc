// The gated delta rule (`delta_net.cuh`), token after token. Tokens of one sequence stand together and in order; one at
// position 0 starts its sequence with a zero state. The state of a sequence is read once and written once for all its tokens
// in the step.
//
// Without IS_DELTA it is a state-space model: S = exp(a dt) S + dt v k^T, out = S q + skip v, with q and k as they are and
// dt = softplus(alpha + dt_bias). Without alpha (null), dt_bias and skip it is lightning attention: S = a S + v k^T, out = S q.
//
// Compiled for N_WARPS, too: more share what is known beforehand, fewer make more blocks.
//
// Grid: (n_v_heads, ceil(V_DIM / ROWS)). Eight neighbouring lanes have a row of S in their registers, or two: lane l of them
// the values l, l + 8, ... of each 32, so that what they add up has the bits of a warp that has one row (`delta_net_step.cu`).
// Only what needs S is done token after token: the block fetches some tokens ahead (cp.async), and its warps share what can
// be known of them beforehand.
#include "delta_net.cuh"

constexpr int THREADS = N_WARPS * WARP;
constexpr int LANES = 8, FOURS = WARP / LANES;               // of a row, and the values of each 32 that a lane has
constexpr int ROWS_PER_LANE = K_DIM <= 128 ? 2 : 1;          // as many as there are registers for
constexpr int ROW_STEP = WARP / LANES;                       // from a lane's row to its next
constexpr int ROWS_PER_WARP = ROW_STEP * ROWS_PER_LANE, ROWS = N_WARPS * ROWS_PER_WARP;
constexpr int PADDED = PER_LANE * WARP;                      // values of a row, with zeros behind them
constexpr int MOST_VALUES = BY_CHANNEL ? 1024 : 2048;        // of the keys that are prepared together
constexpr int AT_ONCE = MOST_VALUES / K_DIM < 16 ? MOST_VALUES / K_DIM : 16; // tokens, then

struct Token {
    float decay, step;             // decay: if the head has one; step: sigmoid(beta), or dt
    int begins, ends, stops, slot; // whether S is to be read (2), zero (1) or kept on (0), and written; or a copy of it
};

// Values of a token as a lane takes them: the four of each 32 that are its own lie together.
struct Tokens {
    __align__(16) float queries[AT_ONCE][PADDED];
    __align__(16) float keys[AT_ONCE][PADDED];
    __align__(16) float decays[BY_CHANNEL ? AT_ONCE : 1][BY_CHANNEL ? PADDED : 4]; // fetched as alpha
    float values[AT_ONCE][ROWS];
    float alphas[AT_ONCE], betas[AT_ONCE]; // of the head
    int slots[AT_ONCE + 2], positions[AT_ONCE]; // from the slot of the token before to that of the one behind
};

DEVICE int place_of(int i) { return (i / WARP * LANES + i % LANES) * FOURS + i % WARP / LANES; }

DEVICE void load_four(const float *from, float (&x)[FOURS]) {
    const float4 four = *(const float4 *)from;
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

// What a lane adds up of its values, in the order of a warp that has one value in each lane.
DEVICE float sum_of_four(const float (&x)[FOURS]) { return (x[0] + x[2]) + (x[1] + x[3]); }

KERNEL(THREADS)
delta_net(const float *q, const float *k, const float *v, int64_t qkv_stride, const float *beta, int64_t beta_stride,
          const float *alpha, int64_t alpha_stride, const float *a, const float *dt_bias, const float *skip, float *state,
          float *out, int64_t out_stride, int n_k_heads, int is_grouped, float decay_bound, float eps,
          const int *positions, const int *slots, const int *n_tokens, Kept copy) {
    __shared__ Tokens fetched[2];
    __shared__ Token tokens[AT_ONCE];
    __shared__ float query_factors[AT_ONCE];
    const int head = blockIdx.x, n_v_heads = gridDim.x, n = *n_tokens;
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP, part = thread % LANES;
    const int first_row = blockIdx.y * ROWS, own_row = warp * ROWS_PER_WARP + lane / LANES;
    const int key_head = key_head_of(head, n_k_heads, n_v_heads, is_grouped), kept_after = copy.after();

    auto exists = [&](int r) { return first_row + own_row + r * ROW_STEP < V_DIM; };
    auto row_of = [&](float *states, int slot, int r) {
        return states + (((int64_t)slot * n_v_heads + head) * V_DIM + first_row + own_row + r * ROW_STEP) * K_DIM;
    };
    auto index_of = [&](int j, int m) { return j * WARP + m * LANES + part; };
    auto fetch = [&](int first) {
        Tokens &to = fetched[first / AT_ONCE % 2];
        const int n_now = min(AT_ONCE, n - first);
        for (int i = thread; i < n_now * K_DIM; i += THREADS) {
            const int t = i / K_DIM, place = place_of(i % K_DIM);
            const int64_t from = (first + t) * qkv_stride + key_head * K_DIM + i % K_DIM;
            cp_async4(&to.queries[t][place], q + from);
            cp_async4(&to.keys[t][place], k + from);
            if (BY_CHANNEL)
                cp_async4(&to.decays[t][place], alpha + (first + t) * alpha_stride + head * K_DIM + i % K_DIM);
        }
        for (int i = thread; i < n_now * ROWS; i += THREADS)
            if (first_row + i % ROWS < V_DIM)
                cp_async4(&to.values[i / ROWS][i % ROWS],
                          v + (first + i / ROWS) * qkv_stride + head * V_DIM + first_row + i % ROWS);
        if (const int t = first + thread; thread < n_now) {
            cp_async4(&to.positions[thread], positions + t);
            if (alpha && !BY_CHANNEL)
                cp_async4(&to.alphas[thread], alpha + t * alpha_stride + head);
            if (IS_DELTA)
                cp_async4(&to.betas[thread], beta + t * beta_stride + head);
        }
        if (const int t = first + thread - 1; thread < n_now + 2 && t >= 0 && t < n)
            cp_async4(&to.slots[thread], slots + t);
        cp_async_commit();
    };
    // What does not depend on S, of a token: keys are normalised where they lie, by a warp.
    auto normalize = [&](Tokens &own, int i) {
        float query_squares = 0.0f, key_squares = 0.0f;
        for (int j = lane; j < K_DIM; j += WARP) {
            const float query = own.queries[i][place_of(j)], key = own.keys[i][place_of(j)];
            query_squares = __fmaf_rn(query, query, query_squares);
            key_squares = __fmaf_rn(key, key, key_squares);
        }
        for (int step = WARP / 2; step; step /= 2) { // two sums that do not wait for each other
            query_squares += __shfl_xor_sync(ALL_LANES, query_squares, step);
            key_squares += __shfl_xor_sync(ALL_LANES, key_squares, step);
        }
        const float query_factor = factor_of_query(query_squares, eps), key_factor = factor_of_key(key_squares, eps);
        for (int j = lane; j < K_DIM; j += WARP)
            own.keys[i][place_of(j)] *= key_factor;
        if (lane == 0)
            query_factors[i] = query_factor;
    };
    // Likewise, by a thread.
    const float own_a = a[head], own_bias = alpha && !BY_CHANNEL ? dt_bias[head] : 0.0f;
    auto describe = [&](const Tokens &own, int i, int t) {
        const int slot = own.slots[i + 1], begins = own.positions[i] == 0 ? 1 : t == 0 || own.slots[i] != slot ? 2 : 0;
        float decay = own_a, step = 1.0f;
        if (alpha) {
            decay = BY_CHANNEL ? 0.0f : decay_of(own_a, own.alphas[i], own_bias, decay_bound);
            step = IS_DELTA ? sigmoid(own.betas[i]) : exact_softplus(own.alphas[i] + own_bias);
        }
        const bool ends = t + 1 == n || own.slots[i + 2] != slot;
        tokens[i] = {decay, step, begins, ends, ends || t == kept_after, slot};
    };

    // The first token's state is older than this step: it comes while the kernel before still computes.
    float s[ROWS_PER_LANE][PER_LANE][FOURS];
    auto load = [&](int slot, bool goes_on) {
#pragma unroll
        for (int r = 0; r < ROWS_PER_LANE; r++)
#pragma unroll
            for (int j = 0; j < PER_LANE; j++)
#pragma unroll
                for (int m = 0; m < FOURS; m++)
                    s[r][j][m] = goes_on && exists(r) && index_of(j, m) < K_DIM ? row_of(state, slot, r)[index_of(j, m)] : 0.0f;
    };
    auto store = [&](float *states, int slot) {
#pragma unroll
        for (int r = 0; r < ROWS_PER_LANE; r++)
#pragma unroll
            for (int j = 0; j < PER_LANE; j++)
#pragma unroll
                for (int m = 0; m < FOURS; m++)
                    if (exists(r) && index_of(j, m) < K_DIM)
                        row_of(states, slot, r)[index_of(j, m)] = s[r][j][m];
    };
    load(slots[0], positions[0] != 0);
    for (int i = thread; i < 2 * AT_ONCE * (PADDED - K_DIM); i += THREADS) { // beyond the values, once
        Tokens &own = fetched[i % 2];
        const int t = i / 2 % AT_ONCE, place = place_of(K_DIM + i / 2 / AT_ONCE);
        own.queries[t][place] = own.keys[t][place] = 0.0f;
        if (BY_CHANNEL)
            own.decays[t][place] = 0.0f;
    }
    begin_kernel();
    fetch(0);
    for (int first = 0; first < n; first += AT_ONCE) {
        const int n_now = min(AT_ONCE, n - first);
        Tokens &own = fetched[first / AT_ONCE % 2];
        __syncthreads(); // everybody is done with the tokens before
        if (first + AT_ONCE < n)
            fetch(first + AT_ONCE);
        else
            cp_async_commit(); // so that the count of groups stays in step
        cp_async_wait<1>();
        __syncthreads();
        for (int i = warp; IS_DELTA && i < n_now; i += N_WARPS)
            normalize(own, i);
        if (thread < n_now)
            describe(own, thread, first + thread);
        for (int i = thread; BY_CHANNEL && i < n_now * K_DIM; i += THREADS) {
            float &decay = own.decays[i / K_DIM][place_of(i % K_DIM)];
            decay = decay_of(own_a, decay, dt_bias[head * K_DIM + i % K_DIM], decay_bound);
        }
        __syncthreads();
        // Tokens up to the next after which S goes elsewhere: in between there is nothing but arithmetic.
        const unsigned stops = __ballot_sync(ALL_LANES, lane < n_now && tokens[lane].stops);
        for (int i = 0; i < n_now;) {
            const unsigned stops_ahead = stops >> i;
            const int end = stops_ahead ? i + __ffs(stops_ahead) : n_now;
            if (tokens[i].begins && first + i)
                load(tokens[i].slot, tokens[i].begins == 2);
            float result[ROWS_PER_LANE] = {}; // of the token before, not yet summed over the lanes
            auto put = [&](int of) {
#pragma unroll
                for (int r = 0; r < ROWS_PER_LANE; r++)
                    if (part == 0 && exists(r))
                        out[(first + of) * out_stride + head * V_DIM + first_row + own_row + r * ROW_STEP] =
                            IS_DELTA ? result[r] * query_factors[of]
                            : skip   ? __fmaf_rn(skip[head], own.values[of][own_row + r * ROW_STEP], result[r])
                                     : result[r];
            };
            for (int t = i; t < end; t++) {
                float key[PER_LANE][FOURS], recalled[ROWS_PER_LANE], steps[ROWS_PER_LANE];
                float remembered[ROWS_PER_LANE][FOURS] = {}, found[ROWS_PER_LANE][FOURS] = {};
#pragma unroll
                for (int j = 0; j < PER_LANE; j++) {
                    const int at = (j * LANES + part) * FOURS;
                    load_four(own.keys[t] + at, key[j]);
                    float decay[FOURS];
                    if (BY_CHANNEL)
                        load_four(own.decays[t] + at, decay);
#pragma unroll
                    for (int r = 0; r < ROWS_PER_LANE; r++)
#pragma unroll
                        for (int m = 0; m < FOURS; m++) {
                            s[r][j][m] *= BY_CHANNEL ? decay[m] : tokens[t].decay;
                            if (IS_DELTA)
                                remembered[r][m] = __fmaf_rn(s[r][j][m], key[j][m], remembered[r][m]);
                        }
                }
#pragma unroll
                for (int r = 0; r < ROWS_PER_LANE; r++)
                    recalled[r] = sum_of_four(remembered[r]);
#pragma unroll
                for (int step = LANES / 2; step; step /= 2) // sums that do not wait for each other
#pragma unroll
                    for (int r = 0; r < ROWS_PER_LANE; r++) {
                        if (IS_DELTA)
                            recalled[r] += __shfl_xor_sync(ALL_LANES, recalled[r], step);
                        result[r] += __shfl_xor_sync(ALL_LANES, result[r], step);
                    }
                if (t > i)
                    put(t - 1);
#pragma unroll
                for (int r = 0; r < ROWS_PER_LANE; r++) {
                    const float value = own.values[t][own_row + r * ROW_STEP];
                    steps[r] = tokens[t].step * (IS_DELTA ? value - recalled[r] : value);
                }
#pragma unroll
                for (int j = 0; j < PER_LANE; j++) {
                    float query[FOURS];
                    load_four(own.queries[t] + (j * LANES + part) * FOURS, query);
#pragma unroll
                    for (int r = 0; r < ROWS_PER_LANE; r++)
#pragma unroll
                        for (int m = 0; m < FOURS; m++) {
                            s[r][j][m] = __fmaf_rn(steps[r], key[j][m], s[r][j][m]);
                            found[r][m] = __fmaf_rn(s[r][j][m], query[m], found[r][m]);
                        }
                }
#pragma unroll
                for (int r = 0; r < ROWS_PER_LANE; r++)
                    result[r] = sum_of_four(found[r]);
            }
#pragma unroll
            for (int step = LANES / 2; step; step /= 2)
#pragma unroll
                for (int r = 0; r < ROWS_PER_LANE; r++)
                    result[r] += __shfl_xor_sync(ALL_LANES, result[r], step);
            put(end - 1);
            if (tokens[end - 1].ends)
                store(state, tokens[end - 1].slot);
            if (first + end - 1 == kept_after)
                store(copy.to, 0);
            i = end;
        }
    }
}
