"""What a model is, in numbers: the hyper-parameters of a file, by the field's standard names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    Attributes:
        n_rot: values of a head that are rotated, from its first on, or behind those that stay as they are.
        freq_base: theta; pair i turns by position * theta ** (-2 i / n_rot).
        style: which values are a pair: `neox` (i, i + n_rot / 2) or `norm` (2 i, 2 i + 1).
        sections: of multi-axis rotation (time, height, width, extra); empty for the plain kind.
        scaling: how the angles are stretched for contexts longer than the trained one.
        factor: by how much.
        original_context_length: the trained context (YaRN, LongRoPE).
        magnitude: factor of cosine and sine on top of YaRN's own.
        yarn_slope: YaRN's own factor is 1 + yarn_slope * ln(factor).
        yarn_fast, yarn_slow: turns over the trained context above which YaRN keeps a pair, below which it stretches it.
        divides: whether frequencies are divided by those that the file has (`rope_freqs`, or `rope_factors_short` and
            `rope_factors_long`), if it has any.
        n_still: values of a head before those that are rotated, an even number, where pairs are neighbours.
    """

    n_rot: int
    freq_base: float
    style: Literal["neox", "norm"] = "neox"
    sections: tuple[int, ...] = ()
    scaling: Literal["none", "linear", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_context_length: int = 0
    magnitude: float = 1.0
    yarn_slope: float = 0.1
    yarn_fast: float = 32.0
    yarn_slow: float = 1.0
    divides: bool = True
    n_still: int = 0


@dataclass(frozen=True, slots=True)
class BlockIndexerSpec:
    """What chooses the blocks of positions that attention looks at (`graph.SelectBlocks`).

    Attributes:
        n_heads: of its queries, one for each key head of attention; they share one key.
        key_dim: of queries and keys.
        top_k: blocks that a key head looks at, at most.
        block_size: positions of a block.
        n_newest: of the chosen blocks, the last ones that there are.
        first_layer: from which on layers choose; those before look at all positions.
    """

    n_heads: int
    key_dim: int
    top_k: int
    block_size: int
    n_newest: int
    first_layer: int


@dataclass(frozen=True, slots=True)
class PooledIndexerSpec:
    """What chooses whole blocks of positions by keys that are means of their tokens' (`graph.SelectPositions`).

    Attributes:
        n_heads: of its queries; they share one key.
        key_dim: of queries and keys.
        top_k: positions that a token looks at, at most, beside those of its own block while that is not whole.
        periods: for each layer, the positions of a block; 0: it looks at all positions.
    """

    n_heads: int
    key_dim: int
    top_k: int
    periods: tuple[int, ...]

    @property
    def layers(self) -> tuple[bool, ...]:
        """Return for each layer whether it chooses."""
        return tuple(period > 0 for period in self.periods)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Softmax attention; `n_heads / n_kv_heads` query heads share one key and value head.

    Attributes:
        layer_heads: `n_heads` of each layer where they differ; no entry: they do not.
        layer_kv_heads: likewise `n_kv_heads`.
        value_dim: width of a head's value; 0: `head_dim`, which is that of queries and keys.
        gating: how values are gated, where the file has a gate for them.
        cap: what scores are smoothly brought to within, by tanh; 0: they are not.
        qkv_limit: how far from 0 queries, keys and values may be as they are projected; 0: anywhere.
        output_scale: factor of what attention adds to the residual stream.
        windows: for each layer, how many positions back a token sees, itself included; 0 or no entry: all.
        chunks: for each layer, the length of the stretches that attention does not look beyond; 0 or no entry: none.
        unrotated_layers: for each layer, whether it has no rotary embedding; no entry: it has.
        window_rope: rotary embedding of layers with a window; None: as in the others.
        window_head_dim: `head_dim` of layers with a window; 0: as in the others.
        indexer: what chooses the blocks that some layers look at; None: they look at all.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    windows: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    unrotated_layers: tuple[bool, ...] = ()
    window_rope: RopeSpec | None = None
    layer_heads: tuple[int, ...] = ()
    layer_kv_heads: tuple[int, ...] = ()
    value_dim: int = 0
    gating: Literal["sigmoid", "softplus"] = "sigmoid"
    output_scale: float = 1.0
    window_head_dim: int = 0
    cap: float = 0.0
    qkv_limit: float = 0.0
    indexer: BlockIndexerSpec | PooledIndexerSpec | None = None

    @property
    def cached_dims(self) -> tuple[int, ...]:
        """Return the widths of what the caches keep of heads: keys and values, and keys to choose by."""
        dims = self.head_dim, self.value_dim or self.head_dim, self.window_head_dim or self.head_dim
        return (*dims, *([self.indexer.key_dim] if self.indexer else ()))

    def layer_head_dim(self, layer: int) -> int:
        """Return the width of a layer's queries and keys."""
        has_window = layer < len(self.windows) and self.windows[layer] > 0
        return self.window_head_dim if has_window and self.window_head_dim else self.head_dim

    def heads(self, layer: int) -> tuple[int, int]:
        """Return the query heads of a layer, and its key and value heads."""
        return (
            self.layer_heads[layer] if layer < len(self.layer_heads) else self.n_heads,
            self.layer_kv_heads[layer] if layer < len(self.layer_kv_heads) else self.n_kv_heads,
        )

    def widths(self, layer: int) -> tuple[int, int, int, int]:
        """Return how wide all queries of a layer are, all its keys, all its values, and what it finds."""
        n_heads, n_kv_heads = self.heads(layer)
        head_dim = self.layer_head_dim(layer)
        value_dim = self.value_dim or head_dim
        return n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * value_dim, n_heads * value_dim


@dataclass(frozen=True, slots=True)
class IndexerSpec:
    """What chooses the positions that attention looks at (`graph.SelectPositions`).

    Attributes:
        n_heads: of its queries; they share one key.
        key_dim: of queries and keys.
        top_k: positions that a token looks at, at most.
        norm_eps: epsilon of the keys' norm.
        rope: how queries and keys are rotated; None: they are not.
        layers: for each layer, whether it chooses; the others look at what the last one before them chose.
        pool_size: so many tokens from a multiple of it on are chosen together, by a key that is made of theirs.
    """

    n_heads: int
    key_dim: int
    top_k: int
    norm_eps: float
    rope: RopeSpec | None
    layers: tuple[bool, ...]
    pool_size: int = 1


@dataclass(frozen=True, slots=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek): keys and values of all heads come from one small vector a token.

    Attributes:
        n_heads: query heads.
        query_rank: width of the compressed query; 0 if queries are projected directly.
        latent_dim: width of the compressed key and value, which is what the cache keeps.
        rope_dim: width of the part of the key that is rotated, if any is, shared by all heads and kept beside it; 0:
            there is no such part.
        key_dim: of the other part of a head's query and key.
        value_dim: of a head's value.
        scale: of the scores.
        rope: of the rotated part; None: nothing is rotated.
        temperature_period, temperature_slope: queries at position p are multiplied by 1 + slope * ln(1 + floor(p /
            period)); a slope of 0: they are not.
        gated: whether what a head finds is multiplied by the sigmoid of a gate of its own, or of one for each value.
        indexer: what chooses the positions that layers without a window look at; None: they look at all.
        windows: for each layer, how many positions back a token sees, itself included; 0 or no entry: all.
        window_attention: that of layers with a window; None: as in the others.
    """

    n_heads: int
    query_rank: int
    latent_dim: int
    rope_dim: int
    key_dim: int
    value_dim: int
    scale: float
    rope: RopeSpec | None = None
    temperature_period: int = 1
    temperature_slope: float = 0.0
    gated: bool = False
    indexer: IndexerSpec | None = None
    windows: tuple[int, ...] = ()
    window_attention: LatentAttentionSpec | None = None

    @property
    def cached_dims(self) -> tuple[int, ...]:
        """Return the widths of what the caches keep of a token: values are parts of keys."""
        window_dims = self.window_attention.cached_dims if self.window_attention else ()
        return (self.head_dim, *([self.indexer.key_dim] if self.indexer else ()), *window_dims)

    def of_layer(self, layer: int) -> LatentAttentionSpec:
        """Return the sizes and the rotation of a layer."""
        has_window = layer < len(self.windows) and self.windows[layer] > 0
        return self.window_attention if has_window and self.window_attention else self

    @property
    def n_kv_heads(self) -> int:
        """Return the number of heads in the cache: all query heads share what it keeps."""
        return 1

    @property
    def head_dim(self) -> int:
        """Return the width of what the cache keeps of a token."""
        return self.latent_dim + self.rope_dim


@dataclass(frozen=True, slots=True)
class CompressedAttentionSpec:
    """Attention to the last positions, and to keys that some tokens share (DeepSeek V4).

    All heads share one key, which is its own value.

    Attributes:
        n_heads: query heads.
        query_rank: width of the compressed query.
        head_dim: of queries and keys.
        window: how many positions back a token sees, itself included.
        periods: for each layer, how many tokens share a key that is seen from everywhere behind them; 0: none do.
        rope: how queries and keys are rotated in layers without such keys.
        compressed_rope: the same in layers with them.
        n_output_groups, output_rank: what so many groups of heads find becomes a row of that width each.
        indexer: what chooses among shared keys, in the layers that it names.
    """

    n_heads: int
    query_rank: int
    head_dim: int
    window: int
    periods: tuple[int, ...]
    rope: RopeSpec
    compressed_rope: RopeSpec
    n_output_groups: int
    output_rank: int
    indexer: IndexerSpec

    @property
    def n_kv_heads(self) -> int:
        """Return the number of heads in the caches: all query heads share what they keep."""
        return 1

    @property
    def cached_dims(self) -> tuple[int, ...]:
        """Return the widths of what the caches keep of a token."""
        return (self.head_dim, *([self.indexer.key_dim] if any(self.indexer.layers) else ()))


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """Gated delta net, the linear attention of Qwen3-Next, Qwen3.5, Kimi Linear and Ling 3.

    Value head h uses key head h // (n_v_heads / n_k_heads) if `grouped`, else h mod n_k_heads. `decay_bound` is that of
    `graph.DeltaNet`, and `eps` that of queries and keys; 0: it is that of every normalisation.
    """

    n_k_heads: int
    n_v_heads: int
    head_dim: int
    kernel_size: int
    grouped: bool = False
    decay_bound: float = 0.0
    eps: float = 0.0

    @property
    def key_size(self) -> int:
        """Return the width of all keys (and of all queries)."""
        return self.n_k_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Return the width of all values."""
        return self.n_v_heads * self.head_dim

    @property
    def n_channels(self) -> int:
        """Return the channels of the convolution: queries, keys and values."""
        return 2 * self.key_size + self.value_size


@dataclass(frozen=True, slots=True)
class StateSpaceSpec:
    """Mamba-2, of Nemotron and Granite 4. `n_heads / n_groups` heads share what they read and write with.

    Attributes:
        head_dim: values of a head.
        state_size: how many such vectors a head keeps.
        kernel_size: tokens of the convolution before it.
    """

    n_heads: int
    n_groups: int
    head_dim: int
    state_size: int
    kernel_size: int

    @property
    def inner_size(self) -> int:
        """Return the width of all heads."""
        return self.n_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Return the width of what all groups write with, and of what they read with."""
        return self.n_groups * self.state_size


@dataclass(frozen=True, slots=True)
class SelectiveScanSpec:
    """Mamba, of Jamba.

    Attributes:
        inner_size: channels, each with a state of its own.
        state_size: values of a state.
        step_rank: values that the step of all channels is a projection of.
        kernel_size: tokens of the convolution before it.
    """

    inner_size: int
    state_size: int
    step_rank: int
    kernel_size: int


@dataclass(frozen=True, slots=True)
class MoESpec:
    """Routed experts of the layers that have a router; all zero for a dense model.

    Attributes:
        n_experts, n_experts_used: in a layer, and of them by one token; the most, where layers differ.
        ffn_size: width of an expert; of the widest, where layers differ.
        shared_ffn_size: width of the shared expert, of the first layer that has one; 0 if there is none.
        scoring: how router logits become scores.
        normalize: whether the weights of the chosen experts are made to add up to 1.
        scale: factor of the weights after that.
        n_groups, n_groups_used: experts are chosen from the best groups only (DeepSeek-V3); 1 group: from all.
        weights_input: whether a weight multiplies the expert's input instead of its output (Llama 4).
        latent_size: width of what experts take and give, where it is not that of the residual stream; 0: it is.
        latent_name: how names begin of the matrices into that space and out of it, and of a norm between.
        group_size: how many experts are in a group that shares one more (Grove); 0: there are no such groups.
        group_ffn_size: width of what groups share.
        group_scale: factor of what that adds.
        shared_suffix: how names of the shared expert's tensors end, before their last part.
        shared_sum_scale: factor of the sum of routed experts and the shared one.
        limits, shared_limits: for each layer, what SiLU and the other factor are clamped to in routed and in all other
            networks, 0 for nothing; no entry: nothing.
        situ_limits: what SiTU brings gate and up to within, in all networks; the second may be 0: up stays as it is.
        layer_experts_used: for each layer, where they differ; 0 for one without experts; no entry: all as many.
    """

    n_experts: int = 0
    n_experts_used: int = 0
    ffn_size: int = 0
    shared_ffn_size: int = 0
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen", "sqrt_softplus"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    n_groups: int = 1
    n_groups_used: int = 1
    weights_input: bool = False
    latent_size: int = 0
    latent_name: str = "ffn_latent"
    group_size: int = 0
    group_ffn_size: int = 0
    group_scale: float = 1.0
    shared_suffix: str = "_shexp"
    shared_sum_scale: float = 1.0
    limits: tuple[float, ...] = ()
    shared_limits: tuple[float, ...] = ()
    situ_limits: tuple[float, float] = (0.0, 0.0)
    layer_experts_used: tuple[int, ...] = ()

    def experts_used(self, layer: int) -> int:
        """Return how many experts of a layer one token uses."""
        return self.layer_experts_used[layer] if layer < len(self.layer_experts_used) else self.n_experts_used

    def layer_limits(self, layer: int, *, routed: bool) -> tuple[float, float]:
        """Return the limit of a layer's networks, routed or other, and that of up where it has one of its own."""
        if any(self.situ_limits):
            return self.situ_limits
        limits = self.limits if routed else self.shared_limits
        return limits[layer] if layer < len(limits) else 0.0, 0.0


@dataclass(frozen=True, slots=True)
class HyperConnectionSpec:
    """Residual streams that sub-layers read as one row and are added to by gates (`graph.ReduceStreams`).

    Attributes:
        n_streams: their number.
        offset: what weights and gates have in addition to a sigmoid.
        magnitude: factor of the gates' sigmoid.
        n_normalizations: of the matrix that mixes streams before something is added; 0: they are not mixed.
        averages: whether the row before the output norm is their mean, not one with weights that are made of them.
        rank: of what gates every value of the streams before their mean is taken; 0: they are weighted as a whole.
    """

    n_streams: int
    offset: float
    magnitude: float
    n_normalizations: int = 0
    averages: bool = False
    rank: int = 0


@dataclass(frozen=True, slots=True)
class NgramSpec:
    """Embeddings of the last tokens, which hashes choose from a table (`graph.HashTokens`).

    Attributes:
        layer: before which they are added to the residual streams.
        multipliers: of the ids of a token and of those before it, which are as many as the longest n-gram.
        sizes, offsets: of each head: how many rows it chooses from, and where these begin.
        end_id: the token that n-grams do not go beyond.
        head_dim: values of a row.
        kernel_size: tokens of the convolution behind it, which are as far apart as an n-gram is long.
    """

    layer: int
    multipliers: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    end_id: int
    head_dim: int
    kernel_size: int

    @property
    def n_rows(self) -> int:
        """Return how many rows the table has at least."""
        return max(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Hyper-parameters of one model.

    Attributes:
        architecture: the GGUF name, for example `qwen35moe`.
        name: for people.
        n_layers: blocks that are run; trailing blocks for multi-token prediction are not counted.
        draft_layer: the block for multi-token prediction, if there is one and tokens are to be drafted with it.
        most_guesses: how many tokens it guesses in a row; 0: any number.
        carries_stream: whether what it takes of the token before is the residual stream as it is, not normalised.
        head_norm_eps: epsilon of the norm behind it, where that alone takes the mean from a row; 0: it is as others.
        hidden_size: width of the residual stream.
        n_vocab: rows of the embedding table, and logits of a token.
        context_length: tokens the model was trained for.
        norm_eps: epsilon of every normalisation.
        centers_norms: whether the mean of a row is taken from it when it is normalised (LayerNorm).
        biased_norms: whether something is added to a row that has been normalised.
        attention: softmax attention of any kind.
        moe: the routed experts.
        recurrent_layers: for each layer, whether it carries a state instead of attention; empty: none does.
        delta_net, state_space, selective_scan, short_conv_kernel: how, if some do; the last is how many tokens a
            convolution sees.
        embedding_scale, residual_scale, logit_scale: factors of the embeddings, of what every sub-block adds to the
            residual stream, and of the logits.
        hyper_connections: how residual streams are read and added to, if there are several.
        ngrams: embeddings of the last tokens in one layer, if there are any.
        residual_period: of how many layers the first keeps the residual stream, for sub-layers to mix with what it
            becomes; 0: none does.
        stream_scale: factor of the residual stream itself, wherever something is added to it.
        logit_cap: what logits are smoothly brought to within, by tanh; 0: they are not.
    """

    architecture: str
    name: str
    n_layers: int
    hidden_size: int
    n_vocab: int
    context_length: int
    norm_eps: float
    attention: AttentionSpec | LatentAttentionSpec | CompressedAttentionSpec
    moe: MoESpec
    draft_layer: int | None = None
    most_guesses: int = 0
    carries_stream: bool = False
    head_norm_eps: float = 0.0
    recurrent_layers: tuple[bool, ...] = ()
    delta_net: DeltaNetSpec | None = None
    state_space: StateSpaceSpec | None = None
    selective_scan: SelectiveScanSpec | None = None
    short_conv_kernel: int = 0
    hyper_connections: HyperConnectionSpec | None = None
    ngrams: NgramSpec | None = None
    residual_period: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    stream_scale: float = 1.0
    logit_cap: float = 0.0
    centers_norms: bool = False
    biased_norms: bool = False

    def is_recurrent(self, layer: int) -> bool:
        """Return whether a layer carries a state; a block for multi-token prediction never does."""
        return layer < len(self.recurrent_layers) and self.recurrent_layers[layer]
