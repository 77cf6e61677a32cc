"""The slot table: which expert is where on the device, and what each slot is doing.

The life of a slot:

    FREE --reserve--> RETIRING --load--> LOADING --ready--> READY --reserve (for another expert)--> RETIRING
      ^                  |                  |
      +------ release ---+------------------+

Slots can be LENT to steps that need their memory; whatever was in them is lost, and when they come back they are FREE.

A slot is RETIRING from the moment no new step may read it until the steps that still do are done; only then is it
overwritten (LOADING), and only when that copy is done is it read (READY). The record of a slot is replaced in one
assignment, so that an interrupt between two lines finds every slot in one state or the next; `rebuild` then brings
everything derived from the records in line.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.experts.swaps import Ids, Resident


class SlotState(enum.Enum):
    """What a slot is doing."""

    FREE = "free"
    RETIRING = "retiring"
    LOADING = "loading"
    READY = "ready"
    LENT = "lent"


@dataclass(frozen=True, slots=True)
class Slot:
    """The state of a slot, and the expert that is in it or on its way (-1 if free or lent)."""

    state: SlotState
    expert: int


_FREE, _LENT = Slot(SlotState.FREE, -1), Slot(SlotState.LENT, -1)


class SlotTable:
    """All slots of all layers. A slot has the size of its layer's experts, so that quants may differ by layer.

    Attributes:
        n_slots: slots of each layer.
        usable: bool [n_layers, most slots], those that are not lent; to be replaced as a whole, before `settle_lent`.
        held: bool [n_layers, n_experts]: experts that are in a slot or on their way to one.
        ready: bool of the same shape: experts that steps may read from a slot.
    """

    def __init__(self, n_slots: Ids, n_experts: int, expert_bytes: npt.NDArray[np.int64]) -> None:
        """Start with all slots free; expert_bytes: int64 [n_layers]."""
        assert ((n_slots >= 0) & (n_slots <= n_experts)).all()
        assert len(n_slots) == len(expert_bytes)
        self.n_slots = n_slots
        self.usable: npt.NDArray[np.bool_] = np.arange(n_slots.max(initial=0)) < n_slots[:, None]
        self.expert_bytes = expert_bytes
        self._slots = [[_FREE] * int(n) for n in n_slots]
        self.held: Resident = np.zeros((len(n_slots), n_experts), bool)
        self.ready: Resident = np.zeros((len(n_slots), n_experts), bool)
        self._slot_of = np.full((len(n_slots), n_experts), -1, np.int32)
        self._free = [list(range(int(n)))[::-1] for n in n_slots]

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all slots."""
        return int((self.n_slots * self.expert_bytes).sum())

    @property
    def n_usable(self) -> Ids:
        """Return how many slots of each layer are not lent."""
        n_usable: Ids = self.usable.sum(1)
        return n_usable

    def slot_of(self, layer: int, expert: int) -> int:
        """Return the slot that holds an expert or waits for it, -1 if none does."""
        return int(self._slot_of[layer, expert])

    def slot(self, layer: int, slot: int) -> Slot:
        """Return the record of a slot."""
        return self._slots[layer][slot]

    def reserve(self, layer: int, expert: int, evict: int) -> int:
        """Take a slot for an expert that is in none: a free one (evict -1), or that of a ready expert. Return it."""
        assert not self.held[layer, expert]
        if evict < 0:
            slot = self._free[layer].pop()
            assert self._slots[layer][slot] is _FREE
        else:
            assert self.ready[layer, evict]
            slot = self.slot_of(layer, evict)
        self._slots[layer][slot] = Slot(SlotState.RETIRING, expert)
        if evict >= 0:
            self.held[layer, evict] = self.ready[layer, evict] = False
            self._slot_of[layer, evict] = -1
        self.held[layer, expert] = True
        self._slot_of[layer, expert] = slot
        return slot

    def load(self, layer: int, slot: int) -> None:
        """Note that the copy into a slot has begun."""
        record = self._slots[layer][slot]
        assert record.state is SlotState.RETIRING
        self._slots[layer][slot] = Slot(SlotState.LOADING, record.expert)

    def make_ready(self, layer: int, slot: int) -> None:
        """Note that the copy into a slot is done."""
        record = self._slots[layer][slot]
        assert record.state is SlotState.LOADING
        self._slots[layer][slot] = Slot(SlotState.READY, record.expert)
        self.ready[layer, record.expert] = True

    def release(self, layer: int, slot: int) -> None:
        """Give up on the expert that a slot waits for."""
        record = self._slots[layer][slot]
        assert record.state in (SlotState.RETIRING, SlotState.LOADING)
        self._slots[layer][slot] = _FREE
        self.held[layer, record.expert] = False
        self._slot_of[layer, record.expert] = -1
        self._free[layer].append(slot)

    def lent(self, layer: int, slot: int) -> bool:
        """Return whether a slot is lent."""
        return not self.usable[layer, slot]

    def settle_lent(self) -> None:
        """Empty the slots that `usable` says are lent, and free those that are no longer."""
        for layer, slots in enumerate(self._slots):
            for slot, record in enumerate(slots):
                if self.lent(layer, slot):
                    slots[slot] = _LENT
                    if record.expert >= 0:
                        self.held[layer, record.expert] = self.ready[layer, record.expert] = False
                        self._slot_of[layer, record.expert] = -1
                elif record is _LENT:
                    slots[slot] = _FREE
            self._list_free(layer)

    def _list_free(self, layer: int) -> None:
        slots = self._slots[layer]
        self._free[layer] = [slot for slot in range(len(slots) - 1, -1, -1) if slots[slot] is _FREE]

    def rebuild(self) -> None:
        """Free every slot that is neither ready nor lent, and derive all else from the records and `usable`."""
        self.held[:] = self.ready[:] = False
        self._slot_of[:] = -1
        for layer, slots in enumerate(self._slots):
            for slot, record in enumerate(slots):
                if self.lent(layer, slot):
                    slots[slot] = _LENT
                elif record.state is SlotState.READY:
                    self.held[layer, record.expert] = self.ready[layer, record.expert] = True
                    self._slot_of[layer, record.expert] = slot
                else:
                    slots[slot] = _FREE
            self._list_free(layer)

    def check_integrity(self) -> None:
        """Raise `AssertionError` if any two parts of the table disagree."""
        for layer, slots in enumerate(self._slots):
            assert len(slots) == self.n_slots[layer]
            experts = [record.expert for record in slots if record.expert >= 0]
            assert len(set(experts)) == len(experts), f"layer {layer}: an expert has two slots"
            assert sorted(experts) == np.flatnonzero(self.held[layer]).tolist(), f"layer {layer}: held differs"
            ready = [record.expert for record in slots if record.state is SlotState.READY]
            assert sorted(ready) == np.flatnonzero(self.ready[layer]).tolist(), f"layer {layer}: ready differs"
            free = [slot for slot, record in enumerate(slots) if record.state is SlotState.FREE]
            assert sorted(self._free[layer]) == free, f"layer {layer}: free slots differ"
            for slot, record in enumerate(slots):
                assert (record.state is SlotState.LENT) == self.lent(layer, slot), f"layer {layer}: slot {slot} is lent"
                assert (record.expert >= 0) == (record.state not in (SlotState.FREE, SlotState.LENT))
                if record.expert >= 0:
                    assert self._slot_of[layer, record.expert] == slot, f"layer {layer}: slot {slot} is not found"
            assert np.count_nonzero(self._slot_of[layer] >= 0) == len(experts), f"layer {layer}: stray slot"
