"""The launches of a step: made once for some numbers of tokens, and queued again for every step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from engine.devices.cuda.expert_layers import Streamed
from engine.devices.cuda.jit import Progress
from engine.devices.cuda.kernels import Exchange
from engine.devices.cuda.launch import Launch
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.runtime import Context, Event, Graph, PinnedMemory, Stream
from engine.devices.cuda.step_memory import StepMemory
from engine.devices.cuda.streaming import ExpertStream
from engine.devices.footprint import long_sizes
from engine.resources import Resources

_SIZES = (1, 4, 8, 64)  # steps of up to so many tokens have launches made for that size, too
DRAFT = 0  # the size of what guesses a token
_LARGEST_GRAPH = 64  # larger steps are launched one kernel after the other, which costs little beside their work


class Steps:
    """Queues steps on a stream. A step takes the launches of the next size that is large enough.

    They are a graph where the CPU takes part, for the launches of a step that waits for it must all be queued before it
    is answered, and where they are short. Short steps, which decode, have launches for both buffers of the memory: so
    one can be queued behind another.
    """

    def __init__(
        self,
        context: Context,
        stream: Stream,
        lowering: Lowering,
        base: int,
        memory: StepMemory,
        exchange: Exchange | None,
        expert_stream: ExpertStream | None,
        progress: Progress | None,
    ) -> None:
        """Compile all kernels and make all graphs.

        Args:
            context: compiles.
            stream: of all steps.
            lowering: makes the launches.
            base: where the device allocation begins.
            memory: what goes in and comes out.
            exchange: memory shared with the CPU, None if it computes no experts.
            expert_stream: brings experts that have no slot to the device, None if no step does so.
            progress: called while kernels are compiled.
        """
        self._stream, self._lowering, self._base, self._memory = stream, lowering, base, memory
        self._expert_stream = expert_stream
        self._graphs: dict[tuple[int, int], Graph] = {}  # by size and buffer
        self._launches: dict[tuple[int, int], list[Launch | Streamed]] = {}
        staging, max_tokens = lowering.staging, lowering.limits.max_tokens
        largest = max_tokens if staging is None else min(staging.from_n_tokens - 1, max_tokens)  # that streams nothing
        all_sizes = {*_SIZES, *long_sizes(max_tokens), *lowering.sizes}
        recorded: dict[tuple[int, int], list[Launch | Streamed]] = {}
        sizes = sorted({min(size, largest) for size in all_sizes})
        decoding = next((size for size in sizes if size >= lowering.limits.n_slots), sizes[-1])
        for size in sizes:
            launches = lowering.launches(base, size, exchange)
            for buffer in range(2 if size <= decoding else 1):
                recorded[size, buffer] = self._whole(launches, size, buffer, memory.table)
        if expert_stream is not None:
            for size in sorted({min(size, max_tokens) for size in all_sizes if size > largest}):
                recorded[size, 0] = self._whole(lowering.streaming_launches(base, size), size, 0, expert_stream.table)
        if lowering.can_draft:
            own, before = memory.buffers
            draft = lowering.draft_launches(base, exchange if lowering.draft_asks_cpu else None)
            recorded[DRAFT, 0] = [*own.fetch(base, 1, memory.table, before), *draft, *own.end_draft(base)]
        kernels = [kernel for whole in recorded.values() for step in whole for kernel in _kernels_of(step)]
        context.prepare(kernels, progress)
        for kernel in kernels:
            context.function(kernel)  # no look-up may happen while a graph waits
        self._sizes, self._largest = [size for size, buffer in recorded if not buffer and size != DRAFT], largest
        with Resources() as held:
            self._passed = held.own(Event())  # after the last but one step
            for (size, buffer), whole in recorded.items():
                if size <= largest and (exchange is not None or size <= _LARGEST_GRAPH):
                    self._graphs[size, buffer] = held.own(stream.capture(partial(self._queue, whole, size)))
                else:
                    self._launches[size, buffer] = whole
            self._held = held.pop_all()

    def _whole(
        self, launches: Sequence[Launch | Streamed], size: int, buffer: int, table: PinnedMemory
    ) -> list[Launch | Streamed]:
        """Return the launches of a step whose inputs and results are in a buffer; table: of the experts' places."""
        own, before = self._memory.buffers[buffer], self._memory.buffers[1 - buffer]
        return [*own.fetch(self._base, size, table, before), *launches, *own.end(self._base, size)]

    def size_for(self, n_tokens: int) -> int:
        """Return the size whose launches a step of so many tokens takes."""
        return next(size for size in self._sizes if size >= n_tokens)

    def launch(self, size: int, buffer: int, *, behind: bool = False) -> None:
        """Queue a step; `behind` another, for whose end `wait_for_passed` waits then."""
        if behind:
            self._passed.record(self._stream)
        if (size, buffer) in self._graphs:
            self._graphs[size, buffer].launch(self._stream)
        else:
            self._queue(self._launches[size, buffer], size)

    def download_logits(self, logits: npt.NDArray[np.float32], size: int) -> None:
        """Queue what brings the first logits of a step to the host."""
        source = self._base + self._lowering.logits(size)
        self._stream.download(int(logits.ctypes.data), source, logits.nbytes)

    def synchronize(self) -> None:
        """Wait for the step, and for the copies that it began; those may fail, too."""
        if self._expert_stream is not None:
            self._expert_stream.synchronize()
        self._stream.synchronize()

    def wait_for_passed(self) -> None:
        """Wait for the step before the one that was queued last, behind it."""
        self._passed.synchronize()

    def close(self) -> None:
        """Destroy the graphs; no step may be under way."""
        self._held.close()

    def _queue(self, launches: Sequence[Launch | Streamed], size: int) -> None:
        if self._expert_stream is not None and size > self._largest:
            self._expert_stream.begin(self._memory.places)
            self._expert_stream.launch(launches, self._stream)
        else:
            for launch in launches:
                assert isinstance(launch, Launch)
                self._stream.launch(launch)


def _kernels_of(step: Launch | Streamed) -> tuple[Launch, ...]:
    return (step,) if isinstance(step, Launch) else step.launches
