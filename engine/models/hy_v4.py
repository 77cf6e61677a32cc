"""Hunyuan 4: residual streams with hyper-connections, and latent attention with gates, sinks and perhaps an indexer.

The indexer is that of DeepSeek V3.2, but that the last values of its queries and keys are rotated.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph
from engine.model_spec import IndexerSpec, LatentAttentionSpec, ModelSpec, RopeSpec
from engine.models import hyper_connections
from engine.models.binding import Keys, Tensors
from engine.models.deepseek2 import latent_attention, read_latent_attention
from engine.models.deepseek32 import choosing_attention, read_choosing_layers, read_indexer


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = read_latent_attention(keys)
    rope = replace(keys.unscaled_rope(attention.rope_dim, "norm"), divides=False)
    attention = replace(attention, rope=rope, gated=True)
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    spec = keys.model(tensors, attention, replace(moe, limits=keys.floats_of_layers("swiglu_clamp_exp")))
    if keys.size("attention.indexer.top_k", 0, minimum=0):
        attention = replace(attention, indexer=_read_indexer(keys, rope, spec.norm_eps))
    return replace(spec, attention=attention, hyper_connections=hyper_connections.read_hyper_connections(keys))


def _read_indexer(keys: Keys, rope: RopeSpec, norm_eps: float) -> IndexerSpec:
    n_still = keys.size("attention.indexer.key_length") - rope.n_rot
    if n_still % 2:
        raise keys.wrong("attention.indexer.key_length", n_still + rope.n_rot, "an even number")
    return read_indexer(keys, replace(rope, n_still=n_still), read_choosing_layers(keys), norm_eps)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    assert isinstance(spec.attention, LatentAttentionSpec)
    mixer = choosing_attention(spec) if spec.attention.indexer else latent_attention
    return hyper_connections.decoder(spec, tensors, mixer, Activation.CLAMPED_SILU)
