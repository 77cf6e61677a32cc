"""`chat`: talk to a model. Ctrl-C stops an answer, Ctrl-D ends the talk."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path

from rich.console import Console

from engine.cli.entries import HOW_TO_ENTER, entries, kept_history
from engine.cli.layers import layer_table
from engine.cli.options import add_answering, read_settings
from engine.cli.summaries import describe, statistics_text
from engine.cli.terminal import Bars, write
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

Messages = list[dict[str, str]]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. " + HOW_TO_ENTER,
        epilog="commands in a chat:\n" + _list_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="GGUF file with a chat template")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument("--stats", action="store_true", help="after each answer, show hits and times of every layer")
    add_answering(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    config = read_settings(args)
    messages = load_conversation(args.resume) if args.resume else _opening(args.system)
    with Bars(console, quiet=args.quiet) as bars, Engine.open(config=config, progress=bars.loading) as engine:
        _check(engine, messages)  # a model that cannot chat says so now
        if not args.quiet:
            console.print(_HELP)
        chat = Chat(engine, messages, console, bars, quiet=args.quiet, show_layers=args.stats)
        with kept_history():
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
            self._begin_anew(rest)
        elif command == "/stats":
            self._console.print(statistics_text(self._engine.statistics))
        elif command == "/save":
            self._save(rest)
        elif command == "/help":
            self._console.print(f"{_list_commands()}\n{HOW_TO_ENTER}")
        else:
            self._console.print(f"error: there is no command {command}; /help lists them")
        return True

    def _begin_anew(self, system: str) -> None:
        """Take another system message, unless it is no text, or none that the model's template takes."""
        messages = _opening(system)
        try:
            _check(self._engine, messages)
        except EngineError as error:
            self._console.print(f"error: {error}; the conversation goes on as it was")
            return
        self.messages = messages

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
                file.write(
                    json.dumps(self.messages, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
                )
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
    except (ValueError, RecursionError):
        messages = None
    is_list = isinstance(messages, list)
    if not is_list or not all(isinstance(m, dict) and m.keys() == {"role", "content"} for m in messages):
        raise RequestError(f"{path}: is not a conversation that /save wrote")
    found: Messages = messages
    return found


def _check(engine: Engine, messages: Messages) -> None:
    """Raise `EngineError` if nothing that is said after these messages can be answered."""
    engine.prompt_ids([*messages, {"role": "user", "content": "?"}])


def _opening(system: str) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def _list_commands() -> str:
    return "\n".join(f"  {name:<14} {meaning}" for name, meaning in COMMANDS.items())
