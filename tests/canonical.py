"""The canonical arithmetic (`ARCHITECTURE.md`, "One arithmetic"), slow and plain: what every kernel's bits must be."""

from __future__ import annotations

import numpy as np

from engine.quants import reference
from engine.quants.formats import Activation, QuantFormat

GROUP = {Activation.Q8_256: 256, Activation.Q8_32: 32}

# Where the float16 scale and the offset or minimum of a block lie. MXFP4 and IQ1_M are special.
SCALE_AT = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "IQ4_XS"), 0),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), 0),
    "Q2_K": 80,
    "Q3_K": 108,
    "Q6_K": 208,
}
_FRACTIONS = {"IQ2": 8, "IQ3_XXS": 4, "IQ1": 8}  # the scale is in eighths or quarters
OFFSET_AT = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2, "Q2_K": 82}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with one rounding.

    The product is exact in float64; the sum is rounded to odd there, which makes the rounding to float32 right.
    """
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.where((error != 0) & is_even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


def quantize(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 values in [-127, 127] and float32 scales [n, n_groups] of float32 rows."""
    grouped = x.reshape(len(x), -1, group)
    largest = np.abs(grouped).max(-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0)).astype(np.float32)
    q = np.clip(np.rint(grouped * inverse[..., None]), -127, 127)
    return q.astype(np.int64).reshape(x.shape), (largest / np.float32(127)).astype(np.float32)


def matmul(fmt: QuantFormat, raw: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float32 [n_tokens, n_rows]; raw uint8 [n_rows, row_bytes], x float32 [n_tokens, n_cols]."""
    if fmt.activation == Activation.F32:
        return _float_matmul(reference.dequantize(fmt, raw, x.shape[1]), x)
    n_rows, n_tokens, size = len(raw), len(x), fmt.block_size
    q, d_x = quantize(x, GROUP[fmt.activation])
    q = q.reshape(n_tokens, -1, size)
    blocks = raw.reshape(-1, fmt.block_bytes)
    d_w, scaled, factor = _scales(fmt, blocks)
    isums = np.einsum("rbk,tbk->btr", scaled.reshape(n_rows, -1, size), q)
    d_w = d_w.reshape(n_rows, -1)
    acc = np.zeros((n_tokens, n_rows), np.float32)
    offset = _offsets(fmt, blocks)
    if offset is not None:
        m_w, units = offset[0].reshape(n_rows, -1), offset[1].reshape(n_rows, -1, size)
        imins = np.einsum("rbk,tbk->btr", units, q)
    for b in range(q.shape[1]):
        acc = fma(d_w[:, b] * d_x[:, b : b + 1], isums[b].astype(np.float32) * factor, acc)
        if offset is not None:
            acc = fma(m_w[:, b] * d_x[:, b : b + 1], imins[b].astype(np.float32), acc)
    return acc


def _scales(fmt: QuantFormat, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Scales float32 [n], integers int64 [n, block_size] and a power of two: weight = scale * factor * integer.

    The integers are what the block holds when its scale is 1 and its offset 0.
    """
    unit = blocks.copy()
    if fmt.name == "MXFP4":
        unit[:, 0] = 128
        d = np.ldexp(np.float32(1), blocks[:, 0].astype(int) - 128).astype(np.float32)
    elif fmt.name == "IQ1_M":
        words = blocks[:, 48:56].copy().view("<u2")
        bits = (words[:, 0] >> 12) | (words[:, 1] >> 8 & 0xF0) | (words[:, 2] >> 4 & 0xF00) | (words[:, 3] & 0xF000)
        d = bits.astype("<u2").view("<f2").astype(np.float32)
        words &= 0x0FFF
        words |= np.array([0, 0, 0xC, 0x3], np.uint16) << 12  # 0x3C00 is 1
        unit[:, 48:56] = words.view(np.uint8)
    else:
        at = SCALE_AT[fmt.name]
        d = blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)[:, 0]
        unit[:, at : at + 2] = np.float16([1]).view(np.uint8)
    if fmt.name in OFFSET_AT:
        unit[:, OFFSET_AT[fmt.name] :][:, :2] = 0
    values = reference.dequantize(fmt, unit, fmt.block_size).astype(np.float64)
    factor = next((n for prefix, n in _FRACTIONS.items() if fmt.name.startswith(prefix)), 1)
    integers = values * factor
    assert (integers == np.rint(integers)).all()
    return d, integers.astype(np.int64), np.float32(1 / factor)


def _offsets(fmt: QuantFormat, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Offsets float32 [n], and the integers int64 [n, block_size] they are multiplied by; None without offsets."""
    if fmt.name not in OFFSET_AT:
        return None
    at, scale_at = OFFSET_AT[fmt.name], SCALE_AT[fmt.name]
    unit = blocks.copy()
    unit[:, scale_at : scale_at + 2] = 0
    unit[:, at : at + 2] = np.float16([1]).view(np.uint8)
    m = blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)[:, 0]
    return m, reference.dequantize(fmt, unit, fmt.block_size).astype(np.int64)


def _float_matmul(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    n_cols = x.shape[1]
    acc = np.zeros((len(x), len(w), 16), np.float32)
    for first in range(0, n_cols, 16):
        n = min(16, n_cols - first)
        acc[..., :n] = fma(w[None, :, first : first + n], x[:, None, first : first + n], acc[..., :n])
    while acc.shape[-1] > 1:
        half = acc.shape[-1] // 2
        acc = acc[..., :half] + acc[..., half:]
    return acc[..., 0]
