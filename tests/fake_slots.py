"""A device with slots that only keeps books, and refuses whatever a real one could not survive."""

from __future__ import annotations

import numpy as np

from engine.errors import DeviceError


class Work:
    """A copy, a step or a fence: done when the device says so. A short step passes layers before that."""

    def __init__(self, what: tuple, is_short: bool = False) -> None:
        self.what, self.done, self.failed = what, False, False
        self.is_short, self.n_passed = is_short, 0

    def reads(self, layer: int, slot: int) -> bool:
        """Whether this step may still read a slot."""
        return layer >= self.n_passed and (layer, slot) in self.what


class FakeSlots:
    """Checks the rule of slots: read only after the copy into them, overwritten only after the last reader.

    Steps and copies finish in any order that the random generator likes; copies fail with probability `failing`.
    """

    def __init__(
        self,
        n_experts: int,
        seed: int,
        n_slots: list[int],
        failing: float = 0.0,
        n_kept: list[int] | None = None,
        lends_from: int = 1 << 30,  # tokens of a step
    ) -> None:
        n_layers = len(n_slots)
        self.n_slots, self.n_kept = np.array(n_slots), np.array(n_slots if n_kept is None else n_kept)
        self.lends_from = lends_from
        self.rng = np.random.default_rng(seed)
        self.failing = failing
        self.where = np.full((n_layers, n_experts), -1)  # what was published
        self.contents: dict[tuple[int, int], int] = {}  # (layer, slot) -> expert whose bytes are whole
        self.steps: list[Work] = []  # started and not done, with the slots they read
        self.copies: list[Work] = []
        self.n_copies = self.n_refused = 0
        self.n_calls = 0

    def copy_expert(self, layer: int, expert: int, slot: int) -> Work:
        self.n_calls += 1
        assert not (self.where[layer] == slot).any(), "a slot is overwritten while it is published"
        assert not any(step.reads(layer, slot) for step in self.steps), "a slot is overwritten while a step reads it"
        assert not any(copy.what[:2] == (layer, slot) for copy in self.copies), "two copies into one slot"
        self.contents.pop((layer, slot), None)
        if self.rng.random() < self.failing / 2:
            self.n_refused += 1
            raise DeviceError("copy cannot be started")
        copy = Work((layer, slot, expert))
        self.copies.append(copy)
        self.n_copies += 1
        return copy

    def fence(self, layer: int) -> Work:
        self.n_calls += 1
        return Work((list(self.steps), layer))

    def is_done(self, ticket: Work) -> bool:
        self.n_calls += 1
        if ticket.failed:
            raise DeviceError("copy was lost")
        if isinstance(ticket.what[0], list):
            steps, layer = ticket.what
            return all(step.done or layer < step.n_passed for step in steps)
        return ticket.done

    def publish(self, layer: int, expert: int, slot: int) -> None:
        self.n_calls += 1
        if slot >= 0:
            assert self.contents.get((layer, slot)) == expert, "an expert is published before its copy is done"
        self.where[layer, expert] = slot

    def usable_slots(self, n_tokens: int, n_positions: int) -> np.ndarray:
        """As if each position took a slot of each layer more, as far as there are any that are not kept."""
        long, short = self.n_kept, np.maximum(self.n_slots - n_positions, np.minimum(self.n_kept, self.n_slots))
        return np.arange(self.n_slots.max()) < (long if n_tokens >= self.lends_from else short)[:, None]

    def longest_after(self, positions: np.ndarray, slots: np.ndarray) -> int:
        return 0

    def wait_all(self) -> None:
        self.n_calls += 1
        self.finish(1.0)

    # -- what the outside world does --------------------------------------------------------------------------------

    def start_step(self, chosen: np.ndarray, n_positions: int = 0) -> list[bool]:
        """Start a step that reads these experts ([n_layers, n_used]); return which of them come from slots."""
        self._lend(self.usable_slots(1, n_positions))
        slots = [(layer, int(self.where[layer, e])) for layer, row in enumerate(chosen) for e in row]
        for (layer, slot), expert in zip(slots, chosen.reshape(-1), strict=True):
            assert slot < 0 or self.contents[layer, slot] == expert, "a step reads another expert's bytes"
        self.steps.append(Work(tuple(s for s in slots if s[1] >= 0), is_short=True))
        return [slot >= 0 for _, slot in slots]

    def start_long_step(self) -> None:
        """Start a step that uses the memory of all slots but those that are kept."""
        lent = self._lend(self.usable_slots(self.lends_from, 0))
        kept = [(layer, int(slot)) for layer, row in enumerate(self.where) for slot in row if slot >= 0]
        self.steps.append(Work((*lent, *kept)))

    def _lend(self, usable: np.ndarray) -> list[tuple[int, int]]:
        """Empty all slots but some; return them."""
        lent = [(layer, slot) for layer, n in enumerate(self.n_slots) for slot in range(n) if not usable[layer, slot]]
        assert not any((self.where[layer] == slot).any() for layer, slot in lent), "a published slot is lent"
        assert not any(copy.what[:2] in lent for copy in self.copies), "a slot is lent while something is copied there"
        for slot in lent:
            self.contents.pop(slot, None)
        return lent

    def end_steps(self) -> None:
        """Let all steps end, and no copy."""
        for step in self.steps:
            step.done = True
        self.steps.clear()

    def finish(self, share: float) -> None:
        """Let some of the work end, in random order, and steps come to other layers."""
        for step in self.steps:
            if step.is_short:
                step.n_passed = int(self.rng.integers(step.n_passed, len(self.n_slots) + 1))
        for queue in (self.steps, self.copies):
            for work in list(queue):
                if self.rng.random() >= share:
                    continue
                queue.remove(work)
                if queue is self.copies and self.rng.random() < self.failing / 2:
                    work.failed = True
                    continue
                work.done = True
                if queue is self.copies:
                    layer, slot, expert = work.what
                    self.contents[layer, slot] = expert
