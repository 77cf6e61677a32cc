"""The reference of every weight format: bit for bit what ggml computes."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf.quants
import numpy as np
import pytest

from engine.errors import UnsupportedModelError
from engine.quants import reference
from engine.quants.formats import BY_NAME, BY_TYPE, FORMATS
from engine.quants.grids import GRID_NAMES, load_grid

NAMES = [f.name for f in FORMATS]
NOT_IN_GGUF_PY = {"Q1_0", "Q2_0"}
NOT_GOLDEN = {"F32"}


@pytest.fixture(scope="module")
def golden(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each format: rows of 512 weights, uint8 [8, row_bytes], and what ggml makes of them, float32 [8, 512]."""
    with np.load(data / "golden" / "quants" / "dequant_rows.npz") as file:
        return {
            BY_TYPE[int(file[f"id_{name}"])].name: (file[f"raw_{name}"], file[f"f32_{name}"]) for name in file["types"]
        }


def test_golden_rows_cover_every_format(golden: dict) -> None:
    assert set(golden) == set(NAMES) - NOT_GOLDEN


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_GOLDEN))
def test_equals_ggml_bit_for_bit(golden: dict, name: str) -> None:
    raw, expected = golden[name]
    found = reference.dequantize(BY_NAME[name], raw, 512)
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_IN_GGUF_PY))
def test_equals_gguf_py_on_any_bytes(name: str) -> None:
    weight_format = BY_NAME[name]
    n_cols = 3 * weight_format.block_size
    rng = np.random.default_rng(weight_format.ggml_type)
    raw = rng.integers(0, 256, (200, weight_format.row_bytes(n_cols)), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # some of these bytes are infinite or no numbers
        found = reference.dequantize(weight_format, raw, n_cols)
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(weight_format.ggml_type))
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    assert np.array_equal(found[finite], expected[finite])
    assert not np.isfinite(found[~finite]).any()


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_IN_GGUF_PY))
def test_sizes_are_those_of_gguf_py(name: str) -> None:
    weight_format = BY_NAME[name]
    kind = gguf.GGMLQuantizationType(weight_format.ggml_type)
    assert kind.name == name
    assert gguf.GGML_QUANT_SIZES[kind] == (weight_format.block_size, weight_format.block_bytes)


def test_a_row_is_whole_blocks() -> None:
    assert BY_NAME["Q4_K"].row_bytes(512) == 288
    with pytest.raises(UnsupportedModelError, match="a row of 500 weights cannot be Q4_K: expected a multiple of 256"):
        BY_NAME["Q4_K"].row_bytes(500)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_code_books(name: str) -> None:
    shapes = {"IQ2_XXS": (256, 8), "IQ2_XS": (512, 8), "IQ2_S": (1024, 8), "IQ3_XXS": (256, 4), "IQ3_S": (512, 4)}
    grid = load_grid(name)
    assert grid.dtype == np.int8
    assert grid.shape == shapes.get(name, (2048, 8))
    assert not grid.flags.writeable
    assert len(np.unique(grid, axis=0)) == len(grid)
