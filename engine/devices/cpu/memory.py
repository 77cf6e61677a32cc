"""Memory of the CPU device."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

from engine.devices.intervals import ALIGNMENT, Interval, plan_offsets
from engine.errors import DeviceError

__all__ = ["ALIGNMENT", "Arena", "Interval", "plan_offsets"]


class Arena:
    """Anonymous memory: zero at first, committed when touched, in huge pages where the system allows.

    Raises `DeviceError` if the system gives none.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        try:
            self._map = mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DeviceError(
                f"the system gave no memory for {n_bytes / 1e9:.3g} GB of states, intermediate results or experts "
                f"({error.strerror}); close other programs, or lower [engine] context_length, n_sequences or "
                "max_batch_tokens"
            ) from None
        if n_bytes >= 1 << 21 and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # kernels built without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, n_bytes)
        self.address = int(self.bytes.ctypes.data)
