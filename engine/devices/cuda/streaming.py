"""Streams the experts that have no slot through the GPU while a step of many tokens runs.

Such a step needs nearly every expert of every layer, so nobody asks which: all that have no slot are copied, layer by
layer, first gate and up, then down, some experts at a time. They go through a ring of staging buffers on a stream of
their own, as far ahead of the computation as the ring is long; events keep the two apart. Slots stay as they are, but
for those in whose memory the ring and the intermediate results of the step lie: no expert may be published there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.cuda.expert_layers import Streamed
from engine.devices.cuda.host_memory import ExpertPaths
from engine.devices.cuda.launch import Launch
from engine.devices.cuda.runtime import Context, Event, PinnedMemory, Stream
from engine.resources import Resources

_HOST_BUFFERS = 3  # that the CPU's threads fill, where experts cannot be copied from where they lie


class ExpertStream:
    """The ring, and what it carries in the step at hand. To be used by the thread that runs the steps.

    Attributes:
        places: int32 [n_moe_layers, n_experts], where the kernels find each expert (`expert_tiles.cuh`).
        table: of the same, for the device.
    """

    def __init__(self, context: Context, paths: ExpertPaths) -> None:
        """Make the ring."""
        self._paths, self._lowering = paths, paths.lowering
        assert self._lowering.staging is not None
        self._staging = self._lowering.staging
        self._cold: list[list[int]] = []
        n_layers, n_bytes = len(self._lowering.experts.layers), self._lowering.staging_buffer_bytes
        n_buffers, n_host = self._staging.n_buffers, 0 if paths.is_pinned else _HOST_BUFFERS
        with Resources() as held:
            self.table = held.own(PinnedMemory(4 * n_layers * self._lowering.experts.n_experts))
            self._filled, self._emptied = ([held.own(Event()) for _ in range(n_buffers)] for _ in range(2))
            self._host = [(held.own(PinnedMemory(n_bytes)), held.own(Event())) for _ in range(n_host)]
            self._stream = held.own(Stream(context))
            self._held = held.pop_all()
        self.places: npt.NDArray[np.int32] = self.table.bytes.view(np.int32).reshape(n_layers, -1)

    def begin(self, slots: npt.NDArray[np.int32]) -> None:
        """Note who has a slot in the coming step, int32 [n_moe_layers, n_experts], -1 for nobody."""
        self._cold = []
        slots = slots.copy()  # the cache may go on while the step runs
        for layer, places, own_slots in zip(self._lowering.experts.step_layers, self.places, slots, strict=False):
            places[:] = own_slots
            cold = np.flatnonzero(own_slots[: layer.n_experts] < 0)
            places[cold] = -2 - np.arange(len(cold))
            self._cold.append(cold.tolist())

    def launch(self, steps: Sequence[Launch | Streamed], stream: Stream) -> None:
        """Queue the step's launches, with the copies they need; returns before any of it is over."""
        batches = self._batches(steps)
        n_buffers, n_begun, n_used = self._staging.n_buffers, 0, 0
        for step in steps:
            if isinstance(step, Launch):
                stream.launch(step)
                continue
            for group, _ in self._groups(step):
                while n_begun < n_used + n_buffers and (batch := next(batches, None)) is not None:
                    self._copy(*batch, turn=n_begun)
                    n_begun += 1
                buffer = n_used % n_buffers
                stream.wait(self._filled[buffer])
                step.group.value = group
                stream.launch(step.launches[buffer])
                self._emptied[buffer].record(stream)
                n_used += 1

    def synchronize(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()

    def close(self) -> None:
        """Wait for the copies and free the ring."""
        self._held.close()

    def _groups(self, step: Streamed) -> Iterator[tuple[int, list[int]]]:
        """Yield the batches of a layer's experts, each with the number that the kernels know it by."""
        cold, at_once = self._cold[step.layer], self._staging.at_once
        for i, first in enumerate(range(0, len(cold), at_once)):
            yield 1 + i, cold[first : first + at_once]

    def _batches(self, steps: Sequence[Launch | Streamed]) -> Iterator[tuple[Streamed, list[int]]]:
        for step in steps:
            if isinstance(step, Streamed):
                yield from ((step, experts) for _, experts in self._groups(step))

    def _copy(self, step: Streamed, experts: list[int], turn: int) -> None:
        """Queue the copy of some experts' matrices into the next buffer, after the kernels that read it before."""
        buffer = turn % self._staging.n_buffers
        to = self._paths.base + self._lowering.staging_offset + buffer * self._lowering.staging_buffer_bytes
        pieces = list(self._pieces(step, experts))
        if turn >= self._staging.n_buffers:
            self._stream.wait(self._emptied[buffer])
        if self._host:
            host, sent = self._host[turn % len(self._host)]
            sent.synchronize()
            for address, offset, n_bytes in pieces:
                _kernels.parallel_copy(address, host.address + offset, n_bytes, self._paths.n_threads)
            _, offset, n_bytes = pieces[-1]
            self._stream.upload(to, host.address, offset + n_bytes)
            sent.record(self._stream)
        else:
            for address, offset, n_bytes in pieces:
                self._stream.upload(to + offset, address, n_bytes)
        self._filled[buffer].record(self._stream)

    def _pieces(self, step: Streamed, experts: list[int]) -> Iterator[tuple[int, int, int]]:
        """Yield (address in RAM, offset in the buffer, bytes) of stretches that lie together in both."""
        layer = self._lowering.experts.layers[step.layer]
        for i, start in zip(step.matrices, layer.staged(step.matrices, self._staging.at_once), strict=True):
            array, stride = self._paths.weights.array(layer.weights[i].name), layer.slot_bytes[i]
            address, first, n_bytes = -1, 0, 0
            for position, expert in enumerate(experts):
                source = layer.expert(array, i, expert)
                if address + n_bytes == source.ctypes.data and first + n_bytes == position * stride:
                    n_bytes += source.nbytes
                    continue
                if n_bytes:
                    yield address, start + first, n_bytes
                address, first, n_bytes = int(source.ctypes.data), position * stride, source.nbytes
            yield address, start + first, n_bytes
