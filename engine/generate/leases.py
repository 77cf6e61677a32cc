"""Lends the slots of a program to sequences, and remembers what each holds: a known prefix need not be run again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError
from engine.generate.forward import ForwardPass, Outputs, Progress


class SlotTable:
    """All slots of a program. Safe to use from several threads; what runs in a slot is its borrower's business.

    A prefix is reused only where that changes no bit: keys and values can be cut back to any position, a recurrent
    state only continued.
    """

    def __init__(self, n_slots: int, *, can_cut_back: bool) -> None:
        self.can_cut_back = can_cut_back
        self._held: list[list[int]] = [[] for _ in range(n_slots)]
        self._last_use = [0] * n_slots
        self._owner: list[int | None] = [None] * n_slots  # thread
        self._clock = 0
        self._changed = threading.Condition()  # its lock is re-entrant

    def try_borrow(self, token_ids: Sequence[int]) -> Lease | None:
        """Return what `borrow` would, or None if it would have to wait."""
        with self._changed:
            if all(owner is not None for owner in self._owner):
                return None
            return self.borrow(token_ids)

    def borrow(self, token_ids: Sequence[int], *, reuse: bool = True) -> Lease:
        """Return the free slot that holds the longest usable prefix of a sequence, else the one unused for longest.

        Waits while other threads have all slots. Raises `RequestError` if this thread itself has them all, which
        waiting could not change.
        """
        me = threading.get_ident()
        with self._changed:
            while all(owner is not None for owner in self._owner):
                if all(owner == me for owner in self._owner):
                    raise RequestError(
                        f"all {len(self._owner)} sequences are in use; finish or close a running stream, "
                        "or raise [engine] n_sequences"
                    )
                self._changed.wait()
            free = [slot for slot, owner in enumerate(self._owner) if owner is None]
            usable = {slot: self.usable(self._held[slot], token_ids) if reuse else 0 for slot in free}
            slot = max(free, key=lambda s: (usable[s], -self._last_use[s]))
            self._owner[slot] = me
            self._clock += 1
            self._last_use[slot] = self._clock
        held = self._held[slot]
        del held[usable[slot] :]
        return Lease(self, slot, held, is_owner=True)

    def usable(self, held: list[int], token_ids: Sequence[int]) -> int:
        """Return the tokens of a new sequence that need not be run; the last one always must, for its logits."""
        if self.can_cut_back:
            pairs = zip(held, token_ids, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(token_ids)))
            return min(common, len(token_ids) - 1)
        return len(held) if len(held) < len(token_ids) and held == list(token_ids[: len(held)]) else 0

    def give_back(self, slot: int, *, is_torn: bool) -> None:
        """Take a slot back; a torn one was stopped in the middle of a step."""
        with self._changed:
            if is_torn and not self.can_cut_back:
                self._held[slot].clear()
            self._owner[slot] = None
            self._changed.notify_all()


class Lease:
    """A slot on loan: the tokens it holds, and the way to add more. A context manager that gives the slot back."""

    def __init__(self, table: SlotTable, slot: int, held: list[int], *, is_owner: bool) -> None:
        self._table = table
        self._is_owner = is_owner
        self.slot = slot
        self._held = held
        self._is_torn = False
        self._is_open = True

    @property
    def n_held(self) -> int:
        """Return the tokens of the sequence that the slot holds."""
        return len(self._held)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the tokens that the slot holds."""
        return tuple(self._held)

    def lend(self, token_ids: Sequence[int]) -> Lease:
        """Return a lease for an answer in this slot, cut back to what that can use; closing it keeps the slot here."""
        assert self._is_open
        del self._held[self._table.usable(self._held, token_ids) :]
        return Lease(self._table, self.slot, self._held, is_owner=False)

    def extend(
        self,
        forward: ForwardPass,
        token_ids: Sequence[int],
        outputs: Outputs = "last",
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Run tokens after those the slot holds; see `ForwardPass.run`."""
        assert self._is_open
        self.begin()
        logits = forward.run(self.slot, token_ids, len(self._held), outputs, progress)
        self.commit(token_ids)
        return logits

    def begin(self) -> None:
        """Note that a step on the slot begins; until `commit`, what a recurrent state holds is not known."""
        self._is_torn = True

    def commit(self, token_ids: Sequence[int]) -> None:
        """Note that the slot holds these tokens too."""
        self._held.extend(token_ids)
        self._is_torn = False

    def recover(self, n_wanted: int) -> None:
        """Go back to what the slot surely holds, at most `n_wanted` tokens, after a step that was stopped."""
        is_known = not self._is_torn and len(self._held) <= n_wanted
        if not is_known:
            del self._held[n_wanted if self._table.can_cut_back else 0 :]
        self._is_torn = False

    def close(self) -> None:
        """Give the slot back; what it holds stays for a sequence that begins the same."""
        if self._is_open:
            self._is_open = False
            if self._is_owner:
                self._table.give_back(self.slot, is_torn=self._is_torn)
            elif self._is_torn:
                self.recover(len(self._held))

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
