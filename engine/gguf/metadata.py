"""Key-value metadata of a model file, behind getters that check the type."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import GGUFError

_LENGTH = struct.Struct("<Q")


class TextArray:
    """An array of strings that stays in the mapped file until somebody wants it (a vocabulary has 250,000).

    The reader has checked that all lengths lie inside the file.
    """

    def __init__(self, blob: memoryview, n_items: int) -> None:
        """Keep `blob`: the strings one after another, each behind its length."""
        self._blob = blob
        self._n_items = n_items

    def __len__(self) -> int:
        return self._n_items

    def decode(self) -> list[str]:
        """Return the strings; raises `UnicodeDecodeError` for one that is not UTF-8."""
        blob, unpack = bytes(self._blob), _LENGTH.unpack_from
        items, position = [], 0
        for _ in range(self._n_items):
            start = position + 8
            position = start + unpack(blob, position)[0]
            items.append(blob[start:position].decode())
        return items


Value = bool | int | float | str | TextArray | list[str] | npt.NDArray[Any]


class Metadata:
    """The metadata of one file. Every getter raises `GGUFError` for a key that is missing or has another type."""

    def __init__(self, file_name: str, values: Mapping[str, Value]) -> None:
        self._file_name = file_name
        self._values = dict(values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value(self, key: str) -> Value:
        """Return a value as it is stored: a scalar, a numpy array of numbers or booleans, or strings."""
        if key not in self._values:
            raise self._missing(key)
        return self._values[key]

    def is_array(self, key: str) -> bool:
        """Return whether the value is an array."""
        return isinstance(self.value(key), (TextArray, list, np.ndarray))

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; booleans and numbers stored as floats are not taken for one."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return an integer or a float, as a float (which may be infinite or not a number)."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "a boolean")
        return value

    def texts(self, key: str) -> list[str]:
        """Return an array of strings, decoded afresh at every call."""
        value = self.value(key)
        if isinstance(value, list):
            return list(value)
        if not isinstance(value, TextArray):
            raise self._wrong(key, "an array of strings")
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise GGUFError(f"{self._file_name}: key {key} holds a string that is not UTF-8 ({error})") from None

    def integers(self, key: str) -> list[int]:
        """Return an array of integers."""
        value = self.value(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self._wrong(key, "an array of integers")
        return list(map(int, value))

    def numbers(self, key: str) -> list[float]:
        """Return an array of integers or floats, as floats."""
        value = self.value(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            raise self._wrong(key, "an array of numbers")
        return list(map(float, value))

    def flags(self, key: str) -> list[bool]:
        """Return an array of booleans, which some converters write as integers."""
        value = self.value(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biu" or not np.isin(value, (0, 1)).all():
            raise self._wrong(key, "an array of booleans, or of 0 and 1")
        return list(map(bool, value))

    def _get(self, key: str, default: Value | None) -> Value:
        value = self._values.get(key, default)
        if value is None:
            raise self._missing(key)
        return value

    def _missing(self, key: str) -> GGUFError:
        return GGUFError(f"{self._file_name}: key {key} is missing")

    def _wrong(self, key: str, expected: str) -> GGUFError:
        return GGUFError(f"{self._file_name}: key {key} is {describe(self._values[key])}; expected {expected}")


def describe(value: Value) -> str:
    """Return a short text that shows a value and its type to a person."""
    if isinstance(value, str):
        return f"the string {value!r}" if len(value) <= 80 else f"a string of {len(value)} characters"
    if isinstance(value, (TextArray, list)):
        return f"an array of {len(value)} strings"
    if isinstance(value, np.ndarray):
        kind = {"b": "booleans", "f": "floats"}.get(value.dtype.kind, "integers")
        return f"an array of {len(value)} {kind}"
    return f"the {type(value).__name__} {value}"
