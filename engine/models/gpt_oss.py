"""gpt-oss (20b, 120b): sliding windows on every other layer, attention sinks, biased experts with clamped swish."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph
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
        attention=replace(keys.attention(hidden_size), windows=keys.windows(n_layers, period=2)),
        moe=keys.mixture(ffn_size=expert_ffn_size(tensors, n_layers), scoring="softmax_of_chosen", normalize=False),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(
        spec, tensors, self_attention, ffn_norm="post_attention_norm.weight", activation=Activation.CLAMPED_SWISH
    )
