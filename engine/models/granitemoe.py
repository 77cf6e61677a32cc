"""Granite 3 MoE: factors on the embeddings, on what each block adds to the residual stream, and on the logits."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    return replace(
        keys.model(tensors, keys.attention("norm"), keys.mixture(tensors)),
        embedding_scale=_factor(keys, "embedding_scale"),
        residual_scale=_factor(keys, "residual_scale"),
        logit_scale=1.0 / _factor(keys, "logit_scale"),  # the file says what to divide by
    )


def _factor(keys: Keys, key: str) -> float:
    return keys.number(key, 1.0) or 1.0  # 0 stands for "not used"


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
