"""Weights where they lie in RAM: pinned, if possible, so that the device reads them without the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.devices.cuda.driver import DriverCallError
from engine.devices.cuda.launch import PADDING
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.runtime import PinnedMemory, PinnedPages
from engine.devices.footprint import row_tables
from engine.devices.graph import Graph
from engine.devices.program import WeightAccess
from engine.machine import available_memory
from engine.resources import Resources

_log = logging.getLogger("engine")
_COPIED_SHARE = 0.25  # of free RAM, for tables that lie in pages of a file: these can be taken back, copies cannot


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


class PinnedTensors:
    """Tensors of the weights, each pinned as one piece with the bytes behind it that kernels read, or none of them.

    Attributes:
        addresses: that the device has for them, by name.
        reason: why they are not pinned; empty if they are.
    """

    def __init__(self, weights: WeightAccess, names: Iterable[str], most_copied: int = 0) -> None:
        """Pin what can be: memory of our own, not pages of a file, which pinning failed for or took minutes.

        Of pages of a file copies are made instead if these have `most_copied` bytes together at most.
        """
        self._held = Resources()
        self.addresses: dict[str, int] = {}
        self.reason = ""
        arrays = {name: weights.array(name) for name in names}
        if not weights.is_own_memory and sum(array.nbytes for array in arrays.values()) > most_copied:
            self.reason = 'the weights are mapped from the file ([model] load = "mmap")'
            return
        try:
            with Resources() as held:
                for name, array in arrays.items():
                    pages = held.own(_pinned(array) if weights.is_own_memory else _pinned_copy(array))
                    self.addresses[name] = pages.device_address
                self._held = held.pop_all()
        except DriverCallError as error:
            self.addresses.clear()
            self.reason = str(error)

    def close(self) -> None:
        """Unpin; the device must not be reading."""
        self.addresses.clear()
        self._held.close()


def _pinned(array: npt.NDArray[np.uint8]) -> PinnedPages:
    return PinnedPages(int(array.ctypes.data), array.nbytes + PADDING)


def _pinned_copy(array: npt.NDArray[np.uint8]) -> PinnedMemory:
    memory = PinnedMemory(array.nbytes + PADDING)
    memory.bytes[: array.nbytes] = array
    return memory


def pinned_tables(graph: Graph, weights: WeightAccess) -> PinnedTensors:
    """Pin the tables of which the device then reads rows where they lie; they take no memory from the experts."""
    names = [table.name for table in row_tables(graph)]
    most_copied = int(_COPIED_SHARE * (available_memory() or 0))
    tables, size = PinnedTensors(weights, names, most_copied), sum(weights.array(name).nbytes for name in names) / 1e6
    if names and tables.reason:
        _log.info("embeddings take %.3g MB of VRAM: %s", size, tables.reason)
    elif names:
        copied = "" if weights.is_own_memory else " of a copy"
        _log.info("embeddings are read from RAM, row by row%s: %.3g MB that take no VRAM", copied, size)
    return tables


def pinned_experts(lowering: Lowering, weights: WeightAccess) -> PinnedTensors:
    """Pin the experts that come to the device while it works."""
    layers = [layer for layer in lowering.experts.step_layers if not layer.is_resident]
    return PinnedTensors(weights, dict.fromkeys(weight.name for layer in layers for weight in layer.weights))


def how_experts_come(pinned: PinnedTensors) -> str:
    """Return one line about the way of experts to the device."""
    if not pinned.reason:
        return "experts are copied to the GPU straight from where they lie"
    return f"experts are copied to the GPU through pinned buffers: {pinned.reason}"
