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


class _Choices:
    """Flat places of chosen experts in an array [n_layers, n_experts + 1]; the last column takes what is not known."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self.n_experts = n_experts
        self._starts = (np.arange(n_layers) * (n_experts + 1))[:, None]

    def places(self, chosen: Chosen) -> npt.NDArray[np.intp]:
        return (np.minimum(chosen, self.n_experts) + self._starts).reshape(-1)


class DecayedCounts:
    """Counts that are forgotten exponentially: a choice `half_life` tokens ago weighs half of one made now."""

    def __init__(self, n_layers: int, n_experts: int, half_life: float, weight: float = 1.0) -> None:
        """Start with no heat; `weight` is what a choice made now adds."""
        self._weight = np.float32(weight)
        self._decay = np.float32(0.5 ** (1.0 / half_life))
        self._counts = np.zeros((n_layers, n_experts + 1), np.float32)
        self._choices = _Choices(n_layers, n_experts)
        self.heat: Heat = self._counts[:, :-1]

    def observe(self, chosen: Chosen) -> None:
        """Forget a little and count one token's choices."""
        self._counts *= self._decay
        self._counts.reshape(-1)[self._choices.places(chosen)] += self._weight


class TwoSpeedCounts:
    """Decayed counts that forget at two speeds, averaged: the slow part knows the topic, the fast part what is new.

    A choice made now adds 1, as in `DecayedCounts`, so margins mean the same.
    """

    def __init__(self, n_layers: int, n_experts: int, slow: float, fast: float, fast_share: float) -> None:
        self._slow = DecayedCounts(n_layers, n_experts, slow, weight=1.0 - fast_share)
        self._fast = DecayedCounts(n_layers, n_experts, fast, weight=fast_share)
        self.heat: Heat = self._slow.heat + self._fast.heat

    def observe(self, chosen: Chosen) -> None:
        """Forget a little and count one token's choices."""
        self._slow.observe(chosen)
        self._fast.observe(chosen)
        np.add(self._slow.heat, self._fast.heat, out=self.heat)


class WindowCounts:
    """Counts over the last `window` tokens, all alike."""

    def __init__(self, n_layers: int, n_experts: int, window: int) -> None:
        self._window = window
        self._recent: deque[npt.NDArray[np.intp]] = deque()
        self._counts = np.zeros((n_layers, n_experts + 1), np.float32)
        self._choices = _Choices(n_layers, n_experts)
        self.heat: Heat = self._counts[:, :-1]

    def observe(self, chosen: Chosen) -> None:
        """Count one token's choices and take the oldest back."""
        counts, places = self._counts.reshape(-1), self._choices.places(chosen)
        counts[places] += 1
        self._recent.append(places)
        if len(self._recent) > self._window:
            counts[self._recent.popleft()] -= 1


class LastUse:
    """The number of the token that used an expert last."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._last = np.zeros((n_layers, n_experts + 1), np.float32)
        self._choices = _Choices(n_layers, n_experts)
        self._now = 0
        self.heat: Heat = self._last[:, :-1]

    def observe(self, chosen: Chosen) -> None:
        """Note the token's number at each of its experts."""
        self._now += 1
        self._last.reshape(-1)[self._choices.places(chosen)] = self._now


class CountOverAge:
    """All uses of an expert so far, divided by the tokens since the last one."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._uses = np.zeros((n_layers, n_experts + 1), np.float32)
        self._last = np.zeros((n_layers, n_experts + 1), np.float32)
        self._choices = _Choices(n_layers, n_experts)
        self._now = 0
        self.heat: Heat = self._uses[:, :-1].copy()

    def observe(self, chosen: Chosen) -> None:
        """Count one token's choices."""
        self._now += 1
        places = self._choices.places(chosen)
        self._uses.reshape(-1)[places] += 1
        self._last.reshape(-1)[places] = self._now
        np.divide(self._uses[:, :-1], self._now + 1 - self._last[:, :-1], out=self.heat)


def count_choices(ids: Chosen, n_experts: int) -> Heat:
    """Count choices: ids [n_tokens, n_layers, n_experts_used] -> float32 [n_layers, n_experts]."""
    n_layers = ids.shape[1]
    places = np.minimum(ids, n_experts).astype(np.intp) + (np.arange(n_layers) * (n_experts + 1))[:, None]
    counts = np.bincount(places.reshape(-1), minlength=n_layers * (n_experts + 1))
    return counts.reshape(n_layers, n_experts + 1)[:, :-1].astype(np.float32)
