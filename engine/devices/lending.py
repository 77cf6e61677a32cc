"""Which expert slots a step leaves alone.

Some are kept: they are there in any step. Others lie in memory that something else needs at times: in that of keys and
values while no sequence is long (`context_slots`), and in that of the intermediate results of long steps, and of the
buffers that experts without a slot pass through, while steps are short.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engine.devices.context_slots import ContextSlot

StepBytes: TypeAlias = tuple[tuple[int, int], ...]  # (tokens, bytes that steps of at most so many need), growing
_NEVER = np.iinfo(np.int64).max  # so long is nothing


@dataclass(frozen=True, slots=True)
class LentSlot:
    """A slot in the memory of long steps.

    Attributes:
        layer: of the MoE layers, whose expert it holds.
        offset: of its first byte there.
        n_tokens: it is there while steps have no more.
    """

    layer: int
    offset: int
    n_tokens: int


def place_lent(n_slots: npt.NDArray[np.intp], expert_bytes: npt.NDArray[np.int64], steps: StepBytes) -> list[LentSlot]:
    """Return so many slots of each layer, one behind the other, in turn, so that each step leaves some of all layers.

    Args:
        n_slots: of each layer.
        expert_bytes: int64 [n_layers], one expert.
        steps: what they need of this memory, from its beginning on.
    """
    slots, offset, sizes = list[LentSlot](), 0, expert_bytes.tolist()
    for turn in range(int(n_slots.max(initial=0))):
        for layer in np.flatnonzero(n_slots > turn).tolist():
            slots.append(LentSlot(layer, offset, max((n for n, n_bytes in steps if n_bytes <= offset), default=0)))
            offset += sizes[layer]
    return slots


class UsableSlots:
    """Which slots a step leaves alone; each layer has kept ones, then those in contexts, then those of long steps."""

    def __init__(
        self, n_kept: npt.NDArray[np.intp], context_slots: Sequence[ContextSlot], lent_slots: Sequence[LentSlot]
    ) -> None:
        """Note which there are; context_slots, lent_slots: of each layer in the order of their numbers."""
        layers = [slot.layer for slot in context_slots] + [slot.layer for slot in lent_slots]
        n_slots, used = n_kept + np.bincount(layers, minlength=len(n_kept)), n_kept.copy()
        self._exists = np.arange(n_slots.max(initial=0)) < n_slots[:, None]
        self._most_positions, self._most_tokens = (np.full(self._exists.shape, _NEVER) for _ in range(2))
        for in_context in context_slots:
            self._most_positions[in_context.layer, used[in_context.layer]] = in_context.n_positions
            used[in_context.layer] += 1
        for lent in lent_slots:
            self._most_tokens[lent.layer, used[lent.layer]] = lent.n_tokens
            used[lent.layer] += 1
        self._positions = sorted({slot.n_positions for slot in context_slots})
        self._tokens = sorted({slot.n_tokens for slot in lent_slots})
        self._found: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}

    def of(self, n_tokens: int, n_positions: int) -> npt.NDArray[np.bool_]:
        """Return them for a step of so many tokens, bool [n_layers, most slots].

        For the same slots it is the same array, which is not to be changed.

        Args:
            n_tokens: of the step.
            n_positions: of the longest sequence after it.
        """
        key = bisect_left(self._tokens, n_tokens), bisect_left(self._positions, n_positions)
        if key not in self._found:
            is_there = (self._most_tokens >= n_tokens) & (self._most_positions >= n_positions)
            self._found[key] = self._exists & is_there
        return self._found[key]
