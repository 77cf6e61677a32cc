"""What is held is given back, whatever fails."""

from __future__ import annotations

import pytest

from engine.resources import Resources


class Thing:
    def __init__(self, name: str, log: list[str], error: Exception | None = None) -> None:
        self.name, self.log, self.error = name, log, error

    def close(self) -> None:
        self.log.append(self.name)
        if self.error is not None:
            raise self.error


def test_what_was_taken_last_goes_first_and_once() -> None:
    log: list[str] = []
    held = Resources()
    for name in "abc":
        assert held.own(Thing(name, log)).name == name
    held.defer(log.append, "d")
    held.close()
    held.close()
    assert log == ["d", "c", "b", "a"]


def test_the_first_failure_is_told_and_the_rest_is_given_back() -> None:
    log: list[str] = []
    held = Resources()
    held.own(Thing("a", log, ValueError("later")))
    held.own(Thing("b", log))
    held.own(Thing("c", log, ValueError("first")))
    with pytest.raises(ValueError, match="first"):
        held.close()
    assert log == ["c", "b", "a"]


def test_a_block_that_fails_gives_back_and_tells_its_own_failure() -> None:
    log: list[str] = []

    def failing() -> None:
        with Resources() as held:
            held.own(Thing("a", log, ValueError("not this one")))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert log == ["a"]


def test_what_is_taken_along_is_kept() -> None:
    log: list[str] = []
    with Resources() as held:
        held.own(Thing("a", log))
        kept = held.pop_all()
    assert log == []
    kept.own(Thing("b", log))
    kept.close()
    assert log == ["b", "a"]
