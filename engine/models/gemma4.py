"""Gemma 4 (26B-A4B, and the dense 31B): a dense network beside the experts, norms around everything.

Layers with a window have heads, and a rotation, of their own. The small siblings (E2B, E4B) are refused: their layers
have embeddings of their own, and share keys and values.
"""

from __future__ import annotations

import math
from dataclasses import replace

from engine.devices.graph import Activation, Graph, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import AttentionSpec, ModelSpec
from engine.models.binding import LARGEST_HEAD, Keys, Tensors
from engine.models.blocks import (
    attend,
    check_experts,
    dense_network,
    layers,
    normalize,
    project_qkv,
    rotate_heads,
    route,
    routed_experts,
)

_PERIOD = 6  # of the layers without a window, where the file does not list them
_LOCAL_FREQ_BASE = 10000.0


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    for key in ("embedding_length_per_layer_input", "attention.shared_kv_layers"):
        if n := keys.size(key, 0, minimum=0):
            raise UnsupportedModelError(
                f"{keys.file_name}: {keys.architecture}.{key} is {n}; this version runs the models of this family "
                "where it is 0 (26B-A4B and 31B)"
            )
    spec = keys.model(tensors, _read_attention(keys, tensors), keys.mixture(tensors))
    cap = keys.cap("final_logit_softcapping")
    return replace(spec, embedding_scale=math.sqrt(spec.hidden_size), logit_cap=cap)


def _read_attention(keys: Keys, tensors: Tensors) -> AttentionSpec:
    attention, windows = keys.attention(), keys.windows(keys.n_layers(), _PERIOD)
    window_dim = keys.size("attention.key_length_swa", attention.head_dim)
    keys.at_most("attention.key_length_swa", window_dim, LARGEST_HEAD)
    dims = {"": attention.head_dim, "_swa": window_dim}
    for suffix, head_dim in dims.items():
        value_dim = keys.size(f"attention.value_length{suffix}", head_dim)
        if value_dim != head_dim:
            raise keys.wrong(f"attention.value_length{suffix}", value_dim, f"that of keys ({head_dim})")
    if not all(windows):
        tensors.shape("rope_freqs.weight")  # the others turn a part of their pairs only, which this says
    return replace(
        attention,
        scale=1.0,
        windows=windows,
        window_rope=replace(keys.local_rope(window_dim, _LOCAL_FREQ_BASE), divides=False),
        window_head_dim=window_dim if window_dim != attention.head_dim else 0,
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return layers(spec, tensors, _layer)


def _layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = _attention(graph, normalize(graph, x, block, "attn_norm.weight", spec), block, spec, layer)
    x = graph.add(x, normalize(graph, h, block, "post_attention_norm.weight", spec))
    if block.has("ffn_gate_inp.weight"):
        h = _networks(graph, x, block, spec, layer)
    else:
        h = _dense(graph, x, block, spec, layer)
    x = graph.add(x, normalize(graph, h, block, "post_ffw_norm.weight", spec))
    if block.has("layer_output_scale.weight"):
        x = graph.scale(x, 1.0, block.vector("layer_output_scale.weight", 1))
    return x


def _attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Attend, with all heads normalised; where nothing projects to values, they are the keys before their norm."""
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    sizes, head_dim, eps = attention.widths(layer)[:3], attention.layer_head_dim(layer), spec.norm_eps
    has_values = block.has("attn_v.weight") or block.has("attn_qkv.weight")
    q, k, *others = project_qkv(graph, x, block, spec.hidden_size, sizes if has_values else sizes[:2])
    v = graph.rms_norm(others[0] if others else k, None, eps, head_dim)
    q = graph.rms_norm(q, block.vector("attn_q_norm.weight", head_dim), eps)
    k = graph.rms_norm(k, block.vector("attn_k_norm.weight", head_dim), eps)
    q, k = rotate_heads(graph, q, k, block, attention, layer)
    return attend(graph, q, k, v, block, spec, layer)


def _dense(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = normalize(graph, x, block, "ffn_norm.weight", spec)
    return dense_network(graph, h, block, spec, layer, Activation.GELU)


def _networks(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Return the sum of experts and a dense network, each with norms of its own before and behind.

    The router reads the residual stream normalised in its own way: weighted, and divided by the root of its width. The
    dense network comes between choice and sum, where the experts that have no slot are waited for.
    """
    moe, hidden_size = check_experts(spec, block), spec.hidden_size
    expert_in = normalize(graph, x, block, "pre_ffw_norm_2.weight", spec)
    h = normalize(graph, x, block, "ffn_gate_inp.scale", spec)
    h = graph.scale(h, hidden_size**-0.5)
    logits = graph.linear(h, block.matrix("ffn_gate_inp.weight", moe.n_experts, hidden_size, scaled=False))
    routing = route(graph, logits, block, moe, layer)
    expert_out = routed_experts(graph, expert_in, routing, block, spec, layer, Activation.GELU)
    dense = normalize(graph, _dense(graph, x, block, spec, layer), block, "post_ffw_norm_1.weight", spec)
    routed = graph.combine(expert_out, routing, None)
    return graph.add(dense, normalize(graph, routed, block, "post_ffw_norm_2.weight", spec))
