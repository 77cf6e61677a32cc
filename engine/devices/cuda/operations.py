"""How the operations that take each token for itself are lowered, but for routed experts: one function for each.

A function says to the recorder which tensors and weights it needs, and how its launches are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from engine.devices import graph as ops
from engine.devices.cuda import elementwise, fusion, kernels, ngrams, residuals
from engine.devices.cuda.hyper_connections import Added, Mixing, hyper_connections, n_partial
from engine.devices.cuda.kernels import Combined, GateOf, Normed, Routed
from engine.devices.cuda.launch import NOTHING, Heads, Launch, Matrix, OfFormat, Rows
from engine.devices.cuda.places import Finish, Pass, Place
from engine.devices.cuda.recorder import Recorder
from engine.devices.graph import Tensor, Vector
from engine.quants.formats import Activation

Summands: TypeAlias = Callable[[Pass], tuple[Rows, Rows | Combined | None, Rows]]
"""Gives what is added to the residual stream, what to it, and where the sum goes."""


class Choice(NamedTuple):
    """A choice of experts that the launch of some products may make.

    Attributes:
        place: of the product that gives the logits of the router.
        routed: how the choice is made; None if it is not.
        normed: how the launch makes what it multiplies; None if it does not.
    """

    place: int
    routed: Callable[[Pass], Routed | None]
    normed: Callable[[Pass], Normed | None]


def embed(recorder: Recorder, op: ops.Embed) -> None:
    """Record the rows of a table that the tokens, or ids of their own, name."""
    out, table, rows, grid = recorder.use(op.out), op.table, recorder.table(op.table), recorder.grid(op.table.format)
    ids = recorder.use(op.ids) if op.ids else None
    recorder.record(
        lambda p: [
            elementwise.embed(
                rows(p),
                table.format,
                p.rows(ids) if ids else Rows(p.base + p.step.token_ids, 1),
                op.out.width // table.n_cols,
                table.n_rows,
                table.n_cols,
                p.at(grid),
                p.rows(out),
                op.scale,
                p.count(op.out.rows),
            )
        ]
    )


def select_outputs(recorder: Recorder, op: ops.SelectOutputs) -> None:
    """Record the rows that logits are wanted of."""
    x, out = recorder.use(op.x), recorder.use(op.out)
    recorder.record(
        lambda p: [
            elementwise.select_outputs(
                p.rows(x),
                p.base + p.step.output_rows,
                p.rows(out),
                op.x.width,
                p.count(op.out.rows),
            )
        ]
    )


def rms_norm(recorder: Recorder, op: ops.RMSNorm) -> None:
    """Record the norm of heads, or of whole rows."""
    if fusion.is_of_row(op, op.x):
        row = recorder.use(op.x)
        residual(recorder, op.x, lambda p: (p.rows(row), None, NOTHING), op)
        return
    x, out, size = recorder.use(op.x), recorder.use(op.out), op.group_size
    weight, bias = recorder.vector(op.weight), recorder.vector(op.bias)
    recorder.record(
        lambda p: [
            elementwise.rms_norm(
                p.rows(x),
                p.at(weight),
                p.rows(out),
                op.x.width // size,
                size,
                op.eps,
                p.count(op.x.rows),
                size if op.weight and op.weight.size > size else 0,
                centers=op.centers,
                bias=p.at(bias),
            )
        ]
    )


def add(recorder: Recorder, op: ops.Add, norm: ops.RMSNorm | None = None) -> None:
    """Record a sum, with the norm of the whole row behind it if there is one."""
    total, a = recorder.use(op.out), recorder.use(op.a)
    b = recorder.use(op.b) if isinstance(op.b, Tensor) else None
    vector = recorder.vector(op.b) if isinstance(op.b, Vector) else None  # for every row
    residual(recorder, op.out, lambda p: (p.rows(a), p.rows(b) if b else Rows(p.at(vector), 0), p.rows(total)), norm)


def residual(recorder: Recorder, tensor: Tensor, summands: Summands, norm: ops.RMSNorm | None) -> None:
    """Record a sum into the residual stream, here `tensor`, a norm of that whole row, or both as one."""
    out, weight, bias = (
        (recorder.use(norm.out), recorder.vector(norm.weight), recorder.vector(norm.bias)) if norm else (None,) * 3
    )
    finish = recorder.finish(norm.out) if norm else Finish(recorder.index)
    recorder.record(
        lambda p: [
            kernels.residual(
                *summands(p),
                tensor.width,
                p.count(tensor.rows),
                p.at(weight),
                norm.eps if norm else 0.0,
                p.rows(out) if out else None,
                finish.at(p),
                centers=norm is not None and norm.centers,
                bias=p.at(bias),
            )
        ]
    )


def add_to_streams(recorder: Recorder, op: ops.AddToStreams) -> None:
    """Record what is added to residual streams."""
    x, added = recorder.use(op.x), _added_to_streams(recorder, op)
    sizes = op.gates.width, op.added.width
    recorder.record(lambda p: [hyper_connections(p.rows(x), added(p), *sizes, None, p.count(op.x.rows))])


def _added_to_streams(recorder: Recorder, op: ops.AddToStreams) -> Callable[[Pass], Added]:
    added, gates, out = recorder.use(op.added), recorder.use(op.gates), recorder.use(op.out)
    mixing = recorder.use(op.mixing) if op.mixing else None
    return lambda p: Added(
        p.rows(added), p.rows(gates), p.rows(out), p.rows(mixing) if mixing else NOTHING, op.magnitude
    )


def reduce_streams(recorder: Recorder, item: fusion.StreamsAndNorm) -> None:
    """Record the row that is made of residual streams: one launch finds their weights, one adds up and normalises.

    The first also adds to the streams what is added before; for the second they are as experts that are all there.
    """
    op, add = item.reduce, item.add
    n_streams, n_mixes, width = op.n_streams, op.base.size, op.x.width
    x, before, out = recorder.use(op.x), recorder.use(add.x if add else op.x), recorder.use(op.out)
    added = _added_to_streams(recorder, add) if add else None
    gates, to_mix = (recorder.use(tensor) if tensor else None for tensor in (op.gates, op.mixing))
    matrix, scale, base = (recorder.vector(vector) for vector in (op.matrix, op.scale, op.base))
    partial = recorder.temporary(lambda n_tokens: 4 * n_partial(n_tokens, width, n_mixes))
    weights = recorder.temporary(lambda n_tokens: 4 * n_tokens * n_streams)
    n_done = recorder.counters_of_rows()

    def launches(p: Pass) -> Iterable[Launch]:
        mixing = Mixing(
            p.at(matrix),
            p.at(scale),
            p.at(base),
            p.rows(partial).address,
            p.base + n_done,
            p.rows(weights).address,
            p.rows(gates).address if gates else 0,
            p.rows(to_mix).address if to_mix else 0,
            op.eps,
            op.offset,
            op.magnitude,
            op.n_normalizations,
        )
        what = added(p) if added else None
        yield hyper_connections(p.rows(before), what, n_streams, width // n_streams, mixing, p.count(op.x.rows))

    def summands(p: Pass) -> tuple[Rows, Combined, Rows]:
        return NOTHING, Combined(p.rows(x), None, 0, 0, p.rows(weights).address, n_streams), p.rows(out)

    recorder.record(launches)
    residual(recorder, op.out, summands, item.norm)


def mix_residuals(recorder: Recorder, item: fusion.ResidualsAndNorm) -> None:
    """Record the row that is made of residuals, with the sum before it and the norm behind it if they are there."""
    op, norm = item.mix, item.norm
    rows, out, scorer = [recorder.use(x) for x in op.residuals], recorder.use(op.out), recorder.vector(op.scorer)
    summands = [recorder.use(x) for x in (item.add.a, item.add.b) if isinstance(x, Tensor)] if item.add else []
    normed, weight = (recorder.use(norm.out), recorder.vector(norm.weight)) if norm else (None, None)
    finish = recorder.finish(norm.out) if norm else Finish(recorder.index)
    scores = recorder.temporary(lambda n_tokens: 4 * n_tokens * len(rows))
    n_done = recorder.counters_of_rows()

    def launches(p: Pass) -> Iterable[Launch]:
        scoring = residuals.Scoring(p.at(scorer), op.eps, p.rows(scores).address, p.base + n_done)
        how = residuals.Norm(p.at(weight), norm.eps, p.rows(normed), finish.at(p)) if norm and normed else None
        added = [p.rows(x) for x in summands]
        places = [p.rows(x) for x in rows]
        yield residuals.mix_residuals(places, added, scoring, p.rows(out), how, op.out.width, p.count(op.out.rows))

    recorder.record(launches)


def linear(recorder: Recorder, op: ops.Linear, choice: Choice | None = None) -> None:
    """Record products, and a choice that may be made with those of one format."""
    outs = [recorder.use(out) for out in op.outs]
    for parts in fusion.product_groups(op, None if choice is None else choice.place):
        chooses = choice is not None and choice.place in parts[0][1]
        _linear_launch(recorder, op, parts, outs, choice if chooses else None)


def _linear_launch(
    recorder: Recorder,
    op: ops.Linear,
    parts: Sequence[fusion.OneFormat],
    outs: list[Place],
    choice: Choice | None,
) -> None:
    """Record the products of one format, or of two that take the same activations: one launch for few tokens."""
    x = recorder.activations(op.x, parts[0][0].activation)
    grids = [recorder.grid(weight_format) for weight_format, _ in parts]
    places = [
        [
            (
                recorder.matrix(op.weights[i]),
                op.weights[i].n_rows,
                outs[i],
                recorder.vector(op.biases[i]),
                recorder.vector(op.weights[i].scale),
            )
            for i in members
        ]
        for _, members in parts
    ]

    def of_format(p: Pass, part: int) -> OfFormat:
        matrices = [
            Matrix(p.base + matrix, n, p.rows(out), p.at(bias), p.at(scale))
            for matrix, n, out, bias, scale in places[part]
        ]
        return OfFormat(parts[part][0], matrices, p.at(grids[part]))

    def launches(p: Pass) -> Iterable[Launch]:
        count, own = p.count(op.x.rows), [of_format(p, i) for i in range(len(parts))]
        routed = choice.routed(p) if choice is not None else None
        if choice is not None and routed is not None:
            yield kernels.linear(p.rows(x), op.x.width, *own[0], count, routed=routed, normed=choice.normed(p))
        elif p.linear is kernels.linear:
            yield kernels.linear(p.rows(x), op.x.width, *own[0], count, second=own[1] if own[1:] else None)
        else:
            for part in own:
                yield p.linear(p.rows(x), op.x.width, *part, count)

    recorder.record(launches)


def head_linear(recorder: Recorder, op: ops.HeadLinear) -> None:
    """Record the products of each head with a matrix of its own."""
    weight, n = op.weight, op.weight.n_experts
    row_bytes, activation = weight.format.row_bytes(weight.n_cols), weight.format.activation
    matrix, grid, scale, out = (
        recorder.matrix(weight),
        recorder.grid(weight.format),
        recorder.vector(weight.scale),
        recorder.use(op.out),
    )
    x, rows = recorder.use(op.x), op.x.rows
    assert (op.x.offset, op.x.width) == (0, op.x.buffer.width), "heads stand in rows of their own"
    if activation == Activation.F32:
        converted, x_bytes = Place(x.need, x.offset, x.stride * 4), weight.n_cols * 4
    else:
        x_bytes = kernels.activation_bytes(activation, weight.n_cols)
        stride = n * x_bytes
        converted = recorder.temporary(lambda n_tokens: n_tokens * stride, stride)

    def launches(p: Pass) -> Iterable[Launch]:
        if activation != Activation.F32:
            heads, to = Rows(p.rows(x).address, weight.n_cols), Rows(p.rows(converted).address, x_bytes)
            yield kernels.quantize(heads, weight.n_cols, activation, to, n, p.count(rows))
        yield p.linear(
            p.rows(converted),
            weight.n_cols,
            weight.format,
            [Matrix(p.base + matrix, weight.n_rows, p.rows(out), 0, p.at(scale))],
            p.at(grid),
            p.count(rows),
            Heads(n, (weight.stored_rows or weight.n_rows) * row_bytes, x_bytes),
        )

    recorder.record(launches)


def scale(recorder: Recorder, op: ops.Scale) -> None:
    """Record a product with a number, and with a column or a value of the model if there is one."""
    x, out = recorder.use(op.x), recorder.use(op.out)
    value = recorder.vector(op.by) if isinstance(op.by, Vector) else None
    column = recorder.use(op.by) if isinstance(op.by, Tensor) else None

    def launches(p: Pass) -> Iterable[Launch]:
        by = p.rows(column) if column else Rows(p.at(value), 0) if value is not None else None
        yield elementwise.scale(p.rows(x), op.factor, by, p.rows(out), op.x.width, p.count(op.x.rows))

    recorder.record(launches)


def soft_cap(recorder: Recorder, op: ops.SoftCap) -> None:
    """Record values that are brought to within a number of 0."""
    x, out = recorder.use(op.x), recorder.use(op.out)
    recorder.record(lambda p: [elementwise.soft_cap(p.rows(x), op.cap, p.rows(out), op.x.width, p.count(op.x.rows))])


def clamp(recorder: Recorder, op: ops.Clamp) -> None:
    """Record values that are kept within a number of 0."""
    x, out = recorder.use(op.x), recorder.use(op.out)
    recorder.record(lambda p: [elementwise.clamp(p.rows(x), op.limit, p.rows(out), op.x.width, p.count(op.x.rows))])


def gate_of(op: ops.Gate, rows: Rows, head_dim: int) -> GateOf:
    """Return the gate of an operation on heads of that size, whose values lie there."""
    per_head = op.gate.width < op.x.width
    assert not per_head or op.gate.width * head_dim == op.x.width
    return GateOf(op.gating, rows, head_dim, 1 if per_head else head_dim, per_head, op.limit, op.own_limit)


def gate(recorder: Recorder, op: ops.Gate, norm: ops.RMSNorm | None = None) -> None:
    """Record a gate, with the norm of the heads before it if there is one."""
    x, by, out = recorder.use(norm.x if norm else op.x), recorder.use(op.gate), recorder.use(op.out)
    weight, finish = recorder.vector(norm.weight) if norm else None, recorder.finish(op.out)
    head_dim = op.x.width // op.gate.width if op.gate.width < op.x.width else op.x.width
    recorder.record(
        lambda p: [
            kernels.gate(
                p.rows(x),
                gate_of(op, p.rows(by), head_dim),
                p.rows(out),
                op.out.width,
                p.count(op.x.rows),
                finish.at(p),
                norm.group_size if norm else 0,
                p.at(weight),
                norm.eps if norm else 0.0,
                op.n_streams,
            )
        ]
    )


def gate_by_agreement(recorder: Recorder, op: ops.GateByAgreement) -> None:
    """Record a gate for each of some streams."""
    a, b, x, out = (recorder.use(tensor) for tensor in (op.a, op.b, op.x, op.out))
    how = op.n_streams, op.x.width, op.floor
    recorder.record(
        lambda p: [ngrams.gate_by_agreement(p.rows(a), p.rows(b), p.rows(x), p.rows(out), *how, p.count(op.x.rows))]
    )


def split_heads(recorder: Recorder, op: ops.SplitHeads) -> None:
    """Record the first and second parts of all heads, taken apart."""
    x, first, second = recorder.use(op.x), recorder.use(op.first), recorder.use(op.second)
    dims = (op.first.width // op.n_heads, op.second.width // op.n_heads)
    recorder.record(
        lambda p: [
            elementwise.split_heads(p.rows(x), p.rows(first), p.rows(second), op.n_heads, *dims, p.count(op.x.rows))
        ]
    )


def join_heads(recorder: Recorder, op: ops.JoinHeads) -> None:
    """Record heads that are made of two parts."""
    first, second, out = recorder.use(op.first), recorder.use(op.second), recorder.use(op.out)
    dims = (op.first.width // op.n_heads, op.second.width // op.n_heads)
    recorder.record(
        lambda p: [
            elementwise.join_heads(p.rows(first), p.rows(second), p.rows(out), op.n_heads, *dims, p.count(op.out.rows))
        ]
    )
