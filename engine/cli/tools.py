"""Small commands around models: `synth`, `config` and `completion`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from engine.cli.completion import SHELLS, completion_script
from engine.cli.options import ENGINE_OPTIONS, add_common, add_output, add_settings, read_settings
from engine.cli.terminal import Bars
from engine.errors import RequestError
from engine.gguf import write_gguf
from engine.synthetic import open_model_file


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser."""
    parser = commands.add_parser(
        "synth",
        help="write a model of a published geometry with random weights",
        description="Write a model of a published geometry with random weights as a GGUF file, to measure speed with.",
    )
    parser.add_argument("name", metavar="NAME", help="for example qwen3-30b-a3b@q4_k_m:layers=4")
    parser.add_argument("out", type=Path, metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    add_output(parser)
    parser.set_defaults(execute=synth)

    parser = commands.add_parser(
        "config",
        help="print the settings in use as a TOML file",
        description="Print every setting with its meaning and its value: default, file, environment, options.",
    )
    add_settings(parser, ENGINE_OPTIONS)
    add_common(parser)
    parser.set_defaults(execute=config)

    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description="Print a script that completes commands and options of `hot-experts`. For bash: "
        'eval "$(hot-experts completion bash)" in ~/.bashrc; for zsh the same with zsh in ~/.zshrc; for fish: '
        "hot-experts completion fish | source in ~/.config/fish/config.fish.",
    )
    parser.add_argument("shell", choices=SHELLS)
    add_output(parser)
    parser.set_defaults(execute=lambda args, _: completion(args, commands))


def synth(args: argparse.Namespace, console: Console) -> int:
    """Write a synthetic model."""
    if args.out.exists() and not args.force:
        raise RequestError(f"{args.out} exists; give another name, or --force to replace it")
    model_file = open_model_file(f"synthetic:{args.name.removeprefix('synthetic:')}")
    try:
        with Bars(console, quiet=args.quiet) as bars:
            write_gguf(model_file, args.out, progress=lambda done, total: bars.loading("writing", done, total))
    finally:
        model_file.close()
    if not args.quiet:
        console.print(f"wrote {args.out}, {args.out.stat().st_size:,} bytes")
    return 0


def config(args: argparse.Namespace, _: Console) -> int:
    """Print the settings."""
    sys.stdout.write(read_settings(args).to_toml())
    return 0


def completion(args: argparse.Namespace, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> int:
    """Print the script."""
    sys.stdout.write(completion_script(commands.choices, args.shell))
    return 0
