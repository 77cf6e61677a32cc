"""One answer in the making, and what its reader gets of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.program import Draw
from engine.generate.drafting import DraftPolicy
from engine.generate.forward import ForwardPass, Progress
from engine.generate.leases import Lease
from engine.generate.sampling import Sampler
from engine.generate.sequence import Sequence
from engine.generate.snapshots import likely_places
from engine.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability, before temperature and penalties."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token that was made, and the likeliest ones at its place, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request.

    Attributes:
        n_prompt_tokens: of the prompt.
        n_reused_tokens: of these, those that were held already and not run again.
        n_generated_tokens: of the answer.
        n_drafted_tokens: of these, those that had been drafted, and took no step of their own.
    """

    n_prompt_tokens: int
    n_reused_tokens: int
    n_generated_tokens: int
    n_drafted_tokens: int = 0


class TokenSpeeds:
    """Tokens a second, for those who count tokens and the seconds they took."""

    __slots__ = ()

    prompt_s: float
    decode_s: float
    n_prompt_tokens: int
    n_decode_tokens: int

    @property
    def prompt_tok_s(self) -> float:
        """Return prompt tokens a second, 0 before the first."""
        return self.n_prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Return generated tokens a second, 0 before the first."""
        return self.n_decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class Timings(TokenSpeeds):
    """Seconds of the steps that one request was part of, which others may have shared.

    Attributes:
        prompt_s: running the prompt.
        first_token_s: running the prompt and choosing the first token.
        decode_s: all tokens after the first one; where steps are begun ahead a reader's time between two tokens counts.
        n_prompt_tokens: tokens that were run in `prompt_s`.
        n_decode_tokens: tokens that were made in `decode_s`.
    """

    prompt_s: float
    first_token_s: float
    decode_s: float
    n_prompt_tokens: int
    n_decode_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer; `seed` makes the same one again."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer as it is made. The last one has no token but the whole answer in `completion`.

    `text` may be empty while a character or a possible stop text is incomplete.
    """

    text: str
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    completion: Completion | None = None


class Answer:
    """A request under way: the tokens it holds and still needs, what it made, and the seconds that took.

    What is still to be run follows from what the slot holds. A step that was stopped half-way thus costs time, not the
    answer: whatever the slot lost is run again, which gives the same bits.

    Attributes:
        lease: its slot, given back when the answer is over, and no step with it is under way.
        is_streamed: keep a chunk for each token, for a reader.
        chunks: made and not read yet.
        completion: the whole answer, once there is one.
        error: what ended it instead.
        last_step: number of the last step it was part of.
        n_drafted: tokens of it that had been drafted.
    """

    def __init__(
        self,
        lease: Lease,
        tokenizer: Tokenizer,
        sequence: Sequence,
        *,
        at_once: int,
        is_streamed: bool,
        progress: Progress | None = None,
        drafts: DraftPolicy | None = None,
    ) -> None:
        """Begin; the lease is the answer's from now on. A step has `at_once` tokens at most, `drafts` among them."""
        self.lease = lease
        self.is_streamed = is_streamed
        self.chunks: deque[Chunk] = deque()
        self.completion: Completion | None = None
        self.error: Exception | None = None
        self.last_step = self.n_drafted = 0
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._sampler = Sampler(sequence.params, tokenizer)
        self._progress = progress
        self._n_reused = lease.n_held
        self._remember_at: list[int] = []  # the next place last
        if lease.takes_snapshots:
            prompt, turn_ends = sequence.prompt_ids, tokenizer.eog_ids
            self._remember_at = likely_places(prompt, turn_ends, lease.n_held, lease.n_common, at_once)
        # After a text that is cut off, a recurrent state beyond the last token but one would be of no use.
        self._may_run_ahead = sequence.params.logprobs < 0 and self._sampler.is_sure
        self._may_run_ahead &= lease.can_cut_back or not sequence.params.stop
        self._drafter = None if drafts is None else drafts.drafter(sequence.prompt_ids)
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_s = self._first_token_s = self._decode_s = 0.0

    @property
    def is_over(self) -> bool:
        """Return whether no step will add to it."""
        return self.completion is not None or self.error is not None

    @property
    def is_at_prompt(self) -> bool:
        """Return whether no token was made yet."""
        return not self._sequence.token_ids

    @property
    def n_reused(self) -> int:
        """Return the tokens of the prompt that need not be run."""
        return self._n_reused

    @property
    def n_pending(self) -> int:
        """Return the tokens that must be run before the next one can be chosen."""
        return len(self._sequence.prompt_ids) + len(self._sequence.token_ids) - self.lease.n_held

    def pending(self, n: int) -> list[int]:
        """Return the first `n` of those, or fewer, up to where the state is to be remembered."""
        prompt, made, start = self._sequence.prompt_ids, self._sequence.token_ids, self.lease.n_held
        if self._remember_at:
            n = min(n, self._remember_at[-1] - start)
        ids = prompt[start : start + n]
        at = max(0, start - len(prompt))
        return ids + made[at : at + n - len(ids)]

    def note_run(self, token_ids: list[int]) -> None:
        """Note that the slot holds these tokens too, and remember the state if this is the place to."""
        self.lease.commit(token_ids)
        if self._remember_at and self.lease.n_held == self._remember_at[-1]:
            self._remember_at.pop()
            self.lease.remember()

    def note_prompt(self, seconds: float) -> None:
        """Add a step that ran a part of the prompt, and tell who waits for it."""
        self._prompt_s += seconds
        if self._progress is not None:
            total = len(self._sequence.prompt_ids) - self._n_reused
            self._progress(self.lease.n_held - self._n_reused, total)

    @property
    def can_run_ahead(self) -> bool:
        """Return whether the token after the next one may be begun before that is known, which needs it."""
        n_made = len(self._sequence.token_ids)
        is_at_end = n_made + 1 >= self._sequence.params.max_tokens
        return self._may_run_ahead and not self.is_at_prompt and self.n_pending == 1 and not is_at_end

    @property
    def _most_drafts(self) -> int:
        """Return how many tokens may be drafted: none after which there would be no room for one more."""
        n_left = self._sequence.params.max_tokens - len(self._sequence.token_ids) - 1
        return 0 if self.is_at_prompt or self.n_pending != 1 else n_left

    def drafts(self, forward: ForwardPass, most: int) -> list[int]:
        """Return at most so many tokens that are worth to be run behind the pending one, in case they follow."""
        most = min(most, self._most_drafts)
        if self._drafter is None or most < 1:
            return []
        lease = self.lease

        def head(n: int) -> tuple[list[int], float]:
            return forward.draft(lease.slot, self.pending(1)[0], lease.n_held, n)

        return self._drafter.propose(self._sequence.token_ids, most, head, forward.most_by_head)

    def awaits_drafts(self, forward: ForwardPass) -> bool:
        """Return whether what follows the next token can probably be drafted when that is known."""
        most, made = self._most_drafts - 1, self._sequence.token_ids
        return self._drafter is not None and most > 0 and self._drafter.is_promising(made, most, forward.most_by_head)

    def note_step(self, n_tokens: int, seconds: float) -> None:
        """Note what a step took in which this answer alone went on by a token or more."""
        if self._drafter is not None:
            self._drafter.note_step(n_tokens, seconds)

    def draw(self, n_unseen: int = 0) -> Draw | None:
        """Return how a device may draw the next token; None if the logits are to be looked at.

        n_unseen: tokens before it that are not known yet.
        """
        return self._sampler.draw(self._sequence, n_unseen) if self._sequence.params.logprobs < 0 else None

    def redo(self) -> None:
        """Go back to before the last steps, after one that could not draw a token; the next ones are not run ahead."""
        self._may_run_ahead = False
        self.lease.recover(self.lease.n_held)

    def choose(self, found: npt.NDArray[np.float32] | int) -> tuple[int, TokenLogprobs | None]:
        """Return the next token and its probabilities, from logits, or as it was drawn; nothing is changed yet."""
        if isinstance(found, int):
            return found, None
        token_id = self._sampler.choose(found, self._sequence)
        return token_id, rate(found, token_id, self._sequence.params.logprobs, self._tokenizer)

    def append(self, token_id: int, rated: TokenLogprobs | None, seconds: float) -> None:
        """Add a chosen token and the time that took, prompt steps not counted; the slot is kept."""
        sequence = self._sequence
        if self.is_at_prompt:
            self._first_token_s = self._prompt_s + seconds
        else:
            self._decode_s += seconds
        text = sequence.append(token_id)
        if rated is not None:
            self._logprobs.append(rated)
        if self.is_streamed:
            self.chunks.append(Chunk(text, token_id, rated))
        if sequence.finish_reason is None:
            return
        rest = sequence.flush()
        n_made, n_prompt = len(sequence.token_ids), len(sequence.prompt_ids)
        self.completion = Completion(
            sequence.text,
            tuple(sequence.token_ids),
            sequence.finish_reason,
            Usage(n_prompt, self._n_reused, n_made, self.n_drafted),
            Timings(self._prompt_s, self._first_token_s, self._decode_s, n_prompt - self._n_reused, n_made - 1),
            self._sampler.seed,
            tuple(self._logprobs),
        )
        self.chunks.append(Chunk(rest, completion=self.completion))

    def fail(self, error: Exception) -> None:
        """End with an error, which its reader gets."""
        self.error = error
        self.lease.close()


def rate(logits: npt.NDArray[np.float32], token_id: int, n_top: int, tokenizer: Tokenizer) -> TokenLogprobs | None:
    """Return log probabilities of a token and of the `n_top` likeliest ones; None if `n_top` is -1."""
    if n_top < 0:
        return None
    ids, values, log_sum = _kernels.log_probabilities(logits, n_top)

    def entry(token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token, tokenizer.token_bytes(token).decode(errors="replace"), logprob)

    top = tuple(entry(int(i), float(value)) for i, value in zip(ids, values, strict=True))
    logprob = np.float32(float(logits[token_id]) - log_sum)  # as exact as those in `values`
    return TokenLogprobs(entry(token_id, float(logprob)), top)
