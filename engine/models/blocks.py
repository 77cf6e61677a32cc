"""Parts that architectures share: projections, rotary frequencies, feed-forward networks, the output head."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from engine.devices.graph import Gating, Graph, Scoring, Tensor, Weight
from engine.model_spec import ModelSpec, RopeSpec
from engine.models.binding import Tensors, split_rows

_YARN_FAST, _YARN_SLOW = 32.0, 1.0  # turns over the trained context above / below which a pair is kept / stretched


def embed(graph: Graph, tensors: Tensors, spec: ModelSpec) -> Tensor:
    """Look up the token embeddings."""
    return graph.embed(tensors.matrix("token_embd.weight", spec.n_vocab, spec.hidden_size))


def output_head(graph: Graph, x: Tensor, tensors: Tensors, spec: ModelSpec) -> None:
    """Turn the residual stream into logits, for the wanted rows; without `output.weight` the embeddings serve."""
    x = graph.select_outputs(x)
    x = graph.rms_norm(x, tensors.vector("output_norm.weight", spec.hidden_size), spec.norm_eps)
    name = "output.weight" if tensors.has("output.weight") else "token_embd.weight"
    graph.logits = graph.linear(x, tensors.matrix(name, spec.n_vocab, spec.hidden_size))


def project_qkv(
    graph: Graph, x: Tensor, block: Tensors, hidden_size: int, q_size: int, kv_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project to queries, keys and values, stored as three matrices or as one (`attn_qkv`: q, then k, then v)."""
    sizes = (q_size, kv_size, kv_size)
    weights: list[Weight]
    if block.has("attn_qkv.weight"):
        weights = split_rows(block.matrix("attn_qkv.weight", sum(sizes), hidden_size), *sizes)
    else:
        names = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
        weights = [block.matrix(name, size, hidden_size) for name, size in zip(names, sizes, strict=True)]
    q, k, v = graph.linears(x, weights)
    return q, k, v


def rope_frequencies(rope: RopeSpec) -> tuple[npt.NDArray[np.float32], float]:
    """Return radians a position for each pair, float32 [n_rot / 2], and the factor of cosine and sine.

    YaRN: https://arxiv.org/abs/2309.00071, as llama.cpp applies it (the ramp runs over pair indices). In multi-axis
    rotation a text token has the same position on the first three axes, and 0 on the fourth.
    """
    pairs = np.arange(rope.n_rot // 2)
    frequencies = rope.freq_base ** (-2.0 * pairs / rope.n_rot)
    magnitude = rope.magnitude
    if rope.scaling == "linear":
        frequencies /= rope.factor
    elif rope.scaling == "yarn":
        low, high = (_yarn_pair(rope, turns) for turns in (_YARN_FAST, _YARN_SLOW))
        low, high = max(0.0, math.floor(low)), min(rope.n_rot - 1.0, math.ceil(high))
        kept = 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
        frequencies *= (1.0 - kept) / rope.factor + kept
        magnitude *= 1.0 + 0.1 * math.log(rope.factor)
    if any(rope.sections):
        time, height, width = (*rope.sections, 0, 0, 0)[:3]
        place = pairs % sum(rope.sections)
        on_fourth_axis = place >= 3 * np.array([time, height, width])[place % 3]
        frequencies[on_fourth_axis] = 0.0
    return frequencies.astype(np.float32), magnitude


def _yarn_pair(rope: RopeSpec, turns: float) -> float:
    """Return the (fractional) pair that makes that many turns over the trained context."""
    ratio = rope.original_context_length / (2 * math.pi * turns)
    return rope.n_rot * math.log(ratio) / (2 * math.log(rope.freq_base))


def feed_forward(graph: Graph, x: Tensor, residual: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Add the feed-forward network of one block to the residual stream: mixture of experts, or dense if it has none."""
    if not block.has("ffn_gate_inp.weight") and block.has("ffn_gate.weight"):
        ffn_size = block.shape("ffn_gate.weight")[0]
        gate, up = (block.matrix(f"ffn_{part}.weight", ffn_size, spec.hidden_size) for part in ("gate", "up"))
        gated = graph.gate(*reversed(graph.linears(x, (gate, up))), Gating.SILU)
        down = block.matrix("ffn_down.weight", spec.hidden_size, ffn_size)
        return graph.add(residual, graph.linear(gated, down))
    return mixture_of_experts(graph, x, residual, block, spec)


def mixture_of_experts(graph: Graph, x: Tensor, residual: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Add routed experts and the shared expert to the residual stream.

    out = residual + sum over chosen e of p_e / (sum of chosen p) * down_e(silu(gate_e x) * up_e x)
                   + sigmoid(shared_gate . x) * down_s(silu(gate_s x) * up_s x),    p = softmax(router x)

    Everything that reads x itself is one operation, so that the router, whose result is waited for, is not alone in it.
    """
    moe, hidden_size = spec.moe, spec.hidden_size
    inputs = [block.matrix("ffn_gate_inp.weight", moe.n_experts, hidden_size)]
    if moe.shared_ffn_size:
        inputs.append(block.matrix("ffn_gate_inp_shexp.weight", 1, hidden_size))
        inputs += [block.matrix(f"ffn_{p}_shexp.weight", moe.shared_ffn_size, hidden_size) for p in ("gate", "up")]
    router_logits, *rest = graph.linears(x, inputs)

    routing = graph.router(router_logits, moe.n_experts_used, Scoring.SOFTMAX, normalize=True)
    expert_out = graph.experts(x, routing, *expert_gate_up(block, spec), expert_down(block, spec))
    if not rest:
        return graph.combine(expert_out, routing, residual)
    shared_gate, gate, up = rest
    down = block.matrix("ffn_down_shexp.weight", hidden_size, moe.shared_ffn_size)
    shared = graph.linear(graph.gate(up, gate, Gating.SILU), down)
    return graph.combine(expert_out, routing, residual, shared, shared_gate)


def expert_gate_up(block: Tensors, spec: ModelSpec) -> tuple[Weight, Weight]:
    """Return the experts' gate and up projections, stored apart or as one (`ffn_gate_up_exps`: gate rows first)."""
    n_experts, size, hidden_size = spec.moe.n_experts, spec.moe.ffn_size, spec.hidden_size
    if block.has("ffn_gate_up_exps.weight"):
        gate, up = split_rows(block.experts("ffn_gate_up_exps.weight", n_experts, 2 * size, hidden_size), size, size)
        return gate, up
    return (
        block.experts("ffn_gate_exps.weight", n_experts, size, hidden_size),
        block.experts("ffn_up_exps.weight", n_experts, size, hidden_size),
    )


def expert_down(block: Tensors, spec: ModelSpec) -> Weight:
    """Return the experts' down projection."""
    return block.experts("ffn_down_exps.weight", spec.moe.n_experts, spec.hidden_size, spec.moe.ffn_size)
