// The operations of one instruction-set level; included by level.h only, which names their table in LEVEL_OPS.
#include "matmul.h"
#include "ops.h"
#include "simd.h"

#include "ops/attention.h"
#include "ops/carry_over.h"
#include "ops/compress.h"
#include "ops/delta_net.h"
#include "ops/elementwise.h"
#include "ops/experts.h"
#include "ops/hyper_connections.h"
#include "ops/kv_cache.h"
#include "ops/linear.h"
#include "ops/ngrams.h"
#include "ops/residuals.h"
#include "ops/rope.h"
#include "ops/router.h"
#include "ops/select_blocks.h"
#include "ops/select_positions.h"
#include "ops/selective_scan.h"

// Reads as products with one token do.
static float read_all(const uint8_t *bytes, int64_t n_bytes, const uint8_t *next) {
    enum { STREAMS = 4, LINE = 64 };
    const int n_lines = (int)(n_bytes / (STREAMS * LINE)) * STREAMS;
    const row_streams lines = streams_of(STREAMS, bytes, LINE, n_lines, &(weight_rows){next, LINE, n_lines});
    v16 largest[STREAMS] = {v16_set(0.0f), v16_set(0.0f), v16_set(0.0f), v16_set(0.0f)};
    for (int line = 0; line < lines.n_each; line++) {
        const uint8_t *rows[STREAMS];
        set_rows(lines, STREAMS, line, rows);
        fetch_of_streams(lines, STREAMS, (int64_t)line * LINE, LINE);
        for (int i = 0; i < STREAMS; i++)
            largest[i] = v16_max(v16_load((const float *)rows[i]), largest[i]);
    }
    return v16_sum(v16_add(v16_add(largest[0], largest[1]), v16_add(largest[2], largest[3])));
}

static void exponentials_of(const float *x, int n, float shift, float scale, float *out) {
    const v16 shifts = v16_set(shift), scales = v16_set(scale);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        v16_store(out + i, v16_exp(v16_mul(v16_sub(v16_load(x + i), shifts), scales)));
    if (i < n)
        v16_store_first(out + i, v16_exp(v16_mul(v16_sub(v16_load_first(x + i, n - i), shifts), scales)), n - i);
}

static float largest_of(const float *x, int n) {
    enum { CHAINS = 4 };
    v16 chains[CHAINS] = {v16_set(-INFINITY), v16_set(-INFINITY), v16_set(-INFINITY), v16_set(-INFINITY)};
    int i = 0;
    for (; i + 16 * CHAINS <= n; i += 16 * CHAINS)
        for (int j = 0; j < CHAINS; j++)
            chains[j] = v16_max(v16_load(x + i + 16 * j), chains[j]);
    float largest = v16_largest(v16_max(v16_max(chains[0], chains[1]), v16_max(chains[2], chains[3])));
    for (; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    return largest;
}

const ops_table LEVEL_OPS = {
    .embed = op_embed,
    .hash_tokens = op_hash_tokens,
    .rms_norm = op_rms_norm,
    .quantize = op_quantize,
    .add = op_add,
    .scale = op_scale,
    .soft_cap = op_soft_cap,
    .clamp = op_clamp,
    .scale_by_position = op_scale_by_position,
    .gate = op_gate,
    .gate_by_agreement = op_gate_by_agreement,
    .split_heads = op_split_heads,
    .join_heads = op_join_heads,
    .rope_table = op_rope_table,
    .rope = op_rope,
    .select_outputs = op_select_outputs,
    .combine = op_combine,
    .stream_weights = op_stream_weights,
    .add_to_streams = op_add_to_streams,
    .mix_residuals = op_mix_residuals,
    .causal_conv = op_causal_conv,
    .delta_net = op_delta_net,
    .selective_scan = op_selective_scan,
    .compress = op_compress,
    .router = op_router,
    .group_router = op_group_router,
    .kv_store = op_kv_store,
    .carry_over = op_carry_over,
    .linear = {linear_begin, linear_run, NULL},
    .attention = {attention_begin, attention_run, NULL},
    .select_positions = {select_positions_begin, select_positions_run, NULL},
    .select_blocks = {select_blocks_begin, select_blocks_run, NULL},
    .experts_gate_up = {experts_gate_up_begin, experts_gate_up_run, experts_gate_up_fetch},
    .experts_down = {experts_down_begin, experts_down_run, experts_down_fetch},
    .exponentials = exponentials_of,
    .largest = largest_of,
    .read_all = read_all,
};
