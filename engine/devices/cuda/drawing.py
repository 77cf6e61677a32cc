"""Drawing tokens from logits where these are made: what that needs on the device, and its launches.

A token costs the host a few microseconds then: no logits cross PCIe, and no thread looks at a quarter of a million of
them. Tokens and bits are those of `_kernels.sample`.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from engine.devices.cuda.launch import WARP, Count, Launch, Rows, ceil_div, pointer
from engine.devices.cuda.recorder import Recorder

_MOST_HANDS = 1024  # `draw.cu`, as all below
_FINDERS = 256  # threads of a block that finds maxima
_THREADS = 1024  # of one that draws
_LOGITS_PER_BLOCK = 2048  # that it adds up


class _Logits(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("allowed", ctypes.c_void_p),
        ("draws", ctypes.c_void_p),
        ("maxima", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("n_done", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("n_hands", ctypes.c_int32),
    ]


def as_bits(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Return bools as bits of words, the first one the lowest."""
    padded = np.zeros(ceil_div(len(allowed), 32) * 32, np.bool_)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


class Drawing:
    """Places on the device for drawing from up to `n_rows` rows of `n_vocab` logits.

    Attributes:
        n_rows: of a step, at most.
        allowed: offset of the bits that say which tokens may be drawn.
    """

    def __init__(self, recorder: Recorder, n_rows: int, n_vocab: int) -> None:
        self.n_rows, self.n_vocab = n_rows, n_vocab
        self.allowed = recorder.constant("allowed", lambda: as_bits(np.ones(n_vocab, np.bool_)))
        self._maxima = recorder.constant("maxima", lambda: np.zeros(n_rows * _MOST_HANDS, np.float32))
        self._counters = recorder.constant("sums", lambda: np.zeros(n_rows * 12, np.uint8))  # sums, then numbers

    def launches(self, base: int, logits: Rows, draws: int, chosen: int, count: Count) -> list[Launch]:
        """Return the launches that draw.

        Args:
            base: address of the allocation.
            logits: the rows.
            draws: address of how, `program.DRAW` for each row.
            chosen: address of where the tokens go, int32 for each row; -1 is a draw that takes all logits.
            count: rows.
        """
        assert count.most <= self.n_rows
        return launches(
            logits,
            self.n_vocab,
            base + self.allowed,
            draws,
            base + self._maxima,
            base + self._counters,
            base + self._counters + 8 * self.n_rows,
            chosen,
            count,
        )


def launches(
    logits: Rows,
    n_vocab: int,
    allowed: int,
    draws: int,
    maxima: int,
    sums: int,
    n_done: int,
    chosen: int,
    count: Count,
) -> list[Launch]:
    """Return the launches that draw a token from each row. maxima: 1024 floats a row; sums and n_done: zeros."""
    n_hands = min(_MOST_HANDS, ceil_div(n_vocab, WARP))
    argument = _Logits(*logits, allowed, draws, maxima, sums, n_done, n_vocab, n_hands)
    find = (ceil_div(n_hands, _FINDERS // WARP), count.most, 1)
    draw = (ceil_div(n_vocab, _LOGITS_PER_BLOCK), count.most, 1)
    return [
        Launch("draw.cu", "find_maxima", (), find, _FINDERS, (argument, pointer(count.address))),
        Launch("draw.cu", "draw", (), draw, _THREADS, (argument, pointer(chosen), pointer(count.address))),
    ]
