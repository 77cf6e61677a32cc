"""The slots of the emulated device: real copies of expert bytes, and a check of everything that could go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_

import numpy as np

from engine import _kernels
from engine.devices.cpu.lowering import ExpertTables
from engine.devices.cpu.memory import ALIGNMENT, Arena
from engine.devices.emulated.clock import Event, VirtualClock
from engine.errors import DeviceError

POISON = 0xFF  # every float made of it is NaN


class HazardError(AssertionError):
    """Somebody broke the rule of slots; on a real GPU the text would be wrong now and then."""


@dataclass(slots=True)
class _Slot:
    """What is in a slot.

    Attributes:
        expert: whose bytes are in it, -1 for none.
        is_published: steps may read it.
        read_until: its last reader, or the last step that it was lent to, is done then.
    """

    expert: int = -1
    is_published: bool = False
    read_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that was started; a ticket of the device."""

    layer: int
    expert: int
    slot: int
    event: Event


class SlotMemory:
    """Slots in one arena, and the pointer tables that send steps to them.

    A slot is poisoned when a copy into it begins; the bytes come when the copy is over on the virtual clock. An
    interrupt between any two lines leaves nothing that the same call, or `publish` of every expert, does not mend.
    """

    def __init__(self, tables: list[ExpertTables], n_slots: list[int], clock: VirtualClock) -> None:
        """Allocate all slots, empty; entries of `tables` are changed when experts are published."""
        self._tables, self._clock = tables, clock
        self._homes = [table.addresses.copy() for table in tables]
        self._slots = [[_Slot() for _ in range(n)] for n in n_slots]
        offset = 0
        self._offsets: list[list[list[int]]] = []  # layer, slot, part
        for table, n in zip(tables, n_slots, strict=True):
            self._offsets.append([])
            for _ in range(n):
                parts = []
                for size in table.sizes:
                    parts.append(offset)
                    offset += -(-size // ALIGNMENT) * ALIGNMENT
                self._offsets[-1].append(parts)
        self._arena = Arena(offset + ALIGNMENT)
        self._arena.bytes[:] = POISON
        self._under_way: dict[tuple[int, int], Copy] = {}  # by layer and slot

    @property
    def under_way(self) -> list[Copy]:
        """Return the copies that are not over."""
        return list(self._under_way.values())

    def begin_copy(self, layer: int, expert: int, slot: int, event: Event) -> Copy:
        """Poison a slot for an expert that arrives with `event`."""
        record = self._record(layer, slot)
        if not 0 <= expert < self._homes[layer].shape[1]:
            raise HazardError(f"layer {layer} has no expert {expert}")
        if record.is_published:
            raise HazardError(
                f"layer {layer}: slot {slot} is overwritten while expert {record.expert} is published in it"
            )
        if record.read_until > self._clock.now:
            raise HazardError(
                f"layer {layer}: slot {slot} is overwritten while a step "
                f"{f'reads expert {record.expert}' if record.expert >= 0 else 'has results'} there"
            )
        if (layer, slot) in self._under_way:
            raise HazardError(f"layer {layer}: two copies into slot {slot} at the same time")
        self._empty(layer, slot)
        copy = self._under_way[layer, slot] = Copy(layer, expert, slot, event)
        return copy

    def settle(self) -> None:
        """Bring the bytes of all copies that are over by now."""
        for copy in self.under_way:
            if copy.event.at > self._clock.now:
                continue
            if not copy.event.failed:
                table, home = self._tables[copy.layer], self._homes[copy.layer][:, copy.expert]
                for part, offset in enumerate(self._offsets[copy.layer][copy.slot]):
                    _kernels.parallel_copy(int(home[part]), self._arena.address + offset, table.sizes[part], 1)
                self._record(copy.layer, copy.slot).expert = copy.expert
            del self._under_way[copy.layer, copy.slot]

    def publish(self, layer: int, expert: int, slot: int) -> None:
        """Send steps to a slot for an expert, or back to RAM (-1)."""
        for other in self._slots[layer]:
            if other.is_published and other.expert == expert:
                other.is_published = False
        if slot < 0:
            self._tables[layer].addresses[:, expert] = self._homes[layer][:, expert]
            return
        record = self._record(layer, slot)
        if (layer, slot) in self._under_way:
            raise HazardError(f"layer {layer}: expert {expert} is published in slot {slot} before its copy is done")
        if record.expert != expert:
            raise HazardError(
                f"layer {layer}: expert {expert} is published in slot {slot}, which holds "
                f"{f'expert {record.expert}' if record.expert >= 0 else 'nothing'}"
            )
        record.is_published = True
        self._tables[layer].addresses[:, expert] = self._arena.address + np.array(self._offsets[layer][slot])

    def published(self) -> list[list[int]]:
        """Return the experts of each layer that steps read from slots."""
        return [[slot.expert for slot in slots if slot.is_published] for slots in self._slots]

    def lend(self, usable: Sequence[Sequence[bool]]) -> None:
        """Poison all slots but some of each layer: a step that begins now, or the context, uses their memory."""
        for layer, (slots, stays) in enumerate(zip(self._slots, usable, strict=True)):
            for slot, record in enumerate(slots):
                if stays[slot]:
                    continue
                if record.is_published:
                    raise HazardError(
                        f"layer {layer}: slot {slot} is lent while expert {record.expert} is published in it"
                    )
                if (layer, slot) in self._under_way:
                    raise HazardError(f"layer {layer}: slot {slot} is lent while an expert is copied into it")
                if record.expert >= 0:
                    self._empty(layer, slot)

    def note_lent(self, usable: Sequence[Sequence[bool]], until: float) -> None:
        """Note that a step uses the memory of all slots but some of each layer until then."""
        for slots, stays in zip(self._slots, usable, strict=True):
            for record in compress(slots, map(not_, stays)):
                record.read_until = until

    def note_readers(self, until: float) -> None:
        """Note that a step reads every published slot until then."""
        for slots in self._slots:
            for slot in slots:
                if slot.is_published:
                    slot.read_until = until

    def check_closed(self) -> None:
        """Raise `HazardError` if something is left behind."""
        if self._under_way:
            raise HazardError(f"the device is closed while {len(self._under_way)} copies are under way")

    def _empty(self, layer: int, slot: int) -> None:
        self._record(layer, slot).expert = -1
        for offset, size in zip(self._offsets[layer][slot], self._tables[layer].sizes, strict=True):
            self._arena.bytes[offset : offset + size] = POISON

    def _record(self, layer: int, slot: int) -> _Slot:
        if not 0 <= layer < len(self._slots) or not 0 <= slot < len(self._slots[layer]):
            raise HazardError(f"layer {layer} has no slot {slot}")
        return self._slots[layer][slot]


def check_ticket(event: Event, what: str) -> None:
    """Raise `DeviceError` for a copy that failed."""
    if event.failed:
        raise DeviceError(f"{what} was lost on its way (as the emulated device was told to do now and then)")
