"""MiniMax-Text-01 and M1 (456B-A46B): lightning attention in seven layers of eight, softmax attention in the others.

Each sub-block is added to its own input after the norm, times a factor: the stream is what norms give.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.devices.graph import Activation, Gating, Graph, Tensor
from engine.model_spec import AttentionSpec, ModelSpec
from engine.models.binding import LARGEST_STATE, Keys, Tensors
from engine.models.blocks import layers, mixture_of_experts, normalize, scaled, self_attention
from engine.models.qwen35moe import read_recurrent_layers

_PERIOD = 8  # of the layers with softmax attention, where the file does not list them


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = keys.attention()
    keys.at_most("attention.key_length", attention.head_dim, LARGEST_STATE)
    recurrent_layers = read_recurrent_layers(keys, keys.n_layers(), _PERIOD)
    spec = keys.model(tensors, attention, keys.mixture(tensors))
    return replace(spec, recurrent_layers=recurrent_layers, stream_scale=keys.number("residual_scale"))


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return layers(spec, tensors, _layer)


def _layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = normalize(graph, x, block, "attn_norm.weight", spec)
    mixer = _lightning_attention if spec.is_recurrent(layer) else self_attention
    x = graph.add(mixer(graph, h, block, spec, layer), scaled(graph, h, spec.stream_scale))
    h = normalize(graph, x, block, "ffn_norm.weight", spec)
    stream = scaled(graph, h, spec.stream_scale)
    return mixture_of_experts(graph, h, stream, block, spec, layer, Activation.SILU)


def _lightning_attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Linear attention with a state S for each head, which decays at a rate of its own: https://arxiv.org/abs/2405.17381.

    S = decay S + k v^T;  out = S^T q, with the SiLU of q, k and v, which the matrix gives one head after the other

    What all heads find is normalised together, and gated.
    """
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    n_heads, head_dim = attention.n_heads, attention.head_dim
    size = n_heads * head_dim
    qkv, gate = graph.linears(
        x,
        (
            block.matrix("attn_qkv.weight", 3 * size, spec.hidden_size),
            block.matrix("attn_gate.weight", size, spec.hidden_size),
        ),
    )
    qkv = graph.gate(qkv, qkv, Gating.SIGMOID)  # which is its SiLU
    q, kv = graph.split_heads(qkv, n_heads, head_dim)
    k, v = graph.split_heads(kv, n_heads)
    out = graph.lightning_attention(q, k, v, _decays(n_heads, layer, spec.n_layers))
    out = graph.rms_norm(out, block.vector("attn_norm_2.weight", size), spec.norm_eps)
    out = graph.gate(out, gate, Gating.SIGMOID)
    return graph.linear(out, block.matrix("attn_output.weight", spec.hidden_size, size))


def _decays(n_heads: int, layer: int, n_layers: int) -> npt.NDArray[np.float32]:
    """Return what is left of each head's state after a token: slopes as of ALiBi, flatter the later the layer."""
    slopes = np.exp2(-8.0 / n_heads * np.arange(1, n_heads + 1))
    flattening = 1.0 - layer / max(1, n_layers - 1) + 1e-5
    return np.asarray(np.exp(-slopes * flattening), np.float32)
