"""ERNIE 4.5 MoE (21B-A3B, 300B-A47B): paired rotation, a bias for the choice of experts, plain shared expert."""

from __future__ import annotations

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    return keys.model(tensors, keys.attention("norm"), keys.mixture(tensors))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
