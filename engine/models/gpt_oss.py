"""gpt-oss (20b, 120b): sliding windows on every other layer, attention sinks, biased experts with clamped swish."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = replace(keys.attention(), windows=keys.windows(keys.n_layers(), period=2))
    return keys.model(tensors, attention, keys.mixture(tensors, scoring="softmax_of_chosen", normalize=False))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(
        spec, tensors, self_attention, ffn_norm="post_attention_norm.weight", activation=Activation.CLAMPED_SWISH
    )
