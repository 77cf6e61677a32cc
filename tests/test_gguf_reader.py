"""The GGUF reader: agrees with gguf-py on good files, and says what is wrong with bad ones."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.errors import GGUFError, UnsupportedModelError
from engine.gguf import GGUFFile, open_gguf
from engine.gguf.reader import MAX_KEYS, MAX_TENSORS

GOLDEN = (
    "qwen35moe/qwen35moe-fusedgu-Q8_0.gguf",
    "qwen35moe/qwen35moe-wide-Q4_K_M.gguf",
    "qwen3moe/qwen3moe-micro-F32.gguf",
    "qwen3moe/qwen3moe-tied-BF16.gguf",
    "qwen3moe/qwen3moe-split-Q8_0-00002-of-00003.gguf",
)


def check_against_oracle(path: Path) -> None:
    oracle = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        if len(file.paths) > 1:
            ours = [t for t in file.tensors.values() if file.paths[t.shard].name == path.name]
        else:
            ours = list(file.tensors.values())
            fields = {k: v for k, v in oracle.fields.items() if not k.startswith("GGUF.")}
            assert list(file.metadata) == list(fields)
            for key, field in fields.items():
                check_value(file.metadata.value(key), field)
        assert [t.name for t in ours] == [t.name for t in oracle.tensors]
        for info, expected in zip(ours, oracle.tensors, strict=True):
            assert info.shape == tuple(int(n) for n in reversed(expected.shape))
            assert info.format.ggml_type == int(expected.tensor_type)
            assert info.offset == int(expected.data_offset)
            assert np.array_equal(file.mapped(info.name), expected.data.reshape(-1).view(np.uint8))


def check_value(ours: object, field: gguf.ReaderField) -> None:
    expected = field.contents()
    if hasattr(ours, "decode"):
        ours = ours.decode()
    elif isinstance(ours, np.ndarray):
        ours = ours.tolist()
    assert ours == expected
    assert type(ours) is type(expected)


@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_gguf_py(data: Path, name: str) -> None:
    check_against_oracle(data / "golden" / name)


def test_agrees_with_gguf_py_on_all_golden_files(shared: Path) -> None:
    paths = sorted((shared / "golden").glob("*/*.gguf"))
    assert len(paths) > 30
    for path in paths:
        if path.parent.name != "tokenizers":  # large vocabularies: gguf-py takes seconds for each
            check_against_oracle(path)


def test_reads_a_large_vocabulary(shared: Path) -> None:
    path = shared / "golden" / "tokenizers" / "ggml-vocab-qwen35.gguf"
    with GGUFFile.open(path) as file:
        tokens, merges = file.metadata.texts("tokenizer.ggml.tokens"), file.metadata.texts("tokenizer.ggml.merges")
    assert (len(tokens), len(merges)) == (151936, 151387)
    assert (tokens[0], tokens[220], merges[0]) == ("!", "Ġ", "Ġ Ġ")


def test_a_closed_file_leaves_its_arrays_and_metadata(data: Path) -> None:
    file = GGUFFile.open(data / "golden" / GOLDEN[0])
    array = file.mapped("output.weight")
    total = int(array.sum())
    assert not array.flags.writeable
    file.close()
    assert int(array.sum()) == total
    assert len(file.metadata.texts("tokenizer.ggml.tokens")) == 512


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> list[Path]:
    paths = sorted((data / "golden" / "qwen3moe").glob("qwen3moe-split-*.gguf"))
    return [Path(shutil.copy(path, tmp_path)) for path in paths]


def test_any_shard_opens_the_whole_model(shards: list[Path]) -> None:
    opened = [GGUFFile.open(path) for path in shards]
    assert [file.name for file in opened] == [path.name for path in shards]
    assert len(opened[0].tensors) == opened[0].metadata.integer("split.tensors.count") == 51
    for file in opened:
        assert file.tensors == opened[0].tensors
        assert file.paths == shards
        assert file.metadata.text("general.architecture") == "qwen3moe"
        assert all(np.array_equal(file.mapped(n), opened[0].mapped(n)) for n in file.tensors)


def test_says_which_shard_is_missing(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(GGUFError, match=r"1 of the 3 parts .* missing: qwen3moe-split-Q8_0-00002-of-00003.gguf"):
        GGUFFile.open(shards[2])


def test_a_renamed_shard_cannot_find_the_others(shards: list[Path]) -> None:
    renamed = shards[0].rename(shards[0].with_name("model.gguf"))
    with pytest.raises(GGUFError, match=r"part 1 of 3 .* rename it to <model>-00001-of-00003.gguf"):
        GGUFFile.open(renamed)


def test_swapped_shards_are_noticed(shards: list[Path]) -> None:
    shutil.copy(shards[1], shards[2])
    with pytest.raises(GGUFError, match="says it is part 2 of 3; by its name it must be part 3 of 3"):
        GGUFFile.open(shards[0])


def test_a_shard_of_another_model_is_noticed(shards: list[Path]) -> None:
    # the last shard without one of its tensors: only the number of tensors gives it away
    content = shards[2].read_bytes()
    n_tensors = struct.unpack_from("<Q", content, 8)[0]
    with GGUFFile.open(shards[0]) as file:
        last = [t for t in file.tensors.values() if t.shard == 2][-1].name.encode()
    entry = content.index(struct.pack("<Q", len(last)) + last)
    n_dimensions = struct.unpack_from("<I", content, entry + 8 + len(last))[0]
    length = 8 + len(last) + 4 + 8 * n_dimensions + 12
    padding = bytes(length)  # keeps the data section where it is, up to its alignment
    shorter = content[:8] + struct.pack("<Q", n_tensors - 1) + content[16:entry] + content[entry + length :]
    shards[2].write_bytes(shorter + padding)
    with pytest.raises(GGUFError, match=r"hold 50 tensors together; split.tensors.count says 51"):
        GGUFFile.open(shards[0])


# -- bad files -------------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int = 4, value: bytes = struct.pack("<I", 1)) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str = "t", dimensions: tuple[int, ...] = (32,), ggml_type: int = 0, offset: int = 0) -> bytes:
    n = len(dimensions)
    return text(name) + struct.pack(f"<I{n}QIQ", n, *dimensions, ggml_type, offset)


def head(keys: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), n_data: int = 0, version: int = 3) -> bytes:
    raw = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys + tensors)
    return raw + bytes(-len(raw) % 32) + bytes(n_data)


def counts(n_tensors: int, n_keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + bytes(64)


U64 = (1 << 64) - 1
BAD: dict[str, tuple[bytes, type[Exception], str]] = {
    "empty": (b"", GGUFError, "is empty"),
    "magic": (b"XXUF" + bytes(40), GGUFError, r"not a GGUF file: it begins with b'XXUF'; expected b'GGUF'"),
    "magic only": (b"GGUF", GGUFError, r"the version needs 4 bytes from byte 4 on, but the file has 4 bytes"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), GGUFError, "big-endian"),
    "big-endian magic": (b"FUGG" + bytes(40), GGUFError, "big-endian"),
    "version 1": (head(version=1), UnsupportedModelError, "version 1; .* versions 2 and 3: convert"),
    "version 4": (head(version=4), UnsupportedModelError, "version 4; .* versions 2 and 3"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", GGUFError, "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>", GGUFError, "is a web page"),
    "zip": (b"PK\x03\x04" + bytes(60), GGUFError, "zip archive"),
    "safetensors": (struct.pack("<Q", 20) + b'{"a":{}}' + bytes(30), GGUFError, "is a safetensors file; convert it"),
    "GGML": (b"tjgg" + bytes(60), GGUFError, "older than GGUF"),
    "too many keys": (counts(0, MAX_KEYS + 1), GGUFError, f"has {MAX_KEYS + 1} keys"),
    "too many tensors": (counts(MAX_TENSORS + 1, 0), GGUFError, f"has {MAX_TENSORS + 1} tensors"),
    "keys missing": (counts(0, 60), GGUFError, "the name of key 1 of 60 is 0 bytes long"),
    "key length": (head((struct.pack("<Q", U64),)), GGUFError, f"is {U64} bytes long"),
    "key past end": (head((struct.pack("<Q", 1000),)), GGUFError, "the name of key 1 of 1 needs 1000 bytes"),
    "key unprintable": (head((key("a\x1b[2J"),)), GGUFError, r"key 1 of 1 has characters .* printed: 'a\\x1b\[2J'"),
    "key not UTF-8": (head((text(b"\xff\xfe") + bytes(12),)), GGUFError, "the name of key 1 of 1 is not UTF-8"),
    "key twice": (head((key("a.b"), key("a.b"))), GGUFError, "key a.b occurs twice"),
    "value type": (head((key("a", 13),)), GGUFError, "key a has the value type 13"),
    "text not UTF-8": (head((key("a", 8, text(b"\xff")),)), GGUFError, "the value of key a is not UTF-8"),
    "text length": (head((key("a", 8, struct.pack("<Q", 1 << 63)),)), GGUFError, "the value of key a needs"),
    "boolean": (head((key("a", 7, b"\x02"),)), GGUFError, "key a is a boolean with the value 2"),
    "booleans": (head((key("a", 9, struct.pack("<IQ", 7, 2) + b"\1\2"),)), GGUFError, "key a is an array of booleans"),
    "array length": (head((key("a", 9, struct.pack("<IQ", 10, 1 << 61)),)), GGUFError, "the array of key a needs"),
    "texts length": (head((key("a", 9, struct.pack("<IQ", 8, U64)),)), GGUFError, "the array of key a needs"),
    "texts past end": (
        head((key("a", 9, struct.pack("<IQQ", 8, 2, 1 << 62) + bytes(64)),)),
        GGUFError,
        "the array of key a needs",
    ),
    "array type": (head((key("a", 9, struct.pack("<IQ", 77, 1)),)), GGUFError, "key a has the value type 77"),
    "array of arrays": (head((key("a", 9, struct.pack("<IQ", 9, 1)),)), UnsupportedModelError, "array of arrays"),
    "alignment 3": (head((key("general.alignment", value=struct.pack("<I", 3)),)), GGUFError, "general.alignment is 3"),
    "alignment 0": (head((key("general.alignment", value=bytes(4)),)), GGUFError, "general.alignment is 0"),
    "alignment text": (head((key("general.alignment", 8, text("x")),)), GGUFError, "general.alignment is x"),
    "alignment huge": (
        head((key("general.alignment", 10, struct.pack("<Q", 1 << 40)),)),
        GGUFError,
        "general.alignment is 1099511627776",
    ),
    "no dimensions": (head((), (tensor(dimensions=()),)), GGUFError, "tensor t has 0 dimensions"),
    "5 dimensions": (head((), (tensor(dimensions=(1,) * 5),)), GGUFError, "tensor t has 5 dimensions"),
    "dimension 0": (head((), (tensor(dimensions=(32, 0)),)), GGUFError, r"tensor t has the dimensions \[32, 0\]"),
    "overflow": (head((), (tensor(dimensions=(1 << 32, 1 << 32)),)), GGUFError, "tensor t has the dimensions"),
    "tensor type": (head((), (tensor(ggml_type=99),)), UnsupportedModelError, r"tensor t has the type 99 \(unknown\)"),
    "integers": (head((), (tensor(ggml_type=27),)), UnsupportedModelError, r"tensor t has the type 27 \(I64\)"),
    "row length": (head((), (tensor(dimensions=(33,), ggml_type=8),)), GGUFError, "rows of 33 weights in Q8_0"),
    "offset": (head((), (tensor(offset=8),), 256), GGUFError, "tensor t begins at 8; expected a multiple of 32"),
    "offset huge": (head((), (tensor(offset=1 << 63),), 256), GGUFError, "tensor t ends at byte"),
    "no data": (head((), (tensor(),)), GGUFError, "tensor t ends at byte 192, but the file has 64 bytes.* download"),
    "data cut": (head((), (tensor(),), 127), GGUFError, "tensor t ends at byte 192, but the file has 191 bytes"),
    "tensor twice": (head((), (tensor(), tensor()), 128), GGUFError, "tensor t occurs twice"),
    "split text": (head((key("split.count", 8, text("2")),)), GGUFError, "split.count is the string '2'"),
    "split huge": (head((key("split.count", 10, struct.pack("<Q", U64)),)), GGUFError, "split.count is 18446"),
    "split without number": (head((key("split.count", value=struct.pack("<I", 2)),)), GGUFError, "split.no is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, kind, message = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_the_building_blocks_of_the_bad_files_are_good(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(head((key("a"), key("b", 7, b"\1")), (tensor("t"), tensor("u", (4, 2), 1, 128)), 144, version=2))
    with GGUFFile.open(path) as file:
        assert file.metadata.integer("a") == 1
        assert file.metadata.flag("b") is True
        assert [(t.name, t.shape, t.n_bytes) for t in file.tensors.values()] == [("t", (32,), 128), ("u", (2, 4), 16)]


def test_the_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    keys = (key("general.alignment", value=struct.pack("<I", 128)),)
    raw = head(keys, (tensor(),))
    path = tmp_path / "aligned.gguf"
    path.write_bytes(raw + bytes(-len(raw) % 128) + np.arange(32, dtype=np.float32).tobytes())
    with GGUFFile.open(path) as file:
        assert file.mapped("t").view(np.float32).tolist() == list(range(32))


def test_things_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot be read: No such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(GGUFError, match="is a directory"):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="not a regular file"):
        open_gguf(tmp_path / "pipe")
    with pytest.raises(GGUFError, match="cannot be read"):
        open_gguf("a\0b")
    with pytest.raises(GGUFError, match="cannot be read: File name too long"):
        open_gguf("x" * 5000)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(head())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the mode bits would not stop a test run by root
    with pytest.raises(GGUFError, match="cannot be read: Permission denied"):
        open_gguf(path)
