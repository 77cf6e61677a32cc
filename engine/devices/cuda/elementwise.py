"""Launches of the small operations between the matrix products.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from engine.devices.cuda.launch import (
    NOTHING,
    WARP,
    Count,
    Launch,
    Rows,
    alignment,
    at,
    ceil_div,
    float32,
    int32,
    int64,
    pointer,
)
from engine.devices.graph import RopeStyle
from engine.quants.formats import QuantFormat

_MAX_PIECES = 128  # of a launch; `transfer.cu`
_PER_ROW, _COLUMNS = 256, 256  # threads of a block for each group of a row; columns of a block


class _Piece(ctypes.Structure):
    _fields_ = [
        ("from", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("is_tokens", ctypes.c_int32),
    ]


class _Pieces(ctypes.Structure):
    _fields_ = [("list", _Piece * _MAX_PIECES), ("drawn", ctypes.c_void_p)]


def transfer(pieces: Sequence[tuple[int, int, int]], tokens: int = -1, drawn: int = 0) -> list[Launch]:
    """Copy pinned host memory into device memory, or the other way.

    Args:
        pieces: (from, to, 32-bit words); device addresses.
        tokens: which of them has token ids, of which -1 - i stands for number i of those `drawn`.
        drawn: device address of these, in pinned memory, too.
    """
    launches = []
    for first in range(0, len(pieces), _MAX_PIECES):
        some, packed = pieces[first : first + _MAX_PIECES], _Pieces(drawn=drawn)
        for i, piece in enumerate(some):
            packed.list[i] = _Piece(*piece, first + i == tokens)
        grid = (max(1, ceil_div(max(n for _, _, n in some), _COLUMNS)), len(some), 1)
        launches.append(Launch("transfer.cu", "transfer", (), grid, _COLUMNS, (packed,)))
    return launches


def _elementwise(kernel: str, n_cols: int, count: Count, *arguments: Any) -> Launch:
    grid = (ceil_div(n_cols, _COLUMNS), count.most, 1)
    return Launch("elementwise.cu", kernel, (), grid, _COLUMNS, (*arguments, pointer(count.address)))


def carry_over(
    x: Rows | None,
    state: int,
    out: Rows | None,
    n_cols: int,
    n_kept: int,
    positions: int,
    slots: int,
    count: Count,
) -> Launch:
    """Copy the rows of x one token further; `state` has the last `n_kept` ones of each sequence."""
    assert x or out
    grid = (ceil_div(n_cols, _COLUMNS), count.most, 1)
    places = pointer(positions), pointer(slots), pointer(count.address)
    arguments = (*at(x or NOTHING), pointer(state), *at(out or NOTHING), int32(n_cols), int32(n_kept), *places)
    return Launch("carry_over.cu", "carry_over", (), grid, _COLUMNS, arguments)


def embed(
    table: int,
    weight_format: QuantFormat,
    ids: Rows,
    n_ids: int,
    n_vocab: int,
    n_cols: int,
    grid: int,
    out: Rows,
    scale: float,
    count: Count,
) -> Launch:
    """Look up rows of a table, `n_ids` side by side; int32 rows of ids."""
    assert table % alignment(weight_format) == 0
    assert ids.stride >= n_ids
    return Launch(
        "embed.cu",
        "embed",
        (f"FORMAT={weight_format.name}",),
        (ceil_div(n_ids * n_cols, _COLUMNS), count.most, 1),
        _COLUMNS,
        (
            pointer(table),
            int64(weight_format.row_bytes(n_cols)),
            *at(ids),
            int32(n_ids),
            int32(n_vocab),
            int32(n_cols),
            pointer(grid),
            *at(out),
            float32(scale),
            pointer(count.address),
        ),
    )


def rms_norm(
    x: Rows,
    weight: int,
    out: Rows,
    n_groups: int,
    group_size: int,
    eps: float,
    count: Count,
    weight_step: int = 0,
    *,
    centers: bool = False,
    bias: int = 0,
) -> Launch:
    """Normalise each group of columns; `weight` and `bias` may be 0, and go on so many values further for the next."""
    threads = min(_PER_ROW, ceil_div(group_size, WARP) * WARP)
    return Launch(
        "elementwise.cu",
        "rms_norm",
        (),
        (n_groups, count.most, 1),
        threads,
        (
            *at(x),
            pointer(weight),
            pointer(bias),
            *at(out),
            int32(group_size),
            int32(weight_step),
            int32(centers),
            float32(eps),
            pointer(count.address),
        ),
    )


def add(a: Rows, b: Rows, out: Rows, n_cols: int, count: Count) -> Launch:
    """Add."""
    return _elementwise("add", n_cols, count, *at(a), *at(b), *at(out), int32(n_cols))


def scale(x: Rows, factor: float, by: Rows | None, out: Rows, n_cols: int, count: Count) -> Launch:
    """Multiply by a constant, and by one value for each row, or with a stride of 0 for all, if `by` gives them."""
    rows = (*at(x), *at(by or NOTHING), *at(out))
    return _elementwise("scale", n_cols, count, *rows, int32(n_cols), float32(factor))


def soft_cap(x: Rows, cap: float, out: Rows, n_cols: int, count: Count) -> Launch:
    """Bring values to within `cap` of 0."""
    assert cap > 0
    return _elementwise("soft_caps", n_cols, count, *at(x), *at(out), int32(n_cols), float32(cap))


def clamp(x: Rows, limit: float, out: Rows, n_cols: int, count: Count) -> Launch:
    """Bring values that are farther than `limit` from 0 to there."""
    assert limit > 0
    return _elementwise("clamp", n_cols, count, *at(x), *at(out), int32(n_cols), float32(limit))


def scale_by_position(
    x: Rows, positions: int, n_cols: int, offset: int, period: int, slope: float, count: Count
) -> Launch:
    """Multiply in place by a factor that grows with the position."""
    arguments = (*at(x), pointer(positions), int32(n_cols), int32(offset), int32(period), float32(slope))
    return _elementwise("scale_by_position", n_cols, count, *arguments)


def split_heads(
    joined: Rows, first: Rows, second: Rows, n_heads: int, first_dim: int, second_dim: int, count: Count
) -> Launch:
    """Take apart rows that hold two parts for each head in turn."""
    return _split_or_join(joined, first, second, n_heads, first_dim, second_dim, count, is_join=False)


def join_heads(
    first: Rows, second: Rows, joined: Rows, n_heads: int, first_dim: int, second_dim: int, count: Count
) -> Launch:
    """Undo `split_heads`."""
    return _split_or_join(joined, first, second, n_heads, first_dim, second_dim, count, is_join=True)


def _split_or_join(
    joined: Rows,
    first: Rows,
    second: Rows,
    n_heads: int,
    first_dim: int,
    second_dim: int,
    count: Count,
    *,
    is_join: bool,
) -> Launch:
    sizes = (int32(n_heads), int32(first_dim), int32(second_dim), int32(is_join))
    n_cols = n_heads * (first_dim + second_dim)
    return _elementwise("split_or_join_heads", n_cols, count, *at(joined), *at(first), *at(second), *sizes)


def select_outputs(x: Rows, output_rows: int, out: Rows, n_cols: int, count: Count) -> Launch:
    """Keep the wanted rows."""
    return _elementwise("select_outputs", n_cols, count, *at(x), pointer(output_rows), *at(out), int32(n_cols))


def rope(
    x: Rows,
    positions: int,
    frequencies: int,
    n_heads: int,
    head_dim: int,
    n_rot: int,
    style: RopeStyle,
    magnitude: float,
    count: Count,
    period: int = 1,
) -> Launch:
    """Rotate the first `n_rot` values of each head in place, by positions rounded down to multiples of `period`."""
    assert n_rot % 2 == 0
    assert n_rot <= head_dim
    return _elementwise(
        "rope",
        n_heads * n_rot // 2,
        count,
        *at(x),
        pointer(positions),
        pointer(frequencies),
        int32(n_heads),
        int32(head_dim),
        int32(n_rot),
        int32(style == RopeStyle.NORM),
        float32(magnitude),
        int32(period),
    )
