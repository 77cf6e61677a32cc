"""Takes the state of one sequence out of a program's memory, and puts it back: keys, values, recurrent states.

A cache keeps room for a whole context, or for a window and a step; only what positions hold is taken, and of those in a
window what the next token sees. So the bytes do not depend on the length of the context, of steps or the number of
sequences, and fit any program of the same model and type of cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.graph import KVCache, State
from engine.devices.program import Limits, ring_pieces

_LANES = 16  # positions whose keys lie side by side; see kernels/ops/kv_layout.h

Owners = list[tuple[KVCache | State, npt.NDArray[np.uint8]]]


def used_parts(owners: Owners, limits: Limits, slot: int, n_tokens: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield views of all memory that the next token of a sequence may read.

    Args:
        owners: caches and states, each with the memory of all its sequences.
        limits: that the memory was planned for.
        slot: which sequence.
        n_tokens: that it holds.
    """
    for owner, memory in owners:
        if isinstance(owner, State):
            yield _state_of(owner, memory, slot)
        else:
            yield from _rows_of(owner, memory, limits, slot, n_tokens)


def passing_parts(owners: Owners, limits: Limits, slot: int, n_tokens: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield views of that which a sequence overwrites as it goes on: recurrent states, and rows in a window."""
    passing = [(owner, memory) for owner, memory in owners if isinstance(owner, State) or owner.window]
    return used_parts(passing, limits, slot, n_tokens)


def state_parts(owners: Owners, slot: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield views of the recurrent states of a sequence."""
    return (_state_of(owner, memory, slot) for owner, memory in owners if isinstance(owner, State))


def _rows_of(
    cache: KVCache, memory: npt.NDArray[np.uint8], limits: Limits, slot: int, n_tokens: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the keys, in whole groups of positions, and the values that lie side by side."""
    n_all = -(-limits.n_rows(cache) // _LANES)
    group, row = _kernels.kv_strides(limits.kv_type, cache.head_dim, cache.value_dim)
    n_heads = limits.n_slots * cache.n_kv_heads
    heads = slice(slot * cache.n_kv_heads, (slot + 1) * cache.n_kv_heads)
    keys = memory[: n_heads * n_all * group].reshape(n_heads, n_all, group)
    start = -(-keys.size // 64) * 64  # values begin at a cache line
    values = memory[start : start + n_heads * n_all * _LANES * row].reshape(n_heads, n_all * _LANES, row)
    n_rows = n_tokens // cache.period
    first = max(0, n_rows - cache.window) // _LANES if cache.window else 0
    for begin, end in ring_pieces(first, -(-n_rows // _LANES), n_all):
        yield keys[heads, begin:end]
    for begin, end in ring_pieces(first * _LANES, n_rows, n_all * _LANES):
        yield values[heads, begin:end]


def _state_of(state: State, memory: npt.NDArray[np.uint8], slot: int) -> npt.NDArray[np.uint8]:
    n_bytes = state.width * 4
    return memory[slot * n_bytes : (slot + 1) * n_bytes]
