"""DeepSeek V3.2 and GLM-5: multi-head latent attention over the positions that an indexer chooses.

The indexer has small queries, made of the compressed query of attention, and one small key a token, both rotated in
their first values, and a weight for each of its heads: see `graph.SelectPositions`. In GLM-5.2 some layers have none
and look at what the last layer with one chose. Keys of some tokens may become one (`glm5_next.py`): then all of these
tokens are chosen together.

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

TYPES = "attention.indexer.types"  # the key for which layers choose
NORM_EPS = 1e-6  # files do not say it
_MOST_SELECTED = 1 << 14  # a list for each token is kept
_SHARING_CONTEXT = 1 << 20  # early files of GLM-5.2 are told from GLM-5 by it: they lack the key for sharing layers


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = read_scaled_attention(keys)
    assert attention.rope is not None
    is_glm = keys.architecture == "glm-dsa"
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid" if is_glm else "softmax"), normalize=None, scales=True)
    rope = attention.rope if is_glm else replace(attention.rope, style="neox")
    attention = replace(attention, indexer=read_indexer(keys, rope, _layers(keys, is_glm)))
    return keys.with_head(keys.model(tensors, attention, moe), tensors)


def read_indexer(
    keys: Keys, rope: RopeSpec | None, layers: tuple[bool, ...], norm_eps: float = NORM_EPS
) -> IndexerSpec:
    """Read the sizes of what chooses positions in those layers, rotated like that, if at all."""
    if not keys.size("attention.q_lora_rank", 0, minimum=0):
        raise keys.wrong("attention.q_lora_rank", 0, "at least 1")
    key_dim, top_k = keys.size("attention.indexer.key_length"), keys.size("attention.indexer.top_k")
    keys.at_most("attention.indexer.key_length", key_dim, LARGEST_HEAD)
    keys.at_most("attention.indexer.top_k", top_k, _MOST_SELECTED)
    if rope and key_dim < rope.n_rot:
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
    if may_share and keys.has(TYPES):
        return read_choosing_layers(keys)
    if may_share and keys.size("context_length") >= _SHARING_CONTEXT:
        return tuple(layer < 2 or layer % 4 == 2 for layer in range(n_layers))
    return (True,) * n_layers


def read_choosing_layers(keys: Keys) -> tuple[bool, ...]:
    """Read which layers choose; the others look at what the last one before them chose."""
    layers = tuple(keys.flags_of_layers(TYPES))
    if not layers[0]:
        raise keys.wrong(TYPES, "false for the first layer", "true: there is no layer before it")
    return layers


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, choosing_attention(spec))


def choosing_attention(spec: ModelSpec) -> Layer:
    """Return what records latent attention over the positions that the layers with an indexer choose.

    A block for multi-token prediction looks at all positions, as llama.cpp's does, whether or not it has an indexer.
    """
    indexer = _indexer(spec)
    chosen: list[Selected] = []  # by the layers so far that choose

    def attend(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
        def select(q: Tensor) -> Selected:
            if indexer.layers[layer]:
                chosen.append(_select(graph, x, q, block, spec))
            return chosen[-1]

        return latent_attention(graph, x, block, spec, layer, select if layer != spec.draft_layer else None)

    return attend


def _indexer(spec: ModelSpec) -> IndexerSpec:
    assert isinstance(spec.attention, LatentAttentionSpec)
    assert spec.attention.indexer is not None
    return spec.attention.indexer


def _select(graph: Graph, x: Tensor, compressed: Tensor, block: Tensors, spec: ModelSpec) -> Selected:
    """Choose positions: queries of the compressed query of attention, keys and weights of what attention takes."""
    indexer = _indexer(spec)
    n_heads, key_dim, pool_size = indexer.n_heads, indexer.key_dim, indexer.pool_size
    names = [("indexer.attn_k", key_dim), ("indexer.proj", n_heads)]
    if pool_size > 1:
        names.append(("indexer_compressor_gate", key_dim))
    k, weights, *scores = graph.linears(
        x, [block.matrix(f"{name}.weight", n_rows, spec.hidden_size) for name, n_rows in names]
    )
    q = graph.linear(compressed, block.matrix("indexer.attn_q_b.weight", n_heads * key_dim, compressed.width))
    norm, bias = (block.vector(f"indexer.k_norm.{part}", key_dim) for part in ("weight", "bias"))
    k = graph.rms_norm(k, norm, indexer.norm_eps, centers=True, bias=bias)
    if indexer.rope:
        q, k = rotate(graph, q, n_heads, indexer.rope, block), rotate(graph, k, 1, indexer.rope, block)
    if scores:
        biases = block.vector("indexer_compressor_ape.weight", pool_size, key_dim)
        k = graph.compress(k, scores[0], biases, key_dim, pool_size)
    how = indexer.top_k // pool_size, (n_heads * key_dim) ** -0.5, pool_size
    return graph.select_positions(q, k, weights, n_heads, *how, has_tail=pool_size > 1)
