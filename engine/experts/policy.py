"""Cache policies by name. Each is a small object: a tracker, and a rule that turns its heat into swaps.

A policy knows nothing of devices, bytes or time. After each token it is told what the routers chose (`observe`), and
is then asked, once a token, which swaps it wants (`plan`), the most wanted first. Whoever asks cuts the list to its
budget, which is harmless: the policy sees from the residents it is given next time what was really done. The same
calls in the same order give the same swaps.
"""

from __future__ import annotations

import inspect
from typing import Protocol

import numpy as np

from engine.errors import ConfigError
from engine.experts.payback import PayBack
from engine.experts.swaps import NO_SWAPS, UNLIMITED, Ids, Resident, Swaps, swap_for_hotter
from engine.experts.tracker import (
    Chosen,
    CountOverAge,
    DecayedCounts,
    Heat,
    LastUse,
    Places,
    Tracker,
    TwoSpeedCounts,
    WindowCounts,
)
from engine.experts.twins import Twins


class Policy(Protocol):
    """Decides which experts should be in the slots."""

    @property
    def heat(self) -> Heat:
        """Return the present heat, float32 [n_layers, n_experts]: a view that the next token changes."""
        ...

    def observe(self, chosen: Chosen) -> None:
        """Take in one token: ids [n_layers, n_experts_used], best rank first."""
        ...

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:
        """Return the swaps wanted now, most wanted first.

        Args:
            resident: bool [n_layers, n_experts]: who is in a slot or on the way to one.
            n_slots: slots of each layer.
            ahead: the choices of the token that is being made, like `chosen`, where swaps can be made between the
                layers of one token; the swaps of a layer depend on the rows of earlier layers only.
        """
        ...


class WindowTopK:
    """The most chosen experts of the last `window` tokens, put in place every `interval` tokens."""

    def __init__(
        self, n_layers: int, n_experts: int, *, window: int = 256, interval: int = 60, max_swaps: int = UNLIMITED
    ) -> None:
        self._tracker = WindowCounts(n_layers, n_experts, window)
        self._interval, self._max_swaps = interval, max_swaps
        self._calls = 0

    @property
    def heat(self) -> Heat:
        """Return the counts."""
        return self._tracker.heat

    def observe(self, chosen: Chosen) -> None:
        """Count one token."""
        self._tracker.observe(chosen)

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:  # noqa: ARG002
        """Return swaps at every `interval`-th call."""
        self._calls += 1
        if self._calls % self._interval:
            return NO_SWAPS
        return swap_for_hotter(self.heat, resident, n_slots, max_swaps=self._max_swaps)


class Decayed:
    """Exponentially forgotten counts; few swaps at a time, and only for a clear lead."""

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        *,
        half_life: float = 32.0,
        interval: int = 1,
        margin: float = 1.0,
        max_swaps: int = 1,
    ) -> None:
        self._tracker = DecayedCounts(n_layers, n_experts, half_life)
        self._interval, self._margin, self._max_swaps = interval, margin, max_swaps
        self._calls = 0

    @property
    def heat(self) -> Heat:
        """Return the counts."""
        return self._tracker.heat

    def observe(self, chosen: Chosen) -> None:
        """Count one token."""
        self._tracker.observe(chosen)

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:  # noqa: ARG002
        """Return swaps at every `interval`-th call."""
        self._calls += 1
        if self._calls % self._interval:
            return NO_SWAPS
        return swap_for_hotter(self.heat, resident, n_slots, margin=self._margin, max_swaps=self._max_swaps)


class _DemandCache:
    """Loads every expert that was missed, in place of the resident with the least heat."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._places = Places(*tracker.heat.shape)
        self._used = np.zeros(tracker.heat.shape, bool)

    @property
    def heat(self) -> Heat:
        """Return the tracker's measure."""
        return self._tracker.heat

    def observe(self, chosen: Chosen) -> None:
        """Take in one token."""
        self._tracker.observe(chosen)
        self._used[:] = False
        self._used.reshape(-1)[self._places.of(chosen)] = True

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:  # noqa: ARG002
        """Return a swap for every expert of the last token that is not resident."""
        return swap_for_hotter(self.heat, resident, n_slots, margin=-np.inf, candidates=self._used)


class LRU(_DemandCache):
    """The least recently used expert makes room for each one that was missed."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        super().__init__(LastUse(n_layers, n_experts))


class LFRU(_DemandCache):
    """The expert with the fewest uses for its age makes room for each one that was missed."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        super().__init__(CountOverAge(n_layers, n_experts))


class Static:
    """No swaps: what a profile or the first prompt put into the slots stays there. Heat is counted, to be saved."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._tracker = DecayedCounts(n_layers, n_experts, half_life=1e9)

    @property
    def heat(self) -> Heat:
        """Return the uses so far."""
        return self._tracker.heat

    def observe(self, chosen: Chosen) -> None:
        """Count one token."""
        self._tracker.observe(chosen)

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:  # noqa: ARG002
        """Return no swaps but those that fill free slots."""
        return swap_for_hotter(self.heat, resident, n_slots, margin=np.inf)


class Adaptive:
    """Counts that forget at two speeds, a margin that follows from what swaps bring, and twin layers.

    A newcomer must lead by `margin`. Swaps are followed to see whether they bring `wanted` hits each; while they do
    not, the margin grows, so that a model whose routers have no favourites is left in peace (see `PayBack`).

    The swaps of a layer with a twin are decided on what the twin has just chosen for the very token, if `ahead` tells:
    an expert that is about to be chosen with probability p gets `twin_bonus` * p on top of its counts. Such a lead is
    gone after the token if the guess was wrong, so these layers ask for more of it; and as they make more of a copy
    than other layers do, those leave them room by asking for more, too.

    Margins and `wanted` are multiples of `break_even`: the choices that a load has to turn from misses into hits to
    pay for itself.
    """

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        *,
        slow_half_life: float = 64.0,
        fast_half_life: float = 16.0,
        fast_share: float = 2 / 3,
        interval: int = 1,
        break_even: float = 1.0,
        margin: float = 1.25,
        wanted: float = 1.0,
        max_swaps: int = 1,
        twin_bonus: float = 3.5,
        twin_margin: float = 2.0,
        twin_swaps: int = 2,
        beside_twins_margin: float = 1.6,
    ) -> None:
        self._tracker = TwoSpeedCounts(n_layers, n_experts, slow_half_life, fast_half_life, fast_share)
        self.twins = Twins(n_layers, n_experts)
        self._interval, self._margin, self._max_swaps = interval, margin * break_even, max_swaps
        self._twin_bonus, self._twin_margin, self._twin_swaps = twin_bonus, twin_margin * break_even, twin_swaps
        self._beside_twins_margin = beside_twins_margin * break_even
        self.payback = PayBack(n_layers, n_experts, wanted * break_even)
        self._calls = 0

    @property
    def heat(self) -> Heat:
        """Return the counts."""
        return self._tracker.heat

    def observe(self, chosen: Chosen) -> None:
        """Count one token, and compare the layers."""
        self._tracker.observe(chosen)
        self.twins.observe(chosen)
        self.payback.observe(chosen)

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:
        """Return the swaps that pay, widest lead first, at every `interval`-th call."""
        self._calls += 1
        if self._calls % self._interval:
            return NO_SWAPS
        twins = self.twins.layers
        if ahead is None or not len(twins):
            margin_now = self._margin * self.payback.scale
            swaps = swap_for_hotter(self.heat, resident, n_slots, margin=margin_now, max_swaps=self._max_swaps)
            if len(swaps):
                self.payback.follow(swaps)
            return swaps.widest_first()
        heat = self.heat.copy()
        heat[twins] += np.float32(self._twin_bonus) * self.twins.foretell(ahead)
        margin = np.full(len(heat), self._beside_twins_margin, np.float32)
        margin[twins] = self._twin_margin
        max_swaps = np.full(len(heat), self._max_swaps)
        max_swaps[twins] = self._twin_swaps
        return swap_for_hotter(heat, resident, n_slots, margin=margin, max_swaps=max_swaps).widest_first()


POLICIES: dict[str, type[Policy]] = {
    "adaptive": Adaptive,
    "decayed": Decayed,
    "window_topk": WindowTopK,
    "lru": LRU,
    "lfru": LFRU,
    "static": Static,
}


def make_policy(text: str, n_layers: int, n_experts: int) -> Policy:
    """Make a policy from its name, optionally with settings: `decayed` or `decayed:half_life=64,margin=1.5`.

    Raises `ConfigError` if there is no such policy or setting, or a value is not a number above 0.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"there is no cache policy {name!r}; there are {', '.join(sorted(POLICIES))}")
    defaults = {
        p.name: p.default for p in inspect.signature(POLICIES[name]).parameters.values() if p.kind == p.KEYWORD_ONLY
    }
    settings: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise ConfigError(f"cache policy {name!r} has no setting {key!r}; its settings are: {known}")
        kind = type(defaults[key])
        try:
            settings[key] = kind(value)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise ConfigError(f"cache policy {name!r}: {key} = {value!r} is not {wanted}") from None
        if not settings[key] >= (1 if kind is int else 0) or (key.endswith(("half_life",)) and settings[key] == 0):
            raise ConfigError(f"cache policy {name!r}: {key} = {value!r} is too small")
    policy: Policy = POLICIES[name](n_layers, n_experts, **settings)  # type: ignore[call-arg]
    return policy
