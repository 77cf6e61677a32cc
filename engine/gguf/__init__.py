"""Model files: GGUF on disk, older forms of it, their weights in memory."""

from __future__ import annotations

import os

from engine.gguf.model_file import ModelFile, TensorInfo
from engine.gguf.older_forms import in_current_form
from engine.gguf.reader import GGUFFile
from engine.gguf.weights import WeightMemory
from engine.gguf.writer import write_gguf

__all__ = [
    "GGUFFile",
    "ModelFile",
    "TensorInfo",
    "WeightMemory",
    "open_gguf",
    "write_gguf",
]


def open_gguf(path: str | os.PathLike[str]) -> ModelFile:
    """Open a GGUF file.

    Raises `GGUFError` or `UnsupportedModelError` for a file that cannot be used.
    """
    file = GGUFFile.open(path)
    try:
        return in_current_form(file)
    except BaseException:
        file.close()
        raise
