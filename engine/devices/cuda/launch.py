"""The vocabulary of kernel launches: what is launched, and the rows and matrices that are its arguments.

Addresses are device addresses as integers. A `Count` says how many rows exist: the number is read from device memory
by the kernel, so that one recorded launch serves every step, and the grid is made for the most there can be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.quants.formats import QuantFormat

WARP = 32
MOST_SHARED = 99 << 10  # bytes of shared memory that a block may have on every GPU
MAX_MATRICES = 8  # of a launch; `matrices.cuh`
MOST_BLOCKS = (1 << 16) - 1  # of a grid in its second and third direction, on every GPU
PADDING = 16  # bytes that exist before and after every weight matrix; `rows.cuh`
WITH_MINIMUM = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}  # formats; `formats.cuh`
WITH_CODES = {"IQ4_NL", "IQ4_XS", "MXFP4"}  # likewise: HAS_CODES

_ALIGNMENT = {"Q4_K": 16, "Q5_K": 16, "IQ4_XS": 8, "Q2_K": 4, "Q4_1": 4, "Q5_1": 4, "IQ1_M": 4, "F32": 4, "MXFP4": 1}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch. It may begin before the one before it is over: see `begin_kernel` in `common.cuh`.

    Attributes:
        source: file in `cuda/`.
        kernel: name in the file.
        definitions: how the file is specialised.
        grid, block: blocks and threads.
        arguments: ctypes values in the order of the kernel's parameters.
        shared_bytes: dynamic shared memory.
    """

    source: str
    kernel: str
    definitions: tuple[str, ...]
    grid: tuple[int, int, int]
    block: int
    arguments: tuple[Any, ...]
    shared_bytes: int = 0


class Rows(NamedTuple):
    """Float32 rows (or activation rows, then in bytes): address of the first value, and from one row to the next."""

    address: int
    stride: int


class Count(NamedTuple):
    """Rows of an operation: the device address of the number (int32), and the most there can be."""

    address: int
    most: int


class Matrix(NamedTuple):
    """One of the matrices of `linear`. bias is float32 [n_rows] or 0, scale float32 [n_heads] or 0."""

    address: int
    n_rows: int
    out: Rows
    bias: int = 0
    scale: int = 0


class OfFormat(NamedTuple):
    """Matrices of one format, and the address of its code book, 0 for none."""

    format: QuantFormat
    matrices: Sequence[Matrix]
    grid: int = 0


class ExpertMatrix(NamedTuple):
    """One matrix of every expert slot.

    Attributes:
        address: of the matrix in slot 0.
        slot_bytes: from one slot to the next.
        format: of the weights.
        scale: float32 [n_experts], or 0.
        bias: float32 [n_experts, rows], or 0.
    """

    address: int
    slot_bytes: int
    format: QuantFormat
    scale: int = 0
    bias: int = 0


class Heads(NamedTuple):
    """Matrices that follow one another, one for each head: their number, and bytes from one head to the next."""

    n: int
    weight_bytes: int
    x_bytes: int


ONE_HEAD = Heads(1, 0, 0)
NOTHING = Rows(0, 0)


class Kept(NamedTuple):
    """Device addresses: of room for a copy of a sequence's state, and of the row of a step after which it is made.

    The row is -1, or its address 0, for none.
    """

    to: int
    row: int

    @property
    def argument(self) -> Any:
        """Return the kernels' argument."""
        return _Kept(self.to, self.row)


class _Kept(ctypes.Structure):
    _fields_ = [("to", ctypes.c_void_p), ("row", ctypes.c_void_p)]


NOT_KEPT = Kept(0, 0)


# -- arguments --------------------------------------------------------------------------------------------------------

pointer, int64, int32, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def at(rows: Rows) -> tuple[Any, Any]:
    """Return the two arguments that stand for rows."""
    return pointer(rows.address), int64(rows.stride)


def ceil_div(n: int, size: int) -> int:
    """Return how many pieces of a size hold n."""
    return -(-n // size)


def alignment(weight_format: QuantFormat) -> int:
    """Return what the address of a matrix of that format must be a multiple of."""
    return _ALIGNMENT.get(weight_format.name, 2)


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("n_rows", ctypes.c_int32),
        ("out_stride", ctypes.c_int32),
        ("first_block", ctypes.c_int32),
        ("is_second", ctypes.c_int32),
    ]


class _Matrices(ctypes.Structure):
    _fields_ = [("list", _Matrix * MAX_MATRICES), ("n", ctypes.c_int32), ("unused", ctypes.c_int32)]


class _ExpertMatrix(ctypes.Structure):
    _fields_ = [
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


def pack_matrices(of_formats: Sequence[tuple[OfFormat, int]], heads: Heads = ONE_HEAD) -> tuple[Any, int]:
    """Return the argument that says which matrices are multiplied, and the blocks that they all have.

    They are of one format or two, each with the rows that a block takes.
    """
    packed, n_blocks, n = _Matrices(), 0, 0
    for is_second, ((weight_format, matrices, _), rows) in enumerate(of_formats):
        assert heads.n == 1 or (len(matrices) == 1 and not matrices[0].bias and not is_second)
        for m in matrices:
            assert m.address % alignment(weight_format) == 0
            packed.list[n] = _Matrix(
                m.address, m.out.address, m.bias, m.scale, m.n_rows, m.out.stride, n_blocks, is_second
            )
            n_blocks, n = n_blocks + ceil_div(m.n_rows, rows), n + 1
    assert 0 < n <= MAX_MATRICES
    packed.n = n
    return packed, n_blocks


def pack_expert_matrix(matrix: ExpertMatrix, n_cols: int) -> Any:
    """Return one matrix of every slot as an argument; its rows have `n_cols` weights."""
    assert matrix.address % alignment(matrix.format) == 0
    assert matrix.slot_bytes % alignment(matrix.format) == 0
    return _ExpertMatrix(matrix.address, matrix.slot_bytes, matrix.format.row_bytes(n_cols), matrix.scale, matrix.bias)
