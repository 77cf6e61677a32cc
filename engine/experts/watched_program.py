"""A compiled forward pass with someone who watches its routing: the hot-expert cache, a trace recorder, or both.

Whoever runs steps need not know. After each step the watchers see what was routed, and the cache moves its swaps on;
the logits are the same with and without. On a device that leaves a CPU free for it, the cache does so in a thread of
its own while the next step runs: its milliseconds of Python would else come on top of every token. It begins when the
step has been begun and is waited for: before that it would hold the interpreter, and the step would not get on. Where
routing is played back to the routers, that happens here, too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.devices.program import (
    DraftingProgram,
    DrawingProgram,
    Drawn,
    Limits,
    Program,
    SavingProgram,
    StagedProgram,
    Step,
)
from engine.devices.slots import ClockedProgram
from engine.errors import DeviceError
from engine.experts.hot_cache import HotCache
from engine.experts.steering import Steering
from engine.experts.trace import ANSWER, PROMPT, TraceRecorder

_NO_TOKENS: npt.NDArray[np.int32] = np.empty(0, np.int32)
_PACE_S = 2e-4  # in which a step of large models comes to the next layer


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that was begun: which experts had slots, and when."""

    step: Step
    resident: npt.NDArray[np.bool_] | None
    at: float


@dataclass(frozen=True, slots=True)
class _Over:
    """A step that is over: what it routed, which experts it found in slots, and how long it took."""

    routing: npt.NDArray[np.int32]
    resident: npt.NDArray[np.bool_]
    seconds: float


class WatchedProgram:
    """Implements `program.Program`, and `AheadProgram` on top of a staged one; the program stays its owner's.

    Attributes:
        runs_ahead: see `AheadProgram`; False for others.
        has_head: see `DraftingProgram`; False for others.
    """

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
        self._playing = threading.Lock()  # of its own: to find what is played takes longer than all else
        # Asked once: it takes microseconds, and a step is to take few of them.
        self._drawing = program if isinstance(program, DrawingProgram) else None
        self._staged = program if isinstance(program, StagedProgram) else None
        self.runs_ahead = self._staged is not None and self._staged.runs_ahead
        self._drafting = program if isinstance(program, DraftingProgram) else None
        self.has_head = self._drafting is not None and self._drafting.has_head
        self._begun: deque[_Begun] = deque()  # what is under way
        self._ended_at = 0.0  # the last step
        self._unseen: _Over | None = None  # the last one, while the cache has not looked at it
        self._looking: Future[None] | None = None  # the thread's latest work
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
        """Run one step and let the watchers see it; see `program.Program.run`."""
        _, logits = self._run(Step(token_ids, positions, slots, output_rows, None))
        assert logits is not None
        return logits

    def allow(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Say which tokens may be drawn, of a program that draws; see `program.DrawingProgram`."""
        assert self._drawing is not None
        self._drawing.allow(allowed)

    def draft(self, slot: int, token_id: int, position: int, n: int) -> list[int]:
        """Guess the tokens that follow one; see `program.DraftingProgram`. Nobody watches that."""
        assert self._drafting is not None
        return self._drafting.draft(slot, token_id, position, n)

    def run_and_draw(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
        draws: npt.NDArray[np.void],
    ) -> Drawn:
        """Run one step of a program that draws tokens, likewise; see `program.DrawingProgram`."""
        return self._run(Step(token_ids, positions, slots, output_rows, draws))

    def _run(self, step: Step) -> Drawn:
        if self._staged is not None:
            self.begin(step)
            return self.end()
        if self._cache is None and self._recorder is None and self._steering is None:
            return self._run_at_once(step)
        self._steer(step)
        begun = self._prepare(step)
        result = self._run_at_once(step)
        self._see(begun)
        return result

    def _run_at_once(self, step: Step) -> Drawn:
        if step.draws is None:
            return _NO_TOKENS, self._program.run(*step.inputs)
        assert self._drawing is not None
        return self._drawing.run_and_draw(*step.inputs, step.draws)

    def begin(self, step: Step) -> None:
        """Begin a step; see `program.AheadProgram`."""
        assert self._staged is not None
        try:
            self._steer(step)
            self._staged.prepare(step)
            self._launch(step, self._staged)
        except BaseException:
            self._drop_quietly()
            raise

    def end(self, then: Step | None = None) -> Drawn:
        """Finish the oldest step under way, with another one begun behind it, and let the watchers see it."""
        assert self._staged is not None
        try:
            self._begin_to_look()
            if then is not None:  # long before it can start: whoever begins one late lets the device wait
                self._steer(then)
                self._staged.prepare(then)
                with self._cache.held() if self._cache is not None else contextlib.nullcontext():
                    if self._thread is not None:  # swaps that are planned now wait for this step, not for the next
                        self.settle()
                    self._launch(then, self._staged)
            self._staged.finish_layers()
            if then is not None:
                self._note_start()
            result = self._staged.collect()
        except BaseException:
            self._drop_quietly()
            raise
        self._see(self._begun.popleft())
        return result

    def _launch(self, step: Step, program: StagedProgram) -> None:
        begun = self._prepare(step)
        program.launch()
        self._begun.append(begun)

    def _note_start(self) -> None:
        """Note whom the step that was begun ahead finds in slots, now that it starts."""
        if self._cache is not None:
            with self._settling:
                self._cache.publish_arrivals()
                self._begun[-1] = replace(self._begun[-1], resident=self._cache.resident())

    def drop(self) -> None:
        """Stop all steps under way."""
        assert self._staged is not None
        self._begun.clear()
        self._staged.drop()

    def _drop_quietly(self) -> None:
        with contextlib.suppress(DeviceError):  # the error at hand says more
            self.drop()

    def _steer(self, step: Step) -> None:
        """Tell routers what they are to choose in a step."""
        if self._steering is not None:
            with self._playing:
                self._steering.begin_step(len(step.token_ids))

    def _prepare(self, step: Step) -> _Begun:
        """Do what is to be done before a step."""
        if self._cache is not None:
            self._make_room(self._cache, step.positions, step.slots)
        return _Begun(step, None if self._cache is None else self._cache.resident(), self.now())

    def _see(self, begun: _Begun) -> None:
        """Let the watchers see a step that is over, now or as soon as somebody waits for the next one."""
        seconds = self.now() - max(begun.at, self._ended_at)
        self._ended_at = self.now()
        self.settle()  # waits until the thread has looked at the step before, or does it
        if self._looking is not None and self._looking.done():
            looking, self._looking = self._looking, None
            looking.result()  # raises what went wrong there
        if self._cache is None and self._recorder is None:
            return
        routing, slots = self._program.routing(), begun.step.slots
        if self._recorder is not None:
            self._record(self._recorder, routing, slots)
        if self._steering is not None and self._cache is not None and self._cache.bypasses(len(slots)):
            with self._playing:
                routing = self._steering.end_of_prompt(routing)
        if begun.resident is not None:
            self._unseen = _Over(routing, begun.resident, seconds)
        if self._thread is None:
            self.settle()

    def load_sequence(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put a saved sequence back, see `program.SavingProgram`: it needs memory as a step that ends there does."""
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

    def _look(self, step: _Over) -> None:
        """Let the cache look at a step, then copy experts as soon as the one that runs is done with their slots.

        So they are there for the next step, begun or not: it reads who is where when it starts. When the running one is
        over, it is the next to be looked at.
        """
        with self._settling:
            if self._unseen is step:  # else this comes late
                self._show_unseen()
        if self._steering is not None:
            with self._playing:
                self._steering.find_next()
        while self._unseen is None and self._cache is not None and self._go_on(self._cache):
            time.sleep(_PACE_S)

    def _go_on(self, cache: HotCache) -> bool:
        with self._settling:
            return cache.go_on()

    def settle(self) -> None:
        """Let the cache look at the last step, if it has not yet."""
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
            self._thread.shutdown()
