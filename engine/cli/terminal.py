"""What people see: the text on standard output; log lines and progress bars on standard error."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LONG_PROMPT = 256  # tokens from which on a bar is worth its line


def error_console() -> Console:
    """Return a console on the current standard error."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class LogLines(logging.Handler):
    """Prints log records as plain lines, above a progress bar if there is one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; warnings say that they are."""
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._console.print(f"{prefix}{self.format(record)}")


def start_logging(console: Console, *, quiet: bool, debug: bool) -> logging.Handler:
    """Show the engine's log on a console; return the handler, for `stop_logging`."""
    logger = logging.getLogger("engine")
    handler = LogLines(console)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    return handler


def stop_logging(handler: logging.Handler) -> None:
    """Undo `start_logging`."""
    logging.getLogger("engine").removeHandler(handler)


class Bars:
    """Progress of loading (in bytes) and of prompts (in tokens); gone when done. Shown on terminals only."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._is_shown = console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def steps(self, what: str, done: int, total: int) -> None:
        """Show steps of a long measurement."""
        self._show(what, done, total, is_bytes=False)

    def loading(self, what: str, done: int, total: int) -> None:
        """Show bytes; a callback for `Engine.open`."""
        self._show(what, done, total, is_bytes=True)

    def prompt(self, done: int, total: int) -> None:
        """Show tokens; a callback for `Engine.generate`."""
        if total >= LONG_PROMPT:
            self._show("reading the prompt", done, total, is_bytes=False)

    def _show(self, what: str, done: int, total: int, *, is_bytes: bool) -> None:
        if not self._is_shown:
            return
        if done >= total:
            self.close()
            return
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn() if is_bytes else MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, description=what)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
