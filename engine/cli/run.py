"""`run`: continue one prompt, the text appearing as it is made."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from engine.cli.options import (
    ENGINE_OPTIONS,
    SAMPLING_OPTIONS,
    add_chat_variables,
    add_common,
    add_settings,
    read_settings,
    stop_texts,
)
from engine.cli.terminal import Bars
from engine.errors import RequestError
from engine.generate.answer import Completion
from engine.runtime import Engine, Prompt

VIRTUAL = " (speeds of a virtual clock)"


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
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text (repeatable)")
    add_chat_variables(parser)
    add_settings(parser, SAMPLING_OPTIONS | ENGINE_OPTIONS)
    add_common(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    config = read_settings(args, stop_texts(args.stop))
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


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def describe(completion: Completion, *, is_virtual: bool = False) -> str:
    """Return one line about an answer: tokens, speed (of a virtual clock or not), why it ended."""
    usage, timings = completion.usage, completion.timings
    reused = f" ({usage.n_reused_tokens} reused)" if usage.n_reused_tokens else ""
    return (
        f"prompt {usage.n_prompt_tokens} tokens{reused}, {timings.prompt_tok_s:,.1f} tok/s; "
        f"answer {usage.n_generated_tokens} tokens, {timings.decode_tok_s:,.1f} tok/s; "
        f"ended by {completion.finish_reason}; seed {completion.seed}{VIRTUAL if is_virtual else ''}"
    )


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
