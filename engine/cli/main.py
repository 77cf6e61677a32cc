"""Parses the command line, runs one command, and turns every error into one line and an exit code.

Exit codes: 0 done; 1 the model, the machine or the request is at fault; 2 the command line or the settings are;
130 stopped by Ctrl-C; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from engine.cli import chat, run, tools
from engine.cli.options import Parser
from engine.cli.terminal import error_console, start_logging, stop_logging
from engine.errors import ConfigError, EngineError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141

_EPILOG = """\
examples:
  python -m engine run -p "def main():"                  continue a text with the bundled tiny model
  python -m engine run model.gguf -p - < prompt.txt      read the prompt from standard input
  python -m engine chat model.gguf -c 8192               talk to a model
  python -m engine bench -m model.gguf                   measure tokens a second
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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (run, chat, tools):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    args = make_parser().parse_args(argv)
    console = error_console()
    handler = start_logging(console, quiet=args.quiet, debug=args.debug)
    try:
        code: int = args.execute(args, console)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except EngineError as error:
        if args.debug:
            raise
        console.print(f"error: {error}")
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR
    finally:
        stop_logging(handler)
    return code
