"""Qwen4 as far as there is some of it (Qwen3.8-Flash-Next): Qwen3.5's layers with streams, chosen blocks and n-grams.

Three gated delta nets to one gated attention, each before routed and shared experts, as in `qwen35moe.py`, but that
delta nets are gated by a sigmoid. Attention looks at whole blocks of positions and at a token's own block while that is
not whole. An indexer chooses blocks by one small key each: the mean of its tokens' keys, normalised and rotated by the
position of the first of them. One layer adds embeddings of n-grams to the streams (`ngrams.py`).
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Gating, Graph, Selected, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import AttentionSpec, ModelSpec, PooledIndexerSpec
from engine.models import hyper_connections
from engine.models.binding import LARGEST_HEAD, Keys, Tensors
from engine.models.blocks import rotate
from engine.models.ngrams import add_ngrams, read_ngrams
from engine.models.qwen35moe import (
    gated_attention,
    gated_delta_net,
    project_delta_net,
    read_delta_net,
    read_recurrent_layers,
)

_MOST_SELECTED = 1 << 14  # positions; lists of blocks are kept for each token


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = keys.attention()
    if attention.value_dim:
        raise keys.wrong("attention.value_length", attention.value_dim, f"attention.key_length ({attention.head_dim})")
    recurrent_layers = read_recurrent_layers(keys, keys.n_layers())
    attention = replace(attention, indexer=_read_indexer(keys, attention, recurrent_layers))
    return replace(
        keys.model(tensors, attention, keys.mixture(tensors)),
        recurrent_layers=recurrent_layers,
        delta_net=read_delta_net(keys, grouped=False),
        hyper_connections=hyper_connections.read_low_rank(keys),
        ngrams=read_ngrams(keys, tensors, recurrent_layers),
    )


def _read_indexer(keys: Keys, attention: AttentionSpec, recurrent_layers: tuple[bool, ...]) -> PooledIndexerSpec:
    n_heads, key_dim, top_k = (keys.size(f"attention.indexer.{name}") for name in ("head_count", "key_length", "top_k"))
    if key_dim < attention.rope.n_rot:
        expected = f"at least rope.dimension_count ({attention.rope.n_rot})"
        raise keys.wrong("attention.indexer.key_length", key_dim, expected)
    return PooledIndexerSpec(
        n_heads=n_heads,
        key_dim=keys.at_most("attention.indexer.key_length", key_dim, LARGEST_HEAD),
        top_k=keys.at_most("attention.indexer.top_k", top_k, _MOST_SELECTED),
        periods=_read_periods(keys, top_k, recurrent_layers),
    )


def _read_periods(keys: Keys, top_k: int, recurrent_layers: tuple[bool, ...]) -> tuple[int, ...]:
    """Read how many positions are a block in each layer that attends; by default none are."""
    key, n_layers = "attention.compress_ratios", len(recurrent_layers)
    periods = keys.sizes(key, 0)
    periods = periods * n_layers if len(periods) == 1 else periods
    if len(periods) < n_layers:
        raise keys.wrong(key, f"{len(periods)} numbers", f"one for each of {n_layers} layers")
    found = tuple(0 if is_recurrent else n for n, is_recurrent in zip(periods, recurrent_layers, strict=False))
    for period in found:
        if period and top_k % period:
            raise UnsupportedModelError(
                f"{keys.file_name}: {keys.architecture}.{key} has a {period}; this version needs divisors of "
                f"attention.indexer.top_k ({top_k})"
            )
    return found


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return hyper_connections.low_rank_decoder(spec, tensors, _mix, add_ngrams)


def _mix(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Look back, by a recurrent state or by attention; one operation projects for the choice of blocks as well."""
    if spec.is_recurrent(layer):
        return gated_delta_net(graph, *project_delta_net(graph, x, block, spec), block, spec, Gating.SIGMOID)
    assert isinstance(spec.attention, AttentionSpec)
    indexer = spec.attention.indexer
    assert isinstance(indexer, PooledIndexerSpec)
    if not indexer.periods[layer]:
        return gated_attention(graph, x, block, spec, layer)
    weights = (
        block.matrix("indexer.q_proj.weight", indexer.n_heads * indexer.key_dim, spec.hidden_size),
        block.matrix("indexer.k_proj.weight", indexer.key_dim, spec.hidden_size),
    )

    def select(q: Tensor, k: Tensor) -> Selected:
        return _select(graph, q, k, block, spec, indexer, indexer.periods[layer])

    return gated_attention(graph, x, block, spec, layer, weights, select)


def _select(
    graph: Graph, q: Tensor, k: Tensor, block: Tensors, spec: ModelSpec, indexer: PooledIndexerSpec, period: int
) -> Selected:
    """Choose blocks, by queries and keys as they are projected.

    A text token has no position on the fourth axis of its rotation, but a block has that of its first token on all.
    """
    assert isinstance(spec.attention, AttentionSpec)
    rope, n_heads, key_dim = spec.attention.rope, indexer.n_heads, indexer.key_dim
    k = graph.compress(k, None, None, key_dim, period)
    k = graph.rms_norm(k, block.vector("indexer.k_norm.weight", key_dim), spec.norm_eps)
    k = rotate(graph, k, 1, replace(rope, sections=()), block, period=period)
    q = graph.rms_norm(q, block.vector("indexer.q_norm.weight", key_dim), spec.norm_eps)
    q = rotate(graph, q, n_heads, rope, block)
    return graph.select_positions(q, k, None, n_heads, indexer.top_k // period, 1.0, period, has_tail=True)
