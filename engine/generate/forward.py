"""Runs the compiled forward pass over stretches of tokens of any length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from engine.devices.graph import Rows
from engine.devices.program import (
    DRAW,
    NO_DRAW,
    AheadProgram,
    DraftingProgram,
    Draw,
    DrawingProgram,
    Limits,
    Program,
    Step,
)
from engine.devices.slots import ClockedProgram
from engine.errors import RequestError

Outputs = Literal["none", "last", "all"]
Progress = Callable[[int, int], None]
_NO_DRAW: Draw = (0.0, 1.0, 0.0, 1.0, NO_DRAW)


class Part(NamedTuple):
    """A sequence's part of a step.

    Attributes:
        slot: which of the kept sequences.
        token_ids: to append, at least one; -1 - i for the token that row i of the step before gives.
        position: tokens that the sequence holds already.
        draws: how the tokens are drawn that follow the last ones of these, one each; None to look at the logits.
    """

    slot: int
    token_ids: Sequence[int]
    position: int
    draws: Sequence[Draw | None] = ()


class ForwardPass:
    """Feeds sequences to a program, in steps that it can take.

    Attributes:
        now: returns seconds, of the program's clock if it has one.
        draws: whether the program draws tokens.
        runs_ahead: whether `end` can begin another step.
        most_by_head: how many tokens the model itself guesses in a row; 0: it has no head for that.
    """

    def __init__(
        self,
        program: Program,
        limits: Limits,
        n_vocab: int,
        *,
        draws: bool = False,
        runs_ahead: bool = False,
        most_guesses: int = 0,
    ) -> None:
        """Use a program.

        Args:
            program: runs the steps.
            limits: of a step.
            n_vocab: tokens that there are logits of.
            draws: it is a `DrawingProgram`, or watches one.
            runs_ahead: it is an `AheadProgram`, or watches one, of which steps are to be begun ahead.
            most_guesses: as of a `ModelSpec`.
        """
        self.program = program
        self.now: Callable[[], float] = program.now if isinstance(program, ClockedProgram) else time.perf_counter
        self.limits = limits
        self.n_vocab = n_vocab
        self.runs_ahead = runs_ahead
        self.draws = draws
        self._head = program if isinstance(program, DraftingProgram) and program.has_head else None
        self.most_by_head = 0 if self._head is None else most_guesses or limits.max_drafts
        self._waiting: Step | None = None  # was begun, of a program that can only run it as a whole
        self._slots = np.zeros(limits.max_tokens, np.int32)
        self._no_rows = np.zeros(0, np.int32)

    def check(self, position: int, n_tokens: int) -> None:
        """Raise `RequestError` if so many tokens cannot follow as many as `position` says."""
        if n_tokens == 0:
            raise RequestError("there are no tokens to run; give at least one")
        if position + n_tokens > self.limits.context_length:
            raise RequestError(
                f"{position + n_tokens} tokens do not fit the context of {self.limits.context_length}; "
                "shorten the prompt or raise [engine] context_length"
            )

    def run(
        self,
        slot: int,
        token_ids: Sequence[int] | npt.NDArray[np.int32],
        position: int,
        outputs: Outputs = "last",
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the sequence in `slot`, the first of them at `position`; position 0 starts it afresh.

        Args:
            slot: which of the kept sequences.
            token_ids: int32 [n].
            position: tokens that the sequence holds already.
            outputs: the tokens whose logits are wanted.
            progress: called with (tokens done, tokens in all) after every step.

        Returns:
            Logits, float32 [0 | 1 | n, n_vocab]: for "last" a view that is valid until the next call, for "all" fresh
            memory.

        Raises:
            RequestError: if there are no tokens, an id is not in the vocabulary, or the sequence gets longer than the
                context.
        """
        ids = np.asarray(token_ids, np.int32)
        n = len(ids)
        self.check(position, n)
        logits = np.empty((n if outputs == "all" else 0, self.n_vocab), np.float32)
        step = self.limits.most(Rows.OUTPUTS if outputs == "all" else Rows.TOKENS)
        for start in range(0, n, step):
            stop = min(start + step, n)
            rows = self._rows(stop - start, outputs, is_last=stop == n)
            positions = np.arange(position + start, position + stop, dtype=np.int32)
            self._slots[: stop - start] = slot
            result = self.program.run(ids[start:stop], positions, self._slots[: stop - start], rows)
            if outputs == "all":
                logits[start:stop] = result
            else:
                logits = result
            if progress is not None:
                progress(stop, n)
        return logits

    def begin(self, parts: Sequence[Part]) -> None:
        """Begin to append to several sequences in one step, which reads each weight they share once.

        Raises `RequestError` for more than `limits.max_tokens` tokens or a position beyond the context.
        """
        step = self._step(parts)
        if self.runs_ahead:
            cast(AheadProgram, self.program).begin(step)
        else:
            self._waiting = step

    def end(self, then: Sequence[Part] = ()) -> list[int | npt.NDArray[np.float32]]:
        """Wait for the end of the step that was begun first; `then` is begun before its tokens are looked at.

        Returns for each token that something is to follow, in order, its logits, float32 [n_vocab], a view that is
        valid until the next step; or the token that follows, where the program could draw it. With `then` that is -1
        for a token that it could not draw after all; both steps have to be run again.
        """
        if self.runs_ahead:
            tokens, logits = cast(AheadProgram, self.program).end(self._step(then) if then else None)
        else:
            step, self._waiting = self._waiting, None
            assert step is not None
            assert not then
            if step.draws is None:
                return list(self.program.run(*step.inputs))
            program = cast(DrawingProgram, self.program)  # to look for its methods takes 10 us, of each token
            tokens, logits = program.run_and_draw(*step.inputs, step.draws)
        return [logits[i] if token < 0 and logits is not None else token for i, token in enumerate(tokens.tolist())]

    @property
    def has_head(self) -> bool:
        """Return whether the model can guess tokens itself."""
        return self._head is not None

    def draft(self, slot: int, token_id: int, position: int, n: int) -> tuple[list[int], float]:
        """Return `n` tokens that the model guesses to follow one that was not run yet, and the seconds that took."""
        assert self._head is not None
        assert n <= self.most_by_head
        start = self.now()
        guesses = self._head.draft(slot, token_id, position, n)
        return guesses, self.now() - start

    def drop(self) -> None:
        """Stop what is under way; what its sequences hold is not known."""
        self._waiting = None
        if self.runs_ahead:
            cast(AheadProgram, self.program).drop()

    def _step(self, parts: Sequence[Part]) -> Step:
        """Return what a program takes."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        draws: list[Draw | None] = []
        for part in parts:
            ids.extend(part.token_ids)
            positions.extend(range(part.position, part.position + len(part.token_ids)))
            slots.extend([part.slot] * len(part.token_ids))
            rows.extend(range(len(ids) - len(part.draws), len(ids)))
            draws.extend(part.draws)
        packed = None
        if self.draws and any(draw is not None for draw in draws):
            packed = np.array([draw or _NO_DRAW for draw in draws], DRAW)
        array, int32 = np.array, np.int32
        return Step(array(ids, int32), array(positions, int32), array(slots, int32), array(rows, int32), packed)

    def _rows(self, n: int, outputs: Outputs, *, is_last: bool) -> npt.NDArray[np.int32]:
        if outputs == "all":
            return np.arange(n, dtype=np.int32)
        if outputs == "last" and is_last:
            return np.array([n - 1], np.int32)
        return self._no_rows
