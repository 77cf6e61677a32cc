"""`chat`: talk to a model. Ctrl-C stops an answer, Ctrl-D ends the talk."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing

from rich.console import Console

from engine.cli.layers import layer_table
from engine.cli.options import ENGINE_OPTIONS, SAMPLING_OPTIONS, add_common, add_settings, read_settings, stop_texts
from engine.cli.run import describe, write
from engine.cli.terminal import Bars
from engine.errors import RequestError
from engine.runtime import Engine, EngineStatistics

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("chat", help="talk to a model", description=f"Talk to a model. {_HELP}.")
    parser.add_argument("model", help="GGUF file with a chat template")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text (repeatable)")
    parser.add_argument("--stats", action="store_true", help="after each answer, show hits and times of every layer")
    add_settings(parser, SAMPLING_OPTIONS | ENGINE_OPTIONS)
    add_common(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    config = read_settings(args, stop_texts(args.stop))
    start = [{"role": "system", "content": args.system}] if args.system else []
    with Bars(console, quiet=args.quiet) as bars, Engine.open(config=config, progress=bars.loading) as engine:
        engine.prompt_ids([*start, {"role": "user", "content": "?"}])  # a model that cannot chat says so now
        if not args.quiet:
            console.print(_HELP)
        messages = list(start)
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": line})
            before = engine.statistics
            answer = _answer(engine, messages, console, bars, quiet=args.quiet)
            if args.stats:
                _show_cache(engine, before, console)
            messages.append({"role": "assistant", "content": answer})
    return 0


def _show_cache(engine: Engine, before: EngineStatistics, console: Console) -> None:
    """Show what the cache did since a look, or why there is none."""
    now = engine.statistics
    if now.cache is not None and before.cache is not None:
        console.print(layer_table("this answer", now, before))
    console.print(now.cache_line)


def _answer(engine: Engine, messages: list[dict[str, str]], console: Console, bars: Bars, *, quiet: bool) -> str:
    """Stream one answer and return it; one that is stopped or does not fit counts as far as it came."""
    text = ""
    try:
        with closing(engine.generate(messages, stream=True, progress=bars.prompt)) as chunks:
            for chunk in chunks:
                text += chunk.text
                write(chunk.text)
                if chunk.completion is not None and not quiet:
                    write("\n")
                    console.print(describe(chunk.completion))
    except KeyboardInterrupt:
        bars.close()
        write("\n")
    except RequestError as error:
        console.print(f"error: {error}; /reset begins anew")
    return text


def _lines() -> Iterator[str]:
    """Yield what the user enters, without empty lines; ask for it if this is a terminal."""
    while True:
        if sys.stdin.isatty():
            write("> ")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            write("\n")
            continue
        if not line:
            return
        if line.strip():
            yield line.strip()
