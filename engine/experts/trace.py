"""Recorded routing: which experts every token of a run went to, as a file that replay, profiles and tests read.

The file is an npz with `ids` (uint16 [tokens, layers, n_experts_used], best rank first, 65535 where nothing was
recorded), `phase` (uint8 [tokens]; 0 prompt, 1 answer; all prompt if left out), and `meta` (JSON text with
`n_experts` at least).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError
from engine.experts.tracker import count_choices
from engine.files import whole_file

NOT_RECORDED = 65535
PROMPT, ANSWER = 0, 1


@dataclass(frozen=True, slots=True)
class Trace:
    """Routing of consecutive tokens.

    Attributes:
        name: for people.
        ids: uint16 [n_tokens, n_layers, n_experts_used].
        phase: uint8 [n_tokens], `PROMPT` or `ANSWER`.
        n_experts: of each layer.
        meta: whatever else the file says.
    """

    name: str
    ids: npt.NDArray[np.uint16]
    phase: npt.NDArray[np.uint8]
    n_experts: int
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens, prompt and answer."""
        return len(self.ids)

    @property
    def n_layers(self) -> int:
        """Return the number of MoE layers."""
        return int(self.ids.shape[1])

    @property
    def n_experts_used(self) -> int:
        """Return the experts a token uses in each layer."""
        return int(self.ids.shape[2])

    @property
    def n_prompt(self) -> int:
        """Return how many tokens warm a cache before counting starts.

        That is the prompt the trace begins with, or its first quarter if it is all prompt.
        """
        answers = np.flatnonzero(self.phase == ANSWER)
        return int(answers[0]) if len(answers) else self.n_tokens // 4

    def counts(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Return how often each expert was chosen by some of the tokens, float32 [n_layers, n_experts]."""
        return count_choices(self.ids[start:stop], self.n_experts)


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace. Raises `ConfigError` that names the file if it is missing, damaged or not a trace."""
    path = Path(path)
    return _check(path, read_npz(path, "a routing trace", ("ids", "phase", "meta", "n_experts")))


def read_npz(path: Path, what: str, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    """Return those of some arrays that an npz file has; raise `ConfigError` if it is missing, damaged or none."""
    try:
        path.open("rb").close()
        if zipfile.is_zipfile(path):
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in names if name in file.files}
    except Exception as error:  # a damaged file can make zipfile and numpy raise nearly anything
        raise ConfigError(f"{path}: cannot be read as {what} (an npz file): {error}") from error
    raise ConfigError(f"{path}: is not {what} (an npz file)")


def _check(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> Trace:
    if "ids" not in arrays:
        raise ConfigError(f"{path}: has no array 'ids'; a routing trace holds ids [tokens, layers, experts used]")
    ids = arrays["ids"]
    if ids.ndim != 3 or ids.dtype.kind not in "ui" or 0 in ids.shape:
        raise ConfigError(
            f"{path}: 'ids' is {ids.dtype} {list(ids.shape)}; expected uint16 [tokens, layers, experts used]"
        )
    try:
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
    except ValueError as error:
        raise ConfigError(f"{path}: 'meta' is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{path}: 'meta' is not a JSON object")
    n_experts = meta.get("n_experts", meta.get("experts", arrays.get("n_experts")))
    known = ids[ids != NOT_RECORDED]
    if n_experts is None:
        raise ConfigError(f"{path}: 'meta' does not say 'n_experts'")
    try:
        n_experts = int(n_experts)
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: 'n_experts' is {n_experts!r}; expected a whole number") from None
    if not 0 < n_experts < NOT_RECORDED or not 0 < ids.shape[2] <= n_experts:
        raise ConfigError(f"{path}: {n_experts} experts of which {ids.shape[2]} are used is impossible")
    if len(known) and not 0 <= int(known.min()) <= int(known.max()) < n_experts:
        raise ConfigError(f"{path}: holds expert {int(known.max())}, but 'n_experts' is {n_experts}")
    phase = arrays.get("phase")
    if phase is None:
        phase = np.full(len(ids), PROMPT, np.uint8)
    elif phase.shape != (len(ids),) or not np.isin(phase, (PROMPT, ANSWER)).all():
        raise ConfigError(f"{path}: 'phase' must hold one 0 (prompt) or 1 (answer) for each of {len(ids)} tokens")
    name = str(meta.get("name") or meta.get("model") or path.stem)
    return Trace(name, ids.astype(np.uint16), phase.astype(np.uint8), n_experts, meta)


def save_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a trace so that the file is whole or not there. Raises `ConfigError` if it cannot be written."""
    meta = {**trace.meta, "name": trace.name, "n_experts": trace.n_experts}
    save_npz(path, {"ids": trace.ids, "phase": trace.phase, "meta": np.array(json.dumps(meta))})


def save_npz(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays to a file, whole or not at all; raise `ConfigError` if it cannot be written."""
    try:
        with whole_file(Path(path)) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


class TraceRecorder:
    """Collects the routing of a run, token by token, in 2 bytes a choice."""

    def __init__(self, name: str, n_experts: int, meta: Mapping[str, Any] | None = None) -> None:
        if not 0 < n_experts < NOT_RECORDED:
            raise ConfigError(f"a routing trace cannot hold {n_experts} experts; at most {NOT_RECORDED - 1}")
        self._name, self._n_experts, self._meta = name, n_experts, dict(meta or {})
        self._steps: list[npt.NDArray[np.uint16]] = []
        self._phases: list[npt.NDArray[np.uint8]] = []

    @property
    def n_tokens(self) -> int:
        """Return the tokens recorded so far."""
        return sum(map(len, self._steps))

    def append(self, routing: npt.NDArray[np.integer], phase: int) -> None:
        """Add the tokens of one step; routing: ids [n_layers, n_tokens, n_experts_used], outside for not known."""
        known = (routing >= 0) & (routing < self._n_experts)
        ids = np.where(known, routing, NOT_RECORDED).astype(np.uint16)
        self._steps.append(np.ascontiguousarray(ids.transpose(1, 0, 2)))
        self._phases.append(np.full(ids.shape[1], phase, np.uint8))

    def trace(self) -> Trace:
        """Return what was recorded. Raises `ConfigError` if that is nothing."""
        if not self._steps:
            raise ConfigError("no routing was recorded: the run made no token")
        ids, phase = np.concatenate(self._steps), np.concatenate(self._phases)
        return Trace(self._name, ids, phase, self._n_experts, self._meta)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was recorded; see `save_trace`."""
        save_trace(path, self.trace())
