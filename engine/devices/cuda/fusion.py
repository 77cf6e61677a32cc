"""Which operations of a forward pass become one launch, or some launches that are made together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from engine.devices import graph as ops
from engine.devices.cuda import kernels, recurrent
from engine.devices.cuda.launch import MAX_MATRICES
from engine.devices.graph import Tensor
from engine.quants.formats import QuantFormat

Sum: TypeAlias = ops.Add | ops.Combine


@dataclass(frozen=True, slots=True)
class SumAndNorm:
    """A sum into the residual stream, and the norm of the whole row that follows it."""

    sum: Sum
    norm: ops.RMSNorm


@dataclass(frozen=True, slots=True)
class NormAndGate:
    """The norm of heads, and their gate."""

    norm: ops.RMSNorm
    gate: ops.Gate


@dataclass(frozen=True, slots=True)
class LinearAndRouter:
    """Products of which one gives the logits of a router, the choice, and the experts that are chosen."""

    linear: ops.Linear
    router: ops.Router
    experts: ops.Experts


@dataclass(frozen=True, slots=True)
class NormAndRouter:
    """A sum into the residual stream, its norm, and the choice of experts by products of that."""

    sum: SumAndNorm
    choice: LinearAndRouter


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """Routed experts, and a shared expert that is like one of them: two projections, what joins them, and the third."""

    experts: ops.Experts
    gate_up: ops.Linear
    gate: ops.Gate
    down: ops.Linear


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Rows that the tokens of a period share, and what makes keys of them, which is done where they are stored."""

    compress: ops.Compress
    norm: ops.RMSNorm
    rope: ops.Rope


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention, what makes its queries and keys ready before it, and the gate behind it.

    Attributes:
        attention: the operation.
        split: takes queries and gate apart.
        q_norm, k_norm: of heads, before they are rotated.
        q_rope, k_rope: both the same, or None.
        gate: of what attention finds; it is `split.second` if there is a split.
        shared_keys: what keys that tokens share are made of, if there are any.
    """

    attention: ops.Attention
    split: ops.SplitHeads | None = None
    q_norm: ops.RMSNorm | None = None
    k_norm: ops.RMSNorm | None = None
    q_rope: ops.Rope | None = None
    k_rope: ops.Rope | None = None
    gate: ops.Gate | None = None
    shared_keys: SharedKeys | None = None

    @property
    def q(self) -> Tensor:
        """Return the queries as they were before all of it; with a split, what was split."""
        first = self.q_norm.x if self.q_norm else self.attention.q
        return self.split.x if self.split else first

    @property
    def k(self) -> Tensor:
        """Return the keys as they were before all of it."""
        return self.k_norm.x if self.k_norm else self.attention.k

    @property
    def rope(self) -> ops.Rope | None:
        """Return how queries or keys are rotated."""
        return self.q_rope or self.k_rope

    @property
    def norm(self) -> ops.RMSNorm | None:
        """Return a norm with the `eps` of all."""
        return self.q_norm or self.k_norm

    @property
    def operations(self) -> list[ops.Operation]:
        """Return what it is made of."""
        before = (self.split, self.q_norm, self.k_norm, self.q_rope, self.k_rope)
        return [op for op in (*before, self.attention, self.gate) if op is not None]


@dataclass(frozen=True, slots=True)
class Selection:
    """The choice of what attention looks at, and what makes its queries and keys ready before it.

    Attributes:
        select: the operation.
        q_rope, k_rope: both the same.
        q_norm, k_norm: of heads, before they are rotated; both or none.
        shared_keys: what keys that tokens share are made of; then there is neither `k_rope` nor a norm here.
    """

    select: ops.SelectPositions | ops.SelectBlocks
    q_rope: ops.Rope | None = None
    k_rope: ops.Rope | None = None
    q_norm: ops.RMSNorm | None = None
    k_norm: ops.RMSNorm | None = None
    shared_keys: SharedKeys | None = None

    @property
    def operations(self) -> list[ops.Operation]:
        """Return what it is made of."""
        return [op for op in (self.q_norm, self.k_norm, self.q_rope, self.k_rope, self.select) if op is not None]


@dataclass(frozen=True, slots=True)
class DeltaNetLayer:
    """All of a delta-net layer between its two products."""

    conv: ops.CausalConv
    net: ops.DeltaNet
    norm: ops.RMSNorm
    gate: ops.Gate


@dataclass(frozen=True, slots=True)
class StreamsAndNorm:
    """The row that is made of residual streams; what is added to them before it, and its norm, if these are there."""

    add: ops.AddToStreams | None
    reduce: ops.ReduceStreams
    norm: ops.RMSNorm | None


@dataclass(frozen=True, slots=True)
class ResidualsAndNorm:
    """The row that is made of residuals; the sum that is the last of them, and its norm, if these are there."""

    add: ops.Add | None
    mix: ops.MixResiduals
    norm: ops.RMSNorm | None


Group: TypeAlias = Attention | Selection | SharedKeys | SharedExpert | DeltaNetLayer | StreamsAndNorm | ResidualsAndNorm
OneFormat: TypeAlias = tuple[QuantFormat, Sequence[int]]
"""Some of the matrices of an operation, by their numbers, and the format that all of them have."""

Pair: TypeAlias = SumAndNorm | NormAndGate | LinearAndRouter
Fused: TypeAlias = ops.Operation | Pair | NormAndRouter | Group


def fused(operations: Sequence[ops.Operation]) -> Iterator[tuple[int, Fused]]:
    """Yield everything there is to record, in order, each with the index of its last operation."""
    n_users = Counter(buffer for op in operations for buffer in {tensor.buffer for tensor in op.tensors()})
    groups: dict[int, Group] = {}  # by the index of their first operation
    shared_keys: dict[ops.Buffer, SharedKeys] = {}  # by where they would be
    for i, op in enumerate(operations):
        if isinstance(op, ops.Attention):
            first, attention = _around(operations, i, n_users)
            if op.shared_k:
                attention = replace(attention, shared_keys=shared_keys.get(op.shared_k.buffer))
            groups[first] = attention
        elif isinstance(op, ops.Compress) and (keys := _shared_keys(op, operations[i + 1 : i + 3], n_users)):
            groups[i] = shared_keys[keys.rope.x.buffer] = keys
        elif isinstance(op, ops.SelectPositions) and op.k.buffer in shared_keys:
            keys = shared_keys[op.k.buffer]
            rope = _rotated_queries(op, operations[i - 1], keys.rope, n_users)
            groups[i - (rope is not None)] = Selection(op, rope, shared_keys=keys)
        elif isinstance(op, ops.CausalConv) and (layer := _delta_net_layer(operations[i : i + 4], n_users)):
            groups[i] = layer
        elif isinstance(op, ops.RMSNorm | ops.Rope) and (selection := _selection(operations[i : i + 5], n_users)):
            groups[i] = selection
        elif isinstance(op, ops.ReduceStreams):
            streams = _streams(op, operations[max(i - 1, 0)], operations[i + 1])
            groups[i - (streams.add is not None)] = streams
        elif isinstance(op, ops.MixResiduals):
            residuals = _residuals(op, operations[max(i - 1, 0)], operations[i + 1])
            groups[i - (residuals.add is not None)] = residuals
    operations = list(operations)
    for i, op in enumerate(operations):
        if isinstance(op, ops.Experts) and (shared := _shared_expert(operations[i : i + 3], operations[:i], n_users)):
            groups[i], producer = shared
            operations[producer] = _without(operations[producer], shared[0])
    i = 0
    while i < len(operations):
        item: Fused = groups.get(i) or _pair(operations[i : i + 2], operations[i:], n_users) or operations[i]
        if isinstance(item, SumAndNorm) and i + 2 not in groups:
            item = _norm_and_router(item, _pair(operations[i + 2 : i + 4], operations[i + 2 :], n_users)) or item
        i += _n_operations(item)
        yield i - 1, item


def choice_of(item: Fused) -> LinearAndRouter | None:
    """Return the products and the choice of experts by them that something consists of, or ends with."""
    choice = item.choice if isinstance(item, NormAndRouter) else item
    return choice if isinstance(choice, LinearAndRouter) else None


def _n_operations(item: Fused) -> int:
    if isinstance(item, Attention | Selection):
        return len(item.operations)
    if isinstance(item, StreamsAndNorm | ResidualsAndNorm):
        return 1 + (item.add is not None) + (item.norm is not None)
    if isinstance(item, ops.Operation):
        return 1
    return {DeltaNetLayer: 4, NormAndRouter: 4, SharedExpert: 3, SharedKeys: 3}.get(type(item), 2)


def product_groups(linear: ops.Linear, chooses: int | None = None) -> Iterator[Sequence[OneFormat]]:
    """Yield which products become one launch where tokens are few: those of a format, or of two.

    Of the matrix that gives a router's logits, `chooses`, there are only others of its format.
    """
    by_format: dict[QuantFormat, list[int]] = {}
    for i, weight in enumerate(linear.weights):
        by_format.setdefault(weight.format, []).append(i)
    parts = [
        (weight_format, members[first : first + MAX_MATRICES])
        for weight_format, members in by_format.items()
        for first in range(0, len(members), MAX_MATRICES)
    ]

    def can_join(a: OneFormat, b: OneFormat) -> bool:
        members = [*a[1], *b[1]]
        fits = a[0] != b[0] and len(members) <= MAX_MATRICES and chooses not in members
        return fits and kernels.can_join(a[0], b[0])

    while parts:
        first = parts.pop(0)
        second = next((i for i, part in enumerate(parts) if can_join(first, part)), None)
        yield [first] if second is None else [first, parts.pop(second)]


def is_of_row(norm: ops.RMSNorm, x: Tensor) -> bool:
    """Return whether a norm is that of all of a tensor's columns."""
    return norm.x == x and norm.group_size == x.width


def _only_scales(norm: ops.RMSNorm) -> bool:
    """Return whether a norm adds nothing to values: neither what makes their mean 0, nor a bias."""
    return not (norm.centers or norm.bias)


def _pair(
    two: Sequence[ops.Operation], following_ones: Sequence[ops.Operation], n_users: Counter[ops.Buffer]
) -> Pair | None:
    if len(two) < 2:
        return None
    op, following = two
    if isinstance(op, ops.Add | ops.Combine) and isinstance(following, ops.RMSNorm) and is_of_row(following, op.out):
        return SumAndNorm(op, following)
    if (
        isinstance(op, ops.RMSNorm)
        and isinstance(following, ops.Gate)
        and following.x == op.out
        and following.n_streams == 1
        and n_users[op.out.buffer] == 2  # nobody else reads the norm
        and kernels.can_gate_heads(op.group_size)
        and (op.weight is None or op.weight.size == op.group_size)
        and _only_scales(op)
    ):
        return NormAndGate(op, following)
    if isinstance(op, ops.Linear) and isinstance(following, ops.Router) and following.logits in op.outs:
        users = (user for user in following_ones if isinstance(user, ops.Experts) and user.routing == following.out)
        return LinearAndRouter(op, following, next(users))
    return None


def _norm_and_router(item: SumAndNorm, behind: Pair | None) -> NormAndRouter | None:
    """Return a sum and its norm together with the pair behind it, if that makes one launch of floats of the norm."""
    if not isinstance(behind, LinearAndRouter) or behind.linear.x != item.norm.out:
        return None
    if item.norm.out.rows != ops.Rows.TOKENS:  # of which there is one at least
        return None
    is_plain = isinstance(item.sum, ops.Add) and isinstance(item.sum.b, ops.Tensor) and _only_scales(item.norm)
    (weight_format, *others), n_cols = {weight.format for weight in behind.linear.weights}, behind.linear.x.width
    fits = not others and len(behind.linear.weights) <= MAX_MATRICES and kernels.can_normalize(weight_format, n_cols, 1)
    return NormAndRouter(item, behind) if is_plain and fits else None


def _delta_net_layer(four: Sequence[ops.Operation], n_users: Counter[ops.Buffer]) -> DeltaNetLayer | None:
    """Return a layer that begins with a convolution, if nobody else uses what is made on the way."""
    if len(four) < 4:
        return None
    conv, net, norm, gate = four
    if not (isinstance(conv, ops.CausalConv) and isinstance(net, ops.DeltaNet) and net.beta and _is_plain(conv)):
        return None
    if not (isinstance(norm, ops.RMSNorm) and isinstance(gate, ops.Gate) and norm.x == net.out and gate.x == norm.out):
        return None
    k_dim, v_dim, end = net.k.width // net.n_k_heads, net.v.width // net.n_v_heads, 2 * net.k.width
    places = (
        conv.out.columns(0, net.k.width),
        conv.out.columns(net.k.width, end),
        conv.out.columns(end, conv.out.width),
    )
    alone = all(n_users[tensor.buffer] == 2 for tensor in (conv.out, net.out, norm.out))
    alone = (
        alone and gate.gate.width == gate.x.width and gate.gating.is_factor and not gate.limit and _only_scales(norm)
    )
    if alone and (net.q, net.k, net.v) == places and norm.group_size == v_dim and recurrent.can_step(k_dim, v_dim):
        return DeltaNetLayer(conv, net, norm, gate)
    return None


def _shared_keys(
    compress: ops.Compress, following: Sequence[ops.Operation], n_users: Counter[ops.Buffer]
) -> SharedKeys | None:
    """Return rows with the norm and the rotation behind them, if only whoever stores them uses what these make."""
    if len(following) < 2:
        return None
    norm, rope = following
    if not (isinstance(norm, ops.RMSNorm) and isinstance(rope, ops.Rope) and rope.x == norm.out):
        return None
    is_plain = is_of_row(norm, compress.out) and _only_scales(norm) and rope.n_heads == 1
    alone = n_users[compress.out.buffer] == 2 and n_users[norm.out.buffer] == 3
    return SharedKeys(compress, norm, rope) if is_plain and alone else None


def _rotated_queries(
    select: ops.SelectPositions, before: ops.Operation, of_keys: ops.Rope, n_users: Counter[ops.Buffer]
) -> ops.Rope | None:
    """Return the rotation of an indexer's queries right before it, if it has the angles of that of its keys."""
    if isinstance(before, ops.Rope) and before.x == select.q and n_users[select.q.buffer] == 3:
        return before if before.period == 1 and _same_angles(before, of_keys) else None
    return None


def _selection(following: Sequence[ops.Operation], n_users: Counter[ops.Buffer]) -> Selection | None:
    """Return a choice that begins with norms and rotations, or with these, if nobody else uses what they make."""
    norms, rest = [op for op in following[:2] if isinstance(op, ops.RMSNorm)], following
    if len(norms) == 2:
        rest = following[2:]
    if len(rest) < 3:
        return None
    q_rope, k_rope, select = rest[:3]
    if not isinstance(select, ops.SelectPositions | ops.SelectBlocks):
        return None
    if not (isinstance(q_rope, ops.Rope) and isinstance(k_rope, ops.Rope)):
        return None
    alone = n_users[select.q.buffer] == n_users[select.k.buffer] == 3
    if not (alone and (q_rope.x, k_rope.x) == (select.q, select.k) and _same_rotation(q_rope, k_rope)):
        return None
    if len(norms) < 2:
        return Selection(select, q_rope, k_rope)
    q_norm, k_norm = norms
    of_heads = all(_only_scales(norm) and norm.group_size == select.cache.head_dim for norm in norms)
    of_heads = of_heads and all(norm.weight is None or norm.weight.size == norm.group_size for norm in norms)
    if of_heads and (q_norm.out, k_norm.out) == (select.q, select.k) and q_norm.eps == k_norm.eps:
        return Selection(select, q_rope, k_rope, q_norm, k_norm)
    return None


def _streams(reduce: ops.ReduceStreams, before: ops.Operation, following: ops.Operation) -> StreamsAndNorm:
    """Return what belongs to the row that is made of residual streams."""
    return StreamsAndNorm(
        before if isinstance(before, ops.AddToStreams) and before.out == reduce.x else None,
        reduce,
        following if isinstance(following, ops.RMSNorm) and is_of_row(following, reduce.out) else None,
    )


def _residuals(mix: ops.MixResiduals, before: ops.Operation, following: ops.Operation) -> ResidualsAndNorm:
    """Return what belongs to the row that is made of residuals."""
    add = before if isinstance(before, ops.Add) and isinstance(before.b, Tensor) else None
    norm = following if isinstance(following, ops.RMSNorm) and _only_scales(following) else None
    return ResidualsAndNorm(
        add if add and add.out == mix.residuals[-1] else None,
        mix,
        norm if norm and is_of_row(norm, mix.out) else None,
    )


def _is_plain(conv: ops.CausalConv) -> bool:
    return conv.activates and not conv.bias and conv.dilation == 1


def _shared_expert(
    three: Sequence[ops.Operation], before: Sequence[ops.Operation], n_users: Counter[ops.Buffer]
) -> tuple[SharedExpert, int] | None:
    """Return experts with a shared one, and the index of what projects for it, if it is like one of them."""
    if len(three) < 3:
        return None
    experts, gate, down = three
    assert isinstance(experts, ops.Experts)
    if not (isinstance(gate, ops.Gate) and isinstance(down, ops.Linear) and down.x == gate.out and len(down.outs) == 1):
        return None
    is_plain = ops.GATING_OF[experts.activation] == gate.gating and down.biases == (None,)
    same_limits = (experts.limit, experts.up_limit) == (gate.limit, gate.own_limit)
    is_plain = is_plain and same_limits and gate.x.width == gate.gate.width
    own = all(n_users[tensor.buffer] == 2 for tensor in (gate.x, gate.gate, gate.out))
    for i, op in enumerate(before):
        if not (isinstance(op, ops.Linear) and op.x == experts.x and gate.gate in op.outs and gate.x in op.outs):
            continue
        places = [op.outs.index(gate.gate), op.outs.index(gate.x)]
        gate_up = ops.Linear(op.x, tuple(op.weights[j] for j in places), (None, None), (gate.gate, gate.x))
        weights = (*gate_up.weights, *down.weights)
        routed = (experts.gate, experts.up, experts.down)
        alike = all(
            (a.format, a.n_rows, a.n_cols, a.scale) == (b.format, b.n_rows, b.n_cols, None)
            for a, b in zip(weights, routed, strict=True)
        )
        if is_plain and own and alike and not any(op.biases[j] for j in places):
            return SharedExpert(experts, gate_up, gate, down), i
    return None


def _without(op: ops.Operation, shared: SharedExpert) -> ops.Operation:
    """Return a product without the projections of a shared expert."""
    assert isinstance(op, ops.Linear)
    parts = zip(op.weights, op.biases, op.outs, strict=True)
    weights, biases, outs = zip(*(part for part in parts if part[2] not in shared.gate_up.outs), strict=True)
    return ops.Linear(op.x, weights, biases, outs)


def _around(operations: Sequence[ops.Operation], i: int, n_users: Counter[ops.Buffer]) -> tuple[int, Attention]:
    """Return what belongs to the attention at an index, and the index of the first operation of it."""
    attention = operations[i]
    assert isinstance(attention, ops.Attention)
    found, first = Attention(attention), i
    following = operations[i + 1] if i + 1 < len(operations) else None
    if isinstance(following, ops.Gate) and _gates(following, attention) and n_users[attention.out.buffer] == 2:
        found = replace(found, gate=following)
    candidate = found
    for before in range(i - 1, -1, -1):
        more = _with(candidate, operations[before])
        if more is None:
            break
        candidate = more
        if _alone(candidate, n_users):  # a rotation alone is not: the norm before it uses its tensor, too
            found, first = candidate, before
    return first, found


def _gates(gate: ops.Gate, attention: ops.Attention) -> bool:
    """Return whether a gate is one of what attention finds, of all values or of all heads."""
    return gate.x == attention.out and gate.gate.width in {attention.n_heads, gate.x.width} and not gate.limit


def _with(found: Attention, op: ops.Operation) -> Attention | None:
    """Return a group that begins with one operation more, if that belongs to it."""
    if isinstance(op, ops.Rope):
        if found.rope and not _same_rotation(found.rope, op):
            return None
        if op.x == found.q and not found.q_rope and not found.q_norm and not found.split:
            return replace(found, q_rope=op)
        if op.x == found.k and not found.k_rope and not found.k_norm:
            return replace(found, k_rope=op)
    if isinstance(op, ops.RMSNorm) and op.group_size == found.attention.cache.head_dim and _only_scales(op):
        if op.weight and op.weight.size != op.group_size:
            return None
        if found.norm and found.norm.eps != op.eps:
            return None
        if op.out == found.q and not found.q_norm and not found.split:
            return replace(found, q_norm=op)
        if op.out == found.k and not found.k_norm:
            return replace(found, k_norm=op)
    if isinstance(op, ops.SplitHeads) and op.first == found.q and found.gate and op.second == found.gate.gate:
        return replace(found, split=op)
    return None


def _same_rotation(a: ops.Rope, b: ops.Rope) -> bool:
    return a.period == b.period and _same_angles(a, b)


def _same_angles(a: ops.Rope, b: ops.Rope) -> bool:
    """Return whether heads are rotated alike at the same position."""
    one, other = ((r.head_dim, r.divisors, r.short_context, r.style, r.magnitude) for r in (a, b))
    return one == other and np.array_equal(a.frequencies, b.frequencies)


def _alone(found: Attention, n_users: Counter[ops.Buffer]) -> bool:
    """Return whether nobody else uses what is made on the way, but for one operation that makes what comes in.

    Keys that are normalised come in and stay as they are: values may be made of them, too. What was chosen to look at
    may be looked at by other layers, too.
    """
    own = Counter(buffer for op in found.operations for buffer in {tensor.buffer for tensor in op.tensors()})
    shared = {(found.gate or found.attention).out.buffer, *([found.k_norm.x.buffer] if found.k_norm else ())}
    if found.attention.shared_k:
        shared.add(found.attention.shared_k.buffer)
    if found.attention.selected:
        shared.add(found.attention.selected.blocks.buffer)
    return all(n_users[buffer] - n <= 1 for buffer, n in own.items() if buffer not in shared)
