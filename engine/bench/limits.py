"""What the memory can give: the limit that decode speed is held against."""

from __future__ import annotations

import numpy as np

from engine import _kernels
from engine.machine import bandwidth_buffer_bytes

_PASSES = 5


def read_bandwidth(n_threads: int, buffer_bytes: int) -> float:
    """Return the best read bandwidth of the RAM in bytes a second.

    The buffer is made larger than the caches if it is not: a model that fits in a cache can exceed what comes out.
    """
    buffer = np.ones(bandwidth_buffer_bytes(buffer_bytes), np.uint8)  # written, so that it has pages of its own
    return _kernels.read_bandwidth(buffer, n_threads, _PASSES)
