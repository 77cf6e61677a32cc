"""Moves experts into slots beside the steps that run, without ever showing a step a slot that is half written.

A slot's old expert is taken out of the table before the first byte of the new one is copied, and the new one enters it
after the last: both between steps, when no kernel reads the slots. Meanwhile the CPU computes either as a miss. Copies
go through a ring of pinned buffers on a stream of their own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.runtime import Context, Event, PinnedMemory, Stream, close_all
from engine.devices.graph import WeightAccess


@dataclass(slots=True)
class _Swap:
    layer: int
    expert: int
    slot: int
    buffer: int


class Swaps:
    """Copies that are under way. To be called by the thread that runs the steps, between two of them."""

    def __init__(
        self,
        context: Context,
        lowering: Lowering,
        weights: WeightAccess,
        base: int,
        table: npt.NDArray[np.int32],
        n_buffers: int = 2,
        n_threads: int = 1,
    ) -> None:
        """Make the ring; `table` is int32 [n_layers, n_experts], the slot of each expert or -1, read by every step."""
        self._lowering = lowering
        self._weights = weights
        self._base = base
        self._table = table
        self._n_threads = n_threads
        largest = max((sum(layer.slot_bytes) for layer in lowering.expert_layers), default=0)
        self._stream = Stream(context)
        self._buffers = [PinnedMemory(largest) for _ in range(n_buffers)]
        self._events = [Event() for _ in range(n_buffers)]
        self._free = deque(range(n_buffers))
        self._under_way: deque[_Swap] = deque()

    @property
    def n_under_way(self) -> int:
        """Return how many swaps have begun and are not published."""
        return len(self._under_way)

    def begin(self, layer: int, expert: int, slot: int) -> bool:
        """Start to copy an expert into a slot of its layer; its old expert is a miss from now on.

        Returns False, having done nothing, if all buffers are in use: try again after a step.
        """
        row = self._table[layer]
        assert row[expert] < 0, "the expert has a slot"
        assert 0 <= slot < self._lowering.n_expert_slots
        assert all((s.layer, s.slot) != (layer, slot) for s in self._under_way), "the slot is being filled"
        assert all((s.layer, s.expert) != (layer, expert) for s in self._under_way), "the expert is on its way"
        if not self._free:
            return False
        row[row == slot] = -1
        buffer = self._free.popleft()
        pinned, at = self._buffers[buffer], 0
        experts = self._lowering.expert_layers[layer]
        for i, weight in enumerate(experts.weights):
            source = experts.expert(self._weights.array(weight.name), i, expert)
            _kernels.parallel_copy(int(source.ctypes.data), pinned.address + at, source.nbytes, self._n_threads)
            to = self._base + experts.slots[i] + slot * experts.slot_bytes[i]
            self._stream.upload(to, pinned.address + at, source.nbytes)
            at += experts.slot_bytes[i]
        self._events[buffer].record(self._stream)
        self._under_way.append(_Swap(layer, expert, slot, buffer))
        return True

    def publish(self) -> int:
        """Enter the experts whose copies are done into the table; return how many."""
        n = 0
        while self._under_way and self._events[self._under_way[0].buffer].is_done():
            swap = self._under_way.popleft()
            self._table[swap.layer, swap.expert] = swap.slot
            self._free.append(swap.buffer)
            n += 1
        return n

    def close(self) -> None:
        """Wait for the copies and free the ring."""
        close_all([self._stream, *self._events, *self._buffers])
