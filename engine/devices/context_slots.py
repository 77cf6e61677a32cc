"""Expert slots in the memory of keys and values that no sequence has reached yet.

Room for a long context is seldom full: until a sequence grows to there, the end of each stretch of keys or values holds
experts. A slot is there while no sequence is longer than some number of tokens, and lent to the context from then on.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_POSITIONS = 1024  # that a slot must be there for to be worth its copies
ALIGNMENT = 256  # bytes, to a multiple of which a device may move a slot on


@dataclass(frozen=True, slots=True)
class ContextSlot:
    """A slot in a stretch of keys or values.

    Attributes:
        layer: of the MoE layers, whose expert it holds.
        stretch: in which of them it lies.
        offset: of its first byte there, to be aligned.
        n_positions: it is there while no sequence is longer.
    """

    layer: int
    stretch: int
    offset: int
    n_positions: int


def place_in_context(
    stretches: Sequence[int],
    context_length: int,
    expert_bytes: npt.NDArray[np.int64],
    n_slots: npt.NDArray[np.intp],
    most: int,
) -> tuple[ContextSlot, ...]:
    """Return the slots that stretches have room for, from their ends on; of each layer those that stay longest first.

    Args:
        stretches: bytes of a position in each of them.
        context_length: positions of each.
        expert_bytes: int64 [n_layers], one expert.
        n_slots: of each layer that there are already; the layers with fewest get the slots that stay longest.
        most: slots of a layer in all.
    """
    layers = [(int(n), -layer) for layer, n in enumerate(n_slots) if n < most]
    ends = [(-float(context_length), i, context_length * size - ALIGNMENT) for i, size in enumerate(stretches)]
    heapq.heapify(layers)
    heapq.heapify(ends)
    slots: list[ContextSlot] = []
    while layers and ends:
        n, minus_layer = layers[0]
        _, stretch, end = heapq.heappop(ends)
        offset = end - int(expert_bytes[-minus_layer])
        n_positions = offset // stretches[stretch]
        if n_positions < LEAST_POSITIONS:
            continue
        slots.append(ContextSlot(-minus_layer, stretch, offset, n_positions))
        heapq.heappush(ends, (-offset / stretches[stretch], stretch, offset))
        heapq.heappop(layers)
        if n + 1 < most:
            heapq.heappush(layers, (n + 1, minus_layer))
    return tuple(sorted(slots, key=lambda slot: (slot.layer, -slot.n_positions)))


class SequenceLengths:
    """How long the sequences of a program are: so much of the memory for their keys and values is in use."""

    def __init__(self, n_slots: int) -> None:
        """Start with sequences that are empty."""
        self._lengths = [0] * n_slots

    def longest_after(self, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> int:
        """Return how long the longest one is after a step with these tokens."""
        return max(self._after(positions, slots))

    def note(self, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> None:
        """Note a step. What a sequence held beyond its last token is forgotten: nobody goes back there."""
        self._lengths = self._after(positions, slots)

    def _after(self, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> list[int]:
        lengths = self._lengths.copy()
        for slot, last in dict(zip(slots.tolist(), positions.tolist(), strict=True)).items():
            lengths[slot] = last + 1
        return lengths
