"""Step 3.5 Flash (196B-A11B): gated heads, windows with rotation and heads of their own, limits in some networks."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

_PERIOD = 4  # of the layers without a window, where the file does not list them
_LOCAL_FREQ_BASE = 10000.0


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = keys.attention()
    local = replace(keys.local_rope(attention.head_dim, _LOCAL_FREQ_BASE), divides=False)
    attention = replace(
        attention,
        rope=replace(attention.rope, n_rot=attention.rope.n_rot // 2),
        windows=keys.windows(keys.n_layers(), _PERIOD, without=0),
        window_rope=local,
    )
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    limits, shared_limits = (keys.floats_of_layers(f"swiglu_clamp_{part}") for part in ("exp", "shexp"))
    spec = keys.model(tensors, attention, replace(moe, limits=limits, shared_limits=shared_limits))
    return keys.with_head(spec, tensors, carries_stream=True)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
