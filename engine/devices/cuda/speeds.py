"""Measures the speeds that decide which swaps pay: reading RAM, copying to the GPU, reading its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from engine import _kernels
from engine.devices.cuda.runtime import DeviceMemory, PinnedMemory, Stream
from engine.devices.timing import Bandwidths
from engine.resources import Resources

_COPY_BYTES = 64 << 20  # more than a GPU's second-level cache
_IN_A_ROW = 8  # copies within the device, so that their launches do not count
_RAM_BYTES = 256 << 20
_REPEATS, _RAM_REPEATS = 3, 9


def measure_speeds(stream: Stream, n_threads: int) -> Bandwidths:
    """Return the best of a few measurements, in bytes a second; of RAM, which is never ours alone, their median.

    Takes a fraction of a second.
    """
    with Resources() as held:
        pinned, device = held.own(PinnedMemory(_COPY_BYTES)), held.own(DeviceMemory(2 * _COPY_BYTES))

        def copy_within() -> None:
            for _ in range(_IN_A_ROW):
                stream.copy(device.address + _COPY_BYTES, device.address, _COPY_BYTES)

        upload = _fastest(stream, lambda: stream.upload(device.address, pinned.address, _COPY_BYTES))
        within = _fastest(stream, copy_within)
    buffer = np.empty(_RAM_BYTES, np.uint8)
    ram = median(_kernels.read_bandwidth(buffer, n_threads, 1) for _ in range(_RAM_REPEATS))
    return Bandwidths(ram, _COPY_BYTES / upload, _IN_A_ROW * 2 * _COPY_BYTES / within)


def _fastest(stream: Stream, work: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        stream.synchronize()
        start = time.perf_counter()
        work()
        stream.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
