"""DeepSeek V4: attention to the last positions and to keys that some tokens share, and mixed residual streams.

All query heads look at one key, which is its own value: what they find is rotated back by the query's position. Beside
the positions of a window a token sees, by layer, nothing; a key for every 128 tokens; or some of the keys for every 4
tokens, each made of 8, which an indexer chooses by keys that are made alike (`graph.Compress`). In the first layers
experts are chosen by token id.

Others turn an indexer's queries and keys by a Hadamard matrix; see `deepseek32.py`.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Activation, Graph, Selected, Tensor, Weight
from engine.errors import UnsupportedModelError
from engine.model_spec import CompressedAttentionSpec, IndexerSpec, ModelSpec, RopeSpec
from engine.models import hyper_connections
from engine.models.binding import LARGEST_HEAD, Keys, Tensors
from engine.models.blocks import rotate
from engine.models.deepseek32 import read_indexer

_SHORT_PERIOD, _LONG_PERIOD = 4, 128


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    behind = tensors.block(keys.n_layers())  # the block for multi-token prediction, if the file says there is one
    if behind.has("attn_norm.weight") and not behind.has("nextn.eh_proj.weight"):
        keys = keys.without_heads()  # as some files do: it was left out, and the key still counts it
    n_layers = keys.n_layers()
    scoring = keys.scoring("sqrt_softplus")
    if scoring != "sqrt_softplus":
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.expert_gating_func stands for {scoring}; this version needs 4 "
            "(square root of softplus)"
        )
    _check_tables(keys, tensors, n_layers)
    moe = keys.mixture(tensors, scoring=scoring, normalize=None, scales=True)
    spec = keys.model(tensors, _read_attention(keys), keys.limited(moe))
    return replace(spec, hyper_connections=hyper_connections.read_mixed_streams(keys))


def _check_tables(keys: Keys, tensors: Tensors, n_layers: int) -> None:
    """Refuse a file whose tables of experts are in other layers than it says."""
    n_tables = keys.size("hash_layer_count", 0, minimum=0)
    for layer in range(n_layers):
        if tensors.block(layer).has("ffn_gate_tid2eid.weight") != (layer < n_tables):
            raise keys.wrong("hash_layer_count", n_tables, "as many as leading blocks have ffn_gate_tid2eid.weight")


def _read_attention(keys: Keys) -> CompressedAttentionSpec:
    head_dim, n_heads = keys.size("attention.key_length"), keys.size("attention.head_count")
    keys.at_most("attention.key_length", head_dim, LARGEST_HEAD)
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise keys.wrong("attention.value_length", keys.size("attention.value_length"), f"key_length ({head_dim})")
    n_groups = keys.size("attention.output_group_count")
    if n_heads % n_groups:
        raise keys.wrong("attention.output_group_count", n_groups, f"a divisor of attention.head_count ({n_heads})")
    periods = _read_periods(keys)
    compressed_rope = _read_compressed_rope(keys, head_dim)
    n_still = compressed_rope.n_still
    plain_rope = RopeSpec(
        compressed_rope.n_rot, keys.freq_base("rope.freq_base", 10000.0), "norm", divides=False, n_still=n_still
    )
    return CompressedAttentionSpec(
        n_heads=n_heads,
        query_rank=keys.size("attention.q_lora_rank"),
        head_dim=head_dim,
        window=keys.size("attention.sliding_window"),
        periods=periods,
        rope=plain_rope,
        compressed_rope=compressed_rope,
        n_output_groups=n_groups,
        output_rank=keys.size("attention.output_lora_rank"),
        indexer=_read_indexer(keys, compressed_rope, periods),
    )


def _read_periods(keys: Keys) -> tuple[int, ...]:
    """Read how many tokens share a key in each layer."""
    n_layers, known = keys.n_layers(), (0, _SHORT_PERIOD, _LONG_PERIOD)
    periods = keys.sizes("attention.compress_ratios")
    if len(periods) < n_layers:
        raise keys.wrong("attention.compress_ratios", f"{len(periods)} numbers", f"one for each of {n_layers} layers")
    for period in periods[:n_layers]:
        if period not in known:
            raise UnsupportedModelError(
                f"{keys.file_name}: {keys.architecture}.attention.compress_ratios has a {period}; this version knows "
                f"{known[0]}, {known[1]} and {known[2]}"
            )
    return tuple(periods[:n_layers])


def _read_compressed_rope(keys: Keys, head_dim: int) -> RopeSpec:
    """Read the rotation of layers with shared keys. YaRN does not scale cosine and sine."""
    rope = keys.rope(head_dim, "norm", yarn_slope=0.0)
    if rope.scaling == "longrope":
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.rope.scaling.type is 'longrope'; this version needs none, linear "
            "or yarn"
        )
    if rope.scaling == "yarn":
        rope = keys.yarn(rope)
    return replace(
        rope,
        freq_base=keys.freq_base("attention.compress_rope_freq_base", 10000.0),
        magnitude=1.0,
        divides=False,
        n_still=_n_still(keys, "attention.key_length", head_dim, rope.n_rot),
    )


def _read_indexer(keys: Keys, rope: RopeSpec, periods: tuple[int, ...]) -> IndexerSpec:
    n_still = _n_still(keys, "attention.indexer.key_length", keys.size("attention.indexer.key_length"), rope.n_rot)
    chooses = tuple(period == _SHORT_PERIOD for period in periods)
    return read_indexer(keys, replace(rope, n_still=n_still), chooses)


def _n_still(keys: Keys, key: str, size: int, n_rot: int) -> int:
    """Return how many values of a head stand before those that are rotated; these are pairs of neighbours."""
    if (size - n_rot) % 2:
        raise keys.wrong(key, size, "an even number")
    return size - n_rot


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return hyper_connections.decoder(spec, tensors, _attention, Activation.CLAMPED_SILU)


def _attention(graph: Graph, x: Tensor, block: Tensors, spec: ModelSpec, layer: int) -> Tensor:
    """Attend; one operation projects for all that is made of x."""
    attention = spec.attention
    assert isinstance(attention, CompressedAttentionSpec)
    n_heads, head_dim, period = attention.n_heads, attention.head_dim, attention.periods[layer]
    chooses = attention.indexer.layers[layer]
    rope = attention.compressed_rope if period else attention.rope
    weights = [
        block.matrix("attn_q_a.weight", attention.query_rank, spec.hidden_size),
        block.matrix("attn_kv.weight", head_dim, spec.hidden_size),
    ]
    if period:
        weights += _compressor_weights(block, "attn_compressor", head_dim, spec, period)
    if chooses:
        indexer = attention.indexer
        weights += _compressor_weights(block, "indexer_compressor", indexer.key_dim, spec, period)
        weights.append(block.matrix("indexer.proj.weight", indexer.n_heads, spec.hidden_size))
    q, k, *more = graph.linears(x, weights)
    q = graph.rms_norm(q, block.vector("attn_q_a_norm.weight", attention.query_rank), spec.norm_eps)
    shared_k, selected = None, None
    if period:
        shared_k = _compress(graph, more[0], more[1], block, "attn_compressor", spec, rope, period)
    if chooses:
        selected = _select(graph, q, more[2], more[3], more[4], block, spec, period)

    q = graph.linear(q, block.matrix("attn_q_b.weight", n_heads * head_dim, attention.query_rank))
    q = graph.rms_norm(q, None, spec.norm_eps, head_dim)
    k = graph.rms_norm(k, block.vector("attn_kv_a_norm.weight", head_dim), spec.norm_eps)
    q, k = rotate(graph, q, n_heads, rope, block), rotate(graph, k, 1, rope, block)
    out = graph.attention(
        q,
        k,
        None,
        n_heads,
        1,
        head_dim**-0.5,
        value_dim=head_dim,
        sinks=block.vector("attn_sinks.weight", n_heads),
        window=attention.window,
        selected=selected,
        shared_k=shared_k,
        period=max(1, period),
    )
    out = rotate(graph, out, n_heads, rope, block, backwards=True)
    n_groups, rank, width = attention.n_output_groups, attention.output_rank, out.width
    of_groups = block.matrix("attn_output_a.weight", n_groups * rank, width // n_groups, scaled=False)
    out = graph.head_linear(out, replace(of_groups, n_rows=rank, n_experts=n_groups))
    return graph.linear(out, block.matrix("attn_output_b.weight", spec.hidden_size, n_groups * rank))


def _row_width(width: int, period: int) -> int:
    """Return how many values of a token go into shared keys: twice as many where each token has a part in two."""
    return 2 * width if period == _SHORT_PERIOD else width


def _compressor_weights(block: Tensors, name: str, width: int, spec: ModelSpec, period: int) -> list[Weight]:
    """Return the projections to a token's part in shared keys, and to how much that counts."""
    n_rows = _row_width(width, period)
    return [block.matrix(f"{name}_{part}.weight", n_rows, spec.hidden_size) for part in ("kv", "gate")]


def _compress(
    graph: Graph,
    values: Tensor,
    scores: Tensor,
    block: Tensors,
    name: str,
    spec: ModelSpec,
    rope: RopeSpec,
    period: int,
) -> Tensor:
    """Make keys that tokens share, rotated by the position of the first of them."""
    width = rope.n_still + rope.n_rot
    biases = block.vector(f"{name}_ape.weight", period, values.width)
    k = graph.compress(values, scores, biases, width, period)
    k = graph.rms_norm(k, block.vector(f"{name}_norm.weight", width), spec.norm_eps)
    return rotate(graph, k, 1, rope, block, period=period)


def _select(
    graph: Graph,
    compressed: Tensor,
    values: Tensor,
    scores: Tensor,
    weights: Tensor,
    block: Tensors,
    spec: ModelSpec,
    period: int,
) -> Selected:
    """Choose shared keys: queries of the compressed query of attention, keys that are made as its own are."""
    assert isinstance(spec.attention, CompressedAttentionSpec)
    indexer = spec.attention.indexer
    assert indexer.rope is not None
    n_heads, key_dim = indexer.n_heads, indexer.key_dim
    k = _compress(graph, values, scores, block, "indexer_compressor", spec, indexer.rope, period)
    q = graph.linear(compressed, block.matrix("indexer.attn_q_b.weight", n_heads * key_dim, compressed.width))
    q = rotate(graph, q, n_heads, indexer.rope, block)
    return graph.select_positions(q, k, weights, n_heads, indexer.top_k, (n_heads * key_dim) ** -0.5, period)
