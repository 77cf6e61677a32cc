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
from engine.experts.forecast import HORIZON, Forecast
from engine.experts.swaps import NO_SWAPS, UNLIMITED, Ids, Resident, Swaps, swap_for_hotter
from engine.experts.tracker import (
    Chosen,
    CountOverAge,
    DecayedCounts,
    Heat,
    LastUse,
    Places,
    Tracker,
    WindowCounts,
)
from engine.experts.twins import Twins

COST = 0.9  # of a load: the forecast leaves out the hits beyond its horizon
DEVIATIONS = 0.8  # that a lead must be above chance


class TokenPolicy(Protocol):
    """Decides which experts should be in the slots, told one token after the other."""

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


class Policy(TokenPolicy, Protocol):
    """One that the cache can use: it can be told a prompt at once."""

    def observe_prompt(self, tokens: Chosen) -> None:
        """Take in the end of a prompt, [n_tokens, n_layers, n_experts_used]; quicker than token by token."""
        ...


class _KeepTheHottest:
    """A tracker, and swaps at every `interval`-th token for what it finds hotter by more than `margin`."""

    def __init__(self, tracker: Tracker, *, interval: int = 1, margin: float = 0.0, max_swaps: int = UNLIMITED) -> None:
        self._tracker = tracker
        self._interval, self._margin, self._max_swaps = interval, margin, max_swaps
        self._calls = 0

    @property
    def heat(self) -> Heat:
        """Return the tracker's measure."""
        return self._tracker.heat

    def observe(self, chosen: Chosen) -> None:
        """Take in one token."""
        self._tracker.observe(chosen)

    def observe_prompt(self, tokens: Chosen) -> None:
        """Take in the end of a prompt."""
        for chosen in tokens:
            self.observe(chosen)

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:  # noqa: ARG002
        """Return swaps, or none between two looks."""
        self._calls += 1
        if self._calls % self._interval:
            return NO_SWAPS
        return swap_for_hotter(self.heat, resident, n_slots, margin=self._margin, max_swaps=self._max_swaps)


class WindowTopK(_KeepTheHottest):
    """The most chosen experts of the last `window` tokens, put in place every `interval` tokens."""

    def __init__(
        self, n_layers: int, n_experts: int, *, window: int = 256, interval: int = 60, max_swaps: int = UNLIMITED
    ) -> None:
        super().__init__(WindowCounts(n_layers, n_experts, window), interval=interval, max_swaps=max_swaps)


class Decayed(_KeepTheHottest):
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
        tracker = DecayedCounts(n_layers, n_experts, half_life)
        super().__init__(tracker, interval=interval, margin=margin, max_swaps=max_swaps)


class Static(_KeepTheHottest):
    """No swaps: what a profile or the first prompt put into the slots stays there. Heat is counted, to be saved."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        super().__init__(DecayedCounts(n_layers, n_experts, half_life=np.inf), margin=np.inf)


class _DemandCache(_KeepTheHottest):
    """Loads every expert that was missed, in place of the resident with the least heat."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(tracker)
        self._places = Places(*tracker.heat.shape)
        self._used = np.zeros(tracker.heat.shape, bool)

    def observe(self, chosen: Chosen) -> None:
        """Take in one token."""
        super().observe(chosen)
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


class Adaptive:
    """A forecast of how often each expert will be chosen, learned while the model runs, and swaps that pay by it.

    A newcomer must lead by what its load costs, `break_even` choices, and by more than chance: a choice more or less
    moves the forecast by so much, and choices deviate by the square root of their number. `margin` multiplies both. A
    chat may last as long as it has so far, so a load into a young one has less time to pay and needs a wider lead.

    The swaps of a layer with a twin are decided on what the twin has just chosen for the very token, if `ahead` tells:
    an expert that is about to be chosen with probability p is given p of what a choice makes of its forecast, and the
    choice itself. That is surer than what rates foretell, so these layers need only `of_twins` times the lead.
    """

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        *,
        break_even: float = 1.0,
        margin: float = 1.0,
        of_twins: float = 0.8,
    ) -> None:
        self._forecast = Forecast(n_layers, n_experts)
        self.twins = Twins(n_layers, n_experts)
        self._break_even, self._margin, self._of_twins = break_even, margin, of_twins

    @property
    def heat(self) -> Heat:
        """Return the forecast."""
        return self._forecast.heat

    def observe(self, chosen: Chosen) -> None:
        """Take in one token, and compare the layers."""
        if self.twins.observe(chosen):
            self._forecast.set_twins(self.twins.of)
        self._forecast.observe(chosen)

    def observe_prompt(self, tokens: Chosen) -> None:
        """Take in the end of a prompt."""
        for chosen in tokens:
            self.twins.observe(chosen)
        self._forecast.set_twins(self.twins.of)
        self._forecast.observe_prompt(tokens)

    def plan(self, resident: Resident, n_slots: Ids, ahead: Chosen | None = None) -> Swaps:
        """Return the swaps that pay, widest lead first."""
        heat, margin = self.heat, np.full(len(self.heat), self._margin, np.float32)
        twins = self.twins.layers
        if ahead is not None and len(twins):
            heat = heat.copy()
            heat[twins] += np.float32(1.0 + self._forecast.of_one_choice) * self.twins.foretell(ahead)
            margin[twins] *= self._of_twins
        youth = 1.0 + HORIZON / (2.0 * max(self._forecast.n_tokens, 1))
        return swap_for_hotter(
            heat,
            resident,
            n_slots,
            margin=margin * np.float32(COST * self._break_even * youth),
            deviations=margin * np.float32(DEVIATIONS * self._forecast.of_one_choice),
        ).widest_first()


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
