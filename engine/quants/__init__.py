"""Weight formats: a table of facts, a slow reference for each, and the code books that some of them need."""

from __future__ import annotations

from functools import cache

from engine.quants.grids import GRID_NAMES, load_grid


@cache
def install_grids() -> None:
    """Hand the code books of the IQ formats to the kernels, once."""
    from engine import _kernels  # noqa: PLC0415  # tables and reference need no compiled code

    _kernels.set_grids({name: load_grid(name) for name in GRID_NAMES})
