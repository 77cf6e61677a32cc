"""Takes the state of one sequence out of a program's memory, and puts it back: keys, values, recurrent states.

A cache keeps room for a whole context; only what positions hold is taken, so that the bytes do not depend on the length
of the context or the number of sequences, and fit any program of the same model and type of cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.graph import KVCache, State
from engine.devices.program import Limits

_LANES = 16  # positions whose keys lie side by side; see kernels/ops/kv_layout.h

Owners = list[tuple[KVCache | State, npt.NDArray[np.uint8]]]


def used_parts(owners: Owners, limits: Limits, slot: int, n_tokens: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield views of all memory that the first `n_tokens` of a sequence fill.

    Args:
        owners: caches and states, each with the memory of all its sequences.
        limits: that the memory was planned for.
        slot: which sequence.
        n_tokens: that it holds.
    """
    for owner, memory in owners:
        if isinstance(owner, State):
            yield _state_of(owner, memory, slot)
            continue
        n_rows = n_tokens // owner.period
        n_groups, n_all = -(-n_rows // _LANES), -(-owner.n_rows(limits.context_length) // _LANES)
        group, row = _kernels.kv_strides(limits.kv_type, owner.head_dim, owner.value_dim)
        n_heads = limits.n_slots * owner.n_kv_heads
        heads = slice(slot * owner.n_kv_heads, (slot + 1) * owner.n_kv_heads)
        keys = memory[: n_heads * n_all * group].reshape(n_heads, n_all * group)
        yield keys[heads, : n_groups * group]
        start = -(-keys.size // 64) * 64  # values begin at a cache line
        values = memory[start : start + n_heads * n_all * _LANES * row].reshape(n_heads, n_all * _LANES * row)
        yield values[heads, : n_rows * row]


def recurrent_parts(owners: Owners, slot: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield views of the recurrent states of a sequence."""
    for owner, memory in owners:
        if isinstance(owner, State):
            yield _state_of(owner, memory, slot)


def _state_of(state: State, memory: npt.NDArray[np.uint8], slot: int) -> npt.NDArray[np.uint8]:
    n_bytes = state.width * 4
    return memory[slot * n_bytes : (slot + 1) * n_bytes]
