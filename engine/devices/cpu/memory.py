"""Memory of the CPU device."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from engine.devices.intervals import ALIGNMENT, Interval, plan_offsets

__all__ = ["ALIGNMENT", "Arena", "Interval", "plan_offsets"]


class Arena:
    """Anonymous memory: zero at first, committed when touched, in huge pages where the system allows."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._map = mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if n_bytes >= 1 << 21 and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, n_bytes)
        self.address = int(self.bytes.ctypes.data)
