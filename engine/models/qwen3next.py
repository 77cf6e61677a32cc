"""Qwen3-Next (Qwen3-Next-80B-A3B, Qwen3-Coder-Next): as Qwen3.5, with value heads grouped by their key head."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph, Tensor
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder
from engine.models.qwen35moe import gated_attention, gated_delta_net, read_delta_net, read_recurrent_layers


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    return replace(
        keys.with_head(keys.model(tensors, keys.attention(), keys.mixture(tensors)), tensors),
        recurrent_layers=read_recurrent_layers(keys, keys.n_layers()),
        delta_net=read_delta_net(keys, grouped=True),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _mix, ffn_norm="post_attention_norm.weight")


def _mix(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    if spec.is_recurrent(layer):
        return gated_delta_net(graph, *_project(graph, x, block, spec), block, spec)
    return gated_attention(graph, x, block, spec, layer)


def _project(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Project to (q k v), z, beta and alpha. The file holds beta and alpha as one, a key head at a time.

    Old files hold q, k, v and z as one too, a key head at a time.
    """
    net, hidden_size = spec.delta_net, spec.hidden_size
    assert net is not None
    beta_alpha = block.matrix("ssm_ba.weight", 2 * net.n_v_heads, hidden_size)
    if block.has("ssm_in.weight"):
        fused = block.matrix("ssm_in.weight", net.n_channels + net.value_size, hidden_size)
        qkvz, ba = graph.linears(x, (fused, beta_alpha))
        q, kvz = graph.split_heads(qkvz, net.n_k_heads, net.head_dim)
        k, vz = graph.split_heads(kvz, net.n_k_heads, net.head_dim)
        v, z = graph.split_heads(vz, net.n_k_heads)
        qkv = graph.join_heads(graph.join_heads(q, k, 1), v, 1)
    else:
        qkv_weight = block.matrix("attn_qkv.weight", net.n_channels, hidden_size)
        z_weight = block.matrix("attn_gate.weight", net.value_size, hidden_size)
        qkv, z, ba = graph.linears(x, (qkv_weight, z_weight, beta_alpha))
    beta, alpha = graph.split_heads(ba, net.n_k_heads)
    return qkv, z, beta, alpha
