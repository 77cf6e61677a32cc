"""K-EXAONE (236B-A23B): three layers with a sliding window to one that sees everything and is not rotated."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

_PERIOD = 4  # of the layers without a window


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    windows = keys.windows(keys.n_layers(), _PERIOD)
    unrotated = tuple(window == 0 for window in windows)
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    return keys.model(tensors, replace(keys.attention(), windows=windows, unrotated_layers=unrotated), moe)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
