"""Memory for intermediate results: who needs how much of it when, and where that lies in steps of some length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.devices.intervals import Interval, plan_offsets
from engine.devices.program import Limits


@dataclass(slots=True, eq=False)
class Need:
    """A result that is kept from one operation to another, both included.

    Attributes:
        n_bytes: that it has in steps within some limits.
        first, last: the operations.
    """

    n_bytes: Callable[[Limits], int]
    first: int
    last: int


class Scratch:
    """A place for every result of steps within some limits; those needed at the same time lie side by side.

    Attributes:
        n_bytes: of all of it.
        offset: where it begins in the device allocation, to be set by whoever lays that out.
    """

    def __init__(self, needs: Iterable[Need], limits: Limits) -> None:
        """Plan it."""
        self._intervals = {need: Interval(need.n_bytes(limits), need.first, need.last) for need in needs}
        self.n_bytes = plan_offsets(list(self._intervals.values()))
        self.offset = 0

    def offset_of(self, need: Need) -> int:
        """Return where a result lies in the device allocation."""
        return self.offset + self._intervals[need].offset
