"""Where the state of one sequence lies in a program's memory: its keys and values, and its recurrent states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from engine.devices.footprint import position_rows
from engine.devices.graph import KVCache, KVType, State
from engine.devices.program import Limits

Owners: TypeAlias = list[tuple[KVCache | State, int]]
"""Caches and states, each with the offset of the memory of all its sequences."""

Part: TypeAlias = tuple[int, int]
"""Offset and bytes."""


def used_parts(owners: Owners, limits: Limits, slot: int, n_tokens: int) -> Iterator[Part]:
    """Yield the memory that the first `n_tokens` of a sequence fill, which no context's length changes."""
    for owner, offset in owners:
        if isinstance(owner, State):
            yield _state_of(owner, offset, slot)
            continue
        start, n_rows = offset, owner.n_rows(limits.context_length)
        for row_bytes in _rows(owner, limits.kv_type):
            yield start + slot * n_rows * row_bytes, n_tokens // owner.period * row_bytes
            start += limits.n_slots * n_rows * row_bytes


def recurrent_parts(owners: Owners, slot: int) -> list[Part]:
    """Return the memory of the recurrent states of a sequence."""
    return [_state_of(owner, offset, slot) for owner, offset in owners if isinstance(owner, State)]


def _state_of(state: State, offset: int, slot: int) -> Part:
    n_bytes = state.width * 4
    return offset + slot * n_bytes, n_bytes


def context_stretches(owners: Owners, limits: Limits) -> list[Part]:
    """Return the memory of the keys or values of each sequence in each layer, in the order of `Footprint.stretches`."""
    stretches: list[Part] = []
    for cache, offset in owners:
        if isinstance(cache, State) or cache.period > 1:
            continue
        start = offset
        for position_bytes in position_rows(cache, limits.kv_type):
            n_bytes = limits.context_length * position_bytes
            stretches += [(start + slot * n_bytes, n_bytes) for slot in range(limits.n_slots)]
            start += limits.n_slots * n_bytes
    return stretches


def _rows(cache: KVCache, kv_type: KVType) -> Iterator[int]:
    """Yield the bytes of one position in each array of a cache, in the order of `cuda/kv_cache.cuh`."""
    yield from position_rows(cache, kv_type)
    if kv_type == KVType.Q8_0:
        dims = (cache.head_dim,) if cache.values_in_keys else (cache.head_dim, cache.value_dim)
        yield from (cache.n_kv_heads * 2 * -(-dim // 32) for dim in dims)
