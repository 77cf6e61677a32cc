"""Nemotron 3 (Nano 30B-A3B, Super 120B-A12B, Puzzle 75B-A9B), Nemotron-H: state spaces, attention or networks.

Networks have one projection in place of gate and up, of which they take the squares where it is above 0. The experts of
the larger ones work in a space of fewer values, into which and out of which there is one more matrix for all of them.
Of Puzzle each layer has experts of a width of its own, and uses a number of its own.
A block for multi-token prediction has attention and experts, and LayerNorm behind them.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph, Tensor
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import feed_forward, layers, normalize, self_attention
from engine.models.state_space import read_state_space, recurrent_layers, state_space


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, n_told = keys.n_layers(), keys.n_layers_told()
    moe = keys.mixture(tensors, scoring="sigmoid", normalize=None, scales=True)
    attention = replace(keys.attention(), unrotated_layers=(True,) * n_told, layer_heads=(), layer_kv_heads=())
    spec = keys.model(tensors, attention, replace(moe, latent_size=keys.size("moe_latent_size", 0, minimum=0)))
    if keys.architecture == "nemotron_h_moe":
        spec = keys.with_head(spec, tensors)
    return replace(
        spec,
        head_norm_eps=0.0 if spec.draft_layer is None else keys.number("attention.layer_norm_epsilon"),
        recurrent_layers=recurrent_layers(tensors, n_layers),
        state_space=read_state_space(keys),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return layers(spec, tensors, _layer)


def _layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = normalize(graph, x, block, "attn_norm.weight", spec)
    if layer == spec.draft_layer:
        x = graph.add(x, self_attention(graph, h, block, spec, layer))
        h = normalize(graph, x, block, "post_attention_norm.weight", spec)
        return feed_forward(graph, h, x, block, spec, layer, Activation.RELU)
    if spec.is_recurrent(layer):
        return graph.add(x, state_space(graph, h, block, spec))
    if block.has("ffn_up.weight") or block.has("ffn_gate_inp.weight"):
        return feed_forward(graph, h, x, block, spec, layer, Activation.RELU)
    return graph.add(x, self_attention(graph, h, block, spec, layer))
