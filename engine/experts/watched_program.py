"""A compiled forward pass with someone who watches its routing: the hot-expert cache, a trace recorder, or both.

Whoever runs steps need not know. After each step the watchers see what was routed, and the cache moves its swaps on;
the logits are the same with and without. On a device that leaves a CPU free for it, the cache does so in a thread of
its own while the next step runs: its milliseconds of Python would else come on top of every token. Where routing is
played back to the routers, that happens here, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from engine.devices.graph import DrawingProgram, Limits, Program, SavingProgram
from engine.devices.slots import ClockedProgram, WaitingProgram
from engine.experts.hot_cache import HotCache
from engine.experts.steering import Steering
from engine.experts.trace import ANSWER, PROMPT, TraceRecorder

_PACE_S = 2e-4  # in which a step of large models comes to the next layer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is over: what it routed, which experts it found in slots, and how long it took."""

    routing: npt.NDArray[np.int32]
    resident: npt.NDArray[np.bool_]
    seconds: float


class WatchedProgram:
    """Implements `graph.Program` on top of another one, which stays its owner's."""

    def __init__(
        self,
        program: Program,
        cache: HotCache | None = None,
        recorder: TraceRecorder | None = None,
        steering: Steering | None = None,
        *,
        in_background: bool = False,
    ) -> None:
        """Watch a program; `in_background` lets the cache work while steps run, of a `WaitingProgram`."""
        self._program, self._cache, self._recorder, self._steering = program, cache, recorder, steering
        self._thread = ThreadPoolExecutor(1, "expert-cache") if in_background else None
        self._settling = threading.Lock()  # an interrupt may leave the thread at work
        self._unseen: _Step | None = None  # the last one, while the cache has not looked at it
        self._looking: Future[None] | None = None  # the thread's latest work
        if in_background:
            waiting = cast(WaitingProgram, program)
            waiting.while_waiting, waiting.before_end = self._begin_to_look, self._get_ready
        self.now = program.now if isinstance(program, ClockedProgram) else time.perf_counter

    @property
    def limits(self) -> Limits:
        """Return what a step may be."""
        return self._program.limits

    @property
    def state_bytes(self) -> int:
        """Return the bytes of all KV caches and recurrent states."""
        return self._program.state_bytes

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of all intermediate results."""
        return self._program.scratch_bytes

    def run(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run one step and let the watchers see it; see `graph.Program.run`."""
        return self._watch(
            token_ids, positions, slots, lambda: self._program.run(token_ids, positions, slots, output_rows)
        )

    def allow(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Say which tokens may be drawn, of a program that draws; see `graph.DrawingProgram`."""
        assert isinstance(self._program, DrawingProgram)
        self._program.allow(allowed)

    def run_and_draw(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
        draws: npt.NDArray[np.void],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Run one step of a program that draws tokens, likewise; see `graph.DrawingProgram`."""
        program = cast(DrawingProgram, self._program)  # to look for its methods takes 10 us, of each token
        return self._watch(
            token_ids, positions, slots, lambda: program.run_and_draw(token_ids, positions, slots, output_rows, draws)
        )

    def _watch(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        run: Callable[[], T],
    ) -> T:
        """Run one step and let the watchers see it."""
        if self._steering is not None:
            with self._settling:
                self._steering.begin_step(len(token_ids))
        if self._cache is not None:
            self._make_room(self._cache, positions, slots)
        resident = None if self._cache is None else self._cache.resident()
        start = self.now()
        try:
            result = run()
            step_s = self.now() - start
        finally:
            self.settle()  # waits until the thread has, or does it
        if self._looking is not None and self._looking.done():
            looking, self._looking = self._looking, None
            looking.result()  # raises what went wrong there
        if self._cache is None and self._recorder is None:
            return result
        routing = self._program.routing()
        if self._recorder is not None:
            self._record(self._recorder, routing, slots)
        if self._steering is not None and self._cache is not None and self._cache.bypasses(len(token_ids)):
            with self._settling:
                routing = self._steering.end_of_prompt()
        if resident is not None:
            self._unseen = _Step(routing, resident, step_s)
        if self._thread is None:
            self.settle()
        return result

    def load_sequence(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put a saved sequence back, see `graph.SavingProgram`: it needs memory as a step that ends there does."""
        assert isinstance(self._program, SavingProgram)
        if self._cache is not None and n_tokens:
            self._make_room(self._cache, np.array([n_tokens - 1], np.int32), np.array([slot], np.int32))
        self._program.load_sequence(slot, n_tokens, saved)

    def _make_room(self, cache: HotCache, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> None:
        with self._settling:
            cache.make_room(len(positions), cache.device.longest_after(positions, slots))
            if self._thread is not None:
                cache.publish_arrivals()  # what the thread publishes while the step runs comes too late for it

    def _begin_to_look(self) -> None:
        """Have the thread look at the last step, now that the one that runs does not need the interpreter."""
        if self._thread is not None and self._unseen is not None:
            self._looking = self._thread.submit(self._look, self._unseen)

    def _look(self, step: _Step) -> None:
        """Let the cache look at a step, then copy experts as soon as the one that runs is done with their slots.

        So they are there for the next step. When the running one is over there is soon nothing left to wait for: nobody
        has to tell.
        """
        with self._settling:
            if self._unseen is step:  # else this comes late
                self._show_unseen()
            if self._steering is not None:
                self._steering.find_next()
        while self._cache is not None and self._go_on(self._cache):
            time.sleep(_PACE_S)

    def _get_ready(self) -> None:
        """Do what a step that is nearly over leaves to do for the next one, in the time that its output head takes."""
        with self._settling:
            self._show_unseen()
            if self._cache is not None:
                self._cache.publish_arrivals()
            if self._steering is not None:
                self._steering.foresee()

    def _go_on(self, cache: HotCache) -> bool:
        with self._settling:
            return cache.go_on()

    def settle(self) -> None:
        """Let the cache look at the last step, if it has not yet. Not to be called while a step runs."""
        with self._settling:
            self._show_unseen()

    def _show_unseen(self) -> None:
        step, self._unseen = self._unseen, None
        if step is not None and self._cache is not None:
            self._cache.observe(step.routing, step.resident)
            self._cache.step(step.seconds)

    @staticmethod
    def _record(recorder: TraceRecorder, routing: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> None:
        """Record a step; sequences that run more than one token in it are at their prompts."""
        n_of = np.bincount(slots)
        for start in np.flatnonzero(np.append(True, slots[1:] != slots[:-1])):
            n = int(n_of[slots[start]])
            recorder.append(routing[:, start : start + n], PROMPT if n > 1 else ANSWER)

    def routing(self) -> npt.NDArray[np.int32]:
        """Return a copy of the experts chosen in the last step, [n_moe_layers, n_tokens, n_experts_used]."""
        return self._program.routing()

    def close(self) -> None:
        """End the thread; the program is left to its owner."""
        if self._thread is not None:
            waiting = cast(WaitingProgram, self._program)
            waiting.while_waiting = waiting.before_end = None
            self._thread.shutdown()
