"""North Mini Code (Cohere, 30B-A3B): attention and network side by side, both of the same norm of what comes in.

Layers without a window are not rotated, but for the dense ones at the beginning and that for multi-token prediction.
The shared expert counts as much as all routed ones: half each. The norm is LayerNorm, or RMSNorm in files that have an
epsilon for it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from engine.devices.graph import Graph, Tensor
from engine.model_spec import AttentionSpec, ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import feed_forward, layers, normalize, self_attention

_PERIOD = 4  # of the layers without a window, beginning with the first, where the file does not list them


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    spec = keys.model(tensors, _read_attention(keys), replace(moe, shared_sum_scale=0.5))
    is_rms = keys.number("attention.layer_norm_rms_epsilon", 0.0) > 0
    spec = keys.with_head(spec, tensors)
    return replace(
        spec,
        norm_eps=spec.norm_eps if is_rms else keys.number("attention.layer_norm_epsilon"),
        centers_norms=not is_rms,
        logit_scale=keys.number("logit_scale") or 1.0,  # 0 stands for "not used"
    )


def _read_attention(keys: Keys) -> AttentionSpec:
    attention, windows = keys.attention("norm"), keys.windows(keys.n_layers(), _PERIOD, without=0)
    keys.size("attention.sliding_window", minimum=1)  # it also says which layers are rotated
    keys.need_one_rotation(attention.rope)
    n_dense = keys.size("leading_dense_block_count", minimum=0)
    unrotated = tuple(not window and layer >= n_dense for layer, window in enumerate(windows[: keys.n_layers()]))
    return replace(attention, windows=windows, unrotated_layers=unrotated)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return layers(spec, tensors, _layer)


def _layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    h = normalize(graph, x, block, "attn_norm.weight", spec)
    return feed_forward(graph, h, partial(_attend, graph, x, h, block, spec, layer), block, spec, layer)


def _attend(graph: Graph, x: Tensor, h: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Add attention to the residual stream: it needs nothing of the experts, and runs while these are waited for."""
    return graph.add(x, self_attention(graph, h, block, spec, layer))
