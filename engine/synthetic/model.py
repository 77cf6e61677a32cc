"""Models that are made up from their keys, and the names that choose them."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.data import tiny_model_path
from engine.errors import ConfigError
from engine.gguf.metadata import Metadata, Value
from engine.gguf.reader import GGUFFile
from engine.gguf.recipes import RECIPES, Recipe
from engine.synthetic import contents
from engine.synthetic.published import PUBLISHED, Key, PerLayer, Published
from engine.synthetic.recorder import record_tensors

PREFIX = "synthetic:"
DEFAULT_RECIPE = "q4_k_m"

_FORM = "synthetic:<model>[@<quantisation>][:<option>=<number>,...]"
# Options, and the keys that they replace; `vocab` is in no key.
_OPTIONS = {
    "layers": "block_count",
    "experts": "expert_count",
    "used": "expert_used_count",
    "vocab": "",
    "context": "context_length",
}


class SyntheticModel:
    """A `ModelFile` that makes its weights when they are read: the same bytes for the same name, options and seed."""

    def __init__(
        self, name: str, published: Published, recipe: Recipe, seed: int, *, has_router_biases: bool = False
    ) -> None:
        if has_router_biases:
            published = replace(published, tensors=(*published.tensors, "exp_probs_b.bias"))
        self.name = name
        self.seed = seed
        self.metadata = Metadata(name, _metadata_values(name.removeprefix(PREFIX), published, recipe))
        self.tensors = record_tensors(name, published, self.metadata, recipe)

    @classmethod
    def open(cls, name: str, *, has_router_biases: bool = False) -> SyntheticModel:
        """Make a model from a name like `synthetic:qwen3.5-35b-a3b@q4_k_m:layers=8,seed=1`.

        Options: `layers`, `experts`, `used` (experts of a token), `vocab`, `context` and `seed`.

        Raises `ConfigError` for a name that does not say this.
        """
        model_name, recipe_name, options = _parse(name)
        published = _look_up(name, "model", model_name, PUBLISHED)
        recipe = _look_up(name, "quantisation", recipe_name, RECIPES)
        seed = options.pop("seed", 0)
        published = _changed(name, published, options)
        return cls(name, published, recipe, seed, has_router_biases=has_router_biases)

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
        architecture = self.metadata.text("general.architecture")
        contents.fill(
            info,
            out,
            seed,
            self.metadata.integer(f"{architecture}.expert_count"),
            bounds_decays=f"{architecture}.kda.gate_lower_bound" in self.metadata,
            n_threads=n_threads,
        )
        progress(info.n_bytes)

    def close(self) -> None:
        """Do nothing: no file is open."""


# -- metadata --------------------------------------------------------------------------------------------------------


def _metadata_values(title: str, published: Published, recipe: Recipe) -> dict[str, Value]:
    n_layers = published.size("block_count")
    return {
        "general.architecture": published.architecture,
        "general.type": "model",
        "general.name": title,
        "general.file_type": recipe.file_type,
        "general.quantization_version": 2,
        **{f"{published.architecture}.{key}": _stored(value, n_layers) for key, value in published.keys.items()},
        **_tokenizer_values(published.n_vocab),
    }


def _stored(value: Key, n_layers: int) -> Value:
    """Return a value as files have it: floats of 32 bits, and arrays."""
    if isinstance(value, PerLayer):
        value = tuple(value[layer] for layer in range(n_layers))
    if isinstance(value, tuple):
        return np.array(value, np.bool_ if isinstance(value[0], bool) else np.int32)
    return float(np.float32(value)) if isinstance(value, float) else value


@cache
def _tiny_tokenizer() -> dict[str, Value]:
    """Return the tokenizer keys of the bundled model."""
    with GGUFFile.open(tiny_model_path()) as file:
        values = {key: file.metadata.value(key) for key in file.metadata if key.startswith("tokenizer.")}
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            values[key] = file.metadata.texts(key)
        return values


def _tokenizer_values(n_vocab: int) -> dict[str, Value]:
    """Return a small tokenizer that works, its vocabulary filled up with entries that no text has."""
    values = dict(_tiny_tokenizer())
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    unused = 5
    padding = range(len(tokens), n_vocab)
    values["tokenizer.ggml.tokens"] = tokens + [f"[PAD{i}]" for i in padding]
    values["tokenizer.ggml.token_type"] = np.concatenate([types, np.full(len(padding), unused, np.int32)])
    return values


# -- names -----------------------------------------------------------------------------------------------------------


def _parse(name: str) -> tuple[str, str, dict[str, int]]:
    head, _, tail = name.removeprefix(PREFIX).partition(":")
    model_name, _, recipe_name = head.partition("@")
    options: dict[str, int] = {}
    for item in filter(None, tail.split(",")):
        key, _, number = (part.strip() for part in item.partition("="))
        if key not in {*_OPTIONS, "seed"}:
            raise ConfigError(f"{name}: unknown option {key!r}; expected {', '.join([*_OPTIONS, 'seed'])} ({_FORM})")
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            raise ConfigError(f"{name}: option {key} is {number!r}; expected a number below a billion")
        if key in options:
            raise ConfigError(f"{name}: option {key} is given twice")
        options[key] = int(number)
    return model_name.strip(), recipe_name.strip() or DEFAULT_RECIPE, options


_T = TypeVar("_T")


def _look_up(name: str, what: str, wanted: str, table: dict[str, _T]) -> _T:
    if wanted.lower() in table:
        return table[wanted.lower()]
    close = difflib.get_close_matches(wanted.lower(), table, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{name}: there is no {what} {wanted!r}, only {', '.join(table)}{hint}")


def _changed(name: str, published: Published, options: dict[str, int]) -> Published:
    """Return a model with options in the place of what was published; raises `ConfigError` where they do not fit."""
    n_vocab = options.pop("vocab", published.n_vocab)
    changed = {_OPTIONS[option]: value for option, value in options.items()}
    published = replace(published, n_vocab=n_vocab, keys={**published.keys, **changed})
    smallest_vocab = len(_tokenizer_values(0)["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    for option, low, high in (
        ("layers", 1, 1000),
        ("experts", 1, 4096),
        ("used", 1, published.size("expert_count")),
        ("vocab", smallest_vocab, 1_000_000),
        ("context", 1, 10_000_000),
    ):
        value = n_vocab if option == "vocab" else published.size(_OPTIONS[option])
        if not low <= value <= high:
            raise ConfigError(f"{name}: {option} is {value}; expected {low} to {high}")
    return published
