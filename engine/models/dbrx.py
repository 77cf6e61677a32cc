"""DBRX (132B-A36B): LayerNorm without a bias, and queries, keys and values that are clamped as they are projected."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    limit = keys.number("attention.clamp_kqv")
    if limit < 0:
        raise keys.wrong("attention.clamp_kqv", limit, "a number above 0, or 0 for no limit")
    spec = keys.model(tensors, replace(keys.attention(), qkv_limit=limit), keys.mixture(tensors))
    return replace(spec, norm_eps=keys.number("attention.layer_norm_epsilon"), centers_norms=True)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention, ffn_norm="attn_output_norm.weight")
