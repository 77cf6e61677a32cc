"""Builds the API reference with pdoc: `make docs`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pdoc

import engine

MODULES = (
    "engine",
    "engine.config",
    "engine.errors",
    "engine.batch",
    "engine.generate.answer",
    "engine.runtime.answering",  # what Engine and Session inherit
    "engine.model_spec",
    "engine.devices.graph",
    "engine.devices.program",
    "engine.devices.timing",  # of statistics: where time and bytes went
    "engine.experts.hot_cache",  # of statistics: what the cache did
    "engine.experts.policy",
    "engine.experts.profile",
    "engine.experts.trace",
    "engine.gguf",
)


def main(folder: str) -> None:
    """Write the pages into a folder."""
    for name in engine.__all__:  # they are imported when first used, and a reference must find them in place
        setattr(engine, name, getattr(engine, name))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*MODULES, output_directory=Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where the pages go")
    main(parser.parse_args().folder)
