"""`python -m engine.bench`: the same as `python -m engine bench`."""

from __future__ import annotations

from collections.abc import Sequence

from engine.bench import command
from engine.cli.command import run
from engine.cli.options import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    parser = Parser(prog="python -m engine.bench", description=command.DESCRIPTION)
    command.add_arguments(parser)
    return run(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
