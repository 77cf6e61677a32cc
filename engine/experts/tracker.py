"""Which experts are hot: measures of recent use, updated once a token, each [n_layers, n_experts] in float32.

A tracker sees the experts that the router chose and nothing else. All layers are updated by the same few array
operations, so that a token costs tens of microseconds however many layers there are.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
import numpy.typing as npt

Heat = npt.NDArray[np.float32]
Chosen = npt.NDArray[np.integer]


class Tracker(Protocol):
    """Turns the experts chosen so far into heat."""

    heat: Heat

    def observe(self, chosen: Chosen) -> None:
        """Take in one token: ids [n_layers, n_experts_used]; an id of n_experts or more stands for "not known"."""
        ...


class Places:
    """Turns chosen experts into places of a flat array [n_layers * n_experts], without those that are not known."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._n_experts = n_experts
        self._starts = (np.arange(n_layers) * n_experts)[:, None]

    def of(self, chosen: Chosen) -> npt.NDArray[np.intp]:
        """Return the places of ids [n_layers, n_experts_used], flat."""
        places = chosen + self._starts
        if chosen.max() >= self._n_experts:
            known: npt.NDArray[np.intp] = places[chosen < self._n_experts]
            return known
        return places.reshape(-1)


class DecayedCounts:
    """Counts that are forgotten exponentially: a choice `half_life` tokens ago weighs half of one made now."""

    def __init__(self, n_layers: int, n_experts: int, half_life: float) -> None:
        self._decay = np.float32(0.5 ** (1.0 / half_life))
        self._places = Places(n_layers, n_experts)
        self.heat: Heat = np.zeros((n_layers, n_experts), np.float32)

    def observe(self, chosen: Chosen) -> None:
        """Forget a little and count one token's choices."""
        self.heat *= self._decay
        self.heat.reshape(-1)[self._places.of(chosen)] += 1


class WindowCounts:
    """Counts over the last `window` tokens, all alike."""

    def __init__(self, n_layers: int, n_experts: int, window: int) -> None:
        self._window = window
        self._recent: deque[npt.NDArray[np.intp]] = deque()
        self._places = Places(n_layers, n_experts)
        self.heat: Heat = np.zeros((n_layers, n_experts), np.float32)

    def observe(self, chosen: Chosen) -> None:
        """Count one token's choices and take the oldest back."""
        counts, places = self.heat.reshape(-1), self._places.of(chosen)
        counts[places] += 1
        self._recent.append(places)
        if len(self._recent) > self._window:
            counts[self._recent.popleft()] -= 1


class LastUse:
    """The number of the token that used an expert last."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._places = Places(n_layers, n_experts)
        self._now = 0
        self.heat: Heat = np.zeros((n_layers, n_experts), np.float32)

    def observe(self, chosen: Chosen) -> None:
        """Note the token's number at each of its experts."""
        self._now += 1
        self.heat.reshape(-1)[self._places.of(chosen)] = self._now


class CountOverAge:
    """All uses of an expert so far, divided by the tokens since the last one."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._uses = np.zeros((n_layers, n_experts), np.float32)
        self._last = np.zeros((n_layers, n_experts), np.float32)
        self._places = Places(n_layers, n_experts)
        self._now = 0
        self.heat: Heat = self._uses.copy()

    def observe(self, chosen: Chosen) -> None:
        """Count one token's choices."""
        self._now += 1
        places = self._places.of(chosen)
        self._uses.reshape(-1)[places] += 1
        self._last.reshape(-1)[places] = self._now
        np.divide(self._uses, self._now + 1 - self._last, out=self.heat)


def count_choices(ids: Chosen, n_experts: int) -> Heat:
    """Count choices: ids [n_tokens, n_layers, n_experts_used] -> float32 [n_layers, n_experts]."""
    n_layers = ids.shape[1]
    places = (ids + (np.arange(n_layers) * n_experts)[:, None])[ids < n_experts]
    return np.bincount(places, minlength=n_layers * n_experts).reshape(n_layers, n_experts).astype(np.float32)
