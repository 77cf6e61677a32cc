"""Ling and Ring 2 (mini, flash): partial rotation, experts chosen from the best groups, plain shared expert."""

from __future__ import annotations

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    moe = keys.mixture(
        tensors,
        scoring=keys.scoring("sigmoid"),
        normalize=keys.flag("expert_weights_norm", False),
        scale=keys.weights_scale(),
    )
    return keys.model(tensors, keys.attention(), moe)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
