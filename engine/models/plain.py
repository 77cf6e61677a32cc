"""Architectures of attention and a mixture of experts without anything of their own: what they differ in is a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.devices.graph import Graph
from engine.model_spec import ModelSpec
from engine.models.binding import Keys, RopeStyle, Scoring, Tensors
from engine.models.blocks import decoder, self_attention


@dataclass(frozen=True, slots=True)
class PlainDecoder:
    """One of them.

    Attributes:
        style: which values of a head are rotated together.
        scoring: how router logits become scores, if the file does not say.
        normalizes: whether the chosen experts' weights are made to add up to 1; None: as the file says.
        scales: whether the file says what they are multiplied by after that.
        ffn_norm: tensor of the norm before the feed-forward network.
        biased_norms: whether norms have biases.
        drafts: whether a block for multi-token prediction is known to be used as it is here.
    """

    style: RopeStyle = "neox"
    scoring: Scoring = "softmax"
    normalizes: bool | None = True
    scales: bool = False
    ffn_norm: str = "ffn_norm.weight"
    biased_norms: bool = False
    drafts: bool = False

    def read_spec(self, keys: Keys, tensors: Tensors) -> ModelSpec:
        """Read the hyper-parameters."""
        moe = keys.mixture(tensors, scoring=keys.scoring(self.scoring), normalize=self.normalizes, scales=self.scales)
        spec = keys.model(tensors, keys.attention(self.style), moe)
        spec = replace(spec, biased_norms=self.biased_norms)
        return keys.with_head(spec, tensors) if self.drafts else spec

    def forward(self, spec: ModelSpec, tensors: Tensors) -> Graph:
        """Record the forward pass."""
        return decoder(spec, tensors, self_attention, ffn_norm=self.ffn_norm)


PLAIN: dict[str, PlainDecoder] = {
    # Ling lite and plus; Ling and Ring 2 (mini, flash), with experts chosen from the best groups
    "bailingmoe": PlainDecoder(style="norm", normalizes=None, scales=True),
    "bailingmoe2": PlainDecoder(scoring="sigmoid", normalizes=None, scales=True),
    # DeepSeek MoE 16B, before latent attention
    "deepseek": PlainDecoder(style="norm", normalizes=False, scales=True),
    # dots.llm1
    "dots1": PlainDecoder(normalizes=None, scales=True),
    # ERNIE 4.5 21B-A3B and 300B-A47B
    "ernie4_5-moe": PlainDecoder(style="norm"),
    # GLM-4.5 to 4.7, and Air
    "glm4moe": PlainDecoder(
        scoring="sigmoid", normalizes=None, scales=True, ffn_norm="post_attention_norm.weight", drafts=True
    ),
    # Hunyuan 3
    "hy_v3": PlainDecoder(scoring="sigmoid", normalizes=None, scales=True, drafts=True),
    # MiniMax-M2: queries and keys are normalised over all heads together
    "minimax-m2": PlainDecoder(scoring="sigmoid"),
    # OLMoE-1B-7B: likewise
    "olmoe": PlainDecoder(normalizes=False),
    # Phi-3.5-MoE (42B-A6.6B) and the small ones made of it: norms, attention and output with biases, LongRoPE. As in
    # llama.cpp, norms take no mean from rows, weights add up to 1, and `attention.sliding_window` says nothing.
    "phimoe": PlainDecoder(biased_norms=True),
    # Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B
    "qwen2moe": PlainDecoder(normalizes=False),
    # Qwen3, dense and with experts (30B-A3B, 235B-A22B, Coder); Qwen3-VL of these sizes, without its eyes
    "qwen3": PlainDecoder(),
    "qwen3moe": PlainDecoder(),
    "qwen3vlmoe": PlainDecoder(),
}
