// A program: operations recorded once, with fixed addresses, and run by a team of threads for every step.
//
// The threads start together once a run and meet at barriers. A barrier stands only where an operation reads or
// overwrites what an operation since the last barrier wrote (or overwrites what one reads). A tile operation whose only
// such ties are to rows and columns of the same tile is fused instead: it runs right behind its predecessor, tile by
// tile. So a forward pass recorded one small operation at a time needs few barriers, whoever wrote the model. Experts'
// down needs none either: each of its tasks waits for the hidden values of its own expert.
#ifndef ENGINE_PROGRAM_H
#define ENGINE_PROGRAM_H

#include "ops.h"
#include "table.h"

#include <stddef.h>

typedef struct program program;

// Returns NULL without memory.
program *program_create(const kernel_table *kernels, int max_tokens, int n_slots, int n_threads);
void program_free(program *p);
// Lets experts of `p`, which has none yet, use the memory that those of another program have for hidden values. That
// one outlives `p` and never runs at the same time.
void program_share_experts(program *p, const program *other);
int program_length(const program *p); // operations recorded

// Each records one operation. They return 0, or -1 without memory; arguments are checked by the caller.
int program_embed(program *p, int ggml_type, embed_args args, int n_vocab, int n_ids);
int program_hash_tokens(program *p, hash_tokens_args args);
int program_rms_norm(program *p, rms_norm_args args, int n_groups, int rows);
int program_quantize(program *p, quantize_args args, int rows);
int program_linear(program *p, linear_args args);
int program_add(program *p, add_args args, int n_cols, int rows);
int program_gate(program *p, gate_args args, int rows);
int program_gate_by_agreement(program *p, gate_by_agreement_args args, int n_streams);
int program_scale(program *p, scale_args args, int n_cols, int rows);
int program_soft_cap(program *p, soft_cap_args args, int n_cols, int rows);
int program_clamp(program *p, clamp_args args, int n_cols, int rows);
int program_scale_by_position(program *p, scale_by_position_args args, int n_cols);
int program_split_heads(program *p, heads_args args, int n_heads);
int program_join_heads(program *p, heads_args args, int n_heads);
int program_rope(program *p, rope_args args, const float *frequencies, float magnitude, int period, int n_heads);
int program_attention(program *p, attention_args args, matrix k, matrix v, matrix shared_k);
int program_store_keys(program *p, kv_cache cache, matrix k, matrix v);
int program_carry_over(program *p, carry_over_args args);
int program_select_positions(program *p, select_positions_args args, matrix k);
int program_select_blocks(program *p, select_blocks_args args, matrix k);
int program_causal_conv(program *p, causal_conv_args args);
int program_delta_net(program *p, delta_net_args args);
int program_selective_scan(program *p, selective_scan_args args);
int program_compress(program *p, compress_args args);
int program_router(program *p, router_args args, int n_vocab);
int program_group_router(program *p, group_router_args args);
int program_experts(program *p, experts_args args, int down_activation);
int program_combine(program *p, combine_args args);
int program_stream_weights(program *p, stream_weights_args args);
int program_add_to_streams(program *p, add_to_streams_args args);
int program_mix_residuals(program *p, mix_residuals_args args);
int program_select_outputs(program *p, select_outputs_args args);

typedef struct {
    int n_tokens, n_outputs;
    int kept_row; // after which the states of its sequence are kept, by operations that have room for that; -1: none
    const int32_t *token_ids, *positions, *slots, *output_rows;
} program_step;

typedef enum {
    STEP_FITS,
    STEP_N_TOKENS,  // detail: the number
    STEP_N_OUTPUTS, // detail: the number
    STEP_KEPT_ROW,  // detail: the row
    STEP_TOKEN_ID,  // detail of these: the place in the array
    STEP_POSITION,
    STEP_SLOT,
    STEP_SEQUENCE, // tokens of one sequence do not stand together, or their positions do not follow
    STEP_OUTPUT_ROW,
} step_error;

// Checks a step against what was recorded. `detail` gets what the error is about.
step_error program_check(const program *p, const program_step *step, int *detail);

// Runs the operations `first` to `last` - 1, with those fused to them. The step must have passed `program_check`. If
// `seconds` is not NULL it gets the time of each group of fused operations, with a barrier after each.
void program_run(program *p, const program_step *step, int first, int last, double *seconds);

// Requests from another processor, through memory that both see. A request is a number: `first` and up for the layers
// in order, what is past the last layer for the end of the step. Numbers may be left out.
//
// In steps of one token the other side may guess what a later request will ask for, before it waits for the answer to
// one: the team then fetches the weights until the next request is there. What is computed does not depend on it.
typedef struct {
    const uint32_t *requested;  // the newest request
    uint32_t *answered;         // gets its number when everything it asked for is written
    const uint32_t *abandoned;  // not 0: the other side has given up
    const uint32_t *guessed;    // the number of the request that the newest guess is of; NULL if nobody guesses
    const int32_t *guessed_ids; // its experts, n_experts_used, below 0 for none; written before its number
    uint32_t first, last;       // `last`: what `requested` held before the step began
    double timeout_s;           // for one request
    double *seconds;            // [2 * n_layers]: waited for each layer's request, and spent to answer it; added up
    int64_t *guesses;           // [2]: experts asked for where there was a guess, and those that were guessed; added up
} exchange;

typedef enum { SERVE_DONE, SERVE_TIMED_OUT, SERVE_ABANDONED } serve_result;

// Runs the program of each layer that is requested until the step asks for nothing more, with one team for all of it.
// All programs have the same number of threads, and the step must have passed `program_check` for each.
serve_result program_serve(program *const *layers, int n_layers, const program_step *step, const exchange *e);

int program_n_groups(const program *p);
// Writes the names of the fused operations of a group, joined by "+".
void program_group_name(const program *p, int group, char *name, size_t n_bytes);

// What the check compares with, for messages.
int program_n_vocab(const program *p);
int program_context_length(const program *p);

#endif
