"""Weights of a made-up model that take no memory, where nobody looks at what is computed."""

from __future__ import annotations

import mmap

import numpy as np

from engine.synthetic import SyntheticModel

MAP_NORESERVE = 0x4000  # of Linux: a table may be larger than all memory


class ZeroWeights:
    """Every tensor as the same stretch of zeros."""

    def __init__(self, model_file: SyntheticModel) -> None:
        self.sizes = {name: info.n_bytes for name, info in model_file.tensors.items()}
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.zeros = np.frombuffer(mmap.mmap(-1, max(self.sizes.values()), flags), np.uint8)

    def array(self, name: str) -> np.ndarray:
        return self.zeros[: self.sizes[name]]
