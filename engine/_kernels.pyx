"""The C boundary. What everything does is said in `_kernels.pyi`; here arguments are checked and C is called."""

import numpy as np

from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport errno
from libc.stdint cimport INT32_MAX, int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libcpp cimport bool as c_bool


cdef extern from "kernels/table.h" nogil:
    enum:
        N_GGML_TYPES
        N_LEVELS
        ACTIVATION_F32
        N_ACTIVATIONS

    ctypedef struct weight_rows:
        pass
    ctypedef void (*matmul_fn)(const uint8_t *w, int64_t row_bytes, int n_rows, int n_cols, const void *const *x,
                               int n_x, float *const *y, const weight_rows *next)
    ctypedef void (*quantize_fn)(const float *x, void *row, int n_cols, int first, int end)
    ctypedef void (*dequantize_fn)(const uint8_t *w, float *out, int n_cols)
    ctypedef void (*exponentials_fn)(const float *x, int n, float shift, float scale, float *out)
    ctypedef struct ops_table:
        exponentials_fn exponentials
    ctypedef struct quant_table:
        matmul_fn *matmul
        uint8_t *is_fast
        dequantize_fn *dequantize_row
        quantize_fn *quantize
    ctypedef struct kernel_table:
        const char *name
        const quant_table *quant
        const ops_table *ops
    ctypedef struct format_facts_t "format_facts":
        int block_size, block_bytes, activation
    const format_facts_t *engine_formats
    const kernel_table *engine_kernels(const char *isa)
    int engine_levels(const char **names)
    int64_t engine_activation_bytes(int activation, int n_cols)


cdef extern from "kernels/grids.h":
    int engine_set_grid(const char *name, const int8_t *values, size_t n_bytes)


cdef extern from "kernels/ops.h":
    enum:
        _ROWS_TOKENS "ROWS_TOKENS"
        _ROWS_OUTPUTS "ROWS_OUTPUTS"
        _GATE_SIGMOID "GATE_SIGMOID"
        _GATE_SILU "GATE_SILU"
        _GATE_SOFTPLUS "GATE_SOFTPLUS"
        _GATE_RELU "GATE_RELU"
        _GATE_PRODUCT "GATE_PRODUCT"
        _GATE_GELU "GATE_GELU"
        _GATE_CLAMPED_SWISH "GATE_CLAMPED_SWISH"
        _GATE_SITU "GATE_SITU"
        _GATE_CLAMPED_SILU "GATE_CLAMPED_SILU"
        _ROPE_NEOX "ROPE_NEOX"
        _ROPE_NORM "ROPE_NORM"
        _SCORE_SOFTMAX "SCORE_SOFTMAX"
        _SCORE_SIGMOID "SCORE_SIGMOID"
        _SCORE_SOFTMAX_TOPK "SCORE_SOFTMAX_TOPK"
        _SCORE_SQRT_SOFTPLUS "SCORE_SQRT_SOFTPLUS"
        _ACTIVATE_SILU "ACTIVATE_SILU"
        _ACTIVATE_CLAMPED_SWISH "ACTIVATE_CLAMPED_SWISH"
        _ACTIVATE_RELU "ACTIVATE_RELU"
        _ACTIVATE_CLAMPED_SILU "ACTIVATE_CLAMPED_SILU"
        _ACTIVATE_GELU "ACTIVATE_GELU"
        _ACTIVATE_SITU "ACTIVATE_SITU"
        _KV_F32 "KV_F32"
        _KV_F16 "KV_F16"
        _KV_Q8_0 "KV_Q8_0"
        MAX_EXPERTS
        MAX_HEAD_DIM
        ATTENTION_CHUNK
        MAX_CONV_KERNEL
        MAX_CONVOLVED
        MAX_HASHED
        MAX_SCAN_STATE
        MAX_STREAMS
        MAX_RESIDUALS
        MAX_MIXED_STREAMS
        MAX_LINEAR_WEIGHTS
        TOKENS_PER_CALL

    ctypedef struct matrix:
        float *at
        int64_t stride
    ctypedef struct embed_args:
        const uint8_t *table
        int n_cols
        const int32_t *ids
        int64_t ids_stride
        matrix out
        float scale
    ctypedef struct hash_tokens_args:
        int32_t *state
        int32_t *kept
        int32_t *out
        int64_t out_stride
        const uint64_t *multipliers
        const uint32_t *sizes
        const uint32_t *offsets
        int n_hashed, n_heads, end_id
    ctypedef struct rms_norm_args:
        matrix x, out
        const float *weight
        const float *bias
        int group_size, weight_step
        bint centers
        float eps
    ctypedef struct quantize_args:
        matrix x
        uint8_t *out
        int n_cols, activation
    ctypedef struct add_args:
        matrix a, b, out
    ctypedef struct gate_args:
        matrix x, gate, out
        int kind, span, n_streams, n_cols
        float limit, own_limit
    ctypedef struct gate_by_agreement_args:
        matrix a, b, x, out
        int n_cols
        float floor
    ctypedef struct scale_args:
        matrix x, out, by
        float factor
    ctypedef struct soft_cap_args:
        matrix x, out
        float cap
    ctypedef struct clamp_args:
        matrix x, out
        float limit
    ctypedef struct scale_by_position_args:
        matrix x
        int offset, period
        float slope
    ctypedef struct heads_args:
        matrix joined, first, second
        int first_dim, second_dim
    ctypedef struct rope_args:
        matrix x
        int head_dim, n_pairs, style
    ctypedef struct select_outputs_args:
        matrix x, out
        int n_cols
    ctypedef struct combine_args:
        matrix expert_out, shared, shared_gate, residual, out
        const float *weights
        int n_experts_used, n_cols
        float scale
    ctypedef struct stream_weights_args:
        matrix mixes, gates, mixing
        const float *scale
        const float *base
        float *weights
        int n_streams, n_normalizations
        float offset, magnitude
    ctypedef struct add_to_streams_args:
        matrix x, added, gates, mixing, out
        int n_streams, n_cols
        float magnitude
    ctypedef struct mix_residuals_args:
        matrix *residuals
        matrix out
        const float *scorer
        int n_residuals, n_cols
        float eps
    ctypedef struct carry_over_args:
        matrix x, out
        float *state
        int n_channels, n_kept
    ctypedef struct causal_conv_args:
        matrix x, out
        const float *weight
        const float *bias
        float *state
        float *kept
        int n_channels, kernel_size, dilation
        c_bool activates
    ctypedef struct delta_net_args:
        const float *q
        const float *k
        const float *v
        int64_t qkv_stride
        matrix beta, alpha, out
        const float *a
        const float *dt_bias
        const float *skip
        float *state
        float *kept
        int n_k_heads, n_v_heads, k_dim, v_dim, decay_dim
        float decay_bound
        c_bool grouped
        float eps
    ctypedef struct selective_scan_args:
        matrix x, dt, b, c, out
        const float *a
        const float *skip
        float *state
        float *kept
        int n_channels, state_size
    ctypedef struct compress_args:
        matrix values, scores, out
        const float *biases
        float *state
        float *kept
        int n_channels, n_parts, period
    ctypedef struct router_args:
        matrix logits
        const float *bias
        const int32_t *table
        int32_t *ids
        float *weights
        int n_experts, n_experts_used, scoring, n_groups, n_groups_used
        c_bool normalize
        float scale
    ctypedef struct group_router_args:
        matrix logits
        const int32_t *ids
        int32_t *group_ids
        float *weights
        int n_experts, n_experts_used, group_size
    ctypedef struct kv_cache:
        uint8_t *keys
        uint8_t *values
        int type, n_rows, n_kv_heads, head_dim, value_dim, period
        c_bool is_ring
    ctypedef struct attention_args:
        matrix q, out
        kv_cache cache, shared
        const float *sinks
        int n_heads, window, chunk
        float scale, cap
        const int32_t *selected
        int64_t selected_stride
        int top_k, block_size, n_lists
        c_bool has_tail
    ctypedef struct select_positions_args:
        matrix q, weights
        kv_cache cache
        int32_t *out
        int64_t out_stride
        int n_heads, top_k
        c_bool has_tail
        float scale
    ctypedef struct select_blocks_args:
        matrix q
        kv_cache cache
        int32_t *out
        int64_t out_stride
        int n_heads, top_k, block_size, n_newest
    ctypedef struct linear_weight:
        const uint8_t *weight
        int64_t row_bytes
        matmul_fn matmul
        int n_rows
        matrix out
        const float *bias
        const float *scale
    ctypedef struct linear_args:
        const uint8_t *x
        int64_t x_row_bytes
        int n_cols, n_weights, rows
        linear_weight *weights
    ctypedef struct expert_matrix:
        const int64_t *table
        int64_t row_bytes
        matmul_fn matmul
        const float *scale
        const float *bias
    ctypedef struct experts_args:
        const uint8_t *x_gate
        const uint8_t *x_up
        int64_t x_gate_row_bytes, x_up_row_bytes
        const int32_t *ids
        int n_experts, n_experts_used, hidden_size, ffn_size, activation
        float limit, up_limit
        expert_matrix gate, up, down
        matrix out

    int64_t kv_key_bytes(int type, int n_slots, int n_rows, int n_kv_heads, int head_dim)
    int64_t kv_value_bytes(int type, int n_slots, int n_rows, int n_kv_heads, int value_dim)


cdef extern from "kernels/program.h" nogil:
    ctypedef struct program:
        pass
    ctypedef struct program_step:
        int n_tokens, n_outputs, kept_row
        const int32_t *token_ids
        const int32_t *positions
        const int32_t *slots
        const int32_t *output_rows
    ctypedef enum step_error:
        STEP_FITS
        STEP_N_TOKENS
        STEP_N_OUTPUTS
        STEP_KEPT_ROW
        STEP_TOKEN_ID
        STEP_POSITION
        STEP_SLOT
        STEP_SEQUENCE
        STEP_OUTPUT_ROW
    program *program_create(const kernel_table *kernels, int max_tokens, int n_slots, int n_threads)
    void program_free(program *p)
    void program_share_experts(program *p, const program *other)
    int program_length(const program *p)
    int program_embed(program *p, int ggml_type, embed_args args, int n_vocab, int n_ids)
    int program_hash_tokens(program *p, hash_tokens_args args)
    int program_rms_norm(program *p, rms_norm_args args, int n_groups, int rows)
    int program_quantize(program *p, quantize_args args, int rows)
    int program_linear(program *p, linear_args args)
    int program_add(program *p, add_args args, int n_cols, int rows)
    int program_gate(program *p, gate_args args, int rows)
    int program_gate_by_agreement(program *p, gate_by_agreement_args args, int n_streams)
    int program_scale(program *p, scale_args args, int n_cols, int rows)
    int program_soft_cap(program *p, soft_cap_args args, int n_cols, int rows)
    int program_clamp(program *p, clamp_args args, int n_cols, int rows)
    int program_scale_by_position(program *p, scale_by_position_args args, int n_cols)
    int program_split_heads(program *p, heads_args args, int n_heads)
    int program_join_heads(program *p, heads_args args, int n_heads)
    int program_rope(
        program *p, rope_args args, const float *frequencies, float magnitude, int period, int n_heads
    )
    int program_attention(program *p, attention_args args, matrix k, matrix v, matrix shared_k)
    int program_store_keys(program *p, kv_cache cache, matrix k, matrix v)
    int program_carry_over(program *p, carry_over_args args)
    int program_select_positions(program *p, select_positions_args args, matrix k)
    int program_select_blocks(program *p, select_blocks_args args, matrix k)
    int program_causal_conv(program *p, causal_conv_args args)
    int program_delta_net(program *p, delta_net_args args)
    int program_selective_scan(program *p, selective_scan_args args)
    int program_compress(program *p, compress_args args)
    int program_router(program *p, router_args args, int n_vocab)
    int program_group_router(program *p, group_router_args args)
    int program_experts(program *p, experts_args args, int down_activation)
    int program_combine(program *p, combine_args args)
    int program_stream_weights(program *p, stream_weights_args args)
    int program_add_to_streams(program *p, add_to_streams_args args)
    int program_mix_residuals(program *p, mix_residuals_args args)
    int program_select_outputs(program *p, select_outputs_args args)
    step_error program_check(const program *p, const program_step *step, int *detail)
    void program_run(program *p, const program_step *step, int first, int last, double *seconds)
    ctypedef struct exchange:
        const uint32_t *requested
        uint32_t *answered
        const uint32_t *abandoned
        const uint32_t *guessed
        const int32_t *guessed_ids
        uint32_t first, last
        double timeout_s
        double *seconds
        int64_t *guesses
    ctypedef enum serve_result:
        SERVE_DONE
        SERVE_TIMED_OUT
        SERVE_ABANDONED
    serve_result program_serve(program *const *layers, int n_layers, const program_step *step, const exchange *e)
    int program_n_groups(const program *p)
    void program_group_name(const program *p, int group, char *name, size_t n_bytes)
    int program_n_vocab(const program *p)
    int program_context_length(const program *p)


cdef extern from "kernels/memory.h" nogil:
    void c_parallel_copy "parallel_copy"(const void *src, void *dst, int64_t n_bytes, int n_threads)
    double c_read_bandwidth "read_bandwidth"(const kernel_table *kernels, uint8_t *data, int64_t n_bytes,
                                             int n_threads, int repeats)


cdef extern from "kernels/bus_error.h" nogil:
    int c_explain_bus_errors "explain_bus_errors"(int exit_code)


cdef extern from "kernels/random.h" nogil:
    void c_fill_random_blocks "fill_random_blocks"(int ggml_type, uint8_t *rows, int64_t n_rows, int n_cols,
                                                   uint64_t seed, int n_threads)


cdef extern from "kernels/sampling.h" nogil:
    ctypedef struct sampling_params:
        double temperature, top_p, min_p
        double repetition_penalty, presence_penalty, frequency_penalty
        int top_k
    int largest_logit(const ops_table *ops, const float *logits, int n)
    int sample_token(const ops_table *ops, const float *logits, int n, const int32_t *recent, int n_recent,
                     const sampling_params *params, double uniform)
    int best_log_probabilities(const ops_table *ops, const float *logits, int n, int n_top, int32_t *ids,
                               float *values, double *log_sum)


ROWS_TOKENS = _ROWS_TOKENS
ROWS_OUTPUTS = _ROWS_OUTPUTS
GATE_SIGMOID = _GATE_SIGMOID
GATE_SILU = _GATE_SILU
GATE_SOFTPLUS = _GATE_SOFTPLUS
GATE_RELU = _GATE_RELU
GATE_PRODUCT = _GATE_PRODUCT
GATE_GELU = _GATE_GELU
GATE_CLAMPED_SWISH = _GATE_CLAMPED_SWISH
GATE_SITU = _GATE_SITU
GATE_CLAMPED_SILU = _GATE_CLAMPED_SILU
ROPE_NEOX = _ROPE_NEOX
ROPE_NORM = _ROPE_NORM
SCORE_SOFTMAX = _SCORE_SOFTMAX
SCORE_SIGMOID = _SCORE_SIGMOID
SCORE_SOFTMAX_TOPK = _SCORE_SOFTMAX_TOPK
SCORE_SQRT_SOFTPLUS = _SCORE_SQRT_SOFTPLUS
ACTIVATE_SILU = _ACTIVATE_SILU
ACTIVATE_CLAMPED_SWISH = _ACTIVATE_CLAMPED_SWISH
ACTIVATE_RELU = _ACTIVATE_RELU
ACTIVATE_CLAMPED_SILU = _ACTIVATE_CLAMPED_SILU
ACTIVATE_GELU = _ACTIVATE_GELU
ACTIVATE_SITU = _ACTIVATE_SITU
KV_F32 = _KV_F32
KV_F16 = _KV_F16
KV_Q8_0 = _KV_Q8_0

cdef enum:
    MAX_THREADS = 1024


# -- checks ----------------------------------------------------------------------------------------------------------


cdef int need(condition, str message) except -1:
    if not condition:
        raise ValueError(message)
    return 0


cdef int need_at_least(str name, int64_t value, int64_t least) except -1:
    return need(value >= least, f"{name} is {value}; expected at least {least}")


cdef int need_one_of(str name, int value, int n) except -1:
    return need(0 <= value < n, f"{name} is {value}; expected 0 to {n - 1}")


cdef const format_facts_t *need_format(int ggml_type) except NULL:
    if not 0 <= ggml_type < N_GGML_TYPES or engine_formats[ggml_type].block_size == 0:
        raise ValueError(f"{ggml_type} is not the ggml type of a weight format that is known here")
    return &engine_formats[ggml_type]


cdef int64_t need_row_bytes(int ggml_type, int64_t n_cols) except -1:
    """The bytes of a row of weights."""
    cdef const format_facts_t *facts = need_format(ggml_type)
    need_at_least("n_cols", n_cols, 1)
    if n_cols % facts.block_size:
        raise ValueError(f"a row of {n_cols} weights is not whole blocks of {facts.block_size} (ggml type {ggml_type})")
    return n_cols // facts.block_size * facts.block_bytes


cdef int need_activation(int activation, int64_t n_cols) except -1:
    need_one_of("activation", activation, N_ACTIVATIONS)
    need_at_least("n_cols", n_cols, 1)
    cdef int group = 1 if activation == ACTIVATION_F32 else 256 if activation == 1 else 32
    return need(n_cols % group == 0, f"{n_cols} values are not whole groups of {group}")


cdef const kernel_table *need_kernels(isa) except NULL:
    cdef const kernel_table *kernels
    cdef bytes name
    if isa is None:
        kernels = engine_kernels(NULL)
    else:
        name = isa.encode()
        kernels = engine_kernels(PyBytes_AS_STRING(name))
    if kernels == NULL:
        raise ValueError(f"this CPU has no instruction-set level {isa!r}; it has {', '.join(isa_levels())}")
    return kernels


cdef int need_threads(int n_threads) except -1:
    return need(1 <= n_threads <= MAX_THREADS, f"n_threads is {n_threads}; expected 1 to {MAX_THREADS}")


cdef matrix need_matrix(str name, uintptr_t address, int64_t stride, int64_t n_cols):
    need_at_least(f"the width of {name}", n_cols, 1)
    need(address and address % 4 == 0, f"the address of {name} is {address:#x}; expected one of float32 values")
    need(stride >= n_cols, f"the stride of {name} is {stride}; expected at least its width {n_cols}")
    return matrix(<float *> address, stride)


cdef void *need_address(str name, uintptr_t address) except NULL:
    need(address != 0, f"the address of {name} is 0")
    return <void *> address


cdef int recorded(int status) except -1:
    if status:
        raise MemoryError("no memory for another operation")
    return 0


# -- instruction-set levels ------------------------------------------------------------------------------------------


def isa_levels():
    cdef const char *names[N_LEVELS]
    cdef int i, n = engine_levels(names)
    return [names[i].decode() for i in range(n)]


def format_facts(int ggml_type):
    if not 0 <= ggml_type < N_GGML_TYPES or engine_formats[ggml_type].block_size == 0:
        return None
    facts = engine_formats[ggml_type]
    return facts.block_size, facts.block_bytes, facts.activation


def fast_formats(str isa):
    cdef const quant_table *quant = need_kernels(isa).quant
    cdef int i
    return [i for i in range(N_GGML_TYPES) if quant.is_fast[i]]


def set_grids(dict grids):
    cdef const int8_t[::1] values
    for name, grid in grids.items():
        values = np.ascontiguousarray(grid, np.int8).reshape(-1)
        if engine_set_grid(name.encode(), &values[0], values.shape[0]):
            raise ValueError(f"{name} has no grid of {values.shape[0]} bytes with so many different values")


# -- single kernels --------------------------------------------------------------------------------------------------


def dequantize(int ggml_type, const uint8_t[:, ::1] raw, int n_cols):
    cdef int64_t row_bytes = need_row_bytes(ggml_type, n_cols)
    need(raw.shape[1] == row_bytes, f"raw has {raw.shape[1]} bytes a row; {n_cols} weights take {row_bytes}")
    cdef int64_t i, n_rows = raw.shape[0]
    out = np.empty((n_rows, n_cols), np.float32)
    cdef float[:, ::1] values = out
    cdef dequantize_fn convert = engine_kernels(NULL).quant.dequantize_row[ggml_type]
    with nogil:
        for i in range(n_rows):
            convert(&raw[i, 0], &values[i, 0], n_cols)
    return out


def activation_bytes(int activation, int n_cols):
    need_activation(activation, n_cols)
    return engine_activation_bytes(activation, n_cols)


def quantize_activations(const float[:, ::1] x, int activation, isa=None):
    cdef int64_t i, n_rows = x.shape[0]
    cdef int n_cols = x.shape[1]
    need_activation(activation, n_cols)
    cdef quantize_fn convert = need_kernels(isa).quant.quantize[activation]
    out = np.zeros((n_rows, engine_activation_bytes(activation, n_cols)), np.uint8)
    cdef uint8_t[:, ::1] rows = out
    with nogil:
        for i in range(n_rows):
            convert(&x[i, 0], &rows[i, 0], n_cols, 0, n_cols)
    return out


def matmul(int ggml_type, const uint8_t[:, ::1] weight, const float[:, ::1] x, int n_threads=1, isa=None):
    cdef int n_rows = weight.shape[0], n_tokens = x.shape[0], n_cols = x.shape[1]
    cdef int64_t row_bytes = need_row_bytes(ggml_type, n_cols)
    need(weight.shape[1] == row_bytes, f"weight has {weight.shape[1]} bytes a row; {n_cols} weights take {row_bytes}")
    out = np.empty((n_tokens, n_rows), np.float32)
    if out.size == 0:
        return out
    cdef float[:, ::1] values = out
    cdef int activation = engine_formats[ggml_type].activation
    cdef const uint8_t[:, ::1] rows
    if activation == ACTIVATION_F32:
        rows = np.asarray(x).view(np.uint8)
    else:
        rows = quantize_activations(x, activation, isa)
    cdef Program runner = Program(n_tokens, 1, n_threads, isa)
    runner.linear(
        <uintptr_t> &rows[0, 0],
        rows.shape[1],
        n_cols,
        [(<uintptr_t> &weight[0, 0], ggml_type, n_rows, <uintptr_t> &values[0, 0], n_rows, 0, 0)],
        _ROWS_TOKENS,
    )
    step = Step(n_tokens)
    step.n_tokens = n_tokens
    step.positions[:] = range(n_tokens)
    runner.run(step)
    return out


def fill_random_blocks(int ggml_type, uint8_t[:, ::1] out, int n_cols, uint64_t seed, int n_threads=1):
    cdef int64_t row_bytes = need_row_bytes(ggml_type, n_cols)
    need(out.shape[1] == row_bytes, f"out has {out.shape[1]} bytes a row; {n_cols} weights take {row_bytes}")
    need_threads(n_threads)
    if out.shape[0]:
        with nogil:
            c_fill_random_blocks(ggml_type, &out[0, 0], out.shape[0], n_cols, seed, n_threads)


def parallel_copy(uintptr_t src, uintptr_t dst, int64_t n_bytes, int n_threads):
    need_threads(n_threads)
    need_at_least("n_bytes", n_bytes, 0)
    need(n_bytes == 0 or (src and dst), "src and dst must be addresses")
    with nogil:
        c_parallel_copy(<const void *> src, <void *> dst, n_bytes, n_threads)


def read_bandwidth(uint8_t[::1] buffer, int n_threads, int repeats):
    need_threads(n_threads)
    need_at_least("repeats", repeats, 1)
    need_at_least("the length of buffer", buffer.shape[0], 1)
    cdef const kernel_table *kernels = engine_kernels(NULL)
    cdef double best
    with nogil:
        best = c_read_bandwidth(kernels, &buffer[0], buffer.shape[0], n_threads, repeats)
    return best


def explain_bus_errors(int exit_code):
    if c_explain_bus_errors(exit_code):
        raise OSError(errno, "SIGBUS cannot be handled")


# -- sampling --------------------------------------------------------------------------------------------------------


def argmax(const float[::1] logits):
    need_at_least("the number of logits", logits.shape[0], 1)
    return largest_logit(engine_kernels(NULL).ops, &logits[0], logits.shape[0])


def sample(
    const float[::1] logits,
    const int32_t[::1] recent,
    double temperature,
    int top_k,
    double top_p,
    double min_p,
    double repetition_penalty,
    double presence_penalty,
    double frequency_penalty,
    double uniform,
):
    need_at_least("the number of logits", logits.shape[0], 1)
    need(temperature >= 0, f"temperature is {temperature}; expected 0 (greedy) or more")
    need_at_least("top_k", top_k, 0)
    need(0 < top_p <= 1, f"top_p is {top_p}; expected a number above 0, up to 1")
    need(0 <= min_p <= 1, f"min_p is {min_p}; expected 0 to 1")
    need(repetition_penalty > 0, f"repetition_penalty is {repetition_penalty}; expected a number above 0")
    need(abs(presence_penalty) < np.inf and abs(frequency_penalty) < np.inf, "the penalties must be finite")
    need(0 <= uniform < 1, f"uniform is {uniform}; expected a number from 0 to below 1")
    cdef sampling_params params = sampling_params(
        temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, top_k
    )
    cdef const int32_t *ids = &recent[0] if recent.shape[0] else NULL
    cdef const ops_table *ops = engine_kernels(NULL).ops
    cdef int token
    with nogil:
        token = sample_token(ops, &logits[0], logits.shape[0], ids, recent.shape[0], &params, uniform)
    if token < 0:
        raise MemoryError("no memory to sample a token")
    return token


def log_probabilities(const float[::1] logits, int n_top):
    need(0 <= n_top <= logits.shape[0], f"n_top is {n_top}; expected 0 to {logits.shape[0]}")
    need_at_least("the number of logits", logits.shape[0], 1)
    ids, values = np.empty(max(n_top, 1), np.int32), np.empty(max(n_top, 1), np.float32)
    cdef int32_t[::1] id_view = ids
    cdef float[::1] value_view = values
    cdef const ops_table *ops = engine_kernels(NULL).ops
    cdef double log_sum
    if best_log_probabilities(ops, &logits[0], logits.shape[0], n_top, &id_view[0], &value_view[0], &log_sum):
        raise MemoryError("no memory to sort logits")
    return ids[:n_top], values[:n_top], log_sum


# -- the recorded program --------------------------------------------------------------------------------------------


cdef class Step:
    cdef readonly object token_ids, positions, slots, output_rows
    cdef public int n_tokens, n_outputs, kept_row
    cdef int32_t[::1] _token_ids, _positions, _slots, _output_rows

    def __init__(self, int max_tokens):
        need_at_least("max_tokens", max_tokens, 1)
        self.kept_row = -1
        self.token_ids, self.positions, self.slots, self.output_rows = np.zeros((4, max_tokens), np.int32)
        self._token_ids, self._positions = self.token_ids, self.positions
        self._slots, self._output_rows = self.slots, self.output_rows


cdef class Program:
    cdef program *_program
    cdef readonly int n_threads
    cdef readonly str isa
    cdef int _max_tokens, _n_slots
    cdef bint _is_running
    cdef Program _lender

    def __init__(self, int max_tokens, int n_slots, int n_threads, isa=None, Program lender=None):
        need(self._program == NULL, "a program is made once")
        need_at_least("max_tokens", max_tokens, 1)
        need_at_least("n_slots", n_slots, 1)
        need_threads(n_threads)
        cdef const kernel_table *kernels = need_kernels(isa)
        self._program = program_create(kernels, max_tokens, n_slots, n_threads)
        if self._program == NULL:
            raise MemoryError("no memory for a program")
        self.n_threads, self.isa = n_threads, kernels.name.decode()
        self._max_tokens, self._n_slots = max_tokens, n_slots
        if lender is not None:
            program_share_experts(self._program, lender._program)
            self._lender = lender

    def __dealloc__(self):
        program_free(self._program)

    def __len__(self):
        return program_length(self._program)

    cdef program_step _checked(self, Step step) except *:
        """The step for C. Raises ValueError if it does not fit what was recorded."""
        need(not self._is_running, "this program is running in another thread; make one for each thread")
        need(
            step.n_tokens <= len(step.token_ids) and step.n_outputs <= len(step.output_rows),
            f"{step.n_tokens} tokens and {step.n_outputs} outputs in a step made for {len(step.token_ids)}",
        )
        cdef program_step view = program_step(
            step.n_tokens,
            step.n_outputs,
            step.kept_row,
            &step._token_ids[0],
            &step._positions[0],
            &step._slots[0],
            &step._output_rows[0],
        )
        cdef int at
        cdef step_error error = program_check(self._program, &view, &at)
        if error == STEP_N_TOKENS:
            raise ValueError(f"a step of {at} tokens; this program takes 1 to {self._max_tokens}")
        if error == STEP_N_OUTPUTS:
            raise ValueError(f"{at} outputs of {step.n_tokens} tokens")
        if error == STEP_KEPT_ROW:
            raise ValueError(f"states after row {at} of {step.n_tokens} tokens cannot be kept: no such row, or no room")
        if error == STEP_TOKEN_ID:
            n_vocab = program_n_vocab(self._program)
            raise ValueError(f"token {at} has the id {step._token_ids[at]}; the vocabulary has 0 to {n_vocab - 1}")
        if error == STEP_POSITION:
            context_length = program_context_length(self._program)
            raise ValueError(f"token {at} is at position {step._positions[at]}; the context has {context_length}")
        if error == STEP_SLOT:
            raise ValueError(f"token {at} is in slot {step._slots[at]}; this program has {self._n_slots}")
        if error == STEP_SEQUENCE:
            raise ValueError(
                f"token {at} (slot {step._slots[at]}, position {step._positions[at]}) does not follow the token before "
                "it; the tokens of one sequence must stand together and in order"
            )
        if error == STEP_OUTPUT_ROW:
            raise ValueError(
                f"output {at} is row {step._output_rows[at]}; expected rows of the {step.n_tokens} tokens, rising"
            )
        return view

    def run(self, Step step, int first=0, int last=-1):
        cdef int n = program_length(self._program), end = n if last < 0 else last
        need(0 <= first <= end <= n, f"operations {first} to {end} of {n}")
        cdef program_step view = self._checked(step)
        self._is_running = True
        with nogil:
            program_run(self._program, &view, first, end, NULL)
        self._is_running = False

    def profile(self, Step step):
        cdef program_step view = self._checked(step)
        cdef int i, n = program_n_groups(self._program)
        cdef double *seconds = <double *> malloc((n + 1) * sizeof(double))
        cdef char name[256]
        if seconds == NULL:
            raise MemoryError("no memory for a profile")
        self._is_running = True
        with nogil:
            program_run(self._program, &view, 0, program_length(self._program), seconds)
        self._is_running = False
        result = []
        for i in range(n):
            program_group_name(self._program, i, name, sizeof(name))
            result.append((name.decode(), seconds[i]))
        free(seconds)
        return result

    def embed(
        self,
        uintptr_t table,
        int ggml_type,
        int n_vocab,
        int n_cols,
        uintptr_t out,
        int64_t out_stride,
        float scale,
        uintptr_t ids=0,
        int64_t ids_stride=0,
        int n_ids=1,
    ):
        need_row_bytes(ggml_type, n_cols)
        need_at_least("n_vocab", n_vocab, 1)
        need_at_least("n_ids", n_ids, 1)
        need(ids or n_ids == 1, f"n_ids is {n_ids}; expected 1 for the ids of tokens")
        cdef embed_args args
        args.table = <const uint8_t *> need_address("table", table)
        args.n_cols = n_cols
        args.ids = NULL
        args.ids_stride = ids_stride
        if ids:
            args.ids = <const int32_t *> need_matrix("ids", ids, ids_stride, n_ids).at
        args.out = need_matrix("out", out, out_stride, n_ids * <int64_t> n_cols)
        args.scale = scale
        recorded(program_embed(self._program, ggml_type, args, n_vocab, n_ids))

    def hash_tokens(
        self,
        uintptr_t state,
        uintptr_t out,
        int64_t out_stride,
        uintptr_t multipliers,
        uintptr_t sizes,
        uintptr_t offsets,
        int n_hashed,
        int n_heads,
        int end_id,
        uintptr_t kept=0,
    ):
        need(2 <= n_hashed <= MAX_HASHED, f"n_hashed is {n_hashed}; expected 2 to {MAX_HASHED}")
        need(
            n_heads > 0 and n_heads % (n_hashed - 1) == 0,
            f"n_heads is {n_heads}; expected a multiple of {n_hashed - 1}",
        )
        cdef hash_tokens_args args
        args.state = <int32_t *> need_address("state", state)
        args.kept = <int32_t *> kept
        args.out = <int32_t *> need_matrix("out", out, out_stride, n_heads).at
        args.out_stride = out_stride
        args.multipliers = <const uint64_t *> need_address("multipliers", multipliers)
        args.sizes = <const uint32_t *> need_address("sizes", sizes)
        args.offsets = <const uint32_t *> need_address("offsets", offsets)
        args.n_hashed = n_hashed
        args.n_heads = n_heads
        args.end_id = end_id
        recorded(program_hash_tokens(self._program, args))

    def rms_norm(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t weight,
        uintptr_t bias,
        uintptr_t out,
        int64_t out_stride,
        int n_groups,
        int group_size,
        int weight_step,
        bint centers,
        float eps,
        int rows,
    ):
        need_at_least("n_groups", n_groups, 1)
        need_at_least("group_size", group_size, 1)
        need(weight_step in (0, group_size), f"weight_step is {weight_step}; expected 0 or {group_size}")
        need_one_of("rows", rows, 2)
        cdef rms_norm_args args
        args.x = need_matrix("x", x, x_stride, n_groups * <int64_t> group_size)
        args.weight = <const float *> need_address("weight", weight)
        args.bias = <const float *> bias
        args.out = need_matrix("out", out, out_stride, n_groups * <int64_t> group_size)
        args.group_size = group_size
        args.weight_step = weight_step
        args.centers = centers
        args.eps = eps
        recorded(program_rms_norm(self._program, args, n_groups, rows))

    def quantize(self, uintptr_t x, int64_t x_stride, int n_cols, int activation, uintptr_t out, int rows):
        need_activation(activation, n_cols)
        need_one_of("rows", rows, 2)
        cdef quantize_args args
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.out = <uint8_t *> need_address("out", out)
        args.n_cols = n_cols
        args.activation = activation
        recorded(program_quantize(self._program, args, rows))

    def linear(self, uintptr_t x, int64_t x_row_bytes, int n_cols, weights, int rows):
        need_one_of("rows", rows, 2)
        need(
            0 < len(weights) <= MAX_LINEAR_WEIGHTS,
            f"{len(weights)} matrices in one operation; expected 1 to {MAX_LINEAR_WEIGHTS}",
        )
        cdef linear_args args
        cdef linear_weight *entry
        cdef int activation = -1, i
        args.x = <const uint8_t *> need_address("x", x)
        args.x_row_bytes = x_row_bytes
        args.n_cols = n_cols
        args.rows = rows
        args.n_weights = len(weights)
        for i, (address, ggml_type, n_rows, out, out_stride, bias, scale) in enumerate(weights):
            entry = &args.weights[i]
            entry.row_bytes = need_row_bytes(ggml_type, n_cols)
            if i > 0 and engine_formats[<int> ggml_type].activation != activation:
                raise ValueError("the formats of one operation must take activations in the same form")
            activation = engine_formats[<int> ggml_type].activation
            need_at_least("n_rows", n_rows, 1)
            entry.weight = <const uint8_t *> need_address("a weight", address)
            entry.matmul = engine_kernels(self.isa.encode()).quant.matmul[<int> ggml_type]
            entry.n_rows = n_rows
            entry.out = need_matrix("out", out, out_stride, n_rows)
            entry.bias = <const float *> <uintptr_t> bias
            entry.scale = <const float *> <uintptr_t> scale
        need_at_least("x_row_bytes", x_row_bytes, need_x_bytes(activation, n_cols))
        recorded(program_linear(self._program, args))

    def add(
        self,
        uintptr_t a,
        int64_t a_stride,
        uintptr_t b,
        int64_t b_stride,
        uintptr_t out,
        int64_t out_stride,
        int n_cols,
        int rows,
    ):
        need_one_of("rows", rows, 2)
        cdef add_args args
        args.a = need_matrix("a", a, a_stride, n_cols)
        args.b = need_matrix("b", b, b_stride if b_stride else n_cols, n_cols)
        args.b.stride = b_stride
        args.out = need_matrix("out", out, out_stride, n_cols)
        recorded(program_add(self._program, args, n_cols, rows))

    def gate(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t gate,
        int64_t gate_stride,
        uintptr_t out,
        int64_t out_stride,
        int n_cols,
        int n_gates,
        int kind,
        float limit,
        float own_limit,
        int rows,
        int n_streams=1,
    ):
        need_one_of("rows", rows, 2)
        need_one_of("kind", kind, 9)
        need_at_least("n_streams", n_streams, 1)
        need(n_cols % n_streams == 0, f"{n_streams} streams cannot share {n_cols} columns evenly")
        need(n_streams == 1 or n_gates == n_cols, f"{n_gates} gates; expected {n_cols} where streams are added up")
        need(
            limit > 0 or kind not in (_GATE_SITU, _GATE_CLAMPED_SILU), f"limit is {limit}; expected a number above 0"
        )
        need_at_least("n_gates", n_gates, 1)
        need(n_cols % n_gates == 0, f"{n_gates} gates cannot share {n_cols} columns evenly")
        cdef gate_args args
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.gate = need_matrix("gate", gate, gate_stride, n_gates)
        args.span = n_cols // n_gates
        args.limit = limit
        args.own_limit = own_limit
        args.n_streams = n_streams
        args.n_cols = n_cols // n_streams
        args.out = need_matrix("out", out, out_stride, args.n_cols)
        args.kind = kind
        recorded(program_gate(self._program, args, rows))

    def gate_by_agreement(
        self,
        uintptr_t a,
        int64_t a_stride,
        uintptr_t b,
        int64_t b_stride,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t out,
        int64_t out_stride,
        int n_streams,
        int n_cols,
        float floor,
    ):
        need_at_least("n_streams", n_streams, 1)
        need_at_least("n_cols", n_cols, 1)
        need(floor >= 0, f"floor is {floor}; expected 0, or a number above")
        cdef gate_by_agreement_args args
        args.a = need_matrix("a", a, a_stride, n_streams * <int64_t> n_cols)
        args.b = need_matrix("b", b, b_stride, n_streams * <int64_t> n_cols)
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.out = need_matrix("out", out, out_stride, n_streams * <int64_t> n_cols)
        args.n_cols = n_cols
        args.floor = floor
        recorded(program_gate_by_agreement(self._program, args, n_streams))

    def split_heads(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t first,
        int64_t first_stride,
        uintptr_t second,
        int64_t second_stride,
        int n_heads,
        int first_dim,
        int second_dim,
    ):
        cdef heads_args args = need_heads(
            x, x_stride, first, first_stride, second, second_stride, n_heads, first_dim, second_dim
        )
        recorded(program_split_heads(self._program, args, n_heads))

    def join_heads(
        self,
        uintptr_t first,
        int64_t first_stride,
        uintptr_t second,
        int64_t second_stride,
        uintptr_t out,
        int64_t out_stride,
        int n_heads,
        int first_dim,
        int second_dim,
    ):
        cdef heads_args args = need_heads(
            out, out_stride, first, first_stride, second, second_stride, n_heads, first_dim, second_dim
        )
        recorded(program_join_heads(self._program, args, n_heads))

    def scale(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t by,
        int64_t by_stride,
        uintptr_t out,
        int64_t out_stride,
        int n_cols,
        float factor,
        int rows,
    ):
        need_at_least("n_cols", n_cols, 1)
        need_one_of("rows", rows, 2)
        cdef scale_args args
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.by = need_matrix("by", by, by_stride if by_stride else 1, 1) if by else matrix(NULL, 0)
        args.by.stride = by_stride
        args.out = need_matrix("out", out, out_stride, n_cols)
        args.factor = factor
        recorded(program_scale(self._program, args, n_cols, rows))

    def soft_cap(
        self, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int n_cols, float cap, int rows
    ):
        need_at_least("n_cols", n_cols, 1)
        need_one_of("rows", rows, 2)
        need(cap > 0, f"cap is {cap}; expected a number above 0")
        cdef soft_cap_args args
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.out = need_matrix("out", out, out_stride, n_cols)
        args.cap = cap
        recorded(program_soft_cap(self._program, args, n_cols, rows))

    def clamp(
        self, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int n_cols, float limit, int rows
    ):
        need_at_least("n_cols", n_cols, 1)
        need_one_of("rows", rows, 2)
        need(limit > 0, f"limit is {limit}; expected a number above 0")
        cdef clamp_args args
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.out = need_matrix("out", out, out_stride, n_cols)
        args.limit = limit
        recorded(program_clamp(self._program, args, n_cols, rows))

    def scale_by_position(self, uintptr_t x, int64_t x_stride, int n_cols, int offset, int period, float slope):
        need_at_least("n_cols", n_cols, 1)
        need(0 <= offset <= 1, f"offset is {offset}; expected 0 or 1")
        need_at_least("period", period, 1)
        cdef scale_by_position_args args
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.offset = offset
        args.period = period
        args.slope = slope
        recorded(program_scale_by_position(self._program, args, n_cols))

    def rope(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t frequencies,
        int n_heads,
        int head_dim,
        int n_rot,
        int style,
        float magnitude,
        int period=1,
    ):
        need_at_least("n_heads", n_heads, 1)
        need_at_least("period", period, 1)
        need(0 < n_rot <= head_dim and n_rot % 2 == 0, f"n_rot is {n_rot}; expected an even number up to {head_dim}")
        need_one_of("style", style, 2)
        cdef rope_args args
        args.x = need_matrix("x", x, x_stride, n_heads * <int64_t> head_dim)
        args.head_dim = head_dim
        args.n_pairs = n_rot // 2
        args.style = style
        cdef const float *values = <const float *> need_address("frequencies", frequencies)
        recorded(program_rope(self._program, args, values, magnitude, period, n_heads))

    def attention(
        self,
        uintptr_t q,
        int64_t q_stride,
        uintptr_t k,
        int64_t k_stride,
        uintptr_t v,
        int64_t v_stride,
        uintptr_t out,
        int64_t out_stride,
        uintptr_t cache,
        int cache_type,
        int n_rows,
        int n_heads,
        int n_kv_heads,
        int head_dim,
        int value_dim,
        float scale,
        uintptr_t sinks,
        int window,
        int chunk,
        float cap,
        uintptr_t selected=0,
        int64_t selected_stride=0,
        int top_k=0,
        int block_size=1,
        int n_lists=1,
        uintptr_t shared_k=0,
        int64_t shared_k_stride=0,
        uintptr_t shared=0,
        int n_shared_rows=0,
        int period=1,
        c_bool has_tail=False,
        c_bool is_ring=False,
    ):
        need(value_dim > 0, f"value_dim is {value_dim}; expected at least 1")
        cdef attention_args args
        args.cache = cache_at(
            "cache", cache, cache_type, self._n_slots, n_rows, n_kv_heads, head_dim, value_dim
        )
        args.cache.is_ring = is_ring
        need_at_least("window", window, 0)
        need_at_least("chunk", chunk, 0)
        need(cap >= 0, f"cap is {cap}; expected 0, or a number above")
        need(
            n_heads > 0 and n_heads % n_kv_heads == 0,
            f"{n_heads} heads cannot share {n_kv_heads} key/value heads evenly",
        )
        args.q = need_matrix("q", q, q_stride, n_heads * <int64_t> head_dim)
        args.out = need_matrix("out", out, out_stride, n_heads * <int64_t> value_dim)
        args.shared.keys = NULL
        args.n_heads = n_heads
        args.scale = scale
        args.sinks = <const float *> sinks
        args.window = window
        args.chunk = chunk
        args.cap = cap
        args.selected = NULL
        args.selected_stride = selected_stride
        args.top_k = top_k
        args.block_size = block_size
        args.n_lists = n_lists
        args.has_tail = has_tail
        if selected:
            need_blocks(top_k, block_size)
            need(n_lists == 1 or n_lists == n_kv_heads, f"n_lists is {n_lists}; expected 1 or {n_kv_heads}")
            need(block_size == 1 or not shared_k, f"block_size is {block_size}; expected 1 for a list of shared rows")
            need(top_k > 1 or not has_tail, f"top_k is {top_k}; expected at least 2 with a tail")
            args.selected = <const int32_t *> need_matrix(
                "selected", selected, selected_stride, n_lists * <int64_t> top_k
            ).at
        cdef int64_t most_seen = window or chunk
        if is_ring:
            need(most_seen > 0 and not (selected and not shared_k), "a ring needs a window or a chunk, and no list")
            need(
                n_rows % ATTENTION_CHUNK == 0 and n_rows >= most_seen + self._max_tokens - 1,
                f"a ring has {n_rows} rows; expected a multiple of {ATTENTION_CHUNK}, at least what a token sees and "
                f"{self._max_tokens - 1} more",
            )
        cdef matrix keys = need_matrix("k", k, k_stride, n_kv_heads * <int64_t> head_dim)
        cdef matrix values = need_matrix("v", v, v_stride, n_kv_heads * <int64_t> value_dim)
        cdef matrix shared_keys = matrix(NULL, 0)
        if shared_k:
            need(n_kv_heads == 1, f"n_kv_heads is {n_kv_heads}; expected 1 with shared rows")
            need(value_dim <= head_dim, f"value_dim is {value_dim}; expected at most {head_dim} with shared rows")
            args.shared = cache_at(
                "shared", shared, cache_type, self._n_slots, n_shared_rows, 1, head_dim, value_dim, period
            )
            shared_keys = need_matrix("shared_k", shared_k, shared_k_stride, head_dim)
        recorded(program_attention(self._program, args, keys, values, shared_keys))

    def store_keys(
        self,
        uintptr_t k,
        int64_t k_stride,
        uintptr_t v,
        int64_t v_stride,
        uintptr_t cache,
        int cache_type,
        int n_rows,
        int n_kv_heads,
        int head_dim,
        int value_dim,
        c_bool is_ring=False,
    ):
        need(value_dim > 0, f"value_dim is {value_dim}; expected at least 1")
        cdef kv_cache rows = cache_at(
            "cache", cache, cache_type, self._n_slots, n_rows, n_kv_heads, head_dim, value_dim
        )
        rows.is_ring = is_ring
        cdef matrix keys = need_matrix("k", k, k_stride, n_kv_heads * <int64_t> head_dim)
        cdef matrix values = need_matrix("v", v, v_stride, n_kv_heads * <int64_t> value_dim)
        recorded(program_store_keys(self._program, rows, keys, values))

    def carry_over(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t state,
        uintptr_t out,
        int64_t out_stride,
        int n_channels,
        int n_kept,
    ):
        need_at_least("n_channels", n_channels, 1)
        need_at_least("n_kept", n_kept, 1)
        need(x or out, "the addresses of x and out are 0; expected one of them at least")
        cdef carry_over_args args
        args.x = matrix(NULL, 0)
        if x:
            args.x = need_matrix("x", x, x_stride, n_channels)
        args.out = matrix(NULL, 0)
        if out:
            args.out = need_matrix("out", out, out_stride, n_channels)
        args.state = <float *> need_address("state", state)
        args.n_channels = n_channels
        args.n_kept = n_kept
        recorded(program_carry_over(self._program, args))

    def select_positions(
        self,
        uintptr_t q,
        int64_t q_stride,
        uintptr_t k,
        int64_t k_stride,
        uintptr_t weights,
        int64_t weights_stride,
        uintptr_t out,
        int64_t out_stride,
        uintptr_t cache,
        int cache_type,
        int n_rows,
        int n_heads,
        int head_dim,
        int top_k,
        float scale,
        int period=1,
        c_bool has_tail=False,
    ):
        cdef select_positions_args args
        args.cache = cache_at("cache", cache, cache_type, self._n_slots, n_rows, 1, head_dim, 0, period)
        need_at_least("n_heads", n_heads, 1)
        need_at_least("top_k", top_k, 1)
        args.q = need_matrix("q", q, q_stride, n_heads * <int64_t> head_dim)
        args.weights = need_matrix("weights", weights, weights_stride, n_heads) if weights else matrix(NULL, 0)
        args.out = <int32_t *> need_matrix("out", out, out_stride, top_k + <int64_t> has_tail).at
        args.out_stride = out_stride
        args.n_heads = n_heads
        args.top_k = top_k
        args.has_tail = has_tail
        args.scale = scale
        recorded(program_select_positions(self._program, args, need_matrix("k", k, k_stride, head_dim)))

    def select_blocks(
        self,
        uintptr_t q,
        int64_t q_stride,
        uintptr_t k,
        int64_t k_stride,
        uintptr_t out,
        int64_t out_stride,
        uintptr_t cache,
        int cache_type,
        int n_rows,
        int n_heads,
        int head_dim,
        int top_k,
        int block_size,
        int n_newest,
    ):
        cdef select_blocks_args args
        args.cache = cache_at("cache", cache, cache_type, self._n_slots, n_rows, 1, head_dim, 0)
        need_at_least("n_heads", n_heads, 1)
        need_blocks(top_k, block_size)
        need(0 < n_newest <= top_k, f"n_newest is {n_newest}; expected 1 to {top_k}")
        args.q = need_matrix("q", q, q_stride, n_heads * <int64_t> head_dim)
        args.out = <int32_t *> need_matrix("out", out, out_stride, n_heads * <int64_t> top_k).at
        args.out_stride = out_stride
        args.n_heads = n_heads
        args.top_k = top_k
        args.block_size = block_size
        args.n_newest = n_newest
        recorded(program_select_blocks(self._program, args, need_matrix("k", k, k_stride, head_dim)))

    def causal_conv(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t weight,
        uintptr_t bias,
        uintptr_t state,
        uintptr_t out,
        int64_t out_stride,
        int n_channels,
        int kernel_size,
        bint activates,
        int dilation=1,
        uintptr_t kept=0,
    ):
        need(
            2 <= kernel_size <= MAX_CONV_KERNEL, f"kernel_size is {kernel_size}; expected 2 to {MAX_CONV_KERNEL}"
        )
        need(
            0 < dilation <= MAX_CONVOLVED // (kernel_size - 1),
            f"dilation is {dilation}; expected 1 to {MAX_CONVOLVED // (kernel_size - 1)}",
        )
        cdef causal_conv_args args
        args.x = need_matrix("x", x, x_stride, n_channels)
        args.out = need_matrix("out", out, out_stride, n_channels)
        args.weight = <const float *> need_address("weight", weight)
        args.bias = <const float *> bias
        args.state = <float *> need_address("state", state)
        args.kept = <float *> kept
        args.n_channels = n_channels
        args.kernel_size = kernel_size
        args.dilation = dilation
        args.activates = activates
        recorded(program_causal_conv(self._program, args))

    def delta_net(
        self,
        uintptr_t q,
        uintptr_t k,
        uintptr_t v,
        int64_t qkv_stride,
        uintptr_t beta,
        int64_t beta_stride,
        uintptr_t alpha,
        int64_t alpha_stride,
        uintptr_t a,
        uintptr_t dt_bias,
        uintptr_t skip,
        uintptr_t state,
        uintptr_t out,
        int64_t out_stride,
        int n_k_heads,
        int n_v_heads,
        int k_dim,
        int v_dim,
        int decay_dim,
        float decay_bound,
        c_bool grouped,
        float eps,
        uintptr_t kept=0,
    ):
        need(
            n_k_heads > 0 and n_v_heads > 0 and n_v_heads % n_k_heads == 0,
            f"{n_v_heads} value heads cannot share {n_k_heads} key heads evenly",
        )
        need(0 < k_dim <= MAX_HEAD_DIM, f"k_dim is {k_dim}; expected 1 to {MAX_HEAD_DIM}")
        cdef int64_t key_size = n_k_heads * <int64_t> k_dim, value_size = n_v_heads * <int64_t> v_dim
        cdef delta_net_args args
        args.q = need_matrix("q", q, qkv_stride, key_size).at
        args.k = need_matrix("k", k, qkv_stride, key_size).at
        args.v = need_matrix("v", v, qkv_stride, value_size).at
        args.qkv_stride = qkv_stride
        if alpha:
            need(bool(beta) != bool(skip), "expected beta, or skip in its place")
            need_address("dt_bias", dt_bias)
        else:
            need(not (beta or skip or dt_bias), "expected alpha, or neither it nor beta, skip and dt_bias")
        args.beta = need_matrix("beta", beta, beta_stride, n_v_heads) if beta else matrix(NULL, 0)
        args.skip = <const float *> skip
        need(
            decay_dim == 1 or (decay_dim == k_dim and beta),
            f"decay_dim is {decay_dim}; expected 1, or with beta k_dim ({k_dim})",
        )
        need(
            decay_bound == 0 or (decay_bound < 0 and beta),
            f"decay_bound is {decay_bound}; expected 0, or with beta less",
        )
        args.alpha = matrix(NULL, 0)
        if alpha:
            args.alpha = need_matrix("alpha", alpha, alpha_stride, n_v_heads * <int64_t> decay_dim)
        args.out = need_matrix("out", out, out_stride, value_size)
        args.a = <const float *> need_address("a", a)
        args.dt_bias = <const float *> dt_bias
        args.state = <float *> need_address("state", state)
        args.kept = <float *> kept
        args.n_k_heads = n_k_heads
        args.n_v_heads = n_v_heads
        args.k_dim = k_dim
        args.v_dim = v_dim
        args.decay_dim = decay_dim
        args.decay_bound = decay_bound
        args.grouped = grouped
        args.eps = eps
        recorded(program_delta_net(self._program, args))

    def selective_scan(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t dt,
        int64_t dt_stride,
        uintptr_t b,
        int64_t b_stride,
        uintptr_t c,
        int64_t c_stride,
        uintptr_t a,
        uintptr_t skip,
        uintptr_t state,
        uintptr_t out,
        int64_t out_stride,
        int n_channels,
        int state_size,
        uintptr_t kept=0,
    ):
        need_at_least("n_channels", n_channels, 1)
        need(1 <= state_size <= MAX_SCAN_STATE, f"state_size is {state_size}; expected 1 to {MAX_SCAN_STATE}")
        cdef selective_scan_args args
        args.x = need_matrix("x", x, x_stride, n_channels)
        args.dt = need_matrix("dt", dt, dt_stride, n_channels)
        args.b = need_matrix("b", b, b_stride, state_size)
        args.c = need_matrix("c", c, c_stride, state_size)
        args.out = need_matrix("out", out, out_stride, n_channels)
        args.a = <const float *> need_address("a", a)
        args.skip = <const float *> need_address("skip", skip)
        args.state = <float *> need_address("state", state)
        args.kept = <float *> kept
        args.n_channels = n_channels
        args.state_size = state_size
        recorded(program_selective_scan(self._program, args))

    def compress(
        self,
        uintptr_t values,
        int64_t values_stride,
        uintptr_t scores,
        int64_t scores_stride,
        uintptr_t biases,
        uintptr_t state,
        uintptr_t out,
        int64_t out_stride,
        int n_channels,
        int n_parts,
        int period,
        uintptr_t kept=0,
    ):
        need_at_least("n_channels", n_channels, 1)
        need(n_parts == 1 or n_parts == 2, f"n_parts is {n_parts}; expected 1 or 2")
        need_at_least("period", period, 1)
        cdef compress_args args
        args.values = need_matrix("values", values, values_stride, n_parts * <int64_t> n_channels)
        args.scores = matrix(NULL, 0)
        if scores:
            args.scores = need_matrix("scores", scores, scores_stride, n_parts * <int64_t> n_channels)
            need_address("biases", biases)
        args.out = need_matrix("out", out, out_stride, n_channels)
        args.biases = <const float *> biases
        args.state = <float *> need_address("state", state)
        args.kept = <float *> kept
        args.n_channels = n_channels
        args.n_parts = n_parts
        args.period = period
        recorded(program_compress(self._program, args))

    def router(
        self,
        uintptr_t logits,
        int64_t logits_stride,
        uintptr_t bias,
        uintptr_t ids,
        uintptr_t weights,
        int n_experts,
        int n_experts_used,
        int scoring,
        int n_groups,
        int n_groups_used,
        c_bool normalize,
        float scale,
        uintptr_t table=0,
        int n_vocab=0,
    ):
        need_experts(n_experts, n_experts_used)
        need_one_of("scoring", scoring, 4)
        need(not table or n_vocab > 0, f"n_vocab is {n_vocab}; expected at least 1 with a table")
        if n_groups > 1:
            need(n_experts % n_groups == 0, f"{n_experts} experts cannot be {n_groups} groups of one size")
            need(
                0 < n_groups_used <= n_groups,
                f"{n_groups_used} groups of {n_groups} are used; expected 1 to {n_groups}",
            )
        cdef router_args args
        args.logits = need_matrix("logits", logits, logits_stride, n_experts)
        args.bias = <const float *> bias
        args.table = <const int32_t *> table
        args.ids = <int32_t *> need_address("ids", ids)
        args.weights = <float *> need_address("weights", weights)
        args.n_experts = n_experts
        args.n_experts_used = n_experts_used
        args.scoring = scoring
        args.n_groups = n_groups
        args.n_groups_used = n_groups_used
        args.normalize = normalize
        args.scale = scale
        recorded(program_router(self._program, args, n_vocab))

    def group_router(
        self,
        uintptr_t logits,
        int64_t logits_stride,
        uintptr_t ids,
        uintptr_t group_ids,
        uintptr_t weights,
        int n_experts,
        int n_experts_used,
        int group_size,
    ):
        need_experts(n_experts, n_experts_used)
        need(
            group_size > 0 and n_experts % group_size == 0, f"{n_experts} experts cannot be groups of {group_size}"
        )
        cdef group_router_args args
        args.logits = need_matrix("logits", logits, logits_stride, n_experts)
        args.ids = <const int32_t *> need_address("ids", ids)
        args.group_ids = <int32_t *> need_address("group_ids", group_ids)
        args.weights = <float *> need_address("weights", weights)
        args.n_experts = n_experts
        args.n_experts_used = n_experts_used
        args.group_size = group_size
        recorded(program_group_router(self._program, args))

    cdef expert_matrix _expert_matrix(self, str name, entry, int n_cols, uintptr_t x, int64_t x_row_bytes) except *:
        cdef uintptr_t table, scale, bias
        cdef int ggml_type
        table, ggml_type, scale, bias = entry
        cdef expert_matrix m
        m.row_bytes = need_row_bytes(ggml_type, n_cols)
        m.table = <const int64_t *> need_address(f"the {name} table", table)
        m.matmul = engine_kernels(self.isa.encode()).quant.matmul[ggml_type]
        m.scale = <const float *> scale
        m.bias = <const float *> bias
        if x:
            need_at_least(
                f"the row bytes of x for {name}",
                x_row_bytes,
                need_x_bytes(engine_formats[ggml_type].activation, n_cols),
            )
        return m

    def experts(
        self,
        uintptr_t x_gate,
        int64_t x_gate_row_bytes,
        uintptr_t x_up,
        int64_t x_up_row_bytes,
        uintptr_t ids,
        int n_experts,
        int n_experts_used,
        gate,
        up,
        down,
        int activation,
        float limit,
        float up_limit,
        int hidden_size,
        int ffn_size,
        uintptr_t out,
        int64_t out_stride,
    ):
        need_experts(n_experts, n_experts_used)
        need_one_of("activation", activation, 6)
        need(limit > 0 or activation != ACTIVATE_SITU, f"limit is {limit}; expected a number above 0")
        cdef experts_args args
        args.x_gate = <const uint8_t *> need_address("x_gate", x_gate)
        args.x_gate_row_bytes = x_gate_row_bytes
        args.x_up = <const uint8_t *> need_address("x_up", x_up)
        args.x_up_row_bytes = x_up_row_bytes
        args.ids = <const int32_t *> need_address("ids", ids)
        args.n_experts = n_experts
        args.n_experts_used = n_experts_used
        args.hidden_size = hidden_size
        args.ffn_size = ffn_size
        args.activation = activation
        args.limit = limit
        args.up_limit = up_limit
        args.gate = self._expert_matrix("gate", gate, hidden_size, x_gate, x_gate_row_bytes)
        args.up = self._expert_matrix("up", up, hidden_size, x_up, x_up_row_bytes)
        args.down = self._expert_matrix("down", down, ffn_size, 0, 0)
        args.out = need_matrix("out", out, out_stride, n_experts_used * <int64_t> hidden_size)
        cdef int down_type = down[1]
        recorded(program_experts(self._program, args, engine_formats[down_type].activation))

    def combine(
        self,
        uintptr_t expert_out,
        int64_t expert_out_stride,
        uintptr_t weights,
        int n_experts_used,
        uintptr_t shared,
        int64_t shared_stride,
        uintptr_t shared_gate,
        int64_t shared_gate_stride,
        uintptr_t residual,
        int64_t residual_stride,
        uintptr_t out,
        int64_t out_stride,
        int n_cols,
        float scale,
    ):
        need_at_least("n_experts_used", n_experts_used, 1)
        need(shared or not shared_gate, "a shared gate needs a shared expert")
        cdef combine_args args
        args.expert_out = need_matrix("expert_out", expert_out, expert_out_stride, n_experts_used * <int64_t> n_cols)
        args.weights = <const float *> weights
        args.n_experts_used = n_experts_used
        args.scale = scale
        args.shared = need_matrix("shared", shared, shared_stride, n_cols) if shared else matrix(NULL, 0)
        args.shared_gate = matrix(NULL, 0)
        if shared_gate:
            args.shared_gate = need_matrix("shared_gate", shared_gate, shared_gate_stride, 1)
        args.residual = need_matrix("residual", residual, residual_stride, n_cols) if residual else matrix(NULL, 0)
        args.out = need_matrix("out", out, out_stride, n_cols)
        args.n_cols = n_cols
        recorded(program_combine(self._program, args))

    def stream_weights(
        self,
        uintptr_t mixes,
        int64_t mixes_stride,
        uintptr_t scale,
        uintptr_t base,
        uintptr_t weights,
        uintptr_t gates,
        int64_t gates_stride,
        int n_streams,
        float offset,
        float magnitude,
        uintptr_t mixing=0,
        int64_t mixing_stride=0,
        int n_normalizations=0,
    ):
        need_streams(n_streams)
        cdef int n_mixes = 2 * n_streams if gates else n_streams
        cdef stream_weights_args args
        args.mixing = matrix(NULL, 0)
        if mixing:
            need(bool(gates), "mixing needs gates")
            need(n_streams <= MAX_MIXED_STREAMS, f"n_streams is {n_streams}; expected 1 to {MAX_MIXED_STREAMS} to mix")
            need_at_least("n_normalizations", n_normalizations, 1)
            n_mixes += n_streams * n_streams
            args.mixing = need_matrix("mixing", mixing, mixing_stride, n_streams * n_streams)
        args.n_normalizations = n_normalizations
        args.mixes = need_matrix("mixes", mixes, mixes_stride, n_mixes)
        args.gates = need_matrix("gates", gates, gates_stride, n_streams) if gates else matrix(NULL, 0)
        args.scale = <const float *> need_address("scale", scale)
        args.base = <const float *> need_address("base", base)
        args.weights = <float *> need_address("weights", weights)
        args.n_streams = n_streams
        args.offset = offset
        args.magnitude = magnitude
        recorded(program_stream_weights(self._program, args))

    def add_to_streams(
        self,
        uintptr_t x,
        int64_t x_stride,
        uintptr_t added,
        int64_t added_stride,
        uintptr_t gates,
        int64_t gates_stride,
        uintptr_t out,
        int64_t out_stride,
        int n_streams,
        int n_cols,
        uintptr_t mixing=0,
        int64_t mixing_stride=0,
        float magnitude=0.0,
    ):
        need_streams(n_streams)
        need_at_least("n_cols", n_cols, 1)
        need(magnitude >= 0, f"magnitude is {magnitude}; expected 0, or a number above")
        cdef add_to_streams_args args
        args.mixing = matrix(NULL, 0)
        if mixing:
            args.mixing = need_matrix("mixing", mixing, mixing_stride, n_streams * n_streams)
        args.n_streams = n_streams
        args.x = need_matrix("x", x, x_stride, n_streams * <int64_t> n_cols)
        args.added = need_matrix("added", added, added_stride, n_cols)
        args.gates = need_matrix("gates", gates, gates_stride, n_streams)
        args.out = need_matrix("out", out, out_stride, n_streams * <int64_t> n_cols)
        args.n_cols = n_cols
        args.magnitude = magnitude
        recorded(program_add_to_streams(self._program, args))

    def mix_residuals(self, residuals, uintptr_t scorer, uintptr_t out, int64_t out_stride, int n_cols, float eps):
        cdef int n = len(residuals), i
        need(0 < n <= MAX_RESIDUALS, f"{n} residuals; expected 1 to {MAX_RESIDUALS}")
        need_at_least("n_cols", n_cols, 1)
        cdef mix_residuals_args args
        for i in range(n):
            args.residuals[i] = need_matrix(f"residual {i}", residuals[i][0], residuals[i][1], n_cols)
        args.out = need_matrix("out", out, out_stride, n_cols)
        args.scorer = <const float *> need_address("scorer", scorer)
        args.n_residuals = n
        args.n_cols = n_cols
        args.eps = eps
        recorded(program_mix_residuals(self._program, args))

    def select_outputs(self, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int n_cols):
        cdef select_outputs_args args
        args.x = need_matrix("x", x, x_stride, n_cols)
        args.out = need_matrix("out", out, out_stride, n_cols)
        args.n_cols = n_cols
        recorded(program_select_outputs(self._program, args))


cdef int64_t need_x_bytes(int activation, int n_cols) except -1:
    """The bytes of an activation row; plain float32 rows need not be padded."""
    return 4 * <int64_t> n_cols if activation == ACTIVATION_F32 else engine_activation_bytes(activation, n_cols)


cdef int need_experts(int n_experts, int n_experts_used) except -1:
    need(0 < n_experts <= MAX_EXPERTS, f"{n_experts} experts; expected 1 to {MAX_EXPERTS}")
    return need(
        0 < n_experts_used <= n_experts, f"{n_experts_used} experts of {n_experts} are used; expected 1 to {n_experts}"
    )


cdef int need_streams(int n_streams) except -1:
    return need(0 < n_streams <= MAX_STREAMS, f"n_streams is {n_streams}; expected 1 to {MAX_STREAMS}")


cdef heads_args need_heads(
    uintptr_t joined,
    int64_t joined_stride,
    uintptr_t first,
    int64_t first_stride,
    uintptr_t second,
    int64_t second_stride,
    int n_heads,
    int first_dim,
    int second_dim,
):
    need_at_least("n_heads", n_heads, 1)
    need_at_least("first_dim", first_dim, 1)
    need_at_least("second_dim", second_dim, 1)
    cdef heads_args args
    args.joined = need_matrix("the joined rows", joined, joined_stride, n_heads * <int64_t> (first_dim + second_dim))
    args.first = need_matrix("first", first, first_stride, n_heads * <int64_t> first_dim)
    args.second = need_matrix("second", second, second_stride, n_heads * <int64_t> second_dim)
    args.first_dim = first_dim
    args.second_dim = second_dim
    return args


cdef int need_cache(
    int cache_type, int n_slots, int n_rows, int n_kv_heads, int head_dim, int value_dim
) except -1:
    need_one_of("cache_type", cache_type, 3)
    need_at_least("n_slots", n_slots, 1)
    need_at_least("n_rows", n_rows, 1)
    need_at_least("n_kv_heads", n_kv_heads, 1)
    need(0 <= value_dim <= MAX_HEAD_DIM, f"value_dim is {value_dim}; expected 0 to {MAX_HEAD_DIM}")
    return need(0 < head_dim <= MAX_HEAD_DIM, f"head_dim is {head_dim}; expected 1 to {MAX_HEAD_DIM}")


cdef kv_cache cache_at(
    str name,
    uintptr_t address,
    int type,
    int n_slots,
    int n_rows,
    int n_kv_heads,
    int head_dim,
    int value_dim,
    int period=1,
) except *:
    need_cache(type, n_slots, n_rows, n_kv_heads, head_dim, value_dim)
    need_at_least("period", period, 1)
    cdef uint8_t *keys = <uint8_t *> need_address(name, address)
    cdef uint8_t *values = NULL
    if value_dim:
        values = keys + kv_key_bytes(type, n_slots, n_rows, n_kv_heads, head_dim)
    return kv_cache(keys, values, type, n_rows, n_kv_heads, head_dim, value_dim, period, False)


cdef int need_blocks(int top_k, int block_size) except -1:
    need_at_least("top_k", top_k, 1)
    need_at_least("block_size", block_size, 1)
    return need(
        <int64_t> top_k * block_size <= INT32_MAX,
        f"{top_k} blocks of {block_size} positions are more than {INT32_MAX}",
    )


cdef class RequestServer:
    cdef list _programs
    cdef program **_layers
    cdef exchange _exchange
    cdef readonly object seconds, guesses
    cdef double[::1] _seconds
    cdef int64_t[::1] _guesses

    def __init__(
        self,
        programs,
        uintptr_t requested,
        uintptr_t answered,
        uintptr_t abandoned,
        uintptr_t guessed=0,
        uintptr_t guessed_ids=0,
    ):
        need(self._layers == NULL, "a server is made once")
        self._programs = list(programs)
        need_at_least("the number of programs", len(self._programs), 1)
        cdef Program first = self._programs[0]
        self._layers = <program **> malloc(len(self._programs) * sizeof(program *))
        if self._layers == NULL:
            raise MemoryError("no memory for a server")
        cdef Program layer
        for i, layer in enumerate(self._programs):
            need(layer.n_threads == first.n_threads, "the programs of a server have the same number of threads")
            self._layers[i] = layer._program
        self.seconds = np.zeros((2, len(self._programs)))
        self._seconds = self.seconds.reshape(-1)
        self._exchange.seconds = &self._seconds[0]
        self.guesses = self._guesses = np.zeros(2, np.int64)
        self._exchange.guesses = &self._guesses[0]
        self._exchange.requested = <const uint32_t *> need_address("requested", requested)
        self._exchange.answered = <uint32_t *> need_address("answered", answered)
        self._exchange.abandoned = <const uint32_t *> need_address("abandoned", abandoned)
        if guessed:
            self._exchange.guessed = <const uint32_t *> guessed
            self._exchange.guessed_ids = <const int32_t *> need_address("guessed_ids", guessed_ids)

    def __dealloc__(self):
        free(self._layers)

    def run(self, Step step, uint32_t first, uint32_t last, double timeout_s):
        cdef Program layer
        cdef program_step view
        cdef int n_layers = len(self._programs)
        for layer in self._programs:
            view = layer._checked(step)
        self._exchange.first, self._exchange.last, self._exchange.timeout_s = first, last, timeout_s
        cdef serve_result result
        with nogil:
            result = program_serve(self._layers, n_layers, &view, &self._exchange)
        if result == SERVE_TIMED_OUT:
            raise TimeoutError(
                f"no request for {timeout_s:g} s; the last was {self._exchange.requested[0]}, "
                f"answered {self._exchange.answered[0]}"
            )
        return result == SERVE_DONE


def kv_cache_bytes(int cache_type, int n_slots, int n_rows, int n_kv_heads, int head_dim, int value_dim):
    need_cache(cache_type, n_slots, n_rows, n_kv_heads, head_dim, value_dim)
    return kv_key_bytes(cache_type, n_slots, n_rows, n_kv_heads, head_dim) + kv_value_bytes(
        cache_type, n_slots, n_rows, n_kv_heads, value_dim
    )


def kv_strides(int cache_type, int head_dim, int value_dim):
    need_cache(cache_type, 1, 1, 1, head_dim, value_dim)
    # Of 64 groups of keys, and of 1024 rows of values: whole cache lines, so that nothing is rounded up.
    cdef int64_t key_bytes = kv_key_bytes(cache_type, 1, 1024, 1, head_dim)
    return key_bytes // 64, kv_value_bytes(cache_type, 1, 1024, 1, value_dim) // 1024
