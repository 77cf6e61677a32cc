"""Qwen3 MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder) and dense Qwen3: attention with normalised heads."""

from __future__ import annotations

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec, MoESpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, expert_ffn_size, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, hidden_size = keys.n_layers(), keys.size("embedding_length")
    ffn_size = expert_ffn_size(tensors, n_layers)
    return ModelSpec(
        architecture=keys.architecture,
        name=keys.name(),
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_vocab=tensors.shape("token_embd.weight")[0],
        context_length=keys.size("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        attention=keys.attention(hidden_size),
        moe=keys.mixture(ffn_size=ffn_size) if ffn_size else MoESpec(),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
