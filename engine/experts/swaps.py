"""Swaps, and the one rule that makes them: pure functions of heat and residents, for all layers at once.

A swap reads one expert from RAM and copies it over PCIe; a miss reads one expert from RAM. So a swap pays if the
newcomer is expected to be chosen at least once more than the one it replaces, which is what a margin of about one
count asks for. What is expected is known only so well: counts deviate by the square root of themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.experts.tracker import Heat

Resident = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.intp]

UNLIMITED = 1 << 30

_FAR = np.float32(1e30)  # added to heat to take an expert out of a search; heat itself stays far below


@dataclass(frozen=True, slots=True)
class Swaps:
    """Swaps in the order they are wanted: in `layers[i]`, `loads[i]` takes the slot of `evicts[i]` (-1: a free one).

    `leads[i]` is how much hotter the newcomer is than the expert it replaces (than nothing, for a free slot).
    """

    layers: Ids
    loads: Ids
    evicts: Ids
    leads: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.layers)

    def pick(self, which: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> Swaps:
        """Return some of the swaps, in the order given."""
        return Swaps(self.layers[which], self.loads[which], self.evicts[which], self.leads[which])

    def widest_first(self) -> Swaps:
        """Return the same swaps, those with the widest lead first (equal ones keep their order)."""
        return self.pick(np.argsort(-self.leads, kind="stable"))

    def within(self, load_bytes: npt.NDArray[np.int64], allowance: float) -> Swaps:
        """Return the first swaps whose loads come to no more than `allowance` bytes; load_bytes: int64 [n_layers]."""
        if not len(self):
            return self
        return self.pick(slice(0, int(np.searchsorted(np.cumsum(load_bytes[self.layers]), allowance, side="right"))))

    def apply(self, resident: Resident) -> None:
        """Make the swaps in a table of residents, in place."""
        full = self.evicts >= 0
        resident[self.layers[full], self.evicts[full]] = False
        resident[self.layers, self.loads] = True


NO_SWAPS = Swaps(np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0, np.float32))


def hottest(heat: Heat, n_slots: Ids) -> Resident:
    """Return the hottest experts of each layer, as many as it has slots; equal heat goes to the lower number."""
    order = np.argsort(-heat, axis=1, kind="stable")
    resident = np.zeros(heat.shape, bool)
    np.put_along_axis(resident, order, np.arange(heat.shape[1]) < n_slots[:, None], axis=1)
    return resident


def swap_for_hotter(
    heat: Heat,
    resident: Resident,
    n_slots: Ids,
    *,
    margin: float | npt.NDArray[np.float32] = 0.0,
    deviations: float | npt.NDArray[np.float32] | None = None,
    max_swaps: int | Ids = UNLIMITED,
    candidates: Resident | None = None,
) -> Swaps:
    """Return the swaps that bring the hottest experts in. Free slots are filled at once, the others by few swaps.

    Args:
        heat: float32 [n_layers, n_experts], 0 or more.
        resident: bool of the same shape: who is in a slot; no more of a layer than it has slots.
        n_slots: slots of each layer; free ones are filled with experts of any heat above 0.
        margin: lead in heat that a newcomer needs over the coldest resident, of all layers or float32 [n_layers];
            a lead that is no more than the margin never swaps. Minus infinity swaps every candidate in.
        deviations: lead that it needs, too, as a multiple of the square root of both heats' sum; one number for all
            layers or [n_layers], None for no such demand.
        max_swaps: that replace an expert, at most, of each layer: one number for all or [n_layers].
        candidates: experts that may be loaded; None for all.
    """
    away = np.multiply(resident, _FAR, dtype=np.float32)
    inside = heat + (_FAR - away)
    outside = heat - away if candidates is None else np.where(candidates & ~resident, heat, -_FAR)
    any_free = np.count_nonzero(resident) < n_slots.sum()
    free = n_slots - np.count_nonzero(resident, axis=1) if any_free else n_slots
    rows = np.arange(len(heat))
    rounds: list[Swaps] = []
    left = np.array(np.broadcast_to(max_swaps, len(heat)))
    for _ in range(int(n_slots.max(initial=0)) if any_free else int(min(left.max(initial=0), n_slots.max(initial=0)))):
        loads, evicts = outside.argmax(1), inside.argmin(1)
        newcomer, coldest = outside[rows, loads], inside[rows, evicts]
        leads = newcomer - coldest
        enough = margin if deviations is None else np.maximum(margin, deviations * np.sqrt(np.abs(newcomer + coldest)))
        wanted = (leads > enough) & (newcomer >= 0) & (coldest < _FAR / 2) & (left > 0)
        if any_free:
            has_room = free > 0
            wanted = np.where(has_room, newcomer > 0, wanted)
            leads, evicts = np.where(has_room, newcomer, leads), np.where(has_room, -1, evicts)
            free -= wanted & has_room
            left += wanted & has_room
        left -= wanted
        layers = wanted.nonzero()[0]
        if not len(layers):
            break
        found = Swaps(layers, loads[layers], evicts[layers], leads[layers])
        outside[layers, found.loads] = -_FAR
        if any_free:
            full = found.evicts >= 0
            inside[layers[full], found.evicts[full]] = _FAR
        else:
            inside[layers, found.evicts] = _FAR
        rounds.append(found)
    if len(rounds) < 2:
        return rounds[0] if rounds else NO_SWAPS
    return Swaps(
        np.concatenate([r.layers for r in rounds]),
        np.concatenate([r.loads for r in rounds]),
        np.concatenate([r.evicts for r in rounds]),
        np.concatenate([r.leads for r in rounds]),
    )
