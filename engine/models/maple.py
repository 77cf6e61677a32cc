"""Maple (20B): layers with a sliding window are rotated, the others are not; limits in some experts."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

_PERIOD = 4  # of the layers without a window, where the file does not list them


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention, windows = keys.attention(), keys.windows(keys.n_layers(), _PERIOD)
    attention = replace(
        attention,
        windows=windows,
        unrotated_layers=tuple(window == 0 for window in windows),
        window_rope=keys.window_rope(attention.rope),
    )
    moe = replace(keys.mixture(tensors), limits=keys.floats_of_layers("swiglu_clamp_exp"))
    return keys.model(tensors, attention, moe)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention, activation=Activation.CLAMPED_SILU)
