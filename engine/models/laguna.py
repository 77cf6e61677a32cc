"""Laguna (XS 30B-A3B, S 118B-A8B, M 230B-A10B): attention gated by softplus; the larger ones have no windows."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

_PERIOD = 4  # of the layers without a window, beginning with the first


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = replace(keys.attention(), gating="softplus")
    if keys.size("attention.sliding_window", 0, minimum=0):
        windows = keys.windows(keys.n_layers(), _PERIOD, without=0)
        local = keys.local_rope(attention.head_dim, attention.rope.freq_base)
        attention = replace(attention, windows=windows, window_rope=local)
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    return keys.model(tensors, attention, moe)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
