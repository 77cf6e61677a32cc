"""SmallThinker (4B-A0.6B, 21B-A3B): experts are chosen before attention, from what comes into the block."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph, Tensor
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import layers, mixture_of_experts, normalize, self_attention

_PERIOD = 4  # of the layers without a window, beginning with the first, which are not rotated


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, attention = keys.n_layers(), keys.attention()
    if keys.size("attention.sliding_window", 0, minimum=0):
        attention = replace(
            attention,
            windows=keys.windows(n_layers, _PERIOD, without=0),
            unrotated_layers=tuple(layer % _PERIOD == 0 for layer in range(n_layers)),
            window_rope=keys.window_rope(attention.rope),
        )
    return keys.model(tensors, attention, keys.mixture(tensors, scoring=keys.scoring("softmax")))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return layers(spec, tensors, _layer)


def _layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = normalize(graph, x, block, "attn_norm.weight", spec)
    logits = graph.linear(x, block.matrix("ffn_gate_inp.weight", spec.moe.n_experts, spec.hidden_size))
    x = graph.add(x, self_attention(graph, h, block, spec, layer))
    h = normalize(graph, x, block, "ffn_norm.weight", spec)
    return mixture_of_experts(graph, h, x, block, spec, layer, Activation.RELU, logits)
