"""Copies experts into slots, beside the steps that run.

The bytes go straight from where they lie if that memory is pinned, else through a ring of pinned buffers, on a stream
of their own. Some copies are under way at the same time; others wait in a queue and are started by whoever next asks
whether a copy is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from engine import _kernels
from engine.devices.cuda.expert_layers import ExpertLayer
from engine.devices.cuda.host_memory import ExpertPaths
from engine.devices.cuda.runtime import Context, Event, PinnedMemory, Stream
from engine.devices.program import WeightAccess
from engine.errors import DeviceError
from engine.resources import Resources

N_AT_ONCE = 256  # that need no buffer
N_BUFFERS = 8


@dataclass(slots=True, eq=False)
class Copy:
    """An expert on its way into a slot.

    Attributes:
        layer, expert, slot: who and where to.
        is_done: it is there, or failed.
        error: why it failed.
    """

    layer: int
    expert: int
    slot: int
    is_done: bool = False
    error: DeviceError | None = None


class ExpertCopies:
    """The copies that are under way. To be used by one thread at a time."""

    def __init__(self, context: Context, paths: ExpertPaths) -> None:
        """Make the ring."""
        self._paths = paths
        layers = paths.lowering.experts.step_layers
        self._pieces = [list(_pieces(layer, paths.weights)) for layer in layers]
        largest = max((layer.expert_bytes for layer in layers), default=0)
        self._waiting: deque[Copy] = deque()
        self._under_way: deque[tuple[Copy, PinnedMemory | None, Event]] = deque()
        self._free: deque[tuple[PinnedMemory | None, Event]] = deque()
        with Resources() as held:
            for _ in range(N_AT_ONCE if paths.is_pinned else N_BUFFERS):
                buffer = None if paths.is_pinned else held.own(PinnedMemory(largest))
                self._free.append((buffer, held.own(Event())))
            self._stream = held.own(Stream(context))
            self._held = held.pop_all()

    def begin(self, layer: int, expert: int, slot: int) -> Copy:
        """Queue a copy into a slot that no step reads."""
        copy = Copy(layer, expert, slot)
        self._waiting.append(copy)
        self.advance()
        return copy

    def advance(self) -> None:
        """Note which copies are done, and start those that wait for a buffer."""
        while self._under_way:
            copy, buffer, event = self._under_way[0]
            try:
                if not event.is_done():
                    break
            except DeviceError as error:
                copy.error = error
            copy.is_done = True
            self._free.append((buffer, event))
            self._under_way.popleft()
        while self._waiting and self._free:
            copy = self._waiting[0]
            try:
                self._start(copy, *self._free[0])
            except DeviceError as error:
                copy.error, copy.is_done = error, True
            else:
                self._under_way.append((copy, *self._free.popleft()))
            self._waiting.popleft()

    def wait_all(self) -> None:
        """Wait for every copy; those that failed say so when they are asked."""
        while self._waiting or self._under_way:
            try:
                self._stream.synchronize()
            except DeviceError as error:  # of all that were under way
                for copy, buffer, event in self._under_way:
                    copy.error, copy.is_done = error, True
                    self._free.append((buffer, event))
                self._under_way.clear()
            self.advance()

    def close(self) -> None:
        """Wait for the copies and free the ring."""
        self._held.close()

    def _start(self, copy: Copy, buffer: PinnedMemory | None, event: Event) -> None:
        paths = self._paths
        to = paths.base + paths.lowering.experts.layers[copy.layer].offsets[copy.slot]
        for address, stride, n_bytes, offset in self._pieces[copy.layer]:
            source = address + copy.expert * stride
            if buffer is not None:
                _kernels.parallel_copy(source, buffer.address + offset, n_bytes, paths.n_threads)
                source = buffer.address + offset
            self._stream.upload(to + offset, source, n_bytes)
        event.record(self._stream)


def _pieces(layer: ExpertLayer, weights: WeightAccess) -> Iterator[tuple[int, int, int, int]]:
    """Yield each matrix of an expert: address of the first expert's, how far to the next, bytes, offset in a slot.

    Worked out once, for copies are begun between other things that the interpreter is wanted for.
    """
    for i, weight in enumerate(layer.weights):
        first, stride, n_bytes = layer.stretch(i)
        yield int(weights.array(weight.name).ctypes.data) + first, stride, n_bytes, layer.matrix_offset(i)
