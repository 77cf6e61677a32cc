"""dots3-note (288B-A19B), its text: latent attention of two kinds, over windows and over what an indexer chooses.

Layers with a window have heads, sizes and a rotation of their own; the others choose positions as DeepSeek V3.2 does.
In both what heads find is gated, and the rotated part of keys is normalised.
"""

from __future__ import annotations

from dataclasses import replace

from engine.devices.graph import Graph
from engine.errors import UnsupportedModelError
from engine.model_spec import ModelSpec
from engine.models import deepseek32
from engine.models.binding import Keys, Tensors
from engine.models.deepseek2 import read_latent_attention

_HEADS, _PATTERN, _CHOOSING = "attention.head_count", "attention.sliding_window_pattern", "attention.indexer.types"


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    window, in_window = keys.size("attention.sliding_window"), keys.flags_of_layers(_PATTERN)
    n_heads, n_window_heads = _read_heads(keys, in_window)
    attention = read_latent_attention(keys, n_heads=n_heads)
    rope = keys.unscaled_rope(attention.rope_dim, "norm")
    local = read_latent_attention(keys, "_swa", n_window_heads)
    attention = replace(
        attention,
        rope=rope,
        gated=True,
        indexer=deepseek32.read_indexer(keys, replace(rope, style="neox"), _choosing_layers(keys, in_window)),
        windows=tuple(window if flag else 0 for flag in in_window),
        window_attention=replace(local, rope=keys.window_rope(rope), gated=True),
    )
    moe = keys.mixture(tensors, scoring=keys.scoring("sigmoid"), normalize=None, scales=True)
    return keys.model(tensors, attention, moe)


def _read_heads(keys: Keys, in_window: list[bool]) -> tuple[int, int]:
    """Return how many heads each layer without a window has, and each one with a window."""
    heads = keys.sizes(_HEADS, minimum=1)
    if len(heads) == 1:
        heads *= len(in_window)
    if len(heads) < len(in_window):
        raise keys.wrong(_HEADS, heads, f"one number for each of {len(in_window)} layers")
    if len(set(in_window)) < 2:
        raise keys.wrong(_PATTERN, f"{in_window[0]} for all layers", "some layers with a window, and some without")
    found = []
    for kind, has_window in (("without", False), ("with", True)):
        numbers = {n for n, flag in zip(heads, in_window, strict=False) if flag == has_window}
        if len(numbers) > 1:
            raise UnsupportedModelError(
                f"{keys.file_name}: {keys.architecture}.{_HEADS} differs between layers {kind} a window "
                f"({', '.join(map(str, sorted(numbers)))}); this version needs one value for them"
            )
        found.append(numbers.pop())
    return found[0], found[1]


def _choosing_layers(keys: Keys, in_window: list[bool]) -> tuple[bool, ...]:
    """Return which layers choose positions: all without a window."""
    layers = keys.flags_of_layers(_CHOOSING)
    if layers != [not flag for flag in in_window]:
        raise UnsupportedModelError(
            f"{keys.file_name}: {keys.architecture}.{_CHOOSING} is {layers}; this version needs true for the layers "
            f"without a window ({_PATTERN}), and for no others"
        )
    return tuple(layers)


def forward(spec: ModelSpec, tensors: Tensors) -> Graph:
    """Record the forward pass."""
    return deepseek32.forward(spec, tensors)
