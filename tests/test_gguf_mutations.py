"""Some hundred damaged files: each runs or raises an `EngineError`, and nothing crashes, hangs or eats memory."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_mutations import damage_bytes, damage_parts, exercise, small_models

from engine.errors import GGUFError
from engine.gguf.reader import GGUFFile
from engine.models import load_model

OUTCOMES = {"ran", "GGUFError", "UnsupportedModelError"}


@pytest.mark.parametrize("model", range(4))
def test_the_undamaged_files_run(tmp_path: Path, model: int) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(small_models()[model].encode())
    assert exercise(path) == "ran"


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    parts = small_models()[0]
    content, n_head = parts.encode(), parts.n_head_bytes
    path = tmp_path / "cut.gguf"
    cuts = [*range(40), *range(40, n_head, 41), *range(n_head, len(content) - 32, 1501), len(content) - 32 - 1]
    assert len(cuts) > 100
    for n_bytes in cuts:
        path.write_bytes(content[:n_bytes])
        assert exercise(path) == "GGUFError", n_bytes


@pytest.mark.parametrize("seed", range(4))
def test_damaged_heads(tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "damaged.gguf"
    parts = small_models()[seed]
    content, n_head = parts.encode(), parts.n_head_bytes
    outcomes = set()
    for _ in range(100):
        path.write_bytes(damage_bytes(rng, content, n_head))
        outcomes.add(exercise(path))
    assert "GGUFError" in outcomes <= OUTCOMES


@pytest.mark.parametrize("seed", range(4))
def test_well_formed_files_that_contradict_themselves(tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "changed.gguf"
    outcomes = set()
    for _ in range(100):
        path.write_bytes(damage_parts(rng, small_models()[seed]).encode(rng))
        outcomes.add(exercise(path))
    assert "GGUFError" in outcomes <= OUTCOMES


def test_a_damaged_golden_file(data: Path, tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "damaged.gguf"
    content = (data / "golden" / "qwen3moe" / "qwen3moe-micro-Q8_0.gguf").read_bytes()
    outcomes = set()
    for _ in range(50):
        path.write_bytes(damage_bytes(rng, content, 16_000))
        outcomes.add(exercise(path))
    assert "GGUFError" in outcomes <= OUTCOMES


@pytest.mark.parametrize("model", [0, 1])
def test_more_blocks_than_tensors_are_refused_at_once(tmp_path: Path, model: int) -> None:
    parts, path = small_models()[model], tmp_path / "blocks.gguf"
    key = f"{parts.values['general.architecture']}.block_count"
    path.write_bytes(replace(parts, values={**parts.values, key: (1 << 31) - 1}).encode())
    with GGUFFile.open(path) as file, pytest.raises(GGUFError, match=rf"{key} is 2147483647; .*number of tensors"):
        load_model(file)
