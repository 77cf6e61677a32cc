"""Qwen3.5 and Qwen3.6 MoE: three gated delta nets to one gated attention, each before routed and shared experts."""

from __future__ import annotations

import logging

from engine.devices.graph import Gating, Graph, RopeStyle, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import DeltaNetSpec, ModelSpec, MoESpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import embed, feed_forward, output_head, project_qkv, rope_frequencies

_log = logging.getLogger("engine")
_DT_BIAS, _DT_BIAS_UNUSUAL = "ssm_dt.bias", "ssm_dt"


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_blocks, n_mtp = keys.n_blocks(), keys.size("nextn_predict_layers", 0, minimum=0)
    n_layers = n_blocks - n_mtp  # the blocks for multi-token prediction come last and are not run
    if n_layers < 1:
        raise keys.wrong("nextn_predict_layers", n_mtp, f"less than block_count ({n_blocks})")
    if n_mtp and not tensors.has("blk.0.attn_norm.weight"):
        raise UnsupportedModelError(
            f"{keys.file_name}: holds only the block for multi-token prediction (no blk.0.attn_norm.weight); "
            "open the file of the model itself"
        )
    hidden_size = keys.size("embedding_length")
    n_experts, n_experts_used = keys.experts()
    ffn_size = keys.size("expert_feed_forward_length")
    recurrent_layers = _recurrent_layers(keys, n_layers)
    if any(tensors.has(f"blk.{i}.{_DT_BIAS_UNUSUAL}") for i, recurrent in enumerate(recurrent_layers) if recurrent):
        _log.warning(
            "%s: names its delta-net bias %s as converters other than llama.cpp's do; the order of value heads in "
            "such files is not known for sure: if the text is nonsense, convert with llama.cpp",
            keys.file_name,
            _DT_BIAS_UNUSUAL,
        )
    return ModelSpec(
        architecture=keys.architecture,
        name=keys.name(),
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_vocab=tensors.shape("token_embd.weight")[0],
        context_length=keys.size("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        attention=keys.attention(hidden_size),
        moe=MoESpec(n_experts, n_experts_used, ffn_size, keys.size("expert_shared_feed_forward_length", ffn_size)),
        recurrent_layers=recurrent_layers,
        delta_net=_delta_net_spec(keys),
    )


def _recurrent_layers(keys: Keys, n_layers: int) -> tuple[bool, ...]:
    if keys.has("attention.recurrent_layers"):
        flags = keys.flags("attention.recurrent_layers")
        if len(flags) < n_layers:
            raise keys.wrong("attention.recurrent_layers", f"{len(flags)} values", f"one for each of {n_layers} layers")
        return tuple(flags[:n_layers])
    interval = keys.size("full_attention_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(n_layers))


def _delta_net_spec(keys: Keys) -> DeltaNetSpec:
    spec = DeltaNetSpec(
        n_k_heads=keys.size("ssm.group_count"),
        n_v_heads=keys.size("ssm.time_step_rank"),
        head_dim=keys.size("ssm.state_size"),
        kernel_size=keys.size("ssm.conv_kernel", minimum=2),
    )
    if spec.n_v_heads % spec.n_k_heads:
        raise keys.wrong("ssm.time_step_rank", spec.n_v_heads, f"a multiple of ssm.group_count ({spec.n_k_heads})")
    if keys.size("ssm.inner_size") != spec.value_size:
        expected = f"{spec.value_size}, ssm.time_step_rank times ssm.state_size"
        raise keys.wrong("ssm.inner_size", keys.size("ssm.inner_size"), expected)
    return spec


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    graph = Graph()
    x = embed(graph, tensors, spec)
    for layer in range(spec.n_layers):
        block = tensors.block(layer)
        h = graph.rms_norm(x, block.vector("attn_norm.weight", spec.hidden_size), spec.norm_eps)
        mixer = gated_delta_net if spec.recurrent_layers[layer] else gated_attention
        x = graph.add(x, mixer(graph, h, block, spec))
        h = graph.rms_norm(x, block.vector("post_attention_norm.weight", spec.hidden_size), spec.norm_eps)
        x = feed_forward(graph, h, x, block, spec)
    output_head(graph, x, tensors, spec)
    return graph


def gated_attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Attend, then gate every value: the query projection gives each head its query and, after it, its gate."""
    attention = spec.attention
    n_heads, n_kv_heads, head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
    qg, k, v = project_qkv(graph, x, block, spec.hidden_size, 2 * n_heads * head_dim, n_kv_heads * head_dim)
    q, gate = graph.split_heads(qg, n_heads)
    q = graph.rms_norm(q, block.vector("attn_q_norm.weight", head_dim), spec.norm_eps)
    k = graph.rms_norm(k, block.vector("attn_k_norm.weight", head_dim), spec.norm_eps)
    frequencies, magnitude = rope_frequencies(attention.rope)
    q = graph.rope(q, n_heads, frequencies, RopeStyle.NEOX, magnitude)
    k = graph.rope(k, n_kv_heads, frequencies, RopeStyle.NEOX, magnitude)
    out = graph.attention(q, k, v, n_heads, n_kv_heads, attention.scale)
    out = graph.gate(out, gate, Gating.SIGMOID)
    return graph.linear(out, block.matrix("attn_output.weight", spec.hidden_size, n_heads * head_dim))


def gated_delta_net(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Linear attention with a decaying state S, for each value head: https://arxiv.org/abs/2412.06464.

    S = exp(a softplus(alpha + dt_bias)) S;  S += k (sigmoid(beta) (v - S^T k))^T;  out = S^T q

    The file holds a = -exp(A_log), and value heads in an order that pairs head h with key head h mod n_k_heads.
    """
    net = spec.delta_net
    assert net is not None
    qkv, z, beta, alpha = graph.linears(
        x,
        (
            block.matrix("attn_qkv.weight", net.n_channels, spec.hidden_size),
            block.matrix("attn_gate.weight", net.value_size, spec.hidden_size),
            block.matrix("ssm_beta.weight", net.n_v_heads, spec.hidden_size),
            block.matrix("ssm_alpha.weight", net.n_v_heads, spec.hidden_size),
        ),
    )
    kernel = block.vector("ssm_conv1d.weight", net.n_channels, net.kernel_size)
    qkv = graph.causal_conv(qkv, kernel, net.kernel_size)
    dt_bias = _DT_BIAS if block.has(_DT_BIAS) or not block.has(_DT_BIAS_UNUSUAL) else _DT_BIAS_UNUSUAL
    out = graph.delta_net(
        qkv.columns(0, net.key_size),
        qkv.columns(net.key_size, 2 * net.key_size),
        qkv.columns(2 * net.key_size, net.n_channels),
        beta,
        alpha,
        block.vector("ssm_a", net.n_v_heads),
        block.vector(dt_bias, net.n_v_heads),
        net.n_k_heads,
        net.n_v_heads,
        grouped=False,
        eps=spec.norm_eps,
    )
    out = graph.rms_norm(out, block.vector("ssm_norm.weight", net.head_dim), spec.norm_eps)
    out = graph.gate(out, z, Gating.SILU)
    return graph.linear(out, block.matrix("ssm_out.weight", spec.hidden_size, net.value_size))
