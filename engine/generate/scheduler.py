"""Runs all answers under way together: in every step one token of each that decodes, and parts of prompts.

There is no thread of its own. Whoever waits for an answer runs the next step, for all; the others wait for its end,
and find their tokens made. A weight, or an expert, that several sequences need is thus read once for all of them.
What a sequence computes does not depend on which others are in its steps, down to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from engine.generate.answer import Answer, Chunk, Completion
from engine.generate.forward import ForwardPass, Part

MAX_AHEAD = 16  # tokens that are made for a reader who does not fetch them


@dataclass(frozen=True, slots=True)
class StepCount:
    """What steps did: tokens of prompts and answers, and their seconds, split between the two by tokens."""

    n_prompt_tokens: int = 0
    n_decode_tokens: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0

    def __add__(self, other: StepCount) -> StepCount:
        return StepCount(
            self.n_prompt_tokens + other.n_prompt_tokens,
            self.n_decode_tokens + other.n_decode_tokens,
            self.prompt_s + other.prompt_s,
            self.decode_s + other.decode_s,
        )


class Scheduler:
    """All answers under way. Safe to use from several threads; an answer has one reader."""

    def __init__(
        self,
        forward: ForwardPass,
        turn: Callable[[], AbstractContextManager[None]],
        record: Callable[[StepCount], None],
    ) -> None:
        """Run steps inside `turn()`, and tell `record` of each."""
        self._forward = forward
        self._turn = turn
        self._record = record
        self._answers: list[Answer] = []
        self._n_steps = 0
        self._is_running = False
        self._changed = threading.Condition()

    def add(self, answer: Answer) -> None:
        """Make an answer part of the steps that follow."""
        with self._changed:
            self._answers.append(answer)

    def remove(self, answer: Answer) -> None:
        """Let go of an answer, finished or not; its slot goes back after the step that is being run."""
        with self._changed:
            while self._is_running and not answer.is_over:
                self._changed.wait()
            if answer in self._answers:
                self._answers.remove(answer)
            answer.lease.close()

    def stream(self, answer: Answer) -> Generator[Chunk, None, None]:
        """Yield an answer piece by piece, the last chunk with the whole of it; close the iterator to stop it."""
        self.add(answer)
        try:
            while True:
                self._run_until(lambda: bool(answer.chunks) or answer.is_over)
                if not answer.chunks:
                    assert answer.error is not None
                    raise answer.error
                chunk = answer.chunks.popleft()
                yield chunk
                if chunk.completion is not None:
                    return
        finally:
            self.remove(answer)

    def complete(self, answer: Answer) -> Completion:
        """Return a whole answer."""
        *_, last = self.stream(answer)
        assert last.completion is not None
        return last.completion

    def wait_for_any(self, answers: Sequence[Answer], on_step: Callable[[], object]) -> Answer:
        """Run steps, calling `on_step` after each of this thread's, until one of the answers is over; return it."""
        self._run_until(lambda: any(answer.is_over for answer in answers), on_step)
        return next(answer for answer in answers if answer.is_over)

    def _run_until(self, is_satisfied: Callable[[], bool], on_step: Callable[[], object] = lambda: None) -> None:
        """Run steps, or wait for those that others run."""
        while True:
            is_leader = False
            try:
                with self._changed:
                    while self._is_running and not is_satisfied():
                        self._changed.wait()
                    if is_satisfied():
                        return
                    is_leader = self._is_running = True
                with self._turn():
                    self._step()
            finally:
                if is_leader:
                    with self._changed:
                        self._is_running = False
                        self._changed.notify_all()
            on_step()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._n_steps += 1
        with self._changed:
            answers = list(self._answers)
        ready = [a for a in answers if not a.is_over and not (a.is_streamed and len(a.chunks) >= MAX_AHEAD)]
        shares = share_out(ready, self._forward.limits.max_tokens)
        try:
            self._run([(answer, answer.pending(n)) for answer, n in shares])
        except Exception as error:
            for answer, _ in shares:
                if not answer.is_over:
                    answer.fail(error)
        except BaseException:  # Ctrl-C: the reader at hand gets it, all others go on
            for answer, _ in shares:
                if not answer.is_over:
                    answer.lease.recover(answer.lease.n_held + answer.n_pending - 1)
            raise

    def _run(self, shares: list[tuple[Answer, list[int]]]) -> None:
        """Run these tokens; whoever has no more to run gets the next one."""
        now = self._forward.now
        complete = [len(ids) == answer.n_pending for answer, ids in shares]
        parts = [
            Part(answer.lease.slot, ids, answer.lease.n_held, wants, answer.draw() if wants else None)
            for (answer, ids), wants in zip(shares, complete, strict=True)
        ]
        n_prompt = sum(len(ids) for answer, ids in shares if answer.is_at_prompt)
        n_decode = sum(len(ids) for _, ids in shares) - n_prompt
        for answer, _ in shares:
            answer.last_step = self._n_steps
            answer.lease.begin()
        start = now()
        rows = iter(self._forward.step(parts))
        step_s = now() - start
        for (answer, ids), wants in zip(shares, complete, strict=True):
            found = next(rows) if wants else None
            try:
                chosen_at = now()
                chosen = None if found is None else answer.choose(found)
                spent = now() - chosen_at
                answer.note_run(ids)
                if answer.is_at_prompt:
                    answer.note_prompt(step_s)
                else:
                    spent += step_s
                if chosen is not None:
                    answer.append(*chosen, spent)
            except Exception as error:  # one answer's trouble, such as a progress callback's, is no other's
                answer.fail(error)
        spent, n_tokens = now() - start, n_prompt + n_decode
        self._record(StepCount(n_prompt, n_decode, spent * n_prompt / n_tokens, spent * n_decode / n_tokens))


def share_out(ready: Sequence[Answer], n_tokens: int) -> list[tuple[Answer, int]]:
    """Return the answers of the next step, and the tokens that each may run.

    Everybody gets one token, whoever waited longest first; what is left goes to the prompts in equal parts, where those
    that need less leave more to the others.
    """
    chosen = sorted(ready, key=lambda answer: answer.last_step)[:n_tokens]
    left = n_tokens - len(chosen)
    shares: list[tuple[Answer, int]] = []
    for i, answer in enumerate(sorted(chosen, key=lambda answer: answer.n_pending)):
        more = min(answer.n_pending - 1, left // (len(chosen) - i))
        left -= more
        shares.append((answer, 1 + more))
    return shares
