"""Turns a recorded forward pass into a flat program of C calls with fixed addresses.

Two passes. The first walks the operations in order, notes when each result is first made and last used, and puts the
activations into the forms that the weight formats take (once for each form, however many matrices read them). Then
memory is planned, and the second pass records the calls with the addresses the plan gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices import graph as ops
from engine.devices.cpu.memory import ALIGNMENT, Arena, Interval, plan_offsets
from engine.devices.graph import Graph, Tensor, Vector, Weight
from engine.devices.program import Limits, WeightAccess
from engine.devices.tables import expert_table
from engine.quants.formats import BY_NAME, Activation

Value = TypeVar("Value", np.float32, np.int32)

# Operations for which memory stays taken after its last use: neighbours that shared it could not be run as one.
_LINGER = 4

_NO_LISTS = 0, 0, 0, 1, 1  # of what attention looks at
_NO_SHARED_ROWS = 0, 0, 0, 0, 1  # that it sees beside that


@dataclass(slots=True)
class Place:
    """Where the rows of a tensor will lie; the address is known once memory is planned."""

    interval: Interval
    lowering: Lowering
    offset: int
    stride: int  # elements from one row to the next, or bytes for activation rows

    @property
    def address(self) -> int:
        """Return the address of the first value."""
        return self.lowering.scratch.address + self.interval.offset + self.offset

    @property
    def at(self) -> tuple[int, int]:
        """Return address and stride, as the C calls take them."""
        return self.address, self.stride


@dataclass(slots=True)
class ExpertTables:
    """Where the experts of one MoE layer lie.

    Attributes:
        addresses: int64 [matrices, n_experts], the first row of each expert's matrices (`ops.Experts.stacks`). Every
            step reads them anew: between two steps an entry may be pointed at a copy of the same bytes elsewhere.
        sizes: bytes of one expert's part of each.
        operations: of the program, which read the addresses: the first, and the one after the last.
    """

    addresses: npt.NDArray[np.int64]
    sizes: tuple[int, ...]
    operations: tuple[int, int] = (0, 0)


class Lowering:
    """Compiles one graph; afterwards holds the C program and every piece of memory that it uses."""

    def __init__(self, graph: Graph, weights: WeightAccess, limits: Limits, n_threads: int, isa: str) -> None:
        self.limits = limits
        self.program = _kernels.Program(limits.max_tokens, limits.n_slots, n_threads, isa)
        self._weights = weights
        self._keep: list[npt.NDArray[np.generic]] = []  # memory that the C program refers to by address
        self._ones_of: dict[int, npt.NDArray[np.float32]] = {}  # by their number
        self.vectors: dict[str, npt.NDArray[np.float32]] = {}
        self._intervals: dict[object, Interval] = {}
        self._calls: list[Callable[[], None]] = []
        self._index = 0
        self.draft_program: _kernels.Program | None = None
        self.draft_logits: npt.NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._tables: dict[ops.Buffer, ExpertTables] = {}
        self._allocate_state(graph)

        graphs, ends = [graph, *([graph.draft] if graph.draft else [])], []
        for one in graphs:
            for operation in one.operations:
                _LOWER[type(operation)](self, operation)
                self._index += 1
            ends.append(len(self._calls))
        for one in graphs:
            assert one.logits is not None
            for kept in (one.logits, *(r.ids for r in one.routings)):  # read by the caller after the last operation
                self._intervals[kept.buffer].last = self._index

        self.scratch_bytes = plan_offsets(list(self._intervals.values()))
        self.scratch = Arena(self.scratch_bytes)
        for call in self._calls[: ends[0]]:
            call()
        if graph.draft is not None:
            self._record_draft(graph.draft, self._calls[ends[0] :])
        assert graph.logits is not None
        self.logits = self._view(graph.logits, np.float32)
        self.routing_ids = [self._view(r.ids, np.int32) for r in graph.routings]
        self.n_experts = max((r.n_experts for r in graph.routings), default=0)
        self.expert_tables = [self._tables[r.ids.buffer] for r in graph.routings]

    def _record_draft(self, draft: Graph, calls: list[Callable[[], None]]) -> None:
        """Record the program that guesses a token, which shares all memory with the other."""
        assert draft.logits is not None
        main = self.program
        self.draft_program = self.program = _kernels.Program(
            self.limits.max_tokens, self.limits.n_slots, main.n_threads, main.isa
        )
        for call in calls:
            call()
        self.program = main
        self.draft_logits = self._view(draft.logits, np.float32)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _allocate_state(self, graph: Graph) -> None:
        """Give every KV cache and recurrent state its part of one arena, which lives as long as the program."""
        limits, offset = self.limits, 0
        offsets: list[tuple[ops.KVCache | ops.State, int]] = []
        draft = graph.draft
        for cache in (*graph.kv_caches, *(draft.kv_caches if draft else ())):
            offsets.append((cache, offset))
            n_rows = limits.n_rows(cache)
            offset += _kernels.kv_cache_bytes(
                limits.kv_type, limits.n_slots, n_rows, cache.n_kv_heads, cache.head_dim, cache.value_dim
            )
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
        for state in (*graph.states, *(draft.states if draft else ())):
            offsets.append((state, offset))
            offset += -(-state.width * 4 * limits.n_slots // ALIGNMENT) * ALIGNMENT
        self._state = Arena(offset)
        self.kept_states = Arena(sum(state.width * 4 for state in graph.states) if limits.max_drafts else 0)
        self.state_bytes = offset + self.kept_states.n_bytes
        self._state_address = {owner: self._state.address + at for owner, at in offsets}
        self._kept_address = self._places_of_kept(graph)
        ends = [at for _, at in offsets[1:]] + [offset]
        of_sequences = {*graph.kv_caches, *graph.states}
        self.states = [
            (owner, self._state.bytes[at:end])
            for (owner, at), end in zip(offsets, ends, strict=True)
            if owner in of_sequences
        ]

    def _places_of_kept(self, graph: Graph) -> dict[ops.State, int]:
        """Return where a copy of each recurrent state of one sequence goes; 0 for nowhere."""
        places, at = {}, self.kept_states.address
        for state in graph.states:
            places[state] = at if self.limits.max_drafts else 0
            at += state.width * 4
        return places

    def _interval(self, key: object, n_bytes: int) -> Interval:
        interval = self._intervals.setdefault(key, Interval(n_bytes, self._index, self._index))
        interval.last = self._index + _LINGER
        return interval

    def _use(self, tensor: Tensor) -> Place:
        """Note that the operation at hand uses a tensor, and say where it will lie."""
        width = tensor.buffer.width
        interval = self._interval(tensor.buffer, self.limits.max_tokens * width * 4)
        return Place(interval, self, tensor.offset * 4, width)

    def _temporary(self, width: int) -> Place:
        """Return float32 rows for the operation at hand only."""
        return Place(self._interval(object(), self.limits.max_tokens * width * 4), self, 0, width)

    def _activations(self, x: Tensor, activation: Activation) -> Place:
        """Say where x lies in the form that a weight format takes, after recording the conversion if there is none."""
        if activation == Activation.F32:
            place = self._use(x)
            return Place(place.interval, self, place.offset, place.stride * 4)
        row_bytes = _kernels.activation_bytes(activation, x.width)
        key = (x.buffer, x.offset, x.width, activation)
        is_new = key not in self._intervals
        converted = Place(self._interval(key, self.limits.max_tokens * row_bytes), self, 0, row_bytes)
        if is_new:
            source, rows, width = self._use(x), x.rows, x.width
            self._calls.append(lambda: self.program.quantize(*source.at, width, activation, converted.address, rows))
        return converted

    def _view(self, tensor: Tensor, dtype: type[Value]) -> npt.NDArray[Value]:
        interval = self._intervals[tensor.buffer]
        size = self.limits.max_tokens * tensor.width
        flat = self.scratch.bytes[interval.offset : interval.offset + size * 4].view(dtype)
        return flat.reshape(self.limits.max_tokens, tensor.width)

    def _values(self, vector: Vector) -> npt.NDArray[np.float32]:
        """Return float32 values, converted once whatever the file stores."""
        values = self.vectors.get(vector.name)
        if values is None:
            raw = self._weights.array(vector.name).reshape(1, -1)
            size = vector.stored_size or vector.size
            values = self.vectors[vector.name] = _kernels.dequantize(vector.format.ggml_type, raw, size)
        return values.reshape(-1)[vector.first : vector.first + vector.size]

    def _vector(self, vector: Vector | None) -> int:
        """Return the address of float32 values; 0 for None."""
        return 0 if vector is None else int(self._values(vector).ctypes.data)

    def _joined(self, vectors: tuple[Vector, ...]) -> int:
        """Return the address of the values of some vectors, one after the other."""
        if len(vectors) == 1:
            return self._vector(vectors[0])
        values = np.concatenate([self._values(vector) for vector in vectors])
        self._keep.append(values)
        return int(values.ctypes.data)

    def _ones(self, size: int) -> int:
        """Return the address of as many ones."""
        values = self._ones_of.setdefault(size, np.ones(size, np.float32))
        return int(values.ctypes.data)

    def _matrix(self, weight: Weight) -> tuple[int, int]:
        """Return the address of the first row and the bytes from one expert to the next."""
        row_bytes = weight.format.row_bytes(weight.n_cols)
        base = int(self._weights.array(weight.name).ctypes.data)
        return base + weight.first_row * row_bytes, (weight.stored_rows or weight.n_rows) * row_bytes

    def _expert_tables(self, weights: tuple[Weight, ...]) -> ExpertTables:
        """Return tables that point at the weights."""
        placed = [self._matrix(weight) for weight in weights]
        numbers = np.arange(weights[0].n_experts, dtype=np.int64)
        addresses = np.stack([first + expert_bytes * numbers for first, expert_bytes in placed])
        return ExpertTables(addresses, tuple(w.n_rows * w.format.row_bytes(w.n_cols) for w in weights))

    # -- operations --------------------------------------------------------------------------------------------------

    def _embed(self, op: ops.Embed) -> None:
        out, ids = self._use(op.out), self._use(op.ids) if op.ids else None
        table, ggml_type = op.table, op.table.format.ggml_type
        address, _ = self._matrix(table)
        self._calls.append(
            lambda: self.program.embed(
                address,
                ggml_type,
                table.n_rows,
                table.n_cols,
                *out.at,
                op.scale,
                *((*ids.at, op.ids.width) if ids and op.ids else ()),
            )
        )

    def _hash_tokens(self, op: ops.HashTokens) -> None:
        out, constants = self._use(op.out), (op.multipliers, op.sizes, op.offsets)
        self._keep += constants
        multipliers, sizes, offsets = (int(values.ctypes.data) for values in constants)
        state, kept = self._state_address[op.state], self._kept_address[op.state]
        n_hashed, n_heads = len(op.multipliers), op.out.width
        constants_at = multipliers, sizes, offsets
        self._calls.append(
            lambda: self.program.hash_tokens(state, *out.at, *constants_at, n_hashed, n_heads, op.end_id, kept)
        )

    def _rms_norm(self, op: ops.RMSNorm) -> None:
        x, out, size = self._use(op.x), self._use(op.out), op.group_size
        weight, step = self._vector(op.weight) or self._ones(size), size if op.weight and op.weight.size > size else 0
        bias, n_groups = self._vector(op.bias), op.x.width // size
        self._calls.append(
            lambda: self.program.rms_norm(
                *x.at, weight, bias, *out.at, n_groups, size, step, op.centers, op.eps, op.x.rows
            )
        )

    def _linear(self, op: ops.Linear) -> None:
        by_form: dict[Activation, list[int]] = {}
        for i, weight in enumerate(op.weights):
            by_form.setdefault(weight.format.activation, []).append(i)
        outs = [self._use(out) for out in op.outs]
        inputs = [self._activations(op.x, activation) for activation in by_form]  # all before the first product
        for x, members in zip(inputs, by_form.values(), strict=True):
            self._linear_in_form(op, x, members, outs)

    def _linear_in_form(self, op: ops.Linear, x: Place, members: list[int], outs: list[Place]) -> None:
        entries = [
            (
                self._matrix(op.weights[i])[0],
                op.weights[i].format.ggml_type,
                op.weights[i].n_rows,
                outs[i],
                self._vector(op.biases[i]),
                self._vector(op.weights[i].scale),
            )
            for i in members
        ]
        self._calls.append(
            lambda: self.program.linear(
                *x.at,
                op.x.width,
                [(w, kind, n_rows, *out.at, bias, scale) for w, kind, n_rows, out, bias, scale in entries],
                op.x.rows,
            )
        )

    def _head_linear(self, op: ops.HeadLinear) -> None:
        weight = op.weight
        first, head_bytes = self._matrix(weight)
        scales = None if weight.scale is None else self._vector(weight.scale)
        out = self._use(op.out)
        for head in range(weight.n_experts):
            columns = op.x.columns(head * weight.n_cols, (head + 1) * weight.n_cols)
            x = self._activations(columns, weight.format.activation)
            self._record_head(op, x, out, first + head * head_bytes, scales and scales + 4 * head, head)

    def _record_head(
        self, op: ops.HeadLinear, x: Place, out: Place, address: int, scale: int | None, head: int
    ) -> None:
        weight, rows = op.weight, op.x.rows
        kind, n_rows = weight.format.ggml_type, weight.n_rows
        self._calls.append(
            lambda: self.program.linear(
                *x.at,
                weight.n_cols,
                [(address, kind, n_rows, out.address + 4 * head * n_rows, out.stride, 0, scale or 0)],
                rows,
            )
        )

    def _scale(self, op: ops.Scale) -> None:
        x, out = self._use(op.x), self._use(op.out)
        by = self._use(op.by) if isinstance(op.by, Tensor) else None
        value = (self._vector(op.by), 0) if isinstance(op.by, Vector) else (0, 0)  # for all rows, or none
        self._calls.append(
            lambda: self.program.scale(*x.at, *(by.at if by else value), *out.at, op.x.width, op.factor, op.x.rows)
        )

    def _soft_cap(self, op: ops.SoftCap) -> None:
        x, out = self._use(op.x), self._use(op.out)
        self._calls.append(lambda: self.program.soft_cap(*x.at, *out.at, op.x.width, op.cap, op.x.rows))

    def _clamp(self, op: ops.Clamp) -> None:
        x, out = self._use(op.x), self._use(op.out)
        self._calls.append(lambda: self.program.clamp(*x.at, *out.at, op.x.width, op.limit, op.x.rows))

    def _scale_by_position(self, op: ops.ScaleByPosition) -> None:
        x = self._use(op.x)
        self._calls.append(lambda: self.program.scale_by_position(*x.at, op.x.width, op.offset, op.period, op.slope))

    def _add(self, op: ops.Add) -> None:
        a, out = self._use(op.a), self._use(op.out)
        b = self._use(op.b) if isinstance(op.b, Tensor) else None
        vector = (self._vector(op.b), 0) if isinstance(op.b, Vector) else (0, 0)
        self._calls.append(lambda: self.program.add(*a.at, *(b.at if b else vector), *out.at, op.a.width, op.a.rows))

    def _gate(self, op: ops.Gate) -> None:
        x, gate, out = self._use(op.x), self._use(op.gate), self._use(op.out)
        self._calls.append(
            lambda: self.program.gate(
                *x.at,
                *gate.at,
                *out.at,
                op.x.width,
                op.gate.width,
                op.gating,
                op.limit,
                op.own_limit,
                op.x.rows,
                op.n_streams,
            )
        )

    def _gate_by_agreement(self, op: ops.GateByAgreement) -> None:
        a, b, x, out = (self._use(tensor) for tensor in (op.a, op.b, op.x, op.out))
        self._calls.append(
            lambda: self.program.gate_by_agreement(*a.at, *b.at, *x.at, *out.at, op.n_streams, op.x.width, op.floor)
        )

    def _split_heads(self, op: ops.SplitHeads) -> None:
        x, first, second = self._use(op.x), self._use(op.first), self._use(op.second)
        self._calls.append(
            lambda: self.program.split_heads(
                *x.at,
                *first.at,
                *second.at,
                op.n_heads,
                op.first.width // op.n_heads,
                op.second.width // op.n_heads,
            )
        )

    def _join_heads(self, op: ops.JoinHeads) -> None:
        first, second, out = self._use(op.first), self._use(op.second), self._use(op.out)
        self._calls.append(
            lambda: self.program.join_heads(
                *first.at,
                *second.at,
                *out.at,
                op.n_heads,
                op.first.width // op.n_heads,
                op.second.width // op.n_heads,
            )
        )

    def _rope(self, op: ops.Rope) -> None:
        x = self._use(op.x)
        frequencies, divisors = op.frequencies, op.divisors_of(self.limits.context_length)
        if divisors is not None:
            with np.errstate(all="ignore"):  # a damaged file may hold zeros; its text is then as damaged
                frequencies = op.frequencies / self._values(divisors)
        frequencies = np.ascontiguousarray(frequencies, np.float32)
        self._keep.append(frequencies)
        self._calls.append(
            lambda: self.program.rope(
                *x.at,
                int(frequencies.ctypes.data),
                op.n_heads,
                op.head_dim,
                2 * len(frequencies),
                op.style,
                op.magnitude,
                op.period,
            )
        )

    def _select_positions(self, op: ops.SelectPositions) -> None:
        q, k, out = self._use(op.q), self._use(op.k), self._use(op.out)
        weights = self._use(op.weights) if op.weights else None
        self._calls.append(
            lambda: self.program.select_positions(
                *q.at,
                *k.at,
                *(weights.at if weights else (0, 0)),
                *out.at,
                self._state_address[op.cache],
                self.limits.kv_type,
                self.limits.n_rows(op.cache),
                op.n_heads,
                op.cache.head_dim,
                op.top_k,
                op.scale,
                op.cache.period,
                op.has_tail,
            )
        )

    def _select_blocks(self, op: ops.SelectBlocks) -> None:
        q, k, out = self._use(op.q), self._use(op.k), self._use(op.out)
        self._calls.append(
            lambda: self.program.select_blocks(
                *q.at,
                *k.at,
                *out.at,
                self._state_address[op.cache],
                self.limits.kv_type,
                self.limits.n_rows(op.cache),
                op.n_heads,
                op.cache.head_dim,
                op.top_k,
                op.block_size,
                op.n_newest,
            )
        )

    def _attention(self, op: ops.Attention) -> None:
        # Values that are the first part of their keys are kept twice: keys lie transposed, so they cannot be shared.
        cache, limits = op.cache, self.limits
        q, k, out = self._use(op.q), self._use(op.k), self._use(op.out)
        v = self._use(op.v or op.k)
        assert op.v is not None or cache.n_kv_heads == 1
        sinks = self._vector(op.sinks)
        selected = op.selected
        blocks = self._use(selected.blocks) if selected else None
        shared, shared_k = op.shared_cache, self._use(op.shared_k) if op.shared_k else None

        def record() -> None:
            lists, shared_rows = _NO_LISTS, _NO_SHARED_ROWS
            if selected and blocks:
                lists = *blocks.at, selected.top_k, selected.block_size, selected.n_lists
            if shared and shared_k:
                shared_rows = *shared_k.at, self._state_address[shared], limits.n_rows(shared), shared.period
            self.program.attention(
                *q.at,
                *k.at,
                *v.at,
                *out.at,
                self._state_address[cache],
                limits.kv_type,
                limits.n_rows(cache),
                op.n_heads,
                cache.n_kv_heads,
                cache.head_dim,
                cache.value_dim,
                op.scale,
                sinks,
                op.window,
                op.chunk,
                op.cap,
                *lists,
                *shared_rows,
                selected is not None and selected.has_tail,
                limits.is_ring(cache),
            )

        self._calls.append(record)

    def _store_keys(self, op: ops.StoreKeys) -> None:
        cache, k, v = op.cache, self._use(op.k), self._use(op.v or op.k)
        self._calls.append(
            lambda: self.program.store_keys(
                *k.at,
                *v.at,
                self._state_address[cache],
                self.limits.kv_type,
                self.limits.n_rows(cache),
                cache.n_kv_heads,
                cache.head_dim,
                cache.value_dim,
                self.limits.is_ring(cache),
            )
        )

    def _carry_over(self, op: ops.CarryOver) -> None:
        x, out = (self._use(tensor) if tensor else None for tensor in (op.x, op.out))
        state = self._state_address[op.state]
        self._calls.append(
            lambda: self.program.carry_over(
                *(x.at if x else (0, 0)), state, *(out.at if out else (0, 0)), op.width, ops.N_CARRIED
            )
        )

    def _causal_conv(self, op: ops.CausalConv) -> None:
        x, out, weight, bias = self._use(op.x), self._use(op.out), self._joined(op.weights), self._vector(op.bias)
        self._calls.append(
            lambda: self.program.causal_conv(
                *x.at,
                weight,
                bias,
                self._state_address[op.state],
                *out.at,
                op.x.width,
                op.kernel_size,
                op.activates,
                op.dilation,
                self._kept_address[op.state],
            )
        )

    def _delta_net(self, op: ops.DeltaNet) -> None:
        q, k, v, out = self._use(op.q), self._use(op.k), self._use(op.v), self._use(op.out)
        beta, alpha = (self._use(tensor) if tensor else None for tensor in (op.beta, op.alpha))
        a, dt_bias, skip = (self._vector(vector) for vector in (op.a, op.dt_bias, op.skip))
        if op.decays is not None:
            self._keep.append(op.decays)
            a = int(op.decays.ctypes.data)
        assert q.stride == k.stride == v.stride
        self._calls.append(
            lambda: self.program.delta_net(
                q.address,
                k.address,
                v.address,
                q.stride,
                *(beta.at if beta else (0, 0)),
                *(alpha.at if alpha else (0, 0)),
                a,
                dt_bias,
                skip,
                self._state_address[op.state],
                *out.at,
                op.n_k_heads,
                op.n_v_heads,
                op.k.width // op.n_k_heads,
                op.v.width // op.n_v_heads,
                op.decay_dim,
                op.decay_bound,
                op.grouped,
                op.eps,
                self._kept_address[op.state],
            )
        )

    def _selective_scan(self, op: ops.SelectiveScan) -> None:
        x, dt, b, c, out = (self._use(tensor) for tensor in (op.x, op.dt, op.b, op.c, op.out))
        a, skip = self._vector(op.a), self._vector(op.skip)
        self._calls.append(
            lambda: self.program.selective_scan(
                *x.at,
                *dt.at,
                *b.at,
                *c.at,
                a,
                skip,
                self._state_address[op.state],
                *out.at,
                op.x.width,
                op.state_size,
                self._kept_address[op.state],
            )
        )

    def _compress(self, op: ops.Compress) -> None:
        values, out, biases = self._use(op.values), self._use(op.out), self._vector(op.biases)
        scores = self._use(op.scores) if op.scores else None
        width = op.out.width
        self._calls.append(
            lambda: self.program.compress(
                *values.at,
                *(scores.at if scores else (0, 0)),
                biases,
                self._state_address[op.state],
                *out.at,
                width,
                op.values.width // width,
                op.period,
                self._kept_address[op.state],
            )
        )

    def _router(self, op: ops.Router) -> None:
        logits, ids, weights = self._use(op.logits), self._use(op.out.ids), self._use(op.out.weights)
        bias, table, n_vocab = self._vector(op.bias), 0, 0
        if op.table is not None:
            values = expert_table(self._weights, op.table, op.out.n_experts)
            self._keep.append(values)
            table, n_vocab = int(values.ctypes.data), op.table.n_rows
        self._calls.append(
            lambda: self.program.router(
                *logits.at,
                bias,
                ids.address,
                weights.address,
                op.out.n_experts,
                op.out.ids.width,
                op.scoring,
                op.n_groups,
                op.n_groups_used,
                op.normalize,
                op.scale,
                table,
                n_vocab,
            )
        )

    def _group_router(self, op: ops.GroupRouter) -> None:
        logits, ids = self._use(op.logits), self._use(op.routing.ids)
        group_ids, weights = self._use(op.out.ids), self._use(op.out.weights)
        n_experts, n_used = op.routing.n_experts, op.routing.ids.width
        self._calls.append(
            lambda: self.program.group_router(
                *logits.at, ids.address, group_ids.address, weights.address, n_experts, n_used, op.group_size
            )
        )

    def _experts(self, op: ops.Experts) -> None:
        x_gate = self._activations(op.x, op.gate.format.activation)
        x_up = self._activations(op.x, op.up.format.activation)
        ids, out = self._use(op.routing.ids), self._use(op.out)
        weights, biases = (op.gate, op.up, op.down), (op.gate_bias, op.up_bias, op.down_bias)
        tables = self._tables[op.routing.ids.buffer] = self._expert_tables(op.stacks)
        gate, up, down = (
            (int(tables.addresses[i].ctypes.data), w.format.ggml_type, self._vector(w.scale), self._vector(bias))
            for i, w, bias in zip(op.places, weights, biases, strict=True)
        )

        def record() -> None:
            first = len(self.program)
            self.program.experts(
                *x_gate.at,
                *x_up.at,
                ids.address,
                op.routing.n_experts,
                op.routing.ids.width,
                gate,
                up,
                down,
                op.activation,
                op.limit,
                op.up_limit,
                op.x.width,
                op.gate.n_rows,
                *out.at,
            )
            tables.operations = first, len(self.program)

        self._calls.append(record)

    def _combine(self, op: ops.Combine) -> None:
        expert_out, weights = self._use(op.expert_out), self._use(op.routing.weights)
        residual, out = self._use(op.residual) if op.residual else None, self._use(op.out)
        shared = self._use(op.shared) if op.shared else None
        shared_gate = self._use(op.shared_gate) if op.shared_gate else None
        self._calls.append(
            lambda: self.program.combine(
                *expert_out.at,
                weights.address if op.weighted else 0,
                op.routing.ids.width,
                *(shared.at if shared else (0, 0)),
                *(shared_gate.at if shared_gate else (0, 0)),
                *(residual.at if residual else (0, 0)),
                *out.at,
                op.out.width,
                op.scale,
            )
        )

    def _reduce_streams(self, op: ops.ReduceStreams) -> None:
        x, out = self._use(op.x), self._use(op.out)
        gates, mixing = (self._use(tensor) if tensor else None for tensor in (op.gates, op.mixing))
        width, n_mixes, n_streams = op.x.width, op.base.size, op.n_streams
        normed, mixes, weights = (self._temporary(n) for n in (width, n_mixes, n_streams))
        matrix, scale, base, ones = (*map(self._vector, (op.matrix, op.scale, op.base)), self._ones(width))
        kind = BY_NAME["F32"].ggml_type

        def record() -> None:
            program, rows = self.program, op.x.rows
            program.rms_norm(*x.at, ones, 0, *normed.at, 1, width, 0, False, op.eps, rows)
            program.linear(normed.address, width * 4, width, [(matrix, kind, n_mixes, *mixes.at, 0, 0)], rows)
            to = weights.address, *(gates.at if gates else (0, 0))
            to_mix = (*mixing.at, op.n_normalizations) if mixing else ()
            program.stream_weights(*mixes.at, scale, base, *to, n_streams, op.offset, op.magnitude, *to_mix)
            nothing = (0,) * 6  # a shared expert, its gate, a residual stream
            program.combine(*x.at, weights.address, n_streams, *nothing, *out.at, op.out.width, 1.0)

        self._calls.append(record)

    def _add_to_streams(self, op: ops.AddToStreams) -> None:
        x, added, gates, out = (self._use(tensor) for tensor in (op.x, op.added, op.gates, op.out))
        mixing = self._use(op.mixing) if op.mixing else None
        self._calls.append(
            lambda: self.program.add_to_streams(
                *x.at,
                *added.at,
                *gates.at,
                *out.at,
                op.gates.width,
                op.added.width,
                *(mixing.at if mixing else (0, 0)),
                op.magnitude,
            )
        )

    def _mix_residuals(self, op: ops.MixResiduals) -> None:
        residuals, out, scorer = [self._use(x) for x in op.residuals], self._use(op.out), self._vector(op.scorer)
        self._calls.append(
            lambda: self.program.mix_residuals([x.at for x in residuals], scorer, *out.at, op.out.width, op.eps)
        )

    def _select_outputs(self, op: ops.SelectOutputs) -> None:
        x, out = self._use(op.x), self._use(op.out)
        self._calls.append(lambda: self.program.select_outputs(*x.at, *out.at, op.x.width))


_LOWER: dict[type[ops.Operation], Callable[[Lowering, Any], None]] = {
    ops.Embed: Lowering._embed,
    ops.HashTokens: Lowering._hash_tokens,
    ops.RMSNorm: Lowering._rms_norm,
    ops.Linear: Lowering._linear,
    ops.HeadLinear: Lowering._head_linear,
    ops.Add: Lowering._add,
    ops.Scale: Lowering._scale,
    ops.SoftCap: Lowering._soft_cap,
    ops.Clamp: Lowering._clamp,
    ops.ScaleByPosition: Lowering._scale_by_position,
    ops.Gate: Lowering._gate,
    ops.GateByAgreement: Lowering._gate_by_agreement,
    ops.SplitHeads: Lowering._split_heads,
    ops.JoinHeads: Lowering._join_heads,
    ops.Rope: Lowering._rope,
    ops.SelectPositions: Lowering._select_positions,
    ops.SelectBlocks: Lowering._select_blocks,
    ops.Attention: Lowering._attention,
    ops.StoreKeys: Lowering._store_keys,
    ops.CarryOver: Lowering._carry_over,
    ops.CausalConv: Lowering._causal_conv,
    ops.DeltaNet: Lowering._delta_net,
    ops.SelectiveScan: Lowering._selective_scan,
    ops.Compress: Lowering._compress,
    ops.Router: Lowering._router,
    ops.GroupRouter: Lowering._group_router,
    ops.Experts: Lowering._experts,
    ops.Combine: Lowering._combine,
    ops.ReduceStreams: Lowering._reduce_streams,
    ops.AddToStreams: Lowering._add_to_streams,
    ops.MixResiduals: Lowering._mix_residuals,
    ops.SelectOutputs: Lowering._select_outputs,
}
