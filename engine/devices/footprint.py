"""What a forward pass needs of a device with memory of its own, in bytes and multiply-adds, before any is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices import graph as ops
from engine.devices.graph import Graph, KVType, Weight
from engine.devices.intervals import Interval, plan_offsets
from engine.devices.program import Limits
from engine.devices.timing import Bandwidths, streaming_pays_from

SHORT_STEP = 64  # tokens of a step that takes no memory from expert slots
LEAST_LONG_STEP = 512  # tokens that the least of the long steps are made for


def long_sizes(max_tokens: int) -> list[int]:
    """Return the numbers of tokens that long steps are made for beside the longest, each twice the one before."""
    return list(takewhile(lambda n: n < max_tokens, (LEAST_LONG_STEP << i for i in count())))


def step_sizes(max_tokens: int, stream_n_tokens: int | None) -> list[int]:
    """Return the numbers of tokens that have memory planned for them; a step takes that of the next size.

    Short steps come first (0 if there are none): all others take memory that slots lend them, the more the longer they
    are. Then come those that the CPU helps with, and those that stream experts, each twice as long as the one before.

    Args:
        max_tokens: of a step.
        stream_n_tokens: steps of so many tokens or more stream the experts without a slot; None if none does.
    """
    if stream_n_tokens is None or stream_n_tokens > max_tokens:
        return [max_tokens]
    helped = stream_n_tokens - 1
    streaming = [n for n in long_sizes(max_tokens) if n > helped]
    return sorted({min(SHORT_STEP, helped), helped, max_tokens, *streaming})


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes of one model with given limits.

    Attributes:
        n_layers: blocks of the model.
        n_experts: of each MoE layer; 0 if there is none.
        experts_used: int64 [n_moe_layers], of them by one token.
        expert_bytes: int64 [n_moe_layers], one expert of each layer.
        expert_macs: int64 [n_moe_layers], multiply-adds of one token with one expert.
        dense_bytes: all other matrices that the device reads for a token; not tables of embeddings, of which a token
            reads some rows: they stay in RAM.
        idle_bytes: of these, what one token does not read: shared by groups of experts that it does not go to, and what
            only a head for multi-token prediction reads (but its experts, which stay in RAM).
        dense_macs: multiply-adds of one token with them.
        position_bytes: keys and values of one position, in all layers that see the whole context.
        window_bytes: all keys and values that a token sees at most in layers that see a part of it.
        recurrent_bytes: states of one sequence.
        state_bytes: keys, values and states of all sequences, and where there are drafts, a copy of the states of one.
        context_length: positions that a sequence may have.
        stretches: of memory that fill up as sequences grow: the bytes of a position's keys or values (without scales),
            for each layer, keys first, and each sequence.
        scratch: intermediate results, as (tokens, bytes) of each of `step_sizes`, the least first.
    """

    n_layers: int
    n_experts: int
    experts_used: npt.NDArray[np.int64]
    expert_bytes: npt.NDArray[np.int64]
    expert_macs: npt.NDArray[np.int64]
    dense_bytes: int
    idle_bytes: int
    dense_macs: int
    position_bytes: float
    window_bytes: float
    recurrent_bytes: int
    state_bytes: int
    context_length: int
    stretches: tuple[int, ...]
    scratch: tuple[tuple[int, int], ...]

    @property
    def max_tokens(self) -> int:
        """Return the tokens of a step."""
        return self.scratch[-1][0]

    @property
    def scratch_bytes(self) -> int:
        """Return the intermediate results of short steps, or if none streams experts, of all."""
        return self.scratch[0][1]

    @property
    def long_scratch_bytes(self) -> int:
        """Return those of the longest steps."""
        return self.scratch[-1][1]

    @property
    def read_bytes(self) -> int:
        """Return the bytes of the dense weights that one token reads."""
        return self.dense_bytes - self.idle_bytes

    @property
    def expert_total_bytes(self) -> int:
        """Return the bytes of all experts."""
        return int(self.expert_bytes.sum()) * self.n_experts

    @property
    def chosen_bytes(self) -> int:
        """Return the bytes of the experts that one token uses."""
        return int((self.expert_bytes * self.experts_used).sum())

    def streaming_pays_from(self, speeds: Bandwidths, cpu_macs: float) -> int:
        """Return how many tokens a step must have for streamed experts to pay; see `timing.streaming_pays_from`."""
        if not self.n_experts:
            return 1
        n_bytes, macs = float(self.expert_bytes.sum()), float(self.expert_macs.sum())
        return streaming_pays_from(speeds, cpu_macs, n_bytes, macs, float(self.experts_used.mean()) / self.n_experts)

    def attention_bytes(self, position: float) -> float:
        """Return the keys, values and states that the device reads for a token at a position."""
        return self.position_bytes * (position + 1) + self.window_bytes + 2 * self.recurrent_bytes


def measure(
    graph: Graph, limits: Limits, stream_n_tokens: int | None = None, *, stores_once: bool = False
) -> Footprint:
    """Return what a recorded forward pass needs with these limits.

    Args:
        graph: the forward pass.
        limits: of steps and sequences.
        stream_n_tokens: steps of so many tokens or more stream the experts without a slot; None if none does.
        stores_once: values that are part of keys are not stored once more, as the CPU does, for its values lie in
            another order than its keys.
    """
    experts = {op.routing.ids.buffer: op for op in graph.operations if isinstance(op, ops.Experts)}
    layers = [experts[routing.ids.buffer] for routing in graph.routings]
    stacks = [op.stacks for op in layers]
    dense, of_draft = _dense_weights(graph), _weights_of_draft(graph)
    without_slots = [op for op in graph.operations if isinstance(op, ops.Experts) and not graph.has_slots(op)]
    used = [(op.routing.ids.width, weight) for op in without_slots for weight in op.stacks]
    whole, window = _cache_bytes(graph, limits, stores_once)
    recurrent = sum(4 * state.width for state in graph.states)
    draft_states = graph.draft.states if graph.draft else []
    carried = sum(4 * state.width for state in draft_states) * limits.n_slots
    all_positions = sum(_kv_bytes(cache, limits, limits.n_slots, stores_once) for cache in _all_caches(graph))
    return Footprint(
        n_layers=sum(isinstance(op, ops.Attention | ops.DeltaNet | ops.SelectiveScan) for op in graph.operations),
        n_experts=layers[0].routing.n_experts if layers else 0,
        experts_used=np.array([op.routing.ids.width for op in layers], np.int64),
        expert_bytes=np.array([sum(w.n_bytes // w.n_experts for w in stack) for stack in stacks], np.int64),
        expert_macs=np.array([sum(w.n_rows * w.n_cols for w in stack) for stack in stacks], np.int64),
        dense_bytes=sum(w.n_bytes for w in (*dense, *of_draft, *[weight for _, weight in used])),
        idle_bytes=sum(weight.n_bytes for weight in of_draft)
        + sum(weight.n_bytes // weight.n_experts * (weight.n_experts - n) for n, weight in used),
        dense_macs=sum(n * weight.n_rows * weight.n_cols for n, weight in (*[(w.n_experts, w) for w in dense], *used)),
        position_bytes=whole,
        window_bytes=window,
        recurrent_bytes=recurrent,
        state_bytes=all_positions + recurrent * (limits.n_slots + (limits.max_drafts > 0)) + carried,
        context_length=limits.context_length,
        stretches=tuple(
            n_bytes
            for cache in graph.kv_caches
            if has_stretches(cache, limits)
            for n_bytes in position_rows(cache, limits.kv_type)
            for _ in range(limits.n_slots)
        ),
        scratch=tuple(
            (n, _scratch_bytes(graph, limits.up_to(max(1, n)))) for n in step_sizes(limits.max_tokens, stream_n_tokens)
        ),
    )


def row_tables(graph: Graph) -> list[Weight]:
    """Return the tables of which a token reads some rows: matrices that nothing is multiplied with."""
    multiplied = {weight.name for weight in (*_dense_weights(graph), *_weights_of_draft(graph))}
    operations = (*graph.operations, *(graph.draft.operations if graph.draft else ()))
    tables = {op.table.name: op.table for op in operations if isinstance(op, ops.Embed)}
    return [table for name, table in tables.items() if name not in multiplied]


def _weights_of_draft(graph: Graph) -> list[Weight]:
    """Return the matrices that guessing a token reads and running one does not; without experts."""
    known = {(weight.name, weight.first_row) for weight in _dense_weights(graph)}
    weights = _dense_weights(graph.draft) if graph.draft else []
    return [weight for weight in weights if (weight.name, weight.first_row) not in known]


def _all_caches(graph: Graph) -> list[ops.KVCache]:
    return [*graph.kv_caches, *(graph.draft.kv_caches if graph.draft else ())]


def _dense_weights(graph: Graph) -> list[Weight]:
    found: dict[tuple[str, int], Weight] = {}
    for op in graph.operations:
        if isinstance(op, ops.Linear):
            found |= {(weight.name, weight.first_row): weight for weight in op.weights}
        elif isinstance(op, ops.HeadLinear):
            found[op.weight.name, op.weight.first_row] = op.weight
    return list(found.values())


def has_stretches(cache: ops.KVCache, limits: Limits) -> bool:
    """Return whether the memory of a cache fills up as sequences grow: not in a ring, and more slowly with a period."""
    return cache.period == 1 and not limits.is_ring(cache)


def position_rows(cache: ops.KVCache, kv_type: KVType) -> tuple[int, ...]:
    """Return the bytes of the keys of one position, and of its values if there are any; without scales."""
    dims = (cache.head_dim,) if cache.values_in_keys else (cache.head_dim, cache.value_dim)
    size = {KVType.F32: 4, KVType.F16: 2, KVType.Q8_0: 1}[kv_type]
    return tuple(cache.n_kv_heads * dim * size for dim in dims)


def _kv_bytes(cache: ops.KVCache, limits: Limits, n_slots: int, stores_once: bool) -> int:
    value_dim = 0 if stores_once and cache.values_in_keys else cache.value_dim
    sizes = cache.n_kv_heads, cache.head_dim, value_dim
    return _kernels.kv_cache_bytes(limits.kv_type, n_slots, limits.n_rows(cache), *sizes)


def _cache_bytes(graph: Graph, limits: Limits, stores_once: bool) -> tuple[float, float]:
    """Return the bytes of one position in layers that see all of them, and of what the other layers see."""
    whole = window = 0.0
    for op in graph.operations:
        for cache, n_seen in _caches_of(op):
            n_bytes, n_rows = _kv_bytes(cache, limits, 1, stores_once), limits.n_rows(cache)
            if n_seen:
                window += n_bytes / n_rows * min(n_seen, n_rows)
            else:
                whole += n_bytes / limits.context_length
    return whole, window


def _caches_of(op: ops.Operation) -> Iterator[tuple[ops.KVCache, int]]:
    """Yield the caches that an operation reads, with the rows that a token sees at most; 0: all that there are."""
    if isinstance(op, ops.SelectPositions | ops.SelectBlocks):
        yield op.cache, 0
    elif isinstance(op, ops.Attention):
        yield op.cache, op.most_positions
        if op.shared_cache:
            yield op.shared_cache, op.selected.top_k if op.selected else 0


def _scratch_bytes(graph: Graph, limits: Limits) -> int:
    """Return the memory for intermediate results, those alive at the same time side by side."""
    intervals: dict[ops.Buffer, Interval] = {}
    for i, op in enumerate((*graph.operations, *(graph.draft.operations if graph.draft else ()))):
        for tensor in op.tensors():
            buffer = tensor.buffer
            n_bytes = 4 * limits.most(buffer.rows) * buffer.width
            interval = intervals.setdefault(buffer, Interval(n_bytes, i, i))
            interval.last = i
    return plan_offsets(list(intervals.values()))
