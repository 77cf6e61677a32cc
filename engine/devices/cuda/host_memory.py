"""The experts where they lie in RAM: pinned, if possible, so that the copy engine reads them without the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from engine.devices.cuda.driver import DriverCallError
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.runtime import PinnedPages, close_all
from engine.devices.program import WeightAccess


@dataclass(frozen=True, slots=True)
class ExpertPaths:
    """What those need who bring experts to the device.

    Attributes:
        lowering: what experts there are, and their places on the device.
        weights: where they come from.
        base: address of the device allocation.
        n_threads: fill buffers if any are needed.
        is_pinned: whether the copy engine can read the weights where they lie, and no buffers are needed.
    """

    lowering: Lowering
    weights: WeightAccess
    base: int
    n_threads: int
    is_pinned: bool


class PinnedExperts:
    """The expert tensors, each pinned as one piece, or none of them.

    Attributes:
        is_pinned: whether they are; a copy to the device then runs beside everything else.
        reason: why they are not.
    """

    def __init__(self, lowering: Lowering, weights: WeightAccess) -> None:
        """Pin what can be: memory of our own, not pages of a file, which pinning failed for or took minutes."""
        self._pages: list[PinnedPages] = []
        self.is_pinned = False
        if not weights.is_own_memory:
            self.reason = 'the weights are mapped from the file ([model] load = "mmap")'
            return
        layers = [layer for layer in lowering.experts.layers if not layer.is_resident]
        names = dict.fromkeys(weight.name for layer in layers for weight in layer.weights)
        try:
            for name in names:
                array = weights.array(name)
                self._pages.append(PinnedPages(int(array.ctypes.data), array.nbytes))
        except DriverCallError as error:
            self.close()
            self.reason = str(error)
        else:
            self.is_pinned, self.reason = True, ""

    def describe(self) -> str:
        """Return one line: how experts get to the device."""
        if self.is_pinned:
            return "experts are copied to the GPU straight from where they lie"
        return f"experts are copied to the GPU through pinned buffers: {self.reason}"

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        pages, self._pages = self._pages, []
        self.is_pinned = False
        close_all(pages)
