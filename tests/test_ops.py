"""Every operation against its formula in float64, and its bits over levels, threads and cuts of the prompt."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_case import UNTOUCHED, Case, blocks, normal

from engine import _kernels as k
from engine.quants.formats import BY_NAME

few = settings(max_examples=12)
more = settings(max_examples=25)
seeds = st.integers(0, 2**32 - 1)
widths = st.integers(1, 90)
token_counts = st.integers(1, 21)


def f64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-f64(x)))


def silu(x: np.ndarray) -> np.ndarray:
    return f64(x) * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    return f64(x) * (1 + np.tanh(math.sqrt(2 / math.pi) * (f64(x) + 0.044715 * f64(x) ** 3))) / 2


def situ(gate: np.ndarray, up: np.ndarray, limit: float, up_limit: float) -> np.ndarray:
    capped = up_limit * np.tanh(f64(up) / up_limit) if up_limit else f64(up)
    return limit * np.tanh(f64(gate) / limit) * sigmoid(gate) * capped


GATINGS = {
    k.GATE_SIGMOID: sigmoid,
    k.GATE_SILU: silu,
    k.GATE_SOFTPLUS: lambda x: np.logaddexp(0, x),
    k.GATE_RELU: lambda x: np.maximum(x, 0),
    k.GATE_PRODUCT: lambda x: x,
    k.GATE_GELU: gelu,
    k.GATE_CLAMPED_SWISH: lambda x: np.minimum(x, 7) * sigmoid(1.702 * np.minimum(x, 7)),
    k.GATE_CLAMPED_SILU: silu,
}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(f64(x) - f64(x).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dequantized(format_name: str, raw: np.ndarray, n_cols: int) -> np.ndarray:
    return f64(k.dequantize(BY_NAME[format_name].ggml_type, raw, n_cols))


def rounded_activations(x: np.ndarray, format_name: str) -> np.ndarray:
    """What a format's product sees of x: float32 itself, or 8 bits a value with one scale a group."""
    group = {0: 1, 1: 256, 2: 32}[int(BY_NAME[format_name].activation)]
    if group == 1:
        return f64(x)
    grouped = x.reshape(-1, group)
    largest = np.abs(grouped).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0)).astype(np.float32)
    q = np.clip(np.rint(grouped * inverse), -127, 127)
    return (f64(q) * f64(largest / np.float32(127))).reshape(x.shape)


def quantize(program: k.Program, x: tuple[int, int], n_cols: int, format_name: str, out: int) -> tuple[int, int]:
    """Record what puts x into the form a format takes; returns where that is, and the bytes of a row."""
    activation = int(BY_NAME[format_name].activation)
    if activation == 0:
        return x[0], 4 * x[1]
    program.quantize(*x, n_cols, activation, out, k.ROWS_TOKENS)
    return out, k.activation_bytes(activation, n_cols)


def activation_bytes(format_name: str, n_cols: int) -> int:
    return k.activation_bytes(int(BY_NAME[format_name].activation), n_cols)


# -- one row at a time -------------------------------------------------------------------------------------------------


@few
@given(seeds, token_counts, st.sampled_from([("F32", 37), ("Q8_0", 96), ("Q4_K", 512)]), st.sampled_from([1.0, 12.5]))
def test_embed(seed: int, n: int, table: tuple[str, int], scale: float) -> None:
    format_name, n_cols = table
    raw = blocks(format_name, seed, 50, n_cols)
    ids = np.random.default_rng(seed).integers(0, 50, n)

    def record(program: k.Program, at) -> None:
        program.embed(at.table, BY_NAME[format_name].ggml_type, 50, n_cols, *at.out, scale)

    case = Case(record, {}, {"out": (n_cols, np.float32)}, {"table": raw}, token_ids=ids)
    case.check({"out": dequantized(format_name, raw, n_cols)[ids] * scale}, rtol=1e-7)


@few
@given(seeds, token_counts, st.sampled_from([("F32", 37), ("Q8_0", 96), ("Q4_K", 256)]), st.integers(1, 5))
def test_embed_rows_with_ids_of_their_own(seed: int, n: int, table: tuple[str, int], n_ids: int) -> None:
    format_name, n_cols = table
    raw = blocks(format_name, seed, 50, n_cols)
    ids = np.random.default_rng(seed).integers(0, 50, (n, n_ids), np.int32)

    def record(program: k.Program, at) -> None:
        what = BY_NAME[format_name].ggml_type, 50, n_cols
        program.embed(at.table, *what, *at.out, 2.0, *at.ids, n_ids)

    case = Case(record, {"ids": ids}, {"out": (n_ids * n_cols, np.float32)}, {"table": raw})
    case.check({"out": dequantized(format_name, raw, n_cols)[ids].reshape(n, -1) * 2}, rtol=1e-7)


@more
@given(
    seeds,
    st.lists(st.integers(1, 15), min_size=1, max_size=3),
    st.integers(2, 8),
    st.integers(1, 3),
    st.sampled_from([2, 5, 1000]),
)
def test_hash_tokens(seed: int, lengths: list[int], n_hashed: int, n_heads: int, n_ids: int) -> None:
    """Of few ids one in two, or five, is where n-grams end."""
    slots, rng, end_id = np.repeat(np.arange(len(lengths)), lengths), np.random.default_rng(seed), 1
    tokens, width = rng.integers(0, n_ids, len(slots)), n_heads * (n_hashed - 1)
    multipliers = rng.integers(0, 2**64, n_hashed, np.uint64)
    sizes = rng.integers(1, 2**31, width).astype(np.uint32)
    offsets = rng.integers(0, 2**31 - sizes.astype(np.int64)).astype(np.uint32)

    def record(program: k.Program, at) -> None:
        program.hash_tokens(at.state, *at.out, at.multipliers, at.sizes, at.offsets, n_hashed, width, end_id)

    exact = np.empty((len(slots), width), np.int32)
    for slot in range(len(lengths)):
        rows = np.flatnonzero(slots == slot)
        for i, row in enumerate(rows):
            ids = [int(tokens[row])]
            for back in range(1, n_hashed):
                is_over = back > i or end_id in [int(tokens[rows[i - b]]) for b in range(1, back + 1)]
                ids.append(end_id if is_over else int(tokens[rows[i - back]]))
            for head in range(width):
                mixed = 0
                for id, multiplier in zip(ids[: 2 + head // n_heads], multipliers, strict=False):
                    mixed ^= id * int(multiplier) % 2**64
                exact[row, head] = mixed % int(sizes[head]) + int(offsets[head])
    case = Case(
        record,
        {},
        {"out": (width, np.int32)},
        {"multipliers": multipliers, "sizes": sizes, "offsets": offsets},
        {"state": 4 * len(lengths) * (n_hashed - 1)},
        slots=slots,
        n_slots=len(lengths),
        token_ids=tokens,
    )
    case.check({"out": exact}, rtol=0, atol=0)


@few
@given(seeds, token_counts, st.integers(1, 5), st.integers(1, 80), *[st.booleans()] * 4)
def test_rms_norm(
    seed: int, n: int, n_groups: int, size: int, of_columns: bool, in_place: bool, centers: bool, has_bias: bool
) -> None:
    x = normal(seed, n, n_groups * size) * 3 + 1
    weight, bias = (normal(seed + i, n_groups if of_columns else 1, size) for i in (1, 2))

    def record(program: k.Program, at) -> None:
        out = at.x if in_place else at.out
        vectors, sizes = (at.weight, at.bias * has_bias), (n_groups, size, size * of_columns)
        program.rms_norm(*at.x, *vectors, *out, *sizes, centers, 1e-5, k.ROWS_TOKENS)

    grouped = f64(x).reshape(n, n_groups, size)
    grouped -= centers * grouped.mean(-1, keepdims=True)
    spread = np.sqrt((grouped**2).mean(-1, keepdims=True) + 1e-5)
    exact = grouped / spread * weight + has_bias * bias
    lost = float((np.abs(x).reshape(grouped.shape) / spread).max())  # of the digits, where values are near their mean
    name, vectors = "x" if in_place else "out", {"weight": weight, "bias": bias}
    case = Case(record, {"x": x}, {"out": (n_groups * size, np.float32)}, vectors, results=(name,))
    case.check({name: exact.reshape(n, -1)}, atol=max(2e-6, 2e-7 * lost * centers))


@few
@given(seeds, token_counts, widths, st.booleans())
def test_add(seed: int, n: int, width: int, in_place: bool) -> None:
    a, b = normal(seed, n, width), normal(seed + 1, n, width)
    name = "a" if in_place else "out"
    case = Case(
        lambda program, at: program.add(*at.a, *at.b, *getattr(at, name), width, k.ROWS_TOKENS),
        {"a": a, "b": b},
        {"out": (width, np.float32)},
        results=(name,),
    )
    case.check({name: f64(a) + b}, rtol=1e-7)


@few
@given(seeds, token_counts, widths, st.sampled_from(sorted(GATINGS)), st.integers(1, 9), st.sampled_from([0.0, 0.5]))
def test_gate(seed: int, n: int, n_gates: int, kind: int, span: int, limit: float) -> None:
    width = n_gates * span
    x, gate = normal(seed, n, width), normal(seed + 1, n, n_gates) * 20
    if kind == k.GATE_CLAMPED_SWISH:  # beyond its own limit
        x, limit = x * 5, 0.0
    elif kind == k.GATE_CLAMPED_SILU:
        limit = 0.5
    case = Case(
        lambda program, at: program.gate(*at.x, *at.gate, *at.out, width, n_gates, kind, limit, 0.0, k.ROWS_TOKENS),
        {"x": x, "gate": gate},
        {"out": (width, np.float32)},
    )
    factor = GATINGS[kind](f64(np.minimum(gate, limit) if kind == k.GATE_CLAMPED_SILU else gate)).repeat(span, 1)
    if kind == k.GATE_CLAMPED_SWISH:
        x = f64(x).clip(-7, 7) + 1
    case.check({"out": np.minimum(factor, limit) * x.clip(-limit, limit) if limit else x * factor})


@few
@given(seeds, token_counts, widths, st.sampled_from(sorted(GATINGS)), st.integers(2, 5))
def test_gate_adds_streams_up(seed: int, n: int, width: int, kind: int, n_streams: int) -> None:
    x, gate = (normal(seed + i, n, n_streams * width) for i in range(2))
    limit = 0.5 if kind == k.GATE_CLAMPED_SILU else 0.0

    def record(program: k.Program, at) -> None:
        sizes = n_streams * width, n_streams * width, kind, limit, 0.0, k.ROWS_TOKENS, n_streams
        program.gate(*at.x, *at.gate, *at.out, *sizes)

    whole = Case(
        lambda program, at: record_gate(program, at, n_streams * width, kind, limit),
        {"x": x, "gate": gate},
        {"out": (n_streams * width, np.float32)},
    ).run()["out"]
    case = Case(record, {"x": x, "gate": gate}, {"out": (width, np.float32)})
    case.check({"out": f64(whole).reshape(n, n_streams, width).sum(1)})


def record_gate(program: k.Program, at, width: int, kind: int, limit: float) -> None:
    program.gate(*at.x, *at.gate, *at.out, width, width, kind, limit, 0.0, k.ROWS_TOKENS)


@few
@given(seeds, token_counts, widths, st.integers(1, 5), st.sampled_from([0.01, 3.0]))
def test_gate_by_agreement(seed: int, n: int, width: int, n_streams: int, size: float) -> None:
    a, b = (normal(seed + i, n, n_streams * width) * size for i in range(2))
    x, floor = normal(seed + 2, n, width), 1e-6
    a[0] = 0  # no agreement: half of x

    def record(program: k.Program, at) -> None:
        program.gate_by_agreement(*at.a, *at.b, *at.x, *at.out, n_streams, width, floor)

    agreement = (f64(a) * b).reshape(n, n_streams, width).sum(-1) / math.sqrt(width)
    gate = sigmoid(np.sign(agreement) * np.sqrt(np.maximum(np.abs(agreement), floor)))
    case = Case(record, {"a": a, "b": b, "x": x}, {"out": (n_streams * width, np.float32)})
    case.check({"out": (gate[..., None] * x[:, None]).reshape(n, -1)}, rtol=1e-4, atol=1e-4)


@few
@given(
    seeds,
    token_counts,
    widths,
    st.sampled_from([0.01, 1.0, 20.0]),
    st.sampled_from([0.5, 4.0, 100.0]),
    st.sampled_from([0.0, 7.0]),
)
def test_situ(seed: int, n: int, width: int, size: float, limit: float, own_limit: float) -> None:
    """As exact near 0 as elsewhere."""
    x, gate = normal(seed, n, width) * size, normal(seed + 1, n, width) * size
    kind = k.GATE_SITU
    case = Case(
        lambda program, at: program.gate(*at.x, *at.gate, *at.out, width, width, kind, limit, own_limit, k.ROWS_TOKENS),
        {"x": x, "gate": gate},
        {"out": (width, np.float32)},
    )
    case.check({"out": situ(gate, x, limit, own_limit)}, rtol=2e-6, atol=0)


@few
@given(seeds, token_counts, widths, st.booleans(), st.booleans())
def test_scale(seed: int, n: int, width: int, by_row: bool, in_place: bool) -> None:
    x, by = normal(seed, n, width), normal(seed + 1, n, 1)
    name = "x" if in_place else "out"
    case = Case(
        lambda program, at: program.scale(
            *at.x, *(at.by if by_row else (0, 0)), *getattr(at, name), width, 0.3, k.ROWS_TOKENS
        ),
        {"x": x, "by": by},
        {"out": (width, np.float32)},
        results=(name,),
    )
    case.check({name: f64(x) * np.float32(0.3) * (by if by_row else 1)}, rtol=3e-7)


@few
@given(seeds, token_counts, widths)
def test_scale_by_one_value_for_all_rows(seed: int, n: int, width: int) -> None:
    x, by = normal(seed, n, width), normal(seed + 1, 1)
    case = Case(
        lambda program, at: program.scale(*at.x, at.by, 0, *at.out, width, 0.3, k.ROWS_TOKENS),
        {"x": x},
        {"out": (width, np.float32)},
        {"by": by},
    )
    case.check({"out": f64(x) * np.float32(0.3) * by}, rtol=3e-7)


@few
@given(seeds, token_counts, widths, st.sampled_from([0.5, 30.0]), st.booleans())
def test_soft_cap(seed: int, n: int, width: int, cap: float, in_place: bool) -> None:
    """As exact near 0 as elsewhere."""
    x = normal(seed, n, width) ** 5 * 40
    name = "x" if in_place else "out"
    case = Case(
        lambda program, at: program.soft_cap(*at.x, *getattr(at, name), width, cap, k.ROWS_TOKENS),
        {"x": x},
        {"out": (width, np.float32)},
        results=(name,),
    )
    case.check({name: cap * np.tanh(f64(x) / cap)}, rtol=1e-6, atol=0)


@few
@given(seeds, token_counts, widths, st.booleans())
def test_clamp(seed: int, n: int, width: int, in_place: bool) -> None:
    x = normal(seed, n, width)
    name = "x" if in_place else "out"
    case = Case(
        lambda program, at: program.clamp(*at.x, *getattr(at, name), width, 0.7, k.ROWS_TOKENS),
        {"x": x},
        {"out": (width, np.float32)},
        results=(name,),
    )
    case.check({name: np.clip(x, -np.float32(0.7), np.float32(0.7))}, atol=0)


@few
@given(seeds, token_counts, widths, st.integers(0, 1), st.integers(1, 40), st.integers(0, 100_000))
def test_scale_by_position(seed: int, n: int, width: int, offset: int, period: int, start: int) -> None:
    x = normal(seed, n, width)
    case = Case(
        lambda program, at: program.scale_by_position(*at.x, width, offset, period, 0.1),
        {"x": x},
        results=("x",),
        start=start,
    )
    factor = 1 + 0.1 * np.log1p((start + np.arange(n) + offset) // period)
    case.check({"x": x * factor[:, None]}, rtol=3e-7)


@few
@given(seeds, token_counts, st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_split_and_join_heads(seed: int, n: int, n_heads: int, first: int, second: int, even: bool) -> None:
    second = first if even else second
    x = normal(seed, n, n_heads * (first + second))

    def record(program: k.Program, at) -> None:
        program.split_heads(*at.x, *at.first, *at.second, n_heads, first, second)
        program.join_heads(*at.first, *at.second, *at.again, n_heads, first, second)

    outputs = {
        name: (width, np.float32)
        for name, width in (("first", n_heads * first), ("second", n_heads * second), ("again", x.shape[1]))
    }
    heads = x.reshape(n, n_heads, -1)
    exact = {"first": heads[..., :first].reshape(n, -1), "second": heads[..., first:].reshape(n, -1), "again": x}
    Case(record, {"x": x}, outputs, results=tuple(outputs)).check(exact, rtol=0, atol=0)


@more
@given(
    seeds,
    token_counts,
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(0, 7),
    st.sampled_from([k.ROPE_NEOX, k.ROPE_NORM]),
    st.sampled_from([0, 40, 131_000]),
    st.sampled_from([1, 1, 4]),
)
def test_rope(seed: int, n: int, n_heads: int, n_pairs: int, rest: int, style: int, start: int, period: int) -> None:
    dim = 2 * n_pairs + rest
    x, magnitude = normal(seed, n, n_heads * dim), 1.25
    frequencies = (10_000.0 ** (-np.arange(n_pairs) / n_pairs)).astype(np.float32)

    def record(program: k.Program, at) -> None:
        program.rope(*at.x, at.frequencies, n_heads, dim, 2 * n_pairs, style, magnitude, period)

    angle = ((start + np.arange(n)) // period * period)[:, None, None] * f64(frequencies)
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    exact = f64(x).reshape(n, n_heads, dim)
    pairs = exact[..., : 2 * n_pairs]
    a, b = (pairs[..., :n_pairs], pairs[..., n_pairs:]) if style == k.ROPE_NEOX else (pairs[..., ::2], pairs[..., 1::2])
    turned = [a * cos - b * sin, a * sin + b * cos]
    exact[..., : 2 * n_pairs] = (
        np.concatenate(turned, -1) if style == k.ROPE_NEOX else np.stack(turned, -1).reshape(n, n_heads, -1)
    )
    case = Case(record, {"x": x}, fixed={"frequencies": frequencies}, results=("x",), start=start)
    case.check({"x": exact.reshape(n, -1)})


def test_rope_tables_of_different_periods_are_kept_apart() -> None:
    x, frequencies = normal(0, 9, 2), np.ones(1, np.float32)

    def record(program: k.Program, at) -> None:
        for period in (1, 4, 1):
            program.rope(*at.x, at.frequencies, 1, 2, 2, k.ROPE_NEOX, 1.0, period)

    angle = 2 * np.arange(9) + np.arange(9) // 4 * 4
    a, b = f64(x).T
    exact = np.stack([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)
    Case(record, {"x": x}, fixed={"frequencies": frequencies}, results=("x",)).check({"x": exact})


def test_rope_tables_of_different_frequencies_are_kept_apart() -> None:
    x = normal(0, 5, 8)
    both = np.array([[1.0, 0.1, 0.01, 0.001], [0.5, 0.25, 0.125, 0.0625]], np.float32)

    def record(program: k.Program, at) -> None:
        for i in (0, 1, 0):
            program.rope(*at.x, at.frequencies + 16 * i, 1, 8, 8, k.ROPE_NEOX, 1.0)

    angle = np.arange(5)[:, None] * (2 * f64(both[0]) + both[1])
    a, b = f64(x[:, :4]), f64(x[:, 4:])
    exact = np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)
    Case(record, {"x": x}, fixed={"frequencies": both}, results=("x",)).check({"x": exact})


@few
@given(seeds, st.integers(2, 20), widths)
def test_select_outputs(seed: int, n: int, width: int) -> None:
    x = normal(seed, n, width)
    wanted = np.sort(np.random.default_rng(seed).choice(n, n // 2, replace=False))
    for isa in k.isa_levels():
        program, step = k.Program(n, 1, 2, isa), k.Step(n)
        out = np.zeros((n, width), np.float32)
        program.select_outputs(x.ctypes.data, width, out.ctypes.data, width, width)
        program.add(*(out.ctypes.data, width) * 3, width, k.ROWS_OUTPUTS)
        step.n_tokens, step.n_outputs = n, len(wanted)
        step.positions[:], step.output_rows[: len(wanted)] = range(n), wanted
        program.run(step)
        np.testing.assert_array_equal(out[: len(wanted)], 2 * x[wanted])
        assert not out[len(wanted) :].any()


# -- products ----------------------------------------------------------------------------------------------------------


@more
@given(seeds, st.integers(1, 70), st.sampled_from(["F32", "Q8_0", "Q4_K"]), st.integers(1, 3), st.booleans())
def test_linear(seed: int, n: int, format_name: str, n_weights: int, scaled: bool) -> None:
    n_cols = {"F32": 37, "Q8_0": 96, "Q4_K": 512}[format_name]
    sizes = [int(r) for r in np.random.default_rng(seed).integers(1, 200, n_weights)]
    raw = [blocks(format_name, seed + i, rows, n_cols) for i, rows in enumerate(sizes)]
    biases = [normal(seed + i + 10, rows) for i, rows in enumerate(sizes)]
    x, scale, ggml_type = normal(seed, n, n_cols), np.array([0.7], np.float32), BY_NAME[format_name].ggml_type

    def record(program: k.Program, at) -> None:
        place = quantize(program, at.x, n_cols, format_name, at.quantized)
        program.linear(
            *place,
            n_cols,
            [
                (getattr(at, f"w{i}"), ggml_type, rows, *getattr(at, f"out{i}"), *(extras(at, i)))
                for i, rows in enumerate(sizes)
            ],
            k.ROWS_TOKENS,
        )

    def extras(at, i: int) -> tuple[int, int]:
        return (getattr(at, f"b{i}"), at.scale) if scaled else (0, 0)

    exact = {}
    for i, rows in enumerate(raw):
        product = rounded_activations(x, format_name) @ dequantized(format_name, rows, n_cols).T
        exact[f"out{i}"] = product * f64(scale) + biases[i] if scaled else product
    case = Case(
        record,
        {"x": x},
        {f"out{i}": (rows, np.float32) for i, rows in enumerate(sizes)},
        {f"w{i}": w for i, w in enumerate(raw)} | {f"b{i}": b for i, b in enumerate(biases)} | {"scale": scale},
        {"quantized": n * activation_bytes(format_name, n_cols)},
        results=tuple(exact),
    )
    case.check(exact, rtol=1e-5, atol=1e-6)


def expert_case(
    seed: int,
    n: int,
    formats: tuple[str, str, str],
    sizes: tuple[int, int],
    ids: np.ndarray,
    n_experts: int,
    activation: int = k.ACTIVATE_SILU,
    extras: bool = False,
    limit: float = 0.0,
    up_limit: float = 0.0,
) -> tuple[Case, np.ndarray]:
    """An experts operation and its exact result; NaN where an id is none."""
    hidden, ffn = sizes
    n_used = ids.shape[1]
    shapes = ((ffn, hidden), (ffn, hidden), (hidden, ffn))
    raw = [
        blocks(name, seed + i, n_experts * rows, cols)
        for i, (name, (rows, cols)) in enumerate(zip(formats, shapes, strict=True))
    ]
    x = normal(seed + 5, n, hidden)
    scales = [np.abs(normal(seed + 6 + i, n_experts)) for i in range(3)]
    biases = [normal(seed + 9 + i, n_experts, rows) for i, (rows, _) in enumerate(shapes)]
    tables = [w.ctypes.data + w.nbytes // n_experts * np.arange(n_experts, dtype=np.int64) for w in raw]
    fixed = {f"table{i}": table for i, table in enumerate(tables)}
    fixed |= {f"scale{i}": s for i, s in enumerate(scales)} | {f"bias{i}": b for i, b in enumerate(biases)}
    kept = raw  # the tables point into it

    def record(program: k.Program, at) -> None:
        assert kept
        places = [quantize(program, at.x, hidden, name, getattr(at, f"x_{name}")) for name in formats[:2]]
        matrices = [
            (
                getattr(at, f"table{i}"),
                BY_NAME[name].ggml_type,
                *((getattr(at, f"scale{i}"), getattr(at, f"bias{i}")) if extras else (0, 0)),
            )
            for i, name in enumerate(formats)
        ]
        program.experts(
            *places[0],
            *places[1],
            at.ids[0],
            n_experts,
            n_used,
            *matrices,
            activation,
            limit,
            up_limit,
            hidden,
            ffn,
            *at.out,
        )

    gate, up, down = (
        dequantized(name, w, shape[1]).reshape(n_experts, *shape)
        for name, w, shape in zip(formats, raw, shapes, strict=True)
    )
    if extras:
        gate, up, down = (w * f64(s)[:, None, None] for w, s in zip((gate, up, down), scales, strict=True))
    exact = np.full((n, n_used, hidden), np.nan)
    for t, rank in np.ndindex(n, n_used):
        e = ids[t, rank]
        if 0 <= e < n_experts:
            g = gate[e] @ rounded_activations(x[t], formats[0])
            u = up[e] @ rounded_activations(x[t], formats[1])
            if extras:
                g, u = g + biases[0][e], u + biases[1][e]
            if activation == k.ACTIVATE_SILU:
                h = np.minimum(silu(g), limit) * np.clip(u, -limit, limit) if limit else silu(g) * u
            elif activation == k.ACTIVATE_CLAMPED_SILU:
                h = silu(np.minimum(g, limit)) * np.clip(u, -limit, limit)
            elif activation == k.ACTIVATE_RELU:
                h = np.maximum(g, 0) * u
            elif activation == k.ACTIVATE_GELU:
                h = gelu(g) * u
            elif activation == k.ACTIVATE_SITU:
                h = situ(g, u, limit, up_limit)
            else:
                g = np.minimum(g, 7)
                h = g * sigmoid(1.702 * g) * (np.clip(u, -7, 7) + 1)
            exact[t, rank] = down[e] @ rounded_activations(h.astype(np.float32), formats[2])
            exact[t, rank] += biases[2][e] if extras else 0
    case = Case(
        record,
        {"x": x, "ids": ids},
        {"out": (n_used * hidden, np.float32)},
        fixed,
        {f"x_{name}": n * activation_bytes(name, hidden) for name in set(formats[:2])},
        packed=("ids",),
    )
    return case, exact.reshape(n, -1)


ACTIVATIONS = [
    (k.ACTIVATE_SILU, 0.0, 0.0),
    (k.ACTIVATE_SILU, 0.5, 0.0),
    (k.ACTIVATE_CLAMPED_SWISH, 0.0, 0.0),
    (k.ACTIVATE_RELU, 0.0, 0.0),
    (k.ACTIVATE_CLAMPED_SILU, 0.5, 0.0),
    (k.ACTIVATE_GELU, 0.0, 0.0),
    (k.ACTIVATE_SITU, 0.5, 0.0),
    (k.ACTIVATE_SITU, 2.0, 0.7),
]
F32_EXPERTS, Q8_EXPERTS, K_EXPERTS = ("F32", "F32", "F32"), ("Q8_0", "F32", "Q8_0"), ("Q4_K", "Q8_0", "Q4_K")


@more
@given(
    seeds,
    st.integers(1, 40),
    st.sampled_from([(F32_EXPERTS, (24, 37)), (Q8_EXPERTS, (64, 96)), (K_EXPERTS, (256, 256))]),
    st.integers(1, 4),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.booleans(),
)
def test_experts(seed: int, n: int, geometry, n_used: int, activation, extras: bool, with_gaps: bool) -> None:
    (formats, sizes), (kind, *limits) = geometry, activation
    n_experts = 5
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(n_experts)[:n_used] for _ in range(n)]).astype(np.int32)
    if with_gaps:
        ids[random.random(ids.shape) < 0.4] = random.choice([-1, n_experts, 2**31 - 1])
    case, exact = expert_case(seed, n, formats, sizes, ids, n_experts, kind, extras, *limits)
    is_exact = formats == F32_EXPERTS
    # a value of h next to a rounding boundary may be rounded to the other side: one step of 1/127 of the largest
    case.check({"out": exact}, rtol=1e-5, atol=2e-6 if is_exact else 1 / 127)


# -- the choice of experts ---------------------------------------------------------------------------------------------


SCORINGS = {
    k.SCORE_SOFTMAX: softmax,
    k.SCORE_SIGMOID: sigmoid,
    k.SCORE_SOFTMAX_TOPK: f64,
    k.SCORE_SQRT_SOFTPLUS: lambda x: np.sqrt(np.logaddexp(0, x)),
}


def route(logits, bias, n_used, scoring, n_groups, n_groups_used, normalize, scale):
    """The router by its definition, in float64; returns ids and weights."""
    scores = SCORINGS[scoring](f64(logits))
    choice = scores + (0 if bias is None else f64(bias))
    if n_groups > 1:
        groups = choice.reshape(len(choice), n_groups, -1)
        best = np.sort(groups, axis=-1)[..., -2:].sum(-1)
        rank = np.argsort(np.argsort(-best, axis=-1, kind="stable"), axis=-1, kind="stable")
        choice = np.where((rank < n_groups_used)[..., None], groups, -np.inf).reshape(choice.shape)
    ids = np.argsort(-choice, axis=-1, kind="stable")[:, :n_used]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if scoring == k.SCORE_SOFTMAX_TOPK:
        weights = softmax(weights)
    if normalize:
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 2.0**-14)
    return ids, weights * scale


def run_router(logits, bias, n_used, scoring, n_groups=1, n_groups_used=1, normalize=True, scale=1.0) -> Case:
    n_experts = logits.shape[1]

    def record(program: k.Program, at) -> None:
        program.router(
            *at.logits,
            0 if bias is None else at.bias,
            at.ids[0],
            at.weights[0],
            n_experts,
            n_used,
            scoring,
            n_groups,
            n_groups_used,
            normalize,
            scale,
        )

    outputs = {"ids": (n_used, np.int32), "weights": (n_used, np.float32)}
    fixed = {} if bias is None else {"bias": bias}
    return Case(record, {"logits": logits}, outputs, fixed, packed=tuple(outputs), results=tuple(outputs))


@more
@given(
    seeds,
    token_counts,
    st.sampled_from([(1, 1), (4, 2), (8, 8)]),
    st.integers(1, 12),
    st.integers(1, 6),
    st.sampled_from(sorted(SCORINGS)),
    st.booleans(),
    st.booleans(),
)
def test_router(seed, n, groups, group_size, n_used, scoring, with_bias, normalize) -> None:
    n_groups, n_groups_used = groups
    n_experts = n_groups * group_size
    n_used = min(n_used, n_groups_used * group_size)
    # Logits far enough apart that float32 and float64 choose the same. Where a bias brings two together, draw others.
    random = np.random.default_rng(seed)
    logits = (np.stack([random.permutation(n_experts) for _ in range(n)]) ** 0.37).astype(np.float32)
    bias = (random.permutation(n_experts) ** 0.41 * 1e-3).astype(np.float32) if with_bias else None
    case = run_router(logits, bias, n_used, scoring, n_groups, n_groups_used, normalize, 2.5)
    ids, weights = route(logits, bias, n_used, scoring, n_groups, n_groups_used, normalize, 2.5)
    for nudge in (0.99, 1.01) if bias is not None else ():
        near, _ = route(logits, bias * nudge, n_used, scoring, n_groups, n_groups_used, normalize, 2.5)
        assume((near == ids).all())
    case.check({"ids": ids, "weights": weights})


@few
@given(seeds, st.lists(st.integers(0, 11), min_size=1, max_size=20), st.integers(2, 40), st.integers(1, 6))
def test_router_with_a_table(seed: int, token_ids: list[int], n_experts: int, n_used: int) -> None:
    """A token's id says whom it goes to, in which order; weights are made of its logits."""
    n, n_used, rng = len(token_ids), min(n_used, n_experts), np.random.default_rng(seed)
    logits = normal(seed, n, n_experts) * 5
    table = rng.random((12, n_experts)).argsort(-1)[:, :n_used].astype(np.int32)

    def record(program: k.Program, at) -> None:
        how = k.SCORE_SQRT_SOFTPLUS, 1, 1, True, 1.5
        program.router(*at.logits, 0, at.ids[0], at.weights[0], n_experts, n_used, *how, at.table, len(table))

    outputs = {"ids": (n_used, np.int32), "weights": (n_used, np.float32)}
    ids = table[token_ids]
    weights = np.take_along_axis(np.sqrt(np.logaddexp(0, f64(logits))), ids, axis=-1)
    weights = 1.5 * weights / weights.sum(-1, keepdims=True)
    what = {"logits": logits}, outputs, {"table": table}
    case = Case(record, *what, packed=tuple(outputs), results=tuple(outputs), token_ids=token_ids)
    case.check({"ids": ids, "weights": weights}, rtol=1e-5)


@more
@given(seeds, token_counts, st.integers(1, 40), st.integers(1, 4), st.integers(1, 6))
def test_group_router(seed: int, n: int, n_groups: int, group_size: int, n_used: int) -> None:
    random, n_experts = np.random.default_rng(seed), n_groups * group_size
    n_used = min(n_used, n_experts)
    logits = (normal(seed, n, n_experts) * 5).astype(np.float32)
    ids = np.stack([random.permutation(n_experts)[:n_used] for _ in range(n)]).astype(np.int32)

    def record(program: k.Program, at) -> None:
        results = at.group_ids[0], at.weights[0]
        program.group_router(*at.logits, at.ids[0], *results, n_experts, n_used, group_size)

    outputs = {"group_ids": (n_used, np.int32), "weights": (n_used, np.float32)}
    group_ids = ids // group_size
    weights = np.take_along_axis(softmax(f64(logits)), group_ids, axis=-1)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 2.0**-14)
    inputs, packed = {"logits": logits, "ids": ids}, ("ids", *outputs)
    case = Case(record, inputs, outputs, packed=packed, results=tuple(outputs))
    case.check({"group_ids": group_ids, "weights": weights})


@more
@given(seeds, token_counts, st.integers(1, 8), st.booleans())
def test_stream_weights(seed: int, n: int, n_streams: int, has_gates: bool) -> None:
    n_scales = 1 + has_gates
    mixes = normal(seed, n, n_scales * n_streams)
    scale, base = normal(seed + 1, n_scales), normal(seed + 2, n_scales * n_streams)

    def record(program: k.Program, at) -> None:
        gates = at.gates if has_gates else (0, 0)
        program.stream_weights(*at.mixes, at.scale, at.base, at.weights[0], *gates, n_streams, 0.25, 1.5)

    found = sigmoid(np.repeat(f64(scale), n_streams) * mixes + base)
    expected = {"weights": found[:, :n_streams] + 0.25, "gates": 1.5 * found[:, n_streams:] + 0.25}
    if not has_gates:
        expected["gates"] = np.full((n, n_streams), np.nan)
    outputs = dict.fromkeys(expected, (n_streams, np.float32))
    fixed = {"scale": scale, "base": base}
    Case(record, {"mixes": mixes}, outputs, fixed, packed=("weights",), results=tuple(outputs)).check(expected)


@more
@given(seeds, token_counts, st.integers(1, 4), st.sampled_from([1, 2, 20]))
def test_stream_weights_with_mixing(seed: int, n: int, n_streams: int, n_normalizations: int) -> None:
    n_kept = n_streams**2
    mixes, scale, base = (
        normal(seed, n, 2 * n_streams + n_kept),
        normal(seed + 1, 3),
        normal(seed + 2, 2 * n_streams + n_kept),
    )

    def record(program: k.Program, at) -> None:
        to = *at.gates, n_streams, 0.25, 1.5, *at.mixing, n_normalizations
        program.stream_weights(*at.mixes, at.scale, at.base, at.weights[0], *to)

    found = np.concatenate([np.repeat(f64(scale[:2]), n_streams), np.repeat(f64(scale[2]), n_kept)]) * mixes + base
    kept = softmax(found[:, 2 * n_streams :].reshape(n, n_streams, n_streams)) + 0.25
    for i in range(2 * n_normalizations - 1):
        kept = kept / (kept.sum(2 if i % 2 else 1, keepdims=True) + 0.25)
    expected = {
        "weights": sigmoid(found[:, :n_streams]) + 0.25,
        "gates": 1.5 * sigmoid(found[:, n_streams : 2 * n_streams]),  # without an offset
        "mixing": kept.reshape(n, -1),
    }
    outputs = {name: (x.shape[1], np.float32) for name, x in expected.items()}
    fixed = {"scale": scale, "base": base}
    case = Case(record, {"mixes": mixes}, outputs, fixed, packed=("weights",), results=tuple(outputs))
    case.check(expected, rtol=1e-5)


@more
@given(seeds, token_counts, widths, st.integers(1, 8), st.booleans(), st.sampled_from([0.0, 2.0]))
def test_add_to_streams(seed: int, n: int, width: int, n_streams: int, mixes: bool, magnitude: float) -> None:
    inputs = {
        "x": normal(seed, n, n_streams * width),
        "added": normal(seed + 1, n, width),
        "gates": normal(seed + 2, n, n_streams),
        "mixing": normal(seed + 3, n, n_streams**2),
    }

    def record(program: k.Program, at) -> None:
        mixing = at.mixing if mixes else (0, 0)
        program.add_to_streams(*at.x, *at.added, *at.gates, *at.out, n_streams, width, *mixing, magnitude)

    gates, x = f64(inputs["gates"]), f64(inputs["x"])
    gates = magnitude * sigmoid(gates) if magnitude else gates
    added = gates[:, :, None] * inputs["added"][:, None]
    if mixes:
        kept = inputs["mixing"].reshape(n, n_streams, n_streams)
        x = np.einsum("tih,tij->tjh", x.reshape(n, n_streams, width), kept).reshape(n, -1)
    case = Case(record, inputs, {"out": (n_streams * width, np.float32)})
    case.check({"out": x + added.reshape(n, -1)})


@more
@given(seeds, token_counts, widths, st.integers(1, 16), st.sampled_from([0.3, 30.0]), st.booleans())
def test_mix_residuals(seed: int, n: int, width: int, n_residuals: int, gain: float, in_place: bool) -> None:
    names = [f"x{i}" for i in range(n_residuals)]
    inputs = {name: normal(seed + i, n, width) * (i + 1) for i, name in enumerate(names)}
    scorer = normal(seed + 20, width) * gain
    to = names[-1] if in_place else "out"

    def record(program: k.Program, at) -> None:
        residuals = [getattr(at, name) for name in names]
        program.mix_residuals(residuals, at.scorer, *getattr(at, to), width, 1e-3)

    x = f64(np.stack([*inputs.values()]))
    scales = 1 / np.sqrt((x**2).mean(-1) + 1e-3)
    weights = softmax(np.moveaxis(x @ scorer * scales, 0, -1))
    mixed = np.einsum("tr,rtc->tc", weights, x)
    # A score is as wrong as what is added up for it is large, and a weight of the softmax by so much of itself.
    error = 2.0**-23 * float((np.abs(x) @ np.abs(scorer) * scales).max() * np.abs(x).max() / np.abs(mixed).max())
    case = Case(record, inputs, {"out": (width, np.float32)}, {"scorer": scorer}, results=(to,))
    case.check({to: mixed}, atol=2e-6 + error)


def test_equal_scores_go_to_the_lower_ids() -> None:
    logits = np.array([[1, 3, 3, 0, 3, 1]], np.float32)
    found = run_router(logits, None, 4, k.SCORE_SOFTMAX).run()
    assert found["ids"].tolist() == [[1, 2, 4, 0]]


@pytest.mark.parametrize("scoring", sorted(SCORINGS))
def test_logits_that_are_no_numbers_give_ids_in_range(scoring: int) -> None:
    logits = np.full((4, 20), np.nan, np.float32)
    logits[1, 3], logits[2], logits[3, 7] = 1.0, -np.inf, np.inf
    for isa in k.isa_levels():
        ids = run_router(logits, None, 4, scoring, 4, 2).run(isa)["ids"]
        assert ((ids >= 0) & (ids < 20)).all()
        assert all(len(set(row)) == 4 for row in ids.tolist())


@more
@given(
    seeds,
    token_counts,
    widths,
    st.integers(1, 4),
    st.sampled_from(["none", "plain", "gated"]),
    st.booleans(),
    st.booleans(),
)
def test_combine(seed: int, n: int, width: int, n_used: int, shared: str, weighted: bool, adds: bool) -> None:
    inputs = {
        "expert_out": normal(seed, n, n_used * width),
        "shared": normal(seed + 1, n, width),
        "gate": normal(seed + 2, n, 1),
        "residual": normal(seed + 3, n, width),
    }
    weights = np.abs(normal(seed + 4, n, n_used))

    def record(program: k.Program, at) -> None:
        program.combine(
            *at.expert_out,
            at.weights[0] if weighted else 0,
            n_used,
            *(at.shared if shared != "none" else (0, 0)),
            *(at.gate if shared == "gated" else (0, 0)),
            *(at.residual if adds else (0, 0)),
            *at.residual,
            width,
            0.4,
        )

    total = np.einsum(
        "trh,tr->th",
        f64(inputs["expert_out"]).reshape(n, n_used, width),
        f64(weights) if weighted else np.ones((n, n_used)),
    )
    if shared != "none":
        total = total + inputs["shared"] * (sigmoid(inputs["gate"]) if shared == "gated" else 1.0)
    case = Case(record, {**inputs, "weights": weights}, packed=("weights",), results=("residual",))
    case.check({"residual": adds * inputs["residual"] + np.float32(0.4) * total})


# -- attention ---------------------------------------------------------------------------------------------------------

KV_ERROR = {k.KV_F32: 3e-6, k.KV_F16: 2e-3, k.KV_Q8_0: 2e-2}


def stored(x: np.ndarray, kind: int) -> np.ndarray:
    """Keys or values [..., head_dim] as a cache gives them back."""
    if kind == k.KV_F32:
        return f64(x)
    if kind == k.KV_F16:
        return f64(x.astype(np.float16))
    out = np.empty(x.shape)
    for first in range(0, x.shape[-1], 32):
        block = x[..., first : first + 32]
        d = f64((np.abs(block).max(-1, keepdims=True) / np.float32(127)).astype(np.float16))
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(d > 0, np.clip(np.rint(f64(block) / d), -127, 127), 0)
        out[..., first : first + 32] = q * d
    return out


def attention_case(
    seed,
    slots,
    heads=(4, 2),
    dims=(16, 16),
    kind=k.KV_F32,
    with_sinks=False,
    window=0,
    chunk=0,
    cap=0.0,
    values_in_keys=False,
):
    """Attention over whole sequences and its exact result."""
    (n_heads, n_kv_heads), (head_dim, value_dim) = heads, dims
    n, n_slots, slots = len(slots), max(slots) + 1, np.asarray(slots)
    context = max(np.bincount(slots)) + 3
    q, keys = normal(seed, n, n_heads * head_dim), normal(seed + 1, n, n_kv_heads * head_dim)
    values = keys if values_in_keys else normal(seed + 2, n, n_kv_heads * value_dim)
    sinks, scale = normal(seed + 3, n_heads) * 2, 1.5 / math.sqrt(head_dim)

    def record(program: k.Program, at) -> None:
        program.attention(
            *at.q,
            *at.k,
            *(at.k if values_in_keys else at.v),
            *at.out,
            at.cache,
            kind,
            context,
            n_heads,
            n_kv_heads,
            head_dim,
            value_dim,
            scale,
            at.sinks if with_sinks else 0,
            window,
            chunk,
            cap,
        )

    case = Case(
        record,
        {"q": q, "k": keys, "v": values},
        {"out": (n_heads * value_dim, np.float32)},
        {"sinks": sinks},
        {"cache": k.kv_cache_bytes(kind, n_slots, context, n_kv_heads, head_dim, value_dim)},
        slots=slots,
        n_slots=n_slots,
    )
    exact = np.empty((n, n_heads, value_dim))
    all_keys = stored(keys.reshape(n, n_kv_heads, head_dim), kind)
    all_values = stored(values.reshape(n, n_kv_heads, -1)[..., :value_dim], kind)
    for slot in range(n_slots):
        rows = np.flatnonzero(slots == slot)
        position = np.arange(len(rows))
        hidden = position > position[:, None]
        if window:
            hidden |= position[:, None] - position >= window
        if chunk:
            hidden |= position < position[:, None] // chunk * chunk
        for head in range(n_heads):
            kv_head = head // (n_heads // n_kv_heads)
            scores = f64(q[rows]).reshape(len(rows), n_heads, head_dim)[:, head] @ all_keys[rows, kv_head].T * scale
            scores = cap * np.tanh(scores / cap) if cap else scores
            scores[hidden] = -np.inf
            sink = np.full((len(rows), 1), sinks[head] if with_sinks else -np.inf)
            weights = softmax(np.concatenate([scores, sink], -1))[:, :-1]
            exact[rows, head] = weights @ all_values[rows, kv_head]
    return case, exact.reshape(n, -1)


@more
@given(
    seeds,
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (4, 2), (6, 1), (5, 5)]),
    st.sampled_from([(8, 8), (16, 24), (40, 32), (72, 64)]),
    st.sampled_from([k.KV_F32, k.KV_F16, k.KV_Q8_0]),
    st.booleans(),
    st.sampled_from([(0, 0), (1, 0), (7, 0), (0, 8), (5, 12)]),
    st.sampled_from([0.0, 1.5]),
)
def test_attention(seed, lengths, heads, dims, kind, with_sinks, limits, cap) -> None:
    slots = [slot for slot, length in enumerate(lengths) for _ in range(length)]
    case, exact = attention_case(seed, slots, heads, dims, kind, with_sinks, *limits, cap)
    case.check({"out": exact}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [k.KV_F32, k.KV_F16, k.KV_Q8_0])
@pytest.mark.parametrize("limits", [(0, 0), (300, 0), (0, 256), (0, 270, 2.0)])
def test_attention_over_several_blocks_of_positions(kind: int, limits: tuple[float, ...]) -> None:
    case, exact = attention_case(3, [0] * 640, (3, 1), (16, 16), kind, True, *limits)
    first = case.run()["out"]
    np.testing.assert_allclose(first, exact, rtol=1e-4, atol=1e-5)
    plain, best = (k.isa_levels()[0], 1), (k.isa_levels()[-1], 3)  # the former takes long
    for cuts, how in (((639,), best), ((256, 257, 600, 603), plain), ((256, 257, 600, 603), best), ((255, 512), best)):
        assert case.run(*how, cuts)["out"].tobytes() == first.tobytes(), (cuts, how)


@few
@given(seeds, st.integers(1, 40), st.integers(1, 6))
def test_attention_with_values_in_the_keys(seed: int, n: int, n_heads: int) -> None:
    case, exact = attention_case(seed, [0] * n, (n_heads, 1), (40, 32), values_in_keys=True)
    case.check({"out": exact}, rtol=1e-4, atol=1e-5)


# -- the choice of positions -------------------------------------------------------------------------------------------


def selection_case(
    seed, slots, n_heads, dim, top_k, kind=k.KV_F32, *, equal=False, period=1, has_weights=True, has_tail=False
) -> tuple[Case, np.ndarray]:
    """The choice of positions, or rows that some share, over whole sequences and what is chosen; -77 is never written.

    With a tail the number of whole rows follows, which is that of one that is not whole, if there is one.

    Scores are whole numbers, so that many are equal if that is wanted, and exact whatever the order of sums.
    """
    n, n_slots, slots = len(slots), max(slots) + 1, np.asarray(slots)
    context = max(1, (max(np.bincount(slots)) + 3) // period)
    rng, most = np.random.default_rng(seed), 2 if equal else 30
    q, keys, weights = (
        rng.integers(-most, most + 1, (n, width)).astype(np.float32) for width in (n_heads * dim, dim, n_heads)
    )

    def record(program: k.Program, at) -> None:
        sizes = context, n_heads, dim, top_k, 0.5, period, has_tail
        weights = at.weights if has_weights else (0, 0)
        program.select_positions(*at.q, *at.k, *weights, *at.out, at.cache, kind, *sizes)

    case = Case(
        record,
        {"q": q, "k": keys, "weights": weights},
        {"out": (top_k + has_tail, np.int32)},
        state={"cache": k.kv_cache_bytes(kind, n_slots, context, 1, dim, 0)},
        slots=slots,
        n_slots=n_slots,
    )
    chosen = np.full((n, top_k + has_tail), UNTOUCHED[np.int32])
    weights = weights if has_weights else np.ones_like(weights)
    all_keys = stored(keys[:, None], kind)[:, 0]
    for slot in range(n_slots):
        rows = np.flatnonzero(slots == slot)
        for i, row in enumerate(rows):
            seen = rows[: i + 1][period - 1 :: period]
            by_head = np.maximum(f64(q[row]).reshape(n_heads, dim) @ all_keys[seen].T, 0)
            order = np.argsort(-(weights[row] / 2 @ by_head), kind="stable")[:top_k]
            listed = [*np.sort(order), *[len(seen)] * has_tail]
            chosen[row, : len(listed)] = listed
    return case, chosen


@more
@given(
    seeds,
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([8, 32, 40, 128]),
    st.integers(1, 20),
    st.sampled_from([k.KV_F32, k.KV_F16]),
    st.booleans(),
    st.sampled_from([1, 1, 3]),
    st.booleans(),
    st.booleans(),
)
def test_select_positions(seed, lengths, n_heads, dim, top_k, kind, equal, period, has_weights, has_tail) -> None:
    slots = [slot for slot, length in enumerate(lengths) for _ in range(length)]
    how = {"equal": equal, "period": period, "has_weights": has_weights, "has_tail": has_tail}
    case, chosen = selection_case(seed, slots, n_heads, dim, top_k, kind, **how)
    case.check({"out": chosen}, rtol=0, atol=0)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("period", "has_tail"), [(1, False), (2, False), (2, True)])
def test_select_positions_over_several_blocks_of_them(period: int, has_tail: bool, equal: bool) -> None:
    case, chosen = selection_case(5, [0] * 640, 5, 16, 100, equal=equal, period=period, has_tail=has_tail)
    for cuts in ((), (639,), (256, 257, 600, 603), (255, 512)):
        for isa, n_threads in ((k.isa_levels()[0], 1), (k.isa_levels()[-1], 3)):
            assert np.array_equal(case.run(isa, n_threads, cuts)["out"], chosen), (cuts, isa, n_threads)


def test_keys_of_eight_bits_are_chosen_among_as_they_are_stored() -> None:
    case, _ = selection_case(6, [0] * 50, 3, 64, 7, k.KV_Q8_0)
    first = case.run()["out"]
    assert (np.diff(first[7:], axis=-1) > 0).all()
    keys = stored(case.inputs["k"][:, None], k.KV_Q8_0)[:, 0]
    scores = np.einsum("thd,sd->ths", f64(case.inputs["q"]).reshape(50, 3, 64), keys)
    scores = np.einsum("ths,th->ts", np.maximum(scores, 0), f64(case.inputs["weights"]))
    for row in range(7, 50):
        lowest = scores[row, first[row]].min()
        others = np.delete(scores[row, : row + 1], first[row])
        assert others.max() <= lowest + 1e-4 * np.abs(scores).max()
    case.check({"out": first}, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_select_positions_chooses_as_many_whatever_the_scores(bad: float) -> None:
    case, _ = selection_case(7, [0] * 30, 2, 16, 5)
    case.inputs["weights"][20:] = bad
    found = case.run()["out"]
    assert (np.diff(found[5:], axis=-1) > 0).all()
    assert found[5:].min() >= 0
    assert (found[5:].max(-1) <= np.arange(5, 30)).all()


def block_case(
    seed, slots, n_heads, dim, top_k, block_size, n_newest, kind=k.KV_F32, *, equal=False
) -> tuple[Case, np.ndarray]:
    """The choice of blocks over whole sequences and what is chosen, likewise."""
    n, n_slots, slots = len(slots), max(slots) + 1, np.asarray(slots)
    context = max(np.bincount(slots)) + 3
    rng, most = np.random.default_rng(seed), 2 if equal else 30
    q, keys = (rng.integers(-most, most + 1, (n, width)).astype(np.float32) for width in (n_heads * dim, dim))

    def record(program: k.Program, at) -> None:
        sizes = (n_heads, dim, top_k, block_size, n_newest)
        program.select_blocks(*at.q, *at.k, *at.out, at.cache, kind, context, *sizes)

    case = Case(
        record,
        {"q": q, "k": keys},
        {"out": (n_heads * top_k, np.int32)},
        state={"cache": k.kv_cache_bytes(kind, n_slots, context, 1, dim, 0)},
        slots=slots,
        n_slots=n_slots,
    )
    lists = np.full((n, n_heads, top_k), UNTOUCHED[np.int32])
    all_keys = stored(keys[:, None], kind)[:, 0]
    for slot in range(n_slots):
        rows = np.flatnonzero(slots == slot)
        for (i, row), head in itertools.product(enumerate(rows), range(n_heads)):
            own = i // block_size
            scores = all_keys[rows[: own * block_size]] @ f64(q[row]).reshape(n_heads, dim)[head]
            newest = np.arange(max(0, own - n_newest + 1), own + 1)
            others = scores.reshape(own, block_size).max(-1)[: newest[0]]
            others = np.argsort(-others, kind="stable")[: top_k - n_newest]
            lists[row, head, : len(others) + len(newest)] = [*np.sort(others), *newest]
    return case, lists.reshape(n, -1)


@more
@given(
    seeds,
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from([8, 32, 40, 128]),
    st.sampled_from([(1, 1), (2, 1), (3, 3), (5, 2)]),
    st.sampled_from([1, 2, 5, 16, 20]),
    st.sampled_from([k.KV_F32, k.KV_F16]),
    st.booleans(),
)
def test_select_blocks(seed, lengths, n_heads, dim, chosen, block_size, kind, equal) -> None:
    slots = [slot for slot, length in enumerate(lengths) for _ in range(length)]
    top_k, n_newest = chosen
    case, lists = block_case(seed, slots, n_heads, dim, top_k, block_size, n_newest, kind, equal=equal)
    case.check({"out": lists}, rtol=0, atol=0)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("block_size", [3, 32, 300])
def test_select_blocks_over_several_chunks_of_positions(block_size: int, equal: bool) -> None:
    case, lists = block_case(5, [0] * 1300, 5, 16, 3, block_size, 1, equal=equal)
    first, best = (k.isa_levels()[0], 1), (k.isa_levels()[-1], 3)
    for (isa, n_threads), cuts in (
        (first, ()),
        (best, (1299,)),
        (first, (255, 512)),
        (best, (256, 257, 600, 603, 1294)),
    ):
        assert np.array_equal(case.run(isa, n_threads, cuts)["out"], lists), (cuts, isa, n_threads)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_select_blocks_takes_the_newest_whatever_the_scores(bad: float) -> None:
    case, _ = block_case(7, [0] * 30, 2, 16, 3, 4, 2)
    case.inputs["q"][20:] = bad
    found = case.run()["out"].reshape(30, 2, 3)[12:]
    own = np.arange(12, 30)[:, None] // 4
    assert (found[..., 2] == own).all()
    assert (found[..., 1] == own - 1).all()
    assert ((found[..., 0] >= 0) & (found[..., 0] < own - 1)).all()


@pytest.mark.parametrize(
    ("n", "block_size", "top_k", "has_tail", "kind"),
    [
        *(
            (60, *sizes, kind)
            for sizes in ((4, 5, False), (16, 4, False), (4, 5, True), (7, 2, True))
            for kind in (k.KV_F32, k.KV_F16, k.KV_Q8_0)
        ),
        (700, 60, 6, False, k.KV_F16),  # several blocks of positions; plain attention has them of every kind
        (700, 60, 6, True, k.KV_Q8_0),
    ],
)
def test_attention_to_selected_blocks(n: int, block_size: int, top_k: int, has_tail: bool, kind: int) -> None:
    """Each key head has a list; where all blocks are chosen the bits are those of plain attention.

    With a tail a token's own block is one like others once it is whole.
    """
    n_heads, n_kv_heads, head_dim, value_dim, scale, context = 6, 2, 40, 32, 0.2, n + 3
    widths = n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * value_dim
    q, keys, values = (normal(i, n, width) for i, width in enumerate(widths))
    rng, selected = np.random.default_rng(3), np.full((n, n_kv_heads, top_k), 1 << 20, np.int32)
    for p, head in itertools.product(range(n), range(n_kv_heads)):
        own, rest = divmod(p + has_tail, block_size)  # whole blocks before the last place
        chosen = [*np.sort(rng.permutation(own)[: top_k - 1]), *[own] * (rest > 0 or not has_tail)]
        selected[p, head, : len(chosen)] = chosen

    def record(program: k.Program, at, selects: bool = True) -> None:
        places = (*at.q, *at.k, *at.v, *at.out, at.cache, kind, context)
        sizes = (n_heads, n_kv_heads, head_dim, value_dim, scale, 0, 0, 0, 0.0)
        lists = (*at.selected, top_k, block_size, n_kv_heads) if selects else ()
        program.attention(*places, *sizes, *lists, has_tail=has_tail and selects)

    def case_of(record) -> Case:
        inputs = {"q": q, "k": keys, "v": values, "selected": selected.reshape(n, -1)}
        cache_bytes = k.kv_cache_bytes(kind, 1, context, n_kv_heads, head_dim, value_dim)
        return Case(record, inputs, {"out": (n_heads * value_dim, np.float32)}, state={"cache": cache_bytes})

    case = case_of(record)
    all_keys = stored(keys.reshape(n, n_kv_heads, head_dim), kind)
    all_values = stored(values.reshape(n, n_kv_heads, value_dim), kind)
    exact = np.empty((n, n_heads, value_dim))
    for p, head in itertools.product(range(n), range(n_heads)):
        kv_head, seen = head * n_kv_heads // n_heads, np.arange(p + 1)
        seen = seen[np.isin(seen // block_size, selected[p, kv_head])]
        weights = softmax(f64(q[p]).reshape(n_heads, head_dim)[head] @ all_keys[seen, kv_head].T * scale)
        exact[p, head] = weights @ all_values[seen, kv_head]
    case.check({"out": exact.reshape(n, -1)}, rtol=1e-4, atol=1e-5)
    plain = case_of(lambda program, at: record(program, at, selects=False)).run()["out"]
    found, n_whole = case.run()["out"], top_k * block_size - has_tail
    assert found[:n_whole].tobytes() == plain[:n_whole].tobytes()
    assert n <= n_whole or not np.array_equal(found, plain)


@pytest.mark.parametrize("kind", [k.KV_F32, k.KV_F16, k.KV_Q8_0])
@pytest.mark.parametrize(("n", "top_k"), [(40, 9), (640, 300), (40, 64)])
def test_attention_to_selected_positions(n: int, top_k: int, kind: int) -> None:
    """What is not chosen might as well not be there; where all are chosen the bits are those of plain attention."""
    n_heads, head_dim, value_dim, scale = 5, 40, 32, 0.2
    q, keys, context = normal(1, n, n_heads * head_dim), normal(2, n, head_dim), n + 3
    rng, selected = np.random.default_rng(3), np.full((n, top_k), 1 << 30, np.int32)
    for p in range(n):
        chosen = np.sort(rng.permutation(p + 1)[:top_k])
        selected[p, : len(chosen)] = chosen

    def record(program: k.Program, at, selects: bool = True) -> None:
        places = (*at.q, *at.k, *at.k, *at.out, at.cache, kind, context)
        sizes = (n_heads, 1, head_dim, value_dim, scale, 0, 0, 0, 0.0)
        program.attention(*places, *sizes, *((*at.selected, top_k) if selects else ()))

    def case_of(record) -> Case:
        cache_bytes = k.kv_cache_bytes(kind, 1, context, 1, head_dim, value_dim)
        outputs = {"out": (n_heads * value_dim, np.float32)}
        return Case(record, {"q": q, "k": keys, "selected": selected}, outputs, state={"cache": cache_bytes})

    case = case_of(record)
    all_keys, all_values = (stored(x[:, None], kind)[:, 0] for x in (keys, keys[:, :value_dim]))
    exact = np.empty((n, n_heads, value_dim))
    for p in range(n):
        seen = selected[p, : p + 1]
        weights = softmax(f64(q[p]).reshape(n_heads, head_dim) @ all_keys[seen].T * scale)
        exact[p] = weights @ all_values[seen]
    case.check({"out": exact.reshape(n, -1)}, rtol=1e-4, atol=1e-5)
    plain = case_of(lambda program, at: record(program, at, selects=False)).run()["out"]
    found = case.run()["out"]
    assert found[:top_k].tobytes() == plain[:top_k].tobytes()
    assert n <= top_k or not np.array_equal(found, plain)


@pytest.mark.parametrize(
    ("lengths", "period", "top_k", "window", "kind"),
    [
        *(
            (*sizes, kind)
            for sizes in (((40, 23), 4, 3, 8), ((40,), 4, 0, 8), ((3,), 4, 0, 2))
            for kind in (k.KV_F32, k.KV_F16, k.KV_Q8_0)
        ),
        ((700,), 2, 0, 300, k.KV_F16),  # several blocks of positions; plain attention has them of every kind
        ((700,), 2, 290, 0, k.KV_Q8_0),
    ],
)
def test_attention_to_shared_rows(lengths: tuple[int, ...], period: int, top_k: int, window: int, kind: int) -> None:
    """Beside the window a token sees the rows of all periods before, or those that a list names."""
    n_heads, dim, value_dim, scale = 5, 40, 32, 0.2
    slots = np.repeat(np.arange(len(lengths)), lengths)
    n, context, n_slots = len(slots), max(lengths) + 3, len(lengths)
    n_rows, positions = max(1, context // period), np.concatenate([np.arange(length) for length in lengths])
    q, keys, shared = normal(1, n, n_heads * dim), normal(2, n, dim), normal(3, n, dim)
    sinks, rng, selected = normal(4, n_heads), np.random.default_rng(3), np.full((n, max(1, top_k)), 1 << 30, np.int32)
    seen_rows = [np.arange((p + 1) // period) for p in positions]
    if top_k:
        seen_rows = [np.sort(rng.permutation(rows)[:top_k]) for rows in seen_rows]
        for t, rows in enumerate(seen_rows):
            selected[t, : len(rows)] = rows

    def record(program: k.Program, at) -> None:
        places = (*at.q, *at.k, *at.k, *at.out, at.cache, kind, context)
        sizes = (n_heads, 1, dim, value_dim, scale, at.sinks, window, 0, 0.0)
        lists = (*at.selected, top_k, 1, 1) if top_k else (0, 0, 0, 1, 1)
        program.attention(*places, *sizes, *lists, *at.shared_k, at.shared, n_rows, period)

    caches = {
        name: k.kv_cache_bytes(kind, n_slots, rows, 1, dim, value_dim)
        for name, rows in (("cache", context), ("shared", n_rows))
    }
    inputs = {"q": q, "k": keys, "shared_k": shared, "selected": selected}
    outputs, fixed = {"out": (n_heads * value_dim, np.float32)}, {"sinks": sinks}
    case = Case(record, inputs, outputs, fixed, caches, slots=slots, n_slots=n_slots)
    both = [[stored(x[:, None], kind)[:, 0] for x in (x, x[:, :value_dim])] for x in (keys, shared)]
    exact = np.empty((n, n_heads, value_dim))
    for t, (slot, p) in enumerate(zip(slots, positions, strict=True)):
        rows = np.flatnonzero(slots == slot)
        places = [rows[max(0, p - window + 1) if window else 0 : p + 1], rows[period - 1 :: period][seen_rows[t]]]
        all_keys, all_values = (np.concatenate([x[i][at] for x, at in zip(both, places, strict=True)]) for i in (0, 1))
        scores = f64(q[t]).reshape(n_heads, dim) @ all_keys.T * scale
        exact[t] = softmax(np.concatenate([scores, sinks[:, None]], -1))[:, :-1] @ all_values
    case.check({"out": exact.reshape(n, -1)}, rtol=1e-4, atol=1e-5)


def test_a_row_is_added_to_all() -> None:
    x, row = normal(1, 20, 40), normal(2, 40)

    def record(program: k.Program, at) -> None:
        program.add(*at.x, at.row, 0, *at.out, 40, 0)

    Case(record, {"x": x}, {"out": (40, np.float32)}, {"row": row}).check({"out": f64(x) + row}, rtol=1e-7)


def test_a_sequence_that_starts_afresh_sees_nothing_of_the_one_before() -> None:
    case, _ = attention_case(1, [0] * 20)
    first = case.run()["out"]
    program, step = k.Program(20, 1, 1), k.Step(20)
    arrays = {name: x.copy() for name, x in case.inputs.items()}
    out = np.zeros_like(first)
    cache = np.zeros(case.state["cache"] + 64, np.uint8)
    at = cache.ctypes.data + -cache.ctypes.data % 64
    places = [(x.ctypes.data, x.shape[1]) for x in (*arrays.values(), out)]
    scale = 1.5 / math.sqrt(16)
    program.attention(*sum(places, ()), at, k.KV_F32, 23, 4, 2, 16, 16, scale, 0, 0, 0, 0.0)
    step.n_tokens, step.positions[:] = 20, range(20)
    program.run(step)
    arrays["k"][:], arrays["v"][:] = np.nan, np.nan  # leave a cache full of these
    program.run(step)
    for name, x in case.inputs.items():
        arrays[name][:] = x
    program.run(step)
    assert out.tobytes() == first.tobytes()


# -- state over time ---------------------------------------------------------------------------------------------------


@more
@given(
    seeds,
    st.lists(st.integers(1, 15), min_size=1, max_size=3),
    st.integers(1, 70),
    st.integers(2, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 1, 2, 3, 8]),
)
def test_causal_conv(
    seed: int, lengths: list[int], n_channels: int, kernel_size: int, has_bias: bool, activates: bool, dilation: int
) -> None:
    n_before = (kernel_size - 1) * dilation
    slots = [slot for slot, length in enumerate(lengths) for _ in range(length)]
    x, weight = normal(seed, len(slots), n_channels), normal(seed + 1, n_channels, kernel_size)
    bias = normal(seed + 2, n_channels)

    def record(program: k.Program, at) -> None:
        vectors = at.weight, at.bias if has_bias else 0
        program.causal_conv(*at.x, *vectors, at.state, *at.out, n_channels, kernel_size, activates, dilation)

    case = Case(
        record,
        {"x": x},
        {"out": (n_channels, np.float32)},
        {"weight": weight, "bias": bias},
        {"state": 4 * len(lengths) * n_before * n_channels},
        slots=slots,
        n_slots=len(lengths),
    )
    parts = []
    for slot, length in enumerate(lengths):
        padded = np.concatenate([np.zeros((n_before, n_channels)), f64(x[np.equal(slots, slot)])])
        sums = sum(padded[j * dilation :][:length] * weight[:, j] for j in range(kernel_size))
        sums = sums + has_bias * bias
        parts.append(silu(sums) if activates else sums)
    case.check({"out": np.concatenate(parts)}, rtol=1e-5, atol=1e-6)


@more
@given(seeds, st.lists(st.integers(1, 15), min_size=1, max_size=3), st.integers(1, 70), st.integers(1, 9))
def test_carry_over(seed: int, lengths: list[int], n_channels: int, n_kept: int) -> None:
    slots = np.repeat(np.arange(len(lengths)), lengths)
    x = normal(seed, len(slots), n_channels)

    def record(program: k.Program, at) -> None:
        program.carry_over(*at.x, at.state, *at.out, n_channels, n_kept)

    case = Case(
        record,
        {"x": x},
        {"out": (n_channels, np.float32)},
        {},
        {"state": 4 * len(lengths) * n_kept * n_channels},
        slots=slots,
        n_slots=len(lengths),
    )
    starts = np.append(True, slots[1:] != slots[:-1])[:, None]
    case.check({"out": np.where(starts, 0, np.roll(x, 1, axis=0))}, rtol=0)


def test_rows_are_carried_over_from_wherever_a_sequence_was_cut_back_to() -> None:
    """Of a sequence in the second of two slots: what was kept of a position is what was run there last."""
    n_kept, width = 4, 3
    x, out, state = (
        np.zeros((8, width), np.float32),
        np.zeros((8, width), np.float32),
        np.zeros((2, n_kept, width), "f4"),
    )
    places = [(array.ctypes.data, width) for array in (x, out)]
    both, read = k.Program(8, 2, 1), k.Program(8, 2, 1)
    both.carry_over(*places[0], state.ctypes.data, *places[1], width, n_kept)
    read.carry_over(0, 0, state.ctypes.data, *places[1], width, n_kept)
    step, rows = k.Step(8), {}

    def run(program: k.Program, first: int, n: int, value: float) -> list[float]:
        step.positions[:n], step.slots[:n], step.n_tokens = np.arange(first, first + n), 1, n
        x[:n] = value + np.arange(n)[:, None]
        program.run(step)
        assert (out[:n] == out[:n, :1]).all()
        return out[:n, 0].tolist()

    for first, n in ((0, 3), (3, 4), (5, 1), (5, 2), (4, 8), (9, 1), (12, 1)):
        expected = []
        for i in range(n):
            expected.append(rows.get(first + i - 1, 0.0))
            rows[first + i] = 100.0 * first + i
        assert run(both, first, n, 100.0 * first) == expected
        before = state.copy()
        assert run(read, first + n, 1, -1.0) == [rows[first + n - 1]]
        assert (state == before).all()
    assert (state[0] == 0).all()


@pytest.mark.parametrize("kv_type", [k.KV_F32, k.KV_F16, k.KV_Q8_0])
def test_keys_are_stored_as_attention_stores_them(kv_type: int) -> None:
    n, n_heads, dim, value_dim, n_rows = 7, 2, 64, 32, 32
    q, keys, values = normal(1, n, n_heads * dim), normal(2, n, n_heads * dim), normal(3, n, n_heads * value_dim)
    out, step = np.zeros((n, n_heads * value_dim), np.float32), k.Step(n)
    step.positions[:], step.slots[:], step.n_tokens = np.arange(5, 5 + n), 1, n
    places = [(array.ctypes.data, array.shape[1]) for array in (q, keys, values, out)]
    caches = np.zeros((2, k.kv_cache_bytes(kv_type, 2, n_rows, n_heads, dim, value_dim)), np.uint8)
    program, attending = k.Program(n, 2, 2), k.Program(n, 2, 2)
    sizes = kv_type, n_rows, n_heads, dim, value_dim
    program.store_keys(*places[1], *places[2], caches[0].ctypes.data, *sizes)
    at = caches[1].ctypes.data, kv_type, n_rows, n_heads, n_heads, dim, value_dim
    attending.attention(*places[0], *places[1], *places[2], *places[3], *at, 1.0, 0, 0, 0, 0.0)
    program.run(step)
    attending.run(step)
    assert caches[0].any()
    assert (caches[0] == caches[1]).all()
    step.positions[-1] = n_rows
    with pytest.raises(ValueError, match="the context has 32"):
        program.run(step)


@more
@given(
    seeds,
    st.lists(st.integers(1, 15), min_size=1, max_size=3),
    st.integers(1, 70),
    st.integers(1, 2),
    st.integers(1, 6),
    st.booleans(),
)
def test_compress(seed: int, lengths: list[int], n_channels: int, n_parts: int, period: int, has_scores: bool) -> None:
    width, slots = n_parts * n_channels, np.repeat(np.arange(len(lengths)), lengths)
    n, biases = len(slots), normal(seed + 2, period, width)
    inputs = {"values": normal(seed, n, width), "scores": normal(seed + 1, n, width) * 10}

    def record(program: k.Program, at) -> None:
        scores = (*at.scores, at.biases) if has_scores else (0, 0, 0)
        program.compress(*at.values, *scores, at.state, *at.out, n_channels, n_parts, period)

    state = {"state": 4 * len(lengths) * 3 * width}
    outputs = {"out": (n_channels, np.float32)}
    case = Case(record, inputs, outputs, {"biases": biases}, state, slots=slots, n_slots=len(lengths))
    exact = np.empty((n, n_channels))
    for slot, length in enumerate(lengths):
        rows = np.flatnonzero(slots == slot)
        values, scores = f64(inputs["values"][rows]), f64(inputs["scores"][rows]) + biases[np.arange(length) % period]
        scores = scores * has_scores  # or a mean
        for t in range(length):
            first = t // period * period
            parts = [x[first : t + 1, -n_channels:] for x in (values, scores)]
            if n_parts == 2 and first:
                before = [x[first - period : first, :n_channels] for x in (values, scores)]
                parts = [np.concatenate(pair) for pair in zip(before, parts, strict=True)]
            exact[rows[t]] = (softmax(parts[1].T) * parts[0].T).sum(-1)
    case.check({"out": exact}, rtol=1e-5, atol=1e-6)


@more
@given(
    seeds,
    st.lists(st.integers(1, 15), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (2, 4), (1, 3)]),
    st.sampled_from([(16, 16), (12, 20), (32, 8)]),
    st.booleans(),
    st.sampled_from(["delta", "channels", "state space", "lightning"]),
    st.sampled_from([0.0, -5.0, -0.25]),
)
def test_recurrence(seed: int, lengths: list[int], heads, dims, grouped: bool, kind: str, bound: float) -> None:
    """The gated delta rule, with a decay for each head or each channel of its key, a state-space model, or less."""
    (n_k, n_v), (k_dim, v_dim), is_delta = heads, dims, kind in {"delta", "channels"}
    is_lightning = kind == "lightning"
    bound = bound if is_delta else 0.0
    decay_dim = k_dim if kind == "channels" else 1
    slots = np.repeat(np.arange(len(lengths)), lengths)
    n, key, value = len(slots), n_k * k_dim, n_v * v_dim
    qkv = normal(seed, n, 2 * key + value)
    beta, alpha = normal(seed + 1, n, n_v), normal(seed + 2, n, n_v * decay_dim)
    a, dt_bias, skip = np.abs(normal(seed + 3, n_v)), normal(seed + 4, n_v * decay_dim), normal(seed + 5, n_v)
    if bound:  # its sign says nothing then
        a[::2] *= -1
    else:
        a = np.exp(-a) if is_lightning else -a

    def record(program: k.Program, at) -> None:
        address, stride = at.qkv
        program.delta_net(
            address,
            address + 4 * key,
            address + 8 * key,
            stride,
            *(at.beta if is_delta else (0, 0)),
            *((0, 0) if is_lightning else at.alpha),
            at.a,
            0 if is_lightning else at.dt_bias,
            0 if is_delta or is_lightning else at.skip,
            at.state,
            *at.out,
            n_k,
            n_v,
            k_dim,
            v_dim,
            decay_dim,
            bound,
            grouped,
            1e-6,
        )

    q, keys = (f64(qkv[:, i * key : (i + 1) * key]).reshape(n, n_k, k_dim) for i in (0, 1))
    if is_delta:
        q, keys = (t / np.sqrt((t**2).sum(-1, keepdims=True) + 1e-6) for t in (q, keys))
        q = q / math.sqrt(k_dim)
    key_head = np.arange(n_v) // (n_v // n_k) if grouped else np.arange(n_v) % n_k
    q, keys = q[:, key_head], keys[:, key_head]
    v = f64(qkv[:, 2 * key :]).reshape(n, n_v, v_dim)
    rates, shifted = f64(a)[:, None], (f64(alpha) + dt_bias).reshape(n, n_v, decay_dim)
    dt = np.logaddexp(0, shifted)
    decay = np.exp(bound * sigmoid(abs(rates) * shifted) if bound else rates * dt)
    if is_lightning:
        dt, decay, skip = np.ones_like(dt), np.broadcast_to(rates, dt.shape), 0 * skip
    exact, state = [], np.zeros((n_v, k_dim, v_dim))
    for t in range(n):
        if t == 0 or slots[t] != slots[t - 1]:
            state = np.zeros_like(state)
        state = state * decay[t, :, :, None]
        recalled = np.einsum("hkv,hk->hv", state, keys[t])
        added = sigmoid(beta[t])[:, None] * (v[t] - recalled) if is_delta else dt[t] * v[t]
        state = state + keys[t][:, :, None] * added[:, None, :]
        out = np.einsum("hkv,hk->hv", state, q[t]) + (0 if is_delta else skip[:, None] * v[t])
        exact.append(out.reshape(-1))
    case = Case(
        record,
        {"qkv": qkv, "beta": beta, "alpha": alpha},
        {"out": (value, np.float32)},
        {"a": a, "dt_bias": dt_bias, "skip": skip},
        {"state": 4 * len(lengths) * n_v * k_dim * v_dim},
        slots=slots,
        n_slots=len(lengths),
    )
    case.check({"out": np.stack(exact)}, rtol=1e-4, atol=3e-6)


@more
@given(
    seeds, st.lists(st.integers(1, 15), min_size=1, max_size=3), st.integers(1, 70), st.sampled_from([1, 12, 16, 40])
)
def test_selective_scan(seed: int, lengths: list[int], n_channels: int, size: int) -> None:
    slots = np.repeat(np.arange(len(lengths)), lengths)
    n = len(slots)
    x, dt = normal(seed, n, n_channels), 3 * normal(seed + 1, n, n_channels)
    bc, skip = normal(seed + 2, n, 2 * size), normal(seed + 3, n_channels)
    a = -np.exp(normal(seed + 4, n_channels, size))

    def record(program: k.Program, at) -> None:
        address, stride = at.bc
        b_and_c = (address, stride, address + 4 * size, stride)
        program.selective_scan(*at.x, *at.dt, *b_and_c, at.a, at.skip, at.state, *at.out, n_channels, size)

    exact, state, steps = [], np.zeros((n_channels, size)), np.logaddexp(0, f64(dt))
    for t in range(n):
        if t == 0 or slots[t] != slots[t - 1]:
            state = np.zeros_like(state)
        state = np.exp(f64(a) * steps[t, :, None]) * state + (steps[t] * x[t])[:, None] * bc[t, :size]
        exact.append(state @ bc[t, size:] + skip * f64(x[t]))
    case = Case(
        record,
        {"x": x, "dt": dt, "bc": bc},
        {"out": (n_channels, np.float32)},
        {"a": a, "skip": skip},
        {"state": 4 * len(lengths) * n_channels * size},
        slots=slots,
        n_slots=len(lengths),
    )
    case.check({"out": np.stack(exact)}, rtol=1e-4, atol=1e-5)
