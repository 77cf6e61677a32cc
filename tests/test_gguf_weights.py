"""Weights in RAM: mapped or copied, the same bytes."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.data import tiny_model_path
from engine.errors import DeviceError, GGUFError
from engine.gguf import GGUFFile, WeightMemory, reader, weights


@pytest.fixture
def file(data: Path) -> GGUFFile:
    return GGUFFile.open(data / "golden" / "qwen3moe" / "qwen3moe-split-Q8_0-00001-of-00003.gguf")


@pytest.mark.parametrize("n_threads", [0, 1, 3])
@pytest.mark.parametrize("piece", [1000, 1 << 24])
def test_both_modes_hold_the_same_bytes(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch, n_threads: int, piece: int
) -> None:
    monkeypatch.setattr(reader, "_READ_BYTES", piece)
    with (
        WeightMemory.load(file, file.tensors, "mmap") as mapped,
        WeightMemory.load(file, file.tensors, "memory", n_threads=n_threads) as copied,
    ):
        assert (mapped.mode, copied.mode) == ("mmap", "memory")
        assert mapped.n_bytes == copied.n_bytes == sum(t.n_bytes for t in file.tensors.values())
        for name, info in file.tensors.items():
            a, b = mapped.array(name), copied.array(name)
            assert a.shape == b.shape == (info.n_bytes,)
            assert np.array_equal(a, b)
            assert not a.flags.writeable
            assert not b.flags.writeable
            assert b.ctypes.data % 4096 == 0


def test_tensors_in_memory_have_pages_of_their_own_with_some_bytes_behind_them() -> None:
    """Also where they would fill their pages exactly: a GPU that reads a row there reads whole words."""
    with GGUFFile.open(tiny_model_path()) as file, WeightMemory.load(file, file.tensors, "memory") as memory:
        ends = sorted((a.ctypes.data, a.nbytes) for a in map(memory.array, file.tensors))
        last = np.asarray(memory.array(next(iter(file.tensors))).base)
        assert any(n_bytes % 4096 == 0 for _, n_bytes in ends)
        for (start, n_bytes), (following, _) in pairwise([*ends, (last.ctypes.data + last.nbytes, 0)]):
            assert -(-(start + n_bytes + 16) // 4096) * 4096 <= following


def test_holds_the_tensors_asked_for_once(file: GGUFFile) -> None:
    name = "blk.0.attn_q.weight"
    with WeightMemory.load(file, [name, name], "memory") as memory:
        assert memory.n_bytes == file.tensors[name].n_bytes
        with pytest.raises(KeyError):
            memory.array("output.weight")
    with WeightMemory.load(file, [], "memory") as memory:
        assert memory.n_bytes == 0


@pytest.mark.parametrize("mode", ["mmap", "memory"])
def test_reports_progress_up_to_the_end(file: GGUFFile, mode: str) -> None:
    seen: list[tuple[int, int]] = []
    memory = WeightMemory.load(file, file.tensors, mode, progress=lambda done, total: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (memory.n_bytes, memory.n_bytes)
    assert {total for _, total in seen} == {memory.n_bytes}


def test_an_error_in_progress_ends_the_load(file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_READ_BYTES", 1000)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WeightMemory.load(file, file.tensors, "memory", n_threads=2, progress=interrupt)
    assert WeightMemory.load(file, file.tensors, "memory", n_threads=2).n_bytes  # nothing is left broken


def test_arrays_outlive_a_closed_owner(file: GGUFFile) -> None:
    memory = WeightMemory.load(file, file.tensors, "memory")
    array = memory.array("output.weight")
    total = int(array.sum())
    memory.close()
    file.close()
    assert int(array.sum()) == total


def test_says_how_much_ram_is_missing(file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "available_memory", lambda: 1000)
    with pytest.raises(DeviceError, match=r"the weights need 0\.0 GB of RAM, and 0\.0 GB are free; close"):
        WeightMemory.load(file, file.tensors, "memory")
    assert WeightMemory.load(file, file.tensors, "mmap").n_bytes > 1000  # needs none of its own


def test_says_when_the_system_refuses(file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(weights.mmap, "mmap", refuse)
    with pytest.raises(DeviceError, match=r"gave no memory for .* Cannot allocate memory"):
        WeightMemory.load(file, file.tensors, "memory")


def test_a_file_that_changes_under_us_is_an_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shutil.copy(data / "golden" / "qwen3moe" / "qwen3moe-micro-Q8_0.gguf", tmp_path))
    file = GGUFFile.open(path)
    with path.open("r+b") as handle:
        handle.truncate(file.n_bytes // 2)
    with pytest.raises(GGUFError, match="has changed since it was opened; open it again"):
        WeightMemory.load(file, file.tensors, "memory")
    monkeypatch.setattr(reader, "_identity", lambda _: file._identities[0])  # it changes between two reads
    with pytest.raises(GGUFError, match="became shorter while it was read"):
        WeightMemory.load(file, file.tensors, "memory")
    path.unlink()
    with pytest.raises(GGUFError, match="cannot be read: No such file"):
        WeightMemory.load(file, file.tensors, "memory")
