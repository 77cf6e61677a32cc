"""Virtual time: a clock that moves when work is done, and a stream of copies that take their time on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class VirtualClock:
    """Seconds since the device was opened. Nothing but work moves it, so the same calls give the same times."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance_to(self, time: float) -> None:
        """Move on to a time, if it is not past already."""
        self.now = max(self.now, time)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that is over at a time; a copy that `failed` brought nothing."""

    at: float
    failed: bool = False


class Timetable:
    """Says when work ends: copies one after another at the speed of the link, as a stream does them.

    With `adversarial` set the order is any order and the time anything up to `PATIENCE` steps, and fences are passed
    late: whoever waits for what he must wait for cannot tell the difference.
    """

    PATIENCE = 3.0  # steps

    def __init__(
        self, clock: VirtualClock, link_bytes_s: float, seed: int, *, adversarial: bool = False, failing: float = 0.0
    ) -> None:
        """Begin with nothing under way; `failing` is the share of copies that fail."""
        self._clock, self._speed = clock, link_bytes_s
        self._adversarial, self._failing = adversarial, failing
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._link_is_free_at = 0.0
        self._steps_are_over_at = 0.0
        self._step_s = 0.0

    def copy(self, n_bytes: float, *, may_fail: bool = True) -> Event:
        """Begin a copy over the link."""
        failed = may_fail and self._failing > 0 and self._random.random() < self._failing
        if self._adversarial:
            return Event(self._clock.now + self._some_time(), failed)
        self._link_is_free_at = max(self._link_is_free_at, self._clock.now) + n_bytes / self._speed
        return Event(self._link_is_free_at, failed)

    def step(self, seconds: float) -> Event:
        """Take a step on the clock; return when its last reader is done, which is never before an earlier step's."""
        self._clock.advance_to(self._clock.now + seconds)
        return self.end_step(seconds)

    def end_step(self, seconds: float) -> Event:
        """Note that a step of that many seconds, which the clock shows already, is over; return as `step` does."""
        self._step_s = seconds
        end = self._clock.now + (self._some_time() if self._adversarial else 0.0)
        self._steps_are_over_at = max(self._steps_are_over_at, end)
        return Event(self._steps_are_over_at)

    def _some_time(self) -> float:
        steps = self._random.integers(0, 2) and self._random.random() * self.PATIENCE
        return float(steps) * self._step_s
