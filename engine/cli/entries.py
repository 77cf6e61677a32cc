"""What a user enters in a chat: lines, joined where they belong together, and kept for the next time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.cli.terminal import write
from engine.errors import RequestError

HOW_TO_ENTER = 'A line that ends with \\ goes on in the next one; """ begins and ends a text of several lines.'


def entries() -> Iterator[str]:
    """Yield what the user enters, several lines joined, without empty entries; ask for it if this is a terminal."""
    lines: list[str] = []
    is_block = False
    while True:
        try:
            line = _read_line("... " if lines or is_block else "> ")
        except KeyboardInterrupt:
            lines, is_block = [], False
            write("\n")
            continue
        if line is None:
            break
        if is_block and line.rstrip().endswith('"""'):
            lines.append(line.rstrip()[:-3])
        elif is_block:
            lines.append(line)
            continue
        elif not lines and line.strip().startswith('"""'):
            is_block = True
            lines = [line.strip()[3:]] if line.strip()[3:] else []
            continue
        elif line.endswith("\\"):
            lines.append(line[:-1])
            continue
        else:
            lines.append(line)
        text = "\n".join(lines).strip()
        lines, is_block = [], False
        if text:
            yield text
    if text := "\n".join(lines).strip():
        yield text


def _read_line(prompt: str) -> str | None:
    """Return a line without its end, None at the end of the input."""
    if sys.stdin.isatty():
        try:
            return input(prompt)  # with line editing and history where there is readline
        except EOFError:
            write("\n")
            return None
    try:
        line = sys.stdin.readline()
    except UnicodeError:
        raise RequestError(
            f"standard input is not {sys.stdin.encoding} text; convert it, with iconv for example"
        ) from None
    return line.rstrip("\r\n") if line else None


@contextlib.contextmanager
def kept_history() -> Iterator[None]:
    """Keep what was entered for the next time, on terminals; a history that cannot be kept is no reason to stop."""
    try:
        import readline  # noqa: PLC0415 - some systems have none, and importing it changes what input() does
    except ImportError:
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hot-experts"
    path = folder / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
