"""Weight formats as a table of facts: ids, block sizes, and how activations meet them.

Everything that depends on a format looks it up here, by `ggml_type` (the id in the file) or by name.
The C side has the same ids and sizes (`kernels/blocks.h`, asserted at compile time; a test compares both).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from engine.errors import UnsupportedModelError


class Activation(enum.IntEnum):
    """What an activation row is turned into before it meets a weight row (values shared with C)."""

    F32 = 0  # used as it is, in float32 arithmetic
    Q8_256 = 1  # int8 with one float32 scale per 256 values, and int16 sums per 16 values
    Q8_32 = 2  # int8 with one float32 scale per 32 values, and int16 sums per 16 values


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """One GGUF tensor type.

    Attributes:
        name: as written in GGUF tools, for example `Q4_K`.
        ggml_type: the type id stored in the file.
        block_size: weights in a block; a row is a whole number of blocks.
        block_bytes: bytes of a block.
        activation: the form the activations take in a product with this format.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    activation: Activation

    def row_bytes(self, n_cols: int) -> int:
        """Return the bytes of a row of `n_cols` weights; raise `UnsupportedModelError` if it is not whole blocks."""
        if n_cols % self.block_size:
            raise UnsupportedModelError(
                f"a row of {n_cols} weights cannot be {self.name}: expected a multiple of {self.block_size}"
            )
        return n_cols // self.block_size * self.block_bytes


_F32, _Q256, _Q32 = Activation.F32, Activation.Q8_256, Activation.Q8_32

FORMATS: tuple[QuantFormat, ...] = (
    QuantFormat("F32", 0, 1, 4, _F32),
    QuantFormat("F16", 1, 1, 2, _F32),
    QuantFormat("Q4_0", 2, 32, 18, _Q32),
    QuantFormat("Q4_1", 3, 32, 20, _Q32),
    QuantFormat("Q5_0", 6, 32, 22, _Q32),
    QuantFormat("Q5_1", 7, 32, 24, _Q32),
    QuantFormat("Q8_0", 8, 32, 34, _Q32),
    QuantFormat("Q2_K", 10, 256, 84, _Q256),
    QuantFormat("Q3_K", 11, 256, 110, _Q256),
    QuantFormat("Q4_K", 12, 256, 144, _Q256),
    QuantFormat("Q5_K", 13, 256, 176, _Q256),
    QuantFormat("Q6_K", 14, 256, 210, _Q256),
    QuantFormat("IQ2_XXS", 16, 256, 66, _Q256),
    QuantFormat("IQ2_XS", 17, 256, 74, _Q256),
    QuantFormat("IQ3_XXS", 18, 256, 98, _Q256),
    QuantFormat("IQ1_S", 19, 256, 50, _Q256),
    QuantFormat("IQ4_NL", 20, 32, 18, _Q32),
    QuantFormat("IQ3_S", 21, 256, 110, _Q256),
    QuantFormat("IQ2_S", 22, 256, 82, _Q256),
    QuantFormat("IQ4_XS", 23, 256, 136, _Q256),
    QuantFormat("IQ1_M", 29, 256, 56, _Q256),
    QuantFormat("BF16", 30, 1, 2, _F32),
    QuantFormat("TQ1_0", 34, 256, 54, _F32),
    QuantFormat("TQ2_0", 35, 256, 66, _F32),
    QuantFormat("MXFP4", 39, 32, 17, _Q32),
    QuantFormat("NVFP4", 40, 64, 36, _F32),
    QuantFormat("Q1_0", 41, 128, 18, _F32),
    QuantFormat("Q2_0", 42, 64, 18, _F32),
)

# No format of weights: what tables of numbers hold.
I32 = QuantFormat("I32", 26, 1, 4, _F32)

BY_TYPE: dict[int, QuantFormat] = {f.ggml_type: f for f in FORMATS}
BY_NAME: dict[str, QuantFormat] = {f.name: f for f in FORMATS}
