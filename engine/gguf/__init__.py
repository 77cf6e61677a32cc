"""Model files: GGUF on disk, and made-up models of a published shape."""

from __future__ import annotations

import os

from engine.gguf.model_file import ModelFile, TensorInfo
from engine.gguf.older_forms import in_current_form
from engine.gguf.reader import GGUFFile
from engine.gguf.synthetic import PREFIX, SyntheticModel
from engine.gguf.weights import WeightMemory, available_memory
from engine.gguf.writer import write_gguf

__all__ = [
    "GGUFFile",
    "ModelFile",
    "SyntheticModel",
    "TensorInfo",
    "WeightMemory",
    "available_memory",
    "open_model_file",
    "write_gguf",
]


def open_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Open a GGUF file by its path, or make up a model by a name like `synthetic:qwen3.5-122b-a10b@q4_k_l`.

    Raises `GGUFError` or `UnsupportedModelError` for a file that cannot be used, `ConfigError` for a name that makes no
    sense.
    """
    if isinstance(path, str) and path.startswith(PREFIX):
        return SyntheticModel.open(path)
    file = GGUFFile.open(path)
    try:
        return in_current_form(file)
    except BaseException:
        file.close()
        raise
