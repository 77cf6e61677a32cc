"""Dequantises every weight format by its formula, slowly, in numpy: the definition that the kernels are tested against.

Each function takes the blocks of one format, uint8 [n, block_bytes], and returns float32 [n, block_size]. The order of
the float32 operations is part of the definition, so results are equal bit for bit. Little-endian throughout.

In the K formats a block of 256 weights is 2 halves x 4 parts of 32 (two bits of one byte each, for one part), while
scales belong to runs of 16 or 32 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.quants.formats import QuantFormat
from engine.quants.grids import load_grid

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice the value


def dequantize(weight_format: QuantFormat, raw: Bytes, n_cols: int) -> Floats:
    """Return float32 [n_rows, n_cols] of uint8 rows [n_rows, row_bytes]."""
    n_rows, row_bytes = raw.shape
    assert row_bytes == weight_format.row_bytes(n_cols)
    blocks = np.ascontiguousarray(raw).reshape(-1, weight_format.block_bytes)
    return _DEQUANTIZE[weight_format.name](blocks).astype(np.float32, copy=False).reshape(n_rows, n_cols)


# -- reading blocks --------------------------------------------------------------------------------------------------


def _field(b: Bytes, offset: int, dtype: str, count: int = 1) -> npt.NDArray[Any]:
    """Return `count` values of a type from every block, [n, count]."""
    size = np.dtype(dtype).itemsize * count
    return np.ascontiguousarray(b[:, offset : offset + size]).view(dtype)


def _half(b: Bytes, offset: int) -> Floats:
    """Return a float16 of every block as float32 [n, 1]."""
    value: Floats = _field(b, offset, "<f2").astype(np.float32)
    return value


def _ints(b: Bytes, offset: int, count: int) -> Ints:
    """Return bytes as int32 [n, count]."""
    return b[:, offset : offset + count].astype(np.int32)


def _nibbles(b: Bytes, offset: int, n_bytes: int, run: int) -> Ints:
    """Return 4-bit values [n, 2 * n_bytes]: of every `run` bytes first all low halves, then all high ones."""
    packed = _ints(b, offset, n_bytes).reshape(len(b), -1, 1, run)
    nibbles: Ints = packed >> np.array([0, 4], np.int32).reshape(2, 1) & 15
    return nibbles.reshape(len(b), -1)


def _pairs(b: Bytes, offset: int, n_bytes: int) -> Ints:
    """Return 2-bit values [n, 4 * n_bytes]: of every 32 bytes first the lowest bits of all, then the next ones."""
    packed = _ints(b, offset, n_bytes).reshape(len(b), -1, 1, 32)
    return (packed >> np.array([0, 2, 4, 6], np.int32).reshape(4, 1) & 3).reshape(len(b), -1)


def _bits(b: Bytes, offset: int, n_bytes: int) -> Ints:
    """Return single bits [n, 8 * n_bytes], lowest first."""
    return np.unpackbits(b[:, offset : offset + n_bytes], axis=1, bitorder="little").astype(np.int32)


def _each(values: Floats, run: int) -> Floats:
    """Repeat every value for the `run` weights that it belongs to."""
    return np.repeat(values, run, axis=1)


# -- plain numbers ---------------------------------------------------------------------------------------------------


def _f32(b: Bytes) -> Floats:
    return b.view("<f4")


def _f16(b: Bytes) -> Floats:
    return b.view("<f2").astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


# -- blocks of 32 (and other small ones) -----------------------------------------------------------------------------


def _q4_0(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b, 2, 16, 16) - 8).astype(np.float32)


def _q4_1(b: Bytes) -> Floats:
    return _half(b, 0) * _nibbles(b, 4, 16, 16).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Floats:
    return _half(b, 0) * ((_nibbles(b, 6, 16, 16) | _bits(b, 2, 4) << 4) - 16).astype(np.float32)


def _q5_1(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b, 8, 16, 16) | _bits(b, 4, 4) << 4).astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Floats:
    return _half(b, 0) * _field(b, 2, "i1", 32).astype(np.float32)


def _iq4_nl(b: Bytes) -> Floats:
    return _half(b, 0) * _IQ4[_nibbles(b, 2, 16, 16)]


def _mxfp4(b: Bytes) -> Floats:
    scale: Floats = np.ldexp(np.float32(1), _ints(b, 0, 1) - 128)
    return scale * _FP4[_nibbles(b, 1, 16, 16)]


def _nvfp4(b: Bytes) -> Floats:
    """4 runs of 16, each with an unsigned 8-bit float: 4 bits of exponent (bias 7), 3 of mantissa."""
    code = _ints(b, 0, 4)
    exponent, mantissa = code >> 3 & 15, code & 7
    scale = np.where(
        exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa.astype(np.float64), -9)
    ).astype(np.float32) * np.float32(0.5)
    scale[code == 0x7F] = 0
    return _each(scale, 16) * _FP4[_nibbles(b, 4, 32, 8)]


def _q1_0(b: Bytes) -> Floats:
    return _half(b, 0) * (2 * _bits(b, 2, 16) - 1).astype(np.float32)


def _q2_0(b: Bytes) -> Floats:
    packed = _ints(b, 2, 16)[:, :, None]
    return _half(b, 0) * ((packed >> np.array([0, 2, 4, 6], np.int32) & 3) - 1).reshape(len(b), 64).astype(np.float32)


# -- K formats: blocks of 256 ----------------------------------------------------------------------------------------


def _q2_k(b: Bytes) -> Floats:
    scales = _ints(b, 0, 16)
    scale = _half(b, 80) * (scales & 15).astype(np.float32)
    minimum = _half(b, 82) * (scales >> 4).astype(np.float32)
    return _each(scale, 16) * _pairs(b, 16, 64).astype(np.float32) - _each(minimum, 16)


def _q3_k(b: Bytes) -> Floats:
    high = _ints(b, 0, 32)[:, None] >> np.arange(8, dtype=np.int32)[:, None] & 1
    quants = _pairs(b, 32, 64) - 4 * (1 - high.reshape(len(b), 256))
    packed = _ints(b, 96, 12)
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    top = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.int32)[:, None] & 3
    scale = _half(b, 108) * ((low | top.reshape(len(b), 16) << 4) - 32).astype(np.float32)
    return _each(scale, 16) * quants.astype(np.float32)


def _six_bit_scales(b: Bytes) -> tuple[Ints, Ints]:
    """Return the 8 scales and 8 minima of a Q4_K or Q5_K block, which share 12 bytes."""
    s = _ints(b, 4, 12)
    scale = np.concatenate([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], axis=1)
    minimum = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], axis=1)
    return scale, minimum


def _scaled_with_minimum(b: Bytes, quants: Ints) -> Floats:
    scale, minimum = _six_bit_scales(b)
    d, dmin = _half(b, 0), _half(b, 2)
    return _each(d * scale.astype(np.float32), 32) * quants.astype(np.float32) - _each(
        dmin * minimum.astype(np.float32), 32
    )


def _q4_k(b: Bytes) -> Floats:
    return _scaled_with_minimum(b, _nibbles(b, 16, 128, 32))


def _q5_k(b: Bytes) -> Floats:
    high = _ints(b, 16, 32)[:, None] >> np.arange(8, dtype=np.int32)[:, None] & 1
    return _scaled_with_minimum(b, _nibbles(b, 48, 128, 32) | high.reshape(len(b), 256) << 4)


def _q6_k(b: Bytes) -> Floats:
    quants = (_nibbles(b, 0, 128, 64) | _pairs(b, 128, 64) << 4) - 32
    scale = _half(b, 208) * _field(b, 192, "i1", 16).astype(np.float32)
    return _each(scale, 16) * quants.astype(np.float32)


def _iq4_xs(b: Bytes) -> Floats:
    run = np.arange(8, dtype=np.int32)
    low = _ints(b, 4, 4)[:, run // 2] >> 4 * (run % 2) & 15
    high = _field(b, 2, "<u2").astype(np.int32) >> 2 * run & 3
    scale = _half(b, 0) * ((low | high << 4) - 32).astype(np.float32)
    return _each(scale, 32) * _IQ4[_nibbles(b, 8, 128, 16)]


# -- ternary formats: blocks of 256 ----------------------------------------------------------------------------------


def _tq1_0(b: Bytes) -> Floats:
    """Five base-3 digits (four in the last bytes) in a byte, as a fraction: times 3, the next one is in the carry."""
    digits = []
    for start, stop, n_digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        packed = b[:, None, start:stop] * np.array([3**i for i in range(n_digits)], np.uint8)[:, None]  # modulo 256
        digits.append((packed.astype(np.int32) * 3 >> 8).reshape(len(b), -1))
    return _half(b, 52) * (np.concatenate(digits, axis=1) - 1).astype(np.float32)


def _tq2_0(b: Bytes) -> Floats:
    return _half(b, 64) * (_pairs(b, 0, 64) - 1).astype(np.float32)


# -- IQ formats: code books, blocks of 256 ---------------------------------------------------------------------------


def _signs(index: Ints) -> Floats:
    """Return +1 or -1 for 8 weights from a 7-bit number each: bit 7 makes the number of set bits even."""
    bits = index[..., None] >> np.arange(8, dtype=np.int32) & 1
    bits[..., 7] = bits[..., :7].sum(-1) & 1
    return (1 - 2 * bits).reshape(len(index), -1).astype(np.float32)


def _sign_bytes(b: Bytes, offset: int) -> Floats:
    return (1 - 2 * _bits(b, offset, 32)).astype(np.float32)


def _book(name: str, index: Ints) -> Floats:
    return load_grid(name)[index].reshape(len(index), 256).astype(np.float32)


def _sign_words(words: npt.NDArray[np.uint32]) -> tuple[Floats, Ints]:
    """Take apart words [n, 8] of four 7-bit sign numbers and a 4-bit scale: signs [n, 256] and scales [n, 8]."""
    index = words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32) & 127
    return _signs(index.reshape(len(words), 32).astype(np.int32)), (words >> 28).astype(np.int32)


def _half_scales(b: Bytes, offset: int, factor: float) -> Floats:
    """Return d * (0.5 + c) * factor for the 16 4-bit scales of a block."""
    c = _nibbles(b, offset, 8, 1)
    scale: Floats = _half(b, 0) * (np.float32(0.5) + c.astype(np.float32)) * np.float32(factor)
    return scale


def _iq2_xxs(b: Bytes) -> Floats:
    words = _field(b, 2, "<u4", 16).reshape(len(b), 8, 2)
    index = np.ascontiguousarray(words[:, :, 0]).view(np.uint8).astype(np.int32)
    signs, c = _sign_words(words[:, :, 1].astype(np.uint32))
    scale = _half(b, 0) * (np.float32(0.5) + c.astype(np.float32)) * np.float32(0.25)
    return _each(scale, 32) * _book("IQ2_XXS", index) * signs


def _iq2_xs(b: Bytes) -> Floats:
    packed = _field(b, 2, "<u2", 32).astype(np.int32)
    return _each(_half_scales(b, 66, 0.25), 16) * _book("IQ2_XS", packed & 511) * _signs(packed >> 9)


def _iq2_s(b: Bytes) -> Floats:
    high = _ints(b, 66, 8)[:, :, None] >> np.array([0, 2, 4, 6], np.int32) & 3
    index = _ints(b, 2, 32) | high.reshape(len(b), 32) << 8
    return _each(_half_scales(b, 74, 0.25), 16) * _book("IQ2_S", index) * _sign_bytes(b, 34)


def _iq3_xxs(b: Bytes) -> Floats:
    signs, c = _sign_words(_field(b, 66, "<u4", 8).astype(np.uint32))
    scale = _half(b, 0) * (np.float32(0.5) + c.astype(np.float32)) * np.float32(0.5)
    return _each(scale, 32) * _book("IQ3_XXS", _ints(b, 2, 64)) * signs


def _iq3_s(b: Bytes) -> Floats:
    index = _ints(b, 2, 64) | _bits(b, 66, 8) << 8
    scale = _half(b, 0) * (1 + 2 * _nibbles(b, 106, 4, 1)).astype(np.float32)
    return _each(scale, 32) * _book("IQ3_S", index) * _sign_bytes(b, 74)


def _iq1(index: Ints, scale: Floats, is_negative: Ints) -> Floats:
    """Return scale * (code + delta); the scale of 16 or 32 weights, the sign of delta for 8 of them."""
    delta = np.where(is_negative, np.float32(-0.125), np.float32(0.125))
    run = 256 // scale.shape[1]
    return _each(scale, run) * (_book("IQ1_S", index) + _each(delta, 256 // delta.shape[1]))


def _iq1_s(b: Bytes) -> Floats:
    h = _field(b, 34, "<u2", 8).astype(np.int32)
    high = h[:, :, None] >> np.array([0, 3, 6, 9], np.int32) & 7
    scale = _half(b, 0) * (2 * (h >> 12 & 7) + 1).astype(np.float32)
    return _iq1(_ints(b, 2, 32) | high.reshape(len(b), 32) << 8, scale, h >> 15)


def _iq1_m(b: Bytes) -> Floats:
    words = _field(b, 48, "<u2", 4).astype(np.int32)
    d = (words >> 12 << np.array([0, 4, 8, 12], np.int32)).sum(1, keepdims=True).astype("<u2").view("<f2")
    c = words[:, :, None] >> np.array([0, 3, 6, 9], np.int32) & 7
    scale = d.astype(np.float32) * (2 * c.reshape(len(b), 16) + 1).astype(np.float32)
    high = _nibbles(b, 32, 16, 1)
    return _iq1(_ints(b, 0, 32) | (high & 7) << 8, scale, high >> 3)


_DEQUANTIZE: dict[str, Callable[[Bytes], Floats]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
