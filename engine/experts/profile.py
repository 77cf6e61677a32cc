"""Profiles: what was chosen how often, kept from one run to the next, so that a cache starts warm.

A profile belongs to one model. It is an npz file with `counts` (float32 [n_layers, n_experts]) and `meta` (JSON text:
name, model, n_tokens), written whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ConfigError
from engine.experts.trace import read_npz, save_npz
from engine.experts.tracker import Heat

REMEMBERED_TOKENS = 200_000  # older ones fade as new ones come


@dataclass(frozen=True, slots=True)
class Profile:
    """Counts of one model.

    Attributes:
        name: for people.
        model: fingerprint of the model, from `fingerprint`.
        n_tokens: how many tokens were counted.
        counts: float32 [n_layers, n_experts].
    """

    name: str
    model: str
    n_tokens: float
    counts: Heat


def fingerprint(architecture: str, model_name: str, n_layers: int, n_experts: int) -> str:
    """Return what tells models apart whose experts are not the same; another quantisation of one is the same model."""
    return f"{architecture}/{model_name}/{n_layers}x{n_experts}"


def load_profile(path: str | os.PathLike[str], model: str | None = None) -> Profile:
    """Read a profile; raise `ConfigError` if it is damaged, or another model's than `model` (None: any model's)."""
    path = Path(path)
    arrays = read_npz(path, "an expert profile", ("counts", "meta"))
    try:
        counts, meta = arrays["counts"], json.loads(str(arrays["meta"]))
    except KeyError as error:
        raise ConfigError(f"{path}: is no profile: it has no {error}; give another name or delete it") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is no profile: {error}; give another name or delete it") from error
    return _checked(path, counts, meta, model)


def _checked(path: Path, counts: Any, meta: Any, model: str | None) -> Profile:
    known = isinstance(meta, dict) and isinstance(meta.get("model"), str)
    if (
        not known
        or counts.ndim != 2
        or counts.dtype != np.float32
        or not isinstance(meta.get("n_tokens"), (int, float))
    ):
        raise ConfigError(f"{path}: is no profile: it needs float32 counts [layers, experts], a model and n_tokens")
    if not np.isfinite(counts).all() or counts.min(initial=0.0) < 0 or not 0 <= meta["n_tokens"] < 1e15:
        raise ConfigError(f"{path}: holds counts that make no sense; delete it")
    found: str = meta["model"]
    if model not in {None, found}:
        raise ConfigError(f"{path}: is a profile of {found}, and this model is {model}; give another file")
    if found.rpartition("/")[2] != f"{counts.shape[0]}x{counts.shape[1]}":
        raise ConfigError(f"{path}: counts are {counts.shape[0]} x {counts.shape[1]}, which does not fit {found}")
    return Profile(str(meta.get("name") or path.stem), found, float(meta["n_tokens"]), counts)


def save_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile; raise `ConfigError` if that is not possible, leaving what was there."""
    meta = {"name": profile.name, "model": profile.model, "n_tokens": profile.n_tokens}
    save_npz(path, {"counts": profile.counts, "meta": np.array(json.dumps(meta))})


def merge_profiles(profiles: Sequence[Profile], name: str) -> Profile:
    """Add profiles of one model up, the later ones in full; raise `ConfigError` if they are of different models."""
    models = sorted({profile.model for profile in profiles})
    if len(models) != 1:
        raise ConfigError(f"profiles of different models cannot be merged: {', '.join(models) or 'none given'}")
    counts, n_tokens = np.zeros_like(profiles[0].counts), 0.0
    for profile in profiles:
        room = max(REMEMBERED_TOKENS - profile.n_tokens, 0.0)
        kept = min(1.0, room / n_tokens) if n_tokens else 1.0
        counts = counts * np.float32(kept) + profile.counts
        n_tokens = n_tokens * kept + profile.n_tokens
    return Profile(name, models[0], n_tokens, counts.astype(np.float32))
