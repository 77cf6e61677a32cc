"""GLM-5.3-Flash (320B-A18B), its text: delta attention of Kimi, and latent attention to pools that an indexer chooses.

Nothing is rotated. The indexer is that of DeepSeek V3.2, but that the keys of a few tokens become one, the sum of them
weighted by a softmax for each channel (`graph.Compress`): such a pool is chosen as a whole, and the tokens after the
last whole one are always seen. Layers with attention may look at what the last one before them chose. Residual streams
are those of DeepSeek V4, whose mean goes to the head. Blocks for multi-token prediction are left out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from engine.devices.graph import Activation, Graph
from engine.errors import UnsupportedModelError
from engine.model_spec import IndexerSpec, ModelSpec
from engine.models import hyper_connections, kimi_linear
from engine.models.binding import Keys, Tensors
from engine.models.deepseek2 import read_latent_attention
from engine.models.deepseek32 import NORM_EPS, TYPES, choosing_attention, read_indexer

_POOL_SIZE, _TAIL, _TOP_K = (f"attention.indexer.{name}" for name in ("kpool", "kpool_select_tail", "top_k"))
_DELTA_EPS = 1e-6  # of the norms of queries and keys of delta attention; files do not say it


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    recurrent_layers, attention = kimi_linear.read_recurrent_layers(keys), read_latent_attention(keys)
    if attention.rope_dim:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.rope.dimension_count is {attention.rope_dim}; this version needs 0"
        )
    keys.size("expert_feed_forward_length")  # layers may not differ
    bound = kimi_linear.read_decay_bound(keys) if keys.has(kimi_linear.DECAY_BOUND) else 0.0
    delta_net = kimi_linear.read_delta_net(keys, attention.n_heads, bound)
    moe = keys.limited(keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True))
    return replace(
        keys.model(tensors, replace(attention, indexer=_read_indexer(keys, recurrent_layers)), moe),
        recurrent_layers=recurrent_layers,
        delta_net=replace(delta_net, eps=_DELTA_EPS),
        hyper_connections=hyper_connections.read_mixed_streams(keys, averages=True),
    )


def _read_indexer(keys: Keys, recurrent_layers: tuple[bool, ...]) -> IndexerSpec:
    layers = tuple(keys.flags_of_layers(TYPES)) if keys.has(TYPES) else (True,) * keys.n_layers()
    chosen = [chooses for chooses, is_recurrent in zip(layers, recurrent_layers, strict=True) if not is_recurrent]
    if chosen and not chosen[0]:
        raise keys.wrong(TYPES, "false for the first layer with attention", "true: there is none before it")
    indexer = read_indexer(keys, None, layers, keys.number("attention.layer_norm_epsilon", NORM_EPS))
    pool_size = keys.size(_POOL_SIZE, minimum=2)
    if indexer.top_k % pool_size:
        raise keys.wrong(_TOP_K, indexer.top_k, f"a multiple of {_POOL_SIZE} ({pool_size})")
    if not keys.flag(_TAIL, True):
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.{_TAIL} is false; this version needs true: without it the first "
            "tokens see nothing"
        )
    return replace(indexer, pool_size=pool_size)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    mixer = partial(kimi_linear.mix, attend=choosing_attention(spec))
    return hyper_connections.decoder(spec, tensors, mixer, Activation.CLAMPED_SILU)
