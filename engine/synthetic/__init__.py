"""Made-up models: published ones by name, with random weights that are made straight in memory.

A model of 75 GB is there in half a minute, without a download, to see how fast a machine would run the real one. The
text it writes is nonsense, and its routers have no favourites: a cache of hot experts must be measured with recorded
routing. For that the routers can be given a bias for the choice of experts, which is zero until somebody writes it.

A model is told by its GGUF keys and the optional tensors of its file (`published.py`). Which tensors those are in all,
and their shapes, is what its forward pass asks for (`recorder.py`).
"""

from __future__ import annotations

import os

from engine.errors import ConfigError
from engine.gguf import ModelFile, open_gguf
from engine.synthetic.model import SyntheticModel
from engine.synthetic.names import PREFIX
from engine.synthetic.published import PUBLISHED

__all__ = ["PREFIX", "PUBLISHED", "SyntheticModel", "open_model_file"]


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
    return open_gguf(path)
