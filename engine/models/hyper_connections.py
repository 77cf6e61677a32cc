"""Hyper-connections: several residual streams in the place of one (https://arxiv.org/abs/2409.19606).

A sub-layer takes one row, a sum of all streams, and what it gives is added to each of them; the weights of that sum,
and the gates of what is added, are made anew for each token of the streams themselves (`graph.ReduceStreams`). In some
models streams are mixed before something is added to them (https://arxiv.org/abs/2512.24880). They begin as copies of
the embeddings, and once more become one row before the output norm, in some models their mean.

In others a sub-layer takes a mean of the streams, each normalised for itself, with a gate for every value that two
matrices of low rank make of all of them; the gate of what is added is projected from the same. There are no other norms
before sub-layers and before the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.devices.graph import Activation, Gating, Graph, Tensor
from engine.model_spec import HyperConnectionSpec, ModelSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import Layer, feed_forward, layers, normalize

_MOST_STREAMS, _MOST_MIXED_STREAMS = 8, 4  # that the kernels of every device can do
_MOST_NORMALIZATIONS = 100  # 20 in all files
_MIXED_MAGNITUDE = 2.0  # of the gates of streams that are mixed
_LOW_RANK_MAGNITUDE = 2.0  # a gate of 0 before its sigmoid leaves what is added as it is


def read_hyper_connections(keys: Keys) -> HyperConnectionSpec:
    """Read their number, and what weights and gates are made with."""
    n_streams = keys.size("hyper_connection.count")
    return HyperConnectionSpec(
        n_streams=keys.at_most("hyper_connection.count", n_streams, _MOST_STREAMS),
        offset=keys.number("hyper_connection.epsilon"),
        magnitude=keys.number("hyper_connection.magnitude"),
    )


def read_mixed_streams(keys: Keys, *, averages: bool = False) -> HyperConnectionSpec:
    """Read the same for streams that are mixed."""
    n_streams = keys.size("hyper_connection.count")
    n_normalizations = keys.size("hyper_connection.sinkhorn_iterations", minimum=0)
    keys.at_most("hyper_connection.sinkhorn_iterations", n_normalizations, _MOST_NORMALIZATIONS)
    return HyperConnectionSpec(
        n_streams=keys.at_most("hyper_connection.count", n_streams, _MOST_MIXED_STREAMS),
        offset=keys.number("hyper_connection.epsilon"),
        magnitude=_MIXED_MAGNITUDE,
        n_normalizations=max(1, n_normalizations),  # the first is always done
        averages=averages,
    )


def read_low_rank(keys: Keys) -> HyperConnectionSpec:
    """Read the number of streams whose values are gated one by one, and the rank of these gates."""
    n_streams = keys.size("hyper_connection.count", minimum=2)
    return HyperConnectionSpec(
        n_streams=keys.at_most("hyper_connection.count", n_streams, _MOST_STREAMS),
        offset=0.0,
        magnitude=_LOW_RANK_MAGNITUDE,
        rank=keys.size("hyper_connection.low_rank"),
    )


def decoder(spec: ModelSpec, tensors: Tensors, mixer: Layer, activation: Activation = Activation.SILU) -> Graph:
    """Record a pre-norm decoder: in each block a mixer of tokens, then a feed-forward network, added to the streams."""
    n_scales = 3 if _of(spec).n_normalizations else 2

    def mix_and_feed(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
        h, *how = _reduce(graph, x, block, "hc_attn", spec, n_scales)
        h = normalize(graph, h, block, "attn_norm.weight", spec)
        x = graph.add_to_streams(x, mixer(graph, h, block, spec, layer), *how)
        h, *how = _reduce(graph, x, block, "hc_ffn", spec, n_scales)
        h = normalize(graph, h, block, "ffn_norm.weight", spec)
        return graph.add_to_streams(x, feed_forward(graph, h, None, block, spec, layer, activation), *how)

    def leave(graph: Graph, x: Tensor) -> Tensor:
        if _of(spec).averages:
            return _mean(graph, x, _of(spec).n_streams)
        (row,) = _reduce(graph, x, tensors, "output_hc", spec, 1)
        return row

    return layers(spec, tensors, mix_and_feed, enter=_copies(spec), leave=leave)


def low_rank_decoder(spec: ModelSpec, tensors: Tensors, mixer: Layer, before: Layer) -> Graph:
    """Record a decoder whose sub-layers take gated means of the streams; `before` makes of these what a block takes."""

    def feed(graph: Graph, h: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
        return feed_forward(graph, h, None, block, spec, layer)

    def mix_and_feed(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
        x = before(graph, x, block, spec, layer)
        for name, sub_layer in (("hc_attn", mixer), ("hc_ffn", feed)):
            h, gates = _gated_mean(graph, x, block, name, spec, [f"{name}_inject.weight"])
            x = graph.add_to_streams(x, sub_layer(graph, h, block, spec, layer), gates, magnitude=_of(spec).magnitude)
        return x

    def leave(graph: Graph, x: Tensor) -> Tensor:
        (row,) = _gated_mean(graph, x, tensors, "output_hc", spec)
        return row

    return layers(spec, tensors, mix_and_feed, None, enter=_copies(spec), leave=leave)


def normalize_streams(graph: Graph, x: Tensor, tensors: Tensors, name: str, spec: ModelSpec) -> Tensor:
    """Normalise each stream for itself; weights are stored as one row, or as one for each stream."""
    shape = (x.width,) if len(tensors.shape(name)) == 1 else (x.width // spec.hidden_size, spec.hidden_size)
    return graph.rms_norm(x, tensors.vector(name, *shape), spec.norm_eps, spec.hidden_size)


def _gated_mean(
    graph: Graph, x: Tensor, tensors: Tensors, name: str, spec: ModelSpec, inject: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """Make one row of the streams, and a gate for each of them by a matrix if it is named.

    y = norm(x) / n;  out = sum over streams of sigmoid(up silu(down y)) * y;  gates = inject y
    """
    how = _of(spec)
    y = graph.scale(normalize_streams(graph, x, tensors, f"{name}_norm.weight", spec), 1 / how.n_streams)
    down = tensors.matrix(f"{name}_down.weight", how.rank, x.width)
    low, *gates = graph.linears(y, [down, *(tensors.matrix(gate, how.n_streams, x.width) for gate in inject)])
    low = graph.gate(low, low, Gating.SIGMOID)
    kept = graph.linear(low, tensors.matrix(f"{name}_up.weight", x.width, how.rank))
    return graph.gate(y, kept, Gating.SIGMOID, n_streams=how.n_streams), *gates


def _copies(spec: ModelSpec) -> Callable[[Graph, Tensor], Tensor]:
    """Return what makes the streams of the embeddings."""

    def enter(graph: Graph, x: Tensor) -> Tensor:
        streams = x
        for _ in range(_of(spec).n_streams - 1):
            streams = graph.join_heads(streams, x, 1)
        return streams

    return enter


def _reduce(graph: Graph, x: Tensor, tensors: Tensors, name: str, spec: ModelSpec, n_scales: int) -> tuple[Tensor, ...]:
    """Make one row of the streams, with two scales gates for them, with three their mixing, by tensors of that name."""
    how = _of(spec)
    n_mixes = how.n_streams * (n_scales if n_scales < 3 else 2 + how.n_streams)
    return graph.reduce_streams(
        x,
        tensors.vector(f"{name}_fn.weight", n_mixes, x.width),
        tensors.vector(f"{name}_scale.weight", n_scales),
        tensors.vector(f"{name}_base.weight", n_mixes),
        spec.norm_eps,
        how.offset,
        how.magnitude,
        how.n_streams,
        how.n_normalizations if n_scales > 2 else 0,
    )


def _mean(graph: Graph, x: Tensor, n_streams: int) -> Tensor:
    width = x.width // n_streams
    total = x.columns(0, width)
    for i in range(1, n_streams):
        total = graph.add(total, x.columns(i * width, (i + 1) * width))
    return graph.scale(total, 1 / n_streams)


def _of(spec: ModelSpec) -> HyperConnectionSpec:
    assert spec.hyper_connections is not None
    return spec.hyper_connections
