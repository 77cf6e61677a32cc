"""Every weight format at every instruction-set level: bits against the slow reference, sizes, threads, extremes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import canonical
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _kernels
from engine.quants import install_grids, reference
from engine.quants.formats import BY_NAME, BY_TYPE, FORMATS, Activation, QuantFormat

install_grids()

LEVELS = _kernels.isa_levels()
INTEGER = [f for f in FORMATS if f.activation != Activation.F32]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
each_level = pytest.mark.parametrize("isa", LEVELS)
few = settings(max_examples=8)
seeds = st.integers(0, 2**32 - 1)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def random_rows(fmt: QuantFormat, n_rows: int, n_cols: int, seed: int = 0) -> np.ndarray:
    rows = np.empty((n_rows, fmt.row_bytes(n_cols)), np.uint8)
    _kernels.fill_random_blocks(fmt.ggml_type, rows, n_cols, seed)
    return rows


def normal(n_tokens: int, n_cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_tokens, n_cols)).astype(np.float32)


def extreme_rows(fmt: QuantFormat, n_rows: int, n_cols: int, seed: int) -> np.ndarray:
    """Rows whose quants are as far from zero as they go, in turn and mixed, with the scales of random rows."""
    rows = random_rows(fmt, n_rows, n_cols, seed).reshape(-1, fmt.block_bytes)
    is_scale = np.zeros(fmt.block_bytes, bool)
    for name, at in (("MXFP4", 0), *canonical.SCALE_AT.items(), *canonical.OFFSET_AT.items()):
        if name == fmt.name:
            is_scale[at : at + (1 if name == "MXFP4" else 2)] = True
    if fmt.name == "IQ1_M":
        is_scale[48:56] = True
    rng = np.random.default_rng(seed)
    fills = np.array([0x00, 0xFF, 0x80, 0x7F, 0x88, 0x77], np.uint8)
    values = np.where(
        rng.random((len(rows), 1)) < 0.7,
        rng.choice(fills, (len(rows), 1)),
        rng.choice(fills, (len(rows), fmt.block_bytes)),
    )
    return np.where(is_scale, rows, values).reshape(n_rows, -1)


# -- the reference itself ----------------------------------------------------------------------------------------------


@given(*[st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)] * 3)
def test_the_references_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    found = canonical.fma(*(np.array(v, np.float32) for v in (a, b, c)))
    neighbours = [np.nextafter(found, np.float32(s)) for s in (-np.inf, np.inf)]
    distance = abs(exact - Fraction(float(found)))
    assert all(distance <= abs(exact - Fraction(float(n))) for n in neighbours)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_table() -> None:
    for ggml_type in range(64):
        fmt = BY_TYPE.get(ggml_type)
        expected = (fmt.block_size, fmt.block_bytes, fmt.activation) if fmt else None
        assert _kernels.format_facts(ggml_type) == expected


@each_format
def test_dequantizing_is_exact(fmt: QuantFormat, data: Path) -> None:
    with np.load(data / "golden" / "quants" / "dequant_rows.npz") as file:
        named = {BY_TYPE[int(file[f"id_{name}"])].name: name for name in file["types"]}
        if fmt.name in named:
            raw, expected = file[f"raw_{named[fmt.name]}"], file[f"f32_{named[fmt.name]}"]
        else:
            raw = random_rows(fmt, 8, 512)
            expected = reference.dequantize(fmt, raw, 512)
    assert np.array_equal(bits(_kernels.dequantize(fmt.ggml_type, raw, 512)), bits(expected))
    rows = random_rows(fmt, 50, 3 * fmt.block_size, seed=5)
    found = _kernels.dequantize(fmt.ggml_type, rows, 3 * fmt.block_size)
    assert np.array_equal(bits(found), bits(reference.dequantize(fmt, rows, 3 * fmt.block_size)))


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("Q4_K", np.zeros((256, 8), np.int8)),
        ("IQ2_XXS", np.zeros((255, 8), np.int8)),
        ("IQ2_XXS", (np.arange(256 * 8) % 5).astype(np.int8)),  # 2 bits tell four values apart
        ("IQ3_S", (np.arange(512 * 4) % 9).astype(np.int8)),
    ],
)
def test_what_is_no_grid_is_refused_and_changes_nothing(name: str, grid: np.ndarray) -> None:
    fmt = BY_NAME["IQ2_XXS" if name == "Q4_K" else name]
    raw, x = random_rows(fmt, 5, 512), normal(3, 512)
    before = [_kernels.matmul(fmt.ggml_type, raw, x, 1, isa) for isa in LEVELS]
    with pytest.raises(ValueError, match=f"{name} has no grid of {grid.size} bytes"):
        _kernels.set_grids({name: grid})
    for isa, expected in zip(LEVELS, before, strict=True):
        assert np.array_equal(bits(_kernels.matmul(fmt.ggml_type, raw, x, 1, isa)), bits(expected))


# -- activations -------------------------------------------------------------------------------------------------------


def activation_parts(rows: np.ndarray, n_cols: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, scales and sums of quantised rows."""
    up = lambda n: -(-n // 64) * 64  # noqa: E731
    at_d = up(n_cols)
    at_sums = at_d + up(n_cols // group * 4)
    d = rows[:, at_d : at_d + n_cols // group * 4].copy().view(np.float32)
    return rows[:, :n_cols].view(np.int8), d, rows[:, at_sums : at_sums + n_cols // 16 * 2].copy().view(np.int16)


@each_level
@pytest.mark.parametrize("form", list(canonical.GROUP), ids=lambda f: f.name)
@few
@given(seed=seeds, n_groups=st.integers(1, 9), scale=st.sampled_from([1.0, 1e-38, 1e-42, 1e30, 3e38]))
def test_activations_are_rounded_as_written_down(isa: str, form: Activation, seed: int, n_groups: int, scale: float):
    group = canonical.GROUP[form]
    rng = np.random.default_rng(seed)
    with np.errstate(under="ignore"):
        x = (rng.uniform(-1, 1, (3, n_groups * group)) * scale).astype(np.float32)
    x[1, :group] = 0.0
    x[2, :group] = np.float32(127.0 * scale if scale < 1e30 else scale) * rng.choice([0.5, 1.0, -1.0], group).astype(
        "f4"
    )
    found = _kernels.quantize_activations(x, form, isa)
    q, d, sums = activation_parts(found, x.shape[1], group)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        expected_q, expected_d = canonical.quantize(x, group)
    assert np.array_equal(bits(d), bits(expected_d))
    tiny = np.repeat(expected_d, group, axis=1) < 1e-36  # 127 / amax is infinite or nearly so: any value will do
    assert np.array_equal(q[~tiny], expected_q[~tiny])
    assert np.array_equal(sums, q.astype(np.int64).reshape(3, -1, 16).sum(-1))


SPECIAL = [0.0, -0.0, 1e-45, -1e-38, 1e-30, 0.5, -1.5, 63.5, 127.0, 3e38, np.inf, -np.inf, np.nan]


@each_level
@pytest.mark.parametrize("form", list(canonical.GROUP), ids=lambda f: f.name)
@settings(max_examples=40)
@given(data=st.data())
def test_activations_of_any_bits(isa: str, form: Activation, data: st.DataObject) -> None:
    """A NaN counts as nothing in the largest magnitude and becomes -127, as does 0 times an infinite factor."""
    group = canonical.GROUP[form]
    five = data.draw(st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), min_size=5, max_size=5))
    places = np.random.default_rng(data.draw(seeds)).integers(0, 5, group)
    x = np.vstack([np.array(five, np.float32)[places], np.full(group, five[0], np.float32)])
    with np.errstate(all="ignore"):
        amax = np.nanmax(np.abs(x), axis=1, keepdims=True, initial=0)
        product = x * np.where(amax > 0, np.float32(127) / amax, np.float32(0)).astype(np.float32)
        expected = np.rint(np.clip(np.where(np.isnan(product), np.float32(-127), product), -127, 127))
    q, d, sums = activation_parts(_kernels.quantize_activations(x, form, isa), group, group)
    assert np.array_equal(bits(d), bits(amax / np.float32(127)))
    assert np.array_equal(q, expected)
    assert np.array_equal(sums, q.astype(np.int64).reshape(2, -1, 16).sum(-1))


# -- products ----------------------------------------------------------------------------------------------------------


@each_level
@each_format
@few
@given(
    seed=seeds,
    n_rows=st.integers(1, 13),
    n_tokens=st.sampled_from([1, 1, 2, 3, 4, 5, 8, 9, 17]),
    n_blocks=st.integers(1, 5),
    extreme=st.booleans(),
)
def test_products_have_the_bits_of_the_reference(
    fmt: QuantFormat, isa: str, seed: int, n_rows: int, n_tokens: int, n_blocks: int, extreme: bool
) -> None:
    n_cols = n_blocks * fmt.block_size + (seed % 40 if fmt.block_size == 1 else 0)
    make = extreme_rows if extreme and fmt in INTEGER else random_rows
    raw, x = make(fmt, n_rows, n_cols, seed), normal(n_tokens, n_cols, seed)
    if extreme:
        x = np.sign(x) * np.float32(3)
    found = _kernels.matmul(fmt.ggml_type, raw, x, 1, isa)
    assert np.array_equal(bits(found), bits(canonical.matmul(fmt, raw, x)))


@each_format
def test_levels_threads_and_batches_change_no_bit(fmt: QuantFormat) -> None:
    n_rows, n_cols, n_tokens = 150, 512 if fmt.block_size > 1 else 509, 131
    raw, x = random_rows(fmt, n_rows, n_cols, seed=3), normal(n_tokens, n_cols, seed=3)
    expected = bits(_kernels.matmul(fmt.ggml_type, raw, x, 1, LEVELS[0]))
    for isa in LEVELS:
        for n_threads in (1, 2, 3):
            assert np.array_equal(bits(_kernels.matmul(fmt.ggml_type, raw, x, n_threads, isa)), expected)
        alone = np.concatenate([_kernels.matmul(fmt.ggml_type, raw, x[i : i + 1], 1, isa) for i in range(0, 131, 11)])
        assert np.array_equal(bits(alone), expected[::11])
        for first, end in ((0, 2), (2, 9), (9, 41), (41, 131)):
            part = _kernels.matmul(fmt.ggml_type, raw, x[first:end], 2, isa)
            assert np.array_equal(bits(part), expected[first:end])


@pytest.mark.parametrize("n_tokens", [2, 3, 4, 5, 6, 7, 8])
@each_format
def test_few_tokens_and_long_rows_change_no_bit(fmt: QuantFormat, n_tokens: int) -> None:
    """More columns than a product with a few tokens keeps at a time."""
    n_rows, n_cols = 134, 2560 if fmt.block_size > 1 else 2051
    raw, x = random_rows(fmt, n_rows, n_cols, seed=5), normal(n_tokens, n_cols, seed=5)
    found = [_kernels.matmul(fmt.ggml_type, raw, x, 1, isa) for isa in LEVELS]
    alone = np.concatenate([_kernels.matmul(fmt.ggml_type, raw, x[i : i + 1]) for i in range(n_tokens)])
    assert all(np.array_equal(bits(each), bits(alone)) for each in found)


@pytest.mark.parametrize("n_tokens", [1, 8])
@each_format
def test_rows_of_the_longest_tasks_change_no_bit(fmt: QuantFormat, n_tokens: int) -> None:
    """So many rows that a thread's eight tasks would be longer than any may be."""
    n_rows, n_cols = 8 * 512 + 70, 256
    raw, x = random_rows(fmt, n_rows, n_cols, seed=7), normal(n_tokens, n_cols, seed=7)
    parts = [_kernels.matmul(fmt.ggml_type, raw[i : i + 60], x) for i in range(0, n_rows, 60)]
    assert np.array_equal(bits(_kernels.matmul(fmt.ggml_type, raw, x)), bits(np.concatenate(parts, axis=1)))


@pytest.mark.parametrize("n_tokens", [1, 2, 7])
@each_format
def test_very_long_rows_change_no_bit(fmt: QuantFormat, n_tokens: int) -> None:
    """More columns than a token's activations are put in order for at a time, and no whole number of 256."""
    n_rows, n_cols = 5, 9216 + (96 if fmt.block_size == 32 else 0)
    raw, x = random_rows(fmt, n_rows, n_cols, seed=6), normal(n_tokens, n_cols, seed=6)
    found = [_kernels.matmul(fmt.ggml_type, raw, x, 1, isa) for isa in LEVELS]
    assert all(np.array_equal(bits(each), bits(found[0])) for each in found)


@each_format
def test_the_error_against_exact_arithmetic_is_that_of_the_activations(fmt: QuantFormat) -> None:
    """8-bit activations cost about 0.4 % of the norm of the result for normal values; float formats nothing."""
    n_cols = 3072
    raw, x = random_rows(fmt, 200, n_cols, seed=4), normal(5, n_cols, seed=4)
    exact = x.astype(np.float64) @ reference.dequantize(fmt, raw, n_cols).astype(np.float64).T
    found = _kernels.matmul(fmt.ggml_type, raw, x)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    bound = {Activation.F32: 1e-6, Activation.Q8_32: 6e-3, Activation.Q8_256: 8e-3}[fmt.activation]
    assert error < bound
    if fmt.activation != Activation.F32:
        assert error > 1e-4  # the activations really are rounded


@each_level
@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 254, 255])
@pytest.mark.parametrize("n_tokens", [1, 3, 9])
def test_every_exponent_of_mxfp4_is_a_power_of_two(isa: str, n_tokens: int, exponent: int) -> None:
    """The least ones are subnormal; the greatest is what no doubled float32 holds."""
    fmt, n_cols = BY_NAME["MXFP4"], 9 * 32
    raw, x = random_rows(fmt, 6, n_cols), normal(n_tokens, n_cols) * np.float32(2e-6 if exponent > 127 else 1)
    raw[:, :: fmt.block_bytes] = exponent
    found = _kernels.matmul(fmt.ggml_type, raw, x, 1, isa)
    assert np.isfinite(found).all()
    assert np.array_equal(bits(found), bits(canonical.matmul(fmt, raw, x)))


@each_level
def test_numbers_that_are_none_do_not_crash(isa: str) -> None:
    for fmt in FORMATS:
        n_cols = 2 * max(fmt.block_size, 32)
        raw, x = np.full((5, fmt.row_bytes(n_cols)), 0xFF, np.uint8), np.full((3, n_cols), np.nan, np.float32)
        assert _kernels.matmul(fmt.ggml_type, raw, x, 1, isa).shape == (3, 5)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused() -> None:
    q4_k = BY_NAME["Q4_K"]
    raw, x = random_rows(q4_k, 4, 512), normal(2, 512)
    with pytest.raises(ValueError, match="bytes a row"):
        _kernels.matmul(q4_k.ggml_type, raw[:, :-1].copy(), x)
    with pytest.raises(ValueError, match="256"):
        _kernels.matmul(q4_k.ggml_type, raw, x[:, :500].copy())
    with pytest.raises(ValueError, match="ggml"):
        _kernels.matmul(9, raw, x)
    with pytest.raises(ValueError, match="n_threads"):
        _kernels.matmul(q4_k.ggml_type, raw, x, 0)
    with pytest.raises(ValueError, match="level"):
        _kernels.matmul(q4_k.ggml_type, raw, x, 1, "avx9")


def test_fast_formats_are_known_formats() -> None:
    for isa in LEVELS:
        assert set(_kernels.fast_formats(isa)) <= set(BY_TYPE)
    if LEVELS[-1] != "scalar":
        fast = {BY_TYPE[t].name for t in _kernels.fast_formats(LEVELS[-1])}
        assert {"Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4"} <= fast
