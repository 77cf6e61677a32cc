"""`python -m engine`: run, chat, bench and the small tools around them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.bench import command as bench
from engine.bench import info, plan
from engine.cli import batch, chat, run, tools
from engine.cli.command import program_version
from engine.cli.command import run as run_command
from engine.cli.options import Parser

_EPILOG = """\
examples:
  python -m engine run -p "def main():"                  continue a text with the bundled tiny model
  python -m engine run model.gguf -p - < prompt.txt      read the prompt from standard input
  python -m engine chat model.gguf -c 8192               talk to a model
  python -m engine batch job.toml                        answer every prompt of some files
  python -m engine bench -m model.gguf                   measure tokens a second
  python -m engine plan -m model.gguf --machine 4090     predict them for a machine
  python -m engine config > my.toml                      every setting, with comments
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each command leaves its function in `execute`."""
    parser = Parser(
        prog="python -m engine",
        description="Run mixture-of-experts models from GGUF files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hot-experts {program_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (run, chat, batch, bench, plan, info, tools):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run_command(make_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
