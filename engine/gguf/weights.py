"""The weights of a model in RAM: mapped from the file, or in memory of our own."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.errors import DeviceError
from engine.gguf.model_file import ModelFile
from engine.machine import available_memory

Mode = Literal["mmap", "memory"]
Progress = Callable[[int, int], None]

# Tensors begin at pages: a part of one can then be pinned for a GPU, or given back, without touching its neighbours.
_ALIGNMENT = 4096
_SPARE_BYTES = 16  # behind each of them in its last page, for kernels read whole words
_HUGE_PAGE = 2 << 20


class WeightMemory:
    """Holds the bytes of some tensors. Implements `devices.program.WeightAccess`."""

    def __init__(self, arrays: dict[str, npt.NDArray[np.uint8]], mode: Mode) -> None:
        """Take over arrays that `load` has filled."""
        self._arrays = arrays
        self.mode = mode

    @classmethod
    def load(
        cls,
        model_file: ModelFile,
        tensor_names: Iterable[str],
        mode: Mode,
        *,
        n_threads: int = 0,
        progress: Progress | None = None,
    ) -> WeightMemory:
        """Bring tensors into RAM.

        Args:
            model_file: where they come from; it may be closed afterwards.
            tensor_names: which ones.
            mode: "mmap" maps the file: nothing is read now, the system reads pages when they are first used, and may
                drop them again; the file must stay as it is meanwhile. "memory" reads everything into anonymous memory
                in huge pages: slower to start, then steady. What is not in the file as it is (made-up models, files of
                an older form) is always made in memory.
            n_threads: that read or make weights; 0 for one for each CPU, at most 16.
            progress: called with (bytes done, bytes in all) now and then.

        Raises:
            DeviceError: if there is not enough free RAM.
            GGUFError: if the disk fails.
        """
        infos = [model_file.tensors[name] for name in dict.fromkeys(tensor_names)]
        total = sum(info.n_bytes for info in infos)
        arrays: dict[str, npt.NDArray[np.uint8]] = {}
        done = 0

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if progress is not None:
                progress(done, total)

        if mode == "mmap":
            for info in infos:
                view = model_file.mapped(info.name)
                if view is not None:
                    arrays[info.name] = view
            infos = [info for info in infos if info.name not in arrays]
        mode = "mmap" if arrays else "memory"
        if arrays:
            advance(sum(array.nbytes for array in arrays.values()))

        offsets, needed = [], 0
        for info in infos:
            offsets.append(needed)
            needed += -(-(info.n_bytes + _SPARE_BYTES) // _ALIGNMENT) * _ALIGNMENT
        memory = _allocate(model_file.name, needed)
        n_threads = n_threads or min(os.cpu_count() or 1, 16)
        for info, offset in zip(infos, offsets, strict=True):
            array = memory[offset : offset + info.n_bytes]
            model_file.read(info.name, array, n_threads, advance)
            array.flags.writeable = False
            arrays[info.name] = array
        return cls(arrays, mode)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all tensors held."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def is_own_memory(self) -> bool:
        """Return whether each tensor has own pages of anonymous memory, 16 bytes behind it included, not of a file."""
        return self.mode == "memory"

    def array(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, flat and read-only, valid until this is closed."""
        return self._arrays[name]

    def close(self) -> None:
        """Let go of the memory; it is freed when no array of it is held any more."""
        self._arrays = {}

    def __enter__(self) -> WeightMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _allocate(name: str, n_bytes: int) -> npt.NDArray[np.uint8]:
    """Return anonymous memory that begins at a page, in huge pages where the system has them."""
    available = available_memory()
    if available is not None and n_bytes > available:
        raise DeviceError(
            f"{name}: the weights need {n_bytes / 1e9:.1f} GB of RAM, and {available / 1e9:.1f} GB are free; close "
            'other programs, choose a smaller quantisation, or let the system page the file (load = "mmap")'
        )
    try:
        memory = mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DeviceError(
            f"{name}: the system gave no memory for {n_bytes / 1e9:.1f} GB of weights: {error.strerror}"
        ) from None
    if n_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # kernels built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, n_bytes)
