"""Launches of embeddings of n-grams: hashes of tokens, and the gate of what is made of the rows that they choose.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from engine.devices.cuda.attention import Place
from engine.devices.cuda.launch import NOT_KEPT, WARP, Count, Kept, Launch, Rows, at, ceil_div, float32, int32, pointer
from engine.devices.graph import MOST_HASHED

_THREADS = 256  # of a block at most; `ngrams.cu`


class _Hashes(ctypes.Structure):
    _fields_ = [
        ("multipliers", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("n_hashed", ctypes.c_int32),
        ("n_heads", ctypes.c_int32),
        ("end_id", ctypes.c_int32),
    ]


class Hashes(NamedTuple):
    """How rows are chosen (`graph.HashTokens`), with device addresses of uint64 and uint32 numbers."""

    multipliers: int
    sizes: int
    offsets: int
    n_hashed: int
    n_heads: int
    end_id: int


def hash_tokens(
    state: int, out: Rows, hashes: Hashes, token_ids: int, place: Place, count: Count, kept: Kept = NOT_KEPT
) -> Launch:
    """Choose rows by hashes of tokens and those before them; `out` has int32 rows."""
    assert 2 <= hashes.n_hashed <= MOST_HASHED
    assert hashes.n_heads % (hashes.n_hashed - 1) == 0
    assert hashes.multipliers % 8 == 0
    assert out.stride >= hashes.n_heads
    places = (pointer(token_ids), pointer(place.positions), pointer(place.slots), pointer(count.address))
    arguments = (pointer(state), *at(out), _Hashes(*hashes), *places, kept.argument)
    return Launch("ngrams.cu", "hash_tokens", (), (1, 1, 1), _THREADS, arguments)


def gate_by_agreement(
    a: Rows, b: Rows, x: Rows, out: Rows, n_streams: int, n_cols: int, floor: float, count: Count
) -> Launch:
    """Multiply x by a gate for each stream of `n_cols` that a and b have."""
    threads = min(_THREADS, ceil_div(n_cols, WARP) * WARP)
    sizes = (int32(n_cols), float32(floor), pointer(count.address))
    arguments = (*at(a), *at(b), *at(x), *at(out), *sizes)
    return Launch("ngrams.cu", "gate_by_agreement", (), (n_streams, count.most, 1), threads, arguments)
