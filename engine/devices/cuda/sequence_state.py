"""Where the state of one sequence lies in a program's memory: its keys and values, and its recurrent states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from engine.devices.cuda.places import reserved_bytes
from engine.devices.footprint import has_stretches, position_rows
from engine.devices.graph import KVCache, KVType, State
from engine.devices.program import Limits, ring_pieces

Owners: TypeAlias = list[tuple[KVCache | State, int]]
"""Caches and states, each with the offset of the memory of all its sequences."""

Part: TypeAlias = tuple[int, int]
"""Offset and bytes."""


def used_parts(owners: Owners, limits: Limits, slot: int, n_tokens: int) -> Iterator[Part]:
    """Yield the memory that the next token of a sequence of `n_tokens` may read, in parts that no limits change."""
    for owner, offset in owners:
        if isinstance(owner, State):
            yield _state_of(owner, offset, slot)
            continue
        start, n_rows, n_used = offset, limits.n_rows(owner), n_tokens // owner.period
        first = max(0, n_used - owner.window) if owner.window else 0
        for row_bytes in _rows(owner, limits.kv_type):
            for begin, end in ring_pieces(first, n_used, n_rows):
                yield start + (slot * n_rows + begin) * row_bytes, (end - begin) * row_bytes
            start += limits.n_slots * n_rows * row_bytes


def passing_parts(owners: Owners, limits: Limits, slot: int, n_tokens: int) -> list[Part]:
    """Return the memory of that which a sequence overwrites as it goes on: recurrent states, and rows in a window."""
    passing = [(owner, offset) for owner, offset in owners if isinstance(owner, State) or owner.window]
    return list(used_parts(passing, limits, slot, n_tokens))


def kept_bytes(states: Sequence[State]) -> int:
    """Return what a copy of the recurrent states of one sequence takes."""
    return sum(reserved_bytes(state.width * 4) for state in states)


def kept_places(states: Sequence[State]) -> Iterator[tuple[State, int]]:
    """Yield the recurrent states with their places in such a copy."""
    at = 0
    for state in states:
        yield state, at
        at += reserved_bytes(state.width * 4)


def kept_states(owners: Owners, kept: Mapping[State, int], slot: int) -> list[tuple[Part, int]]:
    """Return the recurrent states of a sequence, with the offsets of their copies; of one sequence only, all in one."""
    found: list[tuple[Part, int]] = []
    for owner, offset in owners:
        if not isinstance(owner, State):
            continue
        (start, n_bytes), at = _state_of(owner, offset, slot), kept[owner]
        (before, _), place = found[-1] if found else ((0, 0), 0)
        if found and start - before == at - place:  # what lies in between is nobody's
            found[-1] = (before, start + n_bytes - before), place
        else:
            found.append(((start, n_bytes), at))
    return found


def _state_of(state: State, offset: int, slot: int) -> Part:
    n_bytes = state.width * 4
    return offset + slot * n_bytes, n_bytes


def context_stretches(owners: Owners, limits: Limits) -> list[Part]:
    """Return the memory of the keys or values of each sequence in each layer, in the order of `Footprint.stretches`."""
    stretches: list[Part] = []
    for cache, offset in owners:
        if isinstance(cache, State) or not has_stretches(cache, limits):
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
