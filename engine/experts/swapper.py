"""The swapper: the only one who moves expert bytes. It starts copies, watches them, and tells the device who is where.

A swap goes through three hands, at any pace the device likes: the victim is unpublished and its slot fenced off; when
the fence is passed, the copy is started; when the copy is done, the newcomer is published. A copy that fails costs
its slot's contents and nothing else: the expert is computed from RAM, as it was before.

Fences are passed and copies end in an order that is known (`SlotDevice`), so only the first of each is asked for: this
happens many times while a step runs, whose thread wants the interpreter, too.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.devices.slots import SlotDevice, Ticket
from engine.errors import DeviceError
from engine.experts.slots import SlotState, SlotTable
from engine.experts.swaps import Swaps

log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3  # after which no more copies are tried


@dataclass(slots=True)
class _Swap:
    """A swap under way: its slot, and what it waits for (the fence first, then the copy)."""

    layer: int
    expert: int
    slot: int
    ticket: Ticket


class Swapper:
    """Carries out swaps, at most `max_in_flight` at a time.

    Attributes:
        loads: int64 [n_layers], experts that reached their slot.
        n_bytes: their bytes.
        n_failures: copies that failed.
        stopped: why no more swaps are made, or None.
        is_held: no copy is begun for now, for somebody waits for the thread that would.
    """

    def __init__(self, device: SlotDevice, table: SlotTable, max_in_flight: int = 64) -> None:
        self._device, self._table, self._max_in_flight = device, table, max_in_flight
        self._fenced: deque[_Swap] = deque()
        self._copying: deque[_Swap] = deque()
        self._failures_in_a_row = 0
        self.loads = np.zeros(len(table.n_slots), np.int64)
        self.n_bytes = self.n_failures = 0
        self.stopped: str | None = None
        self.is_held = False

    @property
    def room(self) -> int:
        """Return how many more swaps may be submitted now."""
        return 0 if self.stopped else self._max_in_flight - self.n_under_way

    @property
    def n_under_way(self) -> int:
        """Return how many swaps were submitted and have not come to an end."""
        return len(self._fenced) + len(self._copying)

    def submit(self, swaps: Swaps) -> int:
        """Begin with swaps, in their order, as far as there is room; return how many.

        A swap whose victim is not ready (it is still on its way) is left out.
        """
        table, device = self._table, self._device
        begun: list[_Swap] = []
        for layer, expert, evict in zip(
            swaps.layers.tolist(), swaps.loads.tolist(), swaps.evicts.tolist(), strict=True
        ):
            if len(begun) >= self.room:
                break
            if evict >= 0:
                if not table.ready[layer, evict]:
                    continue
                device.publish(layer, evict, -1)
            begun.append(_Swap(layer, expert, table.reserve(layer, expert, evict), None))
        begun.sort(key=lambda swap: swap.layer)  # as a step passes them
        for swap in begun:
            swap.ticket = device.fence(swap.layer)  # after every publish above
        self._fenced += begun
        return len(begun)

    def poll(self, *, may_start: bool = True) -> None:
        """Take swaps as far as they go without waiting; if not `may_start`, only publish those that are there."""
        while may_start and self._fenced and not self.is_held and self._begin_copy(self._fenced[0]):
            self._fenced.popleft()
        while self._copying and self._publish(self._copying[0]):
            self._copying.popleft()

    def _begin_copy(self, swap: _Swap) -> bool:
        """Begin to copy, if no step reads the slot any more; return whether that is so."""
        device, table = self._device, self._table
        try:
            if not device.is_done(swap.ticket):
                return False
            if self.stopped:
                table.release(swap.layer, swap.slot)
                return True
            table.load(swap.layer, swap.slot)
            swap.ticket = device.copy_expert(swap.layer, swap.expert, swap.slot)
        except DeviceError as error:
            self._fail(swap, error)
        else:
            self._copying.append(swap)
        return True

    def _publish(self, swap: _Swap) -> bool:
        """Publish who has arrived; return whether the copy is over."""
        device, table = self._device, self._table
        try:
            if not device.is_done(swap.ticket):
                return False
        except DeviceError as error:
            self._fail(swap, error)
            return True
        table.make_ready(swap.layer, swap.slot)
        device.publish(swap.layer, swap.expert, swap.slot)
        self.loads[swap.layer] += 1
        self.n_bytes += int(table.expert_bytes[swap.layer])
        self._failures_in_a_row = 0
        return True

    def _fail(self, swap: _Swap, error: DeviceError) -> None:
        self._table.release(swap.layer, swap.slot)
        self.n_failures += 1
        self._failures_in_a_row += 1
        if self.n_failures == 1:
            log.warning("expert %d of layer %d could not be copied into its slot: %s", swap.expert, swap.layer, error)
        if self._failures_in_a_row >= FAILURES_IN_A_ROW and not self.stopped:
            self.stopped = f"{FAILURES_IN_A_ROW} copies in a row failed: {error}"
            log.warning("the expert cache swaps no more; %s", self.stopped)

    def lend_all_but(self, usable: npt.NDArray[np.bool_]) -> None:
        """Empty all slots but some, for steps that need the memory of the others, or take some of these back.

        Copies into slots that are lent now are waited for, or not begun. After an interrupt `recover` goes on with it.
        """
        table, device = self._table, self._device
        table.usable = usable
        if any(table.lent(swap.layer, swap.slot) for swap in self._copying):
            device.wait_all()
        for swaps in (self._fenced, self._copying):
            kept = [swap for swap in swaps if not table.lent(swap.layer, swap.slot)]
            swaps.clear()
            swaps.extend(kept)
        for layer, expert in np.argwhere(table.ready).tolist():
            if table.lent(layer, table.slot_of(layer, expert)):
                device.publish(layer, expert, -1)
        table.settle_lent()

    def drain(self) -> None:
        """Wait until no swap is under way."""
        while self._fenced or self._copying:
            self._device.wait_all()
            self.poll()

    def recover(self) -> None:
        """Bring table and device in line after an interrupt, at any point of any call; swaps under way are dropped."""
        self._device.wait_all()
        self._fenced.clear()
        self._copying.clear()
        self._table.rebuild()
        for layer in range(len(self._table.n_slots)):
            for expert in range(self._table.held.shape[1]):
                slot = self._table.slot_of(layer, expert)
                ready = slot >= 0 and self._table.slot(layer, slot).state is SlotState.READY
                self._device.publish(layer, expert, slot if ready else -1)
