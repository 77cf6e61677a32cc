"""Model files: GGUF on disk, and made-up models of a published shape."""

from __future__ import annotations

import os

from engine.errors import ConfigError
from engine.gguf.model_file import ModelFile, TensorInfo
from engine.gguf.older_forms import in_current_form
from engine.gguf.reader import GGUFFile
from engine.gguf.synthetic import PREFIX, SyntheticModel
from engine.gguf.weights import WeightMemory
from engine.gguf.writer import write_gguf

__all__ = [
    "GGUFFile",
    "ModelFile",
    "SyntheticModel",
    "TensorInfo",
    "WeightMemory",
    "open_model_file",
    "write_gguf",
]


def open_model_file(path: str | os.PathLike[str], *, has_router_biases: bool = False) -> ModelFile:
    """Open a GGUF file by its path, or make up a model by a name like `synthetic:qwen3.5-122b-a10b@q4_k_l`.

    `has_router_biases` is for made-up models alone: it gives the routers a bias for the choice of experts, zero.

    Raises `GGUFError` or `UnsupportedModelError` for a file that cannot be used, `ConfigError` for a name that makes no
    sense.
    """
    if isinstance(path, str) and path.startswith(PREFIX):
        return SyntheticModel.open(path, has_router_biases=has_router_biases)
    if has_router_biases:
        raise ConfigError(
            f'{path}: routing can be played back to models of random weights ("synthetic:NAME") only; '
            'set moe.routing = "own"'
        )
    file = GGUFFile.open(path)
    try:
        return in_current_form(file)
    except BaseException:
        file.close()
        raise
