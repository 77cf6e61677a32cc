"""Qwen3.5 and Qwen3.6 MoE: three gated delta nets to one gated attention, each before routed and shared experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.devices.graph import Gating, Graph, Selected, Tensor, Weight
from engine.errors import UnsupportedModelError
from engine.model_spec import AttentionSpec, DeltaNetSpec, ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import attend, decoder, normalize_heads, project_qkv, rotate_heads

_log = logging.getLogger("engine")
_DT_BIAS, _DT_BIAS_UNUSUAL = "ssm_dt.bias", "ssm_dt"


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers = keys.n_layers()
    if keys.has("nextn_predict_layers") and not tensors.block(0).has("attn_norm.weight"):
        raise UnsupportedModelError(
            f"{keys.file_name}: holds only the block for multi-token prediction (no blk.0.attn_norm.weight); "
            "open the file of the model itself"
        )
    recurrent_layers = read_recurrent_layers(keys, n_layers)
    if any(tensors.has(f"blk.{i}.{_DT_BIAS_UNUSUAL}") for i, recurrent in enumerate(recurrent_layers) if recurrent):
        _log.warning(
            "%s: names its delta-net bias %s as converters other than llama.cpp's do; the order of value heads in "
            "such files is not known for sure: if the text is nonsense, convert with llama.cpp",
            keys.file_name,
            _DT_BIAS_UNUSUAL,
        )
    return replace(
        keys.with_head(keys.model(tensors, keys.attention(), keys.mixture(tensors)), tensors),
        recurrent_layers=recurrent_layers,
        delta_net=read_delta_net(keys, grouped=False),
    )


def read_recurrent_layers(keys: Keys, n_layers: int, period: int = 4) -> tuple[bool, ...]:
    """Return for each layer whether it carries a state; by default all but the last of every `period`."""
    if keys.has("attention.recurrent_layers"):
        flags = keys.flags("attention.recurrent_layers")
        if len(flags) < n_layers:
            raise keys.wrong("attention.recurrent_layers", f"{len(flags)} values", f"one for each of {n_layers} layers")
        return tuple(flags[:n_layers])
    interval = keys.size("full_attention_interval", period)
    return tuple((layer + 1) % interval != 0 for layer in range(n_layers))


def read_delta_net(keys: Keys, *, grouped: bool) -> DeltaNetSpec:
    """Read the sizes of the delta net."""
    spec = DeltaNetSpec(
        n_k_heads=keys.size("ssm.group_count"),
        n_v_heads=keys.size("ssm.time_step_rank"),
        head_dim=keys.state_size(),
        kernel_size=keys.kernel_size("ssm.conv_kernel"),
        grouped=grouped,
    )
    if spec.n_v_heads % spec.n_k_heads:
        raise keys.wrong("ssm.time_step_rank", spec.n_v_heads, f"a multiple of ssm.group_count ({spec.n_k_heads})")
    if keys.size("ssm.inner_size") != spec.value_size:
        expected = f"{spec.value_size}, ssm.time_step_rank times ssm.state_size"
        raise keys.wrong("ssm.inner_size", keys.size("ssm.inner_size"), expected)
    return spec


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _mix, ffn_norm="post_attention_norm.weight")


def _mix(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    if spec.is_recurrent(layer):
        return gated_delta_net(graph, *project_delta_net(graph, x, block, spec), block, spec)
    return gated_attention(graph, x, block, spec, layer)


def gated_attention(
    graph: Graph,
    x: Tensor,
    block: Tensors,
    spec: ModelSpec,
    layer: int,
    more: Sequence[Weight] = (),
    select: Callable[..., Selected] | None = None,
) -> Tensor:
    """Attend, then gate every value: the query projection gives each head its query and, after it, its gate.

    What `more` matrices give chooses what is looked at.
    """
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    (n_heads, _), head_dim = attention.heads(layer), attention.head_dim
    q_size, k_size, v_size, _ = attention.widths(layer)
    qg, k, v, *others = project_qkv(graph, x, block, spec.hidden_size, (2 * q_size, k_size, v_size), more)
    selected = select(*others) if select else None
    q, gate = graph.split_heads(qg, n_heads)
    q = normalize_heads(graph, q, block, "attn_q_norm.weight", head_dim, spec.norm_eps)
    k = normalize_heads(graph, k, block, "attn_k_norm.weight", head_dim, spec.norm_eps)
    q, k = rotate_heads(graph, q, k, block, attention, layer)
    return attend(graph, q, k, v, block, spec, layer, gate, selected=selected)


def project_delta_net(
    graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Project to what a delta net takes: queries, keys and values side by side, the gate z, beta and alpha."""
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
    return qkv, z, beta, alpha


def gated_delta_net(
    graph: Graph,
    qkv: Tensor,
    z: Tensor,
    beta: Tensor,
    alpha: Tensor,
    block: Tensors,
    spec: ModelSpec,
    gating: Gating = Gating.SILU,
) -> Tensor:
    """Linear attention with a decaying state S, for each value head: https://arxiv.org/abs/2412.06464.

    S = exp(a softplus(alpha + dt_bias)) S;  S += k (sigmoid(beta) (v - S^T k))^T;  out = S^T q

    The file holds a = -exp(A_log). Which key head a value head is paired with: `DeltaNetSpec.grouped`. What is found is
    gated by z.
    """
    net = spec.delta_net
    assert net is not None
    kernel = block.vector("ssm_conv1d.weight", net.n_channels, net.kernel_size)
    qkv = graph.causal_conv(qkv, [kernel], net.kernel_size)
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
        net.grouped,
        eps=spec.norm_eps,
    )
    out = graph.rms_norm(out, block.vector("ssm_norm.weight", net.head_dim), spec.norm_eps)
    out = graph.gate(out, z, gating)
    return graph.linear(out, block.matrix("ssm_out.weight", spec.hidden_size, net.value_size))
