"""Mellum 2 (12B-A2.5B): three layers with a sliding window to one without; only the latter stretch their rotation."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

_PERIOD = 4  # of the layers without a window


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = keys.attention()
    if keys.size("attention.sliding_window", 0, minimum=0):
        plain = replace(attention.rope, scaling="none", magnitude=1.0)
        attention = replace(attention, windows=keys.windows(keys.n_layers(), _PERIOD), window_rope=plain)
    return keys.model(tensors, attention, keys.mixture(tensors))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
