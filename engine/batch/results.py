"""The output of a batch run: lines of JSON that are on the disk before they count."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from engine.batch.items import Item
from engine.errors import ConfigError, EngineError, RequestError
from engine.generate.answer import Completion, TokenLogprob


@dataclass(slots=True)
class Found:
    """What is in an output.

    Attributes:
        done: sources of the items that have a result, be it an error.
        failed: sources of those that have an error.
        n_bytes: of the lines that are whole.
        is_torn: whether one follows that is not.
    """

    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    n_bytes: int = 0
    is_torn: bool = False


def read_results(path: Path, items: Sequence[Item]) -> Found:
    """Return what an output holds, which is left as it is.

    Raises `ConfigError` if it holds something else than results of these items, `OSError` if it cannot be read.
    """
    keys, found = {item.source: item.key for item in items}, Found()
    starts = [b'{"source": %s, "key": "' % json.dumps(source).encode() for source in keys]
    with path.open("rb") as reader:
        for number, line in enumerate(reader, 1):
            if not line.endswith(b"\n"):
                if not any(line.startswith(start) or start.startswith(line) for start in starts):
                    raise _foreign(path, number)
                found.is_torn = True
                break
            found.n_bytes += len(line)
            try:
                result = json.loads(line)
                source, key = result["source"], result["key"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise _foreign(path, number) from None
            if not isinstance(source, str):
                raise _foreign(path, number)
            if keys.get(source) != key:
                raise ConfigError(
                    f"batch.output: {path}, line {number}: was made from another prompt, model or sampling than "
                    f"{source} has now; choose another file, or delete this one to begin anew"
                )
            found.done.add(source)
            if "error" in result:
                found.failed.add(source)
    return found


def check_output(path: Path, items: Sequence[Item]) -> None:
    """Raise `ConfigError` if a run could not write its results there; nothing is made or changed."""
    try:
        if path.exists():
            read_results(path, items)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(path, error) from None


def _foreign(path: Path, number: int) -> ConfigError:
    return ConfigError(f"batch.output: {path}, line {number}: is no result of a batch run; choose another file")


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"batch.output: {path}: cannot be written: {error.strerror or error}; choose another file")


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
            found = read_results(path, items)
            self.done, self.failed = found.done, found.failed
            if found.is_torn:  # only now, when all before it is known to be ours
                self._file.truncate(found.n_bytes)
            _sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

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
        raise _unwritable(path, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())  # not replaced since it was opened
    except BlockingIOError:
        is_ours = False
    except OSError as error:
        file.close()
        raise ConfigError(
            f"batch.output: {path}: cannot be kept from other runs: {error.strerror or error}; choose a file on "
            "another file system"
        ) from None
    if not is_ours:
        file.close()
        raise ConfigError(f"batch.output: {path}: another run is writing it; wait for that, or choose another file")
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
