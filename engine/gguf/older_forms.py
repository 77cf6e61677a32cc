"""Shows files of an older form as today's converters write them, so that models and devices know one form only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.errors import GGUFError
from engine.gguf.metadata import Metadata
from engine.gguf.model_file import ModelFile, TensorInfo
from engine.quants.formats import BY_NAME

_JOINED = re.compile(r"blk\.[0-9]{1,9}\.attn_kv_b\.weight")
_ARCHITECTURES = ("deepseek2", "kimi-linear")


def in_current_form(model_file: ModelFile) -> ModelFile:
    """Return the file itself, or a view of it if it is of an older form; closing the view closes the file.

    Raises `GGUFError` if it contradicts itself.
    """
    for architecture in _ARCHITECTURES:
        is_latent = f"{architecture}.attention.kv_lora_rank" in model_file.metadata
        if is_latent and any(_JOINED.fullmatch(name) for name in model_file.tensors):
            return KeysAndValuesApart(model_file, architecture)
    return model_file


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows `first` to `last` of each head's matrix in the tensor `joined`, transposed or as they are."""

    joined: TensorInfo
    first: int
    last: int
    is_transposed: bool


class KeysAndValuesApart:
    """A file of latent attention from before `attn_k_b` and `attn_v_b`: both are in one tensor, `attn_kv_b`.

    That tensor is [n_heads * (key_dim + value_dim), latent_dim]. Of each head the values' rows are taken as they are.
    The keys' rows must be transposed, which quantised blocks cannot be: those become float32, exactly.
    """

    def __init__(self, model_file: ModelFile, architecture: str) -> None:
        """Show the tensors of `model_file` in today's form. Raises `GGUFError` if its sizes contradict each other."""
        self._file = model_file
        self._architecture = architecture
        self.name = model_file.name
        keys = model_file.metadata
        values = {key: keys.value(key) for key in keys}
        for size in ("key_length", "value_length"):
            values.setdefault(f"{architecture}.attention.{size}_mla", keys.value(f"{architecture}.attention.{size}"))
        self.metadata = Metadata(self.name, values)
        self._head_dim = self._size("attention.key_length_mla")
        self._key_dim = self._head_dim - self._size("rope.dimension_count")
        self._value_dim = self._size("attention.value_length_mla")
        self._n_heads, self._latent_dim = self._size("attention.head_count"), self._size("attention.kv_lora_rank")
        self._parts: dict[str, _Part] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in model_file.tensors.items():
            if _JOINED.fullmatch(name):
                self._take_apart(info)
            elif name not in self._parts:  # some files hold both forms
                self.tensors[name] = info

    def _size(self, key: str) -> int:
        return self.metadata.integer(f"{self._architecture}.{key}")

    def _take_apart(self, info: TensorInfo) -> None:
        rows, n_heads = self._key_dim + self._value_dim, self._n_heads
        if self._key_dim < 1 or self._value_dim < 1 or info.shape != (n_heads * rows, self._latent_dim):
            raise GGUFError(
                f"{self.name}: tensor {info.name} has the shape {list(info.shape)}; by the file's metadata it must be "
                f"{[n_heads * rows, self._latent_dim]}: for each of {n_heads} heads {self._key_dim} rows of keys and "
                f"{self._value_dim} of values"
            )
        key_shape = (n_heads, self._latent_dim, self._key_dim)
        key = TensorInfo(
            info.name.replace("attn_kv_b", "attn_k_b"), BY_NAME["F32"], key_shape, 4 * math.prod(key_shape)
        )
        value_shape = (n_heads, self._value_dim, self._latent_dim)
        value_bytes = n_heads * self._value_dim * info.format.row_bytes(self._latent_dim)
        value = TensorInfo(info.name.replace("attn_kv_b", "attn_v_b"), info.format, value_shape, value_bytes)
        self._parts[key.name] = _Part(info, 0, self._key_dim, is_transposed=True)
        self._parts[value.name] = _Part(info, self._key_dim, rows, is_transposed=False)
        self.tensors |= {key.name: key, value.name: value}

    def mapped(self, name: str) -> npt.NDArray[np.uint8] | None:
        """Return the bytes of a tensor where they lie; None if it is not in the file as it is."""
        return None if name in self._parts else self._file.mapped(name)

    def read(self, name: str, out: npt.NDArray[np.uint8], n_threads: int, progress: Callable[[int], None]) -> None:
        """Fill `out`; see `ModelFile`."""
        part = self._parts.get(name)
        if part is None:
            self._file.read(name, out, n_threads, progress)
            return
        joined, n_cols = part.joined, self._latent_dim
        source = np.empty(joined.n_bytes, np.uint8)
        self._file.read(joined.name, source, n_threads, lambda _: None)
        rows = source.reshape(self._n_heads, -1, joined.format.row_bytes(n_cols))[:, part.first : part.last]
        if part.is_transposed:
            from engine import _kernels  # noqa: PLC0415

            values = _kernels.dequantize(joined.format.ggml_type, rows.reshape(-1, rows.shape[-1]), n_cols)
            rows = values.reshape(self._n_heads, -1, n_cols).transpose(0, 2, 1).copy().view(np.uint8)
        out[:] = rows.reshape(-1)
        progress(out.nbytes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
