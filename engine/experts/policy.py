"""Which experts to swap: pure functions of heat and residents, for all layers at once.

A swap reads one expert from RAM and copies it over PCIe; a miss reads one expert from RAM. So a swap pays if the
newcomer is expected to be chosen at least once more than the one it replaces, which is what a margin of about one
count asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.experts.tracker import Heat

Resident = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.intp]

UNLIMITED = 1 << 30


@dataclass(frozen=True, slots=True)
class Swaps:
    """Swaps in the order they are wanted: in `layers[i]`, `loads[i]` takes the slot of `evicts[i]` (-1: a free one)."""

    layers: Ids
    loads: Ids
    evicts: Ids

    def __len__(self) -> int:
        return len(self.layers)


def swap_for_hotter(
    heat: Heat,
    resident: Resident,
    n_slots: npt.NDArray[np.intp],
    *,
    margin: float = 0.0,
    max_swaps: int = UNLIMITED,
    candidates: Resident | None = None,
) -> Swaps:
    """Return the swaps that bring the hottest experts in, at most `max_swaps` a layer.

    Args:
        heat: float32 [n_layers, n_experts].
        resident: bool of the same shape: who is in a slot.
        n_slots: slots of each layer; free ones are filled with experts of any heat above 0.
        margin: lead in heat that a newcomer needs over the coldest resident; equal heat never swaps.
        max_swaps: of each layer.
        candidates: experts that may be loaded; None for all.
    """
    n_layers = len(heat)
    outside = np.where(resident if candidates is None else resident | ~candidates, -np.inf, heat)
    inside = np.where(resident, heat, np.inf)
    free = n_slots - resident.sum(1)
    rounds: list[tuple[Ids, Ids, Ids]] = []
    layers = np.flatnonzero(n_slots > 0)
    for _ in range(min(max_swaps, int(n_slots.max(initial=0)))):
        loads, evicts = outside[layers].argmax(1), inside[layers].argmin(1)
        newcomer, coldest = outside[layers, loads], inside[layers, evicts]
        has_room = free[layers] > 0
        wanted = np.where(has_room, newcomer > 0, newcomer - coldest > margin)
        layers, loads, evicts, has_room = layers[wanted], loads[wanted], evicts[wanted], has_room[wanted]
        if not len(layers):
            break
        outside[layers, loads] = -np.inf
        full = ~has_room
        inside[layers[full], evicts[full]] = np.inf
        free[layers[has_room]] -= 1
        rounds.append((layers, loads, np.where(has_room, -1, evicts)))
    assert n_layers == len(resident)
    if not rounds:
        none = np.zeros(0, np.intp)
        return Swaps(none, none, none)
    return Swaps(*(np.concatenate(parts) for parts in zip(*rounds, strict=True)))
