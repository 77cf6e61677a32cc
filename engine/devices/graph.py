"""A forward pass as a list of operations.

A model writes its forward pass once, as calls of a `Graph` (for example `h = graph.rms_norm(x, weight, eps)`).
Nothing is computed then: the graph only grows a list of operations over symbolic tensors. A device (`program.py`)
compiles that list to whatever it replays for every step: a flat program of C calls, a CUDA graph. So the forward pass
has no threads, streams or addresses in it, and Python does nothing per layer when a token is made.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from engine.quants.formats import QuantFormat

MOST_RESIDUALS = 16  # that one row is made of
MOST_HASHED = 8  # tokens that choose a row together
MOST_CONVOLVED = 32  # tokens that a convolution goes back
N_CARRIED = 32  # tokens of which a sequence keeps rows for its next ones: more than it is ever cut back by for drafts


class Rows(enum.IntEnum):
    """What the rows of a tensor stand for (values shared with the kernels)."""

    TOKENS = 0  # the tokens of the step
    OUTPUTS = 1  # the tokens whose logits are wanted


class Gating(enum.IntEnum):
    """How a gate acts on values (values shared with the kernels)."""

    SIGMOID = 0
    SILU = 1
    SOFTPLUS = 2
    RELU = 3
    PRODUCT = 4  # by the gate itself
    GELU = 5  # its tanh form
    CLAMPED_SWISH = 6  # as the activation of that name joins gate and up, which is x
    SITU = 7  # likewise
    CLAMPED_SILU = 8  # SiLU of a gate that is at most the limit

    @property
    def is_factor(self) -> bool:
        """Whether values are multiplied by what the gate alone says, where there are no limits."""
        return self < Gating.CLAMPED_SWISH


class RopeStyle(enum.IntEnum):
    """Which pairs of a head are rotated together (values shared with the kernels)."""

    NEOX = 0  # (i, i + n_rot / 2)
    NORM = 1  # (2i, 2i + 1)


class Scoring(enum.IntEnum):
    """How router logits become scores (values shared with the kernels)."""

    SOFTMAX = 0
    SIGMOID = 1
    SOFTMAX_OF_CHOSEN = 2
    SQRT_SOFTPLUS = 3


class Activation(enum.IntEnum):
    """How an expert joins its gate and up projections (values shared with the kernels)."""

    SILU = 0  # silu(gate) * up
    CLAMPED_SWISH = 1  # gpt-oss: g * sigmoid(1.702 g) * (u + 1), with g = min(gate, 7) and u = up clamped to [-7, 7]
    RELU = 2  # max(gate, 0) * up; where one projection is both, its square above 0, and it is read once
    CLAMPED_SILU = 3  # silu(min(gate, limit)) * up, with up clamped to [-limit, limit]
    GELU = 4  # gelu(gate) * up, with the tanh form of GELU
    SITU = 5  # cap(gate, limit) * sigmoid(gate) * cap(up, up_limit), with cap(x, l) = l * tanh(x / l), or x if l is 0


# The gate that joins two projections of a network outside the routed experts as an activation joins those of an expert.
GATING_OF = {activation: Gating[activation.name] for activation in Activation}


class KVType(enum.IntEnum):
    """How keys and values are stored (values shared with the kernels)."""

    F32 = 0
    F16 = 1
    Q8_0 = 2


# -- values ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Buffer:
    """Memory for one result: `width` four-byte values for each row."""

    width: int
    rows: Rows
    dtype: type[np.float32] | type[np.int32] = np.float32


@dataclass(frozen=True, slots=True)
class Tensor:
    """A matrix [rows, width] in a buffer, or some columns of one."""

    buffer: Buffer
    offset: int
    width: int

    @property
    def rows(self) -> Rows:
        """Return what the rows stand for."""
        return self.buffer.rows

    def columns(self, start: int, stop: int) -> Tensor:
        """Return the columns `start` to `stop` as a view."""
        assert 0 <= start < stop <= self.width
        return Tensor(self.buffer, self.offset + start, stop - start)


@dataclass(frozen=True, slots=True)
class Vector:
    """Float32 values of a tensor of the model file, whatever its format.

    Attributes:
        name: the tensor's name in the file.
        format: how it is stored.
        size: values used, from `first` on.
        stored_size: values that the tensor holds; 0 for `size`.
    """

    name: str
    format: QuantFormat
    size: int
    first: int = 0
    stored_size: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """Int32 values of a tensor of the model file: `n_cols` for each of `n_rows` token ids."""

    name: str
    n_rows: int
    n_cols: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix of the model file, a stack of them (one for each expert), or some rows of either.

    Attributes:
        name: the tensor's name in the file.
        format: how it is stored.
        n_rows, n_cols: of the matrix; it maps `n_cols` inputs to `n_rows` outputs.
        n_experts: matrices in the stack; 1 for a plain matrix.
        first_row: where the rows begin in each stored matrix, which has `stored_rows` (fused tensors hold several).
        scale: a float32 factor for the product, one for each expert (formats that need one), or None.
    """

    name: str
    format: QuantFormat
    n_rows: int
    n_cols: int
    n_experts: int = 1
    first_row: int = 0
    stored_rows: int = 0
    scale: Vector | None = None

    @property
    def n_bytes(self) -> int:
        """Return the bytes that reading the weight once moves."""
        return self.n_experts * self.n_rows * self.format.row_bytes(self.n_cols)


@dataclass(frozen=True, eq=False, slots=True)
class KVCache:
    """Keys and values of one layer, for every sequence and position.

    With `values_in_keys` there are no values of their own: a head's value is the first `value_dim` values of its key.
    With a `value_dim` of 0 as well there are none at all.

    A row is a position's own, or with a `period` above 1 one that so many tokens share, from a multiple of it on: the
    last of them brings it. With a `window` nobody looks back at more positions than so many, oneself included.
    """

    n_kv_heads: int
    head_dim: int
    value_dim: int
    values_in_keys: bool = False
    period: int = 1
    window: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class State:
    """Float32 values that one layer carries from token to token, for every sequence. Zero where a sequence begins."""

    width: int


@dataclass(frozen=True, slots=True)
class Selected:
    """What attention looks at: int32 [tokens, n_lists * top_k], blocks of `block_size` positions in rising order.

    Of a cache whose rows are shared by some tokens they are rows.

    There is one list for all heads, or one for each key head. A token's own block is the last one; of no more blocks
    than `top_k` all are listed, and what is behind them is undefined.

    With `has_tail` the last place of a list is for a token's own block while that is not whole: a whole one is listed
    if it was chosen, like any other, and there is one block less.
    """

    blocks: Tensor
    block_size: int = 1
    n_lists: int = 1
    has_tail: bool = False

    @property
    def top_k(self) -> int:
        """Return how many blocks a list has at most."""
        return self.blocks.width // self.n_lists


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts each token goes to: int32 ids and float32 weights, both [tokens, n_experts_used].

    The best comes first, unless a table has another order.
    """

    ids: Tensor
    weights: Tensor
    n_experts: int


# -- operations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """One recorded step of the forward pass; the fields say all about it."""

    def tensors(self) -> list[Tensor]:
        """Return every tensor the operation reads or writes."""
        found: list[Tensor] = []
        for field in fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Tensor):
                    found.append(item)
                elif isinstance(item, Routing):
                    found += (item.ids, item.weights)
                elif isinstance(item, Selected):
                    found.append(item.blocks)
        return found


@dataclass(frozen=True, eq=False, slots=True)
class Embed(Operation):
    """out[t] = row token_ids[t] of the table, times `scale`; or the rows ids[t], side by side."""

    table: Weight
    ids: Tensor | None
    out: Tensor
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class HashTokens(Operation):
    """Choose rows of a table by hashes of a token and of those before it: out, int32 [tokens, n_heads].

    The heads are those of n-grams of two tokens, then of as many of three, and so on. With ids[0] that of the token
    itself, ids[1] that of the one before it, and so on up to n - 1, a head has the row

    (ids[0] * multipliers[0] xor ... xor ids[n - 1] * multipliers[n - 1]) modulo sizes[head] + offsets[head]

    of unsigned numbers of 64 bits. What lies before the sequence counts as `end_id`, and so does everything from the
    newest `end_id` before the token on, back to the beginning.

    The state has the ids of the last tokens, as int32: that of position p at p modulo their number.
    """

    state: State
    out: Tensor
    multipliers: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.uint32]
    end_id: int


@dataclass(frozen=True, eq=False, slots=True)
class RMSNorm(Operation):
    """weight * x / sqrt(mean(x^2) + eps) + bias, over groups of `group_size` columns; without weight, factor 1.

    The weight is as long as a group, or has a value for each column of x, and so has the bias, if there is one. If it
    `centers`, the mean of a group is taken from it first: that is LayerNorm.
    """

    x: Tensor
    weight: Vector | None
    bias: Vector | None
    out: Tensor
    group_size: int
    eps: float
    centers: bool


@dataclass(frozen=True, eq=False, slots=True)
class Linear(Operation):
    """outs[i] = x . weights[i] (+ biases[i]): several matrices on the same input are one operation."""

    x: Tensor
    weights: tuple[Weight, ...]
    biases: tuple[Vector | None, ...]
    outs: tuple[Tensor, ...]

    def without(self, outs: Sequence[Tensor]) -> Linear:
        """Return the operation without some of its results."""
        parts = zip(self.weights, self.biases, self.outs, strict=True)
        weights, biases, others = zip(*(part for part in parts if part[2] not in outs), strict=True)
        return Linear(self.x, weights, biases, others)


@dataclass(frozen=True, eq=False, slots=True)
class HeadLinear(Operation):
    """Multiply each head's columns of x by the head's own matrix: out[h] = weight[h] . x[h]."""

    x: Tensor
    weight: Weight  # n_experts is the number of heads
    out: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Add(Operation):
    """out = a + b; a vector is added to every row."""

    a: Tensor
    b: Tensor | Vector
    out: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Scale(Operation):
    """out = x * factor, or x * factor * by with one value of `by` for each row; a vector has one for all of them."""

    x: Tensor
    by: Tensor | Vector | None
    out: Tensor
    factor: float


@dataclass(frozen=True, eq=False, slots=True)
class SoftCap(Operation):
    """out = cap * tanh(x / cap)."""

    x: Tensor
    out: Tensor
    cap: float


@dataclass(frozen=True, eq=False, slots=True)
class Clamp(Operation):
    """out = x, but no farther from 0 than `limit`."""

    x: Tensor
    out: Tensor
    limit: float


@dataclass(frozen=True, eq=False, slots=True)
class ScaleByPosition(Operation):
    """x *= 1 + slope * ln(1 + floor((position + offset) / period)), in place: temperature of attention far back."""

    x: Tensor
    offset: int
    period: int
    slope: float


@dataclass(frozen=True, eq=False, slots=True)
class Gate(Operation):
    """out = x * f(gate), with the function that `gating` names.

    The gate is as wide as x, or has one value for each of so many equal parts of it (heads). With a `limit` above 0, f
    is at most that (of the clamped SiLU, which needs one, the gate), and x is clamped to within it on both sides. The
    clamped swish has its own limit; SiTU has one for the gate and `own_limit` for x.

    Where x is wider than out, it holds some streams side by side, with a gate for each value, and out is their sum, in
    order.
    """

    x: Tensor
    gate: Tensor
    out: Tensor
    gating: Gating
    limit: float
    own_limit: float

    @property
    def n_streams(self) -> int:
        """Return how many streams are added up."""
        return self.x.width // self.out.width


@dataclass(frozen=True, eq=False, slots=True)
class GateByAgreement(Operation):
    """out[i] = x * sigmoid(sign(s) * sqrt(max(|s|, floor))) for each stream i, with s = a[i] . b[i] / sqrt(width of x).

    Streams lie side by side. The sign of 0 is 0.
    """

    a: Tensor
    b: Tensor
    x: Tensor
    out: Tensor
    floor: float

    @property
    def n_streams(self) -> int:
        """Return how many streams there are."""
        return self.out.width // self.x.width


@dataclass(frozen=True, eq=False, slots=True)
class SplitHeads(Operation):
    """Take apart rows that hold, for each head, some values for `first` and after them some for `second`."""

    x: Tensor
    first: Tensor
    second: Tensor
    n_heads: int


@dataclass(frozen=True, eq=False, slots=True)
class JoinHeads(Operation):
    """Put rows together that hold, for each head, the values of `first` and after them those of `second`."""

    first: Tensor
    second: Tensor
    out: Tensor
    n_heads: int


@dataclass(frozen=True, eq=False, slots=True)
class Rope(Operation):
    """Rotate, in place, the first 2 * len(frequencies) values of each head by position * frequency (/ divisor).

    The position is that of the token, rounded down to a multiple of `period`.

    There are no divisors, or one set of them, or two: the second is for programs whose context has more than
    `short_context` positions, however many a sequence has so far, for all keys of a cache turn alike.
    """

    x: Tensor
    n_heads: int
    head_dim: int
    frequencies: npt.NDArray[np.float32]
    divisors: tuple[Vector, ...]
    short_context: int
    style: RopeStyle
    magnitude: float
    period: int

    def is_long(self, context_length: int) -> bool:
        """Return whether a program of that context takes the second divisors."""
        return len(self.divisors) > 1 and context_length > self.short_context

    def divisors_of(self, context_length: int) -> Vector | None:
        """Return the divisors that a program of that context takes."""
        return self.divisors[self.is_long(context_length)] if self.divisors else None


@dataclass(frozen=True, eq=False, slots=True)
class SelectPositions(Operation):
    """Append k to the cache, then choose the positions that attention looks at (the indexer of DeepSeek V3.2).

    A token at position p chooses min(p + 1, top_k) of the positions up to p, those of the highest scores, of equal ones
    the earlier: score(s) = sum over heads h, in order, of scale * weights[h] * max(q[h] . k[s], 0). They stand in `out`
    in rising order; what is behind them is undefined.

    Where the cache has a `period` above 1, only the last token of each brings a key, and rows stand for positions: the
    token chooses among the (p + 1) // `period` that there are. With `has_tail` they stand for blocks of that many
    positions, and behind those that are chosen stands the token's own block while it is not whole.

    Without weights these are 1.
    """

    q: Tensor
    k: Tensor
    weights: Tensor | None
    cache: KVCache
    out: Tensor
    n_heads: int
    scale: float
    has_tail: bool

    @property
    def top_k(self) -> int:
        """Return how many positions are chosen at most."""
        return self.out.width - self.has_tail


@dataclass(frozen=True, eq=False, slots=True)
class SelectBlocks(Operation):
    """Append k to the cache, then choose the blocks of positions that attention looks at (MiniMax Sparse Attention).

    Every head of q, one for each key head of attention, chooses for itself. Block b has the positions from
    b * `block_size` on. A token at position p chooses `top_k` of the blocks up to its own, p // `block_size`, or all
    where there are no more: its own and the `n_newest` - 1 before it, and of the others those with the highest scores,
    of equal ones the earlier: score(b) = the largest q[h] . k[s] of its positions s. They stand in `out`,
    int32 [tokens, n_heads * top_k], in rising order for each head; what is behind them is undefined.
    """

    q: Tensor
    k: Tensor
    cache: KVCache
    out: Tensor
    n_heads: int
    block_size: int
    n_newest: int

    @property
    def top_k(self) -> int:
        """Return how many blocks are chosen at most."""
        return self.out.width // self.n_heads


@dataclass(frozen=True, eq=False, slots=True)
class Attention(Operation):
    """Append k and v to the cache, then causal grouped-query attention over it.

    A token at position p sees the positions from max(0, p - window + 1), or from p rounded down to a multiple of
    `chunk`, to p; 0 sets no limit. With `selected` it sees those of them that were chosen (`SelectPositions`,
    `SelectBlocks`). `sinks` has one logit for each head, which is part of the softmax but has no value.
    With a `cap` above 0 scores, but not sinks, are brought smoothly to within it, as by `SoftCap`.

    With `shared_k` it sees, beside those positions, (p + 1) // period rows of another cache, or those of them that were
    chosen: keys that the tokens of a period share, which the last of them appends (`Compress`). Their first values are
    values, too.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    cache: KVCache
    out: Tensor
    sinks: Vector | None
    n_heads: int
    scale: float
    window: int
    chunk: int
    cap: float
    selected: Selected | None
    shared_k: Tensor | None
    shared_cache: KVCache | None

    @property
    def most_positions(self) -> int:
        """Return how many positions a token sees at most; 0: all that there are."""
        if self.selected and not self.shared_cache:
            return self.selected.top_k * self.selected.block_size
        return self.window or self.chunk


@dataclass(frozen=True, eq=False, slots=True)
class StoreKeys(Operation):
    """Append k and v to a cache that the attention of another graph looks at; without v values are parts of keys."""

    k: Tensor
    v: Tensor | None
    cache: KVCache


@dataclass(frozen=True, eq=False, slots=True)
class CarryOver(Operation):
    """out = x of the token before in its sequence: a row of this step or of an earlier one, 0 before the first token.

    The state has rows of the last `N_CARRIED` positions, that of position p at p modulo their number: so a sequence can
    be cut back, by fewer tokens. Without x nothing is kept, and `out` comes of what was; without out nothing is looked
    up.
    """

    x: Tensor | None
    state: State
    out: Tensor | None

    @property
    def width(self) -> int:
        """Return the values of a row."""
        return self.state.width // N_CARRIED


@dataclass(frozen=True, eq=False, slots=True)
class Compress(Operation):
    """Make one row of the tokens of a period, `period` of them from a multiple of it on, channel by channel.

    out = sum over these tokens i of softmax(scores[i] + biases[place of i in its period]) * values[i]

    That is the row of all of them for the last one, for the others that of those so far. Where values and scores are
    twice as wide as out, a row is made of two periods' tokens: of the first half of the period before, if there is one,
    and of the second half of its own. biases [period, width of scores].

    Without scores and biases these are 0, and a row is the mean of its tokens.
    """

    values: Tensor
    scores: Tensor | None
    biases: Vector | None
    state: State
    out: Tensor
    period: int

    @property
    def overlaps(self) -> bool:
        """Return whether a row is made of two periods."""
        return self.values.width > self.out.width


@dataclass(frozen=True, eq=False, slots=True)
class CausalConv(Operation):
    """Depthwise causal convolution over time. bias [n_channels]. If it `activates`, SiLU of that.

    Weights are [n_channels, kernel_size], each of as many channels as it has, which follow one another. The last is
    that of the token itself, the one before that of the token `dilation` before it, and so on.
    """

    x: Tensor
    weights: tuple[Vector, ...]
    bias: Vector | None
    state: State
    out: Tensor
    kernel_size: int
    activates: bool
    dilation: int

    @property
    def n_before(self) -> int:
        """Return how many tokens before its own it goes back."""
        return (self.kernel_size - 1) * self.dilation


@dataclass(frozen=True, eq=False, slots=True)
class DeltaNet(Operation):
    """Gated delta rule over time; formulas in `models/qwen35moe.py`.

    alpha and `dt_bias` have one value for each value head, or one for each channel of the key that it is paired with
    (formulas in `models/kimi_linear.py`); `a` has one for each head. With a `decay_bound` below 0, no decay is stronger
    than its exponential, and the sign of `a` says nothing (`models/bailingmoe3.py`); 0: there is none.

    Without beta it is a state-space model instead, with `skip` [n_v_heads]; formulas in `models/state_space.py`.

    Without alpha, too, it is lightning attention: a head has one of `decays`, [n_v_heads], and nothing else beside q, k
    and v; formulas in `models/minimax_01.py`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    alpha: Tensor | None
    a: Vector | None
    dt_bias: Vector | None
    skip: Vector | None
    decays: npt.NDArray[np.float32] | None
    state: State
    out: Tensor
    n_k_heads: int
    n_v_heads: int
    grouped: bool
    eps: float
    decay_bound: float

    @property
    def decay_dim(self) -> int:
        """Return how many decays a head has."""
        return self.alpha.width // self.n_v_heads if self.alpha else 1


@dataclass(frozen=True, eq=False, slots=True)
class SelectiveScan(Operation):
    """A state-space model of which each channel has a state for itself; formulas in `models/jamba.py`.

    x, dt (before its softplus), `skip` and out have a value for each channel, b and c one for each value of a state;
    `a` [n_channels, state_size].
    """

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    a: Vector
    skip: Vector
    state: State
    out: Tensor

    @property
    def state_size(self) -> int:
        """Return how many values a channel keeps."""
        return self.b.width


@dataclass(frozen=True, eq=False, slots=True)
class Router(Operation):
    """Choose `n_experts_used` experts for each token from their logits, or as a table has them for token ids.

    Their weights are those that their logits give either way.
    """

    logits: Tensor
    bias: Vector | None
    table: Table | None
    out: Routing
    scoring: Scoring
    n_groups: int
    n_groups_used: int
    normalize: bool
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class GroupRouter(Operation):
    """Choose, for each expert of a token, the one that all experts of its group share: ids are those // `group_size`.

    A weight is the softmax over all logits, at the number that the shared expert has; those of a token are made to add
    up to 1 (`models/grovemoe.py`). Who shares may be chosen twice by a token.
    """

    logits: Tensor
    routing: Routing
    out: Routing
    group_size: int


@dataclass(frozen=True, eq=False, slots=True)
class Experts(Operation):
    """out[t, rank] = down(act(gate x, up x)) of the expert with that rank, not yet weighted.

    Biases have one row for each expert and are added to the projection they belong to. With a `limit` above 0,
    silu(gate x) (or gate x, as the activation says) is at most that, and up x is clamped to within it on both sides,
    where the activation has no `up_limit` for that.
    """

    x: Tensor
    routing: Routing
    gate: Weight
    up: Weight
    down: Weight
    gate_bias: Vector | None
    up_bias: Vector | None
    down_bias: Vector | None
    activation: Activation
    limit: float
    up_limit: float
    out: Tensor

    @property
    def stacks(self) -> tuple[Weight, ...]:
        """Return the matrices that an expert has: gate, up and down, or two if one is both gate and up."""
        return (self.gate, self.down) if self.gate == self.up else (self.gate, self.up, self.down)

    @property
    def places(self) -> tuple[int, int, int]:
        """Return which of the matrices is gate, which up, and which down."""
        last = len(self.stacks) - 1
        return 0, last - 1, last


@dataclass(frozen=True, eq=False, slots=True)
class Combine(Operation):
    """out = residual + scale * (weighted sum over ranks, best first, + sigmoid(shared_gate) * shared).

    Without `weighted` the experts' weights are 1 (they were applied to the input). Without residual it counts as 0.
    """

    expert_out: Tensor
    routing: Routing
    shared: Tensor | None
    shared_gate: Tensor | None
    residual: Tensor | None
    out: Tensor
    weighted: bool
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class ReduceStreams(Operation):
    """Hyper-connections, before a sub-layer: make one row of n residual streams, and the gates of what will come back.

    x holds the streams side by side. With mixes = matrix . x / sqrt(mean(x^2) + eps), the mean that of all streams:

    weights = sigmoid(scale[0] * mixes[:n] + base[:n]) + offset
    gates = magnitude * sigmoid(scale[1] * mixes[n:] + base[n:]) + offset
    out = sum over streams i, in order, of weights[i] * x[i]

    Without gates there is one scale, and a mix for each stream. The matrix is [mixes, width of x].

    With `mixing` [tokens, n * n] there are three scales, gates have no offset, and n * n mixes more become how much of
    each stream i goes into each stream j (https://arxiv.org/abs/2512.24880): the softmax over j of scale[2] * mixes +
    base, plus `offset`, then divided in turn by its sums over i and over j, each plus `offset`, until it was divided
    `n_normalizations` times by those over i.
    """

    x: Tensor
    matrix: Vector
    scale: Vector
    base: Vector
    out: Tensor
    gates: Tensor | None
    mixing: Tensor | None
    eps: float
    offset: float
    magnitude: float
    n_normalizations: int

    @property
    def n_streams(self) -> int:
        """Return how many streams there are."""
        return self.x.width // self.out.width


@dataclass(frozen=True, eq=False, slots=True)
class AddToStreams(Operation):
    """Hyper-connections, after a sub-layer: out[i] = x[i] + gates[i] * added for each stream i, side by side.

    With `mixing` it is out[i] = gates[i] * added + sum over streams j, in order, of mixing[j, i] * x[j]. With a
    `magnitude` above 0 the gates are magnitude * sigmoid(gates).
    """

    x: Tensor
    added: Tensor
    gates: Tensor
    mixing: Tensor | None
    out: Tensor
    magnitude: float


@dataclass(frozen=True, eq=False, slots=True)
class MixResiduals(Operation):
    """Attention residuals, before a sub-layer: make one row of the residual stream, and of what it was before.

    out = sum over residuals i, in order, of weights[i] * residuals[i], the weights the softmax over i of
    (scorer . residuals[i]) / sqrt(mean(residuals[i]^2) + eps)
    """

    residuals: tuple[Tensor, ...]
    scorer: Vector
    out: Tensor
    eps: float


@dataclass(frozen=True, eq=False, slots=True)
class SelectOutputs(Operation):
    """Keep only the rows whose logits are wanted."""

    x: Tensor
    out: Tensor


# -- recording -------------------------------------------------------------------------------------------------------


class Graph:
    """Records a forward pass. Each method adds one operation and returns the tensor it makes.

    Attributes:
        operations: in order.
        kv_caches, states: what sequences keep, in order of first use.
        routings: of the experts that may be in slots.
        logits: the result.
        draft: guesses what follows a token that has not been run yet, one at a time; None where the model has no head
            for that. Its caches and states are its own, and say nothing about the sequence: if they were lost, guesses
            would be worse. This graph writes to them, too.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.kv_caches: list[KVCache] = []
        self.states: list[State] = []
        self.routings: list[Routing] = []
        self.logits: Tensor | None = None
        self.draft: Graph | None = None

    def _new(self, width: int, rows: Rows = Rows.TOKENS) -> Tensor:
        return Tensor(Buffer(width, rows), 0, width)

    def embed(self, table: Weight, scale: float = 1.0, ids: Tensor | None = None) -> Tensor:
        """Look up the embedding of each token, or the rows with some ids of its own."""
        out = self._new(table.n_cols * (ids.width if ids else 1))
        self.operations.append(Embed(table, ids, out, scale))
        return out

    def hash_tokens(
        self,
        multipliers: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.uint32],
        offsets: npt.NDArray[np.uint32],
        end_id: int,
    ) -> Tensor:
        """Choose rows by hashes of the last tokens, by a state of these which the graph makes here."""
        assert 2 <= len(multipliers) <= MOST_HASHED
        assert len(sizes) == len(offsets)
        assert len(sizes) % (len(multipliers) - 1) == 0
        assert sizes.all()
        state, out = State(len(multipliers) - 1), Tensor(Buffer(len(sizes), Rows.TOKENS, np.int32), 0, len(sizes))
        self.states.append(state)
        self.operations.append(HashTokens(state, out, multipliers, sizes, offsets, end_id))
        return out

    def rms_norm(
        self,
        x: Tensor,
        weight: Vector | None,
        eps: float,
        group_size: int = 0,
        *,
        centers: bool = False,
        bias: Vector | None = None,
    ) -> Tensor:
        """Normalise each group of columns, of `group_size` or, if that is 0, as long as the weight (a row, a head)."""
        group_size = group_size or (weight.size if weight else 0)
        assert x.width % group_size == 0
        assert weight is None or weight.size in {group_size, x.width}
        assert bias is None or (weight and bias.size == weight.size)
        out = self._new(x.width, x.rows)
        self.operations.append(RMSNorm(x, weight, bias, out, group_size, eps, centers))
        return out

    def linear(self, x: Tensor, weight: Weight, bias: Vector | None = None) -> Tensor:
        """Multiply by one matrix."""
        return self.linears(x, (weight,), (bias,))[0]

    def linears(
        self, x: Tensor, weights: Sequence[Weight], biases: Sequence[Vector | None] | None = None, *, n_joined: int = 1
    ) -> tuple[Tensor, ...]:
        """Multiply by several matrices at once; the results of the first `n_joined` are one, side by side."""
        assert all(w.n_cols == x.width for w in weights)
        sizes = [weight.n_rows for weight in weights]
        ends = list(accumulate(sizes[:n_joined]))
        joined = self._new(ends[-1], x.rows)
        parts = [joined.columns(start, end) for start, end in pairwise([0, *ends])]
        others = [self._new(size, x.rows) for size in sizes[n_joined:]]
        self.operations.append(Linear(x, tuple(weights), tuple(biases or [None] * len(weights)), (*parts, *others)))
        return joined, *others

    def head_linear(self, x: Tensor, weight: Weight) -> Tensor:
        """Multiply each head by its own matrix of the stack."""
        assert x.width == weight.n_experts * weight.n_cols
        out = self._new(weight.n_experts * weight.n_rows, x.rows)
        self.operations.append(HeadLinear(x, weight, out))
        return out

    def scale(self, x: Tensor, factor: float, by: Tensor | Vector | None = None) -> Tensor:
        """Multiply by a constant, and by one value for each row, or one of the model for all, if `by` gives them."""
        assert by is None or (by.width if isinstance(by, Tensor) else by.size) == 1
        out = self._new(x.width, x.rows)
        self.operations.append(Scale(x, by, out, factor))
        return out

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        """Bring values smoothly to within `cap` of 0."""
        out = self._new(x.width, x.rows)
        self.operations.append(SoftCap(x, out, cap))
        return out

    def clamp(self, x: Tensor, limit: float) -> Tensor:
        """Bring values that are farther than `limit` from 0 to there."""
        out = self._new(x.width, x.rows)
        self.operations.append(Clamp(x, out, limit))
        return out

    def scale_by_position(self, x: Tensor, offset: int, period: int, slope: float) -> Tensor:
        """Multiply x in place by a factor that grows with the position; returns x."""
        self.operations.append(ScaleByPosition(x, offset, period, slope))
        return x

    def add(self, a: Tensor, b: Tensor | Vector) -> Tensor:
        """Add two tensors, or a vector to every row."""
        assert a.width == (b.width if isinstance(b, Tensor) else b.size)
        out = self._new(a.width, a.rows)
        self.operations.append(Add(a, b, out))
        return out

    def gate(
        self,
        x: Tensor,
        gate: Tensor,
        gating: Gating,
        limit: float = 0.0,
        own_limit: float = 0.0,
        n_streams: int = 1,
    ) -> Tensor:
        """Multiply by a function of a gate, which has as many values as x, or one for each of so many parts of x.

        With more than one stream in x they are added up.
        """
        assert x.width % gate.width == 0
        assert x.width % n_streams == 0
        assert n_streams == 1 or gate.width == x.width
        assert limit == 0.0 or gating != Gating.CLAMPED_SWISH
        assert limit > 0.0 or gating not in {Gating.SITU, Gating.CLAMPED_SILU}
        assert own_limit == 0.0 or gating == Gating.SITU
        out = self._new(x.width // n_streams, x.rows)
        self.operations.append(Gate(x, gate, out, gating, limit, own_limit))
        return out

    def gate_by_agreement(self, a: Tensor, b: Tensor, x: Tensor, floor: float) -> Tensor:
        """Multiply x by a gate for each stream of two tensors, which are as large as the two agree there."""
        assert a.width == b.width
        assert a.width % x.width == 0
        out = self._new(a.width)
        self.operations.append(GateByAgreement(a, b, x, out, floor))
        return out

    def split_heads(self, x: Tensor, n_heads: int, first_dim: int = 0) -> tuple[Tensor, Tensor]:
        """Take apart rows that hold two parts for each head in turn, the first `first_dim` long (0: half)."""
        first_size = n_heads * first_dim or x.width // 2
        first, second = self._new(first_size), self._new(x.width - first_size)
        self.operations.append(SplitHeads(x, first, second, n_heads))
        return first, second

    def join_heads(self, first: Tensor, second: Tensor, n_heads: int) -> Tensor:
        """Put each head's two parts behind one another."""
        out = self._new(first.width + second.width)
        self.operations.append(JoinHeads(first, second, out, n_heads))
        return out

    def rope(
        self,
        x: Tensor,
        n_heads: int,
        frequencies: npt.NDArray[np.float32],
        style: RopeStyle,
        magnitude: float = 1.0,
        divisors: Sequence[Vector] = (),
        short_context: int = 0,
        period: int = 1,
    ) -> Tensor:
        """Rotate x in place by its position; returns x."""
        head_dim, divisors = x.width // n_heads, tuple(divisors)
        how = divisors, short_context, style, magnitude, period
        self.operations.append(Rope(x, n_heads, head_dim, frequencies, *how))
        return x

    def select_positions(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor | None,
        n_heads: int,
        top_k: int,
        scale: float,
        period: int = 1,
        *,
        has_tail: bool = False,
    ) -> Selected:
        """Choose what attention looks at, by scores of keys that have a cache of their own, which the graph makes here.

        There is one list for all heads of attention. With a `period` so many tokens share a key; with `has_tail`, too,
        attention looks at these tokens, and at those after the last whole period.
        """
        assert q.width == n_heads * k.width
        assert weights is None or weights.width == n_heads
        width = top_k + has_tail
        cache, out = self._indexer_cache(k, period), Tensor(Buffer(width, Rows.TOKENS, np.int32), 0, width)
        self.operations.append(SelectPositions(q, k, weights, cache, out, n_heads, scale, has_tail))
        return Selected(out, period, has_tail=True) if has_tail else Selected(out)

    def select_blocks(self, q: Tensor, k: Tensor, n_heads: int, top_k: int, block_size: int, n_newest: int) -> Selected:
        """Choose blocks that attention looks at, likewise; there is a list for each of its `n_heads` key heads."""
        assert q.width == n_heads * k.width
        assert 1 <= n_newest <= top_k
        width = n_heads * top_k
        cache, out = self._indexer_cache(k), Tensor(Buffer(width, Rows.TOKENS, np.int32), 0, width)
        self.operations.append(SelectBlocks(q, k, cache, out, n_heads, block_size, n_newest))
        return Selected(out, block_size, n_heads)

    def _indexer_cache(self, k: Tensor, period: int = 1) -> KVCache:
        """Make a cache of keys without values, of one head."""
        cache = KVCache(1, k.width, 0, values_in_keys=True, period=period)
        self.kv_caches.append(cache)
        return cache

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        n_heads: int,
        n_kv_heads: int,
        scale: float,
        *,
        value_dim: int = 0,
        sinks: Vector | None = None,
        window: int = 0,
        chunk: int = 0,
        cap: float = 0.0,
        selected: Selected | None = None,
        shared_k: Tensor | None = None,
        period: int = 1,
    ) -> Tensor:
        """Attend over this layer's cache, which the graph makes here, and that of keys that `period` tokens share.

        Without v a head's value is the first `value_dim` values of its key.
        """
        assert selected is None or shared_k is not None or not (window or chunk)
        assert selected is None or selected.n_lists in {1, n_kv_heads}
        assert shared_k is None or (v is None and n_kv_heads == 1 and shared_k.width == k.width)
        assert (period > 1) == (shared_k is not None)
        if v is not None:
            value_dim = v.width // n_kv_heads
        head_dim, seen = k.width // n_kv_heads, window or chunk
        cache = KVCache(n_kv_heads, head_dim, value_dim, values_in_keys=v is None, window=seen)
        self.kv_caches.append(cache)
        shared_cache = None
        if shared_k is not None:
            shared_cache = KVCache(1, k.width, value_dim, values_in_keys=True, period=period)
            self.kv_caches.append(shared_cache)
        out = self._new(n_heads * value_dim)
        what = q, k, v, cache, out, sinks, n_heads, scale, window, chunk, cap, selected, shared_k, shared_cache
        self.operations.append(Attention(*what))
        return out

    def store_keys_of(self, other: Graph, cache: KVCache) -> None:
        """Append to a cache what the attention of another graph would append to its own; record nothing else of it."""
        attention = next(op for op in other.operations if isinstance(op, Attention))
        assert attention.selected is None
        assert attention.shared_k is None
        recorded = other.operations[: other.operations.index(attention)]
        known = {tensor.buffer for operation in self.operations for tensor in operation.tensors()}
        makes: list[set[Buffer]] = []  # of each operation: what it makes; nothing if it works in place
        for operation in recorded:
            makes.append({tensor.buffer for tensor in operation.tensors()} - known)
            known |= makes[-1]
        needed = {tensor.buffer for tensor in (attention.k, attention.v) if tensor}
        kept: list[Operation] = [StoreKeys(attention.k, attention.v, cache)]
        for operation, made in zip(reversed(recorded), reversed(makes), strict=True):
            if not needed & (made or {tensor.buffer for tensor in operation.tensors()}):
                continue
            if isinstance(operation, Linear):
                kept.append(operation.without([out for out in operation.outs if out.buffer not in needed]))
            else:
                kept.append(operation)
            needed |= {tensor.buffer for tensor in kept[-1].tensors()}
        self.operations += reversed(kept)

    def carry_over(self, x: Tensor | None, state: State, *, width: int = 0) -> Tensor:
        """Return x of the token before each; without x of what was kept of such rows, which are so wide."""
        assert state.width == N_CARRIED * (x.width if x else width)
        out = self._new(x.width if x else width)
        self.operations.append(CarryOver(x, state, out))
        return out

    def keep(self, x: Tensor, state: State) -> None:
        """Keep rows for the tokens after them."""
        assert state.width == N_CARRIED * x.width
        self.operations.append(CarryOver(x, state, None))

    def compress(self, values: Tensor, scores: Tensor | None, biases: Vector | None, width: int, period: int) -> Tensor:
        """Make one row of so many channels of each `period` tokens, by a state which the graph makes here."""
        assert scores is None or values.width == scores.width
        assert values.width in {width, 2 * width}
        assert biases is None or biases.size == period * values.width
        state, out = State(3 * values.width), self._new(width)
        self.states.append(state)
        self.operations.append(Compress(values, scores, biases, state, out, period))
        return out

    def causal_conv(
        self,
        x: Tensor,
        weights: Sequence[Vector],
        kernel_size: int,
        bias: Vector | None = None,
        *,
        activates: bool = True,
        dilation: int = 1,
    ) -> Tensor:
        """Convolve over the last `kernel_size` tokens, channel by channel, add the bias, then SiLU or nothing.

        With a `dilation` these are so far apart.
        """
        assert sum(weight.size for weight in weights) == x.width * kernel_size
        assert (kernel_size - 1) * dilation <= MOST_CONVOLVED
        state = State((kernel_size - 1) * dilation * x.width)
        self.states.append(state)
        out = self._new(x.width)
        self.operations.append(CausalConv(x, tuple(weights), bias, state, out, kernel_size, activates, dilation))
        return out

    def delta_net(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        alpha: Tensor,
        a: Vector,
        dt_bias: Vector,
        n_k_heads: int,
        n_v_heads: int,
        grouped: bool,
        eps: float,
        skip: Vector | None = None,
        decay_bound: float = 0.0,
    ) -> Tensor:
        """Run the gated delta rule, or without beta a state-space model, over a state which the graph makes here."""
        assert (beta is None) == (skip is not None)
        assert alpha.width == n_v_heads or (beta and alpha.width == n_v_heads * (k.width // n_k_heads))
        assert dt_bias.size == alpha.width
        assert decay_bound == 0 or (beta and decay_bound < 0)
        state = State(v.width * (k.width // n_k_heads))
        self.states.append(state)
        out = self._new(v.width)
        how = n_k_heads, n_v_heads, grouped, eps, decay_bound
        self.operations.append(DeltaNet(q, k, v, beta, alpha, a, dt_bias, skip, None, state, out, *how))
        return out

    def lightning_attention(self, q: Tensor, k: Tensor, v: Tensor, decays: npt.NDArray[np.float32]) -> Tensor:
        """Attend without a softmax, over a state of each head that keeps one of `decays` of itself for a token."""
        n_heads, nothing = len(decays), (None,) * 5
        state, out = State(v.width * (k.width // n_heads)), self._new(v.width)
        self.states.append(state)
        self.operations.append(DeltaNet(q, k, v, *nothing, decays, state, out, n_heads, n_heads, True, 0.0, 0.0))
        return out

    def selective_scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Vector, skip: Vector) -> Tensor:
        """Run a state-space model with decays of their own for all values of a state which the graph makes here."""
        assert x.width == dt.width == skip.size
        assert b.width == c.width
        assert a.size == x.width * b.width
        state, out = State(a.size), self._new(x.width)
        self.states.append(state)
        self.operations.append(SelectiveScan(x, dt, b, c, a, skip, state, out))
        return out

    def router(
        self,
        logits: Tensor,
        n_experts_used: int,
        scoring: Scoring,
        normalize: bool,
        bias: Vector | None = None,
        n_groups: int = 1,
        n_groups_used: int = 1,
        scale: float = 1.0,
        table: Table | None = None,
    ) -> Routing:
        """Choose experts. The choice can be read after each step: see `Program.routing`."""
        assert table is None or (bias is None and n_groups == 1 and table.n_cols == n_experts_used)
        assert table is None or scoring != Scoring.SOFTMAX_OF_CHOSEN
        ids = Tensor(Buffer(n_experts_used, Rows.TOKENS, np.int32), 0, n_experts_used)
        routing = Routing(ids, self._new(n_experts_used), logits.width)
        self.routings.append(routing)
        how = scoring, n_groups, n_groups_used, normalize, scale
        self.operations.append(Router(logits, bias, table, routing, *how))
        return routing

    def group_router(self, logits: Tensor, routing: Routing, group_size: int) -> Routing:
        """Choose the experts that groups share, one for each that was chosen.

        They are not in `routings`: no cache sees them, and they are where the dense weights are.
        """
        n_experts, n_used = routing.n_experts // group_size, routing.ids.width
        ids = Tensor(Buffer(n_used, Rows.TOKENS, np.int32), 0, n_used)
        out = Routing(ids, self._new(n_used), n_experts)
        self.operations.append(GroupRouter(logits, routing, out, group_size))
        return out

    def experts(
        self,
        x: Tensor,
        routing: Routing,
        gate: Weight,
        up: Weight,
        down: Weight,
        biases: tuple[Vector | None, Vector | None, Vector | None] = (None, None, None),
        activation: Activation = Activation.SILU,
        limit: float = 0.0,
        up_limit: float = 0.0,
    ) -> Tensor:
        """Compute the chosen experts; the result has one stretch of columns for each rank. Biases: gate, up, down."""
        assert limit > 0.0 or activation not in {Activation.CLAMPED_SILU, Activation.SITU}
        assert limit == 0.0 or activation in {Activation.SILU, Activation.CLAMPED_SILU, Activation.SITU}
        assert up_limit == 0.0 or activation == Activation.SITU
        out = self._new(routing.ids.width * down.n_rows)
        self.operations.append(Experts(x, routing, gate, up, down, *biases, activation, limit, up_limit, out))
        return out

    def combine(
        self,
        expert_out: Tensor,
        routing: Routing,
        residual: Tensor | None,
        shared: Tensor | None = None,
        shared_gate: Tensor | None = None,
        *,
        weighted: bool = True,
        scale: float = 1.0,
    ) -> Tensor:
        """Add the experts up in rank order, the shared expert after them, and the residual stream if it is given."""
        out = self._new(expert_out.width // routing.ids.width)
        self.operations.append(Combine(expert_out, routing, shared, shared_gate, residual, out, weighted, scale))
        return out

    def has_slots(self, experts: Experts) -> bool:
        """Return whether experts may be in slots; others are where the dense weights are."""
        return any(experts.routing == routing for routing in self.routings)

    def reduce_streams(
        self,
        x: Tensor,
        matrix: Vector,
        scale: Vector,
        base: Vector,
        eps: float,
        offset: float,
        magnitude: float,
        n_streams: int,
        n_normalizations: int = 0,
    ) -> tuple[Tensor, ...]:
        """Make one row of residual streams; with two scales gates of what is added to them, with three their mixing."""
        assert scale.size in {1, 2, 3}
        assert base.size == n_streams * (scale.size if scale.size < 3 else 2 + n_streams)
        assert (n_normalizations > 0) == (scale.size == 3)
        assert x.width % n_streams == 0
        assert matrix.size == base.size * x.width
        assert x.rows == Rows.TOKENS
        out = self._new(x.width // n_streams)
        gates = self._new(n_streams) if scale.size > 1 else None
        mixing = self._new(n_streams**2) if scale.size > 2 else None
        how = eps, offset, magnitude, n_normalizations
        self.operations.append(ReduceStreams(x, matrix, scale, base, out, gates, mixing, *how))
        return tuple(tensor for tensor in (out, gates, mixing) if tensor)

    def add_to_streams(
        self, x: Tensor, added: Tensor, gates: Tensor, mixing: Tensor | None = None, *, magnitude: float = 0.0
    ) -> Tensor:
        """Add a row to every residual stream, times the stream's gate; before that the streams may be mixed."""
        assert x.width == added.width * gates.width
        assert mixing is None or mixing.width == gates.width**2
        out = self._new(x.width)
        self.operations.append(AddToStreams(x, added, gates, mixing, out, magnitude))
        return out

    def mix_residuals(self, residuals: Sequence[Tensor], scorer: Vector, eps: float) -> Tensor:
        """Make one row of several, each of which scores by its product with a vector; at most `MOST_RESIDUALS`."""
        assert 1 <= len(residuals) <= MOST_RESIDUALS
        assert all(x.width == scorer.size and x.rows == Rows.TOKENS for x in residuals)
        out = self._new(scorer.size)
        self.operations.append(MixResiduals(tuple(residuals), scorer, out, eps))
        return out

    def select_outputs(self, x: Tensor) -> Tensor:
        """Keep the rows whose logits are wanted."""
        out = self._new(x.width, Rows.OUTPUTS)
        self.operations.append(SelectOutputs(x, out))
        return out
