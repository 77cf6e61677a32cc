"""OLMoE (OLMoE-1B-7B): queries and keys normalised over all heads together, weights not normalised."""

from __future__ import annotations

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    return keys.model(tensors, keys.attention(), keys.mixture(tensors, normalize=False))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
