"""Two areas that the experts without a slot pass through while a long step runs, one layer in each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.cpu.lowering import ExpertTables
from engine.devices.cpu.memory import ALIGNMENT, Arena
from engine.devices.emulated.clock import Event, VirtualClock
from engine.devices.emulated.slot_memory import POISON, HazardError
from engine.devices.timing import STAGED_LAYERS


@dataclass(slots=True)
class _Area:
    """A place for the experts of one layer.

    Attributes:
        arena: its memory.
        layer: whose experts are in it or on their way, -1 for none.
        experts: their numbers.
        event: they are there then.
        read_until: the last step that reads it is done then.
    """

    arena: Arena
    layer: int = -1
    experts: npt.NDArray[np.intp] | None = None
    event: Event | None = None
    read_until: float = 0.0


class StagingAreas:
    """The areas, and the pointer tables that send a step to them for one layer at a time.

    A real GPU needs room for some experts only, as its kernels take those that are there; the CPU's kernels, which do
    the arithmetic here, take all of a layer at once. Like a slot, an area is poisoned when its copies begin, and its
    bytes come when they are over on the clock.
    """

    def __init__(self, tables: list[ExpertTables], clock: VirtualClock) -> None:
        """Allocate the areas; entries of `tables` are changed while a layer is staged."""
        self._tables, self._clock = tables, clock
        self._strides = [[-(-size // ALIGNMENT) * ALIGNMENT for size in table.sizes] for table in tables]
        n_bytes = max(
            sum(strides) * table.addresses.shape[1] for strides, table in zip(self._strides, tables, strict=True)
        )
        self._areas = [_Area(Arena(n_bytes + ALIGNMENT)) for _ in range(STAGED_LAYERS)]
        self._homes: tuple[int, npt.NDArray[np.int64]] | None = None  # the layer that is staged, where it was before

    def begin_copy(self, layer: int, experts: npt.NDArray[np.intp], event: Event) -> None:
        """Poison a layer's area for experts that arrive with `event`."""
        area = self._areas[layer % STAGED_LAYERS]
        if self._homes is not None and self._homes[0] == area.layer:
            raise HazardError(f"the area of layer {area.layer} is overwritten while its experts are staged")
        if area.read_until > self._clock.now:
            raise HazardError(f"the area of layer {area.layer} is overwritten while a step reads it")
        area.layer, area.experts, area.event = layer, experts, event
        area.arena.bytes[:] = POISON

    def arrival(self, layer: int) -> float:
        """Return when a layer's experts are there, in seconds on the clock."""
        event = self._area(layer).event
        assert event is not None
        return event.at

    def stage(self, layer: int) -> None:
        """Send the step to a layer's area for the experts in it."""
        area, table = self._area(layer), self._tables[layer]
        assert area.experts is not None
        if self.arrival(layer) > self._clock.now:
            raise HazardError(f"the experts of layer {layer} are staged before their copies are done")
        addresses, to = table.addresses.copy(), area.arena.address
        for part, (stride, size) in enumerate(zip(self._strides[layer], table.sizes, strict=True)):
            for expert in area.experts.tolist():
                _kernels.parallel_copy(int(addresses[part, expert]), to, size, 1)
                addresses[part, expert] = to
                to += stride
        self._homes = layer, table.addresses.copy()
        table.addresses[:] = addresses

    def retire(self, layer: int, read_until: float) -> None:
        """Point a layer's experts back to where they were; its area is read until then."""
        self._area(layer).read_until = read_until
        self.settle()

    def settle(self) -> None:
        """Undo `stage` if that was not done, as after an interrupt."""
        if self._homes is not None:
            layer, addresses = self._homes
            self._tables[layer].addresses[:] = addresses
            self._homes = None

    def _area(self, layer: int) -> _Area:
        area = self._areas[layer % STAGED_LAYERS]
        if area.layer != layer:
            raise HazardError(f"layer {layer} looks for its experts in an area that holds those of layer {area.layer}")
        return area
