"""The experts of a layer, where they lie on the device, what the kernels know of it, and how others pass through it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.devices import graph as ops
from engine.devices.cuda.kernels import Exchange
from engine.devices.cuda.launch import Launch
from engine.devices.cuda.places import Layout, Pass, aligned
from engine.devices.footprint import lends_from
from engine.devices.graph import Routing, Vector, Weight


@dataclass(slots=True)
class ExpertLayer:
    """The experts of one layer: their weights in the model file, and their slots on the device.

    The three matrices of a slot lie one behind the other. Kernels know a slot by its place: how many times the size of
    an expert it lies behind the first. Slots that are kept follow one another; those that are lent to long steps lie
    in the memory that these use, so many places further on.

    Attributes:
        op: the operation.
        n_slots: how many there are.
        n_kept: those of them, the first ones, that exist in steps that stream experts, too.
        slot_bytes: what each of the three matrices takes.
        offset: of the first slot.
        first_lent: place of the first slot that is lent.
    """

    op: ops.Experts
    n_slots: int
    n_kept: int
    slot_bytes: list[int] = field(init=False)
    offset: int = 0
    first_lent: int = 0

    def __post_init__(self) -> None:
        """Work out the sizes."""
        self.slot_bytes = [aligned(w.n_rows * w.format.row_bytes(w.n_cols)) for w in self.weights]

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
        """Return whether every expert always has a slot; expert e is in slot e then."""
        return self.n_kept == self.n_experts

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of a slot."""
        return sum(self.slot_bytes)

    def place(self, slot: int) -> int:
        """Return the number that kernels know a slot by."""
        return slot if slot < self.n_kept else self.first_lent + slot - self.n_kept

    def first_place(self, matrix: int) -> int:
        """Return the offset of a matrix (0 gate, 1 up, 2 down) at place 0, which only exists if slots are kept."""
        return self.offset + sum(self.slot_bytes[:matrix])

    def slot_offset(self, matrix: int, slot: int) -> int:
        """Return the offset of a matrix in a slot."""
        return self.first_place(matrix) + self.place(slot) * self.expert_bytes

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


class ExpertTables:
    """The experts of all layers, and what tells kernels who is where and who was chosen.

    Attributes:
        layers: in the order of the forward pass.
        n_experts: the most that a layer has.
        n_used: how many each token takes, in any layer.
        hidden_size: of what goes into them.
        at_once: how many pass through a staging buffer.
        slot_table: offset of the places of all experts, int32 [n_moe_layers, n_experts].
        chosen: offset of the choices of a step, int32 [n_moe_layers, rows that its launches are made for, n_used].
        n_misses: offset of the word (int32) in which a layer notes whether it asked the CPU for anything.
        asks_early: by the ids of a layer: whether the launch that chooses its experts asks the CPU, too.
    """

    def __init__(self, layers: Sequence[ExpertLayer], layout: Layout, max_tokens: int, at_once: int) -> None:
        """Give the tables their places."""
        self.layers = layers
        self.n_experts = max((layer.n_experts for layer in layers), default=0)
        self.n_used = max((layer.op.routing.ids.width for layer in layers), default=0)
        self.hidden_size = layers[0].op.x.width if layers else 0
        self.at_once = at_once
        self.slot_table = layout.reserve(4 * max(1, len(layers) * self.n_experts))
        self.chosen = layout.reserve(4 * max(1, len(layers) * max_tokens * self.n_used))
        self.n_misses = layout.reserve(4)
        self.asks_early: dict[object, Callable[[Pass], bool]] = {}
        self._numbers = {layer.op.routing.ids.buffer: i for i, layer in enumerate(layers)}

    def number(self, routing: Routing) -> int:
        """Return which layer it is whose experts are chosen so."""
        return self._numbers[routing.ids.buffer]

    def ids(self, routing: Routing, p: Pass) -> int:
        """Return the address of the ids of a layer, which are kept for the caller; rows as they are in this pass."""
        return p.base + self.chosen + 4 * self.number(routing) * p.most * self.n_used

    def slots(self, routing: Routing, p: Pass) -> int:
        """Return the address of the places of a layer's experts."""
        return p.base + self.slot_table + 4 * self.number(routing) * self.n_experts

    def exchange(self, routing: Routing, p: Pass) -> Exchange | None:
        """Return what a layer shares with the CPU, if that computes some of its experts."""
        number = self.number(routing)
        if p.exchange is None or self.layers[number].is_resident:
            return None
        return p.exchange._replace(layer=number)


def place_kept(layers: Sequence[ExpertLayer], start: int) -> int:
    """Give the kept slots of all layers their memory from an offset on; return where it ends.

    Layers whose experts have the same size follow one another, the largest last: so that in the memory behind, places
    of the same size fall on the same offsets, those of the largest on its beginning.
    """
    for layer in sorted(layers, key=lambda layer: layer.expert_bytes):
        layer.offset = start
        start += layer.n_kept * layer.expert_bytes
    return start


def place_lent(layers: Sequence[ExpertLayer], start: int) -> int:
    """Give the lent slots of all layers places from an offset on, which is behind all kept ones; return the end."""
    for layer in sorted(layers, key=lambda layer: -layer.expert_bytes):
        layer.first_lent = -((layer.offset - start) // layer.expert_bytes)
        if layer.n_slots > layer.n_kept:
            start = layer.offset + (layer.first_lent + layer.n_slots - layer.n_kept) * layer.expert_bytes
    return start


def gap_bytes(layers: Sequence[ExpertLayer]) -> int:
    """Return what `place_lent` may have to leave between slots of different sizes."""
    sizes = {layer.expert_bytes for layer in layers}
    return sum(sizes) - max(sizes, default=0)


@dataclass(frozen=True, slots=True)
class Staging:
    """The ring that experts without a slot pass through while a step of many tokens runs.

    Attributes:
        n_buffers: of the ring.
        at_once: experts in each.
        from_n_tokens: steps of so many tokens or more stream experts.
    """

    n_buffers: int
    at_once: int
    from_n_tokens: int

    @property
    def lends_from(self) -> int:
        """Return from how many tokens on a step uses the memory of lent slots."""
        return lends_from(self.from_n_tokens)


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
