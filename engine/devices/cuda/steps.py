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
from engine.devices.cuda.runtime import Context, Graph, Stream, close_all
from engine.devices.cuda.step_memory import StepMemory
from engine.devices.cuda.streaming import ExpertStream

_SIZES = (1, 4, 8, 64, 512)  # steps of up to so many tokens have launches made for that size
_LARGEST_GRAPH = 64  # larger steps are launched one kernel after the other, which costs little beside their work


class Steps:
    """Queues steps on a stream. A step takes the launches of the next size that is large enough.

    They are a graph where the CPU takes part, for the launches of a step that waits for it must all be queued before it
    is answered, and where they are short.
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
        self._graphs: dict[int, Graph] = {}
        self._launches: dict[int, list[Launch | Streamed]] = {}
        staging, max_tokens = lowering.staging, lowering.limits.max_tokens
        largest = max_tokens if staging is None else min(staging.from_n_tokens - 1, max_tokens)  # that streams nothing
        short = largest if staging is None else staging.lends_from - 1  # no larger step may take a short one's launches
        recorded: dict[int, list[Launch | Streamed]] = {}
        for size in sorted({min(size, largest) for size in (*_SIZES, short, largest)}):
            first, last = memory.fetch(base, size, memory.table), memory.draw(base, size)
            recorded[size] = [*first, *lowering.launches(base, size, exchange), *last]
        if expert_stream is not None:
            for size in sorted({min(size, max_tokens) for size in (*_SIZES, max_tokens) if size > largest}):
                first, last = memory.fetch(base, size, expert_stream.table), memory.draw(base, size)
                recorded[size] = [*first, *lowering.streaming_launches(base, size), *last]
        kernels = [kernel for launches in recorded.values() for step in launches for kernel in _kernels_of(step)]
        context.prepare(kernels, progress)
        for kernel in kernels:
            context.function(kernel)  # no look-up may happen while a graph waits
        self._sizes, self._largest = list(recorded), largest
        try:
            for size, launches in recorded.items():
                if size <= largest and (exchange is not None or size <= _LARGEST_GRAPH):
                    self._graphs[size] = stream.capture(partial(self._queue, launches, size))
                else:
                    self._launches[size] = launches
        except BaseException:
            self.close()
            raise

    def size_for(self, n_tokens: int) -> int:
        """Return the size whose launches a step of so many tokens takes."""
        return next(size for size in self._sizes if size >= n_tokens)

    def launch(self, size: int) -> None:
        """Queue a step, with the routing it gives."""
        if size in self._graphs:
            self._graphs[size].launch(self._stream)
        else:
            self._queue(self._launches[size], size)

    def download_logits(self, logits: npt.NDArray[np.float32], size: int) -> None:
        """Queue what brings the first logits of a step to the host."""
        source = self._base + self._lowering.logits(size)
        self._stream.download(int(logits.ctypes.data), source, logits.nbytes)

    def synchronize(self) -> None:
        """Wait for the step, and for the copies that it began; those may fail, too."""
        if self._expert_stream is not None:
            self._expert_stream.synchronize()
        self._stream.synchronize()

    def close(self) -> None:
        """Destroy the graphs; no step may be under way."""
        graphs, self._graphs = list(self._graphs.values()), {}
        close_all(graphs)

    def _queue(self, launches: Sequence[Launch | Streamed], size: int) -> None:
        if self._expert_stream is not None and size > self._largest:
            self._expert_stream.begin(self._memory.places)
            self._expert_stream.launch(launches, self._stream)
        else:
            for launch in launches:
                assert isinstance(launch, Launch)
                self._stream.launch(launch)
        self._memory.download_routing(self._base, size, self._stream)


def _kernels_of(step: Launch | Streamed) -> tuple[Launch, ...]:
    return (step,) if isinstance(step, Launch) else step.launches
