"""Kimi Linear (Kimi-Linear-48B-A3B): three layers of Kimi delta attention to one of latent attention.

Nothing is rotated: the recurrent layers alone know what comes first.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Gating, Graph, Tensor, Weight
from engine.model_spec import DeltaNetSpec, ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import Layer, decoder
from engine.models.deepseek2 import latent_attention, read_latent_attention

DECAY_BOUND = "kda.gate_lower_bound"


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = read_latent_attention(keys)
    return replace(
        keys.model(tensors, attention, keys.mixture(tensors, scoring=keys.scoring("sigmoid"), scales=True)),
        recurrent_layers=read_recurrent_layers(keys),
        delta_net=read_delta_net(keys, attention.n_heads),
    )


def read_recurrent_layers(keys: Keys) -> tuple[bool, ...]:
    """Return which layers are recurrent: those without heads for keys and values."""
    n_layers = keys.n_layers()
    layer_kv_heads = keys.sizes("attention.head_count_kv")
    if len(layer_kv_heads) == 1:
        layer_kv_heads *= n_layers
    if len(layer_kv_heads) < n_layers:
        raise keys.wrong("attention.head_count_kv", layer_kv_heads, f"one number for each of {n_layers} layers")
    return tuple(n_kv_heads == 0 for n_kv_heads in layer_kv_heads[:n_layers])


def read_delta_net(keys: Keys, n_heads: int, decay_bound: float = 0.0) -> DeltaNetSpec:
    """Read the sizes of Kimi delta attention, which has as many heads for keys as for values."""
    head_dim, kernel_size = keys.state_size("kda.head_dim"), keys.kernel_size("ssm.conv_kernel")
    return DeltaNetSpec(n_heads, n_heads, head_dim, kernel_size, decay_bound=decay_bound)


def read_decay_bound(keys: Keys) -> float:
    """Return the logarithm of the strongest decay."""
    bound = keys.number(DECAY_BOUND)
    if bound >= 0:
        raise keys.wrong(DECAY_BOUND, bound, "a number below 0")
    return bound


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, mix)


def mix(
    graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int, attend: Layer = latent_attention
) -> Tensor:
    """Look back, by a recurrent state or by latent attention."""
    if spec.is_recurrent(layer):
        return _delta_attention(graph, x, block, spec)
    return attend(graph, x, block, spec, layer)


def _delta_attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Linear attention with a state S, for each head, whose channels decay apart: https://arxiv.org/abs/2510.26692.

    S = diag(exp(a softplus(alpha + dt_bias))) S;  S += k (sigmoid(beta) (v - S^T k))^T;  out = S^T q

    q, k and v come from convolutions over time; alpha, as wide as k, and the gate of what is found come from matrices,
    which may be of low rank. The file holds a = -exp(A_log), one for each head.
    """
    net, hidden_size = spec.delta_net, spec.hidden_size
    assert net is not None
    n_heads, size = net.n_v_heads, net.value_size
    if block.has("attn_qkv.weight"):
        qkv_weights = [block.matrix("attn_qkv.weight", net.n_channels, hidden_size)]
    else:
        qkv_weights = [block.matrix(f"attn_{part}.weight", size, hidden_size) for part in "qkv"]
    beta_weight = block.matrix("ssm_beta.weight", n_heads, hidden_size)
    alpha_weight, *alpha_factor = _matrix_or_factors(block, "ssm_f", size, net.head_dim, hidden_size)
    gate_weight, *gate_factor = _matrix_or_factors(block, "ssm_g", size, net.head_dim, hidden_size)
    weights = (*qkv_weights, beta_weight, alpha_weight, gate_weight)
    qkv, beta, alpha, gate = graph.linears(x, weights, n_joined=len(qkv_weights))
    for weight in alpha_factor:
        alpha = graph.linear(alpha, weight)
    for weight in gate_factor:
        gate = graph.linear(gate, weight)
    kernels = [block.vector(f"ssm_conv1d_{part}.weight", size, 1, net.kernel_size) for part in "qkv"]
    qkv = graph.causal_conv(qkv, kernels, net.kernel_size)
    out = graph.delta_net(
        qkv.columns(0, size),
        qkv.columns(size, 2 * size),
        qkv.columns(2 * size, 3 * size),
        beta,
        alpha,
        block.vector("ssm_a", n_heads),
        block.vector("ssm_dt.bias", size),
        n_heads,
        n_heads,
        net.grouped,
        eps=net.eps or spec.norm_eps,
        decay_bound=net.decay_bound,
    )
    out = graph.rms_norm(out, block.vector("ssm_norm.weight", net.head_dim), spec.norm_eps)
    out = graph.gate(out, gate, Gating.SIGMOID)
    return graph.linear(out, block.matrix("attn_output.weight", hidden_size, size))


def _matrix_or_factors(block: Tensors, name: str, n_rows: int, rank: int, n_cols: int) -> list[Weight]:
    """Return a matrix, or the two of low rank that stand for it, in the order that they are multiplied with."""
    if block.has(f"{name}_b.weight"):
        return [block.matrix(f"{name}_a.weight", rank, n_cols), block.matrix(f"{name}_b.weight", n_rows, rank)]
    whole = f"{name}.weight" if block.has(f"{name}.weight") else f"{name}_a.weight"
    return [block.matrix(whole, n_rows, n_cols)]
