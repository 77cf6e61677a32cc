"""The metadata of a made-up model's file: its keys, and a tokenizer."""

from __future__ import annotations

from functools import cache

import numpy as np

from engine.data import tiny_model_path
from engine.gguf.metadata import Value
from engine.gguf.reader import GGUFFile
from engine.gguf.recipes import Recipe
from engine.synthetic.published import Key, PerLayer, Published


def metadata_values(title: str, published: Published, recipe: Recipe) -> dict[str, Value]:
    """Return all keys and values, as files have them."""
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
        array = np.array(value)
        is_small = array.dtype.kind == "i" and array.max() <= np.iinfo(np.int32).max
        return array.astype(np.int32) if is_small else array
    return float(np.float32(value)) if isinstance(value, float) else value


def smallest_vocab() -> int:
    """Return how many tokens a vocabulary has at least."""
    return len(_tiny_tokenizer()["tokenizer.ggml.tokens"])  # type: ignore[arg-type]


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
