"""Launches of the kernels for steps of many tokens: matrix products by tiles, and the experts grouped for them.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from engine.devices import graph
from engine.devices.cuda import kernels
from engine.devices.cuda.launch import (
    MOST_SHARED,
    ONE_HEAD,
    WARP,
    WITH_MINIMUM,
    Count,
    ExpertMatrix,
    Heads,
    Launch,
    Matrix,
    OfFormat,
    Rows,
    alignment,
    at,
    ceil_div,
    int32,
    int64,
    pack_expert_matrix,
    pack_matrices,
    pointer,
)
from engine.quants.formats import Activation, QuantFormat

MIN_TOKENS = 4  # of steps whose experts may be computed by tiles
_MIN_LINEAR_TOKENS = 9  # whose dense products are computed by tiles
_CHOICES_PER_EXPERT = 3  # from which on it pays to group them: reading weights is faster where each choice has its own

_WARP_ROWS, _TOKENS, _STEP = 16, 64, 256  # of a tile; `tiles.cuh`
_MOST_SHARED = MOST_SHARED - 1024  # beside the lists of a tile's rows
_IN_PLACE = frozenset({"Q4_K", "Q5_K", "Q6_K"})  # whose weights go to registers as they lie in memory
_FLOAT_WARPS = 4
_FLOAT_ROWS, _FLOAT_TOKENS = 32, 16  # `linear_float_tiles.cu`
_MANY_BLOCKS = 2048


def has_integer_form(weight_format: QuantFormat) -> bool:
    """Return whether products with a format are sums of integers, which tensor cores can take."""
    return weight_format.activation != Activation.F32


def linear_for(max_tokens: int) -> Callable[..., Launch]:
    """Return what multiplies matrices with the activations of steps of so many tokens fastest."""
    return kernels.linear if max_tokens < _MIN_LINEAR_TOKENS else linear


def _raw_stride(weight_format: QuantFormat) -> int:
    """Return the bytes of 256 columns of a row, from the 16-byte piece on where they begin."""
    n_bytes = _STEP // weight_format.block_size * weight_format.block_bytes
    return (n_bytes + (0 if alignment(weight_format) == 16 else 30)) // 16 * 16


def n_warps(*formats: QuantFormat) -> int:
    """Return the warps of a block that multiplies matrices of these formats: as many as have room on every GPU."""
    return next(n for n in (12, 8, 6, 4) if n == 4 or max(shared_bytes(f, n) for f in formats) <= _MOST_SHARED)


def shared_bytes(weight_format: QuantFormat, n_warps: int) -> int:
    """Return the size of `TileDots<...>::Shared`."""
    n_blocks, raw, stride = _STEP // weight_format.block_size, _raw_stride(weight_format), _STEP + 16
    x = 2 * _TOKENS * (stride + 4 * n_blocks)
    sums = (2 * _TOKENS if weight_format.name in WITH_MINIMUM else 1) * 2 * (_STEP // 16)
    unpacked = _WARP_ROWS * stride + 2 * (_WARP_ROWS if n_blocks == 1 else 1) * (_STEP // 16)
    return x + sums + n_warps * (_WARP_ROWS * raw + (48 if weight_format.name in _IN_PLACE else unpacked))


def linear(
    x: Rows,
    n_cols: int,
    weight_format: QuantFormat,
    matrices: Sequence[Matrix],
    grid: int,
    count: Count,
    heads: Heads = ONE_HEAD,
) -> Launch:
    """Do what `kernels.linear` does, for many tokens, with the same bits."""
    is_integer = has_integer_form(weight_format)
    assert not is_integer or x.address % 16 == x.stride % 16 == heads.x_bytes % 16 == 0
    warps = n_warps(weight_format) if is_integer else _FLOAT_WARPS
    n_rows, n_tokens = (warps * _WARP_ROWS, _TOKENS) if is_integer else (_FLOAT_ROWS, _FLOAT_TOKENS)
    name = "linear_tiles" if is_integer else "linear_float_tiles"
    packed, n_blocks = pack_matrices([(OfFormat(weight_format, matrices), n_rows)], heads)
    return Launch(
        f"{name}.cu",
        name,
        (f"FORMAT={weight_format.name}", *([f"TILE_WARPS={warps}"] if is_integer else [])),
        (n_blocks, ceil_div(count.most, n_tokens), heads.n),
        warps * WARP,
        (packed, *_arguments(x, n_cols, weight_format, grid, count, heads)),
        shared_bytes(weight_format, warps) if is_integer else 0,
    )


def _arguments(
    x: Rows, n_cols: int, weight_format: QuantFormat, grid: int, count: Count, heads: Heads
) -> tuple[Any, ...]:
    """Return what both kernels take after the matrices."""
    return (
        int64(weight_format.row_bytes(n_cols)),
        int64(heads.weight_bytes),
        *at(x),
        int64(heads.x_bytes),
        int32(n_cols),
        pointer(grid),
        pointer(count.address),
    )


# -- experts ----------------------------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """Where the choices of a layer lie once they are sorted by expert; layout in `expert_tiles.cuh`.

    Attributes:
        choices, first_choice: int32 [tokens * n_used] and [n_experts].
        tiles: 16 bytes each, see `n_tiles`.
        first_tile: int32 [groups + 1].
    """

    choices: int
    first_choice: int
    tiles: int
    first_tile: int


class Sizes(NamedTuple):
    """Of a layer's experts; `at_once` is how many pass through a staging buffer together."""

    n_experts: int
    n_used: int
    hidden_size: int
    ffn_size: int
    at_once: int = 1

    @property
    def n_groups(self) -> int:
        """Return the groups that there can be: the experts in slots, and batches of all others."""
        return 1 + ceil_div(self.n_experts, self.at_once)


def pays_to_group(sizes: Sizes, max_tokens: int) -> bool:
    """Return whether the experts of steps of so many tokens are computed faster expert by expert."""
    return max_tokens * sizes.n_used > _CHOICES_PER_EXPERT * sizes.n_experts


def n_tiles(sizes: Sizes, max_tokens: int) -> int:
    """Return how many tiles a step's choices can make: full ones, and one that is not full for each expert."""
    return max_tokens * sizes.n_used // _TOKENS + min(sizes.n_experts, max_tokens * sizes.n_used)


def groups_bytes(sizes: Sizes, max_tokens: int) -> tuple[int, int, int, int]:
    """Return the bytes of the four parts of `Groups`."""
    n_choices = max_tokens * sizes.n_used
    return 4 * n_choices, 4 * sizes.n_experts, 16 * n_tiles(sizes, max_tokens), 4 * (sizes.n_groups + 1)


def group_choices(ids: int, places: int, sizes: Sizes, groups: Groups, count: Count) -> list[Launch]:
    """Sort the choices of a step; places is int32 [n_experts], see `expert_tiles.cuh`."""
    shared = 8 * sizes.n_experts
    assert shared <= 48 << 10
    sort = (
        pointer(ids),
        pointer(places),
        int32(sizes.n_used),
        int32(sizes.n_experts),
        int32(sizes.at_once),
        int32(sizes.n_groups),
        pointer(groups.first_choice),
        pointer(groups.tiles),
        pointer(groups.first_tile),
        pointer(count.address),
    )
    place = (
        pointer(ids),
        int32(sizes.n_used),
        pointer(groups.first_choice),
        pointer(groups.choices),
        pointer(count.address),
    )
    return [
        Launch("group_choices.cu", "group_choices", (), (1, 1, 1), 512, sort, shared),
        Launch("group_choices.cu", "place_choices", (), (sizes.n_experts, 1, 1), 256, place),
    ]


def expert_gate_up(
    groups: Groups,
    group: ctypes.c_int32,
    sizes: Sizes,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    x_gate: Rows,
    x_up: Rows,
    h: int,
    grids: tuple[int, int],
    activation: graph.Activation,
    limit: float,
    up_limit: float,
    most: int,
) -> Launch:
    """First half of the experts of one group: h float32 [tokens * n_used, ffn_size]; activation strides in bytes.

    `most` is how many tiles the group can have. The matrices' addresses are those of the slots (group 0) or of a
    staging buffer. `group` may be changed before each launch.
    """
    assert x_gate.address % 16 == x_gate.stride % 16 == x_up.address % 16 == x_up.stride % 16 == 0
    warps = n_warps(gate.format, up.format)
    return Launch(
        "expert_gate_up_tiles.cu",
        "expert_gate_up_tiles",
        (
            f"GATE_FORMAT={gate.format.name}",
            f"UP_FORMAT={up.format.name}",
            f"ACTIVATION={int(activation)}",
            f"LIMIT={limit}f",
            f"UP_LIMIT={up_limit}f",
            f"TILE_WARPS={warps}",
        ),
        _expert_grid(sizes.ffn_size, most, warps),
        warps * WARP,
        (
            *_group(groups, group, sizes),
            pack_expert_matrix(gate, sizes.hidden_size),
            pack_expert_matrix(up, sizes.hidden_size),
            *at(x_gate),
            *at(x_up),
            int32(sizes.hidden_size),
            int32(sizes.ffn_size),
            pointer(h),
            pointer(grids[0]),
            pointer(grids[1]),
        ),
        max(shared_bytes(weight_format, warps) for weight_format in (gate.format, up.format)),
    )


def expert_down(
    groups: Groups,
    group: ctypes.c_int32,
    sizes: Sizes,
    down: ExpertMatrix,
    h: Rows,
    out: Rows,
    grid: int,
    most: int,
) -> Launch:
    """Second half of the experts of one group; `h` holds activation rows, its stride is in bytes."""
    assert h.address % 16 == h.stride % 16 == 0
    warps = n_warps(down.format)
    return Launch(
        "expert_down_tiles.cu",
        "expert_down_tiles",
        (f"DOWN_FORMAT={down.format.name}", f"TILE_WARPS={warps}"),
        _expert_grid(sizes.hidden_size, most, warps),
        warps * WARP,
        (
            *_group(groups, group, sizes),
            pack_expert_matrix(down, sizes.ffn_size),
            *at(h),
            int32(sizes.hidden_size),
            int32(sizes.ffn_size),
            *at(out),
            pointer(grid),
        ),
        shared_bytes(down.format, warps),
    )


def _group(groups: Groups, group: ctypes.c_int32, sizes: Sizes) -> tuple[object, ...]:
    places = (pointer(groups.tiles), pointer(groups.first_tile), group, pointer(groups.choices))
    return (*places, int32(sizes.n_used))


def _expert_grid(n_rows: int, most: int, n_warps: int) -> tuple[int, int, int]:
    """Return a grid that fills any GPU a few times; blocks go on to further tiles."""
    n_blocks = ceil_div(n_rows, n_warps * _WARP_ROWS)
    return n_blocks, min(most, max(8, ceil_div(_MANY_BLOCKS, n_blocks))), 1
