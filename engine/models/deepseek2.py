"""DeepSeek V2 and V3, R1, Kimi K2, GLM-4.7-Flash, Mistral 4 and Large 3: multi-head latent attention.

Attention runs in the absorbed form: the cache keeps the latent vector and one rotated key part a token, and each head's
query is taken into the latent space instead of every key out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from engine.devices.graph import Gating, Graph, Selected, Tensor
from engine.model_spec import LatentAttentionSpec, ModelSpec, MoESpec
from engine.models.binding import LARGEST_HEAD, Keys, Tensors
from engine.models.blocks import decoder, normalize_heads, of_layer, rotate

_GLM_FLASH_LAYERS, _GLM_FLASH_VOCAB = (47, 48), 154880  # its early files lack the key for the sigmoid router


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    return keys.with_head(keys.model(tensors, read_scaled_attention(keys), _read_mixture(keys, tensors)), tensors)


def read_latent_attention(keys: Keys, suffix: str = "", n_heads: int = 0) -> LatentAttentionSpec:
    """Read the sizes of latent attention without rotation.

    Where layers differ, `suffix` ends the names of the keys for some of them, and `n_heads` are theirs.
    """
    head_key, latent_key = f"attention.key_length_mla{suffix}", f"attention.kv_lora_rank{suffix}"
    rope_dim, head_dim = keys.size("rope.dimension_count", minimum=0), keys.size(head_key)
    if head_dim <= rope_dim:
        raise keys.wrong(head_key, head_dim, f"more than rope.dimension_count ({rope_dim})")
    latent_dim = keys.at_most(latent_key, keys.size(latent_key), LARGEST_HEAD - rope_dim)
    return LatentAttentionSpec(
        n_heads=n_heads or keys.size("attention.head_count"),
        query_rank=keys.size("attention.q_lora_rank", 0, minimum=0),
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        key_dim=head_dim - rope_dim,
        value_dim=keys.size(f"attention.value_length_mla{suffix}"),
        scale=1.0 / math.sqrt(head_dim),
    )


def read_scaled_attention(keys: Keys) -> LatentAttentionSpec:
    """Read the sizes of latent attention and its rotation, and what YaRN makes of its scale."""
    attention = read_latent_attention(keys)
    rope_dim = attention.rope_dim
    # With YaRN the scores are scaled up. The key holds 0.1 times the multiplier; then cosine and sine are not scaled.
    yarn = keys.rope(rope_dim, "norm")
    slope = 0.1
    if keys.has("rope.scaling.yarn_log_multiplier"):
        slope = keys.number("rope.scaling.yarn_log_multiplier")
        yarn = keys.rope(rope_dim, "norm", yarn_slope=0.0)
    stretch = 1.0 + slope * math.log(yarn.factor) if yarn.scaling == "yarn" else 1.0
    temperature_slope = keys.number("attention.temperature_scale", 0.0)
    return replace(
        attention,
        scale=stretch**2 / math.sqrt(attention.key_dim + rope_dim),
        rope=yarn,
        temperature_period=keys.size("attention.temperature_length") if temperature_slope else 1,
        temperature_slope=temperature_slope,
    )


def _read_mixture(keys: Keys, tensors: Tensors) -> MoESpec:
    n_vocab = tensors.shape("token_embd.weight")[0]
    is_glm_flash = keys.n_layers() in _GLM_FLASH_LAYERS and n_vocab == _GLM_FLASH_VOCAB
    return keys.mixture(
        tensors, scoring=keys.scoring("sigmoid" if is_glm_flash else "softmax"), normalize=None, scales=True
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, latent_attention)


def latent_attention(
    graph: Graph,
    x: Tensor,
    block: Tensors,
    spec: ModelSpec,
    layer: int,
    select: Callable[[Tensor], Selected] | None = None,
) -> Tensor:
    """Attend in the latent space: score = (K_h q_h) . c + q_rope . k_rope, and head h's value is V_h applied to c.

    Where there are gates, each head's result, or each of its values, is multiplied by the sigmoid of its own. `select`
    gives the positions that layers without a window look at, of the compressed query. The file may have sinks, and a
    norm for the rotated part of the key, if there is one.
    """
    attention, hidden_size = spec.attention, spec.hidden_size
    assert isinstance(attention, LatentAttentionSpec)
    mla, window = attention.of_layer(layer), of_layer(attention.windows, layer)
    n_heads, latent_dim, rope_dim = mla.n_heads, mla.latent_dim, mla.rope_dim
    query_size = n_heads * (mla.key_dim + rope_dim)
    selected = None
    weights = [block.matrix("attn_kv_a_mqa.weight", latent_dim + rope_dim, hidden_size)]
    if mla.gated:
        n_gates = n_heads if block.shape("attn_gate.weight")[0] == n_heads else n_heads * mla.value_dim
        weights.append(block.matrix("attn_gate.weight", n_gates, hidden_size))
    if mla.query_rank:
        query_weight = block.matrix("attn_q_a.weight", mla.query_rank, hidden_size)
        q, latent, *gates = graph.linears(x, (query_weight, *weights))
        q = graph.rms_norm(q, block.vector("attn_q_a_norm.weight", mla.query_rank), spec.norm_eps)
        selected = select(q) if select and not window else None
        q = graph.linear(q, block.matrix("attn_q_b.weight", query_size, mla.query_rank))
    else:
        query_weight = block.matrix("attn_q.weight", query_size, hidden_size)
        q, latent, *gates = graph.linears(x, (query_weight, *weights))
    q_rope: Tensor | None = None
    k_rope: Tensor | None = None
    if rope_dim:
        q, q_rope = graph.split_heads(q, n_heads, mla.key_dim)
        latent, k_rope = graph.split_heads(latent, 1, latent_dim)
        k_rope = normalize_heads(graph, k_rope, block, "attn_k_norm.weight", rope_dim, spec.norm_eps)
        if mla.rope is not None:
            q_rope, k_rope = rotate(graph, q_rope, n_heads, mla.rope, block), rotate(graph, k_rope, 1, mla.rope, block)

    q = graph.head_linear(q, block.experts("attn_k_b.weight", n_heads, latent_dim, mla.key_dim))
    q = graph.join_heads(q, q_rope, n_heads) if q_rope else q
    if mla.temperature_slope:
        q = graph.scale_by_position(q, 0, mla.temperature_period, mla.temperature_slope)
    k = graph.rms_norm(latent, block.vector("attn_kv_a_norm.weight", latent_dim), spec.norm_eps)
    k = graph.join_heads(k, k_rope, 1) if k_rope else k
    out = graph.attention(
        q,
        k,
        None,
        n_heads,
        1,
        mla.scale,
        value_dim=latent_dim,
        sinks=block.optional_vector("attn_sinks.weight", n_heads),
        window=window,
        selected=selected,
    )
    out = graph.head_linear(out, block.experts("attn_v_b.weight", n_heads, mla.value_dim, latent_dim))
    if gates:
        out = graph.gate(out, gates[0], Gating.SIGMOID)
    return graph.linear(out, block.matrix("attn_output.weight", hidden_size, n_heads * mla.value_dim))
