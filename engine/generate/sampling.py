"""Chooses the next token from the logits; what is drawn depends on the seed and the token's place alone."""

from __future__ import annotations

import secrets
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.config import SamplingParams
from engine.devices.program import MOST_TOP_K, Draw
from engine.generate.sequence import Sequence
from engine.tokenizer import Tokenizer

_MASK = (1 << 64) - 1
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_SMALLEST_TOP_P = 2.0**-53  # what 0 means: the likeliest token alone


class Sampler:
    """Chooses the tokens of one sequence.

    Attributes:
        seed: of the random numbers: the one asked for, or a new one.
    """

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.seed = secrets.randbits(63) if params.seed < 0 else params.seed
        self._params = params
        self._n_vocab = tokenizer.n_sampled
        self._unused = tokenizer.unused_among_sampled
        self._most = self._allowed = np.zeros(0, np.float32)
        self._has_penalties = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._no_tokens = np.zeros(0, np.int32)

    @property
    def is_sure(self) -> bool:
        """Return whether a device can draw every token, as far as one can tell: of many candidates it may give up."""
        params = self._params
        return not self._has_penalties and (params.temperature == 0 or 0 < params.top_k <= MOST_TOP_K)

    def draw(self, sequence: Sequence, n_unseen: int = 0) -> Draw | None:
        """Return how a device may draw the token that follows `sequence`; None if that takes penalties.

        n_unseen: tokens in between, which are not known yet.
        """
        params = self._params
        if self._has_penalties:
            return None
        if params.temperature == 0:
            return 0.0, 1.0, 0.0, 1.0, 1
        return (
            uniform(self.seed, len(sequence.token_ids) + n_unseen),
            max(params.top_p, _SMALLEST_TOP_P),
            params.min_p,
            min(1 / params.temperature, _LARGEST_FLOAT),
            params.top_k,
        )

    def choose(self, logits: npt.NDArray[np.float32], sequence: Sequence) -> int:
        """Return the id of the token that follows `sequence`.

        Args:
            logits: float32 [n_vocab or more], not changed; a model may have logits for ids that are no tokens.
            sequence: the tokens so far.
        """
        params, logits = self._params, logits[: self._n_vocab]
        if params.temperature == 0 and not self._has_penalties:
            best = _kernels.argmax(logits)
            return best if best not in self._unused else _kernels.argmax(self._without_unused(logits))
        return _kernels.sample(
            self._without_unused(logits),
            sequence.recent(params.penalty_window) if self._has_penalties else self._no_tokens,
            params.temperature,
            params.top_k,
            max(params.top_p, _SMALLEST_TOP_P),
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            uniform(self.seed, len(sequence.token_ids)),
        )

    def _without_unused(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not len(self._unused):
            return logits
        if len(self._allowed) != len(logits):
            self._allowed = np.empty(len(logits), np.float32)
            self._most = np.full(len(logits), np.inf, np.float32)
            self._most[self._unused] = -np.inf
        return np.minimum(logits, self._most, out=self._allowed)  # many times as fast as writing at indices


def uniform(seed: int, step: int) -> float:
    """Return the random number in [0, 1) of one step: a function of its arguments, so that no state is kept.

    SplitMix64: output `step` of the generator that starts at a scrambled seed (neighbouring seeds have nothing in
    common). It has 24 bits, so that it is the same number, below 1, in float32.
    """
    return (_mix(_scrambled(seed) + 0x9E3779B97F4A7C15 * (step + 1)) >> 40) * 2.0**-24


@lru_cache(256)  # it is asked for with every token
def _scrambled(seed: int) -> int:
    return _mix(seed)


def _mix(x: int) -> int:
    """Return a 64-bit integer in which every bit depends on all of x."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
