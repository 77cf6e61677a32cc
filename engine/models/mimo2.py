"""MiMo V2 Flash (309B-A15B): values narrower than keys, windows with sinks, rotation and heads of their own."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

_PERIOD = 6  # of the layers without a window, where the file does not list them
_LOCAL_FREQ_BASE = 10000.0


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = keys.attention()
    attention = replace(
        attention,
        windows=keys.windows(keys.n_layers(), _PERIOD, without=0),
        window_rope=keys.local_rope(attention.head_dim, _LOCAL_FREQ_BASE),
        output_scale=keys.number("attention.value_scale", 1.0) or 1.0,
    )
    spec = keys.model(tensors, attention, keys.mixture(tensors, scoring="sigmoid"))
    return keys.with_head(spec, tensors, carries_stream=True)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
