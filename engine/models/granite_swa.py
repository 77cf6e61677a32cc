"""Granite with windows (`granite_swa`), dense or with experts: sinks, windows and rotation by lists of layers."""

from __future__ import annotations

from dataclasses import replace

from engine.model_spec import AttentionSpec, ModelSpec
from engine.models import granitemoe
from engine.models.binding import Keys, Tensors

_PERIOD = 4  # of the layers without a window, beginning with the first, where the file does not list them

forward = granitemoe.forward


def read_spec(keys: Keys, tensors: Tensors) -> ModelSpec:
    """Read the hyper-parameters."""
    spec = granitemoe.read_spec(keys, tensors)
    assert isinstance(spec.attention, AttentionSpec)
    keys.need_one_rotation(spec.attention.rope)
    unrotated: tuple[bool, ...] = ()
    if keys.has("attention.rope_pattern"):
        unrotated = tuple(not flag for flag in keys.flags_of_layers("attention.rope_pattern"))
    windows = keys.windows(spec.n_layers, _PERIOD, without=0)
    return replace(spec, attention=replace(spec.attention, windows=windows, unrotated_layers=unrotated))
