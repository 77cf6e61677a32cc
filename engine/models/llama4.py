"""Llama 4 (Scout, Maverick): attention in chunks, every fourth layer unrotated and unlimited, one expert a token."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import AttentionSpec, ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import attend, decoder, of_layer, project_qkv, rotate_heads

_CHUNK = 8192
_TEMPERATURE_PERIOD, _TEMPERATURE_SLOPE = 8192, 0.1
_PERIOD = 4  # of the unrotated layers
_N_EXPERTS_UNNORMALIZED = 128  # Maverick: its queries and keys are not normalised


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, attention = keys.n_layers(), keys.attention("norm")
    if keys.size("attention.sliding_window", _CHUNK, minimum=0):  # 0: a small variant without chunks
        unrotated = tuple((layer + 1) % _PERIOD == 0 for layer in range(n_layers))
        chunks = tuple(0 if is_unrotated else _CHUNK for is_unrotated in unrotated)
        attention = replace(attention, unrotated_layers=unrotated, chunks=chunks)
    moe = keys.mixture(tensors, scoring="sigmoid", normalize=False, weights_input=True)
    if moe.n_experts_used > 1:
        raise UnsupportedModelError(
            f"{keys.file_name}: llama4.expert_used_count is {moe.n_experts_used}; this version needs 1, because an "
            "expert's weight multiplies its input"
        )
    return keys.model(tensors, attention, moe)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _attention)


def _attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Attend; rotated layers normalise queries and keys after the rotation, the others scale queries by position."""
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    q, k, v = project_qkv(graph, x, block, spec.hidden_size, attention.widths(layer)[:3])
    if of_layer(attention.unrotated_layers, layer):
        q = graph.scale_by_position(q, 1, _TEMPERATURE_PERIOD, _TEMPERATURE_SLOPE)
    else:
        q, k = rotate_heads(graph, q, k, block, attention, layer)
        if spec.moe.n_experts != _N_EXPERTS_UNNORMALIZED:
            q = graph.rms_norm(q, None, spec.norm_eps, attention.head_dim)
            k = graph.rms_norm(k, None, spec.norm_eps, attention.head_dim)
    return attend(graph, q, k, v, block, spec, layer)
