"""Random weights of every format: valid, of the right size, and the same for every number of threads."""

from __future__ import annotations

import numpy as np
import pytest

from engine import _kernels
from engine.quants import install_grids
from engine.quants.formats import FORMATS, QuantFormat

N_COLS = 768

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def fill(fmt: QuantFormat, n_rows: int, seed: int, n_threads: int = 1, n_cols: int = N_COLS) -> np.ndarray:
    install_grids()
    rows = np.full((n_rows, fmt.row_bytes(n_cols)), 0xAA, np.uint8)
    _kernels.fill_random_blocks(fmt.ggml_type, rows, n_cols, seed, n_threads)
    return rows


@each_format
@pytest.mark.parametrize("n_cols", [256, 3072])
def test_values_are_finite_and_of_the_right_size(fmt: QuantFormat, n_cols: int) -> None:
    values = _kernels.dequantize(fmt.ggml_type, fill(fmt, 64, 7, n_cols=n_cols), n_cols)
    assert np.isfinite(values).all()
    assert np.std(values) * n_cols**0.5 == pytest.approx(1, rel=0.45)  # MXFP4 knows powers of two only
    assert abs(values.mean()) < 0.1 * np.std(values)


@each_format
def test_threads_and_rows_change_nothing(fmt: QuantFormat) -> None:
    n_rows = 2 * (1 << 19) // fmt.row_bytes(N_COLS) + 3  # some pieces of work
    rows = fill(fmt, n_rows, 7)
    np.testing.assert_array_equal(rows, fill(fmt, n_rows, 7, n_threads=3))
    np.testing.assert_array_equal(rows[:5], fill(fmt, 5, 7))
    assert (rows != fill(fmt, n_rows, 8)).mean() > 0.5


def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes a row"):
        _kernels.fill_random_blocks(12, np.zeros((2, 100), np.uint8), 256, 0)
