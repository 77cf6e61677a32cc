"""Llama and Mixtral: plain attention with paired rotation; routed experts where the file has them."""

from __future__ import annotations

from engine.devices.graph import Graph
from engine.errors import UnsupportedModelError
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    if tensors.has("blk.0.ffn_gate.0.weight"):
        raise UnsupportedModelError(
            f"{keys.file_name}: keeps every expert in a tensor of its own (blk.0.ffn_gate.0.weight), as files of early "
            "2024 do; convert the model again with a current llama.cpp"
        )
    return keys.model(tensors, keys.attention("norm"), keys.mixture(tensors))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, self_attention)
