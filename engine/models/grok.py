"""Grok 1 (314B) and Grok 2 (270B): capped attention scores, norms behind every sub-block, experts with GELU.

Grok 2 has a dense network beside the experts, which is taken for a shared expert: the sum of both is divided by the
root of 2. As in llama.cpp, whose logits are the measure here, two keys of Grok 2 change nothing:
`router_logit_softcapping` and `attention.temperature_length`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from engine.devices.graph import Activation, Graph
from engine.errors import UnsupportedModelError
from engine.model_spec import ModelSpec, RopeSpec
from engine.models.binding import Keys, Tensors
from engine.models.blocks import decoder, self_attention

# Of Grok 1, whose older files do not say them.
_ATTENTION_CAP = 30.0
_ATTENTION_SCALE = 128**-0.5
_EMBEDDING_SCALE = 78.38367176906169
_LOGIT_SCALE = 3**-0.5
_YARN_FAST, _YARN_SLOW = 8.0, 1.0


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    attention = keys.attention()
    attention = replace(
        attention,
        scale=keys.number("attention.output_scale", _ATTENTION_SCALE),
        cap=keys.cap("attn_logit_softcapping", _ATTENTION_CAP),
        rope=_read_rope(keys, attention.rope),
    )
    moe = replace(
        keys.mixture(tensors),
        shared_ffn_size=tensors.first_width("ffn_down.weight", keys.n_layers()),
        shared_suffix="",
        shared_sum_scale=math.sqrt(0.5),
    )
    return replace(
        keys.model(tensors, attention, moe),
        embedding_scale=keys.number("embedding_scale", _EMBEDDING_SCALE) or 1.0,  # 0 stands for none
        logit_scale=keys.number("logit_scale", _LOGIT_SCALE),
        logit_cap=keys.cap("final_logit_softcapping"),
    )


def _read_rope(keys: Keys, rope: RopeSpec) -> RopeSpec:
    """Read the parameters of YaRN; one of them has to be the usual one."""
    if rope.scaling != "yarn":
        return rope
    factor = keys.number("rope.scaling.yarn_attn_factor", 1.0)
    if factor != 1:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.rope.scaling.yarn_attn_factor is {factor:g}; this version needs 1"
        )
    return keys.yarn(rope, _YARN_FAST, _YARN_SLOW)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    older, newer = "layer_output_norm.weight", "post_ffw_norm.weight"  # names of the norm behind the networks
    post_norms = "attn_output_norm.weight", older if tensors.block(0).has(older) else newer
    return decoder(spec, tensors, self_attention, post_norms=post_norms, activation=Activation.GELU)
