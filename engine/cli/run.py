"""`run`: continue one prompt, the text appearing as it is made."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from engine.cli.options import add_answering, read_settings
from engine.cli.summaries import describe
from engine.cli.terminal import Bars, write
from engine.errors import RequestError
from engine.runtime import Engine, Prompt


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="continue a prompt",
        description="Continue a prompt; the text goes to standard output, everything else to standard error.",
    )
    parser.add_argument("model", nargs="?", help="GGUF file or synthetic:NAME (default: the bundled tiny model)")
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the prompt; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    parser.add_argument("--special", action="store_true", help="read control tokens spelled out in the prompt as such")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    add_answering(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    config = read_settings(args)
    text = _read_standard_input() if args.prompt == "-" else args.prompt
    with Bars(console, quiet=args.quiet) as bars, Engine.open(config=config, progress=bars.loading) as engine:
        prompt: Prompt = [{"role": "user", "content": text}] if args.chat else text
        if args.special and not args.chat:
            prompt = engine.tokenize(text, add_special=True, parse_special=True)
        if args.echo:
            write(text)
        for chunk in engine.generate(prompt, stream=True, progress=bars.prompt):
            write(chunk.text)
            if chunk.completion is not None:
                write("\n")
                if not args.quiet:
                    console.print(describe(chunk.completion, is_virtual=engine.statistics.has_virtual_clock))
                    if engine.statistics.cache is not None:
                        console.print(engine.statistics.cache_line)
    return 0


def _read_standard_input() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # bytes that are no text come as lone surrogates in some locales
    except UnicodeError:
        raise RequestError(
            f"standard input is not {sys.stdin.encoding} text; convert it, with iconv for example"
        ) from None
    if not text:
        raise RequestError("standard input is empty; give a prompt")
    return text
