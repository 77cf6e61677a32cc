// The operations of a forward pass, as each instruction-set level offers them.
//
// A *tile operation* works on any rectangle of rows and columns: columns are cut only at multiples of its unit (a head,
// a whole row), so any number of threads may share it, and several may run one after another on the same rectangle
// while it is in cache. A *task operation* (a product with weights, attention) says how many tasks a step has.
// Neither cut changes a bit: every output is computed whole by one call.
#ifndef ENGINE_OPS_H
#define ENGINE_OPS_H

#include "hand_out.h"
#include "table.h"

#include <stdbool.h>

enum { ROWS_TOKENS, ROWS_OUTPUTS };
enum {
    GATE_SIGMOID,
    GATE_SILU,
    GATE_SOFTPLUS,
    GATE_RELU,
    GATE_PRODUCT,
    GATE_GELU,
    GATE_CLAMPED_SWISH,
    GATE_SITU,
    GATE_CLAMPED_SILU
};
enum { ROPE_NEOX, ROPE_NORM };
enum { SCORE_SOFTMAX, SCORE_SIGMOID, SCORE_SOFTMAX_TOPK, SCORE_SQRT_SOFTPLUS };
enum { ACTIVATE_SILU, ACTIVATE_CLAMPED_SWISH, ACTIVATE_RELU, ACTIVATE_CLAMPED_SILU, ACTIVATE_GELU, ACTIVATE_SITU };
enum { KV_F32, KV_F16, KV_Q8_0, N_KV_TYPES };

enum {
    MAX_EXPERTS = 1024,
    MAX_HEAD_DIM = 576,
    MAX_CONV_KERNEL = 16,
    MAX_CONVOLVED = 32, // tokens that a convolution goes back
    MAX_HASHED = 8,     // tokens that choose a row together
    MAX_SCAN_STATE = 256,
    MAX_STREAMS = 8, // of hyper-connections
    MAX_MIXED_STREAMS = 4,
    MAX_RESIDUALS = 16, // that are mixed, a multiple of 16
    MAX_LINEAR_WEIGHTS = 8,
    TOKENS_PER_CALL = 128,      // activation rows that one call of a matmul_fn gets at most
    ROWS_PER_TASK = 128,        // weight rows of one task at most,
    LONE_CALL_ROWS = 512,       // or of one that is a single call
    ATTENTION_CHUNK = 256,      // positions that share one softmax before partial results are merged
    ATTENTION_TILE = 4,         // heads that read a chunk of keys and values together
    SPLIT_ATTENTION_TOKENS = 8, // up to so many tokens, chunks are tasks of their own
    ATTENTION_TOKENS = 8,       // tokens of a task otherwise
};

// Tokens of one sequence, which stand together. One that `keeps` leaves a copy of its states behind, too; what its
// sequence has after that in the same step is a run of its own.
typedef struct {
    int first, end, slot;
    bool keeps;
} token_run;

typedef struct {
    int n_tokens, n_outputs, n_runs;
    const int32_t *token_ids, *positions, *slots, *output_rows;
    const token_run *runs; // never across a token at position 0 but the first
} step_view;

// Whether the states of the run's sequence are those of nothing.
static inline bool starts_afresh(const step_view *step, const token_run *run) {
    return step->positions[run->first] == 0;
}

typedef struct {
    int row, row_end, col, col_end;
} tile;

// Float32 rows, `stride` elements apart.
typedef struct {
    float *at;
    int64_t stride;
} matrix;

typedef struct {
    const uint8_t *table;
    int64_t row_bytes;
    dequantize_fn dequantize_row;
    int n_cols;
    const int32_t *ids; // [max_tokens, n_ids], rows `ids_stride` apart; NULL: those of the tokens
    int64_t ids_stride;
    matrix out;
    float scale;
} embed_args;

typedef struct {
    int32_t *state; // [n_slots, n_hashed - 1]: the id at a position p is at p % (n_hashed - 1)
    int32_t *out;   // [max_tokens, n_heads], rows `out_stride` apart
    int32_t *kept;  // this and those of other operations: room for a copy of the state of one sequence
    int64_t out_stride;
    const uint64_t *multipliers;     // [n_hashed]
    const uint32_t *sizes, *offsets; // [n_heads]
    int n_hashed, n_heads, end_id;
} hash_tokens_args;

typedef struct {
    matrix x, out;
    const float *weight, *bias;  // bias: null for none
    int group_size, weight_step; // weight_step: from the weights (and biases) of one group to those of the next
    int centers;                 // takes a group's mean from it first
    float eps;
} rms_norm_args;

typedef struct {
    matrix x;
    uint8_t *out;
    int64_t out_row_bytes;
    int n_cols, activation;
    quantize_fn quantize;
} quantize_args;

typedef struct {
    matrix a, b, out; // b with a stride of 0: one row for all
} add_args;

typedef struct {
    matrix x, gate, out;
    int kind, span;         // span: columns of x that share a value of the gate
    int n_streams, n_cols;  // n_cols: of a stream; their sum is taken
    float limit, own_limit; // 0: none; own_limit: of x, where it has one of its own
} gate_args;

typedef struct {
    matrix a, b, x, out;
    int n_cols; // of a stream
    float floor;
} gate_by_agreement_args;

typedef struct {
    matrix x, out, by; // by.at may be NULL: one factor for each row, or with a stride of 0 one for all
    float factor;
} scale_args;

typedef struct {
    matrix x, out;
    float cap;
} soft_cap_args;

typedef struct {
    matrix x, out;
    float limit;
} clamp_args;

typedef struct {
    matrix x;
    int offset, period;
    float slope;
} scale_by_position_args;

// Rows that hold, for each head, first_dim values of `first` and second_dim values of `second`.
typedef struct {
    matrix joined, first, second;
    int first_dim, second_dim;
} heads_args;

// Cosines, then sines, of every pair: [max_tokens, 2, n_pairs].
typedef struct {
    float *table;
    const float *frequencies;
    int n_pairs, period; // period: positions are rounded down to a multiple of it
    float magnitude;
} rope_table_args;

typedef struct {
    matrix x;
    const float *table;
    int head_dim, n_pairs, style;
} rope_args;

typedef struct {
    matrix x, out;
    int n_cols;
} select_outputs_args;

typedef struct {
    matrix expert_out, shared, shared_gate, residual, out; // shared.at, shared_gate.at, residual.at may be NULL
    const float *weights;                                  // [max_tokens, n_experts_used], or NULL: all 1
    int n_experts_used, n_cols;
    float scale;
} combine_args;

typedef struct {
    matrix mixes, gates, mixing; // gates.at and mixing.at may be NULL
    const float *scale;          // of weights, and of gates and mixing if there are any
    const float *base;           // [mixes]
    float *weights;              // [max_tokens, n_streams]
    int n_streams, n_normalizations;
    float offset, magnitude;
} stream_weights_args;

typedef struct {
    matrix x, added, gates, mixing, out; // mixing.at may be NULL
    int n_streams, n_cols;               // n_cols: of a stream
    float magnitude;                     // of the sigmoid of gates; 0: they are gates already
} add_to_streams_args;

typedef struct {
    matrix residuals[MAX_RESIDUALS], out;
    const float *scorer; // [n_cols]
    int n_residuals, n_cols;
    float eps;
} mix_residuals_args;

typedef struct {
    matrix x, out;
    const float *weight; // [kernel_size, n_channels]: transposed when it was recorded
    const float *bias;   // [n_channels], or NULL
    float *state, *kept; // [n_slots, (kernel_size - 1) * dilation, n_channels], oldest first
    int n_channels, kernel_size, dilation;
    bool activates;
} causal_conv_args;

typedef struct {
    const float *q, *k, *v;
    int64_t qkv_stride;
    matrix beta, alpha, out; // beta.at: NULL for a state-space model, alpha.at, too, for lightning attention
    const float *a, *dt_bias, *skip;
    float *state, *kept; // [n_slots, n_v_heads, k_dim, v_dim]
    int n_k_heads, n_v_heads, k_dim, v_dim;
    int decay_dim;     // decays of a head: 1, or k_dim
    float decay_bound; // of their logarithms, below 0; 0: none
    bool grouped;
    float eps;
} delta_net_args;

typedef struct {
    matrix x, dt, b, c, out;
    const float *a;      // [state_size, n_channels]: transposed when it was recorded
    const float *skip;   // [n_channels]
    float *state, *kept; // [n_slots, state_size, n_channels]
    int n_channels, state_size;
} selective_scan_args;

typedef struct {
    matrix values, scores, out;      // scores.at may be NULL: all 0, and no biases
    const float *biases;             // [period, parts * n_channels]
    float *state, *kept;             // [n_slots, parts, 3, n_channels]: of each part the largest score, and two sums
    int n_channels, n_parts, period; // n_parts: 1, or 2 where a row is made of two periods' tokens
} compress_args;

typedef struct {
    matrix logits;
    const float *bias;    // or NULL
    const int32_t *table; // [n_vocab, n_experts_used]: the experts of each token id; or NULL
    int32_t *ids;         // both [max_tokens, n_experts_used]
    float *weights;
    int n_experts, n_experts_used, scoring, n_groups, n_groups_used;
    bool normalize;
    float scale;
} router_args;

typedef struct {
    matrix logits;
    const int32_t *ids; // this and the next two [max_tokens, n_experts_used]
    int32_t *group_ids;
    float *weights;
    int n_experts, n_experts_used, group_size;
} group_router_args;

// One layer's keys or values; layout in ops/kv_cache.h.
typedef struct {
    uint8_t *keys, *values;
    int type, n_rows, n_kv_heads, head_dim, value_dim; // n_rows: of a sequence
    int period;   // tokens that share a row, which the last of them brings; 1: each has its own
    bool is_ring; // whether positions that are n_rows apart share one, of which nobody sees more than the last
} kv_cache;

// How many rows of a cache there are for a token at a position.
static inline int rows_up_to(const kv_cache *cache, int position) { return (position + 1) / cache->period; }

typedef struct {
    matrix x;
    kv_cache cache;
    bool is_value;
} kv_store_args;

typedef struct {
    matrix x, out; // x.at, or out.at: NULL for none
    float *state;  // [n_slots, n_kept, n_channels]: the row of position p is at p % n_kept
    int n_channels, n_kept;
} carry_over_args;

typedef struct {
    matrix q, out;
    kv_cache cache;
    kv_cache shared;            // rows that a token sees beside those positions; keys: NULL for none
    const float *sinks;         // [n_heads], or NULL
    int n_heads, window, chunk; // window, chunk: 0 for no limit
    float scale, cap;           // cap: 0 for none
    const int32_t *selected;    // lists of the blocks that a token looks at, each in rising order; NULL: all. Or of
                                // shared rows, one list
    int64_t selected_stride;
    int top_k, block_size, n_lists; // blocks of a list at most, positions of a block; one list, or n_kv_heads
    bool has_tail;                  // whether the last place of a list is for a block that is not whole
    float *partials;                // [SPLIT_ATTENTION_TOKENS, n_heads, chunks of both caches, partial result]
    padded_counter *n_done;         // [SPLIT_ATTENTION_TOKENS, n_kv_heads, tiles of a group], all zero between steps
} attention_args;

typedef struct {
    matrix q, weights; // weights.at may be NULL: all 1
    kv_cache cache;    // of keys alone, of one head
    int32_t *out;      // [max_tokens, top_k and, with a tail, one more], rows `out_stride` apart
    int64_t out_stride;
    int n_heads, top_k;
    bool has_tail; // whether rows are blocks of positions, and the one that is not whole comes last
    float scale;
    float *scores;          // [the larger of SPLIT_ATTENTION_TOKENS and n_threads, context rounded up to 16]
    padded_counter *n_done; // [SPLIT_ATTENTION_TOKENS], all zero between steps
} select_positions_args;

typedef struct {
    matrix q;
    kv_cache cache; // of keys alone, of one head
    int32_t *out;   // [max_tokens, n_heads, top_k], rows `out_stride` apart
    int64_t out_stride;
    int n_heads, top_k, block_size, n_newest; // n_newest: of the chosen blocks, from 1 to top_k
    float *scores;          // [the larger of SPLIT_ATTENTION_TOKENS and n_threads, n_heads, blocks of a context]
    padded_counter *n_done; // [SPLIT_ATTENTION_TOKENS], all zero between steps
} select_blocks_args;

typedef struct {
    const uint8_t *weight;
    int64_t row_bytes;
    matmul_fn matmul;
    int n_rows;
    matrix out;
    const float *bias, *scale; // or NULL
} linear_weight;

typedef struct {
    const uint8_t *x;
    int64_t x_row_bytes;
    int n_cols, n_weights, rows;
    linear_weight weights[MAX_LINEAR_WEIGHTS];
} linear_args;

typedef struct {
    const int64_t *table; // [n_experts] addresses of the experts' first rows
    int64_t row_bytes;
    matmul_fn matmul;
    const float *scale, *bias; // [n_experts] and [n_experts, n_rows], or NULL
} expert_matrix;

// Shared by the parts of one experts operation. A pair is a token and a rank: row t * n_experts_used + rank.
typedef struct {
    const uint8_t *x_gate, *x_up;
    int64_t x_gate_row_bytes, x_up_row_bytes;
    const int32_t *ids; // [max_tokens, n_experts_used]; -1: computed elsewhere
    int n_experts, n_experts_used, hidden_size, ffn_size, activation;
    float limit, up_limit; // 0: none; up_limit: where up has one of its own
    expert_matrix gate, up, down;
    float *hidden;             // [pairs, ffn_size]
    uint8_t *hidden_quantized; // [pairs, hidden_row_bytes]; hidden itself if down takes float32
    int64_t hidden_row_bytes;
    quantize_fn quantize;  // NULL if down takes float32
    round_counter *n_done; // [active experts, expert_parts]: rows of the part that are done, in a round of gate and up
    matrix out;
} experts_args;

enum { QUANTIZED_TOGETHER = 256 }; // hidden values, a multiple of every group

static inline int expert_parts(int ffn_size) { return (ffn_size + QUANTIZED_TOGETHER - 1) / QUANTIZED_TOGETHER; }

typedef union {
    embed_args embed;
    hash_tokens_args hash_tokens;
    rms_norm_args rms_norm;
    quantize_args quantize;
    add_args add;
    gate_args gate;
    gate_by_agreement_args gate_by_agreement;
    scale_args scale;
    soft_cap_args soft_cap;
    clamp_args clamp;
    scale_by_position_args scale_by_position;
    heads_args heads;
    rope_table_args rope_table;
    rope_args rope;
    select_outputs_args select_outputs;
    combine_args combine;
    stream_weights_args stream_weights;
    add_to_streams_args add_to_streams;
    mix_residuals_args mix_residuals;
    causal_conv_args causal_conv;
    delta_net_args delta_net;
    selective_scan_args selective_scan;
    compress_args compress;
    router_args router;
    group_router_args group_router;
    kv_store_args kv_store;
    carry_over_args carry_over;
    attention_args attention;
    select_positions_args select_positions;
    select_blocks_args select_blocks;
    linear_args linear;
    experts_args experts;
} op_args;

// One thread of the team that runs a step.
typedef struct {
    const step_view *step;
    int thread, n_threads;
    int32_t *scratch; // of this thread alone; see program_scratch
    bool takes_parts; // of one token's experts: the same part of each
    int n_spins;      // of whoever waits, see `waiting`
    // Of the tasks that are run: their round, and the one whose results each of them waits for itself; 0: none.
    uint64_t round, awaited_round;
} worker;

typedef void (*tile_fn)(const op_args *args, const step_view *step, tile t);

// A word that another processor changes some time, and what it holds until then.
typedef struct {
    const uint32_t *word;
    uint32_t value;
} awaited_word;

typedef struct {
    int (*begin)(const op_args *args, const worker *w); // returns the number of tasks; called by every thread
    void (*run)(const op_args *args, const worker *w, int task);
    // Brings what this thread would read of an expert into its caches, until a word changes. NULL where there are no
    // experts.
    void (*fetch)(const op_args *args, const worker *w, int expert, awaited_word until);
} task_fns;

typedef struct ops_table {
    tile_fn embed, hash_tokens, rms_norm, quantize, add, scale, soft_cap, clamp, scale_by_position, gate,
        gate_by_agreement, split_heads, join_heads, rope_table, rope, select_outputs, combine, stream_weights,
        add_to_streams, mix_residuals, causal_conv, delta_net, selective_scan, compress, router, group_router, kv_store,
        carry_over;
    task_fns linear, attention, select_positions, select_blocks, experts_gate_up, experts_down;
    exponentials_fn exponentials;
    float (*largest)(const float *x, int n); // no NaN; -infinity if there is nothing else
    // Reads all whole 256 bytes, and fetches the beginning of `next`, as many bytes, which are read after them. For
    // measuring.
    float (*read_all)(const uint8_t *bytes, int64_t n_bytes, const uint8_t *next);
} ops_table;

// kv_cache.c. Bytes of the keys, or of the values, of one layer, each a multiple of 64; and of the partial results of
// one token over a whole context.
int64_t kv_key_bytes(int type, int n_slots, int n_rows, int n_kv_heads, int head_dim);
int64_t kv_value_bytes(int type, int n_slots, int n_rows, int n_kv_heads, int value_dim);
int64_t attention_partial_bytes(const attention_args *args);

#endif
