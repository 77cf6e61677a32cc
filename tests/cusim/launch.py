"""Launches kernels of .cu files on numpy arrays, in any build and order."""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import build
from .abi import KernelError, Library

Dim = int | tuple[int, ...]


class SanitizerError(KernelError):
    """AddressSanitizer or UBSan stopped a kernel; the message is the report."""


class Pointers:
    """A table of device pointers as a kernel argument: the addresses of arrays, 0 for None."""

    def __init__(self, arrays: Sequence[np.ndarray | None]) -> None:
        self.arrays = list(arrays)


class Module:
    """The kernels of one .cu file, built for one mode: fast, race or asan.

    Race builds fail a launch that touched shared memory without a barrier between; asan builds run in a process of
    their own and fail on out-of-bounds access, misaligned vector loads and undefined arithmetic.
    """

    def __init__(
        self,
        source: Path | str,
        mode: str = "fast",
        *,
        defines: Sequence[str] = (),
        expressions: Sequence[str] = (),
        include: Sequence[Path] = (),
    ) -> None:
        self.mode = mode
        path = build.kernel_library(
            Path(source), mode, defines=defines, expressions=expressions, include=include
        )
        self.path = path
        self._library = Library(str(path)) if mode != "asan" else None

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels, template instances by their expressions."""
        if self._library is None:
            raise ValueError("an asan module is loaded in its worker only")
        return list(self._library.kernels)

    def launch(
        self,
        name: str,
        grid: Dim,
        block: Dim,
        *args: object,
        shared_bytes: int = 0,
        order: str = "forward",
        seed: int = 1,
    ) -> None:
        """Run a kernel to its end; arrays change in place.

        Args:
            name: Kernel, or template expression as given to the module.
            grid: Blocks, up to three sides.
            block: Threads of a block, up to three sides.
            args: C-contiguous arrays and `Pointers` for pointers, None for a null pointer, numbers, bytes for structs.
            shared_bytes: Dynamic shared memory.
            order: forward, reverse or random: in which threads and blocks run.
            seed: Of the random order.

        Raises:
            KernelError: The kernel or the launch broke a rule.
            SanitizerError: In asan mode, the kernel broke a rule of memory or arithmetic.
        """
        dims = [_three(side) for side in (grid, block)]
        if self._library is None:
            _worker().launch(str(self.path), name, dims, args, shared_bytes, order, seed)
            return
        keep: list[np.ndarray] = []
        values = [_value(arg, keep) for arg in args]
        self._library.configure(order, seed)
        try:
            self._library.launch(name, *dims, values, shared_bytes)
        except KernelError as e:
            raise KernelError(build.name_places(str(e))) from None


def _three(sides: Dim) -> tuple[int, int, int]:
    padded = (*((sides,) if isinstance(sides, int) else sides), 1, 1)[:3]
    return int(padded[0]), int(padded[1]), int(padded[2])


def _plain(arg: object) -> object:
    """Return numpy scalars as Python numbers, None as the null address, everything else as it is."""
    if arg is None:
        return 0
    return arg.item() if isinstance(arg, np.generic) else arg


def _check_array(array: np.ndarray) -> None:
    if not array.flags.c_contiguous:
        raise KernelError(f"an array of shape {array.shape} is not C-contiguous")


def _value(arg: object, keep: list[np.ndarray]) -> object:
    match arg:
        case np.ndarray():
            _check_array(arg)
            return arg.ctypes.data
        case Pointers():
            table = np.array([0 if a is None else _value(a, keep) for a in arg.arrays], np.int64)
            keep.append(table)
            return table.ctypes.data
        case _:
            return _plain(arg)


class _Worker:
    """Owns the sanitizer's process."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()
        environment = os.environ | {
            "LD_PRELOAD": build.asan_library(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(build.HERE / "asan_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def launch(
        self, library: str, name: str, dims: Sequence[tuple], args: Sequence[object], shared_bytes: int, order: str, seed: int
    ) -> None:
        arrays: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # by address and size: one buffer each

        def buffer(array: np.ndarray) -> tuple:
            _check_array(array)
            index, _ = arrays.setdefault((array.ctypes.data, array.nbytes), (len(arrays), array))
            return "buffer", index, 0

        tables, values = [], []
        for arg in args:
            match arg:
                case np.ndarray():
                    values.append(buffer(arg))
                case Pointers():
                    values.append(("table", len(tables)))
                    tables.append([0 if a is None else buffer(a) for a in arg.arrays])
                case _:
                    values.append(_plain(arg))
        in_order = [array for _, array in sorted(arrays.values(), key=lambda pair: pair[0])]
        _check_no_overlap(in_order)
        request = {
            "library": library,
            "name": name,
            "grid": dims[0],
            "block": dims[1],
            "buffers": [array.tobytes() for array in in_order],
            "written": {i for i, array in enumerate(in_order) if array.flags.writeable},
            "tables": tables,
            "values": values,
            "shared_bytes": shared_bytes,
            "order": order,
            "seed": seed,
        }
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            error, results = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise SanitizerError(f"{name}:\n{self._report()}") from None
        for array, data in zip(in_order, results, strict=True):
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
        if error:
            raise KernelError(error)

    def _report(self) -> str:
        global _current  # noqa: PLW0603
        _current = None
        self._process.wait()
        self._stderr.seek(0)
        report = self._stderr.read().decode(errors="replace")
        self._process.stdin = None
        self._process.stdout.close()
        self._stderr.close()
        return report


def _check_no_overlap(arrays: Sequence[np.ndarray]) -> None:
    spans = sorted((a.ctypes.data, a.nbytes) for a in arrays if a.nbytes)
    for (start, n_bytes), (following, _) in zip(spans, spans[1:], strict=False):
        if start + n_bytes > following:
            raise KernelError("arguments that overlap without being the same array cannot run in the asan build")


_current: _Worker | None = None


def _worker() -> _Worker:
    global _current  # noqa: PLW0603
    if _current is None:
        _current = _Worker()
    return _current


@atexit.register
def _close_worker() -> None:
    if _current is not None:
        _current.close()
