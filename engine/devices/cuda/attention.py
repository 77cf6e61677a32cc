"""Launches of attention: what it reads made ready, then few tokens by parts of the positions, or many in one kernel.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from engine.devices.cuda.kernels import NO_FORMS, Forms, GateOf
from engine.devices.cuda.launch import (
    MOST_SHARED,
    NOTHING,
    WARP,
    Count,
    Launch,
    Rows,
    at,
    ceil_div,
    float32,
    int32,
    pointer,
)
from engine.devices.graph import KVType, RopeStyle
from engine.errors import DeviceError

FEW_TOKENS = 8  # up to which the positions are split into parts: more tokens fill the GPU without; `attention.cu`
PROMPT_TOKENS = 64  # from more tokens on they share tiles, where they see all; `attention_prompt.cu`

_MAX_HEAD_DIM = 576
_BLOCKS = 256  # that parts make of a token: two for each multiprocessor of the largest GPUs
_VECTOR = 8  # values that a lane reads at once; `kv_cache.cuh`
_TILE, _HEADS, _WARPS = 32, 16, 8  # positions, heads and warps of a block; `attention.cu`
_INPUT_WARPS = 4  # `attention_inputs.cu`
_MERGED = 256  # columns of a block that merges parts
_PROMPT_WARPS, _MOST_UNITS, _MOST_VALUES = 2, 4, 256  # `attention_prompt.cu`: warps of 16 rows, these, values of a head
_MOST_PRODUCTS = 4 << 40  # of a launch: less than a second's, as a GPU with a display stops what takes longer


class CacheArgument(ctypes.Structure):
    """The cache of one layer, as kernels take it."""

    _fields_ = [
        ("address", ctypes.c_void_p),
        ("n_slots", ctypes.c_int32),
        ("n_rows", ctypes.c_int32),
        ("n_kv_heads", ctypes.c_int32),
        ("period", ctypes.c_int32),
    ]


class _Heads(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("step", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("rotate", ctypes.c_int32),
    ]


class Cache(NamedTuple):
    """Keys and values of one layer; layout in `kv_cache.cuh`. A sequence has `n_rows`."""

    address: int
    type: KVType
    n_slots: int
    n_rows: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False
    period: int = 1

    @property
    def n_bytes(self) -> int:
        """Return its size."""
        dims = (self.key_dim,) if self.values_in_keys else (self.key_dim, self.value_dim)
        n_heads = self.n_slots * self.n_rows * self.n_kv_heads
        if self.type == KVType.Q8_0:
            return n_heads * sum(dim + 2 * ceil_div(dim, 32) for dim in dims)
        return n_heads * sum(dims) * (4 if self.type == KVType.F32 else 2)

    @property
    def definitions(self) -> tuple[str, ...]:
        """Return what kernels that read or write it are compiled for."""
        return (
            f"KV_TYPE={int(self.type)}",
            f"KEY_DIM={self.key_dim}",
            f"VALUE_DIM={self.value_dim}",
            f"SHARED={int(self.values_in_keys)}",
        )

    @property
    def argument(self) -> CacheArgument:
        """Return the kernels' argument."""
        return CacheArgument(self.address, self.n_slots, self.n_rows, self.n_kv_heads, self.period)


class Place(NamedTuple):
    """Where a step's tokens belong: device addresses of their positions and of their sequences' slots, int32."""

    positions: int
    slots: int


class Sight(NamedTuple):
    """What a token sees of what lies before it, see `graph.Attention`; `sinks` is float32 [n_heads] or 0.

    With `top_k`, `selected` are int32 rows of one list, or `by_head` of one for each key head: so many blocks of
    `block_size` positions at most, perhaps with a tail (`graph.Selected`). With a cache of `shared` rows a token sees
    these beside the positions, or those that the list names.
    """

    sinks: int = 0
    window: int = 0
    chunk: int = 0
    cap: float = 0.0
    selected: Rows = NOTHING
    top_k: int = 0
    block_size: int = 1
    by_head: bool = False
    has_tail: bool = False
    shared: Cache | None = None

    def most_seen(self, n_rows: int) -> int:
        """Return how many positions a token goes through at most, or places of them, in a cache of so many rows.

        Of a ring that is the same whatever else its rows make room for.
        """
        if self.shared is not None:
            n_shared = self.shared.n_rows
            return (min(n_shared, self.top_k) if self.top_k else n_shared) + min(self.window or n_rows, n_rows)
        in_window = self.window or self.chunk
        return min(n_rows, in_window + _TILE if in_window else self.top_k * self.block_size or n_rows)

    @property
    def definitions(self) -> tuple[str, ...]:
        """Return what kernels that know what tokens see are compiled for."""
        period, window = (self.shared.period, self.window) if self.shared is not None else (0, 0)
        lists = f"TOP_K={self.top_k}", f"BLOCK={self.block_size}", f"TAIL={int(self.has_tail)}"
        return *lists, f"PERIOD={period}", f"WINDOW={window}"


class Heads(NamedTuple):
    """Heads of queries, keys or values, and what is to be done with them before they are used.

    Attributes:
        x: float32 rows that begin with the first head.
        n: how many heads.
        step: values from one head to the next.
        normalize: whether each head is normalised.
        weight: of that norm, float32 for each value of a head; 0 for 1.
        rotate: whether they are rotated by their position.
    """

    x: Rows
    n: int
    step: int
    normalize: bool = False
    weight: int = 0
    rotate: bool = False

    @property
    def argument(self) -> Any:
        """Return the kernel's argument."""
        return _Heads(*self.x, self.weight, self.n, self.step, self.normalize, self.rotate)


class Rotation(NamedTuple):
    """How heads are rotated: float32 frequencies of their pairs, the number of values that turn, and how.

    The positions of keys are rounded down to a multiple of `period`.
    """

    frequencies: int = 0
    n_rot: int = 0
    style: RopeStyle = RopeStyle.NEOX
    magnitude: float = 1.0
    period: int = 1


def check_heads(key_dim: int, value_dim: int) -> None:
    """Raise `DeviceError` for heads that the kernels cannot take."""
    for name, dim in (("keys", key_dim), ("values", value_dim)):
        if dim % _VECTOR or dim > _MAX_HEAD_DIM:
            raise DeviceError(
                f"this model's heads have {name} of {dim} values; on a GPU they must be a multiple of {_VECTOR}, "
                f'at most {_MAX_HEAD_DIM}; set [engine] device = "cpu"'
            )


def _n_head_tiles(cache: Cache, n_heads: int) -> int:
    return cache.n_kv_heads * ceil_div(n_heads // cache.n_kv_heads, _HEADS)


def n_parts(cache: Cache, n_heads: int, sight: Sight | None = None) -> int:
    """Return into how many parts the positions are split: enough blocks to fill a GPU, but no more parts than tiles."""
    n_positions = (sight or Sight()).most_seen(cache.n_rows)
    return min(ceil_div(_BLOCKS, _n_head_tiles(cache, n_heads)), ceil_div(n_positions, _TILE))


def scratch_bytes(cache: Cache, n_heads: int, max_tokens: int, sight: Sight | None = None) -> tuple[int, int]:
    """Return the bytes of the parts' values, and of their sums."""
    n = min(max_tokens, FEW_TOKENS) * n_heads * n_parts(cache, n_heads, sight)
    return n * cache.value_dim * 4, n * 8


def _tile_bytes(cache: Cache) -> int:
    """Return the size of `attention.cu`'s `Tile`."""
    planes = 2 if cache.type == KVType.F32 else 1
    numbers = ceil_div(cache.key_dim, 64) * 64 + 8
    if not cache.values_in_keys:
        numbers += ceil_div(cache.value_dim, 16) * 16 + 8
    return 2 * planes * _TILE * numbers + 4 * _HEADS * (_TILE + 8) + 16 * _HEADS * (_TILE + 4) + 4 * _HEADS


def _prompt_block(cache: Cache) -> tuple[int, int]:
    """Return how many times 16 rows a block of `attention_prompt.cu` works at, and the size of its `Tile`.

    No rows, if not even 16 fit, or values are too long.
    """
    planes = 2 if cache.type == KVType.F32 else 1
    key_bytes = 2 * (ceil_div(cache.key_dim, 64) * 64 + 8)
    value_bytes = key_bytes if cache.values_in_keys else 2 * (ceil_div(cache.value_dim, 16) * 16 + 8)
    for_all = planes * _TILE * max(key_bytes, value_bytes)
    for_one = 2 * _HEADS * key_bytes + _PROMPT_WARPS * 4 * _TILE * _HEADS
    n_units = min((MOST_SHARED - for_all) // for_one, _MOST_UNITS) if cache.value_dim <= _MOST_VALUES else 0
    return max(0, n_units), for_all + n_units * for_one


def inputs(
    q: Heads | None,
    q_out: Rows,
    k: Heads,
    v: Heads | None,
    eps: float,
    rotation: Rotation,
    cache: Cache,
    place: Place,
    count: Count,
) -> Launch:
    """Normalise and rotate heads as each wants, write queries to `q_out` (None: they stay), the others to the cache."""
    check_heads(cache.key_dim, cache.value_dim)
    assert cache.address % 16 == 0
    assert (v is None) == cache.values_in_keys
    assert rotation.n_rot % 2 == 0
    assert rotation.n_rot <= cache.key_dim
    nothing = Heads(NOTHING, 0, 0)
    parts = (q or nothing, k, v or nothing)
    return Launch(
        "attention_inputs.cu",
        "attention_inputs",
        cache.definitions,
        (ceil_div(sum(part.n for part in parts), _INPUT_WARPS), count.most, 1),
        _INPUT_WARPS * WARP,
        (
            parts[0].argument,
            *at(q_out),
            parts[1].argument,
            parts[2].argument,
            float32(eps),
            pointer(rotation.frequencies),
            int32(rotation.n_rot),
            int32(rotation.style == RopeStyle.NORM),
            float32(rotation.magnitude),
            int32(rotation.period),
            cache.argument,
            pointer(place.positions),
            pointer(place.slots),
            pointer(count.address),
        ),
    )


def attend(
    q: Rows,
    out: Rows,
    cache: Cache,
    n_heads: int,
    scale: float,
    sight: Sight,
    scratch: tuple[int, int],
    place: Place,
    count: Count,
    gate: GateOf | None = None,
    forms: Forms = NO_FORMS,
) -> list[Launch]:
    """Attend over the cache: few tokens over parts that are merged, many over all of them, with the same bits.

    `gate` and `forms` are for few tokens only. `scratch` holds addresses, see `scratch_bytes`.
    """
    assert n_heads % cache.n_kv_heads == 0
    assert cache.address % 16 == 0
    check_heads(cache.key_dim, cache.value_dim)
    group, blocks = n_heads // cache.n_kv_heads, _n_head_tiles(cache, n_heads)
    parts, others = n_parts(cache, n_heads, sight), sight.shared or cache
    assert sight.shared is not None or not sight.top_k or not (sight.window or sight.chunk)
    assert sight.shared is None or (cache.values_in_keys and cache.n_kv_heads == sight.block_size == 1)
    assert sight.shared is None or not (sight.chunk or sight.by_head)
    assert others.address % 16 == 0
    lists = sight.definitions
    threads, shared = _WARPS * WARP, _tile_bytes(cache)
    places = (cache.argument, others.argument, pointer(place.positions), pointer(place.slots))
    window = 0 if sight.shared is not None else sight.window
    what = (*at(q), *places, float32(scale), int32(window), int32(sight.chunk), *at(sight.selected))

    def attending(kernel: str, grid: tuple[int, int, int], *arguments: Any) -> Launch:
        by_head = f"BY_HEAD={int(sight.by_head)}"
        definitions = (*cache.definitions, f"GROUP={group}", f"CAP={sight.cap}f", *lists, by_head)
        arguments = (*what, *arguments, pointer(count.address))
        return Launch("attention.cu", kernel, definitions, grid, threads, arguments, shared)

    assert gate is None or gate.limit == 0.0
    if count.most > FEW_TOKENS:
        assert gate is None
        assert forms == NO_FORMS
        merging = (int32(parts), pointer(sight.sinks))
        if count.most > PROMPT_TOKENS and not sight.top_k and sight.shared is None and _prompt_block(cache)[0]:
            return _attend_prompt(q, out, cache, n_heads, scale, sight, parts, place, count)
        return [attending("attend_all", (blocks, count.most, 1), *merging, *at(out))]
    n_cols = n_heads * cache.value_dim
    merged_heads = 1 if cache.value_dim % _MERGED == 0 else min(n_heads, (_MERGED - 2) // cache.value_dim + 2)
    results = tuple(pointer(address) for address in scratch)
    merge = Launch(
        "merge_parts.cu",
        "merge_parts",
        (
            f"VALUE_DIM={cache.value_dim}",
            *lists,
            f"GATE={0 if gate is None else 1 + gate.gating}",
            f"PER_HEAD={int(gate is not None and gate.per_head)}",
            forms.definition,
        ),
        (ceil_div(n_cols, _MERGED), count.most, 1),
        _MERGED,
        (
            *results,
            int32(n_heads),
            int32(parts),
            pointer(sight.sinks),
            pointer(place.positions),
            *at(gate.x if gate else NOTHING),
            int32(gate.step if gate else 0),
            *at(out),
            forms.argument,
            pointer(count.address),
        ),
        16 * merged_heads * ceil_div(parts, WARP) * WARP,
    )
    return [attending("attend", (blocks, parts, count.most), *results), merge]


def _attend_prompt(
    q: Rows,
    out: Rows,
    cache: Cache,
    n_heads: int,
    scale: float,
    sight: Sight,
    parts: int,
    place: Place,
    count: Count,
) -> list[Launch]:
    """Do what `attend` does for many tokens that see all positions, or a window of them; no launch takes too long."""
    group, (n_units, shared) = n_heads // cache.n_kv_heads, _prompt_block(cache)
    units = ceil_div(count.most, max(1, _HEADS // group)) * ceil_div(group, _HEADS)
    blocks = ceil_div(units, n_units)
    products = cache.n_kv_heads * n_units * _HEADS * (cache.key_dim + cache.value_dim) * sight.most_seen(cache.n_rows)
    at_once = max(1, _MOST_PRODUCTS // products)
    definitions = (*cache.definitions, f"GROUP={group}", f"CAP={sight.cap}f", *sight.definitions, "BY_HEAD=0")
    limits = (int32(sight.window), int32(sight.chunk), int32(parts), pointer(sight.sinks))
    return [
        Launch(
            "attention_prompt.cu",
            "attend_prompt",
            (*definitions, f"UNITS={n_units}"),
            (cache.n_kv_heads, min(at_once, blocks - first), 1),
            n_units * _PROMPT_WARPS * WARP,
            (
                *at(q),
                cache.argument,
                pointer(place.positions),
                pointer(place.slots),
                float32(scale),
                *limits,
                *at(out),
                int32(first),
                pointer(count.address),
            ),
            shared,
        )
        for first in range(0, blocks, at_once)
    ]
