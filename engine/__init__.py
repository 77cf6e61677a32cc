"""Runs mixture-of-experts models from GGUF files, hot experts in VRAM and cold ones on the CPU.

from engine import Engine, SamplingParams

with Engine.open("model.gguf") as engine:
    for chunk in engine.generate("Once upon a time", SamplingParams(max_tokens=50), stream=True):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import EngineConfig, SamplingParams
    from engine.errors import EngineError
    from engine.generate.answer import Chunk, Completion
    from engine.runtime import Engine, EngineStatistics

__all__ = ["Chunk", "Completion", "Engine", "EngineConfig", "EngineError", "EngineStatistics", "SamplingParams"]

_HOMES = {
    "Chunk": "engine.generate.answer",
    "Completion": "engine.generate.answer",
    "Engine": "engine.runtime",
    "EngineConfig": "engine.config",
    "EngineError": "engine.errors",
    "EngineStatistics": "engine.runtime",
    "SamplingParams": "engine.config",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: parts of the package work without the others."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
