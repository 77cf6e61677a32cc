"""Engines on the CPU for tests of answers that are made together."""

from __future__ import annotations

from pathlib import Path

from engine.config import EngineConfig, EngineSettings, ModelSettings
from engine.runtime import Engine

PROMPTS = ["def main():", "# Installing\n\nTo install the package", "import os\n", "x = [1, 2, 3]\nfor y in x:\n", "a"]


def open_engine(path: Path | None, n_sequences: int = 3, **settings) -> Engine:
    settings = {"n_threads": 2, "context_length": 128, "max_batch_tokens": 32, **settings}
    return Engine.open(path, EngineConfig(ModelSettings(), EngineSettings(n_sequences=n_sequences, **settings)))
