"""Tables of settings as frozen dataclasses, and the strict parser for them.

Every value is checked where it enters, so that an error names the file (or variable, or option), the key, what was
found and what was expected.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from engine.errors import ConfigError, EngineError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def setting(default: T, *, low: float | None = None, high: float | None = None, env: str = "") -> T:
    """Declare a field: default, range of a number (both ends included), environment variable that sets it."""
    made: T = field(default=default, metadata={"low": low, "high": high, "env": env})
    return made


class Table:
    """Base of the dataclasses below: checks every field when an object is made."""

    table: ClassVar[str]
    error: ClassVar[type[EngineError]] = ConfigError  # what a bad value raises

    def __post_init__(self) -> None:
        for name, spec in table_fields(type(self)).items():
            found = getattr(self, name)
            if isinstance(found, list):
                found = tuple(found)
                object.__setattr__(self, name, found)  # it is frozen, for everybody else
            if not spec.accepts(found):
                raise self.error(f"{self.table}.{name} is {found!r}; expected {spec.expected}")
        self.check()

    def check(self) -> None:
        """Raise `error` for values that do not fit together."""


Tables = Mapping[str, type[Table]]


# -- what a field may hold -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One key of a table: its type, range, default, environment variable and meaning."""

    key: str
    kind: Any
    default: object
    low: float | None
    high: float | None
    env: str
    doc: str

    def accepts(self, value: object) -> bool:
        """Return whether a value has the field's type and is in its range."""
        return self._fits(self.kind, value)

    def _fits(self, kind: Any, value: object) -> bool:
        origin = typing.get_origin(kind)
        if origin is Literal:
            return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
        if origin in {typing.Union, types.UnionType}:
            return any(self._fits(option, value) for option in typing.get_args(kind))
        if origin is tuple:
            return isinstance(value, tuple) and all(self._fits(typing.get_args(kind)[0], item) for item in value)
        if kind is float:
            is_number = type(value) is int or (type(value) is float and math.isfinite(value))
            return is_number and self._in_range(value)  # type: ignore[arg-type]
        if kind is int:
            return type(value) is int and self._in_range(value)  # a bool is no number here
        return type(value) is kind

    def _in_range(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def expected(self) -> str:
        """Return, for an error message, what the field may hold."""
        return self._describe(self.kind)

    def _describe(self, kind: Any) -> str:
        origin = typing.get_origin(kind)
        if origin is Literal:
            choices = [json.dumps(choice) for choice in typing.get_args(kind)]
            return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        if origin in {typing.Union, types.UnionType}:
            return " or ".join(self._describe(option) for option in typing.get_args(kind))
        if origin is tuple:
            return f"a list, each item {self._describe(typing.get_args(kind)[0])}"
        if kind in {int, float}:
            name = "an integer" if kind is int else "a number"
            return name if self.low is None else f"{name} from {self.low:g} to {_plain(self.high)}"
        return {str: "a string", bool: "true or false"}[kind]


_fields_of: dict[type[Table], dict[str, FieldSpec]] = {}


def table_fields(table: type[Table]) -> dict[str, FieldSpec]:
    """Return the fields of a table by key, in order."""
    if table not in _fields_of:
        hints, docs = typing.get_type_hints(table), _documented(table)
        _fields_of[table] = {
            f.name: FieldSpec(
                f.name,
                hints[f.name],
                f.default,
                f.metadata.get("low"),
                f.metadata.get("high"),
                f.metadata.get("env", ""),
                docs.get(f.name, ""),
            )
            for f in fields(table)  # type: ignore[arg-type]
        }
    return _fields_of[table]


def summary(table: type[Table]) -> str:
    """Return the first line of a table's docstring."""
    return (inspect.getdoc(table) or "").partition("\n")[0]


def _documented(table: type[Table]) -> dict[str, str]:
    """Take the "Attributes:" section of a docstring apart: text by field name."""
    docs: dict[str, str] = {}
    key = ""
    for line in (inspect.getdoc(table) or "").partition("Attributes:\n")[2].splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            key = start[1]
            docs[key] = start[2]
        elif line.strip():
            docs[key] += " " + line.strip()
    return docs


def parse_bytes(text: str, key: str) -> int:
    """Read a size such as "22.2GB" or "24 GiB" (powers of 1000 and of 1024); raise `ConfigError` naming `key`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE)
    size = float(match[1]) * _BYTE_UNITS[match[2].upper()] if match else 0.0
    if not 1 <= size < math.inf:
        raise ConfigError(f'{key} is {text!r}; expected a size above 0 such as "22.2GB" or "800 MiB"')
    return int(size)


# -- taking values in ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that is set somewhere; `origin` says where, for error messages. Text is still to be read as a type."""

    value: object
    origin: str
    is_text: bool = False
    is_override: bool = False


_GivenTables = dict[str, dict[str, _Given]]


def read_tables(
    tables: Tables, path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]
) -> dict[str, Table]:
    """Make the tables from a TOML file, the environment and overrides, the later one winning.

    Args:
        tables: the dataclasses by table name.
        path: of the file; None for none.
        environ: environment variables.
        overrides: values by "table.key"; a string is read as the field's type.

    Raises:
        ConfigError: naming where the value stands, the key, what was found and what was expected.
    """
    given: _GivenTables = {name: {} for name in tables}
    if path is not None:
        _take_file(tables, given, path)
    _take_environment(tables, given, environ)
    for key, value in overrides.items():
        _take_override(tables, given, key, value)
    return {name: _make_table(table, given[name]) for name, table in tables.items()}


def _take_file(tables: Tables, given: _GivenTables, path: Path) -> None:
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); expected a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        n_lines = max(1, len(text.splitlines()))
        problem = str(error).replace("at end of document", f"at line {n_lines}, the end of the file")
        raise ConfigError(f"{path}: is not valid TOML: {problem}") from None
    except (ValueError, RecursionError) as error:  # digits, or brackets, without an end
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    for name, table in document.items():
        place = _place(path, text, name)
        if name not in tables:
            kind = f"table [{name}]" if isinstance(table, dict) else f"key {name} outside of a table"
            raise ConfigError(f"{place}: unknown {kind}; {_known(name, tables, 'tables')}")
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {name} is {table!r}; expected a table, [{name}]")
        for key, value in table.items():
            place = _place(path, text, name, key)
            _check_key(tables, name, key, place)
            given[name][key] = _Given(tuple(value) if isinstance(value, list) else value, place)


def _place(path: Path, text: str, name: str, key: str = "") -> str:
    """Return file and line of a table, or of a key in it, for messages; the file alone if it is written unusually."""
    is_inside = False
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*(.+?)\s*\]", line)
        if header:
            is_inside = header[1] == name
        if not key and (is_inside or re.match(rf"\s*{re.escape(name)}\s*[.=]", line)):
            return f"{path}, line {number}"
        wanted = re.escape(key) if is_inside else rf"{re.escape(name)}\s*\.\s*{re.escape(key)}"
        if key and re.match(rf"\s*{wanted}\s*=", line):
            return f"{path}, line {number}"
    return str(path)


def _take_environment(tables: Tables, given: _GivenTables, environ: Mapping[str, str]) -> None:
    for name, table in tables.items():
        for key, spec in table_fields(table).items():
            if spec.env and spec.env in environ:
                given[name][key] = _Given(environ[spec.env], f"environment variable {spec.env}", is_text=True)


def _take_override(tables: Tables, given: _GivenTables, key: str, value: object) -> None:
    name, _, short = key.partition(".")
    origin = f"setting {key}"
    if name in tables and not short:
        raise ConfigError(
            f'{origin}: is a table; expected "{name}.key"; the keys are {", ".join(table_fields(tables[name]))}'
        )
    if name not in tables:
        raise ConfigError(f'{origin}: unknown; expected "table.key"; {_known(name, tables, "tables")}')
    _check_key(tables, name, short, origin)
    value = tuple(value) if isinstance(value, list) else value
    given[name][short] = _Given(value, origin, is_text=isinstance(value, str), is_override=True)


def _check_key(tables: Tables, name: str, key: str, origin: str) -> None:
    known = table_fields(tables[name])
    if key in known:
        return
    elsewhere = [other for other, table in tables.items() if key in table_fields(table)]
    hint = f"it belongs in [{elsewhere[0]}]" if elsewhere else _known(key, known, "keys")
    raise ConfigError(f"{origin}: unknown key {name}.{key}; {hint}")


def _known(found: str, names: Iterable[str], what: str) -> str:
    close = difflib.get_close_matches(found, list(names), 1)
    return f"did you mean {close[0]}?" if close else f"the {what} are {', '.join(names)}"


def _make_table(table: type[Table], given: dict[str, _Given]) -> Table:
    values: dict[str, object] = {}
    for key, spec in table_fields(table).items():
        if key in given:
            values[key] = _read(table.table, spec, given[key])
    try:
        return table(**values)
    except EngineError as error:  # values that are each right, but not together
        origins = dict.fromkeys(g.origin.partition(", line ")[0] for g in given.values() if not g.is_override)
        raise ConfigError(": ".join(filter(None, (", ".join(origins), str(error))))) from None


def _read(table: str, spec: FieldSpec, given: _Given) -> object:
    candidates: list[object] = [given.value]
    if given.is_text:
        candidates = [*_as_toml(str(given.value)), given.value]
    for value in candidates:
        if spec.accepts(value):
            return float(value) if spec.kind is float else value  # type: ignore[arg-type]
    shown = list(given.value) if isinstance(given.value, tuple) else given.value
    name = f"{table}.{spec.key}"
    place = "" if given.is_override else f"{given.origin}: "  # whose origin is the name
    raise ConfigError(f"{place}{name} is {shown!r}; expected {spec.expected}")


def read_assignment(text: str, key: str) -> tuple[str, object]:
    """Return name and value of "name=value"; a value that is not TOML is text. Raises `ConfigError` naming `key`."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier():
        raise ConfigError(f'{key} has {text!r}; expected NAME=VALUE such as "enable_thinking=false"')
    return name, next(iter(_as_toml(value)), value) if value else ""


def _as_toml(text: str) -> list[object]:
    """Return the value that a text is in TOML, as a list of one; empty if it is none. "1, 2" is a list too."""
    found: list[object] = []
    for candidate in (text, f"[{text}]"):
        try:
            document = tomllib.loads(f"value = {candidate}")
        except (ValueError, RecursionError):  # no TOML, or digits or brackets without an end
            continue
        if list(document) == ["value"]:
            value = document["value"]
            found.append(tuple(value) if isinstance(value, list) else value)
    return found


# -- writing ---------------------------------------------------------------------------------------------------------


def to_toml(value: object) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(to_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in TOML and JSON


def _plain(value: float | None) -> str:
    return f"{int(value)}" if value is not None and value == int(value) else f"{value:g}"
