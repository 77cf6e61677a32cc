"""Arctic (Snowflake, 480B-A17B): experts beside attention and a dense network, each on what comes into the block.

The experts take a norm of their own of the block's input. So they are chosen first, and what attention and the dense
network add to the residual stream is computed while experts are waited for.
"""

from __future__ import annotations

from functools import partial

from engine.devices.graph import Activation, Graph, Tensor
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import dense_network, layers, mixture_of_experts, normalize, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    return keys.model(tensors, keys.attention("norm"), keys.mixture(tensors))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return layers(spec, tensors, _layer)


def _layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = normalize(graph, x, block, "ffn_norm_exps.weight", spec)
    others = partial(_attention_and_network, graph, x, block, spec, layer)
    return mixture_of_experts(graph, h, others, block, spec, layer, Activation.SILU)


def _attention_and_network(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Add attention, and a dense network behind it, to the residual stream."""
    h = normalize(graph, x, block, "attn_norm.weight", spec)
    x = graph.add(x, self_attention(graph, h, block, spec, layer))
    h = normalize(graph, x, block, "ffn_norm.weight", spec)
    return graph.add(x, dense_network(graph, h, block, spec, layer, Activation.SILU))
