"""Tokenizer metadata for tests: a dict with the typed getters of a GGUF file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import GGUFError
from engine.tokenizer.merging import byte_of_character


class MetadataDict(dict):
    """Metadata by key; getters raise `GGUFError` for a missing key or a wrong type, as the real ones do."""

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        if key not in self:
            if default is None:
                raise GGUFError(f"{key} is missing")
            return default
        value = self[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise GGUFError(f"{key} has the wrong type")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        return self._get(key, int, default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._get(key, bool, default)

    def _array(self, key: str, kind: type | tuple[type, ...]) -> list:
        values = self._get(key, list)
        if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
            raise GGUFError(f"{key} has the wrong type")
        return values

    def texts(self, key: str) -> list[str]:
        return self._array(key, str)

    def integers(self, key: str) -> list[int]:
        return self._array(key, int)

    def numbers(self, key: str) -> list[float]:
        return self._array(key, (int, float))


TINY_FOLDER = Path(__file__).resolve().parent / "data" / "tokenizers"
TINY = {path.stem: path for path in sorted(TINY_FOLDER.glob("tiny-*.json"))}


def load_tiny(name: str) -> dict[str, Any]:
    """Return the golden file `name`: metadata, cases and chats, recorded from llama.cpp."""
    return _load(TINY[name])


def load_made(name: str) -> dict[str, Any]:
    """Return what `make_tokenizer_fixture.py` makes: metadata and cases, recorded from llama.cpp."""
    return _load(TINY_FOLDER / f"{name}.json")


def _load(path: Path) -> dict[str, Any]:
    golden = json.loads(path.read_text(encoding="utf-8"))
    golden["metadata"] = MetadataDict(golden["metadata"])
    return golden


def small(**changes) -> MetadataDict:
    """Return a byte-level vocabulary of all bytes, "ab", and special tokens that overlap; `changes` without prefix."""
    characters = sorted(byte_of_character(), key=byte_of_character().get)
    special = {"<ab": 4, "ab>c": 4, "<x>": 3, "<x><y>": 3, "[PAD1]": 5, "[PAD2]": 5}
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*characters, "ab", *special],
        "token_type": [*[1] * 257, *special.values()],
        "merges": ["a b"],
        "eos_token_id": 259,
    }
    return MetadataDict({f"tokenizer.ggml.{k}": v for k, v in (metadata | changes).items() if v is not None})
