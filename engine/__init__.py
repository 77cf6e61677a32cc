"""Runs mixture-of-experts models from GGUF files, hot experts in VRAM and cold ones on the CPU.

>>> from engine import Engine, SamplingParams
>>> with Engine.open() as engine:  # the bundled model; Engine.open("model.gguf") for another
...     for chunk in engine.generate("def __init__(self", SamplingParams(temperature=0, max_tokens=6), stream=True):
...         print(chunk.text, end="|")
,| *|args|,| **|kwargs||
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from engine.config import EngineConfig, SamplingParams
    from engine.errors import EngineError
    from engine.generate.answer import Chunk, Completion
    from engine.runtime import Engine, EngineStatistics, Session

__all__ = [
    "AsyncEngine",
    "Chunk",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStatistics",
    "SamplingParams",
    "Session",
]

_HOMES = {
    "AsyncEngine": "engine.async_engine",
    "Chunk": "engine.generate.answer",
    "Completion": "engine.generate.answer",
    "Engine": "engine.runtime",
    "EngineConfig": "engine.config",
    "EngineError": "engine.errors",
    "EngineStatistics": "engine.runtime",
    "SamplingParams": "engine.config",
    "Session": "engine.runtime",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: parts of the package work without the others."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
