"""Qwen3 MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): attention with normalised heads, then routed experts."""

from __future__ import annotations

from engine.devices.graph import Graph, RopeStyle, Tensor
from engine.model_spec import ModelSpec, MoESpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import embed, feed_forward, output_head, project_qkv, rope_frequencies


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, hidden_size = keys.n_blocks(), keys.size("embedding_length")
    n_experts, n_experts_used = keys.experts()
    # Old converters wrote the width of all chosen experts together.
    ffn_size = keys.size("expert_feed_forward_length", keys.size("feed_forward_length", 0, minimum=0) // n_experts_used)
    return ModelSpec(
        architecture=keys.architecture,
        name=keys.name(),
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_vocab=tensors.shape("token_embd.weight")[0],
        context_length=keys.size("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        attention=keys.attention(hidden_size),
        moe=MoESpec(n_experts, n_experts_used, ffn_size),
        recurrent_layers=(False,) * n_layers,
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    graph = Graph()
    x = embed(graph, tensors, spec)
    for layer in range(spec.n_layers):
        block = tensors.block(layer)
        h = graph.rms_norm(x, block.vector("attn_norm.weight", spec.hidden_size), spec.norm_eps)
        x = graph.add(x, self_attention(graph, h, block, spec))
        h = graph.rms_norm(x, block.vector("ffn_norm.weight", spec.hidden_size), spec.norm_eps)
        x = feed_forward(graph, h, x, block, spec)
    output_head(graph, x, tensors, spec)
    return graph


def self_attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Attend; each head of the queries and keys is normalised before it is rotated."""
    attention = spec.attention
    n_heads, n_kv_heads, head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
    q, k, v = project_qkv(graph, x, block, spec.hidden_size, n_heads * head_dim, n_kv_heads * head_dim)
    q = graph.rms_norm(q, block.vector("attn_q_norm.weight", head_dim), spec.norm_eps)
    k = graph.rms_norm(k, block.vector("attn_k_norm.weight", head_dim), spec.norm_eps)
    frequencies, magnitude = rope_frequencies(attention.rope)
    q = graph.rope(q, n_heads, frequencies, RopeStyle.NEOX, magnitude)
    k = graph.rope(k, n_kv_heads, frequencies, RopeStyle.NEOX, magnitude)
    out = graph.attention(q, k, v, n_heads, n_kv_heads, attention.scale)
    return graph.linear(out, block.matrix("attn_output.weight", spec.hidden_size, n_heads * head_dim))
