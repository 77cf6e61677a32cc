"""A model whose layers differ in the width of their experts and in how many of them a token uses.

It is made of a small one of Nemotron 3's architecture, whose layers 1 and 3 have experts: those of layer 3 become twice
as wide, by what layer 1 has, or by weights that add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.gguf.reader import DEFAULT_ALIGNMENT, GGUFFile
from engine.gguf.writer import encode_head

ARCHITECTURE = "nemotron_h_moe"
USED = (0, 2, 0, 5)  # of each layer


def write_uneven(source: Path, path: Path, used: Sequence[int] = USED, *, adds: bool = True) -> Path:
    """Write such a model; `source` is of format F32 or Q8_0, with experts of width 32."""
    with GGUFFile.open(source) as file:
        values = {key: file.metadata.value(key) for key in file.metadata}
        values[f"{ARCHITECTURE}.expert_used_count"] = np.array(used, np.int32)
        values[f"{ARCHITECTURE}.expert_feed_forward_length"] = np.array([0, 32, 0, 64], np.int32)
        infos, parts = [], []
        for info in file.tensors.values():
            data = np.asarray(file.mapped(info.name))
            if info.name.startswith("blk.3.") and "_exps." in info.name:
                is_down = "down" in info.name
                rows = data.reshape(*info.shape[:-1], -1)
                other = np.asarray(file.mapped(info.name.replace("blk.3.", "blk.1."))).reshape(rows.shape)
                rows = np.concatenate([rows, other if adds else np.zeros_like(other)], axis=2 if is_down else 1)
                n_experts, n_rows, n_cols = info.shape
                shape = (n_experts, n_rows, 2 * n_cols) if is_down else (n_experts, 2 * n_rows, n_cols)
                data, info = rows.reshape(-1), replace(info, shape=shape, n_bytes=rows.nbytes)  # noqa: PLW2901
            infos.append(info)
            parts.append(data.tobytes() + bytes(-data.nbytes % DEFAULT_ALIGNMENT))
        path.write_bytes(encode_head(values, infos) + b"".join(parts))
    return path
