"""Runs all answers under way together: in every step one token of each that decodes, and parts of prompts.

There is no thread of its own. Whoever waits for an answer runs the next step, for all; the others wait for its end,
and find their tokens made. A weight, or an expert, that several sequences need is thus read once for all of them.
What a sequence computes does not depend on which others are in its steps, down to the bit.

On a device that can take it, a step that decodes is begun before the tokens of the one before it are looked at: the
device need not wait for Python. If one of these tokens ends its answer, the slot holds it in the end, and its reader
waits for one step more; that is all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.errors import EngineError, RequestError
from engine.generate.answer import Answer, Chunk, Completion
from engine.generate.forward import ForwardPass, Part

Found = int | npt.NDArray[np.float32]  # a token that was drawn, or logits
MAX_UNREAD = 16  # tokens that are made for a reader who does not fetch them


@dataclass(slots=True)
class StepCount:
    """What all steps did: tokens of prompts and answers, and their seconds, split between the two by tokens.

    Of the tokens of answers, `n_drafts_right` were among `n_drafts` that were drafted.
    """

    n_prompt_tokens: int = 0
    n_decode_tokens: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    n_drafts: int = 0
    n_drafts_right: int = 0

    def add(self, n_prompt: int, n_decode: int, seconds: float, n_drafts: int, n_drafts_right: int) -> None:
        """Add a step."""
        share = n_prompt / max(1, n_prompt + n_decode)
        self.n_prompt_tokens += n_prompt
        self.n_decode_tokens += n_decode
        self.prompt_s += seconds * share
        self.decode_s += seconds * (1 - share)
        self.n_drafts += n_drafts
        self.n_drafts_right += n_drafts_right


@dataclass(slots=True)
class _Step:
    """A step that was begun.

    Attributes:
        shares: whose it is, and how many of the pending tokens of each.
        complete: whether these are all of them, so that the next one is wanted.
        begun_at: seconds.
        drafts: tokens that may follow, of a step with one answer.
        is_ahead: it was begun before the tokens that it runs were known.
        void: those of whom it ran a token that does not exist.
    """

    shares: list[tuple[Answer, int]]
    complete: list[bool]
    begun_at: float
    drafts: list[int] = field(default_factory=list)
    is_ahead: bool = False
    void: list[Answer] = field(default_factory=list)

    @property
    def answers(self) -> list[Answer]:
        """Return whose it is."""
        return [answer for answer, _ in self.shares]


class Scheduler:
    """All answers under way. Safe to use from several threads; an answer has one reader.

    Attributes:
        steps: what was done so far; it changes within a turn only.
    """

    def __init__(self, forward: ForwardPass, turn: AbstractContextManager[None]) -> None:
        """Run each step inside `turn`."""
        self.steps = StepCount()
        self._forward = forward
        self._turn = turn
        self._answers: list[Answer] = []
        self._n_steps = 0
        self._ahead: _Step | None = None  # begun, and not looked at
        self._ended_at = 0.0  # the last step
        self._leader: int | None = None  # the thread that runs a step
        self._leaving: list[Answer] = []  # removed by it in the middle of one
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def add(self, answer: Answer) -> None:
        """Make an answer part of the steps that follow."""
        with self._lock:
            self._answers.append(answer)

    def remove(self, answer: Answer) -> None:
        """Let go of an answer, finished or not; its slot goes back after the steps that it is part of."""
        if self._is_in_a_step():  # an iterator that is closed there, or that nobody refers to any more
            self._leaving.append(answer)
            return
        while not self._let_go(answer):
            self._lead(lambda: self._is_under_way(answer), self.settle)

    def _let_go(self, answer: Answer) -> bool:
        """Remove an answer if no step is under way with it; return whether that is so."""
        with self._lock:
            if self._is_under_way(answer):
                return False
            if answer in self._answers:
                self._answers.remove(answer)
            answer.lease.close()
            return True

    def _is_under_way(self, answer: Answer) -> bool:
        if not answer.lease.is_open:
            return False
        ahead = self._ahead  # which another thread may be finishing
        return self._leader is not None or (ahead is not None and answer in ahead.answers)

    def _is_in_a_step(self) -> bool:
        return self._leader == threading.get_ident()

    def check_outside(self) -> None:
        """Raise `RequestError` in the middle of a step of this thread's, whose end it would wait for in vain."""
        if self._is_in_a_step():
            raise RequestError(
                "a callback that is told of a step cannot ask the engine for anything; let it return first"
            )

    def settle(self) -> None:
        """Finish the step that is under way, if any; within this thread's turn."""
        if self._ahead is not None:
            self._step(goes_on=False)
            with self._lock:
                self._changed.notify_all()

    def close(self) -> None:
        """Forget what is under way, as the program is closed; within this thread's turn."""
        self._ahead = None

    def stream(self, answer: Answer) -> Generator[Chunk, None, None]:
        """Yield an answer piece by piece, the last chunk with the whole of it; close the iterator to stop it."""
        try:
            self.add(answer)
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
        while self._lead(lambda: not is_satisfied(), self._step):
            on_step()

    def _lead(self, is_needed: Callable[[], bool], run: Callable[[], object]) -> bool:
        """Be the one who runs a step, as soon as nobody else does and if it is needed then; return whether it was."""
        is_leader = False
        try:
            with self._lock:
                while self._leader is not None and is_needed():
                    self.check_outside()
                    self._changed.wait()
                if not is_needed():
                    return False
                is_leader, self._leader = True, threading.get_ident()
            with self._turn:
                run()
            return True
        finally:
            if is_leader:
                with self._lock:
                    self._leader = None
                    leaving, self._leaving = self._leaving, []
                    self._changed.notify_all()
                for answer in leaving:
                    self.remove(answer)

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self, *, goes_on: bool = True) -> None:
        """Run a step, or finish the one under way; if it `goes_on`, the next one may be under way then."""
        with self._lock:
            answers = list(self._answers)
        ready = [a for a in answers if not a.is_over and not (a.is_streamed and len(a.chunks) >= MAX_UNREAD)]
        step, following = self._ahead or self._new_step(ready), None
        try:
            if self._ahead is None:
                if len(ready) == 1:
                    step.drafts = ready[0].drafts(self._forward, self._forward.limits.max_tokens - 1)
                self._forward.begin(self._begin(step))
            if goes_on:
                following = self._following(step, ready)
            self._run(step, following)
            if following is not None and (following.void or any(answer.is_over for answer in following.answers)):
                self._run(following, None)  # whoever goes on has one more token then
                following = None
            self._ahead = following
        except Exception as error:
            self._drop()
            for answer in step.answers:
                if answer.is_over:
                    answer.lease.close()
                else:
                    answer.fail(error)
        except BaseException:  # Ctrl-C: the reader at hand gets it, all others go on
            self._drop()
            for answer in step.answers:
                if answer.is_over:
                    answer.lease.close()
                else:
                    answer.lease.recover(answer.lease.n_held + answer.n_pending - 1)
            raise

    def _drop(self) -> None:
        self._ahead = None
        with contextlib.suppress(EngineError):  # the error at hand says more
            self._forward.drop()

    def _new_step(self, ready: list[Answer]) -> _Step:
        """Return the next step of those who are ready."""
        most = self._forward.limits.max_tokens
        shares = [(a, len(a.pending(n))) for a, n in share_out(ready, most)]
        return _Step(shares, [n == answer.n_pending for answer, n in shares], self._forward.now())

    def _following(self, step: _Step, ready: list[Answer]) -> _Step | None:
        """Return what can be begun before a step is over: the next one, if all answers are known to go on."""
        answers = step.answers
        if not self._forward.runs_ahead or len(ready) != len(answers) or any(answer not in ready for answer in answers):
            return None
        if step.drafts or not all(answer.can_run_ahead for answer in answers):
            return None
        if len(answers) == 1 and answers[0].awaits_drafts(self._forward):
            return None
        return _Step([(answer, 1) for answer in answers], [True] * len(answers), self._forward.now(), is_ahead=True)

    def _begin(self, step: _Step) -> list[Part]:
        """Return the parts of a step, which is begun with them."""
        self._n_steps += 1
        parts = []
        for i, ((answer, n), wants) in enumerate(zip(step.shares, step.complete, strict=True)):
            answer.last_step = self._n_steps
            ids, lease = [-1 - i] if step.is_ahead else answer.pending(n) + step.drafts, answer.lease
            n_wanted = (1 + len(step.drafts)) if wants else 0
            draws = [answer.draw(step.is_ahead + j) if self._forward.draws else None for j in range(n_wanted)]
            parts.append(Part(lease.slot, ids, lease.n_held + step.is_ahead, draws))
            if step.drafts:
                lease.begin_drafts(n, len(step.drafts))
            else:
                lease.begin(step.is_ahead + n)
        return parts

    def _run(self, step: _Step, following: _Step | None) -> None:
        """Run a step, with the one after it begun; whoever has no more to run gets the next token."""
        now = self._forward.now
        rows = iter(self._forward.end(self._begin(following) if following is not None else ()))
        start = max(step.begun_at, self._ended_at)
        step_s = now() - start
        n_prompt = n_decode = n_right = 0
        for (answer, n), wants in zip(step.shares, step.complete, strict=True):
            found = [next(rows) for _ in range(1 + len(step.drafts))] if wants else []
            if not answer.lease.is_open:
                continue
            try:
                if answer in step.void:
                    answer.redo()
                elif following is not None and isinstance(found[0], int) and found[0] < 0:
                    following.void.append(answer)
                elif answer.is_over:
                    answer.note_run(answer.pending(n))
                elif answer.is_at_prompt:
                    n_prompt += n
                    self._append(answer, n, found, step_s)
                elif step.drafts:
                    n_right = self._append_drafts(answer, n, step.drafts, found, step_s)
                    n_decode += 1 + n_right
                    answer.note_step(n + len(step.drafts), step_s)
                else:
                    n_decode += len(found)
                    self._append(answer, n, found, step_s)
                    if len(step.shares) == 1:
                        answer.note_step(n, step_s)
            except Exception as error:  # one answer's trouble, such as a progress callback's, is no other's
                answer.fail(error)
            if following is None and answer.is_over:
                answer.lease.close()
        self._ended_at = now()
        self.steps.add(n_prompt, n_decode, self._ended_at - start, len(step.drafts), n_right)

    def _append_drafts(
        self, answer: Answer, n: int, drafts: Sequence[int], found: Sequence[Found], step_s: float
    ) -> int:
        """Do what `_append` does for each token up to the first wrong draft; return how many were right."""
        before = answer.n_drafted
        try:
            self._append(answer, n, found[:1], step_s)
            for draft, then in zip(drafts, found[1:], strict=True):
                if answer.is_over or answer.pending(1) != [draft]:
                    break
                answer.n_drafted += 1
                self._append(answer, 1, [then], 0.0)
        finally:
            answer.lease.end_drafts()
        return answer.n_drafted - before

    def _append(self, answer: Answer, n: int, found: Sequence[Found], step_s: float) -> None:
        """Note that `n` tokens of an answer were run, and add what was found to follow them, if that was wanted."""
        now = self._forward.now
        chosen_at = now()
        chosen = answer.choose(found[0]) if found else None
        spent = now() - chosen_at
        answer.note_run(answer.pending(n))
        if answer.is_at_prompt:
            answer.note_prompt(step_s)
        else:
            spent += step_s
        if chosen is not None:
            answer.append(*chosen, spent)


def share_out(ready: Sequence[Answer], n_tokens: int) -> list[tuple[Answer, int]]:
    """Return the answers of the next step, and the tokens that each may run.

    Everybody gets one token, whoever waited longest first; what is left goes to the prompts in equal parts, where those
    that need less leave more to the others.
    """
    if len(ready) == 1:
        return [(ready[0], min(ready[0].n_pending, n_tokens))]
    chosen = sorted(ready, key=lambda answer: answer.last_step)[:n_tokens]
    left = n_tokens - len(chosen)
    shares: list[tuple[Answer, int]] = []
    for i, answer in enumerate(sorted(chosen, key=lambda answer: answer.n_pending)):
        more = min(answer.n_pending - 1, left // (len(chosen) - i))
        left -= more
        shares.append((answer, 1 + more))
    return shares
