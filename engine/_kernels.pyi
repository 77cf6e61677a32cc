"""The C boundary: CPU kernels, the recorded program that runs them, and the few helpers that need C speed.

Addresses are plain integers (bytes); the caller owns the memory and keeps it alive as long as the
`Program` that was told about it. Activation matrices are float32, row-major; a `*_stride` is the
distance between two rows in elements. `rows` says how many rows an operation has: the tokens of the
step, or only those whose logits are wanted.

Two promises hold for every function here (see ARCHITECTURE.md, "One arithmetic"): the same bits on every
instruction-set level, and the same bits for every number of threads and every way a prompt is cut.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ROWS_TOKENS: int  # an operation over all tokens of the step
ROWS_OUTPUTS: int  # an operation over the rows picked by `select_outputs` and after it

GATE_SIGMOID: int  # x * sigmoid(gate)
GATE_SILU: int  # x * silu(gate)
GATE_SOFTPLUS: int  # x * ln(1 + exp(gate))
GATE_RELU: int  # x * max(gate, 0)
GATE_PRODUCT: int  # x * gate
GATE_GELU: int  # x * gelu(gate), by tanh
GATE_CLAMPED_SWISH: int  # as ACTIVATE_CLAMPED_SWISH, x is up
GATE_SITU: int  # as ACTIVATE_SITU, x is up
GATE_CLAMPED_SILU: int  # SiLU of a gate that is at most the limit

ROPE_NEOX: int  # rotates pairs (i, i + n_rot / 2)
ROPE_NORM: int  # rotates pairs (2i, 2i + 1)

SCORE_SOFTMAX: int  # router scores: softmax over all experts
SCORE_SIGMOID: int  # router scores: one sigmoid per expert
SCORE_SOFTMAX_TOPK: int  # softmax over the chosen experts only
SCORE_SQRT_SOFTPLUS: int

ACTIVATE_SILU: int  # silu(gate) * up
ACTIVATE_CLAMPED_SWISH: int  # gpt-oss: swish of a clamped gate times (up + 1)
ACTIVATE_RELU: int  # max(gate, 0) * up
ACTIVATE_CLAMPED_SILU: int  # silu(min(gate, limit)) * up, with up within the limit of 0
ACTIVATE_GELU: int  # gelu(gate) * up
ACTIVATE_SITU: (
    int  # cap(gate, limit) * sigmoid(gate) * cap(up, up_limit), with cap(x, l) = l * tanh(x / l), or x if l is 0
)

KV_F32: int
KV_F16: int
KV_Q8_0: int

# -- instruction-set levels ------------------------------------------------------------------------------------------

def isa_levels() -> list[str]:
    """Return the levels this CPU can run, slowest first: some of "scalar", "avx2", "avx512", "avx512_vbmi"."""

def format_facts(ggml_type: int) -> tuple[int, int, int] | None:
    """Return (block_size, block_bytes, activation) of a weight format as C knows it, or None if C does not know it."""

def fast_formats(isa: str) -> list[int]:
    """Return the ggml types that have their own vector code at `isa`; the others take the generic path."""

def set_grids(grids: dict[str, npt.NDArray[np.int8]]) -> None:
    """Hand over the code-book tables of the IQ formats, by format name. Kept alive by the module. Called once, by `engine.quants`."""

# -- single kernels, for tests, tools and loading --------------------------------------------------------------------

def dequantize(ggml_type: int, raw: npt.NDArray[np.uint8], n_cols: int) -> npt.NDArray[np.float32]:
    """Return float32 [n_rows, n_cols] of uint8 rows [n_rows, row_bytes]. Exact: equal to `quants.reference`."""

def quantize_activations(x: npt.NDArray[np.float32], activation: int, isa: str | None = None) -> npt.NDArray[np.uint8]:
    """Return the activation rows [n_rows, activation_bytes] of float32 [n_rows, n_cols]; layout in `kernels/activations.h`."""

def activation_bytes(activation: int, n_cols: int) -> int:
    """Return the bytes of one activation row (a multiple of 64)."""

def matmul(
    ggml_type: int,
    weight: npt.NDArray[np.uint8],
    x: npt.NDArray[np.float32],
    n_threads: int = 1,
    isa: str | None = None,
) -> npt.NDArray[np.float32]:
    """Return x @ weight.T, float32 [n_tokens, n_rows], in the canonical arithmetic.

    `weight` is uint8 [n_rows, row_bytes], `x` float32 [n_tokens, n_cols].
    """

def fill_random_blocks(ggml_type: int, out: npt.NDArray[np.uint8], n_cols: int, seed: int, n_threads: int = 1) -> None:
    """Fill uint8 rows [n_rows, row_bytes] in place with valid random blocks; their values have a standard deviation of about n_cols ** -0.5.

    Deterministic in `seed` (below 2**64) and position, whatever the number of threads. The grids must have been set.
    """

def parallel_copy(src: int, dst: int, n_bytes: int, n_threads: int) -> None:
    """Copy bytes with several threads (first touch of fresh pages is spread over them). Releases the GIL."""

def read_bandwidth(buffer: npt.NDArray[np.uint8], n_threads: int, repeats: int) -> float:
    """Return the best read bandwidth of the RAM in bytes a second, over `repeats` passes of a buffer.

    Before each pass the buffer is written anew, past the caches, so it need not be larger than they are (but on CPUs that
    are not x86). It should be large against what it takes to start the threads: 64 MB and more.
    """

def explain_bus_errors(exit_code: int) -> None:
    """From now on end the process with a message and this code when a mapped file is read that somebody has cut short.

    That is a signal (SIGBUS), and handled for the whole process; other causes of it end the process as before. Raises
    `OSError` if the system refuses.
    """

# -- sampling --------------------------------------------------------------------------------------------------------

def argmax(logits: npt.NDArray[np.float32]) -> int:
    """Return the index of the largest value, the lowest one on a tie."""

def sample(
    logits: npt.NDArray[np.float32],
    recent: npt.NDArray[np.int32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    uniform: float,
) -> int:
    """Return the id of one token drawn from float32 [n_vocab] logits, which are not changed.

    Penalties first (over `recent`), then temperature, top-k (0 = all), top-p, min-p, then inverse-CDF with `uniform`
    in [0, 1) over the surviving tokens in order of falling probability (ties: lower id first). A temperature of 0 is
    greedy after penalties. Formulas in `kernels/sampling.h`.
    """

def log_probabilities(
    logits: npt.NDArray[np.float32], n_top: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], float]:
    """Return the `n_top` best ids, their natural-log probabilities, and log-sum-exp of all logits (to rate any other id)."""

# -- the recorded program --------------------------------------------------------------------------------------------

class Step:
    """The inputs of one run: what changes between two steps. Arrays are owned here and reused."""

    token_ids: npt.NDArray[np.int32]  # [max_tokens]
    positions: npt.NDArray[np.int32]  # [max_tokens] place of each token in its own sequence; 0 starts it afresh
    slots: npt.NDArray[np.int32]  # [max_tokens] which sequence (KV and recurrent state) a token belongs to
    output_rows: npt.NDArray[np.int32]  # [max_tokens] tokens whose logits are wanted, rising
    n_tokens: int
    n_outputs: int
    kept_row: int  # after which operations keep a copy of the recurrent states of its sequence, too; -1: none

    def __init__(self, max_tokens: int) -> None: ...

class Program:
    """Operations recorded once and run by one nogil call; sizes other than the number of tokens are fixed.

    The tokens of one sequence stand together and in order. A step may hold several sequences. Operations with a `state`
    take the address of room for that of one sequence, `kept`; 0: no step keeps any.
    The recording methods add one operation each, which sees what the ones before it wrote. They raise `ValueError` for
    sizes that do not fit together; addresses are taken on trust.
    """

    n_threads: int
    isa: str

    def __init__(
        self, max_tokens: int, n_slots: int, n_threads: int, isa: str | None = None, lender: Program | None = None
    ) -> None:
        """Begin an empty program; its experts may use memory of a `lender`'s, with which it must never run at once."""

    def run(self, step: Step, first: int = 0, last: int = -1) -> None:
        """Run everything recorded, without the GIL, or the operations from `first` up to but without `last`.

        Parts that follow one another do what one run does if each begins and ends at experts: whatever else stands
        next to each other may be run as one. Raises `ValueError` for a step that does not fit (sizes, ids, slots,
        positions), or operations that are not there.
        """

    def __len__(self) -> int:
        """Return the number of operations recorded."""

    def profile(self, step: Step) -> list[tuple[str, float]]:
        """Run once and return (operations, seconds) in order, measured on the first thread with a barrier after each.

        Operations that are run as one, tile by tile, come as one entry, their names joined by "+".
        """

    def embed(
        self,
        table: int,
        ggml_type: int,
        n_vocab: int,
        n_cols: int,
        out: int,
        out_stride: int,
        scale: float,
        ids: int = 0,
        ids_stride: int = 0,
        n_ids: int = 1,
    ) -> None:
        """out[t] = dequantised row token_ids[t] of the table, times `scale`; or `n_ids` rows ids[t], side by side.

        `ids` are int32 rows of numbers below `n_vocab`, which is not checked; 0: the ids of the tokens.
        """

    def hash_tokens(
        self,
        state: int,
        out: int,
        out_stride: int,
        multipliers: int,
        sizes: int,
        offsets: int,
        n_hashed: int,
        n_heads: int,
        end_id: int,
        kept: int = 0,
    ) -> None:
        """Choose rows of a table by hashes of each token and those before it. Formula: `graph.HashTokens`.

        state int32 [n_slots, n_hashed - 1]; `out` int32 rows of `n_heads`; multipliers uint64 [n_hashed]; sizes and
        offsets uint32 [n_heads], no size 0.
        """

    def rms_norm(
        self,
        x: int,
        x_stride: int,
        weight: int,
        bias: int,
        out: int,
        out_stride: int,
        n_groups: int,
        group_size: int,
        weight_step: int,
        centers: bool,
        eps: float,
        rows: int,
    ) -> None:
        """Normalise each group of `group_size` columns: w * x / sqrt(mean(x^2) + eps) + bias; in place allowed.

        With `centers` x is what is left of the group when its mean is taken from it. weight is float32 [group_size]
        with a `weight_step` of 0, [n_groups, group_size] with one of `group_size`, and so is bias, or 0 for none.
        """

    def quantize(self, x: int, x_stride: int, n_cols: int, activation: int, out: int, rows: int) -> None:
        """Write activation rows (`activation_bytes(activation, n_cols)` apart) of float32 rows."""

    def linear(
        self,
        x: int,
        x_row_bytes: int,
        n_cols: int,
        weights: Sequence[tuple[int, int, int, int, int, int, int]],
        rows: int,
    ) -> None:
        """Multiply by several matrices as one job: out[t, r] = (x[t] . W[r]) * scale + bias[r].

        `x` holds activation rows `x_row_bytes` apart, in the form all these formats take (float32 rows for F32, F16 ...).
        `weights` are (address, ggml_type, n_rows, out, out_stride, bias or 0, scale or 0); bias is float32 [n_rows], scale float32 [1].
        """

    def add(
        self, a: int, a_stride: int, b: int, b_stride: int, out: int, out_stride: int, n_cols: int, rows: int
    ) -> None:
        """out = a + b; in place allowed."""

    def gate(
        self,
        x: int,
        x_stride: int,
        gate: int,
        gate_stride: int,
        out: int,
        out_stride: int,
        n_cols: int,
        n_gates: int,
        kind: int,
        limit: float,
        own_limit: float,
        rows: int,
        n_streams: int = 1,
    ) -> None:
        """out = x * f(gate), f by `kind`, with n_gates values for as many equal parts of x; in place allowed.

        With a limit above 0, f(gate) is at most that, and x is clamped to within it on both sides. GATE_SITU has one for the
        gate, and `own_limit` for x. With more than one stream in the `n_cols` columns of x, each with gates for all of its
        values, out is their sum.
        """

    def gate_by_agreement(
        self,
        a: int,
        a_stride: int,
        b: int,
        b_stride: int,
        x: int,
        x_stride: int,
        out: int,
        out_stride: int,
        n_streams: int,
        n_cols: int,
        floor: float,
    ) -> None:
        """Multiply x by a gate for each stream of `n_cols` that a and b have. Formula: `graph.GateByAgreement`."""

    def split_heads(
        self,
        x: int,
        x_stride: int,
        first: int,
        first_stride: int,
        second: int,
        second_stride: int,
        n_heads: int,
        first_dim: int,
        second_dim: int,
    ) -> None:
        """Take apart rows that hold, for each head, `first_dim` values for `first` and then `second_dim` for `second`."""

    def join_heads(
        self,
        first: int,
        first_stride: int,
        second: int,
        second_stride: int,
        out: int,
        out_stride: int,
        n_heads: int,
        first_dim: int,
        second_dim: int,
    ) -> None:
        """Undo `split_heads`."""

    def scale(
        self,
        x: int,
        x_stride: int,
        by: int,
        by_stride: int,
        out: int,
        out_stride: int,
        n_cols: int,
        factor: float,
        rows: int,
    ) -> None:
        """out = x * (factor * by), with one value of `by` for each row, or x * factor if `by` is 0; in place allowed.

        With a stride of 0 there is one value of `by` for all rows, which no operation may write.
        """

    def soft_cap(self, x: int, x_stride: int, out: int, out_stride: int, n_cols: int, cap: float, rows: int) -> None:
        """out = cap * tanh(x / cap); in place allowed."""

    def clamp(self, x: int, x_stride: int, out: int, out_stride: int, n_cols: int, limit: float, rows: int) -> None:
        """out = x, but no farther from 0 than `limit`; in place allowed."""

    def scale_by_position(self, x: int, x_stride: int, n_cols: int, offset: int, period: int, slope: float) -> None:
        """x *= 1 + slope * ln(1 + floor((position + offset) / period)), with an offset of 0 or 1."""

    def rope(
        self,
        x: int,
        x_stride: int,
        frequencies: int,
        n_heads: int,
        head_dim: int,
        n_rot: int,
        style: int,
        magnitude: float,
        period: int = 1,
    ) -> None:
        """Rotate the first `n_rot` values of each head in place by position * frequencies[i] (float32 [n_rot / 2]).

        cos and sin times `magnitude`; positions are rounded down to a multiple of `period`.
        """

    def attention(
        self,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        out: int,
        out_stride: int,
        cache: int,
        cache_type: int,
        n_rows: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        value_dim: int,
        scale: float,
        sinks: int,
        window: int,
        chunk: int,
        cap: float,
        selected: int = 0,
        selected_stride: int = 0,
        top_k: int = 0,
        block_size: int = 1,
        n_lists: int = 1,
        shared_k: int = 0,
        shared_k_stride: int = 0,
        shared: int = 0,
        n_shared_rows: int = 0,
        period: int = 1,
        has_tail: bool = False,
        is_ring: bool = False,
    ) -> None:
        """Store k and v at each token's position in its slot's cache, then causal grouped-query attention over that cache.

        `cache` has `kv_cache_bytes` bytes; how they lie is said in `kernels/ops/kv_layout.h`.
        Online softmax over fixed blocks of positions, so no n x n matrix and the same bits however the prompt is cut.
        A token at position p sees positions from max(0, p - window + 1), and from p rounded down to a multiple of `chunk`,
        on; 0 sets no limit. `sinks` (or 0) is float32 [n_heads]: a score for each head that has no value.
        With a `cap` above 0 the other scores become cap * tanh(score / cap). With `selected`, int32 rows, it sees the
        blocks of `block_size` positions that its row lists in rising order: all up to its own, or `top_k`, the last of
        which is its own. A row is one list, or `n_lists` behind one another, one for each key head. With `has_tail` the last
        of `top_k` places is for its own block while that is not whole, and a list has one block less otherwise.

        With `shared_k` there is a cache `shared` of `n_shared_rows` keys, the first values of which are values: that row
        p // `period` which the last token of each period brings. A token at p also sees (p + 1) // `period` of them, or
        those that `selected` lists.

        A sequence has `n_rows` in the cache, one for each position. In a ring positions that are `n_rows` apart share one:
        a multiple of 256, at least what a token sees of a window or chunk and one less than a step has tokens.
        """

    def store_keys(
        self,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        cache: int,
        cache_type: int,
        n_rows: int,
        n_kv_heads: int,
        head_dim: int,
        value_dim: int,
        is_ring: bool = False,
    ) -> None:
        """Store k and v as `attention` does, and look at nothing."""

    def carry_over(
        self,
        x: int,
        x_stride: int,
        state: int,
        out: int,
        out_stride: int,
        n_channels: int,
        n_kept: int,
    ) -> None:
        """Copy to each token's row of `out` that of x of the token before it. Formula: `graph.CarryOver`.

        state float32 [n_slots, n_kept, n_channels]. Without x (0) all rows come from the state, which stays as it is;
        without out they only go there.
        """

    def select_positions(
        self,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        weights: int,
        weights_stride: int,
        out: int,
        out_stride: int,
        cache: int,
        cache_type: int,
        n_rows: int,
        n_heads: int,
        head_dim: int,
        top_k: int,
        scale: float,
        period: int = 1,
        has_tail: bool = False,
    ) -> None:
        """Store k at each token's position in its slot's cache, then choose the positions that attention looks at.

        Formula: `graph.SelectPositions`. `cache` has `kv_cache_bytes` bytes for one head without values. `out` is int32:
        the min(p + 1, top_k) positions that a token at p chooses, in rising order. Where `period` tokens share a row the
        last of them brings it, and `n_rows` counts these. With `has_tail` rows stand for blocks of so many positions,
        and `out` has one place more, for the block that is not whole. Without weights (0) these are 1.
        """

    def select_blocks(
        self,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        out: int,
        out_stride: int,
        cache: int,
        cache_type: int,
        n_rows: int,
        n_heads: int,
        head_dim: int,
        top_k: int,
        block_size: int,
        n_newest: int,
    ) -> None:
        """Store k at each token's position in its slot's cache, then choose blocks of positions for each head.

        Formula: `graph.SelectBlocks`. `cache` has `kv_cache_bytes` bytes for one head without values. `out` is int32:
        for each head the `top_k` blocks that a token chooses, in rising order, or all where there are fewer.
        """

    def causal_conv(
        self,
        x: int,
        x_stride: int,
        weight: int,
        bias: int,
        state: int,
        out: int,
        out_stride: int,
        n_channels: int,
        kernel_size: int,
        activates: bool,
        dilation: int = 1,
        kept: int = 0,
    ) -> None:
        """Depthwise causal convolution over tokens that are `dilation` apart, and SiLU if it `activates`.

        weight float32 [n_channels, kernel_size], bias [n_channels] or 0; state float32
        [n_slots, (kernel_size - 1) * dilation, n_channels], oldest first.
        """

    def delta_net(
        self,
        q: int,
        k: int,
        v: int,
        qkv_stride: int,
        beta: int,
        beta_stride: int,
        alpha: int,
        alpha_stride: int,
        a: int,
        dt_bias: int,
        skip: int,
        state: int,
        out: int,
        out_stride: int,
        n_k_heads: int,
        n_v_heads: int,
        k_dim: int,
        v_dim: int,
        decay_dim: int,
        decay_bound: float,
        grouped: bool,
        eps: float,
        kept: int = 0,
    ) -> None:
        """Gated delta rule (recurrent form). q and k are L2-normalised per head here, q also divided by sqrt(k_dim).

        beta = sigmoid(beta) [n_v_heads], decay = exp(a * softplus(alpha + dt_bias)) [n_v_heads, decay_dim]: one for
        each head, or with a `decay_dim` of k_dim for each channel of its key. a [n_v_heads].
        With a `decay_bound` below 0 (0: none) decay = exp(decay_bound * sigmoid(abs(a) * (alpha + dt_bias))).
        v head h uses k head h // (n_v_heads / n_k_heads) if `grouped`, else h % n_k_heads.
        state float32 [n_slots, n_v_heads, k_dim, v_dim].

        With `skip`, float32 [n_v_heads], in place of beta it is a state-space model: q and k as they are, and with
        dt = softplus(alpha + dt_bias) S = exp(a dt) S + dt k v', out = S'q + skip v.

        With 0 for beta, alpha, dt_bias and skip it is lightning attention: S = a S + k v', out = S'q.
        """

    def selective_scan(
        self,
        x: int,
        x_stride: int,
        dt: int,
        dt_stride: int,
        b: int,
        b_stride: int,
        c: int,
        c_stride: int,
        a: int,
        skip: int,
        state: int,
        out: int,
        out_stride: int,
        n_channels: int,
        state_size: int,
        kept: int = 0,
    ) -> None:
        """Scan over time, channel by channel, each with a state s. x, dt and out have n_channels, b and c state_size columns.

        With dt = softplus(dt): s = exp(a dt) s + dt x b, out = s . c + skip x.
        a float32 [n_channels, state_size], all below 0; skip [n_channels]; state float32 [n_slots, state_size, n_channels].
        """

    def compress(
        self,
        values: int,
        values_stride: int,
        scores: int,
        scores_stride: int,
        biases: int,
        state: int,
        out: int,
        out_stride: int,
        n_channels: int,
        n_parts: int,
        period: int,
        kept: int = 0,
    ) -> None:
        """Make one row of the tokens of a period so far. Formula: `graph.Compress`.

        values and scores have n_parts * n_channels columns, `biases` float32 [period, n_parts * n_channels]: with two
        parts a row is made of two periods. state float32 [n_slots, n_parts, 3, n_channels]. Without scores (0) these and
        biases are 0.
        """

    def router(
        self,
        logits: int,
        logits_stride: int,
        bias: int,
        ids: int,
        weights: int,
        n_experts: int,
        n_experts_used: int,
        scoring: int,
        n_groups: int,
        n_groups_used: int,
        normalize: bool,
        scale: float,
        table: int = 0,
        n_vocab: int = 0,
    ) -> None:
        """Choose experts: ids int32 and weights float32, both [max_tokens, n_experts_used], falling score, ties to the lower id.

        `bias` (or 0) is added to the scores for choosing only; groups as in DeepSeek-V3 (n_groups <= 1 = off). With a
        `table`, int32 [n_vocab, n_experts_used], the ids are those of the token's row, each less than `n_experts`.
        """

    def group_router(
        self,
        logits: int,
        logits_stride: int,
        ids: int,
        group_ids: int,
        weights: int,
        n_experts: int,
        n_experts_used: int,
        group_size: int,
    ) -> None:
        """Choose the experts that groups share: group_ids = ids // group_size, and their weights.

        All are [max_tokens, n_experts_used], weights float32: the softmax of the logits at `group_ids`, divided by their
        sum.
        """

    def experts(
        self,
        x_gate: int,
        x_gate_row_bytes: int,
        x_up: int,
        x_up_row_bytes: int,
        ids: int,
        n_experts: int,
        n_experts_used: int,
        gate: tuple[int, int, int, int],
        up: tuple[int, int, int, int],
        down: tuple[int, int, int, int],
        activation: int,
        limit: float,
        up_limit: float,
        hidden_size: int,
        ffn_size: int,
        out: int,
        out_stride: int,
    ) -> None:
        """Gated FFN of the chosen experts: out[t, rank] = down_e(act(gate_e x[t], up_e x[t])), not yet weighted.

        `activation` is ACTIVATE_SILU, silu(g) * u, ACTIVATE_RELU, max(g, 0) * u (where both have one table, that is read
        once), ACTIVATE_CLAMPED_SWISH, g * sigmoid(1.702 g) * (u + 1) with g up to 7 and u within 7 of 0, or
        ACTIVATE_CLAMPED_SILU, silu(g) * u with g up to the limit and u within it of 0, ACTIVATE_GELU, gelu(g) * u, or
        ACTIVATE_SITU, with limits for both. With ACTIVATE_SILU and a limit above 0, silu(g) is at most that and u within it of
        0. Each matrix is (table, ggml_type, scale or 0, bias or 0): the table, int64 [n_experts], holds the
        address of each expert's first row and is read in every run; scale is float32 [n_experts], bias [n_experts, rows]. gate and up have `ffn_size` rows of
        `hidden_size`, down the reverse. `x_gate` and `x_up` hold the same activations in the forms the two formats take.
        ids is int32 [max_tokens, n_experts_used]; out is float32 [max_tokens, n_experts_used, hidden_size], rows
        `out_stride` apart. An id outside 0 to n_experts - 1 (by convention -1) means "computed elsewhere": its part of
        out is not touched. With several tokens the work is grouped by expert, each weight row read once for all.
        """

    def combine(
        self,
        expert_out: int,
        expert_out_stride: int,
        weights: int,
        n_experts_used: int,
        shared: int,
        shared_stride: int,
        shared_gate: int,
        shared_gate_stride: int,
        residual: int,
        residual_stride: int,
        out: int,
        out_stride: int,
        n_cols: int,
        scale: float,
    ) -> None:
        """out = residual + scale * (sum over ranks of weight * expert_out, one fma a rank from rank 0, + sigmoid(shared_gate) * shared).

        `shared` and `shared_gate` may be 0 (none; ungated), and so may `weights` (all 1) and `residual` (which then counts
        as 0). In place on residual allowed.
        """

    def stream_weights(
        self,
        mixes: int,
        mixes_stride: int,
        scale: int,
        base: int,
        weights: int,
        gates: int,
        gates_stride: int,
        n_streams: int,
        offset: float,
        magnitude: float,
        mixing: int = 0,
        mixing_stride: int = 0,
        n_normalizations: int = 0,
    ) -> None:
        """Make the weights of hyper-connections: weights = sigmoid(scale[0] * mixes[:n_streams] + base[:n_streams]) + offset.

        weights float32 [max_tokens, n_streams]; scale and base float32. With gates, [n_streams] columns or 0, there are
        twice as many mixes: gates = magnitude * sigmoid(scale[1] * mixes[n_streams:] + base[n_streams:]) + offset.
        With mixing, [n_streams * n_streams] columns or 0, there are so many more (`graph.ReduceStreams`).
        """

    def add_to_streams(
        self,
        x: int,
        x_stride: int,
        added: int,
        added_stride: int,
        gates: int,
        gates_stride: int,
        out: int,
        out_stride: int,
        n_streams: int,
        n_cols: int,
        mixing: int = 0,
        mixing_stride: int = 0,
        magnitude: float = 0.0,
    ) -> None:
        """Add a row to streams of n_cols that lie side by side: out[i] = x[i] + gates[i] * added.

        With mixing, the sum over j of mixing[j, i] * x[j] stands in the place of x[i]. With a magnitude above 0,
        magnitude * sigmoid(gates) stands in the place of the gates.
        """

    def mix_residuals(
        self, residuals: Sequence[tuple[int, int]], scorer: int, out: int, out_stride: int, n_cols: int, eps: float
    ) -> None:
        """out = sum over i of weights[i] * residuals[i], one fma each in order, weights the softmax of their scores.

        These are (scorer . residuals[i]) / sqrt(mean(residuals[i]^2) + eps), scorer float32 [n_cols]. A residual is an address
        and a stride. In place on any of them allowed.
        """

    def select_outputs(self, x: int, x_stride: int, out: int, out_stride: int, n_cols: int) -> None:
        """out[i] = x[output_rows[i]]: from here on only the wanted rows."""

class RequestServer:
    """Runs the program of a layer whenever another processor asks for it, through memory that both see.

    A request is a uint32 that counts up: `first` + i asks for layer i, a larger one ends the step; layers may be left
    out. Whoever asks writes the number last, and finds it in `answered` when all it asked for is written.

    Attributes:
        seconds: float64 [2, n_layers], the server's own: waited for the request of each layer, and spent to answer it,
            added up over all steps.
        guesses: int64 [2], the server's own: experts asked for in layers that were guessed about, and those of them that
            had been guessed.
    """

    seconds: npt.NDArray[np.float64]
    guesses: npt.NDArray[np.int64]

    def __init__(
        self,
        programs: Sequence[Program],
        requested: int,
        answered: int,
        abandoned: int,
        guessed: int = 0,
        guessed_ids: int = 0,
    ) -> None:
        """Serve these layers, in order, through addresses of uint32, each on a cache line of its own.

        `abandoned` is not 0 once the other side has given up. In steps of one token `guessed` holds the number of a later
        request, of which `guessed_ids` (int32 [n_experts_used], below 0 for none) are likely experts: between an answer
        and the next request the team brings their weights into its caches. 0: nobody guesses. Raises `ValueError` for
        programs that do not fit together.
        """

    def run(self, step: Step, first: int, last: int, timeout_s: float) -> bool:
        """Serve until the step asks for nothing more, without the GIL and with one team of threads; False if it was abandoned.

        `last` is what `requested` held before the step began. Raises `TimeoutError` if a request takes too long to
        come, and `ValueError` for a step that does not fit the programs.
        """

def kv_cache_bytes(cache_type: int, n_slots: int, n_rows: int, n_kv_heads: int, head_dim: int, value_dim: int) -> int:
    """Return the bytes of one layer's K and V cache."""

def kv_strides(cache_type: int, head_dim: int, value_dim: int) -> tuple[int, int]:
    """Return the bytes of the keys of sixteen positions, and of one position's value, of one head in a K and V cache."""
