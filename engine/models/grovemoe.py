"""GroveMoE (33B-A3B): experts in groups, and beside each group an expert that all of its experts share."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import check_experts, layers, normalize, route, routed_experts, self_attention

_GROUP = "experts_per_group"


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    moe = keys.mixture(tensors)
    if moe.n_groups > 1:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.expert_group_count is {moe.n_groups}; this version needs 1: "
            "experts are chosen from all groups"
        )
    group_size = keys.size(_GROUP)
    if moe.n_experts % group_size:
        raise keys.wrong(_GROUP, group_size, f"a divisor of expert_count ({moe.n_experts})")
    if moe.n_experts_used > moe.n_experts // group_size:
        raise keys.wrong(_GROUP, group_size, f"as many groups as experts are used ({moe.n_experts_used})")
    moe = replace(
        moe,
        group_size=group_size,
        group_ffn_size=tensors.first_width("ffn_down_chexps.weight", keys.n_layers()),
        group_scale=keys.number("expert_group_scale"),
    )
    return keys.model(tensors, keys.attention(), moe)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return layers(spec, tensors, _layer)


def _layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = normalize(graph, x, block, "attn_norm.weight", spec)
    x = graph.add(x, self_attention(graph, h, block, spec, layer))
    return _grouped_experts(graph, normalize(graph, x, block, "ffn_norm.weight", spec), x, block, spec, layer)


def _grouped_experts(graph: Graph, x: Tensor, residual: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Add routed experts to the residual stream, and what the experts that their groups share make of that.

    found = sum over chosen e of weight_e * expert_e(x)
    out = residual + found + scale * sum over chosen e of weight_g * shared_g(found), with the group g of e

    This is what llama.cpp computes, for which the files are made: weight_g is the router's score of the expert with the
    number g, not of e, and what groups share is given what the experts found, not x. The model's authors have
    scale * sum of weight_e * shared_g(x) instead.

    What a group shares is small, a sixth of an expert, and wanted whenever one of the group is: so it has no slots and
    stays with the dense weights.
    """
    moe, hidden_size = check_experts(spec, block), spec.hidden_size
    logits = graph.linear(x, block.matrix("ffn_gate_inp.weight", moe.n_experts, hidden_size))
    routing = route(graph, logits, block, moe, layer)
    expert_out = routed_experts(graph, x, routing, block, spec, layer, Activation.SILU)
    found = graph.combine(expert_out, routing, None)

    groups, size = graph.group_router(logits, routing, moe.group_size), moe.group_ffn_size
    gate, up = (
        block.experts(f"ffn_{part}_chexps.weight", groups.n_experts, size, hidden_size) for part in ("gate", "up")
    )
    down = block.experts("ffn_down_chexps.weight", groups.n_experts, hidden_size, size)
    shared_out = graph.experts(found, groups, gate, up, down)
    return graph.combine(shared_out, groups, graph.add(residual, found), scale=moe.group_scale)
