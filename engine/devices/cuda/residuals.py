"""Launches of attention residuals: the row that a sub-layer takes of several.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from engine.devices.cuda.kernels import LANE, NO_FORMS, Forms, check_width
from engine.devices.cuda.launch import NOTHING, WARP, Count, Launch, Rows, at, ceil_div, float32, pointer
from engine.devices.graph import MOST_RESIDUALS


class _Residuals(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p * MOST_RESIDUALS), ("strides", ctypes.c_int64 * MOST_RESIDUALS)]


class Scoring(NamedTuple):
    """What residuals are scored with, and device addresses; see `graph.MixResiduals`.

    Attributes:
        scorer: of the model.
        eps: of the scores' norm.
        scores: float32 [rows, residuals].
        n_done: a word for each row, 0 before and after.
    """

    scorer: int
    eps: float
    scores: int
    n_done: int


class Norm(NamedTuple):
    """The norm of the mix: its weight (0 for none), its epsilon, and where its rows go."""

    weight: int
    eps: float
    out: Rows
    forms: Forms = NO_FORMS


def mix_residuals(
    residuals: Sequence[Rows],
    added: Sequence[Rows],
    scoring: Scoring,
    mix: Rows,
    norm: Norm | None,
    n_cols: int,
    count: Count,
) -> Launch:
    """Make one row of several, and normalise it; with two `added`, the last of those is their sum."""
    a, b = added or (NOTHING, NOTHING)
    weight, eps, out, forms = norm or Norm(0, 0.0, NOTHING)
    check_width(n_cols)
    assert 1 <= len(residuals) <= MOST_RESIDUALS
    assert scoring.scorer % 16 == weight % 16 == 0
    assert all(r.address % 16 == 0 and r.stride % 4 == 0 for r in (*residuals, a, b, mix, out))
    n_warps = min(ceil_div(n_cols, LANE * WARP), 32)
    packed = _Residuals()
    for i, rows in enumerate(residuals):
        packed.rows[i], packed.strides[i] = rows
    return Launch(
        "mix_residuals.cu",
        "mix_residuals",
        (
            f"N_RESIDUALS={len(residuals)}",
            f"MOST_RESIDUALS={MOST_RESIDUALS}",
            f"NORMALIZE={int(norm is not None)}",
            forms.definition,
            f"N_COLS={n_cols}",
            f"THREADS={n_warps * WARP}",
        ),
        (len(residuals), count.most, 1),
        n_warps * WARP,
        (
            packed,
            *at(a),
            *at(b),
            pointer(scoring.scorer),
            float32(scoring.eps),
            pointer(scoring.scores),
            pointer(scoring.n_done),
            *at(mix),
            pointer(weight),
            float32(eps),
            *at(out),
            forms.argument,
            pointer(count.address),
        ),
    )
