"""Turns a recorded forward pass into kernel launches with fixed addresses.

The first pass walks the operations in order: it reserves device memory for weights, caches and states, notes when each
result is first made and last used, and puts activations into the forms that the weight formats take (once for each
form, however many matrices read them). The second makes the launches, for steps of at most some number of rows; a
program has two such lists over the same memory, for single tokens and for many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices import graph as ops
from engine.devices.cuda import kernels
from engine.devices.cuda.kernels import Cache, Count, Exchange, ExpertMatrix, Heads, Launch, Matrix, Rows, Sight
from engine.devices.cuda.sequence_state import Owners
from engine.devices.graph import Graph, Limits, Routing, Tensor, Vector, Weight, WeightAccess
from engine.devices.intervals import Interval, plan_offsets
from engine.quants.formats import Activation, QuantFormat
from engine.quants.grids import GRID_NAMES, load_grid

_ALIGNMENT = 256


class Layout:
    """Hands out places in one device allocation that does not exist yet."""

    def __init__(self) -> None:
        self.n_bytes = _ALIGNMENT  # weight matrices need some bytes before them, see `kernels.PADDING`

    def reserve(self, n_bytes: int) -> int:
        """Return the offset of a new place, with some bytes of nothing behind it."""
        offset = self.n_bytes
        self.n_bytes += -(-(n_bytes + kernels.PADDING) // _ALIGNMENT) * _ALIGNMENT
        return offset


@dataclass(slots=True)
class Place:
    """Where a tensor lies in scratch memory, once that is planned."""

    interval: Interval
    offset: int
    stride: int  # values from one row to the next, or bytes for activation rows


@dataclass(slots=True)
class ExpertLayer:
    """The experts of one layer: their weights in the model file, and their slots on the device.

    Attributes:
        op: the operation.
        n_slots: how many there are.
        slots: offset of the first slot, for each of the three.
        slot_bytes: likewise.
    """

    op: ops.Experts
    n_slots: int
    slots: list[int] = field(default_factory=list)
    slot_bytes: list[int] = field(default_factory=list)

    @property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        """Return gate, up and down."""
        return self.op.gate, self.op.up, self.op.down

    @property
    def biases(self) -> tuple[Vector | None, Vector | None, Vector | None]:
        """Return those of gate, up and down."""
        return self.op.gate_bias, self.op.up_bias, self.op.down_bias

    @property
    def n_experts(self) -> int:
        """Return how many experts the layer has."""
        return self.op.routing.n_experts

    @property
    def is_resident(self) -> bool:
        """Return whether every expert has a slot; expert e is in slot e then."""
        return self.n_slots == self.n_experts

    def expert(self, array: npt.NDArray[np.uint8], matrix: int, expert: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of one expert's matrix (0 gate, 1 up, 2 down) in its tensor."""
        weight = self.weights[matrix]
        row_bytes = weight.format.row_bytes(weight.n_cols)
        first = (expert * (weight.stored_rows or weight.n_rows) + weight.first_row) * row_bytes
        return array[first : first + weight.n_rows * row_bytes]


@dataclass(frozen=True, slots=True)
class Pass:
    """One list of launches under construction: for steps of at most `most` rows.

    Attributes:
        lowering: where everything lies in the device allocation.
        most: rows.
        base: address of the allocation.
        exchange: memory shared with the CPU, None if all experts have slots.
    """

    lowering: Lowering
    most: int
    base: int
    exchange: Exchange | None

    def count(self, rows: ops.Rows) -> Count:
        """Return how many rows an operation has."""
        return Count(self.base + self.lowering.step.n_rows[rows], self.most)

    def rows(self, place: Place) -> Rows:
        """Return the rows of a tensor."""
        start = self.base + self.lowering.scratch + place.interval.offset
        return Rows(start + place.offset, place.stride)

    def at(self, offset: int | None) -> int:
        """Return the address of something that may not exist: 0 then."""
        return 0 if offset is None else self.base + offset


class StepLayout:
    """The inputs of a step, int32: counts and the step's number, then one array after the other."""

    def __init__(self, layout: Layout, max_tokens: int) -> None:
        self.n_words = 4 + 4 * max_tokens
        self.offset = layout.reserve(4 * self.n_words)
        self.n_rows = {ops.Rows.TOKENS: self.offset, ops.Rows.OUTPUTS: self.offset + 4}
        self.number = self.offset + 8
        self.token_ids, self.positions, self.slots, self.output_rows = (
            self.offset + 4 * (4 + i * max_tokens) for i in range(4)
        )


class Lowering:
    """What a graph needs on the device, and its launches."""

    def __init__(
        self, graph: Graph, weights: WeightAccess, limits: Limits, n_slots: Sequence[int] | None = None
    ) -> None:
        """Plan the memory, with so many expert slots in each MoE layer; None for none anywhere."""
        self.limits = limits
        self.layout = Layout()
        self.step = StepLayout(self.layout, limits.max_tokens)
        self.uploads: list[tuple[int, npt.NDArray[np.generic]]] = []  # offset, contents
        self.expert_layers: list[ExpertLayer] = []
        self.states: Owners = []
        self._weights = weights
        self._offsets: dict[object, int] = {}  # of weights, vectors, tables, caches and states
        self._intervals: dict[object, Interval] = {}
        self._calls: list[Callable[[Pass], Iterable[Launch]]] = []
        self._index = 0

        layers = [op for op in graph.operations if isinstance(op, ops.Experts)]
        self._n_slots = [0] * len(layers) if n_slots is None else list(n_slots)
        assert len(self._n_slots) == len(layers)
        self.n_experts = max((op.routing.n_experts for op in layers), default=0)
        self.hidden_size = layers[0].x.width if layers else 0
        self.n_used = max((op.routing.ids.width for op in layers), default=0)
        self.expert_table = self.layout.reserve(4 * max(1, len(layers) * self.n_experts))
        self.routing_offset = self.layout.reserve(4 * max(1, len(layers) * limits.max_tokens * self.n_used))
        self.n_misses = self.layout.reserve(4)
        self._routing_index = {op.routing.ids.buffer: i for i, op in enumerate(layers)}

        state_start = self.layout.n_bytes
        self._reserve_state(graph)
        self.state = (state_start, self.layout.n_bytes - state_start)
        for self._index, operation in enumerate(graph.operations):
            _LOWER[type(operation)](self, operation)
        assert graph.logits is not None
        self._intervals[graph.logits.buffer].last = len(graph.operations)
        self.scratch_bytes = plan_offsets(list(self._intervals.values()))
        self.scratch = self.layout.reserve(self.scratch_bytes)
        self.logits = self.scratch + self._intervals[graph.logits.buffer].offset
        self.n_vocab = graph.logits.width
        self.n_embeddings = next(op.table.n_rows for op in graph.operations if isinstance(op, ops.Embed))

    @property
    def needs_cpu(self) -> bool:
        """Return whether some experts have no slot."""
        return any(not layer.is_resident for layer in self.expert_layers)

    def launches(self, base: int, most: int, exchange: Exchange | None) -> list[Launch]:
        """Return the launches of a step of at most `most` tokens, for an allocation that begins at `base`."""
        made = Pass(self, most, base, exchange)
        launches = [launch for call in self._calls for launch in call(made)]
        if exchange is not None:
            launches.append(kernels.publish_end(exchange))
        return launches

    # -- memory ------------------------------------------------------------------------------------------------------

    def _reserve_state(self, graph: Graph) -> None:
        limits = self.limits
        for cache in graph.kv_caches:
            self._offsets[cache] = self.layout.reserve(kernels.kv_cache_bytes(self._cache(cache, 0)))
            self.states.append((cache, self._offsets[cache]))
        for state in graph.states:
            self._offsets[state] = self.layout.reserve(state.width * 4 * limits.n_slots)
            self.states.append((state, self._offsets[state]))

    def _cache(self, cache: ops.KVCache, address: int) -> Cache:
        limits = self.limits
        return Cache(
            address,
            limits.kv_type,
            limits.n_slots,
            limits.context_length,
            cache.n_kv_heads,
            cache.head_dim,
            cache.value_dim,
            cache.values_in_keys,
        )

    def _interval(self, key: object, n_bytes: int) -> Interval:
        interval = self._intervals.setdefault(key, Interval(n_bytes, self._index, self._index))
        interval.last = self._index
        return interval

    def _use(self, tensor: Tensor) -> Place:
        """Note that the operation at hand uses a tensor."""
        width = tensor.buffer.width
        return Place(self._interval(tensor.buffer, self.limits.max_tokens * width * 4), tensor.offset * 4, width)

    def _temporary(self, n_bytes: int) -> Place:
        """Reserve memory for the operation at hand only."""
        return Place(self._interval(object(), n_bytes), 0, 0)

    def _activations(self, x: Tensor, activation: Activation) -> Place:
        """Say where x lies in the form that a weight format takes, after recording the conversion if there is none."""
        if activation == Activation.F32:
            place = self._use(x)
            return Place(place.interval, place.offset, place.stride * 4)
        row_bytes = kernels.activation_bytes(activation, x.width)
        key = (x.buffer, x.offset, x.width, activation)
        is_new = key not in self._intervals
        converted = Place(self._interval(key, self.limits.max_tokens * row_bytes), 0, row_bytes)
        if is_new:
            source, width, rows = self._use(x), x.width, x.rows
            self._calls.append(
                lambda p: [
                    kernels.quantize(
                        p.rows(source),
                        width,
                        activation,
                        p.rows(converted),
                        1,
                        p.count(rows),
                    )
                ]
            )
        return converted

    def _constant(self, key: object, make: Callable[[], npt.NDArray[np.generic]]) -> int:
        """Return the offset of values that are uploaded once."""
        if key not in self._offsets:
            values = make()
            self._offsets[key] = self.layout.reserve(values.nbytes)
            self.uploads.append((self._offsets[key], values))
        return self._offsets[key]

    def values(self, vector: Vector) -> npt.NDArray[np.float32]:
        """Return float32 values, whatever the file stores."""
        raw = self._weights.array(vector.name).reshape(1, -1)
        stored = _kernels.dequantize(vector.format.ggml_type, raw, vector.stored_size or vector.size)
        return stored.reshape(-1)[vector.first : vector.first + vector.size]

    def _vector(self, vector: Vector | None) -> int | None:
        """Return the offset of float32 values; None for None."""
        if vector is None:
            return None
        values = vector
        return self._constant((vector.name, vector.first, vector.size), lambda: self.values(values))

    def _matrix(self, weight: Weight) -> int:
        """Return the offset of a matrix that always stays on the device."""
        first = self._constant(weight.name, lambda: self._weights.array(weight.name))
        return first + weight.first_row * weight.format.row_bytes(weight.n_cols)

    def _grid(self, weight_format: QuantFormat) -> int | None:
        """Return the offset of an IQ format's code book."""
        name = "IQ1_S" if weight_format.name == "IQ1_M" else weight_format.name
        return self._constant(("grid", name), lambda: load_grid(name)) if name in GRID_NAMES else None

    # -- operations --------------------------------------------------------------------------------------------------

    def _embed(self, op: ops.Embed) -> None:
        out, table, matrix, grid = self._use(op.out), op.table, self._matrix(op.table), self._grid(op.table.format)
        self._calls.append(
            lambda p: [
                kernels.embed(
                    p.base + matrix,
                    table.format,
                    p.base + self.step.token_ids,
                    table.n_rows,
                    table.n_cols,
                    p.at(grid),
                    p.rows(out),
                    op.scale,
                    p.count(op.out.rows),
                )
            ]
        )

    def _rms_norm(self, op: ops.RMSNorm) -> None:
        x, out, weight, size = self._use(op.x), self._use(op.out), self._vector(op.weight), op.group_size
        self._calls.append(
            lambda p: [
                kernels.rms_norm(
                    p.rows(x),
                    p.at(weight),
                    p.rows(out),
                    op.x.width // size,
                    size,
                    op.eps,
                    p.count(op.x.rows),
                )
            ]
        )

    def _linear(self, op: ops.Linear) -> None:
        groups: dict[QuantFormat, list[int]] = {}
        for i, weight in enumerate(op.weights):
            groups.setdefault(weight.format, []).append(i)
        outs = [self._use(out) for out in op.outs]
        for weight_format, members in groups.items():
            for first in range(0, len(members), kernels.MAX_MATRICES):
                self._linear_launch(op, weight_format, members[first : first + kernels.MAX_MATRICES], outs)

    def _linear_launch(self, op: ops.Linear, weight_format: QuantFormat, members: list[int], outs: list[Place]) -> None:
        x, grid = self._activations(op.x, weight_format.activation), self._grid(weight_format)
        parts = [
            (
                self._matrix(op.weights[i]),
                op.weights[i].n_rows,
                outs[i],
                self._vector(op.biases[i]),
                self._vector(op.weights[i].scale),
            )
            for i in members
        ]
        self._calls.append(
            lambda p: [
                kernels.linear(
                    p.rows(x),
                    op.x.width,
                    weight_format,
                    [
                        Matrix(p.base + matrix, n, p.rows(out), p.at(bias), p.at(scale))
                        for matrix, n, out, bias, scale in parts
                    ],
                    p.at(grid),
                    p.count(op.x.rows),
                )
            ]
        )

    def _head_linear(self, op: ops.HeadLinear) -> None:
        weight, n = op.weight, op.weight.n_experts
        row_bytes, activation = weight.format.row_bytes(weight.n_cols), weight.format.activation
        matrix, grid, scale, out = (
            self._matrix(weight),
            self._grid(weight.format),
            self._vector(weight.scale),
            self._use(op.out),
        )
        x, rows = self._use(op.x), op.x.rows
        assert (op.x.offset, op.x.width) == (0, op.x.buffer.width), "heads stand in rows of their own"
        if activation == Activation.F32:
            converted, x_bytes = Place(x.interval, x.offset, x.stride * 4), weight.n_cols * 4
        else:
            x_bytes = kernels.activation_bytes(activation, weight.n_cols)
            converted = self._temporary(self.limits.max_tokens * n * x_bytes)
            converted.stride = n * x_bytes

        def launches(p: Pass) -> Iterable[Launch]:
            if activation != Activation.F32:
                heads, to = Rows(p.rows(x).address, weight.n_cols), Rows(p.rows(converted).address, x_bytes)
                yield kernels.quantize(heads, weight.n_cols, activation, to, n, p.count(rows))
            yield kernels.linear(
                p.rows(converted),
                weight.n_cols,
                weight.format,
                [Matrix(p.base + matrix, weight.n_rows, p.rows(out), 0, p.at(scale))],
                p.at(grid),
                p.count(rows),
                Heads(n, (weight.stored_rows or weight.n_rows) * row_bytes, x_bytes),
            )

        self._calls.append(launches)

    def _scale(self, op: ops.Scale) -> None:
        x, out, by = self._use(op.x), self._use(op.out), self._use(op.by) if op.by else None
        self._calls.append(
            lambda p: [
                kernels.scale(
                    p.rows(x), op.factor, p.rows(by) if by else None, p.rows(out), op.x.width, p.count(op.x.rows)
                )
            ]
        )

    def _scale_by_position(self, op: ops.ScaleByPosition) -> None:
        x = self._use(op.x)
        self._calls.append(
            lambda p: [
                kernels.scale_by_position(
                    p.rows(x), p.base + self.step.positions, op.x.width, op.period, op.slope, p.count(op.x.rows)
                )
            ]
        )

    def _add(self, op: ops.Add) -> None:
        a, b, out = self._use(op.a), self._use(op.b), self._use(op.out)
        self._calls.append(lambda p: [kernels.add(p.rows(a), p.rows(b), p.rows(out), op.a.width, p.count(op.a.rows))])

    def _gate(self, op: ops.Gate) -> None:
        x, by, out = self._use(op.x), self._use(op.gate), self._use(op.out)
        self._calls.append(
            lambda p: [kernels.gate(p.rows(x), p.rows(by), p.rows(out), op.x.width, op.gating, p.count(op.x.rows))]
        )

    def _split_heads(self, op: ops.SplitHeads) -> None:
        x, first, second = self._use(op.x), self._use(op.first), self._use(op.second)
        dims = (op.first.width // op.n_heads, op.second.width // op.n_heads)
        self._calls.append(
            lambda p: [
                kernels.split_heads(p.rows(x), p.rows(first), p.rows(second), op.n_heads, *dims, p.count(op.x.rows))
            ]
        )

    def _join_heads(self, op: ops.JoinHeads) -> None:
        first, second, out = self._use(op.first), self._use(op.second), self._use(op.out)
        dims = (op.first.width // op.n_heads, op.second.width // op.n_heads)
        self._calls.append(
            lambda p: [
                kernels.join_heads(p.rows(first), p.rows(second), p.rows(out), op.n_heads, *dims, p.count(op.out.rows))
            ]
        )

    def _rope(self, op: ops.Rope) -> None:
        x = self._use(op.x)
        divided = op.frequencies if op.divisors is None else op.frequencies / self.values(op.divisors)
        values = np.ascontiguousarray(divided, np.float32)
        frequencies = self._constant(("frequencies", values.tobytes()), lambda: values)
        self._calls.append(
            lambda p: [
                kernels.rope(
                    p.rows(x),
                    p.base + self.step.positions,
                    p.base + frequencies,
                    op.n_heads,
                    op.head_dim,
                    2 * len(values),
                    op.style,
                    op.magnitude,
                    p.count(op.x.rows),
                )
            ]
        )

    def _attention(self, op: ops.Attention) -> None:
        q, k, out, sinks = self._use(op.q), self._use(op.k), self._use(op.out), self._vector(op.sinks)
        v = self._use(op.v) if op.v else None
        sizes = kernels.attention_scratch_bytes(self._cache(op.cache, 0), op.n_heads, self.limits.max_tokens)
        values, parts = (self._temporary(n_bytes) for n_bytes in sizes)
        self._calls.append(
            lambda p: kernels.attention(
                p.rows(q),
                p.rows(k),
                p.rows(v) if v else None,
                p.rows(out),
                self._cache(op.cache, p.base + self._offsets[op.cache]),
                op.n_heads,
                op.scale,
                Sight(p.at(sinks), op.window, op.chunk),
                p.rows(values).address,
                p.rows(parts).address,
                p.base + self.step.positions,
                p.base + self.step.slots,
                p.count(op.q.rows),
            )
        )

    def _causal_conv(self, op: ops.CausalConv) -> None:
        x, out, weight = self._use(op.x), self._use(op.out), self._vector(op.weight)
        self._calls.append(
            lambda p: [
                kernels.causal_conv(
                    p.rows(x),
                    p.at(weight),
                    p.base + self._offsets[op.state],
                    p.rows(out),
                    op.x.width,
                    op.kernel_size,
                    p.base + self.step.positions,
                    p.base + self.step.slots,
                    p.count(op.x.rows),
                )
            ]
        )

    def _delta_net(self, op: ops.DeltaNet) -> None:
        q, k, v, out = self._use(op.q), self._use(op.k), self._use(op.v), self._use(op.out)
        beta, alpha = self._use(op.beta), self._use(op.alpha)
        a, dt_bias = self._vector(op.a), self._vector(op.dt_bias)
        assert q.stride == k.stride == v.stride
        self._calls.append(
            lambda p: [
                kernels.delta_net(
                    p.rows(q).address,
                    p.rows(k).address,
                    p.rows(v).address,
                    q.stride,
                    p.rows(beta),
                    p.rows(alpha),
                    p.at(a),
                    p.at(dt_bias),
                    p.base + self._offsets[op.state],
                    p.rows(out),
                    op.n_k_heads,
                    op.n_v_heads,
                    op.k.width // op.n_k_heads,
                    op.v.width // op.n_v_heads,
                    op.grouped,
                    op.eps,
                    p.base + self.step.positions,
                    p.base + self.step.slots,
                    p.count(op.q.rows),
                )
            ]
        )

    # -- experts -----------------------------------------------------------------------------------------------------

    def _ids(self, routing: Routing, p: Pass) -> int:
        """Return the address of the ids of a layer, which are kept for the caller; rows as they are in this pass."""
        index = self._routing_index[routing.ids.buffer]
        return p.base + self.routing_offset + 4 * index * p.most * self.n_used

    def _slots(self, routing: Routing, p: Pass) -> int:
        return p.base + self.expert_table + 4 * self._routing_index[routing.ids.buffer] * self.n_experts

    def _router(self, op: ops.Router) -> None:
        logits, weights, bias = self._use(op.logits), self._use(op.out.weights), self._vector(op.bias)
        assert op.out.ids.width == self.n_used, "layers that use different numbers of experts"
        self._calls.append(
            lambda p: [
                kernels.router(
                    p.rows(logits),
                    p.at(bias),
                    self._ids(op.out, p),
                    p.rows(weights).address,
                    op.out.n_experts,
                    op.out.ids.width,
                    op.scoring,
                    op.n_groups,
                    op.n_groups_used,
                    op.normalize,
                    op.scale,
                    p.count(op.logits.rows),
                )
            ]
        )

    def _experts(self, op: ops.Experts) -> None:
        number = len(self.expert_layers)
        layer = ExpertLayer(op, self._n_slots[number])
        self.expert_layers.append(layer)
        for weight in layer.weights:
            n_bytes = weight.n_rows * weight.format.row_bytes(weight.n_cols)
            layer.slot_bytes.append(-(-n_bytes // _ALIGNMENT) * _ALIGNMENT)
            layer.slots.append(self.layout.reserve(layer.slot_bytes[-1] * layer.n_slots))
        factors = [(self._vector(w.scale), self._vector(b)) for w, b in zip(layer.weights, layer.biases, strict=True)]
        grids = [self._grid(weight.format) for weight in layer.weights]

        x = self._use(op.x)
        x_gate, x_up = (self._activations(op.x, weight.format.activation) for weight in layer.weights[:2])
        out = self._use(op.out)
        n_used, ffn_size, hidden_size = op.routing.ids.width, op.gate.n_rows, op.x.width
        h = self._temporary(self.limits.max_tokens * n_used * ffn_size * 4)
        h.stride = ffn_size
        form = op.down.format.activation
        if form == Activation.F32:
            h_in_form = Place(h.interval, 0, ffn_size * 4)
        else:
            row_bytes = kernels.activation_bytes(form, ffn_size)
            h_in_form = self._temporary(self.limits.max_tokens * n_used * row_bytes)
            h_in_form.stride = row_bytes

        def launches(p: Pass) -> Iterable[Launch]:
            ids, slots, count = self._ids(op.routing, p), self._slots(op.routing, p), p.count(op.x.rows)
            gate, up, down = (
                ExpertMatrix(p.base + offset, slot_bytes, weight.format, p.at(scale), p.at(bias))
                for offset, slot_bytes, weight, (scale, bias) in zip(
                    layer.slots, layer.slot_bytes, layer.weights, factors, strict=True
                )
            )
            if p.exchange is not None and not layer.is_resident:  # before our share, so that both work at the same time
                yield kernels.publish_misses(ids, slots, n_used, p.rows(x), hidden_size, p.exchange, number, count)
            if layer.n_slots == 0:
                return
            yield kernels.expert_gate_up(
                ids,
                slots,
                n_used,
                gate,
                up,
                p.rows(x_gate),
                p.rows(x_up),
                hidden_size,
                ffn_size,
                p.rows(h).address,
                (p.at(grids[0]), p.at(grids[1])),
                op.activation,
                count,
            )
            if form != Activation.F32:
                yield kernels.quantize(p.rows(h), ffn_size, form, p.rows(h_in_form), n_used, count)
            yield kernels.expert_down(
                ids,
                slots,
                n_used,
                down,
                p.rows(h_in_form),
                hidden_size,
                ffn_size,
                p.rows(out),
                p.at(grids[2]),
                count,
            )

        self._calls.append(launches)

    def _combine(self, op: ops.Combine) -> None:
        expert_out, weights = self._use(op.expert_out), self._use(op.routing.weights)
        residual, out = self._use(op.residual), self._use(op.out)
        shared = self._use(op.shared) if op.shared else None
        shared_gate = self._use(op.shared_gate) if op.shared_gate else None
        number = self._routing_index[op.routing.ids.buffer]

        def launches(p: Pass) -> Iterable[Launch]:
            answers = 0
            if p.exchange is not None and not self.expert_layers[number].is_resident:
                answers = p.exchange.answers
                yield kernels.await_answer(p.exchange, number)
            yield kernels.combine(
                p.rows(expert_out),
                answers,
                self._ids(op.routing, p),
                self._slots(op.routing, p),
                p.rows(weights).address if op.weighted else 0,
                op.routing.ids.width,
                p.rows(shared) if shared else None,
                p.rows(shared_gate) if shared_gate else None,
                p.rows(residual),
                p.rows(out),
                op.residual.width,
                op.scale,
                p.count(op.residual.rows),
            )

        self._calls.append(launches)

    def _select_outputs(self, op: ops.SelectOutputs) -> None:
        x, out = self._use(op.x), self._use(op.out)
        self._calls.append(
            lambda p: [
                kernels.select_outputs(
                    p.rows(x),
                    p.base + self.step.output_rows,
                    p.rows(out),
                    op.x.width,
                    p.count(op.out.rows),
                )
            ]
        )


_LOWER: dict[type[ops.Operation], Callable[[Lowering, Any], None]] = {
    ops.Embed: Lowering._embed,
    ops.RMSNorm: Lowering._rms_norm,
    ops.Linear: Lowering._linear,
    ops.HeadLinear: Lowering._head_linear,
    ops.Scale: Lowering._scale,
    ops.ScaleByPosition: Lowering._scale_by_position,
    ops.Add: Lowering._add,
    ops.Gate: Lowering._gate,
    ops.SplitHeads: Lowering._split_heads,
    ops.JoinHeads: Lowering._join_heads,
    ops.Rope: Lowering._rope,
    ops.Attention: Lowering._attention,
    ops.CausalConv: Lowering._causal_conv,
    ops.DeltaNet: Lowering._delta_net,
    ops.Router: Lowering._router,
    ops.Experts: Lowering._experts,
    ops.Combine: Lowering._combine,
    ops.SelectOutputs: Lowering._select_outputs,
}
