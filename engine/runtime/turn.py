"""Whose turn it is to use the program."""

from __future__ import annotations

import threading
from types import TracebackType

from engine.errors import RequestError


class Turn:
    """Lets one thread after the other use the program until that is closed; a context manager, entered with each token.

    Attributes:
        lock: for what may be done when the program is closed, too; a thread that has it may take it again.
        is_open: whether there is a program to use.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_open = True

    def __enter__(self) -> None:
        """Wait for this thread's turn; raise `RequestError` if there will be none any more."""
        with self.lock:
            if self.is_open:
                self.lock.acquire()  # a second time, to be kept
                return
        raise RequestError("the engine is closed; open it again")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the program to whoever is next."""
        self.lock.release()
