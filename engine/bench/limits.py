"""What the memory can give: the limit that decode speed is held against."""

from __future__ import annotations

import numpy as np

from engine import _kernels

_PASSES = 5


def read_bandwidth(n_threads: int, buffer_bytes: int) -> float:
    """Return the best read bandwidth of the RAM in bytes a second; a model that fits in a cache can exceed it."""
    return _kernels.read_bandwidth(np.empty(buffer_bytes, np.uint8), n_threads, _PASSES)
