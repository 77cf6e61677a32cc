"""Launches kernels of .cu files on numpy arrays, in any build and order."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
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
from .asan_worker import Address, Image, Request

Dim = int | tuple[int, ...]


class SanitizerError(KernelError):
    """AddressSanitizer or UBSan stopped a kernel; the message is the report."""


class Pointers:
    """A table of device pointers as a kernel argument: the addresses of arrays, 0 for None."""

    def __init__(self, arrays: Sequence[np.ndarray | None]) -> None:
        self.arrays = [a for a in arrays if a is not None]
        self.table = np.array([0 if a is None else a.ctypes.data for a in arrays], np.int64)


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
        self.path = build.kernel_library(Path(source), mode, defines=defines, expressions=expressions, include=include)
        self._library = Library(str(self.path)) if mode != "asan" else None

    def launch(
        self,
        name: str,
        grid: Dim,
        block: Dim,
        *args: object,
        shared_bytes: int = 0,
        memory: Sequence[np.ndarray] = (),
        order: str = "forward",
        seed: int = 1,
    ) -> None:
        """Run a kernel to its end; arrays change in place.

        Args:
            name: Kernel, or template expression as given to the module.
            grid: Blocks, up to three sides.
            block: Threads of a block, up to three sides.
            args: C-contiguous arrays and `Pointers` for pointers, None for a null pointer; numbers, ctypes values and
                structs, bytes for a struct.
            shared_bytes: Dynamic shared memory.
            memory: Arrays that the kernel reaches by their address only: in an integer argument, a struct, or an array
                of 64-bit integers. The asan build, which copies arrays to another process, needs to know them.
            order: forward, reverse or random: in which threads and blocks run.
            seed: Of the random order.

        Raises:
            KernelError: The kernel or the launch broke a rule.
            SanitizerError: In asan mode, the kernel broke a rule of memory or arithmetic.
        """
        dims = _three(grid), _three(block)
        values = [_plain(arg) for arg in args]
        for array in (v for v in values if isinstance(v, np.ndarray)):
            if not array.flags.c_contiguous:
                raise KernelError(f"{name}: an array of shape {array.shape} is not C-contiguous")
        if self._library is None:
            reachable = [*memory, *(a for arg in args if isinstance(arg, Pointers) for a in arg.arrays)]
            _worker().launch(str(self.path), name, dims, values, shared_bytes, reachable, order, seed)
            return
        self._library.configure(order, seed)
        try:
            addresses = [v.ctypes.data if isinstance(v, np.ndarray) else v for v in values]
            self._library.launch(name, *dims, addresses, shared_bytes)
        except KernelError as e:
            raise KernelError(build.name_places(str(e))) from None


def run_every_way(
    source: Path | str,
    name: str,
    grid: Dim,
    block: Dim,
    *args: object,
    shared_bytes: int = 0,
    memory: Sequence[np.ndarray] = (),
    modes: Sequence[str] = build.MODES,
    seeds: Sequence[int] = (1, 2, 3),
    **options,
) -> None:
    """Run a kernel in all builds and orders; arrays hold the result, and every way must have given the same bits.

    Takes what `Module` and `Module.launch` take. Arrays that are not writeable are taken for inputs.
    """
    arrays = [a for arg in args for a in ([arg] if isinstance(arg, np.ndarray) else getattr(arg, "arrays", []))]
    written = [a for a in (*arrays, *memory) if a.flags.writeable]
    before = [a.copy() for a in written]
    expected: list[np.ndarray] | None = None
    ways = [("fast", order, 1) for order in ("forward", "reverse")] + [("fast", "random", seed) for seed in seeds]
    ways += [(mode, "forward", 1) for mode in modes if mode != "fast"]
    for mode, order, seed in ways:
        for array, content in zip(written, before, strict=True):
            array[...] = content
        module = Module(source, mode, **options)
        module.launch(name, grid, block, *args, shared_bytes=shared_bytes, memory=memory, order=order, seed=seed)
        if expected is None:
            expected = [a.copy() for a in written]
        for array, content in zip(written, expected, strict=True):
            if array.tobytes() != content.tobytes():
                raise AssertionError(f"{name} gave other bits in the {mode} build, order {order}, seed {seed}")


def _three(sides: Dim) -> tuple[int, int, int]:
    padded = (*((sides,) if isinstance(sides, int) else sides), 1, 1)[:3]
    return int(padded[0]), int(padded[1]), int(padded[2])


def _plain(arg: object) -> object:
    """Return an argument as an array, a Python number or the bytes of a struct."""
    match arg:
        case None:
            return 0
        case Pointers():
            return arg.table
        case np.generic():
            return arg.item()
        case ctypes.Structure():
            return bytes(arg)
        case ctypes._SimpleCData():
            return arg.value or 0  # a null c_void_p is None
        case _:
            return arg


class _Memory:
    """The arrays of one request, and where an address lies in them."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        spans = {(a.ctypes.data, a.nbytes): a for a in arrays}
        self.arrays = [spans[key] for key in sorted(spans)]
        self._starts = np.array([start for start, _ in sorted(spans)], np.uint64)
        self._ends = np.array([start + n for start, n in sorted(spans)], np.uint64)
        if (self._starts[1:] < self._ends[:-1]).any():
            raise KernelError("arguments that overlap without being the same array cannot run in the asan build")

    def find(self, addresses: np.ndarray) -> dict[int, Address]:
        """Return those of the addresses that lie in an array, by their index."""
        owner = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = np.flatnonzero((owner >= 0) & (addresses < self._ends[owner])) if len(self._starts) else []
        return {int(i): Address(int(owner[i]), int(addresses[i] - self._starts[owner[i]])) for i in inside}

    def image(self, data: bytes, *, may_hold_addresses: bool = True) -> Image:
        words = np.frombuffer(data, np.uint64, len(data) // 8 if may_hold_addresses else 0)
        return Image(data, {8 * i: address for i, address in self.find(words).items()})

    def value(self, value: object) -> object:
        match value:
            case np.ndarray():
                return Address(self.find(np.array([value.ctypes.data], np.uint64))[0].buffer, 0) if value.size else 0
            case bytes():
                return self.image(value)
            case int() if value > 0:
                return self.find(np.array([value], np.uint64)).get(0, value)
            case _:
                return value


class _Worker:
    """Owns the sanitizer's process."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        environment = os.environ | {
            "PYTHONPATH": str(build.HERE.parent),
            "LD_PRELOAD": build.asan_library(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has to the end
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from cusim.asan_worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )

    def close(self) -> str:
        """End the process; return what it wrote to standard error."""
        with contextlib.suppress(BrokenPipeError):  # a request that it never read
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._stderr.seek(0)
        with self._stderr:
            return self._stderr.read().decode(errors="replace")

    def launch(
        self,
        library: str,
        name: str,
        dims: tuple,
        values: Sequence[object],
        shared_bytes: int,
        reachable: Sequence[np.ndarray],
        order: str,
        seed: int,
    ) -> None:
        memory = _Memory([a for a in (*values, *reachable) if isinstance(a, np.ndarray) and a.size])
        images = [memory.image(a.tobytes(), may_hold_addresses=a.dtype.itemsize == 8) for a in memory.arrays]
        written = {i for i, a in enumerate(memory.arrays) if a.flags.writeable}
        plain = [memory.value(v) for v in values]
        request = Request(library, name, *dims, plain, shared_bytes, order, seed, images, written)
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            error, results = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            _workers.clear()
            raise SanitizerError(f"{name}:\n{self.close()}") from None
        for i, data in results.items():
            memory.arrays[i].reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)
        if error:
            raise KernelError(error)


_workers: list[_Worker] = []  # one at most: a process is started when needed, and again after a violation


def _worker() -> _Worker:
    if not _workers:
        _workers.append(_Worker())
    return _workers[0]


@atexit.register
def _close_worker() -> None:
    for worker in _workers:
        worker.close()
