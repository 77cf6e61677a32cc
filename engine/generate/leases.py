"""Lends the slots of a program to sequences, and remembers what each holds: a known prefix need not be run again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from engine.devices.program import RewindingProgram
from engine.errors import EngineError, RequestError
from engine.generate.forward import ForwardPass, Outputs, Progress
from engine.generate.snapshots import Snapshots


class SlotTable:
    """All slots of a program. Safe to use from several threads; what runs in a slot is its borrower's business.

    A prefix is reused only where that changes no bit: keys and values of all positions can be cut back to any, those in
    a ring by some tokens; a recurrent state can be continued, or gone back to where there is a snapshot of it.

    Attributes:
        cuts_back: by how many tokens of all that it ever had a sequence can be cut back; None: to any place.
        snapshots: of what a sequence overwrites; None if that is nothing, or none are taken.
        rewinder: keeps the states of one sequence while drafts are checked; None where a sequence can be cut back.
    """

    def __init__(
        self,
        n_slots: int,
        *,
        cuts_back: int | None,
        snapshots: Snapshots | None = None,
        rewinder: RewindingProgram | None = None,
    ) -> None:
        """Start with all slots free and empty; see `program.cuts_back`."""
        self.cuts_back, self.snapshots, self.rewinder = cuts_back, snapshots, rewinder
        self._held: list[list[int]] = [[] for _ in range(n_slots)]
        self._floor = [0] * n_slots  # tokens below which nothing is known of a sequence but that it begins empty
        self._last_use = [0] * n_slots
        self._owner: list[int | None] = [None] * n_slots  # thread
        self._clock = 0
        self._changed = threading.Condition()

    def try_borrow(self, token_ids: Sequence[int]) -> Lease | None:
        """Return what `borrow` would, or None if it would have to wait."""
        with self._changed:
            if all(owner is not None for owner in self._owner):
                return None
            slot = self._take(token_ids, reuse=True)
        return self._lease(slot, token_ids, reuse=True)

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
            slot = self._take(token_ids, reuse=reuse)
        return self._lease(slot, token_ids, reuse=reuse)

    def _take(self, token_ids: Sequence[int], *, reuse: bool) -> int:
        """Make a free slot this thread's: the one that holds most that can be used."""
        free = [slot for slot, owner in enumerate(self._owner) if owner is None]
        usable = {slot: self.usable(slot, token_ids) if reuse else 0 for slot in free}
        slot = max(free, key=lambda s: (usable[s], -self._last_use[s]))
        self._owner[slot] = threading.get_ident()
        self._clock += 1
        self._last_use[slot] = self._clock
        return slot

    def _lease(self, slot: int, token_ids: Sequence[int], *, reuse: bool) -> Lease:
        """Return a slot of this thread's as a lease; not while others wait for the table, as this may wait for them."""
        n_common = self.common(slot, token_ids)
        try:
            self.go_back(slot, self.usable(slot, token_ids) if reuse else 0)
        except BaseException:
            self.give_back(slot)
            raise
        return Lease(self, slot, self._held[slot], n_common)

    def common(self, slot: int, token_ids: Sequence[int]) -> int:
        """Return with how many of its tokens a new sequence begins like what a slot holds, but for its last one."""
        held = self._held[slot]
        n = next((i for i, (a, b) in enumerate(zip(held, token_ids, strict=False)) if a != b), len(held))
        return max(0, min(n, len(token_ids) - 1))

    def usable(self, slot: int, token_ids: Sequence[int]) -> int:
        """Return the tokens of a new sequence that need not be run; the last one always must, for its logits."""
        longest = self.common(slot, token_ids)
        if longest >= self._floor[slot]:
            return longest
        return self.snapshots.best(token_ids[:longest]) if self.snapshots is not None else 0

    def keep(self, slot: int, n_more: int) -> None:
        """Make it possible to go back to where a sequence will be after so many tokens of the next step."""
        if self.rewinder is not None:
            self.rewinder.keep_states(slot, n_more)

    def rewind(self, slot: int, n_tokens: int) -> None:
        """Cut what a slot holds back to where `keep` makes that possible, after so many tokens."""
        if self.rewinder is not None:
            self.rewinder.rewind_states(slot)
            self._floor[slot] = n_tokens
        del self._held[slot][n_tokens:]

    def note(self, slot: int, n_tokens: int, *, is_whole: bool = True) -> None:
        """Note that a sequence gets so many tokens; one that is not whole has no more than its next token needs."""
        if self.cuts_back is not None:
            floor = n_tokens - self.cuts_back if is_whole else n_tokens
            self._floor[slot] = max(self._floor[slot], floor)

    def has(self, slot: int, n_tokens: int) -> bool:
        """Return whether what a slot holds can be cut back to so many tokens."""
        return n_tokens >= self._floor[slot]

    def go_back(self, slot: int, n_tokens: int) -> None:
        """Cut what a slot holds back to its first tokens, as many as `usable` named; to none if a copy is gone since.

        Whatever happens, the slot then holds what it says.
        """
        held = self._held[slot]
        kept, is_there = held[:n_tokens], self.has(slot, n_tokens)
        held.clear()
        if kept and not is_there and not (self.snapshots is not None and self.snapshots.restore(slot, kept)):
            kept = []
        if not kept or not is_there:
            self._floor[slot] = len(kept)
        held += kept

    def give_back(self, slot: int) -> None:
        """Take a slot back; one that was stopped in the middle of a step may hold nothing any more."""
        with self._changed:
            if not self.has(slot, len(self._held[slot])):
                self._held[slot].clear()
                self._floor[slot] = 0
            self._owner[slot] = None
            self._changed.notify_all()


class Lease:
    """A slot on loan: the tokens it holds, and the way to add more. A context manager that gives the slot back.

    Attributes:
        slot: its number.
        n_common: tokens that the sequence has in common with the one before, whether they could be used or not.
    """

    def __init__(
        self, table: SlotTable, slot: int, held: list[int], n_common: int, *, owner: Lease | None = None
    ) -> None:
        self._table = table
        self._owner = owner  # of a lease for one answer
        self._answer: Lease | None = None  # the one that is being made here
        self.slot, self.n_common = slot, n_common
        self._held = held
        self._is_open = True
        self._kept_at = self._drafts_end = 0  # tokens before and behind the last drafts

    @property
    def n_held(self) -> int:
        """Return the tokens of the sequence that the slot holds."""
        return len(self._held)

    @property
    def is_open(self) -> bool:
        """Return whether the slot was not given back yet."""
        return self._is_open

    @property
    def can_cut_back(self) -> bool:
        """Return whether the sequence can be cut back by a few tokens from anywhere."""
        return self._table.cuts_back != 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the tokens that the slot holds."""
        return tuple(self._held)

    @property
    def takes_snapshots(self) -> bool:
        """Return whether it is of use to remember states."""
        return self._table.snapshots is not None

    def lend(self, token_ids: Sequence[int]) -> Lease:
        """Return a lease for an answer in this slot, cut back to what that can use; closing it keeps the slot here."""
        self._check_free()
        n_common = self._table.common(self.slot, token_ids)
        self._table.go_back(self.slot, self._table.usable(self.slot, token_ids))
        self._answer = Lease(self._table, self.slot, self._held, n_common, owner=self)
        return self._answer

    def _check_free(self) -> None:
        """Raise `RequestError` where the slot was given back, or an answer is being made in it."""
        if not self._is_open:
            raise RequestError("the session is closed")
        if self._answer is not None:
            raise RequestError("an answer of this session is under way; finish its stream, or close it")

    def extend(
        self,
        forward: ForwardPass,
        token_ids: Sequence[int],
        outputs: Outputs = "last",
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Run tokens after those the slot holds; see `ForwardPass.run`.

        Raises `RequestError` if the slot was given back, or an answer is being made in it.
        """
        self._check_free()
        forward.check(len(self._held), len(token_ids))
        self.begin(len(token_ids))
        try:
            logits = forward.run(self.slot, token_ids, len(self._held), outputs, progress)
        except BaseException:
            self.recover(len(self._held))
            raise
        self.commit(token_ids)
        return logits

    def begin(self, n_tokens: int) -> None:
        """Note that so many tokens more are about to be run; until `commit` they may be there, or a part of them."""
        self._table.note(self.slot, len(self._held) + n_tokens)

    def begin_drafts(self, n_tokens: int, n_drafts: int) -> None:
        """Note that drafts are about to be run behind some tokens; all that is committed of them is what is right."""
        self._table.keep(self.slot, n_tokens)
        self.begin(n_tokens + n_drafts)
        self._kept_at = len(self._held) + n_tokens
        self._drafts_end = self._kept_at + n_drafts

    def end_drafts(self) -> None:
        """Leave out what was not committed. With recurrent states that takes the drafts that were right along."""
        if self._is_open and len(self._held) < self._drafts_end and not self._table.has(self.slot, len(self._held)):
            self._table.rewind(self.slot, self._kept_at)

    def commit(self, token_ids: Sequence[int], *, is_whole: bool = True) -> None:
        """Note that the slot holds these tokens too; from a file, not `is_whole`, what the token after them needs."""
        self._held.extend(token_ids)
        self._table.note(self.slot, len(self._held), is_whole=is_whole)

    def remember(self) -> None:
        """Make it possible to cut the sequence back to where it is now."""
        if self._table.snapshots is not None:
            self._table.snapshots.take(self.slot, self._held)

    def recover(self, n_wanted: int) -> None:
        """Go back to what the slot surely holds, at most `n_wanted` tokens, after a step that was stopped."""
        n, table = min(n_wanted, len(self._held)), self._table
        if not table.has(self.slot, n):
            n = 0 if table.snapshots is None else table.snapshots.best(self._held[:n])
        elif n == len(self._held):
            return
        with contextlib.suppress(EngineError):  # a device that fails here, too, leaves the slot empty
            table.go_back(self.slot, n)

    def close(self) -> None:
        """Give the slot back; what it holds stays for a sequence that begins the same.

        An answer that is being made in it keeps the slot until it is over.
        """
        if not self._is_open:
            return
        self._is_open = False
        if self._owner is not None:
            self.recover(len(self._held))
            self._owner._answer = None
        if self._answer is None and (self._owner is None or not self._owner.is_open):
            self._table.give_back(self.slot)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
