"""A program that can begin steps ahead, on top of one that cannot: what `devices/cuda` does, without a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine import _kernels
from engine.devices.program import NO_DRAW, AheadProgram, Program, Step
from engine.errors import DeviceError
from engine.runtime import Engine


class Ran(NamedTuple):
    """A step that was run."""

    tokens: np.ndarray
    logits: np.ndarray | None


class EagerProgram(AheadProgram):
    """Runs each step as soon as it is begun, with the tokens of the one before, so that a dropped one has left traces.

    Attributes:
        n_ahead: steps that were begun behind another.
        gives_up: says of the number of a step, and of a row, whether it cannot draw after all.
        before: is called with the number of a step before it is run.
        is_broken: cannot even be stopped.
    """

    runs_ahead = True

    def __init__(self, program: Program, allowed: np.ndarray) -> None:
        self.program, self.limits = program, program.limits
        self.n_ahead = self.n_steps = 0
        self.is_broken = False
        self.gives_up: Callable[[int, int], bool] = lambda *_: False
        self.before: Callable[[int], object] = lambda _: None
        self._allowed = np.where(allowed, np.inf, -np.inf).astype(np.float32)
        self._under_way: deque[Ran] = deque()

    def begin(self, step: Step) -> None:
        assert len(self._under_way) < 2
        ids = step.token_ids.copy()
        if self._under_way:
            self.n_ahead += 1
            before = self._under_way[-1]
            assert before.logits is None
            unknown = ids < 0
            ids[unknown] = np.maximum(before.tokens[-1 - ids[unknown]], 0)
        assert ids.min() >= 0
        self.n_steps += 1
        try:
            self.before(self.n_steps)
            logits = self.program.run(ids, *step.inputs[1:]).copy()
        except BaseException:
            self.drop()
            raise
        tokens = np.full(len(logits), -1, np.int32)
        for row, draw in enumerate([] if step.draws is None else step.draws.tolist()):
            if draw[4] != NO_DRAW and not self.gives_up(self.n_steps, row):
                uniform, top_p, min_p, inverse, top_k = draw
                kept = np.minimum(logits[row], self._allowed)
                settings = 1 / inverse, top_k, top_p, min_p, 1.0, 0.0, 0.0, uniform
                tokens[row] = _kernels.sample(kept, np.zeros(0, np.int32), *settings)
        wanted = step.draws is None or NO_DRAW in step.draws["top_k"]
        self._logits = logits
        self._under_way.append(Ran(tokens, logits if wanted else None))

    def finish_layers(self) -> None:
        pass

    def collect(self) -> tuple[np.ndarray, np.ndarray | None]:
        tokens, logits = self._under_way.popleft()
        if logits is None and not self._under_way and tokens.min(initial=0) < 0:
            logits = self._logits
        return tokens, logits

    def end(self, then: Step | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        if then is not None:
            self.begin(then)
        return self.collect()

    def run_and_draw(self, *step: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        self.begin(Step(*step))
        return self.end()

    def run(self, *step: np.ndarray) -> np.ndarray:
        self.begin(Step(*step, None))
        logits = self.end()[1]
        assert logits is not None
        return logits

    def drop(self) -> None:
        self._under_way.clear()
        if self.is_broken:
            raise DeviceError("still broken")


def run_ahead(engine: Engine) -> EagerProgram:
    """Make an engine on the CPU run ahead; return what it runs on."""
    program = EagerProgram(engine._program, engine.tokenizer.sampled_among(engine.spec.n_vocab))
    engine._forward.program, engine._forward.runs_ahead, engine._forward.draws = program, True, True
    return program
