"""Runs kernel launches on numpy arrays: in the kernel emulator, or on a GPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable

import numpy as np
import pytest
from cusim import Module

from engine.devices.cuda.driver import probe
from engine.devices.cuda.launch import PADDING, Count, Launch, Rows
from engine.devices.cuda.runtime import Context, DeviceMemory, Stream
from tests.cusim.build import KERNEL_SOURCES

SCHEDULES = (("forward", 1), ("reverse", 1), ("random", 7))


class Emulator:
    """Launches kernels in one build mode; keeps the arrays whose addresses it has handed out."""

    def __init__(self, mode: str = "fast") -> None:
        self.mode = mode
        self._arrays: dict[int, np.ndarray] = {}

    def at(self, array: np.ndarray) -> int:
        """The address of an array, which may be given to a launch."""
        self._arrays[array.ctypes.data] = array
        return array.ctypes.data

    def rows(self, array: np.ndarray) -> Rows:
        """A matrix of four-byte values."""
        return Rows(self.at(array), array.strides[0] // 4)

    def byte_rows(self, array: np.ndarray) -> Rows:
        """A matrix of bytes."""
        return Rows(self.at(array), array.strides[0])

    def count(self, n: int, most: int | None = None) -> Count:
        return Count(self.at(np.array([n], np.int32)), n + 1 if most is None else most)

    def run(self, launches: Launch | Iterable[Launch], order: str = "forward", seed: int = 1) -> None:
        for launch in [launches] if isinstance(launches, Launch) else launches:
            module = Module(KERNEL_SOURCES / launch.source, self.mode, defines=launch.definitions)
            arguments = [self._argument(a) for a in launch.arguments]
            shared = {"shared_bytes": launch.shared_bytes, "order": order, "seed": seed}
            if self.mode == "asan":  # runs in another process, which must know what structs point at
                shared["memory"] = list(self._arrays.values())
            module.launch(launch.kernel, launch.grid, launch.block, *arguments, **shared)

    def _argument(self, argument: object) -> object:
        if isinstance(argument, ctypes.Structure):
            return bytes(argument)
        value = argument.value  # type: ignore[attr-defined]
        if isinstance(argument, ctypes.c_void_p):
            return self._arrays.get(value, value or 0)
        return value


class RealGPU:
    """Takes the emulator's place on a GPU: every launch gets copies of all arrays, which are copied back after it."""

    def __init__(self, mode: str = "fast") -> None:
        if mode != "fast":
            pytest.skip("this mode is the emulator's")
        self.context = _gpu_context()
        self.stream = Stream(self.context)
        self._arrays: dict[int, tuple[np.ndarray, DeviceMemory]] = {}

    def at(self, array: np.ndarray) -> int:
        """The device address of an array's copy, which has some bytes around it."""
        key = array.ctypes.data
        if key not in self._arrays:
            self._arrays[key] = (array, DeviceMemory(array.nbytes + 512))
        return self._arrays[key][1].address + 256

    def rows(self, array: np.ndarray) -> Rows:
        return Rows(self.at(array), array.strides[0] // 4)

    def byte_rows(self, array: np.ndarray) -> Rows:
        return Rows(self.at(array), array.strides[0])

    def count(self, n: int, most: int | None = None) -> Count:
        return Count(self.at(np.array([n], np.int32)), n + 1 if most is None else most)

    def run(self, launches: Launch | Iterable[Launch], order: str = "forward", seed: int = 1) -> None:
        for array, memory in self._arrays.values():
            self.stream.upload(memory.address + 256, array.ctypes.data, array.nbytes)
        for launch in [launches] if isinstance(launches, Launch) else launches:
            self.stream.launch(launch)
        for array, memory in self._arrays.values():
            if array.flags.writeable:
                self.stream.download(array.ctypes.data, memory.address + 256, array.nbytes)
        self.stream.synchronize()


@functools.cache
def _gpu_context() -> Context:
    return Context(probe())


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 256 bytes and has the bytes around it that weight matrices need."""
    memory = np.full(array.nbytes + 512 + PADDING, 0xFF, np.uint8)
    start = -memory.ctypes.data % 256 + 256 * (-memory.ctypes.data % 256 < PADDING)
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays are equal bit by bit."""
    return a.shape == b.shape and bool((a.view(np.uint32) == b.view(np.uint32)).all())


def assert_near(found: np.ndarray, expected: np.ndarray, rel: float = 0.0, abs: float = 1e-12) -> None:
    """Each value is within the larger of its tolerances: `pytest.approx`, which looks at one after the other."""
    assert found.shape == expected.shape
    is_near = np.abs(found - expected) <= np.maximum(rel * np.abs(expected), abs)
    is_near |= found == expected  # infinities
    worst = [*zip(found[~is_near][:4], expected[~is_near][:4], strict=True)]
    assert is_near.all(), f"{(~is_near).sum()} of {is_near.size} values differ, the first (found, expected): {worst}"
