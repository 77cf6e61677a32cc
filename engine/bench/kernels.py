"""Times the product of every weight format at every instruction-set level, against the memory's bandwidth.

One product is the gate projection of eight experts, 1024 x 3072 each, for one token: what a layer of a 122B model
reads. The matrices are walked through in turn, so that none is in a cache when its turn comes again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.machine import last_level_cache_bytes
from engine.quants import install_grids
from engine.quants.formats import FORMATS, QuantFormat

N_ROWS, N_COLS = 8 * 1024, 3072
_SECONDS, _MIN_CALLS = 0.25, 3


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """One format at one level: bytes of weights a second; `is_fast` if there is vector code of its own for it."""

    format: str
    isa: str
    bytes_s: float
    is_fast: bool


def measure_kernels(n_threads: int, progress: Callable[[str, int, int], None]) -> list[KernelSpeed]:
    """Time all formats at all levels of this CPU."""
    install_grids()
    levels = _kernels.isa_levels()
    found: list[KernelSpeed] = []
    total = len(FORMATS) * len(levels)
    for fmt in FORMATS:
        matrices = _matrices(fmt, n_threads)
        for isa in levels:
            progress(f"{fmt.name} {isa}", len(found), total)
            speed = _time(fmt, matrices, n_threads, isa)
            found.append(KernelSpeed(fmt.name, isa, speed, fmt.ggml_type in _kernels.fast_formats(isa)))
    progress("kernels", total, total)
    return found


def _matrices(fmt: QuantFormat, n_threads: int) -> list[npt.NDArray[np.uint8]]:
    """Return matrices of random blocks, more than the caches hold."""
    row_bytes = fmt.row_bytes(N_COLS)
    n = max(2, -(-2 * last_level_cache_bytes() // (N_ROWS * row_bytes)))
    matrices = [np.empty((N_ROWS, row_bytes), np.uint8) for _ in range(n)]
    for i, matrix in enumerate(matrices):
        _kernels.fill_random_blocks(fmt.ggml_type, matrix, N_COLS, i, n_threads)
    return matrices


def _time(fmt: QuantFormat, matrices: list[npt.NDArray[np.uint8]], n_threads: int, isa: str) -> float:
    """Return the bytes a second of the median call."""
    x = np.random.Generator(np.random.PCG64(1)).standard_normal((1, N_COLS), np.float32)
    seconds: list[float] = []
    _kernels.matmul(fmt.ggml_type, matrices[-1], x, n_threads, isa)
    while len(seconds) < _MIN_CALLS or sum(seconds) < _SECONDS:
        matrix = matrices[len(seconds) % len(matrices)]
        start = time.perf_counter()
        _kernels.matmul(fmt.ggml_type, matrix, x, n_threads, isa)
        seconds.append(time.perf_counter() - start)
    return float(matrices[0].nbytes / np.median(seconds))
