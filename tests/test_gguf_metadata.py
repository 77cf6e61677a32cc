"""Typed access to metadata."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import GGUFError
from engine.gguf.metadata import Metadata, TextArray

VALUES = {
    "text": "abc",
    "int": 7,
    "float": 0.5,
    "flag": True,
    "texts": ["a", "b"],
    "ints": np.array([1, 2], np.uint8),
    "floats": np.array([0.5, 2], np.float32),
    "flags": np.array([True, False]),
}
# getter -> what it returns for the keys that it accepts
ACCEPTED = {
    "text": {"text": "abc"},
    "integer": {"int": 7},
    "number": {"int": 7.0, "float": 0.5},
    "flag": {"flag": True},
    "texts": {"texts": ["a", "b"]},
    "integers": {"ints": [1, 2]},
    "numbers": {"ints": [1.0, 2.0], "floats": [0.5, 2.0]},
    "flags": {"flags": [True, False]},
}


@pytest.mark.parametrize("getter", ACCEPTED)
def test_getters_accept_their_type_and_no_other(getter: str) -> None:
    get = getattr(Metadata("m.gguf", VALUES), getter)
    for key in VALUES:
        if key in ACCEPTED[getter]:
            found, expected = get(key), ACCEPTED[getter][key]
            assert found == expected
            assert type(found) is type(expected)
            if isinstance(expected, list):
                assert [type(x) for x in found] == [type(x) for x in expected]
        else:
            with pytest.raises(GGUFError, match=rf"m\.gguf: key {key} is .*; expected a"):
                get(key)
    with pytest.raises(GGUFError, match=r"m\.gguf: key absent is missing"):
        get("absent")


def test_flags_may_be_written_as_integers() -> None:
    metadata = Metadata("m.gguf", {"flags": np.array([1, 0, 1], np.int32)})
    assert metadata.flags("flags") == [True, False, True]


def test_defaults_are_for_missing_keys_only() -> None:
    metadata = Metadata("m.gguf", VALUES)
    assert metadata.text("absent", "") == ""
    assert metadata.integer("absent", 0) == 0
    assert metadata.number("absent", 1.5) == 1.5
    assert metadata.flag("absent", False) is False
    with pytest.raises(GGUFError, match="key text is the string 'abc'; expected an integer"):
        metadata.integer("text", 3)


def test_is_a_collection_of_keys() -> None:
    metadata = Metadata("m.gguf", VALUES)
    assert list(metadata) == list(VALUES)
    assert len(metadata) == len(VALUES)
    assert "int" in metadata
    assert "absent" not in metadata
    assert [key for key in metadata if metadata.is_array(key)] == ["texts", "ints", "floats", "flags"]


def test_text_that_is_not_utf8_is_an_error_only_when_it_is_read() -> None:
    broken = TextArray(memoryview(b"\1" + bytes(7) + b"\xff"), 1)
    metadata = Metadata("m.gguf", {"tokens": broken})
    assert len(broken) == 1
    with pytest.raises(GGUFError, match=r"m\.gguf: key tokens holds a string that is not UTF-8"):
        metadata.texts("tokens")


def test_long_values_are_not_shown_whole() -> None:
    metadata = Metadata("m.gguf", {"template": "x" * 10_000})
    with pytest.raises(GGUFError, match="key template is a string of 10000 characters; expected an integer"):
        metadata.integer("template")
