"""MiniMax-M2: queries and keys normalised over all heads together, sigmoid router with a bias for the choice."""

from __future__ import annotations

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, expert_ffn_size, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, hidden_size = keys.n_layers(), keys.size("embedding_length")
    return ModelSpec(
        architecture=keys.architecture,
        name=keys.name(),
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_vocab=tensors.shape("token_embd.weight")[0],
        context_length=keys.size("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        attention=keys.attention(hidden_size),
        moe=keys.mixture(ffn_size=expert_ffn_size(tensors, n_layers), scoring=keys.scoring("sigmoid")),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
