"""Whether swaps pay, measured: what counts promise is only a guess, and some routers have no favourites to guess."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.experts.swaps import Swaps
from engine.experts.tracker import Chosen, Places

HORIZON = 32  # tokens in which a swap has to pay
RATE = 0.02  # weight of one swap in what is learned
LARGEST = 6.0
FIRST_LOOK = 256  # swaps; the first ones put right what the prompt's fill got wrong, and say little of those to come


class PayBack:
    """Follows each swap for some tokens: how often was the newcomer chosen, and how often the expert it replaced?

    Attributes:
        scale: factor for the margin that swaps need, 1 to `LARGEST`. It grows while swaps bring fewer hits than
            `wanted` on average, and falls while they bring more.
    """

    def __init__(self, n_layers: int, n_experts: int, wanted: float) -> None:
        """Start with a scale of 1; `wanted` is what a swap has to bring, in hits."""
        self.scale = 1.0
        self._wanted = wanted
        self._places = Places(n_layers, n_experts)
        self._n_experts = n_experts
        self._used = np.zeros(n_layers * n_experts, np.int32)
        self._loads = self._evicts = np.zeros(0, np.intp)  # places, oldest swap first
        self._gains = np.zeros(0, np.int32)
        self._ages = np.zeros(0, np.int32)
        self._n_over = 0

    def observe(self, chosen: Chosen) -> None:
        """Take in one token: ids [n_layers, n_experts_used]."""
        if not len(self._gains):
            return
        places = self._places.of(chosen)
        self._used[places] = 1
        self._gains += self._used[self._loads] - self._used[self._evicts]
        self._used[places] = 0
        self._ages += 1
        n_over = int(np.count_nonzero(self._ages >= HORIZON))
        if n_over:
            self._n_over += n_over
            if self._n_over > FIRST_LOOK:
                self._learn(self._gains[:n_over])
            self._loads, self._evicts = self._loads[n_over:], self._evicts[n_over:]
            self._gains, self._ages = self._gains[n_over:], self._ages[n_over:]

    def _learn(self, gains: npt.NDArray[np.int32]) -> None:
        weight = 1.0 - (1.0 - RATE) ** len(gains)
        short = (self._wanted - float(gains.mean())) / self._wanted
        self.scale = min(max(self.scale * math.exp(weight * short), 1.0), LARGEST)

    def follow(self, swaps: Swaps) -> None:
        """Follow swaps from the next token on; those into free slots replace nobody and are left out."""
        full = swaps.evicts >= 0
        starts = swaps.layers[full] * self._n_experts
        self._loads = np.concatenate([self._loads, starts + swaps.loads[full]])
        self._evicts = np.concatenate([self._evicts, starts + swaps.evicts[full]])
        new = np.zeros(len(starts), np.int32)
        self._gains, self._ages = np.concatenate([self._gains, new]), np.concatenate([self._ages, new])
