"""Tables of the model file that devices read, checked before they do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.devices.graph import Table
from engine.devices.program import WeightAccess
from engine.errors import GGUFError


def expert_table(weights: WeightAccess, table: Table, n_experts: int) -> npt.NDArray[np.int32]:
    """Return the experts of each token id, int32 [n_rows, n_cols]; raise `GGUFError` if there are no such experts."""
    ids = weights.array(table.name).view(np.int32).reshape(table.n_rows, table.n_cols)
    if ids.min() < 0 or ids.max() >= n_experts:
        raise GGUFError(f"{table.name} names expert {ids.min()} to {ids.max()}; the model has 0 to {n_experts - 1}")
    return ids
