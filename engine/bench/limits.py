"""What the memory can give: the limit that decode speed is held against."""

from __future__ import annotations

from statistics import median

import numpy as np

from engine import _kernels

_PASSES = 5


def read_bandwidth(n_threads: int, buffer_bytes: int) -> float:
    """Return how fast RAM is read now, in bytes a second: the median of some passes.

    It changes with whatever else the machine does. A model that fits in a cache can exceed it.
    """
    buffer = np.empty(buffer_bytes, np.uint8)
    return median(_kernels.read_bandwidth(buffer, n_threads, 1) for _ in range(_PASSES))
