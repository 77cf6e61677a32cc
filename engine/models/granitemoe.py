"""Granite 3 MoE and Granite 4: factors on embeddings, on what each block adds to the stream, and on the logits.

Most layers of Granite 4 H (Tiny 7B-A1B, Small 32B-A9B) are state spaces instead of attention, the others not rotated.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph, Tensor
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention
from engine.models.state_space import read_state_space, recurrent_layers, state_space


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, attention = keys.n_layers(), keys.attention("norm")
    recurrent = recurrent_layers(tensors, n_layers)
    if not keys.flag("rope.scaling.finetuned", True):  # so these files say that nothing is rotated
        attention = replace(attention, unrotated_layers=(True,) * n_layers)
    return replace(
        keys.model(tensors, attention, keys.mixture(tensors)),
        recurrent_layers=recurrent,
        state_space=read_state_space(keys) if any(recurrent) else None,
        embedding_scale=_factor(keys, "embedding_scale"),
        residual_scale=_factor(keys, "residual_scale"),
        logit_scale=1.0 / _factor(keys, "logit_scale"),  # the file says what to divide by
    )


def _factor(keys: Keys, key: str) -> float:
    return keys.number(key, 1.0) or 1.0  # 0 stands for "not used"


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _mix)


def _mix(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    if spec.is_recurrent(layer):
        return state_space(graph, x, block, spec)
    return self_attention(graph, x, block, spec, layer)
