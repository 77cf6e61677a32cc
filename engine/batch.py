"""Batch runs: prompts from files, answers to a file, all said in one TOML file; a run that was stopped is continued.

Everything is checked before the model is loaded. Each answer is on the disk before the next is waited for, as one line
of JSON; a line that was cut off by a crash is dropped and its item run again.
"""

from __future__ import annotations

import csv
import fcntl
import glob
import hashlib
import io
import json
import os
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, Literal

from engine.config import TABLES, EngineConfig
from engine.data import tiny_model_path
from engine.errors import ConfigError, EngineError, RequestError
from engine.generate.answer import Completion, TokenLogprob
from engine.gguf import open_model_file
from engine.gguf.synthetic import PREFIX
from engine.models import load_model
from engine.runtime import Engine, Prompt, check_files, read_chat_template, resolve
from engine.tables import Table, read_tables, setting

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}


@dataclass(frozen=True)
class BatchSettings(Table):
    """What a batch run reads and writes. File names are relative to the job file.

    Attributes:
        input: files or patterns such as "texts/*.txt", in the order of their items; a file that is found twice is read
            once.
        format: "jsonl" (an object a line), "csv" (a header line, then a row each), "lines" (a text a line), "text" (the
            whole file is one item), or "auto" = jsonl and csv by the file's ending, text for all others.
        prompt: the prompt, in which {name} stands for an item's field; lines and texts have the one field "text".
            Braces themselves are written {{ and }}.
        chat: put the prompt through the model's chat template, as the user's message.
        system: system message before it, with fields like the prompt; only with `chat`.
        messages_field: field that holds a whole conversation, a list of {"role", "content"}; replaces `prompt`.
        output: JSON lines, one for each item as it is finished; a file that is there is continued.
        n_parallel: answers that are made together.
    """

    table: ClassVar[str] = "batch"

    input: tuple[str, ...] = ()
    format: Literal["auto", "jsonl", "csv", "lines", "text"] = "auto"
    prompt: str = "{text}"
    chat: bool = False
    system: str = ""
    messages_field: str = ""
    output: str = "results.jsonl"
    n_parallel: int = setting(8, low=1, high=1024)

    def check(self) -> None:
        """Raise `ConfigError` for templates that cannot be filled in, or settings that contradict each other."""
        if not self.input or "" in self.input:
            raise ConfigError('batch.input names no file; expected, for example, input = ["questions.jsonl"]')
        if self.system and not self.chat:
            raise ConfigError("batch.system is set and batch.chat is false; set chat = true")
        if self.messages_field and (self.system or self.prompt != "{text}"):
            raise ConfigError("batch.messages_field replaces batch.prompt and batch.system; leave those out")
        for key in ("prompt", "system"):
            template_fields(getattr(self, key), f"batch.{key}")


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


@dataclass(frozen=True, slots=True)
class Job:
    """A batch run that is ready to go; the model is not loaded yet."""

    config: EngineConfig
    settings: BatchSettings
    items: tuple[Item, ...]
    output: Path


def load_job(path: str | os.PathLike[str], overrides: Mapping[str, object] | None = None) -> Job:
    """Read a job file and all its input.

    Args:
        path: TOML file with a [batch] table and any of the engine's own. Names of files in it are relative to it.
        overrides: settings by "table.key", which win over the file.

    Raises:
        ConfigError: for a setting or an input file that is wrong, naming the file and the line.
    """
    path = Path(path)
    tables: dict[str, Any] = read_tables(
        TABLES | {BatchSettings.table: BatchSettings}, path, os.environ, overrides or {}
    )
    settings: BatchSettings = tables.pop(BatchSettings.table)
    config = EngineConfig(**tables)
    config = replace(config, engine=replace(config.engine, n_sequences=settings.n_parallel))
    salt = json.dumps([asdict(config.sampling), config.model.path, config.model.chat_template])
    config = _beside(path.parent, config, overrides or {})
    items: list[Item] = []
    for source, fields in _read_input(settings, path):
        prompt = _fill_in(settings, source, fields)
        key = hashlib.sha256(json.dumps([salt, prompt], sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
        items.append(Item(source, fields, prompt, key[:16]))
    if not items:
        raise ConfigError(f"{path}: the files of batch.input hold no items")
    return Job(config, settings, tuple(items), path.parent / settings.output)


def _beside(folder: Path, config: EngineConfig, overrides: Mapping[str, object]) -> EngineConfig:
    """Return settings whose file names are relative to a folder, but for those of the command line."""

    def name(key: str, given: str) -> str:
        is_file = given and not given.startswith(PREFIX) and key not in overrides
        return os.fspath(folder / given) if is_file else given

    model, moe = config.model, config.moe
    return replace(
        config,
        model=replace(
            model,
            path=name("model.path", model.path),
            chat_template=name("model.chat_template", model.chat_template),
        ),
        moe=replace(
            moe,
            profile=name("moe.profile", moe.profile),
            record_trace=name("moe.record_trace", moe.record_trace),
        ),
    )


def check_job(job: Job) -> None:
    """Look at everything that a run needs and that can be looked at before weights are loaded.

    Raises `EngineError` for a model, a file or an output that cannot be used.
    """
    check_files(job.config)
    read_chat_template(job.config.model)
    model_file = open_model_file(job.config.model.path or tiny_model_path())
    try:
        resolve(job.config, load_model(model_file).spec)
    finally:
        model_file.close()


# -- input -----------------------------------------------------------------------------------------------------------


def template_fields(template: str, key: str) -> list[str]:
    """Return the names of the fields in a template; raise `ConfigError` naming `key` if it is not one."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}; write {{{{ and }}}} for braces that are no field") from None
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion:
            raise ConfigError(f"{key}: expected {{name}} for a field, and {{{{ and }}}} for braces that are none")
        names.append(name)
    return names


def _fill_in(settings: BatchSettings, source: str, fields: Mapping[str, Any]) -> Prompt:
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


def _read_input(settings: BatchSettings, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
        if not isinstance(fields, dict):
            raise ConfigError(f'{source}: expected an object such as {{"text": "..."}}, found {line.strip()[:40]}')
        yield source, fields


def _read_csv(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ConfigError(f"{name}:{rows.line_num}: has not as many values as the header has names")
            yield f"{name}:{rows.line_num}", row
    except csv.Error as error:
        raise ConfigError(f"{name}:{rows.line_num}: is not CSV: {error}") from None


# -- output ----------------------------------------------------------------------------------------------------------


class ResultFile:
    """The output of a run, and what earlier runs left in it. A context manager; one process at a time.

    Attributes:
        done: sources of the items that have a result, be it an error.
        failed: sources of those that have an error.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        """Open or make the file, and drop a line at its end that is not whole.

        Raises `ConfigError` if it holds something else than results of these items, or another process writes it.
        """
        self._path = path
        self._file = _open_locked(path)
        try:
            self.done: set[str] = set()
            self.failed: set[str] = set()
            self._read({item.source: item.key for item in items})
            _sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def _read(self, keys: Mapping[str, str]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                result = json.loads(line)
                source, key = result["source"], result["key"]
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"batch.output: {self._path}, line {number}: is no result of a batch run; choose another file"
                ) from None
            if keys.get(source) != key:
                raise ConfigError(
                    f"batch.output: {self._path}, line {number}: was made from another prompt, model or sampling than "
                    f"{source} has now; choose another file, or delete this one to begin anew"
                )
            self.done.add(source)
            if "error" in result:
                self.failed.add(source)

    def forget_failed(self) -> None:
        """Take the results that are errors out of the file, so that their items are run again.

        A new file takes the old one's place whole, so a crash leaves one of the two. Raises `RequestError` if it cannot
        be written.
        """
        if not self.failed:
            return
        self._file.seek(0)
        kept = [line for line in self._file.read().splitlines(keepends=True) if "error" not in json.loads(line)]
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            new.unlink(missing_ok=True)  # of a run that was killed here
            file = _open_locked(new)
            try:
                _write(file, b"".join(kept))
                new.replace(self._path)
                _sync_folder(self._path.parent)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise RequestError(f"{self._path}: cannot be written: {error.strerror or error}") from None
        self._file.close()
        self._file = file
        self.done -= self.failed
        self.failed.clear()

    def append(self, item: Item, outcome: Completion | EngineError) -> None:
        """Add a result; when this returns, it is on the disk. Raises `RequestError` if it cannot be written."""
        result: dict[str, Any] = {"source": item.source, "key": item.key}
        if isinstance(outcome, Completion):
            result |= _described(outcome)
        else:
            result |= {"error": str(outcome), "kind": type(outcome).__name__}
        try:
            _write(self._file, json.dumps(result).encode() + b"\n")
        except OSError as error:
            raise RequestError(
                f"{self._path}: cannot be written: {error.strerror or error}; the answers before are in it, and once "
                "that is mended the same command goes on from there"
            ) from None
        self.done.add(item.source)
        if "error" in result:
            self.failed.add(item.source)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _open_locked(path: Path) -> BinaryIO:
    """Open or make a file to append to; raise `ConfigError` if that cannot be done, or another process has it."""
    try:
        file: BinaryIO = path.open("ab+", buffering=0)
    except OSError as error:
        raise ConfigError(
            f"batch.output: {path}: cannot be written: {error.strerror or error}; choose another file"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # replaced since it was opened
            raise BlockingIOError
    except OSError:
        file.close()
        raise ConfigError(
            f"batch.output: {path}: another run is writing it; wait for that, or choose another file"
        ) from None
    return file


def _write(file: BinaryIO, data: bytes) -> None:
    """Write all of it, to the disk."""
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def _described(completion: Completion) -> dict[str, Any]:
    usage, timings = completion.usage, completion.timings
    result: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": asdict(usage),
        "timings": {key: round(value, 6) for key, value in asdict(timings).items()},
        "seed": completion.seed,
    }
    if completion.logprobs:
        result["logprobs"] = [
            {**_rated(token.chosen), "top": [_rated(entry) for entry in token.top]} for token in completion.logprobs
        ]
    return result


def _rated(entry: TokenLogprob) -> dict[str, Any]:
    return {"token_id": entry.token_id, "text": entry.text, "logprob": entry.logprob}


def _sync_folder(folder: Path) -> None:
    """Make sure that a new file's name survives a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- running ---------------------------------------------------------------------------------------------------------


def run_job(
    job: Job,
    results: ResultFile,
    engine: Engine,
    on_result: Callable[[Item, Completion | EngineError], object] = lambda _item, _outcome: None,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Answer all items that have no result yet.

    Args:
        job: what to do.
        results: where answers go.
        engine: opened with the job's settings.
        on_result: called with each item and its outcome, after that is on the disk.
        on_step: called after every step of the engine.
    """
    left = [item for item in job.items if item.source not in results.done]
    with closing(engine.generate_many((item.prompt for item in left), on_step=on_step)) as outcomes:
        for index, outcome in outcomes:
            results.append(left[index], outcome)
            on_result(left[index], outcome)
