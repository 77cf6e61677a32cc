"""Embeddings of n-grams: rows of a large table, chosen by hashes of the last tokens, in one layer.

A token's hashes are those of itself with the one before it, with the two before it, and so on, several of each
(`graph.HashTokens`). The rows are projected to a value, and to a key for each residual stream; how much of the value a
stream gets depends on how far its key agrees with it. A convolution over tokens that are as far apart as the longest
n-gram follows.
"""

from __future__ import annotations

import numpy as np

from engine.devices.graph import MOST_CONVOLVED, MOST_HASHED, Graph, Tensor
from engine.errors import UnsupportedModelError
from engine.model_spec import ModelSpec, NgramSpec
from engine.models.binding import Keys, Tensors
from engine.models.hyper_connections import normalize_streams

_MOST_HEADS = 64
_LARGEST_ROW = (1 << 31) - 1
_FLOOR = 1e-6  # of how far key and stream agree, before its square root
_TABLE = "per_layer_token_embd.weight"


def read_ngrams(keys: Keys, tensors: Tensors, recurrent_layers: tuple[bool, ...]) -> NgramSpec | None:
    """Read how rows are chosen and what is made of them; None if the file has no such table."""
    layers = keys.sizes("ple.layers") if keys.has("ple.layers") else []
    if not layers:
        return None
    if len(layers) > 1:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.ple.layers has {len(layers)} layers; this version needs one"
        )
    (layer,) = layers
    if layer >= len(recurrent_layers) or not recurrent_layers[layer]:
        raise keys.wrong("ple.layers", layer, "a layer with a delta net")
    n_hashed = keys.at_most("ple.ngram_size", keys.size("ple.ngram_size", minimum=2), MOST_HASHED)
    n_alike = keys.at_most("ple.heads_per_ngram", keys.size("ple.heads_per_ngram"), _MOST_HEADS // (n_hashed - 1))
    n_heads = (n_hashed - 1) * n_alike
    kernel_size = keys.kernel_size("ple.conv_kernel")
    keys.at_most("ple.conv_kernel", kernel_size, MOST_CONVOLVED // n_hashed + 1)
    head_dim = keys.size("embedding_length_per_layer_input")
    if n_heads * head_dim != keys.size("embedding_length"):
        expected = f"embedding_length ({keys.size('embedding_length')}) over {n_heads} heads"
        raise keys.wrong("embedding_length_per_layer_input", head_dim, expected)
    spec = NgramSpec(
        layer=layer,
        multipliers=tuple(value % (1 << 64) for value in _first(keys, "ple.layer_multipliers", n_hashed)),
        sizes=_first(keys, "ple.head_vocab_sizes", n_heads),
        offsets=_first(keys, "ple.head_offsets", n_heads),
        end_id=keys.size("ple.eos_token_id", minimum=0),
        head_dim=head_dim,
        kernel_size=kernel_size,
    )
    for size, offset in zip(spec.sizes, spec.offsets, strict=True):
        if size < 1 or offset < 0 or offset + size > _LARGEST_ROW:
            expected = f"sizes of at least 1 from offsets of at least 0 on, up to row {_LARGEST_ROW}"
            raise keys.wrong("ple.head_vocab_sizes", f"{size} from {offset} on", expected)
    n_rows = tensors.shape(_TABLE)[0]
    if n_rows < spec.n_rows:
        raise keys.wrong("ple.head_vocab_sizes", f"{spec.n_rows} rows", f"at most the {n_rows} of {_TABLE}")
    return spec


def _first(keys: Keys, key: str, n: int) -> tuple[int, ...]:
    """Return the first numbers of an array that has at least so many."""
    values = keys.integers(key)
    if len(values) < n:
        raise keys.wrong(key, f"{len(values)} numbers", f"at least {n}")
    return tuple(values[:n])


def add_ngrams(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Add embeddings of n-grams to the residual streams x, in the layer that has them."""
    ngrams = spec.ngrams
    if ngrams is None or layer != ngrams.layer:
        return x
    ids = graph.hash_tokens(
        np.array(ngrams.multipliers, np.uint64),
        np.array(ngrams.sizes, np.uint32),
        np.array(ngrams.offsets, np.uint32),
        ngrams.end_id,
    )
    table = block.whole.matrix(_TABLE, block.whole.shape(_TABLE)[0], ngrams.head_dim)
    rows = graph.embed(table, ids=ids)
    key, value = graph.linears(
        rows,
        (
            block.matrix("ple_key.weight", x.width, spec.hidden_size),
            block.matrix("ple_value.weight", spec.hidden_size, spec.hidden_size),
        ),
    )
    key = normalize_streams(graph, key, block, "ple_norm_key.weight", spec)
    query = normalize_streams(graph, x, block, "ple_norm_query.weight", spec)
    value = graph.gate_by_agreement(key, query, value, _FLOOR)
    convolved = graph.causal_conv(
        normalize_streams(graph, value, block, "ple_norm_conv.weight", spec),
        [block.vector("ple_conv1d.weight", x.width, ngrams.kernel_size)],
        ngrams.kernel_size,
        dilation=len(ngrams.multipliers),
    )
    return graph.add(x, graph.add(value, convolved))
