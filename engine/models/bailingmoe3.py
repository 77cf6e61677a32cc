"""Ling 3 (flash: 124B-A5.1B, tiny: 7.9B-A1.3B): Kimi delta attention with bounded decays, gated latent attention.

Layers, networks and keys are those of Kimi Linear. What differs: a channel's decay is
exp(bound sigmoid(|a| (alpha + dt_bias))), with a = exp(A_log) in the file; alpha and the gate come from one matrix
each; latent attention is rotated, and its heads are gated; some networks have limits.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.errors import UnsupportedModelError
from engine.model_spec import ModelSpec, RopeSpec
from engine.models import kimi_linear
from engine.models.binding import SECTIONS, Keys, Tensors
from engine.models.deepseek2 import read_latent_attention

_SAFE_GATE = "kda.safe_gate"


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = read_latent_attention(keys)
    attention = replace(attention, rope=_read_rope(keys, attention.rope_dim), gated=True)
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    limits, shared_limits = (keys.floats_of_layers(f"swiglu_clamp_{part}") for part in ("exp", "shexp"))
    spec = keys.model(tensors, attention, replace(moe, limits=limits, shared_limits=shared_limits))
    return replace(
        keys.with_head(spec, tensors),
        recurrent_layers=kimi_linear.read_recurrent_layers(keys),
        delta_net=kimi_linear.read_delta_net(keys, attention.n_heads, _read_bound(keys)),
    )


def _read_bound(keys: Keys) -> float:
    """Return the logarithm of the strongest decay."""
    if not keys.flag(_SAFE_GATE, True):
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.{_SAFE_GATE} is false; this version knows bounded decays only"
        )
    return kimi_linear.read_decay_bound(keys)


def _read_rope(keys: Keys, rope_dim: int) -> RopeSpec:
    """Read the rotation, which pairs neighbours, or in files with axes for pictures the halves of a head.

    Text has the same position on every axis.
    """
    rope = keys.rope(rope_dim, "norm")
    sections = (*(keys.sizes(SECTIONS) if keys.has(SECTIONS) else ()), 0, 0, 0, 0)[:4]
    if not (sections[0] and sections[1]):
        return rope
    if sections[3]:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.{SECTIONS} is {list(sections)}; this version knows three axes"
        )
    return replace(rope, style="neox")


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return kimi_linear.forward(spec, tensors)
