"""Plays recorded routing against a cache policy, with no model and no device.

The rules: the slots of each layer begin with the experts that the prompt chose most; a swap that a token causes can be
used from the next token on, or `lag` tokens later; an expert that is not resident is computed elsewhere and does not
have to be loaded. With `ahead`, the swaps of a layer with a twin are decided between the layers of one token, when the
twin has chosen, and can be used by that token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.experts.policy import TokenPolicy
from engine.experts.swaps import NO_SWAPS, Ids, Swaps, hottest, swap_for_hotter
from engine.experts.trace import Trace
from engine.experts.tracker import Heat, Places


@dataclass(frozen=True, slots=True)
class Replay:
    """What a policy did on a trace; all per-layer arrays are [n_layers].

    Attributes:
        n_tokens: tokens that were counted (those of the answer).
        hits: int64, choices that were served from slots.
        choices: int64, all recorded choices.
        loads: int64, experts copied into slots.
        hits_over_time: int64 [n_tokens], of all layers together.
        choices_over_time: int64 [n_tokens].
        loads_over_time: int64 [n_tokens].
    """

    n_tokens: int
    hits: npt.NDArray[np.int64]
    choices: npt.NDArray[np.int64]
    loads: npt.NDArray[np.int64]
    hits_over_time: npt.NDArray[np.int64]
    choices_over_time: npt.NDArray[np.int64]
    loads_over_time: npt.NDArray[np.int64]

    @property
    def hit_rate(self) -> float:
        """Return the share of choices served from slots."""
        return float(self.hits.sum() / max(int(self.choices.sum()), 1))

    @property
    def loads_per_layer(self) -> float:
        """Return the experts loaded for a token and layer, on average."""
        return float(self.loads.sum() / max(self.n_tokens * len(self.loads), 1))

    def bytes_per_token(self, expert_bytes: npt.NDArray[np.int64]) -> float:
        """Return the bytes copied into slots for a token; expert_bytes: int64 [n_layers]."""
        return float((self.loads * expert_bytes).sum() / max(self.n_tokens, 1))

    def saved(self, expert_bytes: npt.NDArray[np.int64]) -> float:
        """Return the share of the bytes of all choices that were *not* read from RAM, loads being reads too."""
        return float(((self.hits - self.loads) * expert_bytes).sum() / max((self.choices * expert_bytes).sum(), 1))


def replay(
    trace: Trace,
    policy: TokenPolicy,
    n_slots: Ids,
    *,
    ahead: bool = False,
    lag: int = 0,
    swap_bytes: float = np.inf,
    expert_bytes: npt.NDArray[np.int64] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Replay:
    """Play a trace against a policy.

    Args:
        trace: the routing; its prompt (`n_prompt` tokens) fills the slots, is learned from token by token, and is not
            counted.
        policy: fresh, for the trace's layers and experts.
        n_slots: slots of each layer.
        ahead: let swaps be made between the layers of one token.
        lag: tokens by which swaps are late. Who makes room serves for all of them but the last; nobody does in that.
        swap_bytes: bytes that may be copied for each token; what one leaves over serves the next, up to as much again.
        expert_bytes: int64 [n_layers], the size of an expert; one byte each if left out.
        progress: called with the number of tokens played, about a hundred times.
    """
    n_prompt, n_tokens = trace.n_prompt, trace.n_tokens - trace.n_prompt
    sizes = np.ones(trace.n_layers, np.int64) if expert_bytes is None else expert_bytes
    most = float(sizes.max(initial=1))
    ids = trace.ids
    for chosen in ids[:n_prompt]:
        policy.observe(chosen)
    resident = hottest(trace.counts(0, n_prompt), n_slots) if n_prompt else np.zeros(policy.heat.shape, bool)
    ready = resident.copy() if lag else resident
    under_way = deque([NO_SWAPS] * (lag + 1), lag + 1)  # the newest last
    flat = ready.reshape(-1)
    recorded = ids[n_prompt:] < trace.n_experts
    all_recorded = bool(recorded.all())
    places = np.minimum(ids[n_prompt:], trace.n_experts - 1) + (np.arange(trace.n_layers) * trace.n_experts)[:, None]
    hits = np.zeros(trace.n_layers, np.int64)
    loads = np.zeros(trace.n_layers, np.int64)
    hits_over_time = np.zeros(n_tokens, np.int64)
    loads_over_time = np.zeros(n_tokens, np.int64)
    allowance = 0.0
    hundredth = max(n_tokens // 100, 1)
    for t in range(n_tokens):
        chosen, swaps = ids[n_prompt + t], NO_SWAPS
        if t or ahead:
            allowance = min(allowance + swap_bytes, 2 * max(swap_bytes, most))
            swaps = policy.plan(resident, n_slots, chosen if ahead else None)
            if lag:  # who is still on the way cannot make room
                swaps = swaps.pick((swaps.evicts < 0) | ready[swaps.layers, swaps.evicts])
            if len(swaps) and swap_bytes != np.inf:
                swaps = swaps.within(sizes, allowance)
                allowance -= float(sizes[swaps.layers].sum())
            if len(swaps):
                swaps.apply(resident)
                np.add.at(loads, swaps.layers, 1)
                loads_over_time[t] = len(swaps)
        if lag:
            under_way.append(swaps)
            leaving, arriving = under_way[1], under_way[0]
            leaving = leaving.pick(leaving.evicts >= 0)
            ready[leaving.layers, leaving.evicts] = False
            ready[arriving.layers, arriving.loads] = True
        found = flat[places[t]] if all_recorded else flat[places[t]] & recorded[t]
        hits += found.sum(1)
        hits_over_time[t] = np.count_nonzero(found)
        policy.observe(chosen)
        if progress and not t % hundredth:
            progress(t)
    return Replay(
        n_tokens,
        hits,
        recorded.sum((0, 2)),
        loads,
        hits_over_time,
        recorded.sum((1, 2)),
        loads_over_time,
    )


class Clairvoyant:
    """Belady's rule, which needs to know the future: keep the experts whose next use is nearest.

    With bypass, a missed expert is loaded only if its next use comes before that of the resident it would replace: the
    most hits that a cache which loads only what was just used can have.
    """

    def __init__(self, trace: Trace, *, bypass: bool = True) -> None:
        self._next = _next_uses(trace.ids, trace.n_experts)
        self._bypass = bypass
        self._places = Places(trace.n_layers, trace.n_experts)
        self._known = trace.ids < trace.n_experts
        self._last, self._now = trace.n_tokens, 0
        self.heat: Heat = np.zeros((trace.n_layers, trace.n_experts), np.float32)
        self._used = np.zeros(self.heat.shape, bool)

    def observe(self, chosen: npt.NDArray[np.integer]) -> None:
        """Note when each chosen expert is used again."""
        places = self._places.of(chosen)
        self.heat.reshape(-1)[places] = self._last - self._next[self._now][self._known[self._now]]
        self._used[:] = False
        self._used.reshape(-1)[places] = True
        self._now += 1

    def plan(self, resident: npt.NDArray[np.bool_], n_slots: Ids, ahead: object = None) -> Swaps:  # noqa: ARG002
        """Return the swaps among the experts just used."""
        margin = 0.0 if self._bypass else -np.inf
        return swap_for_hotter(self.heat, resident, n_slots, margin=margin, candidates=self._used)


def _next_uses(ids: npt.NDArray[np.uint16], n_experts: int) -> npt.NDArray[np.float32]:
    """Return the number of the next token that makes each choice again (n_tokens for none), shaped like ids."""
    n_tokens, n_layers, _ = ids.shape
    upcoming = np.full((n_layers, n_experts + 1), n_tokens, np.float32)
    found = np.empty(ids.shape, np.float32)
    places = np.minimum(ids, n_experts).astype(np.intp)
    for t in range(n_tokens - 1, -1, -1):
        found[t] = np.take_along_axis(upcoming, places[t], axis=1)
        np.put_along_axis(upcoming, places[t], t, axis=1)
    return found


def static_optimum(trace: Trace, n_slots: Ids) -> Replay:
    """Return what the best set of experts that never changes would have done; it is loaded before the answer."""
    counts = trace.counts(trace.n_prompt)
    resident = hottest(counts, n_slots)
    ids = trace.ids[trace.n_prompt :]
    table = np.zeros((trace.n_layers, trace.n_experts + 1), bool)
    table[:, :-1] = resident
    found = table[np.arange(trace.n_layers)[:, None], np.minimum(ids, trace.n_experts)]
    recorded = ids < trace.n_experts
    nothing = np.zeros(trace.n_layers, np.int64)
    return Replay(
        len(ids),
        found.sum((0, 2)),
        recorded.sum((0, 2)),
        nothing,
        found.sum((1, 2)),
        recorded.sum((1, 2)),
        np.zeros(len(ids), np.int64),
    )
