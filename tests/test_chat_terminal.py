"""A chat at a real terminal: prompts, history, several lines, Ctrl-C while it answers and while it waits, Ctrl-D."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.data import tiny_model_path

REPO = Path(__file__).resolve().parent.parent
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
QUIET_S = 0.4  # in which an answer that is being made goes on
PATIENCE_S = 60  # after which the program is taken for hung; nothing is timed


class Terminal:
    """A program on a terminal of its own, and everything that it has shown there."""

    def __init__(self, argv: list[str], environ: dict[str, str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(REPO)
            os.execve(argv[0], argv, environ)
        self.shown = ""
        self._seen = 0
        self._code: int | None = None

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Return what came since the last wait, up to the first place that matches."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = re.compile(pattern).search(self.shown, self._seen)
            if found:
                text = self.shown[self._seen : found.end()]
                self._seen = found.end()
                return text
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown[self._seen :]!r}"
            if select.select([self._fd], [], [], 0.2)[0] and not self._read():
                pytest.fail(f"ended without {pattern!r}: {self.shown[self._seen :]!r}")

    def wait_for_prompt(self, prompt: str = "> ") -> str:
        """Return what came until the program asks for more, and says nothing else: answers hold lines with ">", too."""
        start, deadline = self._seen, time.monotonic() + PATIENCE_S
        while True:
            assert time.monotonic() < deadline, f"no prompt {prompt!r} in {self.shown[start:]!r}"
            if select.select([self._fd], [], [], QUIET_S)[0]:
                assert self._read(), f"ended without the prompt {prompt!r}: {self.shown[start:]!r}"
            elif self.shown[start:].endswith(f"\n{prompt}"):
                self._seen = len(self.shown)
                return self.shown[start:]

    def interrupt(self) -> None:
        """Press Ctrl-C once the program sleeps: Python misses one between showing a key and waiting for the next."""
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        self.type(CTRL_C)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # what Linux says when nobody is at the other end any more
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def end(self) -> int:
        """Return the exit code of a program that should end by itself now."""
        while self._read():
            pass
        _, status = os.waitpid(self.pid, 0)
        self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def close(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Terminal]]:
    """Starts chats with the bundled model, which have just asked for the first message."""
    options = ["-c", "30100", "-t", "1", "-n", "30000", "--temperature", "0", "--set", "engine.max_batch_tokens=32"]
    argv = [sys.executable, "-m", "engine", "chat", str(tiny_model_path()), *options]
    environ = os.environ | {"PYTHONPATH": str(REPO), "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "200"}
    started: list[Terminal] = []

    def start_one() -> Terminal:
        started.append(Terminal(argv, environ))
        started[-1].wait_for(r"/help lists commands.*\s+> ")
        return started[-1]

    yield start_one
    for terminal in started:
        terminal.close()


def test_a_chat_at_a_terminal(start: Callable[[], Terminal], tmp_path: Path) -> None:
    chat = start()
    file = tmp_path / "talk.json"
    chat.type("first\n")
    chat.wait_for(r"first\r\n[^>]")  # it has begun to answer
    chat.type(CTRL_C)
    chat.wait_for_prompt()
    chat.type("half a line")
    chat.wait_for("half a line")
    chat.interrupt()  # throws it away
    chat.wait_for_prompt()
    chat.type("one\\\n")
    chat.wait_for_prompt("... ")
    chat.interrupt()
    chat.wait_for_prompt()
    chat.type('"""two\n')
    chat.wait_for_prompt("... ")
    chat.type('lines"""\n')
    chat.wait_for(r'"""\r\n[^>]')
    chat.type(CTRL_C)
    chat.wait_for_prompt()
    chat.type(f"/save {file}\n")
    assert "saved 4 messages to" in chat.wait_for_prompt()
    messages = json.loads(file.read_text())
    assert [m["content"] for m in messages if m["role"] == "user"] == ["first", "two\nlines"]
    chat.type("/stats\n")
    assert "2 answers" in chat.wait_for_prompt()
    chat.type("/reset\n")
    chat.wait_for_prompt()
    chat.type(f"{UP}{UP}{UP}\n")  # back to what was saved
    assert "saved 0 messages to" in chat.wait_for_prompt()
    chat.type(CTRL_D)
    assert chat.end() == 0
    assert "Traceback" not in chat.shown
    again = start()
    again.type(f"{UP}\n")  # what was entered the last time
    assert "saved 0 messages to" in again.wait_for_prompt()
    again.type("/exit\n")
    assert again.end() == 0
