"""Kimi K3 (2.8T-A104B), its text: Kimi Linear with attention residuals, SiTU, and experts in a space of their own.

With attention residuals (https://arxiv.org/abs/2603.15031, there in blocks) a sub-layer takes a mean of the residual
stream and of what it was at the beginnings of some layers before: see `graph.MixResiduals`. In each of these layers the
stream begins anew, with what attention gives. Decays are bounded as in Ling 3, the gate of delta attention comes from
one matrix, and latent attention has gates, too.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import MOST_RESIDUALS, Activation, Graph, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import ModelSpec
from engine.models import kimi_linear
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, feed_forward, layers, normalize
from engine.models.deepseek2 import read_latent_attention

_PERIOD, _LIMIT, _UP_LIMIT = "attn_res.block_size", "activation.situ_beta", "activation.situ_linear_beta"
_SMALLEST_LIMIT, _LARGEST_LIMIT = 1e-3, 1e6


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    n_layers, attention = keys.n_layers(), read_latent_attention(keys)
    bound = kimi_linear.read_decay_bound(keys) if keys.has(kimi_linear.DECAY_BOUND) else 0.0
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    moe = replace(
        moe,
        latent_size=keys.size("expert_latent_length", 0, minimum=0),
        latent_name="ffn_routed",
        situ_limits=(_read_limit(keys, _LIMIT), _read_limit(keys, _UP_LIMIT, or_none=True)),
    )
    is_gated = tensors.first_width("attn_gate.weight", n_layers) > 0
    return replace(
        keys.model(tensors, replace(attention, gated=is_gated), moe),
        recurrent_layers=kimi_linear.read_recurrent_layers(keys),
        delta_net=kimi_linear.read_delta_net(keys, attention.n_heads, bound),
        residual_period=_read_period(keys, n_layers),
    )


def _read_limit(keys: Keys, key: str, *, or_none: bool = False) -> float:
    """Read what a factor of SiTU is smoothly brought to within; 0: it is not, which files may say by less, too."""
    limit = keys.number(key)
    if or_none and limit <= 0:
        return 0.0
    if not _SMALLEST_LIMIT <= limit <= _LARGEST_LIMIT:
        expected = f"a number from {_SMALLEST_LIMIT:g} to {_LARGEST_LIMIT:.0f}"
        raise keys.wrong(key, limit, expected + (", or 0 for none" if or_none else ""))
    return limit


def _read_period(keys: Keys, n_layers: int) -> int:
    """Read of how many layers the first keeps the residual stream as it comes in; 0: none does."""
    period = keys.size(_PERIOD, minimum=0)
    n_residuals = 1 + -(-n_layers // period) if period else 1
    if n_residuals > MOST_RESIDUALS:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.{_PERIOD} is {period}, so that {n_residuals} rows are mixed in the "
            f"last of {n_layers} layers; this version mixes at most {MOST_RESIDUALS}"
        )
    return period


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    if not spec.residual_period:
        return decoder(spec, tensors, kimi_linear.mix, activation=Activation.SITU)
    kept: list[Tensor] = []  # the residual stream as it was

    def mixed(graph: Graph, x: Tensor, tensors: Tensors, name: str) -> Tensor:
        return graph.mix_residuals((*kept, x), tensors.vector(name, spec.hidden_size), spec.norm_eps)

    def layer(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, number: int) -> Tensor:
        h = mixed(graph, x, block, "attn_res_score.weight")  # in the first layer of one row, which stays as it is
        h = kimi_linear.mix(graph, normalize(graph, h, block, "attn_norm.weight", spec), block, spec, number)
        if number % spec.residual_period == 0:
            kept.append(x)
            x = h
        else:
            x = graph.add(x, h)
        h = normalize(graph, mixed(graph, x, block, "ffn_res_score.weight"), block, "ffn_norm.weight", spec)
        return feed_forward(graph, h, x, block, spec, number, Activation.SITU)

    def leave(graph: Graph, x: Tensor) -> Tensor:
        return mixed(graph, x, tensors, "output_res_score.weight")

    return layers(spec, tensors, layer, leave=leave)
