"""`chat`: talk to a model. Ctrl-C stops an answer, Ctrl-D ends the talk."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from rich.console import Console

from engine.cli.layers import layer_table
from engine.cli.options import (
    ENGINE_OPTIONS,
    SAMPLING_OPTIONS,
    add_chat_variables,
    add_common,
    add_settings,
    read_settings,
    stop_texts,
)
from engine.cli.run import describe, write
from engine.cli.terminal import Bars
from engine.errors import EngineError, RequestError
from engine.files import whole_file
from engine.runtime import Engine, EngineStatistics

COMMANDS = {
    "/help": "show this list",
    "/stats": "show tokens, speeds and memory so far",
    "/system TEXT": "begin anew with another system message; without a text, with none",
    "/reset": "begin anew",
    "/save FILE": "write the conversation as JSON; `chat --resume FILE` goes on with it",
    "/exit": "end; Ctrl-D does too",
}
_HELP = "/help lists commands, Ctrl-C stops an answer, Ctrl-D ends"
_HOW_TO_ENTER = 'A line that ends with \\ goes on in the next one; """ begins and ends a text of several lines.'

Messages = list[dict[str, str]]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. " + _HOW_TO_ENTER,
        epilog="commands in a chat:\n" + _list_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="GGUF file with a chat template")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text (repeatable)")
    parser.add_argument("--stats", action="store_true", help="after each answer, show hits and times of every layer")
    add_chat_variables(parser)
    add_settings(parser, SAMPLING_OPTIONS | ENGINE_OPTIONS)
    add_common(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    config = read_settings(args, stop_texts(args.stop))
    messages = load_conversation(args.resume) if args.resume else _opening(args.system)
    with Bars(console, quiet=args.quiet) as bars, Engine.open(config=config, progress=bars.loading) as engine:
        engine.prompt_ids([*messages, {"role": "user", "content": "?"}])  # a model that cannot chat says so now
        if not args.quiet:
            console.print(_HELP)
        chat = Chat(engine, messages, console, bars, quiet=args.quiet, show_layers=args.stats)
        with _history():
            for text in entries():
                if not chat.take(text):
                    break
    return 0


class Chat:
    """A conversation: takes what the user enters, a command or a message.

    Attributes:
        messages: so far, the system message first if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        messages: Messages,
        console: Console,
        bars: Bars,
        *,
        quiet: bool = False,
        show_layers: bool = False,
    ) -> None:
        self.messages = messages
        self._engine = engine
        self._console = console
        self._bars = bars
        self._quiet = quiet
        self._show_layers = show_layers

    def take(self, text: str) -> bool:
        """Do what an entry asks for; return whether the talk goes on."""
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        if not command.startswith("/"):
            self._answer(text)
        elif command == "/exit":
            return False
        elif command == "/reset":
            self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        elif command == "/system":
            self.messages = _opening(rest)
        elif command == "/stats":
            self._console.print(statistics_text(self._engine.statistics))
        elif command == "/save":
            self._save(rest)
        elif command == "/help":
            self._console.print(f"{_list_commands()}\n{_HOW_TO_ENTER}")
        else:
            self._console.print(f"error: there is no command {command}; /help lists them")
        return True

    def _show_cache(self, before: EngineStatistics) -> None:
        """Show what the cache has done since, or why there is none."""
        now = self._engine.statistics
        if now.cache is not None and before.cache is not None:
            self._console.print(layer_table("this answer", now, before))
        self._console.print(now.cache_line)

    def _answer(self, text: str) -> None:
        """Stream one answer. One that is stopped counts as far as it came; a message without any does not count."""
        messages, answer = [*self.messages, {"role": "user", "content": text}], ""
        after_prompt = None
        try:
            with closing(self._engine.generate(messages, stream=True, progress=self._bars.prompt)) as chunks:
                for chunk in chunks:
                    if after_prompt is None and self._show_layers:
                        after_prompt = self._engine.statistics
                    answer += chunk.text
                    write(chunk.text)
                    if chunk.completion is not None:
                        write("\n")
                        if not self._quiet:
                            is_virtual = self._engine.statistics.has_virtual_clock
                            self._console.print(describe(chunk.completion, is_virtual=is_virtual))
        except KeyboardInterrupt:
            self._bars.close()
            write("\n")
            if not answer:
                return
        except EngineError as error:
            self._bars.close()
            self._console.print(f"error: {error}; /reset begins anew")
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if after_prompt is not None:
            self._show_cache(after_prompt)

    def _save(self, name: str) -> None:
        if not name:
            self._console.print("error: /save needs the name of a file")
            return
        try:
            if Path(name).is_file():
                load_conversation(Path(name))  # anything else that is there is not for us to replace
            with whole_file(Path(name)) as file:
                file.write(json.dumps(self.messages, indent=1, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            self._console.print(f"error: {name}: cannot be written: {error.strerror or error}")
            return
        except RequestError as error:
            self._console.print(f"error: {error}; give another name")
            return
        self._console.print(f"saved {len(self.messages)} messages to {name}")


def load_conversation(path: Path) -> Messages:
    """Read what /save wrote; raise `RequestError` if a file is something else."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        messages = None
    is_list = isinstance(messages, list)
    if not is_list or not all(isinstance(m, dict) and m.keys() == {"role", "content"} for m in messages):
        raise RequestError(f"{path}: is not a conversation that /save wrote")
    found: Messages = messages
    return found


def statistics_text(statistics: EngineStatistics) -> str:
    """Return what an engine has done, for people."""
    s = statistics
    kept = f", {s.snapshot_bytes / 2**20:,.1f} of them to go back to" if s.snapshot_bytes else ""
    return (
        f"{s.n_requests} answers; prompts {s.n_prompt_tokens} tokens, {s.prompt_tok_s:,.1f} tok/s "
        f"({s.n_reused_tokens} more reused); answers {s.n_decode_tokens} tokens, {s.decode_tok_s:,.1f} tok/s\n"
        f"{s.device}; {s.ram_bytes / 2**20:,.1f} MiB of weights, states and scratch"
        f"{kept}; {s.cache_line}"
    )


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
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


@contextlib.contextmanager
def _history() -> Iterator[None]:
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


def _opening(system: str) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def _list_commands() -> str:
    return "\n".join(f"  {name:<14} {meaning}" for name, meaning in COMMANDS.items())
