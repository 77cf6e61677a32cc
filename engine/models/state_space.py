"""Mamba-2, the recurrent layers of Nemotron and Granite 4."""

from __future__ import annotations

from engine.devices.graph import Gating, Graph, Tensor
from engine.model_spec import ModelSpec, StateSpaceSpec
from engine.models.binding import Keys, Tensors, split_rows


def recurrent_layers(tensors: Tensors, n_layers: int) -> tuple[bool, ...]:
    """Return for each layer whether it is a state space."""
    return tuple(tensors.block(layer).has("ssm_in.weight") for layer in range(n_layers))


def read_state_space(keys: Keys) -> StateSpaceSpec:
    """Read the sizes of state spaces."""
    n_heads, n_groups, inner_size = (keys.size(f"ssm.{key}") for key in ("time_step_rank", "group_count", "inner_size"))
    if inner_size % n_heads:
        raise keys.wrong("ssm.inner_size", inner_size, f"a multiple of ssm.time_step_rank ({n_heads})")
    if n_heads % n_groups:
        raise keys.wrong("ssm.time_step_rank", n_heads, f"a multiple of ssm.group_count ({n_groups})")
    kernel_size = keys.kernel_size("ssm.conv_kernel")
    return StateSpaceSpec(n_heads, n_groups, inner_size // n_heads, keys.state_size(), kernel_size)


def state_space(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Mamba-2, for each head, with a state S: https://arxiv.org/abs/2405.21060.

    dt = softplus(dt + dt_bias);  S = exp(a dt) S + dt B v^T;  out = S^T C + d v

    v, B and C come from a convolution over time. Heads of a group share B and C. What is found is gated, and
    normalised group by group. The file holds a = -exp(A_log).
    """
    net = spec.state_space
    assert net is not None
    keys_end = net.inner_size + net.key_size
    n_channels = keys_end + net.key_size
    sizes = net.inner_size, n_channels, net.n_heads
    weight = block.matrix("ssm_in.weight", sum(sizes), spec.hidden_size)
    z, channels, dt = graph.linears(x, split_rows(weight, *sizes))
    kernel = block.vector("ssm_conv1d.weight", n_channels, net.kernel_size)
    bias = block.optional_vector("ssm_conv1d.bias", n_channels)
    channels = graph.causal_conv(channels, [kernel], net.kernel_size, bias)
    out = graph.delta_net(
        channels.columns(keys_end, n_channels),
        channels.columns(net.inner_size, keys_end),
        channels.columns(0, net.inner_size),
        None,
        dt,
        block.vector("ssm_a", net.n_heads, 1),
        block.vector("ssm_dt.bias", net.n_heads),
        net.n_groups,
        net.n_heads,
        grouped=True,
        eps=0.0,
        skip=block.vector("ssm_d", net.n_heads, 1),
    )
    out = graph.gate(out, z, Gating.SILU)
    group_size = net.inner_size // net.n_groups
    norm = block.vector("ssm_norm.weight", net.n_groups, group_size)
    out = graph.rms_norm(out, norm, spec.norm_eps, group_size)
    return graph.linear(out, block.matrix("ssm_out.weight", spec.hidden_size, net.inner_size))
