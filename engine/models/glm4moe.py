"""GLM-4.5 to 4.7 and Air: sigmoid router with a bias for the choice, plain shared expert, a dense layer first."""

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
    return decoder(spec, tensors, self_attention, ffn_norm="post_attention_norm.weight")
