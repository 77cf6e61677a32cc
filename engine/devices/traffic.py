"""Counts the weights of a forward pass and the bytes of them that one token has to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from engine.devices import graph as ops
from engine.devices.graph import Graph, Weight


@dataclass(frozen=True, slots=True)
class WeightTraffic:
    """Weights in bytes; the limit of decode speed is memory bandwidth over `token_bytes`.

    Attributes:
        dense_bytes: matrices that every token reads whole.
        expert_bytes: all routed experts.
        chosen_bytes: the routed experts that one token uses.
        expert_layers: MoE layers.
        by_format: bytes of all matrices by format name, the largest share first; those of a head that drafts tokens,
            too, which no token need read.
    """

    dense_bytes: int
    expert_bytes: int
    chosen_bytes: int
    expert_layers: int
    by_format: dict[str, int]

    @property
    def token_bytes(self) -> int:
        """Return the bytes of weights that making one token reads."""
        return self.dense_bytes + self.chosen_bytes

    @property
    def quant_mix(self) -> str:
        """Return the formats and their shares for people."""
        total = sum(self.by_format.values())
        return ", ".join(f"{name} {n_bytes / total:.0%}" for name, n_bytes in self.by_format.items())


def count_weights(graph: Graph) -> WeightTraffic:
    """Walk a recorded forward pass; vectors (norms, biases) are left out: they are less than a thousandth."""
    dense = experts = layers = 0
    chosen = 0.0
    by_format: Counter[str] = Counter()
    seen: set[tuple[str, int]] = set()
    for operation in graph.operations:
        if isinstance(operation, ops.Linear):
            dense += sum(weight.n_bytes for weight in operation.weights)
        elif isinstance(operation, ops.Experts):
            n_bytes = sum(weight.n_bytes for weight in operation.stacks)
            layers += graph.has_slots(operation)
            experts += n_bytes
            chosen += n_bytes * operation.routing.ids.width / operation.routing.n_experts
        elif isinstance(operation, ops.Embed):
            n_rows = operation.out.width // operation.table.n_cols
            dense += n_rows * operation.table.format.row_bytes(operation.table.n_cols)
    for operation in (*graph.operations, *(graph.draft.operations if graph.draft else ())):
        for weight in _matrices(operation):
            if (weight.name, weight.first_row) not in seen:  # an embedding table may be the output matrix too
                seen.add((weight.name, weight.first_row))
                by_format[weight.format.name] += weight.n_bytes
    return WeightTraffic(dense, experts, int(chosen), layers, dict(by_format.most_common()))


def _matrices(operation: ops.Operation) -> tuple[Weight, ...]:
    if isinstance(operation, ops.Linear):
        return operation.weights
    if isinstance(operation, ops.Experts):
        return operation.stacks
    return (operation.table,) if isinstance(operation, ops.Embed) else ()
