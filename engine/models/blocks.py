"""Parts that architectures share: the frame of a decoder, attention, feed-forward networks, the output head.

What a file may or may not have (biases, head norms, sinks, a shared expert, a dense layer in between) is decided by
the tensors that it has; what an architecture fixes is a value in the `ModelSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engine.devices.graph import (
    GATING_OF,
    N_CARRIED,
    Activation,
    Gating,
    Graph,
    RopeStyle,
    Routing,
    Scoring,
    Selected,
    State,
    Tensor,
    Vector,
    Weight,
)
from engine.errors import GGUFError
from engine.model_spec import AttentionSpec, ModelSpec, MoESpec, RopeSpec
from engine.models.binding import Tensors, split_rows, split_values

Layer: TypeAlias = Callable[[Graph, Tensor, Tensors, ModelSpec, int], Tensor]
"""Records a layer, or a part of one: (graph, x, block, spec, number of the layer) -> what it makes of x."""

Residual: TypeAlias = Tensor | Callable[[], Tensor] | None
"""What a network is added to, or what records that: between the choice of experts and their sum, where those without a
slot are waited for. None: the network is returned alone."""

_NORMS_OF_HEADS = "nextn.shared_head_norm.weight", "layer_output_norm.weight"
_ROPE_STYLES = {"neox": RopeStyle.NEOX, "norm": RopeStyle.NORM}
_GATINGS = {"sigmoid": Gating.SIGMOID, "softplus": Gating.SOFTPLUS}
_SCORINGS = {
    "softmax": Scoring.SOFTMAX,
    "sigmoid": Scoring.SIGMOID,
    "softmax_of_chosen": Scoring.SOFTMAX_OF_CHOSEN,
    "sqrt_softplus": Scoring.SQRT_SOFTPLUS,
}


# -- the frame -------------------------------------------------------------------------------------------------------


def layers(
    spec: ModelSpec,
    tensors: Tensors,
    layer: Layer,
    output_norm: str | None = "output_norm.weight",
    *,
    enter: Callable[[Graph, Tensor], Tensor] | None = None,
    leave: Callable[[Graph, Tensor], Tensor] | None = None,
) -> Graph:
    """Record the embeddings, what each layer makes of the residual stream, and the output head.

    `enter` makes what the layers work on of the embeddings, and `leave` what the head takes of that, where these are
    not the residual stream itself. With None for the norm that is normalised already.
    """
    graph = Graph()
    x = graph.embed(tensors.matrix("token_embd.weight", spec.n_vocab, spec.hidden_size), spec.embedding_scale)
    x = enter(graph, x) if enter else x
    for number in range(spec.n_layers):
        x = layer(graph, x, tensors.block(number), spec, number)
    x = leave(graph, x) if leave else x
    if spec.draft_layer is not None:
        assert output_norm
        if not spec.carries_stream:
            x, output_norm = normalize(graph, x, tensors, output_norm, spec), None
        _draft(graph, x, tensors, spec, layer)
    _output_head(graph, x, tensors, spec, output_norm)
    return graph


def _draft(graph: Graph, hidden: Tensor, tensors: Tensors, spec: ModelSpec, layer: Layer) -> None:
    """Record multi-token prediction, as in DeepSeek V3 (section 2.2 of https://arxiv.org/abs/2412.19437).

    One more layer takes the embedding of a token and what the model made of the token before it (`hidden`, in most
    models normalised) and guesses what follows the token, which itself has not been run. What comes out of the layer is
    `hidden` for one guess more. Of tokens that are run, the graph makes the keys and values of that layer alone: nobody
    wants a guess of what is known.
    """
    number = spec.draft_layer
    assert number is not None
    block, state = tensors.block(number), State(N_CARRIED * spec.hidden_size)

    def enter(graph: Graph, before: Tensor) -> Tensor:
        own = block.has("nextn.embed_tokens.weight")
        table = (block if own else tensors).matrix(
            "nextn.embed_tokens.weight" if own else "token_embd.weight", spec.n_vocab, spec.hidden_size
        )
        token = normalize(graph, graph.embed(table, spec.embedding_scale), block, "nextn.enorm.weight", spec)
        before = normalize(graph, before, block, "nextn.hnorm.weight", spec)
        joined = graph.join_heads(token, before, 1)
        return graph.linear(joined, block.matrix("nextn.eh_proj.weight", spec.hidden_size, 2 * spec.hidden_size))

    graph.draft = draft = Graph()
    draft.states.append(state)
    x = layer(draft, enter(draft, draft.carry_over(None, state, width=spec.hidden_size)), block, spec, number)
    if spec.carries_stream:
        draft.keep(x, state)
    norm = next((name for name in _NORMS_OF_HEADS if block.has(name)), None)
    how = replace(spec, centers_norms=True, norm_eps=spec.head_norm_eps) if spec.head_norm_eps else spec
    x = normalize(draft, x, block if norm else tensors, norm or "output_norm.weight", how)
    if not spec.carries_stream:
        draft.keep(x, state)
    own_head = block.has("nextn.shared_head_head.weight")
    _output_head(draft, x, block if own_head else tensors, spec, None)
    known = Graph()
    layer(known, enter(graph, graph.carry_over(hidden, state)), block, spec, number)
    graph.store_keys_of(known, draft.kv_caches[0])


def decoder(
    spec: ModelSpec,
    tensors: Tensors,
    mixer: Layer,
    *,
    ffn_norm: str = "ffn_norm.weight",
    post_norms: tuple[str, str] | None = None,
    output_norm: str = "output_norm.weight",
    activation: Activation = Activation.SILU,
) -> Graph:
    """Record a pre-norm decoder: in each block a mixer of tokens, then a feed-forward network, added to the stream.

    `mixer` records what the block's attention (or the like) adds. With `post_norms` that and the result of the
    feed-forward network are normalised, too, before they are added.
    """

    def mix_and_feed(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
        h = normalize(graph, x, block, "attn_norm.weight", spec)
        h = scaled(graph, mixer(graph, h, block, spec, layer), spec.residual_scale)
        x = graph.add(x, normalize(graph, h, block, post_norms[0], spec) if post_norms else h)
        h = normalize(graph, x, block, ffn_norm, spec)
        if not post_norms:
            return feed_forward(graph, h, x, block, spec, layer, activation)
        h = feed_forward(graph, h, None, block, spec, layer, activation)
        return graph.add(x, normalize(graph, h, block, post_norms[1], spec))

    return layers(spec, tensors, mix_and_feed, output_norm)


def normalize(graph: Graph, x: Tensor, tensors: Tensors, name: str, spec: ModelSpec) -> Tensor:
    """Normalise rows of the residual stream's width."""
    weight, bias = tensors.vector(name, spec.hidden_size), None
    if spec.biased_norms:
        bias = tensors.vector(name.removesuffix("weight") + "bias", spec.hidden_size)
    return graph.rms_norm(x, weight, spec.norm_eps, centers=spec.centers_norms, bias=bias)


def _output_head(graph: Graph, x: Tensor, tensors: Tensors, spec: ModelSpec, norm: str | None) -> None:
    """Turn the residual stream into logits, for the wanted rows; without `output.weight` the embeddings serve."""
    x = graph.select_outputs(x)
    x = normalize(graph, x, tensors, norm, spec) if norm else x
    names = "nextn.shared_head_head.weight", "output.weight"
    name = next((name for name in names if tensors.has(name)), "token_embd.weight")
    bias = tensors.optional_vector("output.bias", spec.n_vocab)
    logits = graph.linear(x, tensors.matrix(name, spec.n_vocab, spec.hidden_size), bias)
    logits = scaled(graph, logits, spec.logit_scale)
    graph.logits = graph.soft_cap(logits, spec.logit_cap) if spec.logit_cap else logits


def scaled(graph: Graph, x: Tensor, factor: float) -> Tensor:
    """Multiply by a factor, unless it is 1."""
    return x if factor == 1.0 else graph.scale(x, factor)


# -- attention -------------------------------------------------------------------------------------------------------


def self_attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Attend: project, normalise heads, rotate, look back, gate, project; norms and gate if the file has them."""
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    n_heads, _ = attention.heads(layer)
    *sizes, found_size = attention.widths(layer)
    gates = []
    if block.has("attn_gate.weight"):  # a gate for each head, or for each of its values
        n_gates = n_heads if block.shape("attn_gate.weight")[0] == n_heads else found_size
        gates.append(block.matrix("attn_gate.weight", n_gates, spec.hidden_size))
    q, k, v, *gate = project_qkv(graph, x, block, spec.hidden_size, sizes, gates, attention.qkv_limit)
    head_dim = attention.layer_head_dim(layer)
    q = normalize_heads(graph, q, block, "attn_q_norm.weight", head_dim, spec.norm_eps)
    k = normalize_heads(graph, k, block, "attn_k_norm.weight", head_dim, spec.norm_eps)
    q, k = rotate_heads(graph, q, k, block, attention, layer)
    return attend(graph, q, k, v, block, spec, layer, *gate)


def attend(
    graph: Graph,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: Tensors,
    spec: ModelSpec,
    layer: int,
    gate: Tensor | None = None,
    *,
    selected: Selected | None = None,
) -> Tensor:
    """Look back over the layer's keys and values, or what is selected of them, gate what is found, and project it."""
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    n_heads, n_kv_heads = attention.heads(layer)
    out = graph.attention(
        q,
        k,
        v,
        n_heads,
        n_kv_heads,
        attention.scale,
        sinks=block.optional_vector("attn_sinks.weight", n_heads),
        window=of_layer(attention.windows, layer),
        chunk=of_layer(attention.chunks, layer),
        cap=attention.cap,
        selected=selected,
    )
    if gate is not None:
        out = graph.gate(out, gate, _GATINGS[attention.gating])
    weight = block.matrix("attn_output.weight", spec.hidden_size, attention.widths(layer)[-1])
    out = graph.linear(out, weight, block.optional_vector("attn_output.bias", spec.hidden_size))
    return scaled(graph, out, attention.output_scale)


def project_qkv(
    graph: Graph,
    x: Tensor,
    block: Tensors,
    hidden_size: int,
    sizes: Sequence[int],
    more: Sequence[Weight] = (),
    limit: float = 0.0,
) -> tuple[Tensor, ...]:
    """Project to queries, keys and values, stored as three matrices or as one (`attn_qkv`: q, then k, then v).

    With two `sizes` there are no values. What `more` matrices give comes after these. A `limit` above 0 is how far from
    0 queries, keys and values may be.
    """
    weights: list[Weight]
    biases: list[Vector | None]
    if block.has("attn_qkv.weight"):
        weights = split_rows(block.matrix("attn_qkv.weight", sum(sizes), hidden_size), *sizes)
        bias = block.optional_vector("attn_qkv.bias", sum(sizes))
        biases = [None] * len(sizes) if bias is None else list(split_values(bias, *sizes))
    else:
        parts = list(zip(("attn_q", "attn_k", "attn_v"), sizes, strict=False))
        weights = [block.matrix(f"{part}.weight", size, hidden_size) for part, size in parts]
        biases = [block.optional_vector(f"{part}.bias", size) for part, size in parts]
    weights, biases = [*weights, *more], [*biases, *[None] * len(more)]
    if not limit:
        return graph.linears(x, weights, biases)
    joined, *others = graph.linears(x, weights, biases, n_joined=len(sizes))
    joined = graph.clamp(joined, limit)
    return *(joined.columns(start, end) for start, end in pairwise(accumulate(sizes, initial=0))), *others


def normalize_heads(graph: Graph, x: Tensor, block: Tensors, name: str, head_dim: int, eps: float) -> Tensor:
    """Normalise each head, or all heads together, by the size of the weight; without weight return x."""
    if not block.has(name):
        return x
    size = math.prod(block.shape(name))
    return graph.rms_norm(x, block.vector(name, x.width if size == x.width else head_dim), eps)


def rotate_heads(
    graph: Graph, q: Tensor, k: Tensor, block: Tensors, attention: AttentionSpec, layer: int
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in place by their position, as their layer does; returns both."""
    if of_layer(attention.unrotated_layers, layer):
        return q, k
    rope = (of_layer(attention.windows, layer) and attention.window_rope) or attention.rope
    n_heads, n_kv_heads = attention.heads(layer)
    return rotate(graph, q, n_heads, rope, block), rotate(graph, k, n_kv_heads, rope, block)


def rotate(
    graph: Graph,
    x: Tensor,
    n_heads: int,
    rope: RopeSpec,
    block: Tensors,
    *,
    period: int = 1,
    backwards: bool = False,
) -> Tensor:
    """Rotate the heads of x in place by their position, rounded down to a multiple of `period`."""
    frequencies, magnitude = rope_frequencies(rope)
    divisors = rope_divisors(block, rope) if rope.divides else []
    style, short_context = _ROPE_STYLES[rope.style], rope.original_context_length
    frequencies = -frequencies if backwards else frequencies
    return graph.rope(x, n_heads, frequencies, style, magnitude, divisors, short_context, period)


def rope_divisors(block: Tensors, rope: RopeSpec) -> list[Vector]:
    """Return what the file has frequencies divided by: nothing, one set, or one for the trained context and a long one.

    The latter is LongRoPE: https://arxiv.org/abs/2402.13753.
    """
    model, n_pairs = block.whole, rope.n_rot // 2
    divisors = model.first_values("rope_freqs.weight", n_pairs)
    if divisors is not None:
        return [divisors]
    names = "rope_factors_short.weight", "rope_factors_long.weight"
    has_both = rope.scaling == "longrope" or any(model.has(name) for name in names)
    return [model.vector(name, n_pairs) for name in names] if has_both else []


def rope_frequencies(rope: RopeSpec) -> tuple[npt.NDArray[np.float32], float]:
    """Return radians a position for each pair, float32 [n_rot / 2], and the factor of cosine and sine.

    YaRN: https://arxiv.org/abs/2309.00071, as llama.cpp applies it (the ramp runs over pair indices). In multi-axis
    rotation a text token has the same position on the first three axes, and 0 on the fourth.
    """
    pairs = np.arange(rope.n_rot // 2)
    frequencies = rope.freq_base ** (-2.0 * pairs / rope.n_rot)
    magnitude = rope.magnitude
    if rope.scaling in {"linear", "longrope"}:
        frequencies /= rope.factor
    elif rope.scaling == "yarn":
        low, high = (_yarn_pair(rope, turns) for turns in (rope.yarn_fast, rope.yarn_slow))
        low, high = max(0.0, math.floor(low)), min(rope.n_rot - 1.0, math.ceil(high))
        kept = 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
        frequencies *= (1.0 - kept) / rope.factor + kept
        magnitude *= 1.0 + rope.yarn_slope * math.log(rope.factor)
    if rope.n_still:
        frequencies = np.concatenate([np.zeros(rope.n_still // 2), frequencies])
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


def of_layer(values: tuple[int, ...], layer: int) -> int:
    """Return a layer's value where each layer has one, else 0; a block for multi-token prediction may have none."""
    return values[layer] if layer < len(values) else 0


# -- feed-forward networks -------------------------------------------------------------------------------------------


def feed_forward(
    graph: Graph,
    x: Tensor,
    residual: Residual,
    block: Tensors,
    spec: ModelSpec,
    layer: int,
    activation: Activation = Activation.SILU,
) -> Tensor:
    """Add the feed-forward network of one block to the residual stream: mixture of experts, or dense if it has none."""
    if block.has("ffn_gate_inp.weight"):
        return mixture_of_experts(graph, x, residual, block, spec, layer, activation)
    out = scaled(graph, dense_network(graph, x, block, spec, layer, activation), spec.residual_scale)
    residual = recorded(residual)
    return out if residual is None else graph.add(residual, out)


def recorded(residual: Residual) -> Tensor | None:
    """Return what a network is added to, recorded now if it has not been before."""
    return residual() if callable(residual) else residual


def dense_network(
    graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int, activation: Activation
) -> Tensor:
    """Return what a feed-forward network gives that every token takes: down(act(gate x, up x))."""
    ffn_size = block.shape("ffn_up.weight")[0]
    parts = projection_names(block, "", activation)
    weights = [block.matrix(f"ffn_{part}.weight", ffn_size, spec.hidden_size) for part in parts]
    biases = [block.optional_vector(f"ffn_{part}.bias", ffn_size) for part in parts]
    projections = graph.linears(x, weights, biases)
    gated = gate_projections(graph, projections, activation, spec.moe.layer_limits(layer, routed=False))
    down = block.matrix("ffn_down.weight", spec.hidden_size, ffn_size)
    return graph.linear(gated, down, block.optional_vector("ffn_down.bias", spec.hidden_size))


def projection_names(block: Tensors, suffix: str, activation: Activation) -> tuple[str, ...]:
    """Return what a network takes its input to: gate and up, or with ReLU perhaps one projection that is both."""
    is_one = activation == Activation.RELU and not block.has(f"ffn_gate{suffix}.weight")
    return ("up",) if is_one else ("gate", "up")


def gate_projections(
    graph: Graph, projections: Sequence[Tensor], activation: Activation, limits: tuple[float, float]
) -> Tensor:
    """Join the projections of a network outside the routed experts: gate and up, or one that is both."""
    return graph.gate(projections[-1], projections[0], GATING_OF[_limited(activation, limits)], *limits)


def _limited(activation: Activation, limits: tuple[float, float]) -> Activation:
    """Return an activation as it is with limits, or without one (0)."""
    return Activation.SILU if activation == Activation.CLAMPED_SILU and not any(limits) else activation


def mixture_of_experts(
    graph: Graph,
    x: Tensor,
    residual: Residual,
    block: Tensors,
    spec: ModelSpec,
    layer: int,
    activation: Activation,
    logits: Tensor | None = None,
) -> Tensor:
    """Add routed experts and the shared expert to the residual stream, if there is one.

    `logits` are those of the router, if they are known already.

    out = residual + sum over chosen e of weight_e * down_e(act(gate_e x, up_e x))
                   + sigmoid(shared_gate . x) * down_s(silu(gate_s x) * up_s x)

    In some models what is added is multiplied by a factor: always, or where there is a shared expert.
    Everything that reads x itself is one operation, so that the router, whose result is waited for, is not alone in it.
    """
    moe, hidden_size = check_experts(spec, block), spec.hidden_size
    shared_inputs: dict[str, Weight] = {}
    inputs: dict[str, Weight] = {}
    if logits is None:
        inputs["router"] = block.matrix("ffn_gate_inp.weight", moe.n_experts, hidden_size)
    if moe.shared_ffn_size:
        if block.has("ffn_gate_inp_shexp.weight") and not moe.latent_size:
            inputs["shared_gate"] = block.matrix("ffn_gate_inp_shexp.weight", 1, hidden_size)
        shared_inputs = shared_projections(block, spec, activation)
        inputs |= shared_inputs
    router_bias = block.optional_vector("ffn_gate_inp.bias", moe.n_experts)
    biases_of_inputs = [router_bias if name == "router" else None for name in inputs]
    outs = graph.linears(x, tuple(inputs.values()), biases_of_inputs) if inputs else ()
    projected = dict(zip(inputs, outs, strict=True))

    routing = route(graph, projected["router"] if logits is None else logits, block, moe, layer)
    expert_out = routed_experts(graph, x, routing, block, spec, layer, activation)
    shared = None
    if moe.shared_ffn_size:
        down = block.matrix(name := f"ffn_down{moe.shared_suffix}.weight", hidden_size, block.shape(name)[-1])
        limits = moe.layer_limits(layer, routed=False)
        gated = gate_projections(graph, [projected[part] for part in shared_inputs], activation, limits)
        shared = graph.linear(gated, down)
    residual = recorded(residual)
    sum_scale = 1.0 if shared is None else moe.shared_sum_scale
    if moe.latent_size:
        assert sum_scale == 1.0
        out, norm = graph.combine(expert_out, routing, None), f"{moe.latent_name}_norm.weight"
        if block.has(norm):
            out = graph.rms_norm(out, block.vector(norm, moe.latent_size), spec.norm_eps)
        out = graph.linear(out, block.matrix(f"{moe.latent_name}_up.weight", hidden_size, moe.latent_size))
        out = out if shared is None else graph.add(out, shared)
        return out if residual is None else graph.add(residual, out)
    return graph.combine(
        expert_out,
        routing,
        residual,
        shared,
        projected.get("shared_gate"),
        weighted=not moe.weights_input,
        scale=spec.residual_scale * sum_scale,
    )


def shared_projections(block: Tensors, spec: ModelSpec, activation: Activation) -> dict[str, Weight]:
    """Return what the shared expert takes its input to, by `projection_names`.

    Gate and up are stored apart, or as one matrix (`ffn_up_shexp`: gate rows first).
    """
    suffix, width = spec.moe.shared_suffix, spec.hidden_size
    size, names = block.shape(f"ffn_down{suffix}.weight")[-1], projection_names(block, suffix, activation)
    is_one = len(names) == 2 and not block.has(f"ffn_gate{suffix}.weight")
    if is_one and block.shape(f"ffn_up{suffix}.weight")[0] == 2 * size:
        both = split_rows(block.matrix(f"ffn_up{suffix}.weight", 2 * size, width), size, size)
        return dict(zip(names, both, strict=True))
    return {name: block.matrix(f"ffn_{name}{suffix}.weight", size, width) for name in names}


def check_experts(spec: ModelSpec, block: Tensors) -> MoESpec:
    """Return the numbers of routed experts; raise `GGUFError` if the file has none for a block with a router."""
    if not spec.moe.n_experts:
        raise GGUFError(f"{block.file_name}: has a router ({block.prefix}ffn_gate_inp.weight) but no expert_count")
    return spec.moe


def route(graph: Graph, logits: Tensor, block: Tensors, moe: MoESpec, layer: int) -> Routing:
    """Choose the experts of each token by the logits of a block's router, or by a table if it has one.

    Raises `GGUFError` if the file says that no expert of this layer is used.
    """
    n_experts_used = moe.experts_used(layer)
    if not n_experts_used:
        raise GGUFError(
            f"{block.file_name}: has a router ({block.prefix}ffn_gate_inp.weight) of which no expert is used"
        )
    if block.has("ffn_gate_tid2eid.weight"):
        n_vocab = block.whole.shape("token_embd.weight")[0]
        table = block.table("ffn_gate_tid2eid.weight", n_vocab, n_experts_used)
        how = n_experts_used, _SCORINGS[moe.scoring], moe.normalize
        return graph.router(logits, *how, scale=moe.scale, table=table)
    return graph.router(
        logits,
        n_experts_used,
        _SCORINGS[moe.scoring],
        moe.normalize,
        block.optional_vector("exp_probs_b.bias" if block.has("exp_probs_b.bias") else "exp_probs_b", moe.n_experts),
        moe.n_groups,
        moe.n_groups_used,
        moe.scale,
    )


def routed_experts(
    graph: Graph, x: Tensor, routing: Routing, block: Tensors, spec: ModelSpec, layer: int, activation: Activation
) -> Tensor:
    """Return what the chosen experts give, one stretch of columns for each rank, to be combined."""
    moe, width = spec.moe, spec.hidden_size
    if moe.weights_input:
        x = graph.scale(x, 1.0, routing.weights)
    if moe.latent_size:
        width = moe.latent_size
        x = graph.linear(x, block.matrix(f"{moe.latent_name}_down.weight", width, spec.hidden_size))
    limits = moe.layer_limits(layer, routed=True)
    activation = _limited(activation, limits)
    projections, biases = expert_projections(block, spec, width, activation)
    return graph.experts(
        x,
        routing,
        *projections,
        block.experts("ffn_down_exps.weight", moe.n_experts, width, block.shape("ffn_down_exps.weight")[-1]),
        (*biases, block.optional_vector("ffn_down_exps.bias", moe.n_experts, width)),
        activation,
        *limits,
    )


def expert_projections(
    block: Tensors, spec: ModelSpec, width: int, activation: Activation
) -> tuple[tuple[Weight, Weight], tuple[Vector | None, Vector | None]]:
    """Return the experts' gate and up projections of so many inputs, and their biases.

    They are stored apart, as one matrix (`ffn_gate_up_exps`: gate rows first), or there is one that is both.
    """
    n_experts, size = spec.moe.n_experts, block.shape("ffn_down_exps.weight")[-1]  # layers may differ
    names = projection_names(block, "_exps", activation)
    names = names if len(names) == 2 else names * 2
    gate_bias, up_bias = (block.optional_vector(f"ffn_{name}_exps.bias", n_experts, size) for name in names)
    if block.has("ffn_gate_up_exps.weight"):
        gate, up = split_rows(block.experts("ffn_gate_up_exps.weight", n_experts, 2 * size, width), size, size)
    else:
        gate, up = (block.experts(f"ffn_{name}_exps.weight", n_experts, size, width) for name in names)
    return (gate, up), (gate_bias, up_bias)
