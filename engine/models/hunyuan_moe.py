"""Hunyuan A13B: queries and keys are normalised after they are rotated."""

from __future__ import annotations

from engine.devices.graph import Graph, Tensor
from engine.model_spec import AttentionSpec, ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import attend, decoder, normalize_heads, project_qkv, rotate_heads


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    return keys.model(tensors, keys.attention(), keys.mixture(tensors))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _attention)


def _attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    q, k, v = project_qkv(graph, x, block, spec.hidden_size, attention.widths(layer)[:3])
    q, k = rotate_heads(graph, q, k, block, attention, layer)
    q = normalize_heads(graph, q, block, "attn_q_norm.weight", attention.head_dim, spec.norm_eps)
    k = normalize_heads(graph, k, block, "attn_k_norm.weight", attention.head_dim, spec.norm_eps)
    return attend(graph, q, k, v, block, spec, layer)
