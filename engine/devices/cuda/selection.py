"""Launches that choose what attention looks at: `cuda/select_positions.cu`, `cuda/select_blocks.cu`.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes

from engine.devices.cuda.attention import Cache, CacheArgument, Place, check_heads
from engine.devices.cuda.launch import (
    MOST_SHARED,
    NOTHING,
    WARP,
    Count,
    Launch,
    Rows,
    at,
    ceil_div,
    int32,
    int64,
    pointer,
)
from engine.devices.graph import KVType
from engine.errors import DeviceError

FEW_TOKENS = 8  # up to which many blocks score the positions of one token

_WARPS, _TILE, _HEADS, _DIGITS = 16, 128, 16, 1 << 11  # of a block; `indexer.cuh`
_BLOCKS = 128  # about one for each multiprocessor; more than FEW_TOKENS


class _Inputs(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("weights_stride", ctypes.c_int64),
        ("cache", CacheArgument),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("has_tail", ctypes.c_int32),
    ]


class _BlockInputs(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("cache", CacheArgument),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("top_k", ctypes.c_int32),
        ("n_newest", ctypes.c_int32),
    ]


def scores_bytes(n_rows: int, n_tokens: int) -> int:
    """Return the bytes of the scores that are kept for steps of so many tokens."""
    return 4 * n_rows * min(n_tokens, _BLOCKS)


def block_scores_bytes(n_rows: int, n_heads: int, block_size: int, n_tokens: int) -> int:
    """Return the bytes of the scores of blocks that are kept for steps of so many tokens."""
    return 4 * n_heads * ceil_div(n_rows, block_size) * min(n_tokens, _BLOCKS)


def _shared_bytes(cache: Cache, n_heads: int, apart: bool) -> int:
    """Return the size of `Shared`, of `select_positions.cu` or, where heads stay apart, of `select_blocks.cu`."""
    planes = 2 if cache.type == KVType.F32 else 1
    keys = 2 * planes * _TILE * (ceil_div(cache.key_dim, 16) * 16 + 8)
    rows = ceil_div(n_heads, _HEADS) * (_HEADS if apart else 1)
    return ceil_div(keys + 4 * (rows * _TILE + _DIGITS + 2 * _WARPS + 2), 16) * 16


def check_indexer(cache: Cache, n_heads: int, *, apart: bool = False) -> None:
    """Raise `DeviceError` for queries and keys that the kernels cannot take; `apart`: each head chooses for itself."""
    check_heads(cache.key_dim, 0)
    if n_heads > _WARPS * _HEADS or _shared_bytes(cache, n_heads, apart) > MOST_SHARED:
        raise DeviceError(
            f"this model's indexer has {n_heads} heads of {cache.key_dim} values, more than the kernels for GPUs take; "
            'set [engine] device = "cpu"'
        )


def select_positions(
    q: Rows,
    weights: Rows | None,
    out: Rows,
    cache: Cache,
    n_heads: int,
    top_k: int,
    scale: float,
    scores: int,
    place: Place,
    count: Count,
    *,
    has_tail: bool = False,
) -> list[Launch]:
    """Score all positions and choose: by many blocks for few tokens, by one for each of many, with the same result.

    `out` has int32 rows, `scores` is the address of `scores_bytes` bytes. With `has_tail` rows of the cache are blocks
    of positions, and behind those that are chosen comes the one that is not whole.
    """
    check_indexer(cache, n_heads)
    assert cache.values_in_keys
    assert (cache.n_kv_heads, cache.value_dim) == (1, 0)
    assert q.stride >= n_heads * cache.key_dim
    assert q.address % 8 == q.stride % 2 == 0
    assert weights is None or weights.stride >= n_heads
    assert out.stride >= top_k + has_tail
    definitions = (*cache.definitions, f"N_HEADS={n_heads}")
    of_heads = weights or NOTHING
    inputs = _Inputs(*q, *of_heads, cache.argument, place.positions, place.slots, scale, top_k, has_tail)
    kept = (pointer(scores), int64(cache.n_rows))
    shared, n = _shared_bytes(cache, n_heads, apart=False), pointer(count.address)

    def launch(kernel: str, grid: tuple[int, int, int], *arguments: object) -> Launch:
        return Launch("select_positions.cu", kernel, definitions, grid, _WARPS * WARP, (*arguments, n), shared)

    if count.most > FEW_TOKENS:
        return [launch("select_positions", (min(count.most, _BLOCKS), 1, 1), inputs, *kept, *at(out))]
    blocks = min(ceil_div(cache.n_rows, _TILE), _BLOCKS)
    chosen = (*kept, cache.argument, pointer(place.positions), int32(top_k), int32(has_tail), *at(out))
    return [
        launch("score_positions", (blocks, count.most, 1), inputs, *kept),
        launch("choose_positions", (count.most, 1, 1), *chosen),
    ]


def select_blocks(
    q: Rows,
    out: Rows,
    cache: Cache,
    n_heads: int,
    top_k: int,
    block_size: int,
    n_newest: int,
    scores: int,
    place: Place,
    count: Count,
) -> list[Launch]:
    """Score blocks of positions and choose for each head, likewise.

    `out` has int32 rows of a list for each head, `scores` is the address of `block_scores_bytes` bytes.
    """
    check_indexer(cache, n_heads, apart=True)
    assert cache.values_in_keys
    assert (cache.n_kv_heads, cache.value_dim) == (1, 0)
    assert q.stride >= n_heads * cache.key_dim
    assert q.address % 8 == q.stride % 2 == 0
    assert out.stride >= n_heads * top_k
    assert 1 <= n_newest <= top_k
    definitions = (*cache.definitions, f"N_HEADS={n_heads}", f"BLOCK={block_size}")
    inputs = _BlockInputs(*q, cache.argument, place.positions, place.slots, top_k, n_newest)
    kept = (pointer(scores), int64(ceil_div(cache.n_rows, block_size)))
    shared, n = _shared_bytes(cache, n_heads, apart=True), pointer(count.address)

    def launch(kernel: str, grid: tuple[int, int, int], *arguments: object) -> Launch:
        arguments = (inputs, *kept, *arguments, n)
        return Launch("select_blocks.cu", kernel, definitions, grid, _WARPS * WARP, arguments, shared)

    if count.most > FEW_TOKENS:
        return [launch("select_blocks", (min(count.most, _BLOCKS), 1, 1), *at(out))]
    scored_together = max(1, _TILE // block_size) * block_size
    blocks = min(ceil_div(cache.n_rows, scored_together), _BLOCKS)
    return [
        launch("score_blocks", (blocks, count.most, 1)),
        launch("choose_blocks_of_heads", (n_heads, count.most, 1), *at(out)),
    ]
