"""Files that belong to the package: a tiny trained model, so that everything can be tried at once."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def tiny_model_path() -> Path:
    """Return the path of the bundled model: 27 M parameters, trained on documentation and source code."""
    return Path(str(files(__name__) / "tiny-moe-Q4_K_M.gguf"))
