"""A compiled forward pass with someone who watches its routing: the hot-expert cache, a trace recorder, or both.

Whoever runs steps need not know. After each step, before the next one, the watchers see what was routed, and the
cache moves its swaps on; the logits are the same with and without. Where routing is played back to the routers, that
happens here, too.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from engine.devices.graph import Limits, Program
from engine.devices.slots import ClockedProgram
from engine.experts.hot_cache import HotCache
from engine.experts.steering import Steering
from engine.experts.trace import ANSWER, PROMPT, TraceRecorder


class WatchedProgram:
    """Implements `graph.Program` on top of another one, which stays its owner's."""

    def __init__(
        self,
        program: Program,
        cache: HotCache | None = None,
        recorder: TraceRecorder | None = None,
        steering: Steering | None = None,
    ) -> None:
        self._program, self._cache, self._recorder, self._steering = program, cache, recorder, steering
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
        if self._steering is not None:
            self._steering.begin_step(len(token_ids))
        start = self.now()
        logits = self._program.run(token_ids, positions, slots, output_rows)
        if self._cache is None and self._recorder is None:
            return logits
        step_s = self.now() - start
        routing = self._program.routing()
        if self._recorder is not None:
            self._record(self._recorder, routing, slots)
        if self._cache is not None:
            self._cache.observe(routing)
            self._cache.step(step_s)
        return logits

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
        """Leave the program to its owner."""
