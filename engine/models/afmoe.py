"""Trinity (Nano, Mini, Large): gated attention, windows on three layers of four, norms behind every sub-block, too."""

from __future__ import annotations

import math
from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

_PERIOD = 4  # of the layers without a window, and of those that are not rotated


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, attention = keys.n_layers(), keys.attention()
    unrotated = tuple((layer + 1) % _PERIOD == 0 for layer in range(n_layers))
    attention = replace(attention, unrotated_layers=unrotated)
    if keys.size("attention.sliding_window", 0, minimum=0):
        windows, rope = keys.windows(n_layers, _PERIOD), keys.window_rope(attention.rope)
        attention = replace(attention, windows=windows, window_rope=rope)
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    spec = keys.model(tensors, attention, moe)
    return replace(spec, embedding_scale=math.sqrt(spec.hidden_size))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention, post_norms=("post_attention_norm.weight", "post_ffw_norm.weight"))
