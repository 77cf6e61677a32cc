"""LFM2 (8B-A1B, 24B-A2B, and dense): most layers are short convolutions over time between two gates."""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Gating, Graph, Tensor
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, Tensors, split_rows
from engine.models.blocks import decoder, self_attention


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, attention = keys.n_layers(), keys.attention()
    window = keys.size("attention.sliding_window", 0, minimum=0)
    attention = replace(attention, windows=(window,) * n_layers if window else ())
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), scales=True)
    recurrent = tuple(tensors.block(layer).has("shortconv.in_proj.weight") for layer in range(n_layers))
    return replace(
        keys.model(tensors, attention, moe),
        recurrent_layers=recurrent,
        short_conv_kernel=keys.kernel_size("shortconv.l_cache"),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _mix, output_norm="token_embd_norm.weight")  # so the files call it


def _mix(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    if spec.is_recurrent(layer):
        return _short_conv(graph, x, block, spec)
    return self_attention(graph, x, block, spec, layer)


def _short_conv(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec) -> Tensor:
    """Convolve each channel over the last tokens, between gates: W_out (c * conv(b * v)) with b, c, v = W_in x."""
    size = spec.hidden_size
    weight = block.matrix("shortconv.in_proj.weight", 3 * size, size)
    b, c, v = graph.linears(x, split_rows(weight, size, size, size))
    kernel = block.vector("shortconv.conv.weight", size, spec.short_conv_kernel)
    out = graph.causal_conv(graph.gate(v, b, Gating.PRODUCT), [kernel], spec.short_conv_kernel, activates=False)
    out = graph.gate(out, c, Gating.PRODUCT)
    return graph.linear(out, block.matrix("shortconv.out_proj.weight", size, size))
