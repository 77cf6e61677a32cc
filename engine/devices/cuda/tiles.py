"""Launches of the kernels for steps of many tokens: matrix products by tiles, and the experts grouped for them.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.devices.cuda.kernels import (
    MAX_MATRICES,
    ONE_HEAD,
    WARP,
    Count,
    Heads,
    Launch,
    Matrix,
    Rows,
    _at,
    _blocks,
    _int,
    _long,
    _Matrices,
    _Matrix,
    _pointer,
    alignment,
)
from engine.quants.formats import Activation, QuantFormat

MIN_TOKENS = 9  # of steps that are computed by tiles; fewer share one reading of the weights row by row

_WARPS, _ROWS, _TOKENS, _STEP = 4, 64, 64, 256  # of a tile; `tiles.cuh`
_WITH_MINIMUM = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}


def takes_tiles(weight_format: QuantFormat) -> bool:
    """Return whether there are tiles for a format: not for float formats, which have no integer form."""
    return weight_format.activation != Activation.F32


def shared_bytes(weight_format: QuantFormat) -> int:
    """Return the size of `TileDots<...>::Shared`."""
    n_blocks, stride = _STEP // weight_format.block_size, _STEP + 16
    raw = (n_blocks * weight_format.block_bytes + (0 if alignment(weight_format) == 16 else 30)) // 16 * 16
    x = 2 * _TOKENS * (stride + 4 * n_blocks)
    sums = (2 * _TOKENS if weight_format.name in _WITH_MINIMUM else 1) * 2 * (_STEP // 16)
    return x + sums + _WARPS * 16 * (2 * raw + stride + 2 * (_STEP // 16))


def linear(
    x: Rows,
    n_cols: int,
    weight_format: QuantFormat,
    matrices: Sequence[Matrix],
    grid: int,
    count: Count,
    heads: Heads = ONE_HEAD,
) -> Launch:
    """Do what `kernels.linear` does, for many tokens and an integer format, with the same bits."""
    assert takes_tiles(weight_format)
    assert 0 < len(matrices) <= MAX_MATRICES
    assert heads.n == 1 or (len(matrices) == 1 and not matrices[0].bias)
    assert all(m.address % alignment(weight_format) == 0 for m in matrices)
    assert x.address % 16 == x.stride % 16 == heads.x_bytes % 16 == 0
    packed, first_block = _Matrices(n=len(matrices)), 0
    for i, m in enumerate(matrices):
        packed.list[i] = _Matrix(m.address, m.out.address, m.bias, m.scale, m.n_rows, m.out.stride, first_block)
        first_block += _blocks(m.n_rows, _ROWS)
    return Launch(
        "linear_tiles.cu",
        "linear_tiles",
        (f"FORMAT={weight_format.name}",),
        (first_block, _blocks(count.most, _TOKENS), heads.n),
        _WARPS * WARP,
        (
            packed,
            _long(weight_format.row_bytes(n_cols)),
            _long(heads.weight_bytes),
            *_at(x),
            _long(heads.x_bytes),
            _int(n_cols),
            _pointer(grid),
            _pointer(count.address),
        ),
        shared_bytes(weight_format),
    )
