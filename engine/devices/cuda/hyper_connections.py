"""Launches of hyper-connections: the residual streams between two sub-layers.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from engine.devices.cuda.launch import NOTHING, WARP, Count, Launch, Rows, at, ceil_div, float32, int32, pointer

_THREADS, _COLUMNS = 256, 4  # of a block, of a thread
_ROWS = 64  # at a time; a block goes on with others


class _Mixing(ctypes.Structure):
    _fields_ = [
        ("matrix", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("n_done", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
        ("mixing", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("magnitude", ctypes.c_float),
        ("n_normalizations", ctypes.c_int32),
    ]


class Mixing(NamedTuple):
    """What weights and gates are made with, and device addresses of float32 values; see `graph.ReduceStreams`.

    Attributes:
        matrix, scale, base: of the model.
        partial: `n_partial` values.
        n_done: a word for each row, 0 before and after.
        weights: [rows, n_streams].
        gates: [rows, n_streams], or 0 for none.
        mixing: [rows, n_streams^2], or 0 for none.
        eps, offset, magnitude, n_normalizations: numbers.
    """

    matrix: int
    scale: int
    base: int
    partial: int
    n_done: int
    weights: int
    gates: int
    mixing: int
    eps: float
    offset: float
    magnitude: float
    n_normalizations: int = 0


class Added(NamedTuple):
    """What is added to the streams: a row, the gates that it is multiplied by, and where the sums go.

    `mixing` is how the streams are mixed before; `NOTHING`: they are not. With a `magnitude` above 0 the row is
    multiplied by that and the sigmoid of the gates.
    """

    row: Rows
    gates: Rows
    out: Rows
    mixing: Rows = NOTHING
    magnitude: float = 0.0


def n_partial(n_rows: int, width: int, n_mixes: int) -> int:
    """Return how many values the blocks leave of streams that are so wide together."""
    return n_rows * _n_blocks(width) * (n_mixes + 1)


def _n_blocks(width: int) -> int:
    return ceil_div(width, _THREADS * _COLUMNS)


def hyper_connections(
    streams: Rows, added: Added | None, n_streams: int, n_cols: int, mixing: Mixing | None, count: Count
) -> Launch:
    """Add a row to residual streams of `n_cols`, make their weights and gates, or both."""
    added, n_mixes = added or Added(NOTHING, NOTHING, NOTHING), 0
    if mixing is not None:
        n_mixes = (2 * n_streams if mixing.gates else n_streams) + (n_streams**2 if mixing.mixing else 0)
        assert mixing.matrix % 16 == 0
        assert not mixing.mixing or (mixing.gates and mixing.n_normalizations > 0)
        assert not mixing.mixing or n_streams**2 <= WARP
    assert n_cols % _COLUMNS == 0
    assert all(r.address % 16 == 0 and r.stride % _COLUMNS == 0 for r in (streams, added.row, added.out))
    return Launch(
        "hyper_connections.cu",
        "hyper_connections",
        (f"N_STREAMS={n_streams}", f"N_MIXES={n_mixes}", f"MIXES={int(added.mixing != NOTHING)}"),
        (_n_blocks(n_streams * n_cols), min(count.most, _ROWS), 1),
        _THREADS,
        (
            *at(streams),
            *at(added.row),
            *at(added.gates),
            float32(added.magnitude),
            *at(added.mixing),
            *at(added.out),
            int32(n_cols),
            _Mixing(*mixing) if mixing else _Mixing(),
            pointer(count.address),
        ),
    )
