"""Times an engine: prompt and answer apart, with fixed random tokens, so that runs and programs can be compared.

Random tokens are what a bench can give every program alike. Nothing is sampled from them: the ids of the answer are
fixed too, and end tokens mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from engine import _kernels
from engine.machine import resident_bytes
from engine.runtime import Engine

Progress = Callable[[str, int, int], None]  # what, done, in all

_WARM_UP = 8  # tokens


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Sum up samples, of which there must be one."""
        return cls(median(samples), min(samples), max(samples))


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run a model, measured: a line of the table.

    Attributes:
        name: what ran.
        n_prompt, n_gen: tokens of prompt and answer.
        prompt_tok_s, decode_tok_s: tokens a second.
        first_token_s: from the start of the prompt to the choice of the first token.
        ram_bytes: held by the process afterwards, mapped pages included.
        token_bytes: weights that making one token reads; 0 if not known.
        note: what a reader must know to compare.
    """

    name: str
    n_prompt: int
    n_gen: int
    prompt_tok_s: Spread
    first_token_s: Spread
    decode_tok_s: Spread
    ram_bytes: int
    token_bytes: int
    note: str = ""

    @property
    def bandwidth(self) -> float:
        """Return the bytes of weights a second that decoding read."""
        return self.token_bytes * self.decode_tok_s.median


@dataclass(frozen=True, slots=True)
class Sample:
    """One run."""

    prompt_s: float
    first_token_s: float
    decode_s: float


def random_tokens(n: int, n_vocab: int) -> list[int]:
    """Return token ids, the same for the same arguments."""
    ids: list[int] = np.random.Generator(np.random.PCG64(1)).integers(0, n_vocab, n).tolist()
    return ids


def summarise(name: str, samples: Sequence[Sample], n_prompt: int, n_gen: int, token_bytes: int, note: str = "") -> Row:
    """Make a row of the runs of one kind."""
    return Row(
        name,
        n_prompt,
        n_gen,
        Spread.of([n_prompt / s.prompt_s for s in samples]),
        Spread.of([s.first_token_s for s in samples]),
        Spread.of([n_gen / s.decode_s for s in samples]),
        resident_bytes(),
        token_bytes,
        note,
    )


def measure(
    engine: Engine, name: str, prompt_lengths: Sequence[int], n_gen: int, reps: int, progress: Progress
) -> list[Row]:
    """Time an engine; return a row for each prompt length, in the order given."""
    _run(engine, min(_WARM_UP, prompt_lengths[0]), min(_WARM_UP, n_gen))  # first use of threads and pages
    samples: dict[int, list[Sample]] = {n: [] for n in prompt_lengths}
    total, done = reps * len(prompt_lengths), 0
    for _ in range(reps):  # repetitions go round, so that a slow minute of the machine does not hit one length alone
        for n_prompt in prompt_lengths:
            progress(f"{name}, {n_prompt} + {n_gen} tokens", done, total)
            samples[n_prompt].append(_run(engine, n_prompt, n_gen))
            done += 1
    progress(name, total, total)
    token_bytes = engine.statistics.weights.token_bytes
    return [summarise(name, samples[n], n, n_gen, token_bytes) for n in prompt_lengths]


def _run(engine: Engine, n_prompt: int, n_gen: int) -> Sample:
    tokens = random_tokens(n_prompt + n_gen, engine.spec.n_vocab)
    with engine.new_sequence() as sequence:
        start = time.perf_counter()
        logits = sequence.run(tokens[:n_prompt])
        ran = time.perf_counter()
        _kernels.argmax(logits[-1])
        first = time.perf_counter()
        for token in tokens[n_prompt:]:
            _kernels.argmax(sequence.run([token])[-1])
        end = time.perf_counter()
    return Sample(ran - start, first - start, end - first)
