"""What a model is, in numbers: the hyper-parameters of a file, by the field's standard names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    Attributes:
        n_rot: values of a head that are rotated, from its first on.
        freq_base: theta; pair i turns by position * theta ** (-2 i / n_rot).
        sections: of multi-axis rotation (time, height, width, extra); empty for the plain kind.
        scaling: how the angles are stretched for contexts longer than the trained one.
        factor: by how much.
        original_context_length: the trained context (YaRN).
        magnitude: factor of cosine and sine on top of YaRN's own.
    """

    n_rot: int
    freq_base: float
    sections: tuple[int, ...] = ()
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_context_length: int = 0
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Softmax attention; `n_heads / n_kv_heads` query heads share one key and value head."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """Gated delta net, the linear attention of Qwen3-Next and Qwen3.5."""

    n_k_heads: int
    n_v_heads: int
    head_dim: int
    kernel_size: int

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
class MoESpec:
    """Routed experts, and the shared expert if `shared_ffn_size` is not 0."""

    n_experts: int
    n_experts_used: int
    ffn_size: int
    shared_ffn_size: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Hyper-parameters of one model.

    Attributes:
        architecture: the GGUF name, for example `qwen35moe`.
        name: for people.
        n_layers: blocks that are run; trailing blocks for multi-token prediction are not counted.
        hidden_size: width of the residual stream.
        n_vocab: rows of the embedding table, and logits of a token.
        context_length: tokens the model was trained for.
        norm_eps: epsilon of every normalisation.
        recurrent_layers: for each layer, whether it is a delta net instead of attention.
    """

    architecture: str
    name: str
    n_layers: int
    hidden_size: int
    n_vocab: int
    context_length: int
    norm_eps: float
    attention: AttentionSpec
    moe: MoESpec
    recurrent_layers: tuple[bool, ...]
    delta_net: DeltaNetSpec | None = None
