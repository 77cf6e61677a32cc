"""States as they were earlier in a sequence, so that it can be cut back without being run again.

Most keys and values stay where they are while a sequence goes on; a recurrent state is overwritten by every token, and
what lies before a window by one that comes later. A chat often goes on from a little before its end: an answer was cut,
its thinking is left out, a question asked differently. So the states are copied at the places where that is likely, a
few of all sequences together, and the one that was not used for longest makes room.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from engine.devices.program import RecurrentProgram

log = logging.getLogger(__name__)
_ID_BYTES = 4
_LEAST_SAVED = 64  # tokens that a copy is worth beside the one at the end of a prompt
_SHORT_STEP = 64  # tokens that may be run by themselves at the end of a prompt


class Snapshots:
    """Copies of what sequences overwrite, by the tokens that led there. Safe to use from several threads.

    A copy fits any slot that holds these tokens: the same tokens leave the same bits.
    """

    def __init__(self, program: RecurrentProgram, turn: AbstractContextManager[None], max_snapshots: int) -> None:
        """Keep at most `max_snapshots`; the program is used inside `turn` only."""
        self._program, self._turn, self._max = program, turn, max_snapshots
        self._kept: dict[bytes, npt.NDArray[np.uint8]] = {}  # by int32 token ids; least recently used first
        self._lock = threading.Lock()  # of `_kept`; never held while waiting for a turn

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all copies."""
        with self._lock:
            return sum(state.size for state in self._kept.values())

    def take(self, slot: int, token_ids: Sequence[int]) -> None:
        """Copy the state of a slot that holds these tokens; out of memory costs a warning and the older copies."""
        if not self._max:
            return
        key = _key(token_ids)
        with self._turn:
            with self._lock:
                if self._touch(key) is not None:
                    return
                while len(self._kept) >= self._max:
                    self._kept.pop(next(iter(self._kept)))
            try:
                state = self._program.save_states(slot, len(token_ids))
            except MemoryError:
                self._max = len(self._kept)
                log.warning("no memory for more than %d copies of states: set n_snapshots = 0", self._max)
                return
            with self._lock:
                self._kept[key] = state

    def best(self, token_ids: Sequence[int]) -> int:
        """Return the most of the first of these tokens that there is a copy of; 0 for none."""
        wanted = _key(token_ids)
        with self._lock:
            return max((len(key) for key in self._kept if wanted.startswith(key)), default=0) // _ID_BYTES

    def restore(self, slot: int, token_ids: Sequence[int]) -> bool:
        """Put the state of a slot that holds these tokens back; False if there is no copy of it any more."""
        with self._turn:
            with self._lock:
                state = self._touch(_key(token_ids))
            if state is None:
                return False
            self._program.load_states(slot, len(token_ids), state)
            return True

    def _touch(self, key: bytes) -> npt.NDArray[np.uint8] | None:
        """Return the copy, if it is there, as the one that was used last."""
        state = self._kept.pop(key, None)
        if state is not None:
            self._kept[key] = state
        return state


def _key(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, np.int32).tobytes()


def likely_places(
    prompt_ids: Sequence[int], turn_ends: Collection[int], n_held: int, n_common: int, at_once: int
) -> list[int]:
    """Return after how many tokens of a prompt the next one is likely to differ, beyond the first `n_held`; last first.

    That is at the end of the last message. What follows it, the head of the answer, may be written differently when the
    answer is a message itself. A prompt without messages may be asked again: then all but its last two tokens. One must
    be run for its logits, and one alone would look like a token of an answer to the expert cache. So it is, too, where
    much follows the last message, and would take a step more, which reads all experts once more: a step has `at_once`
    tokens at most.

    It is also where this prompt differs from the one before, after `n_common` tokens: many may begin with the same
    instructions.
    """
    n, almost = len(prompt_ids), max(len(prompt_ids) - 2, 0)
    last = next((i + 1 for i in range(n - 2, 0, -1) if prompt_ids[i] in turn_ends), almost)
    if n_held < last < n - _SHORT_STEP:
        cut, whole = _n_steps(at_once, last - n_held, n - last), _n_steps(at_once, n - n_held)
        last = almost if cut > whole else last
    places = [last] if last > n_held else []
    if n_held + _LEAST_SAVED <= n_common < last:
        places.append(n_common)
    return places


def _n_steps(at_once: int, *n_tokens: int) -> int:
    """Return how many steps stretches of a prompt take, one after the other."""
    return sum(-(-n // at_once) for n in n_tokens)
