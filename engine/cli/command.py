"""Runs a command: every error becomes one line and an exit code.

Exit codes: 0 done; 1 the model, the machine or the request is at fault; 2 the command line or the settings are;
3 a batch is done, but some of its items failed; 130 stopped by Ctrl-C; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from engine import _kernels
from engine.cli.terminal import error_console, start_logging, stop_logging
from engine.errors import ConfigError, EngineError

EXIT_ERROR, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 3, 130, 141


def program_version() -> str:
    """Return the version of this program as it was installed."""
    try:
        return metadata.version("hot-experts")
    except metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse a command line and call the function that its command left in `execute`; return the exit code."""
    args = parser.parse_args(argv)
    if sys.stdin is None:  # closed by whoever started this
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the terminal's encoding lacks is spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    _kernels.explain_bus_errors(EXIT_ERROR)  # no exception: somebody cuts the mapped file short
    console = error_console()
    handler = start_logging(console, quiet=args.quiet, debug=args.debug)
    try:
        code: int = args.execute(args, console)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return EXIT_PIPE
    except (EngineError, OSError, MemoryError) as error:
        if args.debug:
            raise
        console.print(f"error: {_explained(error)}")
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR
    finally:
        stop_logging(handler)
    return code


def _drop_output() -> None:
    """Send what is still to be written nowhere: the interpreter flushes once more at its end, which must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: EngineError | OSError | MemoryError) -> str:
    """Return what happened, also where the system, and not the engine, says so."""
    if isinstance(error, OSError):
        place = "the output cannot be written" if error.filename is None else f"{error.filename}"
        return f"{place}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return "the system gave no more memory; close other programs, or lower [engine] context_length or n_sequences"
    return str(error)
