"""Reads GGUF files (version 2 and 3, also in several shards) and trusts nothing in them.

The format: a magic word, a version, the numbers of tensors and of metadata keys; the keys with typed values; a name,
a shape, a type and an offset for each tensor; then, aligned, the tensors. Everything is little-endian. Each length,
count and offset is checked against the size of the file before it is used, so that a damaged or hostile file gives a
`GGUFError`, or `UnsupportedModelError` if it is merely newer than this reader.
"""

from __future__ import annotations

import difflib
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from engine.errors import GGUFError, UnsupportedModelError
from engine.gguf.metadata import Metadata, TextArray, Value
from engine.gguf.model_file import TensorInfo
from engine.quants.formats import BY_TYPE, I32

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = 1 << 10  # the format allows 65,535; real names have less than 100, and messages show them
MAX_DIMENSIONS = 4
MAX_WEIGHTS = 1 << 48
MAX_ALIGNMENT = 1 << 20
MAX_SHARDS = 99_999

STRING, ARRAY = 8, 9
SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_READ_BYTES = 16 << 20  # of one read call: large enough for full disk speed, small enough to keep all threads busy
_PART = re.compile(r"\.part[0-9]+of[0-9]+$|[.-]split-[a-z]+$")  # of a file that was cut anywhere, for uploading
_SHARD_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")
# Types that exist but are no weights, or no longer written; named only to say so.
_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 27: "I64", 28: "F64", 31: "Q4_0_4_4"} | {
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
}
# What people download instead of a GGUF file.
_LOOKALIKES: tuple[tuple[bytes, str], ...] = (
    (b"FUGG", "a big-endian GGUF file; get the little-endian one"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself (git lfs pull)"),
    (b"<!DOCTYPE", "a web page; the download link led to a page instead of the file"),
    (b"<!doctype", "a web page; the download link led to a page instead of the file"),
    (b"<html", "a web page; the download link led to a page instead of the file"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint; convert it to GGUF"),
    (b"lmgg", "a GGML file, older than GGUF; get a GGUF file"),
    (b"fmgg", "a GGML file, older than GGUF; get a GGUF file"),
    (b"tjgg", "a GGML file, older than GGUF; get a GGUF file"),
)


class _Header:
    """Reads the head of a file front to back."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self.name = name
        self.data = data
        self.size = len(data)
        self.position = 0

    def fail(self, message: str) -> NoReturn:
        raise GGUFError(f"{self.name}: {message}")

    def need(self, n_bytes: int, what: str) -> None:
        """Check that so many bytes follow."""
        if n_bytes > self.size - self.position:
            self.fail(
                f"{what} needs {n_bytes} bytes from byte {self.position} on, but the file has {self.size} bytes: "
                "it is damaged or an incomplete download; get it again"
            )

    def take(self, n_bytes: int, what: str) -> bytes:
        self.need(n_bytes, what)
        start = self.position
        self.position += n_bytes
        return self.data[start : self.position]

    def unpack(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def name_text(self, what: str) -> str:
        """Read the name of a key or tensor."""
        n_bytes = self.unpack("Q", f"the length of {what}")
        if not 0 < n_bytes <= MAX_NAME_BYTES:
            self.fail(f"{what} is {n_bytes} bytes long; expected 1 to {MAX_NAME_BYTES}: the file is damaged")
        name = self.text(n_bytes, what)
        if not name.isprintable():
            self.fail(f"{what} has characters that cannot be printed: {name!r}")
        return name

    def text(self, n_bytes: int, what: str) -> str:
        try:
            return self.take(n_bytes, what).decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error})")

    def value(self, key: str) -> Value:
        what = f"the value of key {key}"
        kind = self.unpack("I", f"the type of key {key}")
        if kind == STRING:
            return self.text(self.unpack("Q", f"the length of key {key}"), what)
        if kind == ARRAY:
            return self.array(key)
        code = self.scalar_code(kind, key)
        if code == "?":
            byte = self.unpack("B", what)
            if byte > 1:
                self.fail(f"key {key} is a boolean with the value {byte}; expected 0 or 1")
            return bool(byte)
        value: int | float = self.unpack(code, what)
        return value

    def scalar_code(self, kind: int, key: str) -> str:
        if kind not in SCALARS:
            self.fail(f"key {key} has the value type {kind}; expected 0 to 12: the file is damaged or newer than this")
        return SCALARS[kind]

    def array(self, key: str) -> Value:
        what = f"the array of key {key}"
        kind, n_items = self.unpack("I", what), self.unpack("Q", what)
        if kind == STRING:
            return self.texts(n_items, what)
        if kind == ARRAY:
            raise UnsupportedModelError(f"{self.name}: key {key} is an array of arrays, which no known model uses")
        dtype = np.dtype("<" + self.scalar_code(kind, key))
        self.need(n_items * dtype.itemsize, what)
        raw = self.take(n_items * dtype.itemsize, what)
        if dtype.kind == "b" and raw.translate(None, b"\0\1"):
            self.fail(f"key {key} is an array of booleans with a value other than 0 and 1")
        return np.frombuffer(raw, dtype)

    def texts(self, n_items: int, what: str) -> TextArray:
        self.need(n_items * 8, what)  # bounds the loop by the size of the file
        unpack, data, last = struct.Struct("<Q").unpack_from, self.data, self.size - 8
        start = position = self.position
        for _ in range(n_items):
            if position > last:
                break
            position += 8 + unpack(data, position)[0]
        self.need(position - start, what)
        self.position = position
        return TextArray(memoryview(data)[start:position], n_items)


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file, its head understood."""

    path: Path
    data: mmap.mmap
    identity: tuple[int, ...]  # changes when the file on disk does
    values: dict[str, Value]
    tensors: list[TensorInfo]


def _map_file(path: Path) -> tuple[mmap.mmap, tuple[int, ...]]:
    """Map a file that looks like GGUF; return the mapping and the file's identity."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{path}: is a directory; name the .gguf file in it")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{path}: is not a regular file, and a model has to be one (it is mapped into memory)")
        with path.open("rb") as file:
            start = file.read(32)
            _check_magic(path, start)
            # Private, though nobody writes: some network file systems have no shared mappings.
            data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            return data, _identity(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise GGUFError(f"{path}: cannot be read: {reason}{_hint(path, error)}") from None


def _hint(path: Path, error: Exception) -> str:
    """Return what to do about a file that is not there: perhaps its name is only mistyped."""
    if not isinstance(error, FileNotFoundError):
        return ""
    there = [other.name for other in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, there, 1, 0.7)
    if close:
        return f"; did you mean {path.parent / close[0]}?"
    return "; give the path of a .gguf file (models are not downloaded), or synthetic:NAME for a made-up one"


def _part_hint(name: str) -> str:
    """Return what to do with a file that was cut into parts of bytes, by its name."""
    return "; or is it one of several parts? Join them with cat" if _PART.search(name) else ""


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_magic(path: Path, start: bytes) -> None:
    if not start:
        raise GGUFError(f"{path}: is empty; get the file again")
    for prefix, description in _LOOKALIKES:
        if start.startswith(prefix):
            raise GGUFError(f"{path}: is {description}")
    if start[8:9] == b"{":
        raise GGUFError(f"{path}: is a safetensors file; convert it to GGUF (llama.cpp's convert_hf_to_gguf.py does)")
    if start[:4] != b"GGUF":
        raise GGUFError(
            f"{path}: is not a GGUF file: it begins with {start[:4]!r}; expected b'GGUF'; "
            f"give a model in the GGUF format{_part_hint(path.name)}"
        )


def _read_shard(path: Path, shard: int) -> _Shard:
    data, identity = _map_file(path)
    header = _Header(str(path), data)
    header.position = 4
    version = header.unpack("I", "the version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0 and version:
            header.fail("is a big-endian GGUF file; get the little-endian one")
        raise UnsupportedModelError(
            f"{path}: is GGUF version {version}; this reader knows versions 2 and 3"
            + (": convert the model again with a newer llama.cpp" if version == 1 else "")
        )
    n_tensors, n_keys = header.unpack("Q", "the number of tensors"), header.unpack("Q", "the number of keys")
    for n, limit, what in ((n_tensors, MAX_TENSORS, "tensors"), (n_keys, MAX_KEYS, "keys")):
        if n > limit:
            header.fail(f"says it has {n} {what}; more than {limit} are not plausible: the file is damaged")

    values: dict[str, Value] = {}
    for i in range(n_keys):
        key = header.name_text(f"the name of key {i + 1} of {n_keys}")
        if key in values:
            header.fail(f"key {key} occurs twice")
        values[key] = header.value(key)
    tensors = [_read_tensor_info(header, i, n_tensors, shard) for i in range(n_tensors)]
    return _Shard(path, data, identity, values, _place_tensors(header, values, tensors))


def _read_tensor_info(header: _Header, index: int, n_tensors: int, shard: int) -> TensorInfo:
    """Read one entry of the tensor table; its offset is still relative to the data section."""
    name = header.name_text(f"the name of tensor {index + 1} of {n_tensors}")
    what = f"the description of tensor {name}"
    n_dimensions = header.unpack("I", what)
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        header.fail(f"tensor {name} has {n_dimensions} dimensions; expected 1 to {MAX_DIMENSIONS}")
    dimensions = [header.unpack("Q", what) for _ in range(n_dimensions)]
    n_weights = 1
    for size in dimensions:
        n_weights *= size
    if not 0 < n_weights < MAX_WEIGHTS:
        header.fail(f"tensor {name} has the dimensions {dimensions}; expected a product from 1 to {MAX_WEIGHTS - 1}")
    ggml_type, offset = header.unpack("I", what), header.unpack("Q", what)
    weight_format = I32 if ggml_type == I32.ggml_type else BY_TYPE.get(ggml_type)
    if weight_format is None:
        known = ", ".join(f.name for f in BY_TYPE.values())
        raise UnsupportedModelError(
            f"{header.name}: tensor {name} has the type {ggml_type} ({_OTHER_TYPES.get(ggml_type, 'unknown')}); "
            f"this version reads {known}"
        )
    if dimensions[0] % weight_format.block_size:
        header.fail(
            f"tensor {name} has rows of {dimensions[0]} weights in {weight_format.name}; "
            f"expected a multiple of {weight_format.block_size}"
        )
    n_bytes = n_weights // weight_format.block_size * weight_format.block_bytes
    return TensorInfo(name, weight_format, tuple(reversed(dimensions)), n_bytes, offset, shard)


def _place_tensors(header: _Header, values: dict[str, Value], tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Turn the offsets into places in the file, which must hold every tensor whole."""
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or not 1 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        header.fail(f"general.alignment is {alignment}; expected a power of two up to {MAX_ALIGNMENT}")
    start = -(-header.position // alignment) * alignment
    placed = []
    for info in tensors:
        if info.offset % alignment:
            header.fail(f"tensor {info.name} begins at {info.offset}; expected a multiple of {alignment}")
        end = start + info.offset + info.n_bytes
        if end > header.size:
            header.fail(
                f"tensor {info.name} ends at byte {end}, but the file has {header.size} bytes: "
                f"it is probably an incomplete download; get it again{_part_hint(header.name)}"
            )
        placed.append(replace(info, offset=start + info.offset))
    return placed


class GGUFFile:
    """An open GGUF file, or all shards of a split one. Nothing but the head is read until tensors are."""

    def __init__(self, path: Path, shards: list[_Shard]) -> None:
        """Take over shards that `open` has read."""
        self.path = path
        self.paths = [shard.path for shard in shards]
        self.metadata = Metadata(self.name, shards[0].values)
        self.tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in shard.tensors:
                if info.name in self.tensors:
                    raise GGUFError(f"{shard.path}: tensor {info.name} occurs twice")
                self.tensors[info.name] = info
        self._maps = [shard.data for shard in shards]
        self._identities = [shard.identity for shard in shards]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Open a file; of a split model any shard will do, the others are found beside it.

        Raises:
            GGUFError: if a file cannot be read, is not GGUF, is damaged, or a shard is missing or of another model.
            UnsupportedModelError: if the file is of a version, or has a tensor of a type, that is not known.
        """
        path = Path(path)
        opened = _read_shard(path, 0)
        n_shards = _split_value(opened, "split.count", 1)
        if n_shards <= 1:
            return cls(path, [opened])
        return cls(path, _read_all_shards(opened, n_shards))

    @property
    def name(self) -> str:
        """Return the name for messages: the file that was opened."""
        return self.path.name

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all shards."""
        return sum(len(data) for data in self._maps)

    def mapped(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor where they lie in the mapped file, flat and read-only."""
        info = self.tensors[name]
        return np.frombuffer(self._maps[info.shard], np.uint8, info.n_bytes, info.offset)

    def read(self, name: str, out: npt.NDArray[np.uint8], n_threads: int, progress: Callable[[int], None]) -> None:
        """Fill `out`, flat and as long as the tensor, by several threads that read pieces of it.

        Raises `GGUFError` if the disk fails or the file is not the one that was opened any more.
        """
        info = self.tensors[name]
        assert out.nbytes == info.n_bytes
        target = out.data
        path = self.paths[info.shard]
        try:
            with path.open("rb", buffering=0) as file:
                if _identity(file.fileno()) != self._identities[info.shard]:
                    raise GGUFError(f"{path}: has changed since it was opened; open it again")
                starts = range(0, info.n_bytes, _READ_BYTES)
                if n_threads == 1 or len(starts) == 1:
                    for start in starts:
                        progress(_read_piece(file.fileno(), target[start : start + _READ_BYTES], info.offset + start))
                    return
                with ThreadPoolExecutor(min(n_threads, len(starts))) as pool:
                    pieces = [
                        pool.submit(
                            _read_piece, file.fileno(), target[start : start + _READ_BYTES], info.offset + start
                        )
                        for start in starts
                    ]
                    try:
                        for piece in as_completed(pieces):
                            progress(piece.result())
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise
        except OSError as error:
            raise GGUFError(f"{path}: tensor {name} cannot be read: {error.strerror or error}") from None

    def close(self) -> None:
        """Let go of the file. It stays mapped as long as somebody holds an array of it."""
        self._maps = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_piece(descriptor: int, out: memoryview, offset: int) -> int:
    """Read until `out` is full; return its length."""
    done = 0
    while done < len(out):
        n = os.preadv(descriptor, [out[done:]], offset + done)
        if n == 0:
            raise OSError(f"the file became shorter while it was read (it ends before byte {offset + done})")
        done += n
    return done


def _split_value(shard: _Shard, key: str, default: int | None = None) -> int:
    return Metadata(str(shard.path), shard.values).integer(key, default)


def _read_all_shards(opened: _Shard, n_shards: int) -> list[_Shard]:
    """Read the other shards of a split model and check that they belong together; in order."""
    path = opened.path
    match = _SHARD_NAME.fullmatch(path.name)
    if n_shards > MAX_SHARDS:
        raise GGUFError(f"{path}: split.count is {n_shards}; expected at most {MAX_SHARDS}")
    number = _split_value(opened, "split.no")
    if match is None or int(match[3]) != n_shards or int(match[2]) != number + 1:
        raise GGUFError(
            f"{path}: is part {number + 1} of {n_shards} of a split model, and the other parts are looked for by name; "
            f"rename it to <model>-{number + 1:05}-of-{n_shards:05}.gguf, as it was"
        )
    paths = [path.with_name(f"{match[1]}-{i + 1:05}-of-{n_shards:05}.gguf") for i in range(n_shards)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise GGUFError(
            f"{path}: {len(missing)} of the {n_shards} parts of this split model are missing: {shown}; "
            "put all of them into one folder"
        )
    shards = []
    for i, part in enumerate(paths):
        shard = replace(opened, tensors=[replace(t, shard=i) for t in opened.tensors])
        if part != path:
            shard = _read_shard(part, i)
        found = _split_value(shard, "split.count", 1), _split_value(shard, "split.no", 0)
        if found != (n_shards, i):
            raise GGUFError(
                f"{part}: says it is part {found[1] + 1} of {found[0]}; "
                f"by its name it must be part {i + 1} of {n_shards}"
            )
        shards.append(shard)
    n_tensors = sum(len(shard.tensors) for shard in shards)
    expected = _split_value(opened, "split.tensors.count", n_tensors)
    if n_tensors != expected:
        raise GGUFError(
            f"{path}: the parts hold {n_tensors} tensors together; split.tensors.count says {expected}: "
            "the parts are not of the same model"
        )
    return shards
