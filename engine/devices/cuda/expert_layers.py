"""The experts of a layer, where they lie on the device, and how those without a slot pass through it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.devices import graph as ops
from engine.devices.cuda.launch import Launch
from engine.devices.graph import Vector, Weight


@dataclass(slots=True)
class ExpertLayer:
    """The experts of one layer: their weights in the model file, and their slots on the device.

    Attributes:
        op: the operation.
        n_slots: how many there are.
        slots: offset of the first slot, for each of the three.
        slot_bytes: likewise.
    """

    op: ops.Experts
    n_slots: int
    slots: list[int] = field(default_factory=list)
    slot_bytes: list[int] = field(default_factory=list)

    @property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        """Return gate, up and down."""
        return self.op.gate, self.op.up, self.op.down

    @property
    def biases(self) -> tuple[Vector | None, Vector | None, Vector | None]:
        """Return those of gate, up and down."""
        return self.op.gate_bias, self.op.up_bias, self.op.down_bias

    @property
    def n_experts(self) -> int:
        """Return how many experts the layer has."""
        return self.op.routing.n_experts

    @property
    def is_resident(self) -> bool:
        """Return whether every expert has a slot; expert e is in slot e then."""
        return self.n_slots == self.n_experts

    def expert(self, array: npt.NDArray[np.uint8], matrix: int, expert: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of one expert's matrix (0 gate, 1 up, 2 down) in its tensor."""
        weight = self.weights[matrix]
        row_bytes = weight.format.row_bytes(weight.n_cols)
        first = (expert * (weight.stored_rows or weight.n_rows) + weight.first_row) * row_bytes
        return array[first : first + weight.n_rows * row_bytes]

    def batch_bytes(self, at_once: int) -> int:
        """Return the bytes of a staging buffer for so many experts: for their gate and up, or for their down."""
        gate, up, down = self.slot_bytes
        return at_once * max(gate + up, down)

    def staged(self, matrices: Sequence[int], at_once: int) -> list[int]:
        """Return where, in a staging buffer of so many experts, the first expert's matrices lie."""
        sizes = [at_once * self.slot_bytes[i] for i in matrices]
        return [sum(sizes[:i]) for i in range(len(sizes))]


@dataclass(frozen=True, slots=True)
class Staging:
    """The ring that experts without a slot pass through while a step of many tokens runs: buffers, experts in each."""

    n_buffers: int
    at_once: int


@dataclass(frozen=True, slots=True)
class Streamed:
    """A launch that is made once for each batch of the experts of a layer that have no slot.

    Attributes:
        layer: of the expert layers.
        matrices: which it reads (0 gate, 1 up, 2 down).
        group: its argument that says which batch, to be set before it is launched.
        launches: one for each staging buffer.
    """

    layer: int
    matrices: tuple[int, ...]
    group: ctypes.c_int32
    launches: tuple[Launch, ...]
