"""Arithmetic of every weight format at every instruction-set level, with the weights in the second-level cache.

One thread, a matrix of half a megabyte, one token or a batch. What memory can give is left out on purpose
(`python -m engine.bench --kernels` has that): a kernel that is slower here than memory is what limits a token.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine import _kernels
from engine.quants import install_grids
from engine.quants.formats import FORMATS, Activation, QuantFormat

N_COLS, MATRIX_BYTES, N_PRODUCTS = 3072, 1 << 19, 8

install_grids()


@pytest.mark.parametrize("n_tokens", [1, 64])
@pytest.mark.parametrize("isa", _kernels.isa_levels())
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_product(benchmark, fmt: QuantFormat, isa: str, n_tokens: int) -> None:
    """Several products on the same matrix are one program, so that the call costs next to nothing."""
    n_rows = MATRIX_BYTES // fmt.row_bytes(N_COLS) // 8 * 8
    matrix = np.empty((n_rows, fmt.row_bytes(N_COLS)), np.uint8)
    _kernels.fill_random_blocks(fmt.ggml_type, matrix, N_COLS, 1)
    x = np.random.Generator(np.random.PCG64(1)).standard_normal((n_tokens, N_COLS), np.float32)
    rows = x if fmt.activation == Activation.F32 else _kernels.quantize_activations(x, fmt.activation, isa)
    outputs = [np.empty((n_tokens, n_rows), np.float32) for _ in range(N_PRODUCTS)]
    program = _kernels.Program(n_tokens, 1, 1, isa)
    weights = [(matrix.ctypes.data, fmt.ggml_type, n_rows, out.ctypes.data, n_rows, 0, 0) for out in outputs]
    program.linear(rows.ctypes.data, rows.strides[0], N_COLS, weights, _kernels.ROWS_TOKENS)
    step = _kernels.Step(n_tokens)
    step.n_tokens = n_tokens
    step.positions[:] = range(n_tokens)
    benchmark(program.run, step)
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median / N_PRODUCTS
    benchmark.extra_info["GB/s of weights"] = round(matrix.nbytes / seconds / 1e9, 2)
    benchmark.extra_info["GMAC/s"] = round(n_rows * N_COLS * n_tokens / seconds / 1e9, 2)
