"""Code books of the IQ formats: tables of 4 or 8 small integers that an index in the file picks a row of."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

GRID_NAMES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")  # IQ1_M uses the one of IQ1_S


@cache
def load_grid(name: str) -> npt.NDArray[np.int8]:
    """Return a code book, int8 [n_entries, 4 or 8], read-only.

    They are data without a formula; the `gguf` package, which belongs to the definition of the formats, has them.
    It is imported here because it is slow to import and few models need it.
    """
    from gguf import quants  # noqa: PLC0415

    codec = getattr(quants, name)
    codec.init_grid()
    grid: npt.NDArray[np.int8] = np.ascontiguousarray(codec.grid.reshape(codec.grid_shape), np.int8)
    grid.flags.writeable = False
    return grid
