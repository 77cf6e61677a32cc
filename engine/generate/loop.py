"""Makes tokens: runs the prompt, then chooses and runs one token after another until the sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.generate.forward import ForwardPass, Progress
from engine.generate.sampling import Sampler
from engine.generate.scheduler import Lease
from engine.generate.sequence import Sequence
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
    """Tokens of one request; `n_reused_tokens` of the prompt's were held already and not run again."""

    n_prompt_tokens: int
    n_reused_tokens: int
    n_generated_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request, without the time its reader took.

    Attributes:
        prompt_s: running the prompt.
        first_token_s: from the start until the first token was chosen.
        decode_s: all tokens after the first one.
        n_prompt_tokens: tokens that were run in `prompt_s`.
        n_decode_tokens: tokens that were made in `decode_s`.
    """

    prompt_s: float
    first_token_s: float
    decode_s: float
    n_prompt_tokens: int
    n_decode_tokens: int

    @property
    def prompt_tok_s(self) -> float:
        """Return prompt tokens a second."""
        return self.n_prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Return generated tokens a second."""
        return self.n_decode_tokens / self.decode_s if self.decode_s else 0.0


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


def generate(
    forward: ForwardPass,
    lease: Lease,
    tokenizer: Tokenizer,
    sequence: Sequence,
    sampler: Sampler,
    turn: Callable[[], AbstractContextManager[None]],
    record: Callable[[Usage, Timings], None],
    progress: Progress | None = None,
) -> Generator[Chunk, None, None]:
    """Yield an answer piece by piece, the last chunk with the whole of it.

    Every step is run inside `turn()`, which is left while the reader has a chunk. However the answer ends, by itself,
    by an error or because the iterator is closed, its slot goes back and `record` is told what was used.
    """
    prompt, n_top = sequence.prompt_ids, sequence.params.logprobs
    n_reused = lease.n_held
    logprobs: list[TokenLogprobs] = []
    made: list[int] = []
    prompt_s = first_token_s = decode_s = 0.0

    def used() -> tuple[Usage, Timings]:
        n_run = len(prompt) - n_reused if made else 0
        usage = Usage(len(prompt), n_reused, len(made))
        return usage, Timings(prompt_s, first_token_s, decode_s, n_run, max(0, len(made) - 1))

    try:
        with lease:
            new_ids = prompt[n_reused:]
            while sequence.finish_reason is None:
                with turn():
                    start = forward.now()
                    logits = lease.extend(forward, new_ids, "last", None if made else progress)[-1]
                    ran = forward.now()
                    token_id = sampler.choose(logits, sequence)
                    rated = rate(logits, token_id, n_top, tokenizer)
                    end = forward.now()
                if made:
                    decode_s += end - start
                else:
                    prompt_s, first_token_s = ran - start, end - start
                made.append(token_id)
                new_ids = made[-1:]
                if rated is not None:
                    logprobs.append(rated)
                yield Chunk(sequence.append(token_id), token_id, rated)
        rest = sequence.flush()
        usage, timings = used()
        completion = Completion(
            sequence.text, tuple(made), sequence.finish_reason, usage, timings, sampler.seed, tuple(logprobs)
        )
        yield Chunk(rest, completion=completion)
    finally:
        record(*used())


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
