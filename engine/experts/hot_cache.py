"""The hot-expert cache as one object: told what was routed, it swaps, counts, and explains itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.devices.slots import SlotDevice
from engine.experts.cost import SwapBudget
from engine.experts.policy import Policy
from engine.experts.slots import SlotTable
from engine.experts.swapper import Swapper
from engine.experts.swaps import NO_SWAPS, Swaps, hottest
from engine.experts.tracker import Heat, count_choices

_ANY = 1 << 30  # tokens, or positions: more than there can be
PROMPT_TAIL = 256  # tokens of a prompt that count as heat: what was before is forgotten by most counts


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counts since the cache was made or last reset.

    Attributes:
        n_tokens: that used the cache; those of bypassed prompts are not among them.
        hits: int64 [n_layers], choices served from slots.
        choices: int64 [n_layers].
        loads: int64 [n_layers], experts copied into slots.
        loaded_bytes: their bytes.
        n_failures: copies that failed.
    """

    n_tokens: int
    hits: npt.NDArray[np.int64]
    choices: npt.NDArray[np.int64]
    loads: npt.NDArray[np.int64]
    loaded_bytes: int
    n_failures: int

    @property
    def hit_rate(self) -> float:
        """Return the share of choices served from slots."""
        return float(self.hits.sum() / max(int(self.choices.sum()), 1))

    @property
    def n_loads(self) -> int:
        """Return the experts copied into slots of all layers."""
        return int(self.loads.sum())


class HotCache:
    """Keeps the experts that are chosen most in the slots of a device.

    Attributes:
        device: has the slots.
        table: who is in which slot.
        policy: decides who should be.
        counts: int64 [n_layers, n_experts], all choices since the start, for a profile.
        n_counted: the tokens that made them.

    At each token boundary, `observe` is given the routing of the step that has just run, then `step` moves swaps on;
    while another one runs, `go_on` does. Before a step, `make_room` lends it the slots whose memory it needs. None of
    them changes what is computed, only where.
    """

    def __init__(
        self,
        device: SlotDevice,
        table: SlotTable,
        policy: Policy,
        budget: SwapBudget,
        *,
        bypass_n_tokens: int = 32,
        prompt_seeds_heat: bool = True,
        max_in_flight: int = 256,
    ) -> None:
        """Start with the slots of `table` free.

        Args:
            device: has the slots.
            table: belongs to this cache from now on.
            policy: fresh, or with heat from a profile.
            budget: of bytes a token.
            bypass_n_tokens: steps of this many tokens or more stream their experts past the cache.
            prompt_seeds_heat: whether the last tokens of such steps count as heat; the first fills the slots anyway,
                by that heat or by all that it chose.
            max_in_flight: swaps under way at most.
        """
        self.device, self.table, self.policy, self._budget = device, table, policy, budget
        self._bypass_n_tokens, self._prompt_seeds_heat = bypass_n_tokens, prompt_seeds_heat
        self._swapper = Swapper(device, table, max_in_flight)
        self._n_experts = table.held.shape[1]
        kept = device.usable_slots(_ANY, _ANY) if (table.n_slots >= self._n_experts).all() else np.zeros(1, bool)
        self._keeps_all = bool(kept.all())
        self.counts = np.zeros(table.held.shape, np.int64)
        self.n_counted = 0
        self._to_fill = NO_SWAPS
        self._interrupted = False
        self._used = False
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Start to count afresh."""
        self._n_tokens = 0
        self._hits = np.zeros(len(self.table.n_slots), np.int64)
        self._choices = np.zeros(len(self.table.n_slots), np.int64)
        self._loads_before = (self._swapper.loads.copy(), self._swapper.n_bytes, self._swapper.n_failures)

    @property
    def statistics(self) -> CacheStatistics:
        """Return the counts so far."""
        loads, n_bytes, failures = self._loads_before
        return CacheStatistics(
            self._n_tokens,
            self._hits.copy(),
            self._choices.copy(),
            self._swapper.loads - loads,
            self._swapper.n_bytes - n_bytes,
            self._swapper.n_failures - failures,
        )

    def resident(self) -> npt.NDArray[np.bool_]:
        """Return a copy of who is in a slot for steps that start now, [n_layers, n_experts]."""
        ready: npt.NDArray[np.bool_] = self.table.ready.copy()
        return ready

    def bypasses(self, n_tokens: int) -> bool:
        """Return whether a step of so many tokens does not change the cache."""
        return n_tokens >= self._bypass_n_tokens

    def observe(self, routing: npt.NDArray[np.integer], resident: npt.NDArray[np.bool_] | None = None) -> None:
        """Take in a step that has run, before `step`.

        Args:
            routing: ids [n_layers, n_tokens, n_experts_used]; one of n_experts or more stands for nobody.
            resident: who was in a slot for it; None for those who are now.
        """
        if resident is None:
            resident = self.table.ready
        n_tokens = routing.shape[1]
        tokens = routing.transpose(1, 0, 2)
        counts = count_choices(tokens, self._n_experts)
        self.counts += counts.astype(np.int64)
        self.n_counted += n_tokens
        if self._has_everything and resident.all() and not self.bypasses(n_tokens):
            self._used = True
            self._n_tokens += n_tokens
            self._hits += (n_choices := (routing < self._n_experts).sum((1, 2)))
            self._choices += n_choices
            return
        if self.bypasses(n_tokens):
            if self._prompt_seeds_heat:
                self.policy.observe_prompt(tokens[-PROMPT_TAIL:])
            if not self._used:
                self.fill(self.policy.heat if self._prompt_seeds_heat else counts)
            return
        self._used = True
        self._n_tokens += n_tokens
        layers, known = np.arange(routing.shape[0])[:, None, None], routing < self._n_experts
        self._hits += (resident[layers, np.where(known, routing, 0)] & known).sum((1, 2))
        self._choices += known.sum((1, 2))
        for chosen in tokens:
            self.policy.observe(chosen)

    @property
    def _has_everything(self) -> bool:
        """Return whether every expert is in a slot for good: to decide nothing takes a policy half a millisecond."""
        return self._keeps_all and bool(self.table.ready.all())

    def fill(self, heat: Heat, wait: bool = False) -> None:
        """Give free slots to the hottest experts, hottest first; heat: float32 [n_layers, n_experts].

        For what a prompt or a saved profile says. No budget holds it back: there is nothing in the slots yet. Without
        `wait` the copies go on while tokens are made, as many at a time as may be in flight.
        """
        if self._interrupted:
            self.recover()
        held = self.table.held
        outside = np.where(held, np.float32(0), heat)
        layers, experts = np.nonzero(hottest(outside, self.table.n_usable - held.sum(1)) & (outside > 0))
        leads = heat[layers, experts].astype(np.float32)
        self._to_fill = Swaps(layers, experts, np.full(len(layers), -1), leads).widest_first()
        self._advance(self._take_to_fill())
        while wait and len(self._to_fill):
            self._swapper.drain()
            self._advance(self._take_to_fill())
        if wait:
            self._swapper.drain()

    def _take_to_fill(self) -> Swaps:
        """Return the next loads of a first fill, as many as there is room for."""
        swaps, n = self._to_fill, self._swapper.room
        if not len(swaps):
            return NO_SWAPS
        if self._swapper.stopped:
            self._to_fill = NO_SWAPS
            return NO_SWAPS
        self._to_fill = swaps.pick(slice(n, None))
        return swaps.pick(slice(0, n))

    def step(self, token_s: float) -> int:
        """Move swaps on and begin new ones; call between two tokens. Return how many were begun.

        token_s: the time the last token took, which earns the next copies their budget.
        """
        if self._interrupted:
            self.recover()
        if self._has_everything and not self._swapper.n_under_way:
            return 0
        self._advance(NO_SWAPS)
        self._budget.grant(token_s, whole=np.count_nonzero(self.table.held) < self.table.n_usable.sum())
        if len(self._to_fill):
            return self._advance(self._take_to_fill())
        if not self._used or not self._swapper.room:
            return 0
        swaps = self.policy.plan(self.table.held, self.table.n_usable)
        # A victim that is itself still on its way cannot make room yet.
        swaps = swaps.pick((swaps.evicts < 0) | self.table.ready[swaps.layers, swaps.evicts])
        swaps = swaps.within(self.table.expert_bytes, self._budget.allowance).pick(slice(0, self._swapper.room))
        self._budget.spend(int(self.table.expert_bytes[swaps.layers].sum()))
        return self._advance(swaps)

    def make_room(self, n_tokens: int, n_positions: int) -> None:
        """Get ready for a step, right before it: lend it the slots whose memory it needs.

        They come back before the first step that does not need it, so that the parts of a prompt find them lent; then
        they are free, and filled as free slots are.

        Args:
            n_tokens: of the step.
            n_positions: of the longest sequence after it.
        """
        if self._interrupted:
            self.recover()
        usable = self.device.usable_slots(n_tokens, n_positions)
        if usable is self.table.usable:
            return
        if np.array_equal(usable, self.table.usable):
            self.table.usable = usable  # for a device has one array for the same slots, and tokens are many
            return
        try:
            self._to_fill = NO_SWAPS  # it reckons with other slots
            self._swapper.lend_all_but(usable)
        except BaseException:
            self._interrupted = True
            raise

    def publish_arrivals(self) -> None:
        """Let the next step read what has arrived since `step`; the little that pays right before a step begins."""
        if self._interrupted:
            return
        try:
            self._swapper.poll(may_start=False)
        except BaseException:
            self._interrupted = True
            raise

    def go_on(self) -> bool:
        """Move swaps on while a step runs; return whether any are under way."""
        if self._interrupted or not self._swapper.n_under_way:
            return False
        self._advance(NO_SWAPS)
        return self._swapper.n_under_way > 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let nobody begin a copy in here; another thread that is about to begin many stops after the one at hand."""
        self._swapper.is_held = True
        try:
            yield
        finally:
            self._swapper.is_held = False

    def _advance(self, swaps: Swaps) -> int:
        """Begin with swaps and move all on. An interrupt in here leaves a note for the next call."""
        try:
            n = self._swapper.submit(swaps)
            self._swapper.poll()
        except BaseException:
            self._interrupted = True
            raise
        return n

    def recover(self) -> None:
        """Make slots, table and device agree again after an interrupt; done by itself at the next step."""
        self._swapper.recover()
        self._to_fill = NO_SWAPS
        self._interrupted = False

    def close(self) -> None:
        """Wait until nothing is being copied any more."""
        if self._interrupted:
            self.recover()
        self._swapper.drain()

    def describe(self) -> str:
        """Return one line: what the cache holds and earns, or why it does not."""
        n_slots = self.table.n_slots
        if not n_slots.any():
            return "hot-expert cache off: no layer has a slot (hot_k is 0, or no VRAM is left for one)"
        if self._swapper.stopped:
            return f"hot-expert cache frozen: {self._swapper.stopped}"
        low, high = int(n_slots.min()), int(n_slots.max())
        each = f"{low}" if low == high else f"{low} to {high}"
        share = float(n_slots.mean()) / self._n_experts
        text = f"hot-expert cache: {each} of {self._n_experts} experts in each of {len(n_slots)} layers ({share:.0%}, "
        size = self.table.n_bytes
        text += f"{size / 1e9:.2f} GB)" if size >= 1e9 else f"{size / 1e6:.1f} MB)"
        if not self._n_tokens:
            return f"{text}, about {expected_hit_rate(share):.0%} hits expected; {self._budget.describe()}"
        found, n_lent = self.statistics, int((n_slots - self.table.n_usable).sum())
        text += f", {found.hit_rate:.0%} hits, {found.n_loads / found.n_tokens:.1f} swaps a token"
        return f"{text}; {n_lent} slots are lent to the prompt or the context" if n_lent else text


# Of the adaptive policy on recorded chats with models of 30 to 120 billion parameters (the mean of two, and of made-up
# routing): share of the experts in slots, hit rate. Small models whose routers were trained for balance get less.
_SHARES = (0.0, 0.05, 0.10, 0.17, 0.25, 0.35, 0.50, 0.75, 1.0)
_HIT_RATES = (0.0, 0.37, 0.54, 0.67, 0.77, 0.84, 0.90, 0.96, 1.0)


def expected_hit_rate(share: float) -> float:
    """Return the hit rate that a cache of this share of the experts had on recorded routing."""
    return float(np.interp(share, _SHARES, _HIT_RATES))


def why_useless(break_even: float, n_slots: npt.NDArray[np.integer], n_experts_used: int) -> str | None:
    """Return why a cache with these slots could not pay, with what to change, or None if it may."""
    if math.isinf(break_even):
        return "the device's memory is not faster than RAM, so a load never pays; set hot_k = 0"
    if n_slots.any() and n_slots.max() < n_experts_used:
        return (
            f"{int(n_slots.max())} slots a layer hold less than one token's {n_experts_used} experts; "
            "give it more VRAM (hot_k, vram_budget) or set hot_k = 0"
        )
    return None
