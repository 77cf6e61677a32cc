"""GLM-4.5 to 4.7 and Air: sigmoid router with a bias for the choice, plain shared expert, a dense layer first."""

from __future__ import annotations

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, expert_ffn_size, self_attention, shared_ffn_size


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
        moe=keys.mixture(
            ffn_size=expert_ffn_size(tensors, n_layers),
            shared_ffn_size=shared_ffn_size(tensors, n_layers),
            scoring=keys.scoring("sigmoid"),
            normalize=keys.flag("expert_weights_norm", False),
            scale=keys.weights_scale(),
        ),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention, ffn_norm="post_attention_norm.weight")
