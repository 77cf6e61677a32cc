"""Writes GGUF files (version 3), so that a made-up model can also be measured with other programs."""

from __future__ import annotations

import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from engine.errors import GGUFError
from engine.files import check_target, whole_file
from engine.gguf.metadata import TextArray, Value
from engine.gguf.model_file import ModelFile, TensorInfo
from engine.gguf.reader import ARRAY, DEFAULT_ALIGNMENT, SCALARS, STRING
from engine.gguf.weights import Progress

VERSION = 3
_TYPE_OF_CODE = {code: number for number, code in SCALARS.items()}
_TYPE_OF_DTYPE = {np.dtype("<" + code): number for number, code in SCALARS.items()}


def write_gguf(
    model_file: ModelFile, path: str | os.PathLike[str], *, n_threads: int = 0, progress: Progress | None = None
) -> None:
    """Write a model to one file, which appears under its name only when it is whole.

    Args:
        model_file: what to write; several shards become one file.
        path: of the new file; a file there is replaced.
        n_threads: that read or make weights; 0 for one for each CPU.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        GGUFError: if the disk is full or cannot be written. Nothing is left behind then.
    """
    path = Path(path)
    values = {key: model_file.metadata.value(key) for key in model_file.metadata if not key.startswith("split.")}
    values["general.alignment"] = DEFAULT_ALIGNMENT
    head = encode_head(values, model_file.tensors.values())
    total = sum(info.n_bytes for info in model_file.tensors.values())
    n_threads = n_threads or os.cpu_count() or 1
    try:
        check_target(path)
        free = shutil.disk_usage(path.parent).free
        if len(head) + total > free:
            raise GGUFError(
                f"{path}: needs {(len(head) + total) / 1e6:,.0f} MB on disk, and {free / 1e6:,.0f} MB are free there; "
                "make room, or give another place"
            )
        with whole_file(path) as file:
            file.write(head)
            done = 0
            for info in model_file.tensors.values():
                data = model_file.mapped(info.name)
                if data is None:
                    data = np.empty(info.n_bytes, np.uint8)
                    model_file.read(info.name, data, n_threads, lambda _: None)
                file.write(data.data)
                file.write(bytes(-info.n_bytes % DEFAULT_ALIGNMENT))
                done += info.n_bytes
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise GGUFError(f"{path}: cannot be written: {error.strerror or error}") from None


def encode_head(values: Mapping[str, Value], tensors: Iterable[TensorInfo]) -> bytes:
    """Return everything that comes before the tensors, which follow in this order, each padded to the alignment."""
    tensors = list(tensors)
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += (_encode_text(key), encode_value(value))
    offset = 0
    for info in tensors:
        parts.append(_encode_text(info.name))
        n_dimensions = len(info.shape)
        parts.append(
            struct.pack(f"<I{n_dimensions}QIQ", n_dimensions, *reversed(info.shape), info.format.ggml_type, offset)
        )
        offset += -(-info.n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    head = b"".join(parts)
    return head + bytes(-len(head) % DEFAULT_ALIGNMENT)


def encode_value(value: Value) -> bytes:
    """Return type and value in the type that is usual in GGUF: 32 bits where that is exact, else 64."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _encode_text(value)
    if isinstance(value, (TextArray, list)):
        items = value if isinstance(value, list) else value.decode()
        return struct.pack("<IIQ", ARRAY, STRING, len(items)) + b"".join(map(_encode_text, items))
    if isinstance(value, np.ndarray):
        kind = _TYPE_OF_DTYPE[value.dtype]
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.tobytes()
    if isinstance(value, bool):
        code = "?"
    elif isinstance(value, float):
        with np.errstate(over="ignore"):
            is_exact = float(np.float32(value)) == value or math.isnan(value)
        code = "f" if is_exact else "d"
    elif value >= 0:
        code = "I" if value < 1 << 32 else "Q"
    else:
        code = "i" if value >= -(1 << 31) else "q"
    return struct.pack("<I" + code, _TYPE_OF_CODE[code], value)


def _encode_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
