"""Written files: whole or not there, and the same when they are read, by us and by gguf-py."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import GGUFError
from engine.gguf import GGUFFile, TensorInfo, write_gguf
from engine.gguf.metadata import Metadata
from engine.quants.formats import BY_NAME


class Memory:
    """A model file of a few tensors, as a model that is not on disk."""

    name = "memory"

    def __init__(self, values: dict, arrays: dict[str, np.ndarray]) -> None:
        self.metadata = Metadata(self.name, values)
        self.arrays = arrays
        self.tensors = {
            name: TensorInfo(name, BY_NAME["F32" if a.dtype == np.float32 else "F16"], a.shape, a.nbytes)
            for name, a in arrays.items()
        }

    def mapped(self, name: str) -> None:
        return None

    def read(self, name: str, out: np.ndarray, n_threads: int, progress: Callable[[int], None]) -> None:
        out[:] = self.arrays[name].reshape(-1).view(np.uint8)
        progress(out.nbytes)

    def close(self) -> None:
        pass


ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1, 2, 5), np.float16)}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = texts.filter(lambda name: name and name.isprintable() and not name.startswith("split."))
dtypes = st.sampled_from([np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32])
values = st.one_of(
    texts,
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.lists(texts, max_size=5),
    dtypes.map(lambda dtype: np.arange(3).astype(dtype)),
    st.lists(st.booleans(), max_size=4).map(lambda flags: np.array(flags, bool)),
)


@settings(max_examples=60)
@given(st.dictionaries(names, values, max_size=8))
def test_metadata_comes_back(tmp_path_factory: pytest.TempPathFactory, written: dict) -> None:
    path = tmp_path_factory.mktemp("written") / "m.gguf"
    written.pop("general.alignment", None)
    write_gguf(Memory(written, ARRAYS), path)
    with GGUFFile.open(path) as file:
        assert list(file.metadata) == [*written, "general.alignment"]
        for key, value in written.items():
            found = file.metadata.value(key)
            if isinstance(value, list):
                assert file.metadata.texts(key) == value
            elif isinstance(value, np.ndarray):
                assert found.dtype == value.dtype
                assert np.array_equal(found, value)
            else:
                assert type(found) is type(value)
                assert found == value or math.isnan(value)


def test_gguf_py_reads_it(tmp_path: Path) -> None:
    written = {"general.architecture": "x", "n": 7, "eps": float(np.float32(1e-6)), "tokens": ["a", "ü"], "minus": -1}
    progress: list[tuple[int, int]] = []
    write_gguf(Memory(written, ARRAYS), tmp_path / "m.gguf", progress=lambda *p: progress.append(p))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {key: reader.fields[key].contents() for key in written} == written
    kinds = {key: reader.fields[key].types[0].name for key in written}
    assert kinds == {
        "general.architecture": "STRING",
        "n": "UINT32",
        "eps": "FLOAT32",
        "tokens": "ARRAY",
        "minus": "INT32",
    }
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, ARRAYS[tensor.name])
    assert progress == [(24, 44), (44, 44)]
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_shards_become_one_file(data: Path, tmp_path: Path) -> None:
    with GGUFFile.open(data / "golden" / "qwen3moe" / "qwen3moe-split-Q8_0-00001-of-00003.gguf") as source:
        write_gguf(source, tmp_path / "whole.gguf")
        with GGUFFile.open(tmp_path / "whole.gguf") as whole:
            assert "split.count" not in whole.metadata
            assert list(whole.tensors) == list(source.tensors)
            assert all(np.array_equal(whole.mapped(n), source.mapped(n)) for n in source.tensors)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    class Failing(Memory):
        def read(self, name: str, out: np.ndarray, n_threads: int, progress: Callable[[int], None]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(Failing({}, ARRAYS), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_says_when_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 50, 50))
    with pytest.raises(GGUFError, match=r"m\.gguf: needs 0 MB on disk, and 0 MB are free there; make room"):
        write_gguf(Memory({}, ARRAYS), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_says_when_the_file_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"cannot be written: there is no folder .*absent; make it first"):
        write_gguf(Memory({}, ARRAYS), tmp_path / "absent" / "m.gguf")
