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
from engine.devices.cuda.places import ALIGNMENT, Layout, Pass, aligned
from engine.devices.graph import Routing, Tensor, Vector, Weight

PLACE_BYTES = ALIGNMENT  # so an int32 reaches half a terabyte far


@dataclass(slots=True)
class ExpertLayer:
    """The experts of one layer: their weights in the model file, and their slots on the device.

    The matrices of a slot (`ops.Experts.stacks`) lie one behind the other, the slots anywhere in the device's memory:
    kernels know a slot by its place, the offset in units of `PLACE_BYTES`.

    Attributes:
        op: the operation.
        n_kept: slots that always exist, the first ones.
        n_in_contexts: those that lie in the memory of contexts, the next ones.
        n_lent: those that lie in the memory of long steps, the last ones.
        slot_bytes: what each of the matrices takes.
        offsets: of the slots, to be set by whoever lays them out.
    """

    op: ops.Experts
    n_kept: int
    n_in_contexts: int
    n_lent: int
    slot_bytes: list[int] = field(init=False)
    offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Work out the sizes."""
        self.slot_bytes = [aligned(w.n_rows * w.format.row_bytes(w.n_cols)) for w in self.weights]

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Return the matrices of all experts."""
        return self.op.stacks

    @property
    def projections(self) -> tuple[tuple[int, Weight, Vector | None], ...]:
        """Return gate, up and down: which matrix it is, and its bias."""
        biases = self.op.gate_bias, self.op.up_bias, self.op.down_bias
        return tuple((i, self.weights[i], bias) for i, bias in zip(self.op.places, biases, strict=True))

    @property
    def halves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the matrices that the first half of the network reads, and those of the second."""
        last = len(self.weights) - 1
        return tuple(range(last)), (last,)

    @property
    def n_experts(self) -> int:
        """Return how many experts the layer has."""
        return self.op.routing.n_experts

    @property
    def n_slots(self) -> int:
        """Return how many slots there are."""
        return self.n_kept + self.n_in_contexts + self.n_lent

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
        return self.offsets[slot] // PLACE_BYTES

    def matrix_offset(self, matrix: int) -> int:
        """Return where in a slot a matrix lies."""
        return sum(self.slot_bytes[:matrix])

    def expert(self, array: npt.NDArray[np.uint8], matrix: int, expert: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of one expert's matrix in its tensor."""
        first, stride, n_bytes = self.stretch(matrix)
        return array[first + expert * stride :][:n_bytes]

    def stretch(self, matrix: int) -> tuple[int, int, int]:
        """Return where in its tensor the first expert's matrix begins, how far it is to the next, and its bytes."""
        weight = self.weights[matrix]
        row_bytes = weight.format.row_bytes(weight.n_cols)
        return (
            weight.first_row * row_bytes,
            (weight.stored_rows or weight.n_rows) * row_bytes,
            weight.n_rows * row_bytes,
        )

    def batch_bytes(self, at_once: int) -> int:
        """Return the bytes of a staging buffer for so many experts: for their gate and up, or for their down."""
        return at_once * max(sum(self.slot_bytes[i] for i in half) for half in self.halves)

    def staged(self, matrices: Sequence[int], at_once: int) -> list[int]:
        """Return where, in a staging buffer of so many experts, the first expert's matrices lie."""
        sizes = [at_once * self.slot_bytes[i] for i in matrices]
        return [sum(sizes[:i]) for i in range(len(sizes))]


class ExpertTables:
    """The experts of all layers, and what tells kernels who is where and who was chosen.

    Attributes:
        layers: in the order of the forward pass; behind them that of the head that drafts tokens, if there is one.
        n_step_layers: those that steps have.
        n_experts: the most that a layer has.
        n_used: how many each token takes, in the layer that uses most.
        hidden_size: of what goes into them.
        at_once: how many pass through a staging buffer.
        slot_table: offset of the places of all experts, int32 [n_moe_layers, n_experts].
        chosen: offset of the choices of a step, int32 [n_moe_layers, rows that its launches are made for, n_used].
        n_misses: offset of the word (int32) in which a layer notes whether it asked the CPU for anything.
        n_guessed: the same for a guess.
        asks_early: by the ids of a layer: whether the launch that chooses its experts asks the CPU, too.
        next_routers: by the number of a layer: what its router takes, and the router whose choice is guessed with that,
            the next layer's, with what gives its logits.
        guess_biases: by the name of a router's bias: what its copy is called that guesses use.
    """

    def __init__(
        self, layers: Sequence[ExpertLayer], layout: Layout, max_tokens: int, at_once: int, n_step_layers: int
    ) -> None:
        """Give the tables their places."""
        self.layers, self.n_step_layers = layers, n_step_layers
        self.n_experts = max((layer.n_experts for layer in layers), default=0)
        self.n_used = max((layer.op.routing.ids.width for layer in layers), default=0)
        self.hidden_size = layers[0].op.x.width if layers else 0
        self.at_once = at_once
        self.slot_table = layout.reserve(4 * max(1, self.n_places))
        self.chosen = layout.reserve(4 * max(1, len(layers) * max_tokens * self.n_used))
        self.n_misses = layout.reserve(4)
        self.n_guessed = layout.reserve(4)
        self.asks_early: dict[object, Callable[[Pass], bool]] = {}
        self.next_routers: dict[int, tuple[Tensor, ops.Linear, ops.Router]] = {}
        self.guess_biases: dict[str, str] = {}
        self._numbers = {layer.op.routing.ids.buffer: i for i, layer in enumerate(layers)}

    @property
    def step_layers(self) -> Sequence[ExpertLayer]:
        """Return the layers whose experts may be in slots that a cache fills."""
        return self.layers[: self.n_step_layers]

    @property
    def are_alike(self) -> bool:
        """Return whether steps use as many experts in every layer."""
        return all(layer.op.routing.ids.width == self.n_used for layer in self.step_layers)

    @property
    def n_places(self) -> int:
        """Return the words of the slot table."""
        return len(self.layers) * self.n_experts

    def has(self, routing: Routing) -> bool:
        """Return whether experts that are chosen so are in the tables; others are where the dense weights are."""
        return routing.ids.buffer in self._numbers

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
        if p.exchange is None or not self.has(routing) or self.layers[self.number(routing)].is_resident:
            return None
        return p.exchange._replace(layer=self.number(routing))


def place_slots(layers: Sequence[ExpertLayer], start: int, n_slots: Callable[[ExpertLayer], int]) -> int:
    """Give the slots of each layer up to so many a place from an offset on; return the end."""
    for layer in layers:
        for _ in range(n_slots(layer)):
            layer.offsets.append(start)
            start += layer.expert_bytes
    return start


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


@dataclass(frozen=True, slots=True)
class Streamed:
    """A launch that is made once for each batch of the experts of a layer that have no slot.

    Attributes:
        layer: of the expert layers.
        matrices: which it reads.
        group: its argument that says which batch, to be set before it is launched.
        launches: one for each staging buffer.
    """

    layer: int
    matrices: tuple[int, ...]
    group: ctypes.c_int32
    launches: tuple[Launch, ...]
