"""Gives back what was taken, all of it, whatever fails on the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, TypeVar


class Closable(Protocol):
    """Something that is closed once."""

    def close(self) -> None:
        """Give back what it holds."""
        ...


T = TypeVar("T", bound=Closable)


class Resources(ExitStack):
    """What somebody holds. `close` gives it back, last first, and goes on where something cannot be given back.

    The first failure is the one that is raised; what fails because of it would only hide it. Taken within a `with`
    block, what is held is given back if the block fails, and kept if it ends with `pop_all`:

    >>> class Memory:
    ...     def __init__(self, name: str) -> None:
    ...         self.name = name
    ...     def close(self) -> None:
    ...         print("freed", self.name)
    >>> with Resources() as held:
    ...     first = held.own(Memory("first"))
    ...     second = held.own(Memory("second"))
    ...     kept = held.pop_all()
    >>> kept.close()
    freed second
    freed first
    """

    def own(self, thing: T) -> T:
        """Return something that is closed with all others."""
        self.defer(thing.close)
        return thing

    def defer(self, give_back: Callable[..., object], *arguments: object) -> None:
        """Call a function when all is given back."""

        def leave(_: type[BaseException] | None, failure: BaseException | None, __: TracebackType | None) -> bool:
            try:
                give_back(*arguments)
            except Exception:  # the failure before it is told; this one most likely follows from it
                if failure is None:
                    raise
            return False

        self.push(leave)
