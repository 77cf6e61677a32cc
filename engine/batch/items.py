"""Reads the items of a batch run: which files, what is in them, and the prompts that come of it."""

from __future__ import annotations

import csv
import glob
import io
import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.batch.settings import BatchSettings, template_fields
from engine.errors import ConfigError
from engine.runtime import Prompt

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt.

    Attributes:
        source: file, and line or row, that it comes from.
        fields: as read.
        prompt: text or messages.
        key: changes with whatever the answer depends on.
    """

    source: str
    fields: Mapping[str, Any]
    prompt: Prompt
    key: str


def fill_in(settings: BatchSettings, source: str, fields: Mapping[str, Any]) -> Prompt:
    """Return the prompt of an item; raise `ConfigError` for a field that is missing or no conversation."""

    def text(template: str, key: str) -> str:
        template_fields(template, key)
        pieces = []
        for literal, name, _, _ in string.Formatter().parse(template):
            pieces.append(literal)
            if name is not None:
                value = _field(fields, name, key, source)
                pieces.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return "".join(pieces)

    if settings.messages_field:
        messages = _field(fields, settings.messages_field, "batch.messages_field", source)
        is_list = isinstance(messages, list) and messages
        if not is_list or not all(isinstance(message, dict) and "role" in message for message in messages):
            raise ConfigError(
                f'{source}: field "{settings.messages_field}" is no conversation; expected a list such as '
                '[{"role": "user", "content": "Hello"}]'
            )
        conversation: list[Mapping[str, object]] = messages
        return conversation
    prompt = text(settings.prompt, "batch.prompt")
    if not settings.chat:
        return prompt
    start = [{"role": "system", "content": text(settings.system, "batch.system")}] if settings.system else []
    return [*start, {"role": "user", "content": prompt}]


def _field(fields: Mapping[str, Any], name: str, key: str, source: str) -> Any:
    if name not in fields:
        raise ConfigError(f"{source}: there is no field {name!r}, which {key} asks for; found {', '.join(fields)}")
    return fields[name]


def read_items(settings: BatchSettings, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (source, fields) of every item; path: of the job file."""
    for name in _input_files(settings, path):
        by_ending = _FORMATS.get(Path(name).suffix.lower(), "text")
        yield from _read_file(path.parent / name, name, by_ending if settings.format == "auto" else settings.format)


def _input_files(settings: BatchSettings, path: Path) -> Iterator[str]:
    """Yield the names of all input files, each file once; a pattern does not find the run's own files."""
    folder = path.parent
    own, seen = {path.resolve(), (folder / settings.output).resolve()}, set[Path]()
    for pattern in settings.input:
        for name in _matching(folder, pattern, own):
            file = (folder / name).resolve()
            if file not in seen:
                seen.add(file)
                yield name


def _matching(folder: Path, pattern: str, own: set[Path]) -> list[str]:
    """Return the file of that name, or the files that match a pattern but for the run's own, in order."""
    try:
        if (folder / pattern).is_dir():
            inside = pattern.rstrip("/") + "/*"
            raise ConfigError(f"batch.input: {pattern!r} is a folder; write {inside!r} for the files in it")
        if (folder / pattern).exists():
            if (folder / pattern).resolve() in own:
                raise ConfigError(f"batch.input: {pattern!r} is the job's own file, or its output; name another")
            return [pattern]
        found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207 - it may be absolute
        names = [name for name in found if (folder / name).is_file() and (folder / name).resolve() not in own]
    except OSError as error:
        raise ConfigError(f"batch.input: {pattern!r} cannot be read: {error.strerror or error}") from None
    if not names:
        raise ConfigError(f"batch.input: no file matches {pattern!r} in {folder.resolve()}")
    return names


def _read_file(path: Path, name: str, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}: is not UTF-8 text (byte {error.start}); convert it, with iconv for example, or leave it out of "
            "batch.input"
        ) from None
    if form == "text":
        yield name, {"text": text}
        return
    if form == "csv":
        yield from _read_csv(text, name)
        return
    for number, line in enumerate(text.split("\n"), 1):
        source = f"{name}:{number}"
        if not line.strip():
            continue
        if form == "lines":
            yield source, {"text": line.removesuffix("\r")}
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source}: is not JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # digits, or brackets, without an end
            raise ConfigError(f"{source}: cannot be read as JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f'{source}: expected an object such as {{"text": "..."}}, found {line.strip()[:40]}')
        yield source, fields


def _read_csv(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = rows.fieldnames or ()
        if len(set(names)) < len(names):
            twice = next(column for i, column in enumerate(names) if column in names[:i])
            raise ConfigError(f"{name}:1: the header names {twice!r} twice; expected a name of its own for each column")
        for row in rows:
            if None in row or None in row.values():
                raise ConfigError(f"{name}:{rows.line_num}: has not as many values as the header has names")
            yield f"{name}:{rows.line_num}", row
    except csv.Error as error:
        raise ConfigError(f"{name}:{rows.line_num}: is not CSV: {error}") from None
