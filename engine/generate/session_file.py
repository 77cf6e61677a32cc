"""Keeps a session in a file: its tokens, and the keys, values and states that they left behind.

The file begins with a line of JSON that says what it is for; a hash over everything guards against damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError
from engine.files import whole_file

VERSION = 2  # of this format, and of how keys, values and states lie in it
_KIND = "hot-experts session"


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What a session is made of.

    Attributes:
        model: fingerprint of the model.
        kv_type: how keys and values are stored.
        layout: how all of it lies in `state`, which depends on the device, and how keys are rotated, if that depends on
            the context.
        token_ids: that the session holds.
        state: what they left behind, flat.
    """

    model: str
    kv_type: str
    layout: str
    token_ids: tuple[int, ...]
    state: npt.NDArray[np.uint8]


def save_session(path: str | os.PathLike[str], session: SavedSession) -> None:
    """Write a file whole or not at all; raise `RequestError` if it cannot be written."""
    path = Path(path)
    ids = np.array(session.token_ids, "<i4").tobytes()
    about = {
        "kind": _KIND,
        "version": VERSION,
        "model": session.model,
        "kv_type": session.kv_type,
        "layout": session.layout,
        "n_tokens": len(session.token_ids),
        "n_state_bytes": session.state.size,
    }
    about["sha256"] = _digest(about, ids, session.state)
    try:
        with whole_file(path) as file:
            file.write(json.dumps(about).encode() + b"\n")
            file.write(ids)
            file.write(session.state.data)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None


def load_session(
    path: str | os.PathLike[str], model: str, kv_type: str, layout: str, context_length: int
) -> SavedSession:
    """Read a session of this model.

    Args:
        path: the file.
        model: fingerprint of the model it must be of.
        kv_type: how its keys and values must be stored.
        layout: how they must lie in the file.
        context_length: tokens it may have.

    Raises:
        RequestError: for a file that is no session, damaged, of another version or model, or too long.
    """
    try:
        first, found, rest = Path(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        about = json.loads(first)
    except (ValueError, RecursionError):
        about = None
    if not found or not isinstance(about, dict) or about.get("kind") != _KIND:
        raise RequestError(f"{path}: is not a saved session")
    if about.get("version") != VERSION:
        raise RequestError(
            f"{path}: is a session of format version {about.get('version')}, this version reads {VERSION}; run its "
            "prompt again"
        )
    digest = about.pop("sha256", "")
    n_ids, n_state = about.get("n_tokens"), about.get("n_state_bytes")
    if not isinstance(n_ids, int) or not isinstance(n_state, int) or n_ids < 0 or 4 * n_ids + n_state != len(rest):
        raise RequestError(f"{path}: is damaged: it does not have the size that its first line gives")
    state = np.frombuffer(rest, np.uint8)[4 * n_ids :]
    if digest != _digest(about, rest[: 4 * n_ids], state):
        raise RequestError(f"{path}: is damaged: its contents do not have the hash that was written with them")
    if about.get("model") != model:
        raise RequestError(f"{path}: is a session of another model; open the one it was saved with")
    if about.get("kv_type") != kv_type:
        raise RequestError(
            f"{path}: holds {about.get('kv_type')} keys and values, and engine.kv_type is {kv_type!r}; set the same"
        )
    if about.get("layout") != layout:
        raise RequestError(
            f"{path}: was saved on another kind of device, or with an [engine] context_length for which this model "
            "rotates otherwise; open it there, or run its prompt again"
        )
    if n_ids > context_length:
        raise RequestError(
            f"{path}: holds {n_ids} tokens and the context {context_length}; raise [engine] context_length"
        )
    return SavedSession(model, kv_type, layout, tuple(np.frombuffer(rest, "<i4", n_ids).tolist()), state)


def _digest(about: dict[str, object], ids: bytes, state: npt.NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(ids)
    digest.update(state.data)
    return digest.hexdigest()
