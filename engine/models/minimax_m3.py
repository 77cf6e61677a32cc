"""MiniMax-M3 (428B-A23B), its text: attention to blocks of positions that an indexer chooses for each key head.

The indexer has a small query for each key head of attention and one small key a token, normalised and rotated like
those of attention: see `graph.SelectBlocks`. The leading layers are dense and look at all positions. Files have norms
with the 1 that is added to their weights.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph, Selected, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import AttentionSpec, BlockIndexerSpec, ModelSpec
from engine.models.binding import LARGEST_HEAD, Keys, Tensors
from engine.models.blocks import attend, decoder, normalize_heads, project_qkv, rotate, rotate_heads, self_attention

_MOST_BLOCKS, _LARGEST_BLOCK = 1 << 14, 1 << 16  # lists of blocks are kept for each token; positions are 32 bits wide


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = keys.attention()
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    return keys.model(tensors, replace(attention, indexer=_read_indexer(keys, attention)), moe)


def _read_indexer(keys: Keys, attention: AttentionSpec) -> BlockIndexerSpec:
    n_heads, key_dim, top_k, block_size, n_newest = (
        keys.size(f"attention.indexer.{name}")
        for name in ("head_count", "key_length", "top_k", "block_size", "local_blocks")
    )
    if attention.layer_heads or attention.layer_kv_heads:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.attention.head_count or head_count_kv differs between layers; this "
            "version needs one value for all layers"
        )
    if n_heads != attention.n_kv_heads:
        raise keys.wrong("attention.indexer.head_count", n_heads, f"attention.head_count_kv ({attention.n_kv_heads})")
    if key_dim < attention.rope.n_rot:
        expected = f"at least rope.dimension_count ({attention.rope.n_rot})"
        raise keys.wrong("attention.indexer.key_length", key_dim, expected)
    if n_newest > top_k:
        raise keys.wrong("attention.indexer.local_blocks", n_newest, f"at most attention.indexer.top_k ({top_k})")
    return BlockIndexerSpec(
        n_heads=n_heads,
        key_dim=keys.at_most("attention.indexer.key_length", key_dim, LARGEST_HEAD),
        top_k=keys.at_most("attention.indexer.top_k", top_k, _MOST_BLOCKS),
        block_size=keys.at_most("attention.indexer.block_size", block_size, _LARGEST_BLOCK),
        n_newest=n_newest,
        first_layer=keys.size("leading_dense_block_count", 0, minimum=0),
    )


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return decoder(spec, tensors, _attention, activation=Activation.CLAMPED_SWISH)


def _attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Attend, in layers behind the leading ones to chosen blocks; one operation projects for the choice as well."""
    attention = spec.attention
    assert isinstance(attention, AttentionSpec)
    indexer = attention.indexer
    assert isinstance(indexer, BlockIndexerSpec)
    if layer < indexer.first_layer:
        return self_attention(graph, x, block, spec, layer)
    *sizes, _ = attention.widths(layer)
    index_weights = (
        block.matrix("indexer.q_proj.weight", indexer.n_heads * indexer.key_dim, spec.hidden_size),
        block.matrix("indexer.k_proj.weight", indexer.key_dim, spec.hidden_size),
    )
    q, k, v, index_q, index_k = project_qkv(graph, x, block, spec.hidden_size, sizes, index_weights)
    selected = _select(graph, index_q, index_k, block, spec, indexer)
    q = normalize_heads(graph, q, block, "attn_q_norm.weight", attention.head_dim, spec.norm_eps)
    k = normalize_heads(graph, k, block, "attn_k_norm.weight", attention.head_dim, spec.norm_eps)
    q, k = rotate_heads(graph, q, k, block, attention, layer)
    return attend(graph, q, k, v, block, spec, layer, selected=selected)


def _select(graph: Graph, q: Tensor, k: Tensor, block: Tensors, spec: ModelSpec, indexer: BlockIndexerSpec) -> Selected:
    """Choose blocks, by queries and keys as they are projected."""
    assert isinstance(spec.attention, AttentionSpec)
    rope, n_heads, key_dim = spec.attention.rope, indexer.n_heads, indexer.key_dim
    q = graph.rms_norm(q, block.vector("indexer.q_norm.weight", key_dim), spec.norm_eps)
    k = graph.rms_norm(k, block.vector("indexer.k_norm.weight", key_dim), spec.norm_eps)
    q, k = rotate(graph, q, n_heads, rope, block), rotate(graph, k, 1, rope, block)
    return graph.select_blocks(q, k, n_heads, indexer.top_k, indexer.block_size, indexer.n_newest)
