"""A model that is made up from its keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.gguf.metadata import Metadata
from engine.gguf.recipes import Recipe
from engine.synthetic import contents
from engine.synthetic.metadata import metadata_values
from engine.synthetic.names import PREFIX, look_up
from engine.synthetic.published import Published
from engine.synthetic.recorder import record_tensors


class SyntheticModel:
    """A `ModelFile` that makes its weights when they are read: the same bytes for the same name, options and seed."""

    def __init__(
        self, name: str, published: Published, recipe: Recipe, seed: int, *, has_router_biases: bool = False
    ) -> None:
        if has_router_biases:
            published = replace(published, tensors=(*published.tensors, "exp_probs_b.bias"))
        self.name = name
        self.published = published
        self.seed = seed
        self.metadata = Metadata(name, metadata_values(name.removeprefix(PREFIX), published, recipe))
        self.tensors = record_tensors(name, published, self.metadata, recipe)

    @classmethod
    def open(cls, name: str, *, has_router_biases: bool = False) -> SyntheticModel:
        """Make a model from a name like `synthetic:qwen3.5-35b-a3b@q4_k_m:layers=8,seed=1`.

        Options: `layers`, `experts`, `used` (experts of a token), `vocab`, `context`, `heads` (for multi-token
        prediction, 0 or 1) and `seed`.

        Raises `ConfigError` for a name that does not say this.
        """
        return cls(name, *look_up(name), has_router_biases=has_router_biases)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(info.n_bytes for info in self.tensors.values())

    def mapped(self, name: str) -> None:
        """Return None: there is no file."""

    def read(self, name: str, out: npt.NDArray[np.uint8], n_threads: int, progress: Callable[[int], None]) -> None:
        """Make the weights of a tensor."""
        info = self.tensors[name]
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest(), "little")
        contents.fill(info, out, seed, self.published, n_threads)
        progress(info.n_bytes)

    def close(self) -> None:
        """Do nothing: no file is open."""
