"""Granite 3 MoE: factors on the embeddings, on what each block adds to the residual stream, and on the logits."""

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
        attention=keys.attention(hidden_size, "norm"),
        moe=keys.mixture(
            ffn_size=expert_ffn_size(tensors, n_layers), shared_ffn_size=shared_ffn_size(tensors, n_layers)
        ),
        embedding_scale=_factor(keys, "embedding_scale"),
        residual_scale=_factor(keys, "residual_scale"),
        logit_scale=1.0 / _factor(keys, "logit_scale"),  # the file says what to divide by
    )


def _factor(keys: Keys, key: str) -> float:
    return keys.number(key, 1.0) or 1.0  # 0 stands for "not used"


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
