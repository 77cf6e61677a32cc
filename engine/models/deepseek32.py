"""DeepSeek V3.2 and GLM-5: multi-head latent attention over the positions that an indexer chooses.

The indexer has small queries, made of the compressed query of attention, and one small key a token, both rotated in
their first values, and a weight for each of its heads: see `graph.SelectPositions`. In GLM-5.2 some layers have none
and look at what the last layer with one chose.

Others turn queries and keys by a Hadamard matrix before their products, for the sake of caches of few bits. That leaves
the products what they are, so it is not done here.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph, Selected, Tensor
from engine.model_spec import IndexerSpec, LatentAttentionSpec, ModelSpec, RopeSpec
from engine.models.binding import LARGEST_HEAD, Keys, Tensors
from engine.models.blocks import Layer, decoder, rotate
from engine.models.deepseek2 import latent_attention, read_scaled_attention

_TYPES = "attention.indexer.types"
_NORM_EPS = 1e-6  # files do not say it
_MOST_SELECTED = 1 << 14  # a list for each token is kept
_SHARING_CONTEXT = 1 << 20  # early files of GLM-5.2 are told from GLM-5 by it: they lack the key for sharing layers


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = read_scaled_attention(keys)
    assert attention.rope is not None
    is_glm = keys.architecture == "glm-dsa"
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid" if is_glm else "softmax"), normalize=None, scales=True)
    rope = attention.rope if is_glm else replace(attention.rope, style="neox")
    return keys.model(tensors, replace(attention, indexer=read_indexer(keys, rope, _layers(keys, is_glm))), moe)


def read_indexer(keys: Keys, rope: RopeSpec, layers: tuple[bool, ...], norm_eps: float = _NORM_EPS) -> IndexerSpec:
    """Read the sizes of what chooses positions in those layers, rotated like that."""
    if not keys.size("attention.q_lora_rank", 0, minimum=0):
        raise keys.wrong("attention.q_lora_rank", 0, "at least 1")
    key_dim, top_k = keys.size("attention.indexer.key_length"), keys.size("attention.indexer.top_k")
    keys.at_most("attention.indexer.key_length", key_dim, LARGEST_HEAD)
    keys.at_most("attention.indexer.top_k", top_k, _MOST_SELECTED)
    if key_dim < rope.n_rot:
        raise keys.wrong("attention.indexer.key_length", key_dim, f"at least rope.dimension_count ({rope.n_rot})")
    return IndexerSpec(
        n_heads=keys.size("attention.indexer.head_count"),
        key_dim=key_dim,
        top_k=top_k,
        norm_eps=norm_eps,
        rope=rope,
        layers=layers,
    )


def _layers(keys: Keys, may_share: bool) -> tuple[bool, ...]:
    """Return which layers choose: all, or as a key says."""
    n_layers = keys.n_layers()
    if may_share and keys.has(_TYPES):
        return read_choosing_layers(keys)
    if may_share and keys.size("context_length") >= _SHARING_CONTEXT:
        return tuple(layer < 2 or layer % 4 == 2 for layer in range(n_layers))
    return (True,) * n_layers


def read_choosing_layers(keys: Keys) -> tuple[bool, ...]:
    """Read which layers choose; the others look at what the last one before them chose."""
    layers = tuple(keys.flags_of_layers(_TYPES))
    if not layers[0]:
        raise keys.wrong(_TYPES, "false for the first layer", "true: there is no layer before it")
    return layers


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, choosing_attention(spec))


def choosing_attention(spec: ModelSpec) -> Layer:
    """Return what records latent attention over the positions that the layers with an indexer choose."""
    indexer = _indexer(spec)
    chosen: list[Selected] = []  # by the layers so far that choose

    def attend(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
        def select(q: Tensor) -> Selected:
            if indexer.layers[layer]:
                chosen.append(_select(graph, x, q, block, spec))
            return chosen[-1]

        return latent_attention(graph, x, block, spec, layer, select)

    return attend


def _indexer(spec: ModelSpec) -> IndexerSpec:
    assert isinstance(spec.attention, LatentAttentionSpec)
    assert spec.attention.indexer is not None
    return spec.attention.indexer


def _select(graph: Graph, x: Tensor, compressed: Tensor, block: Tensors, spec: ModelSpec) -> Selected:
    """Choose positions: queries of the compressed query of attention, keys and weights of what attention takes."""
    indexer = _indexer(spec)
    n_heads, key_dim = indexer.n_heads, indexer.key_dim
    k, weights = graph.linears(
        x,
        (
            block.matrix("indexer.attn_k.weight", key_dim, spec.hidden_size),
            block.matrix("indexer.proj.weight", n_heads, spec.hidden_size),
        ),
    )
    q = graph.linear(compressed, block.matrix("indexer.attn_q_b.weight", n_heads * key_dim, compressed.width))
    k = graph.rms_norm(k, block.vector("indexer.k_norm.weight", key_dim), indexer.norm_eps, centers=True)
    k = graph.add(k, block.vector("indexer.k_norm.bias", key_dim))
    q, k = rotate(graph, q, n_heads, indexer.rope, block), rotate(graph, k, 1, indexer.rope, block)
    return graph.select_positions(q, k, weights, n_heads, indexer.top_k, (n_heads * key_dim) ** -0.5)
