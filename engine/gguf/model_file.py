"""What the rest of the engine sees of a model file, be it on disk or made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.gguf.metadata import Metadata
from engine.quants.formats import QuantFormat


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor by name.

    Attributes:
        name: as in the file.
        format: how the weights are stored.
        shape: slowest dimension first: [n_rows, n_cols], or [n_experts, n_rows, n_cols].
        n_bytes: of all its rows together.
        offset: where it begins, in bytes from the start of its file.
        shard: which file of a split model holds it, from 0.
    """

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    n_bytes: int
    offset: int = 0
    shard: int = 0


class ModelFile(Protocol):
    """Metadata and tensors of one model."""

    @property
    def name(self) -> str:
        """Return the name for messages."""
        ...

    @property
    def metadata(self) -> Metadata:
        """Return the key-value metadata."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return all tensors by name, in file order."""
        ...

    def mapped(self, name: str) -> npt.NDArray[np.uint8] | None:
        """Return the bytes of a tensor where they lie, flat and read-only; None if there is no file to map."""
        ...

    def read(self, name: str, out: npt.NDArray[np.uint8], n_threads: int, progress: Callable[[int], None]) -> None:
        """Fill `out`, flat and as long as the tensor; call `progress` with the bytes of each part that is done."""
        ...

    def close(self) -> None:
        """Let go of the file. Arrays from `mapped` stay valid as long as somebody holds them."""
        ...
