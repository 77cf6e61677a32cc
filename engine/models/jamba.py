"""Jamba 1.5 (Mini 52B-A12B, Large 398B-A94B) and smaller ones: Mamba, in some layers attention that is not rotated.

Every other layer of the large ones has experts.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Gating, Graph, Tensor
from engine.model_spec import ModelSpec, MoESpec, SelectiveScanSpec
from engine.models.binding import Keys, Tensors, split_rows
from engine.models.blocks import decoder, self_attention
from engine.models.state_space import recurrent_layers


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers = keys.n_layers()
    attention = replace(keys.attention(), unrotated_layers=(True,) * n_layers, layer_heads=(), layer_kv_heads=())
    has_experts = any(tensors.block(layer).has("ffn_gate_inp.weight") for layer in range(n_layers))
    moe = keys.mixture(tensors, normalize=False) if has_experts else MoESpec()  # files of dense ones count one expert
    return replace(
        keys.model(tensors, attention, moe),
        recurrent_layers=recurrent_layers(tensors, n_layers),
        selective_scan=SelectiveScanSpec(
            keys.size("ssm.inner_size"),
            keys.state_size(),
            keys.size("ssm.time_step_rank"),
            keys.kernel_size("ssm.conv_kernel"),
        ),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _mix)


def _mix(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    if spec.is_recurrent(layer):
        return _selective_scan(graph, x, block, spec)
    return self_attention(graph, x, block, spec, layer)


def _selective_scan(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Mamba, for each channel v, with a state s: https://arxiv.org/abs/2312.00752.

    dt = softplus(dt + dt_bias);  s = exp(a dt) s + dt v B;  out = s . C + d v

    v comes from a convolution over time, and from all channels dt (by a projection of low rank), B and C, each with a
    norm. The file holds a = -exp(A_log), which decays each value of a state at a rate of its own.
    """
    net, eps = spec.selective_scan, spec.norm_eps
    assert net is not None
    size, state_size, step_rank = net.inner_size, net.state_size, net.step_rank
    weight = block.matrix("ssm_in.weight", 2 * size, spec.hidden_size)
    v, z = graph.linears(x, split_rows(weight, size, size))
    kernel = block.vector("ssm_conv1d.weight", size, net.kernel_size)
    v = graph.causal_conv(v, [kernel], net.kernel_size, block.vector("ssm_conv1d.bias", size))
    weight = block.matrix("ssm_x.weight", step_rank + 2 * state_size, size)
    step, b, c = graph.linears(v, split_rows(weight, step_rank, state_size, state_size))
    step = graph.rms_norm(step, block.vector("ssm_dt_norm.weight", step_rank), eps)
    b = graph.rms_norm(b, block.vector("ssm_b_norm.weight", state_size), eps)
    c = graph.rms_norm(c, block.vector("ssm_c_norm.weight", state_size), eps)
    dt = graph.linear(step, block.matrix("ssm_dt.weight", size, step_rank), block.vector("ssm_dt.bias", size))
    a, skip = block.vector("ssm_a", size, state_size), block.vector("ssm_d", size)
    out = graph.gate(graph.selective_scan(v, dt, b, c, a, skip), z, Gating.SILU)
    return graph.linear(out, block.matrix("ssm_out.weight", spec.hidden_size, size))
