"""Turns a recorded forward pass into kernel launches with fixed addresses.

The first pass walks the operations in order: it reserves device memory for weights, caches and states, notes when each
result is first made and last used, and puts activations into the forms that the weight formats take (once for each
form, however many matrices read them). The second makes the launches, for steps of at most some number of rows; a
program has such a list for each of some sizes of steps, over the same memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices import graph as ops
from engine.devices.cuda import attention, elementwise, fusion, kernels, recurrent, tiles
from engine.devices.cuda.attention import Cache
from engine.devices.cuda.expert_layers import ExpertLayer, Staging, Streamed, place_kept, place_lent
from engine.devices.cuda.kernels import Asked, Combined, Exchange, Forms, GateOf, Routed
from engine.devices.cuda.launch import MAX_MATRICES, NOTHING, PADDING, Count, ExpertMatrix, Heads, Launch, Matrix, Rows
from engine.devices.cuda.scratch import Need, Scratch
from engine.devices.cuda.sequence_state import Owners
from engine.devices.cuda.tiles import Groups, Sizes
from engine.devices.graph import Graph, Limits, Routing, Tensor, Vector, Weight, WeightAccess
from engine.quants.formats import Activation, QuantFormat
from engine.quants.grids import GRID_NAMES, load_grid

_ALIGNMENT = 256


class Layout:
    """Hands out places in one device allocation that does not exist yet."""

    def __init__(self) -> None:
        self.n_bytes = _ALIGNMENT  # weight matrices need some bytes before them, see `launch.PADDING`

    def reserve(self, n_bytes: int) -> int:
        """Return the offset of a new place, with some bytes of nothing behind it."""
        offset = self.n_bytes
        self.n_bytes += reserved_bytes(n_bytes)
        return offset


def reserved_bytes(n_bytes: int) -> int:
    """Return what a place of so many bytes takes in all."""
    return -(-(n_bytes + PADDING) // _ALIGNMENT) * _ALIGNMENT


@dataclass(slots=True)
class Place:
    """Where a tensor lies in what is kept of it in scratch memory."""

    need: Need
    offset: int
    stride: int  # values from one row to the next, or bytes for activation rows


@dataclass(slots=True)
class Finish:
    """A launch that makes float32 rows, and beside them those activation rows that are asked for later.

    Attributes:
        index: of the operation that it is part of.
        forms: where they go.
    """

    index: int
    forms: dict[Activation, Place] = field(default_factory=dict)

    def at(self, p: Pass) -> Forms:
        """Return the addresses."""
        places = (self.forms.get(form) for form in (Activation.Q8_256, Activation.Q8_32))
        return Forms(*(p.rows(place) if place else None for place in places))


@dataclass(frozen=True, slots=True)
class Pass:
    """One list of launches under construction: for steps of at most `most` rows.

    Attributes:
        lowering: where everything lies in the device allocation.
        most: rows.
        base: address of the allocation.
        exchange: memory shared with the CPU, None if it computes no experts.
        streams: experts without a slot pass through the staging buffers.
    """

    lowering: Lowering
    most: int
    base: int
    exchange: Exchange | None
    streams: bool

    def count(self, rows: ops.Rows) -> Count:
        """Return how many rows an operation has."""
        return Count(self.base + self.lowering.step.n_rows[rows], min(self.most, self.lowering.limits.most(rows)))

    def linear(self, weight_format: QuantFormat) -> Callable[..., Launch]:
        """Return what multiplies matrices of a format with the rows of a step."""
        return tiles.linear_for(weight_format, self.most)

    def rows(self, place: Place) -> Rows:
        """Return the rows of a tensor."""
        scratch = self.lowering.scratch_of(self.most)
        return Rows(self.base + scratch.offset_of(place.need) + place.offset, place.stride)

    def at(self, offset: int | None) -> int:
        """Return the address of something that may not exist: 0 then."""
        return 0 if offset is None else self.base + offset


RoutedOf: TypeAlias = tuple[int, Callable[[Pass], Routed | None]]
"""Which of some products gives the logits of a router, and the choice that is made with it, if it is."""


@dataclass(frozen=True, slots=True)
class SharedLaunches:
    """A shared expert: its matrices and where its result goes, and the launches that compute it alone."""

    matrices: Callable[[Pass], tuple[list[ExpertMatrix], Rows]]
    plain: Callable[[Pass], Iterable[Launch | Streamed]]


Summands: TypeAlias = Callable[[Pass], tuple[Rows, Rows | Combined | None, Rows]]
"""Gives what is added to the residual stream, what to it, and where the sum goes."""


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
        self,
        graph: Graph,
        weights: WeightAccess,
        limits: Limits,
        n_slots: Sequence[int] | None = None,
        n_kept: Sequence[int] | None = None,
        staging: Staging | None = None,
    ) -> None:
        """Plan the memory.

        Args:
            graph: the forward pass.
            weights: of the model.
            limits: of a step.
            n_slots: expert slots of each MoE layer; None for none anywhere.
            n_kept: how many of them exist in long steps, too; None for all.
            staging: the ring for those steps, without which there are none.
        """
        self.limits = limits
        self.staging = staging
        self.layout = Layout()
        self.step = StepLayout(self.layout, limits.max_tokens)
        self.uploads: list[tuple[int, npt.NDArray[np.generic]]] = []  # offset, contents
        self.expert_layers: list[ExpertLayer] = []
        self.states: Owners = []
        self._weights = weights
        self._offsets: dict[object, int] = {}  # of weights, vectors, tables, caches and states
        self._needs: dict[object, Need] = {}
        self._calls: list[Callable[[Pass], Iterable[Launch | Streamed]]] = []
        self._finishes: dict[tuple[object, int, int], Finish] = {}  # by buffer, offset and width of what they make
        self._asks_early: dict[object, Callable[[Pass], bool]] = {}  # by the ids: whether the choice asked the CPU
        self._index = 0

        layers = [op for op in graph.operations if isinstance(op, ops.Experts)]
        self._n_slots = [0] * len(layers) if n_slots is None else list(n_slots)
        self._n_kept = self._n_slots if n_kept is None else list(n_kept)
        assert len(self._n_slots) == len(self._n_kept) == len(layers)
        assert staging is not None or self._n_kept == self._n_slots
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
        self._lower(graph.operations)
        assert graph.logits is not None
        self._logits = self._needs[graph.logits.buffer]
        self._logits.last = len(graph.operations)
        self._place_scratch_and_slots()
        self.n_vocab = graph.logits.width
        self.n_embeddings = next(op.table.n_rows for op in graph.operations if isinstance(op, ops.Embed))

    def scratch_of(self, most: int) -> Scratch:
        """Return where the results of a step of at most so many tokens lie."""
        return self.scratch if self.staging is None or most < self.staging.lends_from else self.long_scratch

    def logits(self, most: int) -> int:
        """Return where a step of at most so many tokens leaves its logits."""
        return self.scratch_of(most).offset_of(self._logits)

    def scratch_for(self, limits: Limits) -> Scratch:
        """Return a plan of the intermediate results of steps within some limits, which lies nowhere yet."""
        return Scratch(self._needs.values(), limits)

    def _lower(self, operations: Sequence[ops.Operation]) -> None:
        """Record every operation; some together with those around them."""
        for self._index, item in fusion.fused(operations):
            _LOWER[type(item)](self, item)

    @property
    def needs_cpu(self) -> bool:
        """Return whether some experts have no slot."""
        return any(not layer.is_resident for layer in self.expert_layers)

    @property
    def can_stream(self) -> bool:
        """Return whether long steps may bring the experts that have no slot to the device."""
        formats = [weight.format for layer in self.expert_layers for weight in layer.weights]
        return self.needs_cpu and all(tiles.has_integer_form(f) for f in formats)

    def launches(self, base: int, most: int, exchange: Exchange | None) -> list[Launch]:
        """Return the launches of a step of at most `most` tokens, for an allocation that begins at `base`."""
        launches = self._launches(Pass(self, most, base, exchange, streams=False))
        if exchange is not None:
            launches.append(kernels.publish_end(exchange))
        return [launch for launch in launches if isinstance(launch, Launch)]

    def streaming_launches(self, base: int, most: int) -> list[Launch | Streamed]:
        """Return the launches of a step that brings experts without a slot to the device, for at least some tokens."""
        assert self.staging is not None
        assert most >= tiles.MIN_TOKENS
        return self._launches(Pass(self, most, base, None, streams=True))

    def _launches(self, made: Pass) -> list[Launch | Streamed]:
        return [launch for call in self._calls for launch in call(made)]

    # -- memory ------------------------------------------------------------------------------------------------------

    def _place_scratch_and_slots(self) -> None:
        """Lay out what comes after weights and states.

        Behind the kept slots lies memory that is used in two ways: by lent slots, and the intermediate results of short
        steps; or by those of long steps, and their ring.
        """
        layout, layers, staging = self.layout, self.expert_layers, self.staging
        layout.n_bytes = shared = place_kept(layers, layout.n_bytes)
        self.staging_offset = self.staging_buffer_bytes = 0
        if staging is None:
            self.scratch = self.long_scratch = self.scratch_for(self.limits)
            self.scratch.offset = layout.reserve(self.scratch.n_bytes)
            return
        self.long_scratch = self.scratch_for(self.limits)
        self.long_scratch.offset = layout.reserve(self.long_scratch.n_bytes)
        self.staging_buffer_bytes = max(layer.batch_bytes(staging.at_once) for layer in layers)
        self.staging_offset = layout.reserve(self.staging_buffer_bytes * staging.n_buffers)
        self.scratch = self.scratch_for(self.limits.up_to(staging.lends_from - 1))
        n_bytes = reserved_bytes(self.scratch.n_bytes)
        self.scratch.offset = max(place_lent(layers, shared) + reserved_bytes(0), layout.n_bytes - n_bytes)
        layout.n_bytes = self.scratch.offset + n_bytes

    def _reserve_state(self, graph: Graph) -> None:
        limits = self.limits
        for cache in graph.kv_caches:
            self._offsets[cache] = self.layout.reserve(self._cache(cache, 0).n_bytes)
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

    def _need(self, key: object, n_bytes: Callable[[Limits], int]) -> Need:
        """Note that the operation at hand makes or uses a result."""
        need = self._needs.setdefault(key, Need(n_bytes, self._index, self._index))
        need.last = self._index
        return need

    def _use(self, tensor: Tensor) -> Place:
        """Note that the operation at hand uses a tensor."""
        rows, width = tensor.rows, tensor.buffer.width
        need = self._need(tensor.buffer, lambda limits: limits.most(rows) * width * 4)
        return Place(need, tensor.offset * 4, width)

    def _temporary(self, n_bytes: Callable[[int], int], stride: int = 0) -> Place:
        """Reserve memory for the operation at hand only; n_bytes: for a number of tokens."""
        return Place(self._need(object(), lambda limits: n_bytes(limits.max_tokens)), 0, stride)

    def _temporaries(self, n_bytes: Callable[[int], Sequence[int]]) -> list[Place]:
        """Reserve memory for several things that the operation at hand needs; n_bytes: of each."""

        def one(i: int) -> Place:
            return self._temporary(lambda n_tokens: n_bytes(n_tokens)[i])

        return [one(i) for i in range(len(n_bytes(1)))]

    def _activations(self, x: Tensor, activation: Activation) -> Place:
        """Say where x lies in the form that a weight format takes, after recording the conversion if there is none."""
        if activation == Activation.F32:
            place = self._use(x)
            return Place(place.need, place.offset, place.stride * 4)
        row_bytes = kernels.activation_bytes(activation, x.width)
        key = (x.buffer, x.offset, x.width, activation)
        is_new, finish, rows = key not in self._needs, self._finishes.get(key[:3]), x.rows
        converted = Place(self._need(key, lambda limits: limits.most(rows) * row_bytes), 0, row_bytes)
        if is_new and finish is not None:
            converted.need.first = finish.index
            finish.forms[activation] = converted
        elif is_new:
            source, width = self._use(x), x.width
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

    def vector_offset(self, name: str, size: int) -> int:
        """Return where the `size` values of a whole vector are."""
        return self._offsets[name, 0, size]

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
                elementwise.embed(
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

    def _finish(self, out: Tensor) -> Finish:
        """Note that the operation at hand can make activation rows of `out`, too."""
        return self._finishes.setdefault((out.buffer, out.offset, out.width), Finish(self._index))

    def _recorded(self, *records: Callable[[], None]) -> Callable[[Pass], Iterable[Launch | Streamed]]:
        """Return the launches that some recordings would add, without adding them."""
        calls, self._calls = self._calls, []
        for record in records:
            record()
        recorded, self._calls = self._calls, calls
        return lambda p: (launch for call in recorded for launch in call(p))

    def _rms_norm(self, op: ops.RMSNorm) -> None:
        if fusion.is_of_row(op, op.x):
            self._residual(None, op)
            return
        x, out, weight, size = self._use(op.x), self._use(op.out), self._vector(op.weight), op.group_size
        self._calls.append(
            lambda p: [
                elementwise.rms_norm(
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

    def _residual(self, before: fusion.Sum | None, norm: ops.RMSNorm | None) -> None:
        """Record a sum into the residual stream, a norm of a whole row, or both as one."""
        tensor = before.out if before else norm.x if norm else None
        assert tensor is not None
        source = self._sum(before) if before else self._no_sum(tensor)
        out, weight = (self._use(norm.out), self._vector(norm.weight)) if norm else (None, None)
        finish = self._finish(norm.out) if norm else Finish(self._index)

        self._calls.append(
            lambda p: [
                kernels.residual(
                    *source(p),
                    tensor.width,
                    p.count(tensor.rows),
                    p.at(weight),
                    norm.eps if norm else 0.0,
                    p.rows(out) if out else None,
                    finish.at(p),
                )
            ]
        )

    def _no_sum(self, x: Tensor) -> Summands:
        """Return what gives a tensor as it is."""
        place = self._use(x)
        return lambda p: (p.rows(place), None, NOTHING)

    def _sum(self, op: fusion.Sum) -> Summands:
        """Return what gives the summands and the place of their sum."""
        total = self._use(op.out)
        if isinstance(op, ops.Add):
            a, b = self._use(op.a), self._use(op.b)
            return lambda p: (p.rows(a), p.rows(b), p.rows(total))
        expert_out, weights, residual = (self._use(t) for t in (op.expert_out, op.routing.weights, op.residual))
        shared = self._use(op.shared) if op.shared else None
        shared_gate = self._use(op.shared_gate) if op.shared_gate else None

        def combined(p: Pass) -> tuple[Rows, Combined, Rows]:
            return (
                p.rows(residual),
                Combined(
                    p.rows(expert_out),
                    self._exchange(op.routing, p),
                    self._ids(op.routing, p),
                    self._slots(op.routing, p),
                    p.rows(weights).address if op.weighted else 0,
                    op.routing.ids.width,
                    p.rows(shared) if shared else None,
                    p.rows(shared_gate) if shared_gate else None,
                    op.scale,
                ),
                p.rows(total),
            )

        return combined

    def _linear(self, op: ops.Linear, routed: RoutedOf | None = None) -> None:
        """Record products; `routed` gives the choice that is made with those of one format."""
        groups: dict[QuantFormat, list[int]] = {}
        for i, weight in enumerate(op.weights):
            groups.setdefault(weight.format, []).append(i)
        outs = [self._use(out) for out in op.outs]
        for weight_format, members in groups.items():
            for first in range(0, len(members), MAX_MATRICES):
                own = members[first : first + MAX_MATRICES]
                chosen = routed if routed is not None and routed[0] in own else None
                self._linear_launch(op, weight_format, own, outs, chosen)

    def _linear_launch(
        self,
        op: ops.Linear,
        weight_format: QuantFormat,
        members: list[int],
        outs: list[Place],
        routed: RoutedOf | None,
    ) -> None:
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

        def launches(p: Pass) -> Iterable[Launch]:
            matrices = [
                Matrix(p.base + matrix, n, p.rows(out), p.at(bias), p.at(scale))
                for matrix, n, out, bias, scale in parts
            ]
            what = (p.rows(x), op.x.width, weight_format, matrices, p.at(grid), p.count(op.x.rows))
            choice = routed[1](p) if routed is not None else None
            yield p.linear(weight_format)(*what) if choice is None else kernels.linear(*what, routed=choice)

        self._calls.append(launches)

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
            converted, x_bytes = Place(x.need, x.offset, x.stride * 4), weight.n_cols * 4
        else:
            x_bytes = kernels.activation_bytes(activation, weight.n_cols)
            stride = n * x_bytes
            converted = self._temporary(lambda n_tokens: n_tokens * stride, stride)

        def launches(p: Pass) -> Iterable[Launch]:
            if activation != Activation.F32:
                heads, to = Rows(p.rows(x).address, weight.n_cols), Rows(p.rows(converted).address, x_bytes)
                yield kernels.quantize(heads, weight.n_cols, activation, to, n, p.count(rows))
            yield p.linear(weight.format)(
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
                elementwise.scale(
                    p.rows(x), op.factor, p.rows(by) if by else None, p.rows(out), op.x.width, p.count(op.x.rows)
                )
            ]
        )

    def _scale_by_position(self, op: ops.ScaleByPosition) -> None:
        x = self._use(op.x)
        self._calls.append(
            lambda p: [
                elementwise.scale_by_position(
                    p.rows(x), p.base + self.step.positions, op.x.width, op.period, op.slope, p.count(op.x.rows)
                )
            ]
        )

    def _gate(self, op: ops.Gate, norm: ops.RMSNorm | None = None) -> None:
        """Record a gate, with the norm of the heads before it if there is one."""
        x, by, out = self._use(norm.x if norm else op.x), self._use(op.gate), self._use(op.out)
        weight, finish = self._vector(norm.weight) if norm else None, self._finish(op.out)
        self._calls.append(
            lambda p: [
                kernels.gate(
                    p.rows(x),
                    GateOf(op.gating, p.rows(by), op.x.width, op.x.width),
                    p.rows(out),
                    op.x.width,
                    p.count(op.x.rows),
                    finish.at(p),
                    norm.group_size if norm else 0,
                    p.at(weight),
                    norm.eps if norm else 0.0,
                )
            ]
        )

    def _split_heads(self, op: ops.SplitHeads) -> None:
        x, first, second = self._use(op.x), self._use(op.first), self._use(op.second)
        dims = (op.first.width // op.n_heads, op.second.width // op.n_heads)
        self._calls.append(
            lambda p: [
                elementwise.split_heads(p.rows(x), p.rows(first), p.rows(second), op.n_heads, *dims, p.count(op.x.rows))
            ]
        )

    def _join_heads(self, op: ops.JoinHeads) -> None:
        first, second, out = self._use(op.first), self._use(op.second), self._use(op.out)
        dims = (op.first.width // op.n_heads, op.second.width // op.n_heads)
        self._calls.append(
            lambda p: [
                elementwise.join_heads(
                    p.rows(first), p.rows(second), p.rows(out), op.n_heads, *dims, p.count(op.out.rows)
                )
            ]
        )

    def _frequencies(self, op: ops.Rope) -> tuple[int, int]:
        """Return the offset of a rotation's frequencies, and how many values of a head turn."""
        with np.errstate(all="ignore"):  # a damaged file may hold zeros; its text is then as damaged
            divided = op.frequencies if op.divisors is None else op.frequencies / self.values(op.divisors)
        values = np.ascontiguousarray(divided, np.float32)
        return self._constant(("frequencies", values.tobytes()), lambda: values), 2 * len(values)

    def _rope(self, op: ops.Rope) -> None:
        x, (frequencies, n_rot) = self._use(op.x), self._frequencies(op)
        self._calls.append(
            lambda p: [
                elementwise.rope(
                    p.rows(x),
                    p.base + self.step.positions,
                    p.base + frequencies,
                    op.n_heads,
                    op.head_dim,
                    n_rot,
                    op.style,
                    op.magnitude,
                    p.count(op.x.rows),
                )
            ]
        )

    def _attention(self, item: fusion.Attention) -> None:
        """Record attention with what makes its inputs ready, and the gate behind it."""
        op, cache = item.attention, self._cache(item.attention.cache, 0)
        attention.check_heads(cache.key_dim, cache.value_dim)
        q, k, v = self._use(item.q), self._use(item.k), self._use(op.v) if op.v else None
        q_out, found, sinks = self._use(op.q), self._use(op.out), self._vector(op.sinks)
        q_weight, k_weight = (self._vector(norm.weight) if norm else None for norm in (item.q_norm, item.k_norm))
        frequencies, n_rot = self._frequencies(item.rope) if item.rope else (0, 0)
        q_step = cache.key_dim + (cache.value_dim if item.split else 0)
        by = self._use(item.gate.gate) if item.gate and not item.split else q
        out = item.gate.out if item.gate else op.out
        to, finish = self._use(out), self._finish(out)
        scratch = self._temporaries(lambda n_tokens: attention.scratch_bytes(cache, op.n_heads, n_tokens))

        def gate(p: Pass) -> GateOf | None:
            if item.gate is None:
                return None
            first, stride = p.rows(by)
            if item.split:
                return GateOf(item.gate.gating, Rows(first + 4 * cache.key_dim, stride), cache.value_dim, q_step)
            return GateOf(item.gate.gating, Rows(first, stride), cache.value_dim, cache.value_dim)

        def launches(p: Pass) -> Iterable[Launch]:
            count, own = p.count(op.q.rows), cache._replace(address=p.base + self._offsets[op.cache])
            place = attention.Place(p.base + self.step.positions, p.base + self.step.slots)
            q_heads = attention.Heads(
                p.rows(q), op.n_heads, q_step, item.q_norm is not None, p.at(q_weight), item.q_rope is not None
            )
            k_heads = attention.Heads(
                p.rows(k),
                cache.n_kv_heads,
                cache.key_dim,
                item.k_norm is not None,
                p.at(k_weight),
                item.k_rope is not None,
            )
            yield attention.inputs(
                q_heads if item.split or item.q_norm or item.q_rope else None,
                p.rows(q_out),
                k_heads,
                attention.Heads(p.rows(v), cache.n_kv_heads, cache.value_dim) if v else None,
                item.norm.eps if item.norm else 0.0,
                attention.Rotation(p.at(frequencies), n_rot, item.rope.style, item.rope.magnitude)
                if item.rope
                else attention.Rotation(),
                own,
                place,
                count,
            )
            sight = attention.Sight(p.at(sinks), op.window, op.chunk)
            addresses = (p.rows(scratch[0]).address, p.rows(scratch[1]).address)
            what = (own, op.n_heads, op.scale, sight, addresses, place, count)
            if p.most <= attention.FEW_TOKENS:
                yield from attention.attend(p.rows(q_out), p.rows(to), *what, gate(p), finish.at(p))
                return
            yield from attention.attend(p.rows(q_out), p.rows(found), *what)
            by_heads = gate(p)
            if by_heads:
                yield kernels.gate(p.rows(found), by_heads, p.rows(to), out.width, count, finish.at(p))
            else:
                for form, rows in finish.forms.items():
                    yield kernels.quantize(p.rows(to), out.width, form, p.rows(rows), 1, count)

        self._calls.append(launches)

    def _causal_conv(self, op: ops.CausalConv) -> None:
        x, out, weight = self._use(op.x), self._use(op.out), self._vector(op.weight)
        self._calls.append(
            lambda p: recurrent.causal_conv(
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
        )

    def _delta_net(self, op: ops.DeltaNet) -> None:
        q, k, v, out = self._use(op.q), self._use(op.k), self._use(op.v), self._use(op.out)
        beta, alpha = self._use(op.beta), self._use(op.alpha)
        a, dt_bias = self._vector(op.a), self._vector(op.dt_bias)
        assert q.stride == k.stride == v.stride
        self._calls.append(
            lambda p: [
                recurrent.delta_net(
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

    def _delta_net_layer(self, item: fusion.DeltaNetLayer) -> None:
        """Record all between the products of a delta-net layer: for one token that is one launch."""
        conv, net, norm, gate = item.conv, item.net, item.norm, item.gate
        plain = self._recorded(
            lambda: self._causal_conv(conv), lambda: self._delta_net(net), lambda: self._gate(gate, norm)
        )
        finish = self._finish(gate.out)
        x, beta, alpha, by = (self._use(t) for t in (conv.x, net.beta, net.alpha, gate.gate))
        found, out = self._use(net.out), self._use(gate.out)
        conv_weight, a, dt_bias, norm_weight = (
            self._vector(vector) for vector in (conv.weight, net.a, net.dt_bias, norm.weight)
        )
        v_dim = net.v.width // net.n_v_heads
        n_counters = recurrent.n_counters(net.n_k_heads, net.n_v_heads, v_dim)
        n_done = self._constant(("n_done", n_counters), lambda: np.zeros(n_counters, np.int32))

        def launches(p: Pass) -> Iterable[Launch | Streamed]:
            if p.most > 1:
                yield from plain(p)
                return
            layer = recurrent.DeltaNet(
                net.n_k_heads,
                net.n_v_heads,
                net.k.width // net.n_k_heads,
                v_dim,
                conv.kernel_size,
                net.grouped,
                net.eps,
                norm.eps,
                gate.gating,
                p.at(conv_weight),
                p.at(a),
                p.at(dt_bias),
                p.at(norm_weight),
                p.base + self._offsets[conv.state],
                p.base + self._offsets[net.state],
            )
            yield recurrent.delta_net_step(
                p.rows(x).address,
                p.rows(beta).address,
                p.rows(alpha).address,
                p.rows(by).address,
                layer,
                p.rows(found).address,
                p.rows(out).address,
                p.base + n_done,
                p.base + self.step.positions,
                p.base + self.step.slots,
                finish.at(p),
            )

        self._calls.append(launches)

    # -- experts -----------------------------------------------------------------------------------------------------

    def _ids(self, routing: Routing, p: Pass) -> int:
        """Return the address of the ids of a layer, which are kept for the caller; rows as they are in this pass."""
        index = self._routing_index[routing.ids.buffer]
        return p.base + self.routing_offset + 4 * index * p.most * self.n_used

    def _slots(self, routing: Routing, p: Pass) -> int:
        return p.base + self.expert_table + 4 * self._routing_index[routing.ids.buffer] * self.n_experts

    def _routing(self, op: ops.Router) -> Callable[[Pass], kernels.Routing]:
        """Return what says how experts are chosen."""
        logits, weights, bias = self._use(op.logits), self._use(op.out.weights), self._vector(op.bias)
        assert op.out.ids.width == self.n_used, "layers that use different numbers of experts"
        return lambda p: kernels.Routing(
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
        )

    def _router(self, op: ops.Router) -> None:
        routing = self._routing(op)
        self._calls.append(lambda p: [kernels.router(routing(p), p.count(op.logits.rows))])

    def _linear_and_router(self, item: fusion.LinearAndRouter) -> None:
        """Record products, and the choice of experts by one of them: for few tokens that is one launch."""
        op, routing = item.linear, self._routing(item.router)
        place = op.outs.index(item.router.logits)
        weight_format, sends_x = op.weights[place].format, item.experts.x == op.x
        n_done = self._constant("n_done", lambda: np.zeros(1, np.int32))
        forms = self._forms_of_x(item.experts) if sends_x else {}

        def routed(p: Pass) -> Routed | None:
            count = p.count(op.x.rows)
            if p.linear(weight_format) is not kernels.linear or not kernels.can_route(
                weight_format, op.x.width, count.most
            ):
                return None
            return Routed(routing(p), p.base + n_done, self._asked(item.experts, forms, p) if sends_x else None)

        def asks(p: Pass) -> bool:
            choice = routed(p)
            return choice is not None and choice.asked is not None

        self._linear(op, (place, routed))
        self._calls.append(lambda p: [] if routed(p) else [kernels.router(routing(p), p.count(op.x.rows))])
        self._asks_early[item.router.out.ids.buffer] = asks

    def _exchange(self, routing: Routing, p: Pass) -> Exchange | None:
        """Return what a layer shares with the CPU, if that computes some of its experts."""
        layer = self._routing_index[routing.ids.buffer]
        if p.exchange is None or self._n_kept[layer] == routing.n_experts:
            return None
        return p.exchange._replace(layer=layer)

    def _forms_of_x(self, op: ops.Experts) -> dict[Activation, Place]:
        """Say where the activations of experts lie, in the one or two forms that gate and up take."""
        return {
            weight.format.activation: self._activations(op.x, weight.format.activation) for weight in (op.gate, op.up)
        }

    def _asked(self, op: ops.Experts, forms: Mapping[Activation, Place], p: Pass) -> Asked | None:
        """Return what the CPU is asked with, if it computes some of these experts."""
        exchange = self._exchange(op.routing, p)
        if exchange is None:
            return None
        rows = {form: p.rows(place) for form, place in forms.items()}
        return Asked(self._slots(op.routing, p), rows, op.x.width, exchange)

    def _shared_expert(self, item: fusion.SharedExpert) -> None:
        """Record experts with a shared one: for few tokens it is computed like one more that was chosen."""
        plain = self._recorded(
            lambda: self._linear(item.gate_up), lambda: self._gate(item.gate), lambda: self._linear(item.down)
        )
        weights = (*item.gate_up.weights, *item.down.weights)
        offsets, out = [self._matrix(weight) for weight in weights], self._use(item.down.outs[0])

        def matrices(p: Pass) -> tuple[list[ExpertMatrix], Rows]:
            own = zip(offsets, weights, strict=True)
            return [ExpertMatrix(p.base + offset, 0, weight.format) for offset, weight in own], p.rows(out)

        self._experts(item.experts, SharedLaunches(matrices, plain))

    def _experts(self, op: ops.Experts, shared: SharedLaunches | None = None) -> None:
        number = len(self.expert_layers)
        layer = ExpertLayer(op, self._n_slots[number], self._n_kept[number])
        self.expert_layers.append(layer)
        for weight in layer.weights:
            n_bytes = weight.n_rows * weight.format.row_bytes(weight.n_cols)
            layer.slot_bytes.append(-(-n_bytes // _ALIGNMENT) * _ALIGNMENT)
        factors = [(self._vector(w.scale), self._vector(b)) for w, b in zip(layer.weights, layer.biases, strict=True)]
        grids = [self._grid(weight.format) for weight in layer.weights]

        forms = self._forms_of_x(op)
        x_gate, x_up = (forms[weight.format.activation] for weight in layer.weights[:2])
        out = self._use(op.out)
        n_used, ffn_size, hidden_size = op.routing.ids.width, op.gate.n_rows, op.x.width
        h = self._temporary(lambda n_tokens: n_tokens * (n_used + 1) * ffn_size * 4, ffn_size)
        form = op.down.format.activation
        if form == Activation.F32:
            h_in_form = Place(h.need, 0, ffn_size * 4)
        else:
            row_bytes = kernels.activation_bytes(form, ffn_size)
            h_in_form = self._temporary(lambda n_tokens: n_tokens * n_used * row_bytes, row_bytes)

        sizes = Sizes(layer.n_experts, n_used, hidden_size, ffn_size, self.staging.at_once if self.staging else 1)
        parts = self._temporaries(lambda n_tokens: tiles.groups_bytes(sizes, n_tokens))
        formats = [weight.format for weight in layer.weights]

        def matrices(p: Pass, addresses: Sequence[int], steps: Sequence[int]) -> list[ExpertMatrix]:
            """Return those of experts that lie so many bytes from one another, from these addresses on."""
            return [
                ExpertMatrix(address, step, weight.format, p.at(scale), p.at(bias))
                for address, step, weight, (scale, bias) in zip(addresses, steps, layer.weights, factors, strict=True)
            ]

        def in_slots(p: Pass) -> list[ExpertMatrix]:
            return matrices(p, [p.base + layer.first_place(i) for i in range(3)], [layer.expert_bytes] * 3)

        def by_choice(p: Pass) -> Iterable[Launch]:
            """Each choice for itself: for few tokens."""
            ids, slots, count = self._ids(op.routing, p), self._slots(op.routing, p), p.count(op.x.rows)
            gate, up, down = in_slots(p)
            own, own_out = shared.matrices(p) if shared is not None else (None, NOTHING)
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
                (own[0], own[1]) if own else None,
            )
            yield kernels.expert_down(
                ids,
                slots,
                n_used,
                down,
                p.rows(h).address,
                hidden_size,
                ffn_size,
                p.rows(out),
                p.at(grids[2]),
                count,
                (own[2], own_out) if own else None,
                all_resident=layer.is_resident,
            )

        def by_expert(p: Pass) -> Iterable[Launch | Streamed]:
            """All tokens of an expert together, first of those in slots, then of those that pass through."""
            ids, slots, count = self._ids(op.routing, p), self._slots(op.routing, p), p.count(op.x.rows)
            groups = Groups(*(p.rows(part).address for part in parts))
            all_tiles = tiles.n_tiles(sizes, p.most)
            streams = p.streams and not layer.is_resident
            has_slots = bool(layer.n_kept if p.streams else layer.n_slots)

            def first_half(group: ctypes.c_int32, gate: ExpertMatrix, up: ExpertMatrix, most: int) -> Launch:
                return tiles.expert_gate_up(
                    groups,
                    group,
                    sizes,
                    gate,
                    up,
                    p.rows(x_gate),
                    p.rows(x_up),
                    p.rows(h).address,
                    (p.at(grids[0]), p.at(grids[1])),
                    op.activation,
                    most,
                )

            def second_half(group: ctypes.c_int32, down: ExpertMatrix, most: int) -> Launch:
                return tiles.expert_down(
                    groups, group, sizes, down, p.rows(h_in_form), p.rows(out), p.at(grids[2]), most
                )

            def streamed(wanted: tuple[int, ...], half: Callable[..., Launch]) -> Streamed:
                group, starts = ctypes.c_int32(), layer.staged(wanted, sizes.at_once)
                assert self.staging is not None
                launches = []
                for buffer in range(self.staging.n_buffers):
                    addresses = [0, 0, 0]
                    for i, start in zip(wanted, starts, strict=True):
                        addresses[i] = p.base + self.staging_offset + buffer * self.staging_buffer_bytes + start
                    own = matrices(p, addresses, layer.slot_bytes)
                    most = min(all_tiles, sizes.at_once * -(-p.most // 64))
                    launches.append(half(group, *(own[i] for i in wanted), most))
                return Streamed(number, wanted, group, tuple(launches))

            yield from tiles.group_choices(ids, slots, sizes, groups, count)
            gate, up, down = in_slots(p)
            if has_slots:
                yield first_half(ctypes.c_int32(0), gate, up, all_tiles)
            if streams:
                yield streamed((0, 1), first_half)
            yield kernels.quantize(p.rows(h), ffn_size, form, p.rows(h_in_form), n_used, count)
            if has_slots:
                yield second_half(ctypes.c_int32(0), down, all_tiles)
            if streams:
                yield streamed((2,), second_half)

        def launches(p: Pass) -> Iterable[Launch | Streamed]:
            asked, asks_early = self._asked(op, forms, p), self._asks_early.get(op.routing.ids.buffer)
            if asked is not None and not (asks_early and asks_early(p)):
                # before our share, so that both work at the same time
                yield kernels.publish_misses(self._ids(op.routing, p), n_used, asked, p.count(op.x.rows))
            can_group = all(tiles.has_integer_form(f) for f in formats)
            groups = p.streams or (can_group and tiles.pays_to_group(sizes, p.most))
            if shared is not None and (groups or not layer.n_slots):
                yield from shared.plain(p)
            if layer.n_slots or p.streams:
                yield from by_expert(p) if groups else by_choice(p)

        self._calls.append(launches)

    def _select_outputs(self, op: ops.SelectOutputs) -> None:
        x, out = self._use(op.x), self._use(op.out)
        self._calls.append(
            lambda p: [
                elementwise.select_outputs(
                    p.rows(x),
                    p.base + self.step.output_rows,
                    p.rows(out),
                    op.x.width,
                    p.count(op.out.rows),
                )
            ]
        )


_LOWER: dict[type[fusion.Fused], Callable[[Lowering, Any], None]] = {
    ops.Embed: Lowering._embed,
    ops.RMSNorm: Lowering._rms_norm,
    ops.Linear: Lowering._linear,
    ops.HeadLinear: Lowering._head_linear,
    ops.Scale: Lowering._scale,
    ops.ScaleByPosition: Lowering._scale_by_position,
    ops.Add: lambda lowering, op: lowering._residual(op, None),
    ops.Gate: Lowering._gate,
    ops.SplitHeads: Lowering._split_heads,
    ops.JoinHeads: Lowering._join_heads,
    ops.Rope: Lowering._rope,
    fusion.Attention: Lowering._attention,
    fusion.SumAndNorm: lambda lowering, two: lowering._residual(two.sum, two.norm),
    fusion.NormAndGate: lambda lowering, two: lowering._gate(two.gate, two.norm),
    ops.CausalConv: Lowering._causal_conv,
    ops.DeltaNet: Lowering._delta_net,
    ops.Router: Lowering._router,
    ops.Experts: Lowering._experts,
    fusion.LinearAndRouter: Lowering._linear_and_router,
    fusion.SharedExpert: Lowering._shared_expert,
    fusion.DeltaNetLayer: Lowering._delta_net_layer,
    ops.Combine: lambda lowering, op: lowering._residual(op, None),
    ops.SelectOutputs: Lowering._select_outputs,
}
