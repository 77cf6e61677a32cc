"""Every CUDA kernel against the CPU's (bits, where the arithmetic is canonical) or plain numpy, in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cuda_launcher import SCHEDULES, Emulator, aligned, assert_near, same_bits

from engine import _kernels
from engine.devices import graph
from engine.devices.cuda import (
    attention,
    elementwise,
    hyper_connections,
    kernels,
    ngrams,
    recurrent,
    residuals,
    selection,
    tiles,
)
from engine.devices.cuda.attention import Cache, Heads, Place, Rotation, Sight
from engine.devices.cuda.kernels import Asked, Combined, Exchange, Forms, GateOf, Normed, Routed, Routing
from engine.devices.cuda.launch import (
    NOT_KEPT,
    NOTHING,
    WARP,
    ExpertMatrix,
    Kept,
    Launch,
    Matrix,
    OfFormat,
    Rows,
    pointer,
)
from engine.devices.cuda.launch import Heads as MatrixHeads
from engine.devices.graph import Gating, KVType, RopeStyle, Scoring
from engine.errors import DeviceError
from engine.quants import install_grids
from engine.quants.formats import BY_NAME, FORMATS, Activation, QuantFormat
from engine.quants.grids import GRID_NAMES, load_grid
from tests.cusim import needs_emulator

pytestmark = needs_emulator
install_grids()
F32 = np.float32


def random_weights(weight_format: QuantFormat, n_rows: int, n_cols: int, seed: int = 0) -> np.ndarray:
    """Random bytes, so every code of the format, but for blocks whose scales make values that are not of this world."""
    rng, size = np.random.default_rng(seed), weight_format.block_size
    blocks = np.zeros((n_rows * n_cols // size, weight_format.block_bytes), np.uint8)
    wrong = np.ones(len(blocks), bool)
    while wrong.any():
        blocks[wrong] = rng.integers(0, 256, (int(wrong.sum()), weight_format.block_bytes), np.uint8)
        with np.errstate(invalid="ignore"):
            values = _kernels.dequantize(weight_format.ggml_type, blocks, size)
            wrong = ~(np.abs(values).max(-1) < 100)
    return blocks.reshape(n_rows, -1)


def grid_of(weight_format: QuantFormat) -> np.ndarray | None:
    name = "IQ1_S" if weight_format.name == "IQ1_M" else weight_format.name
    return load_grid(name) if name in GRID_NAMES else None


def activations(x: np.ndarray, activation: Activation) -> np.ndarray:
    """Activation rows, as bytes."""
    if activation == Activation.F32:
        return aligned(np.ascontiguousarray(x)).view(np.uint8)
    return aligned(_kernels.quantize_activations(np.ascontiguousarray(x), activation))


def awkward_columns(weight_format: QuantFormat) -> int:
    """Several chunks of blocks, the last one not full; for float formats a tail of less than 16."""
    return {1: 333, 32: 32 * 37, 256: 256 * 11}.get(weight_format.block_size, weight_format.block_size * 3)


# -- matrix products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "n_cols"), [(Activation.Q8_256, 2304), (Activation.Q8_32, 1120)])
@pytest.mark.parametrize("mode", ["fast", "race"])
def test_activations_have_the_bits_of_the_cpu(activation: Activation, n_cols: int, mode: str) -> None:
    rng, emulator = np.random.default_rng(0), Emulator(mode)
    x = (rng.standard_normal((3, n_cols)) * 10.0 ** rng.integers(-3, 3, (3, 1))).astype(F32)
    x[0, :256] = 0
    x[1, 5], x[1, 300], x[2, 40] = np.nan, np.inf, 1e-42
    expected = _kernels.quantize_activations(x, activation)
    for order, seed in SCHEDULES:
        out = aligned(np.zeros_like(expected))
        launch = kernels.quantize(emulator.rows(x), n_cols, activation, emulator.byte_rows(out), 1, emulator.count(3))
        emulator.run(launch, order, seed)
        assert (out == expected).all()


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_linear_has_the_bits_of_the_cpu(weight_format: QuantFormat) -> None:
    check_linear(weight_format, 1, "fast")


@pytest.mark.parametrize("name", ["F32", "F16", "NVFP4", "Q4_K"])
def test_linear_takes_some_tokens_together(name: str) -> None:
    check_linear(BY_NAME[name], 3, "fast")


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ2_S", "MXFP4", "F16"])
def test_linear_has_no_races(name: str) -> None:
    check_linear(BY_NAME[name], 3, "race")


@pytest.mark.parametrize(("n_multiprocessors", "warps"), [(1, 4), (8, 2), (64, 1)])
def test_a_block_takes_few_rows_where_there_are_few(n_multiprocessors: int, warps: int, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_MULTIPROCESSORS", n_multiprocessors)
    assert kernels._row_warps(BY_NAME["F16"], 21, 4) == warps  # the warps that check_linear's rows keep busy
    check_linear(BY_NAME["F16"], 1, "race")


@pytest.mark.parametrize(
    ("mode", "n_cols", "n_tokens"),
    [
        ("fast", 320, 1),
        ("race", 2880, 1),
        ("asan", 256, 1),
        ("fast", 7168, 3),
    ],  # the last: for whom there is no room together
)
def test_few_rows_of_float32_are_taken_in_pairs(mode: str, n_cols: int, n_tokens: int) -> None:
    """An odd number of them, a bias, and tokens that are alone in their block, though there are several."""
    rng, emulator, n_rows = np.random.default_rng(1), Emulator(mode), 9
    weights = aligned(random_weights(BY_NAME["F32"], n_rows, n_cols))
    x, bias = aligned(rng.standard_normal((n_tokens, n_cols)).astype(F32)), rng.standard_normal(n_rows).astype(F32)
    expected = _kernels.matmul(BY_NAME["F32"].ggml_type, weights, x) + bias
    for order, seed in SCHEDULES:
        out = np.full((n_tokens, n_rows), np.nan, F32)
        matrix = Matrix(emulator.at(weights), n_rows, emulator.rows(out), emulator.at(bias))
        count = emulator.count(n_tokens, n_tokens)
        launch = kernels.linear(emulator.byte_rows(x), n_cols, BY_NAME["F32"], [matrix], 0, count)
        assert (f"PAIR_COLUMNS={n_cols}" in launch.definitions) == (n_tokens == 1)
        emulator.run(launch, order, seed)
        assert same_bits(out, expected)


def test_linear_takes_many_tokens_in_groups() -> None:
    check_linear(BY_NAME["BF16"], 11, "fast")


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_tiles_have_the_bits_of_the_cpu(weight_format: QuantFormat) -> None:
    check_linear(weight_format, 11, "fast", tiles.linear)


@pytest.mark.parametrize("weight_format", [f for f in FORMATS if tiles.has_integer_form(f)], ids=lambda f: f.name)
def test_few_tokens_have_the_bits_of_the_cpu(weight_format: QuantFormat) -> None:
    check_linear(weight_format, 5, "fast")


@pytest.mark.parametrize(
    ("name", "mode", "n_tokens"),
    [("Q4_K", "race", 8), ("Q6_K", "asan", 2), ("Q5_1", "race", 3), ("Q8_0", "asan", 7), ("Q3_K", "race", 6)],
)
def test_few_tokens_break_no_rule(name: str, mode: str, n_tokens: int) -> None:
    check_linear(BY_NAME[name], n_tokens, mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("Q4_K", "race"), ("Q6_K", "asan"), ("Q5_1", "race"), ("Q8_0", "asan"), ("F16", "race"), ("BF16", "asan")],
)
def test_tiles_break_no_rule(name: str, mode: str) -> None:
    check_linear(BY_NAME[name], 13, mode, tiles.linear)


@pytest.mark.parametrize("n_tokens", [1, 64, 75])
def test_tiles_take_any_number_of_tokens(n_tokens: int) -> None:
    check_linear(BY_NAME["Q4_K"], n_tokens, "fast", tiles.linear)


def check_linear(
    weight_format: QuantFormat, n_tokens: int, mode: str, linear: Callable[..., Launch] = kernels.linear
) -> None:
    rng, emulator, n_cols = np.random.default_rng(1), Emulator(mode), awkward_columns(weight_format)
    sizes = (
        (37, 5) if linear is kernels.linear and mode != "asan" else (75, 5)
    )  # of which the sanitizer sees the last byte
    weights = aligned(random_weights(weight_format, sum(sizes), n_cols))
    x = rng.standard_normal((n_tokens, n_cols)).astype(F32)
    bias, scale = rng.standard_normal(sizes[1]).astype(F32), np.array([0.37], F32)
    expected = _kernels.matmul(weight_format.ggml_type, weights, x)
    rows, grid = activations(x, weight_format.activation), grid_of(weight_format)
    for order, seed in SCHEDULES:
        first, second = (np.full((n_tokens, n), np.nan, F32) for n in sizes)
        address = emulator.at(weights)
        matrices = [
            Matrix(address, sizes[0], emulator.rows(first)),
            Matrix(
                address + sizes[0] * weights.shape[1],
                sizes[1],
                emulator.rows(second),
                emulator.at(bias),
                emulator.at(scale),
            ),
        ]
        count = emulator.count(n_tokens, 1 if n_tokens == 1 else None)
        x_rows, grid_address = emulator.byte_rows(rows), emulator.at(grid) if grid is not None else 0
        emulator.run(linear(x_rows, n_cols, weight_format, matrices, grid_address, count), order, seed)
        assert same_bits(first, np.ascontiguousarray(expected[:, : sizes[0]]))
        assert same_bits(second, expected[:, sizes[0] :] * scale + bias)


EXPERTS = {  # formats, hidden_size, ffn_size, activation, limits
    "mixed": (("Q4_K", "Q4_K", "Q6_K"), 512, 256, graph.Activation.SILU, (0.7, 0.0)),
    "blocks of 32": (("Q8_0", "Q8_0", "Q4_0"), 96, 64, graph.Activation.CLAMPED_SWISH, (0.0, 0.0)),
    "both": (("MXFP4", "Q4_K", "Q5_0"), 256, 96, graph.Activation.CLAMPED_SWISH, (0.0, 0.0)),
    "looked up": (("Q5_K", "IQ2_XS", "IQ4_XS"), 256, 256, graph.Activation.CLAMPED_SILU, (0.3, 0.0)),
    "float": (("F32", "F16", "F32"), 40, 24, graph.Activation.RELU, (0.0, 0.0)),
    "gelu": (("Q6_K", "Q6_K", "Q5_1"), 256, 96, graph.Activation.GELU, (0.0, 0.0)),
    "situ": (("Q6_K", "Q6_K", "Q5_1"), 256, 96, graph.Activation.SITU, (4.0, 25.0)),
    "situ of the gate": (("F32", "F16", "F32"), 40, 24, graph.Activation.SITU, (0.7, 0.0)),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mixed", "fast"),
        ("blocks of 32", "fast"),
        ("float", "fast"),
        ("gelu", "fast"),
        ("both", "race"),
        ("situ", "fast"),
        ("situ of the gate", "asan"),
    ],
)
def test_experts_have_the_bits_of_the_cpu(name: str, mode: str) -> None:
    """Through slots in another order, with one expert that has none and one id that is not asked for."""
    formats, hidden_size, ffn_size, activation, limits = EXPERTS[name]
    n_experts, n_used, n_tokens = 6, 3, 2
    rng, emulator = np.random.default_rng(2), Emulator(mode)
    gate, up, down = (BY_NAME[f] for f in formats)
    x = rng.standard_normal((n_tokens, hidden_size)).astype(F32)
    ids = np.array([[5, 0, 2], [2, -1, 3]], np.int32)
    slots = np.array([4, 1, 0, -1, 2, 5], np.int32)
    scale = rng.random(n_experts).astype(F32)
    stacks, biases = random_experts(rng, (gate, up, down), n_experts, hidden_size, ffn_size)
    expected = cpu_experts(x, ids, stacks, (gate, up, down), scale, biases, activation, *limits)

    in_slots = [aligned(np.zeros_like(stack)) for stack in stacks]
    for stack, placed in zip(stacks, in_slots, strict=True):
        for expert, slot in enumerate(slots):
            if slot >= 0:
                placed[slot] = stack[expert]
    matrices = [
        ExpertMatrix(emulator.at(placed), placed.strides[0], f, emulator.at(scale) if i == 0 else 0, emulator.at(bias))
        for i, (placed, f, bias) in enumerate(zip(in_slots, (gate, up, down), biases, strict=True))
    ]
    x_gate, x_up = (activations(x, f.activation) for f in (gate, up))
    for order, seed in SCHEDULES:
        h = np.full((n_tokens * n_used, ffn_size), np.nan, F32)
        out = np.full((n_tokens, n_used * hidden_size), 7, F32)
        common = (emulator.at(ids), emulator.at(slots), n_used)
        count = emulator.count(n_tokens)
        emulator.run(
            kernels.expert_gate_up(
                *common,
                *matrices[:2],
                emulator.byte_rows(x_gate),
                emulator.byte_rows(x_up),
                hidden_size,
                ffn_size,
                emulator.at(h),
                (0, 0),
                activation,
                *limits,
                count,
            ),
            order,
            seed,
        )
        emulator.run(
            kernels.expert_down(
                *common, matrices[2], emulator.at(h), hidden_size, ffn_size, emulator.rows(out), 0, count
            ),
            order,
            seed,
        )
        found = out.reshape(n_tokens, n_used, hidden_size)
        elsewhere = (ids < 0) | (slots[ids] < 0)
        assert (found[elsewhere] == 7).all()
        assert same_bits(found[~elsewhere], expected[~elsewhere])


@pytest.mark.parametrize(("name", "mode"), [("mixed", "fast"), ("blocks of 32", "asan"), ("float", "race")])
def test_a_shared_expert_is_one_more_choice(name: str, mode: str) -> None:
    """Of each token, with matrices of its own and a place of its own for its result, also where nobody has a slot."""
    formats, hidden_size, ffn_size, _, limits = EXPERTS[name]
    formats, activation = tuple(BY_NAME[f] for f in formats), graph.Activation.SILU
    n_experts, n_used, n_tokens, own = 4, 2, 2, 3
    rng, emulator = np.random.default_rng(12), Emulator(mode)
    x = rng.standard_normal((n_tokens, hidden_size)).astype(F32)
    ids, slots = np.array([[2, 0], [1, 2]], np.int32), np.array([0, 1, -1, -1], np.int32)
    stacks, biases = random_experts(rng, formats, n_experts, hidden_size, ffn_size)
    biases = [np.zeros_like(bias) for bias in biases]
    all_ids = np.hstack([ids, np.full((n_tokens, 1), own, np.int32)])
    expected = cpu_experts(x, all_ids, stacks, formats, np.ones(n_experts, F32), biases, activation, *limits)
    matrices = [ExpertMatrix(emulator.at(s), s.strides[0], f) for s, f in zip(stacks, formats, strict=True)]
    shared = [ExpertMatrix(m.address + own * m.slot_bytes, 0, m.format) for m in matrices]
    x_gate, x_up = (emulator.byte_rows(activations(x, f.activation)) for f in formats[:2])
    for order, seed in SCHEDULES:
        h = np.full((n_tokens * (n_used + 1), ffn_size), np.nan, F32)
        out, shared_out = np.full((n_tokens, n_used * hidden_size), 7, F32), np.zeros((n_tokens, hidden_size), F32)
        count, common = emulator.count(n_tokens), (emulator.at(ids), emulator.at(slots), n_used)
        first = (*matrices[:2], x_gate, x_up, hidden_size, ffn_size, emulator.at(h), (0, 0), activation, *limits, count)
        emulator.run(kernels.expert_gate_up(*common, *first, (shared[0], shared[1])), order, seed)
        second = (matrices[2], emulator.at(h), hidden_size, ffn_size, emulator.rows(out), 0, count)
        emulator.run(kernels.expert_down(*common, *second, (shared[2], emulator.rows(shared_out))), order, seed)
        found, elsewhere = out.reshape(n_tokens, n_used, hidden_size), slots[ids] < 0
        assert (found[elsewhere] == 7).all()
        assert same_bits(found[~elsewhere], expected[:, :n_used][~elsewhere])
        assert same_bits(shared_out, np.ascontiguousarray(expected[:, n_used]))


def random_experts(
    rng: np.random.Generator, formats: tuple[QuantFormat, ...], n_experts: int, hidden_size: int, ffn_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and biases of gate, up and down."""
    shapes = ((ffn_size, hidden_size), (ffn_size, hidden_size), (hidden_size, ffn_size))
    stacks = [
        aligned(random_weights(f, n_experts * rows, cols, seed=i).reshape(n_experts, rows, -1))
        for i, (f, (rows, cols)) in enumerate(zip(formats, shapes, strict=True))
    ]
    return stacks, [(4 * rng.standard_normal((n_experts, rows))).astype(F32) for rows, _ in shapes]


def cpu_experts(
    x: np.ndarray,
    ids: np.ndarray,
    stacks: list[np.ndarray],
    formats: tuple[QuantFormat, ...],
    gate_scale: np.ndarray,
    biases: list[np.ndarray],
    activation: graph.Activation,
    limit: float,
    up_limit: float,
) -> np.ndarray:
    """What the CPU's operation makes of the same experts, float32 [n_tokens, n_used, hidden_size]."""
    n_tokens, hidden_size = x.shape
    n_experts, ffn_size, _ = stacks[0].shape
    program = _kernels.Program(n_tokens, 1, 1)
    forms = [activations(x, f.activation) for f in formats[:2]]
    tables = [np.array([expert.ctypes.data for expert in stack], np.int64) for stack in stacks]
    out = np.zeros((n_tokens, ids.shape[1], hidden_size), F32)
    entries = [
        (t.ctypes.data, f.ggml_type, gate_scale.ctypes.data if i == 0 else 0, bias.ctypes.data)
        for i, (t, f, bias) in enumerate(zip(tables, formats, biases, strict=True))
    ]
    program.experts(
        forms[0].ctypes.data,
        forms[0].strides[0],
        forms[1].ctypes.data,
        forms[1].strides[0],
        ids.ctypes.data,
        n_experts,
        ids.shape[1],
        *entries,
        activation,
        limit,
        up_limit,
        hidden_size,
        ffn_size,
        out.ctypes.data,
        out.strides[0] // 4,
    )
    step = _kernels.Step(n_tokens)
    step.positions[:] = np.arange(n_tokens)
    step.n_tokens = n_tokens
    program.run(step)
    return out


def cpu_soft_cap(x: np.ndarray, cap: float) -> np.ndarray:
    """What the CPU's operation makes of x."""
    (n_tokens, n_cols), out = x.shape, np.zeros_like(x)
    program = _kernels.Program(n_tokens, 1, 1)
    program.soft_cap(x.ctypes.data, n_cols, out.ctypes.data, n_cols, n_cols, cap, _kernels.ROWS_TOKENS)
    step = _kernels.Step(n_tokens)
    step.positions[:], step.n_tokens = np.arange(n_tokens), n_tokens
    program.run(step)
    return out


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F32", "IQ3_S", "TQ1_0", "Q4_1", "NVFP4"])
def test_embedding_is_the_dequantised_row(name: str) -> None:
    emulator, weight_format = Emulator(), BY_NAME[name]
    n_cols = max(96, weight_format.block_size * 2)
    table, grid = random_weights(weight_format, 9, n_cols), grid_of(weight_format)
    ids = np.array([[8, 2], [0, 7], [5, 5]], np.int32)
    for n_ids in (1, 2):
        out = np.zeros((3, n_ids * n_cols), F32)
        emulator.run(
            elementwise.embed(
                emulator.at(aligned(table)),
                weight_format,
                emulator.rows(ids),
                n_ids,
                9,
                n_cols,
                emulator.at(grid) if grid is not None else 0,
                emulator.rows(out),
                1.0,
                emulator.count(3),
            )
        )
        rows = _kernels.dequantize(weight_format.ggml_type, table, n_cols)[ids[:, :n_ids]]
        assert same_bits(out, rows.reshape(3, -1))


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
def test_words_of_the_host_are_fetched(mode: str) -> None:
    """More pieces than a launch takes, of all lengths; nothing beside them is written."""
    rng, emulator = np.random.default_rng(4), Emulator(mode)
    lengths = [0, 1, 255, 256, 257, *rng.integers(0, 40, 140).tolist()]
    sources = [rng.integers(-(2**31), 2**31, max(1, n), np.int32) for n in lengths]
    targets = [np.full(n + 1, 7, np.int32) for n in lengths]
    pieces = [(emulator.at(a), emulator.at(b), n) for a, b, n in zip(sources, targets, lengths, strict=True)]
    launches = elementwise.transfer(pieces)
    assert len(launches) == 2
    for launch in launches:
        emulator.run(launch)
    for source, target, n in zip(sources, targets, lengths, strict=True):
        assert (target[:n] == source[:n]).all()
        assert target[n] == 7


# -- small operations -------------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
def test_elementwise_operations(mode: str) -> None:
    rng, emulator = np.random.default_rng(3), Emulator(mode)
    n_rows, n_cols = 3, 300
    x, y = (rng.standard_normal((n_rows, n_cols)).astype(F32) for _ in range(2))
    count = emulator.count(n_rows)
    for order, seed in SCHEDULES:
        out = np.zeros_like(x)
        emulator.run(
            elementwise.add(emulator.rows(x), emulator.rows(y), emulator.rows(out), n_cols, count), order, seed
        )
        assert same_bits(out, x + y)
        first, second = (np.zeros((n_rows, n_cols // 2), F32) for _ in range(2))
        rows = (emulator.rows(x), emulator.rows(first), emulator.rows(second))
        emulator.run(elementwise.split_heads(*rows, 3, 50, 50, count), order, seed)
        parts = x.reshape(n_rows, 3, 2, 50)
        assert same_bits(first, parts[:, :, 0].reshape(n_rows, -1))
        assert same_bits(second, parts[:, :, 1].reshape(n_rows, -1))
        short, long = np.zeros((n_rows, 3 * 20), F32), np.zeros((n_rows, 3 * 80), F32)
        rows = (emulator.rows(short), emulator.rows(long))
        emulator.run(elementwise.split_heads(emulator.rows(x), *rows, 3, 20, 80, count), order, seed)
        assert same_bits(short, x.reshape(n_rows, 3, 100)[:, :, :20].reshape(n_rows, -1))
        emulator.run(elementwise.join_heads(*rows, emulator.rows(out), 3, 20, 80, count), order, seed)
        assert same_bits(out, x)
        by = rng.standard_normal((n_rows, 1)).astype(F32)
        emulator.run(
            elementwise.scale(emulator.rows(x), 0.3, emulator.rows(by), emulator.rows(out), n_cols, count), order, seed
        )
        assert same_bits(out, x * (F32(0.3) * by))
        emulator.run(elementwise.scale(emulator.rows(x), 0.3, None, emulator.rows(out), n_cols, count), order, seed)
        assert same_bits(out, x * F32(0.3))
        rows = (emulator.rows(x), 0.3, Rows(emulator.at(by), 0), emulator.rows(out))
        emulator.run(elementwise.scale(*rows, n_cols, count), order, seed)
        assert same_bits(out, x * (F32(0.3) * by[0]))
        emulator.run(elementwise.soft_cap(emulator.rows(x), 0.7, emulator.rows(out), n_cols, count), order, seed)
        assert same_bits(out, cpu_soft_cap(x, 0.7))
        assert_near(out, 0.7 * np.tanh(x.astype(np.float64) / 0.7), abs=3e-7)
        emulator.run(elementwise.clamp(emulator.rows(x), 0.7, emulator.rows(out), n_cols, count), order, seed)
        assert same_bits(out, np.clip(x, -F32(0.7), F32(0.7)))
        positions = np.array([0, 15, 8000], np.int32)
        for offset in (0, 1):
            before, rows = out.copy(), emulator.rows(out)
            launch = elementwise.scale_by_position(rows, emulator.at(positions), n_cols, offset, 16, 0.1, count)
            emulator.run(launch, order, seed)
            factor = 1 + 0.1 * np.log1p((positions + offset) // 16)
            assert_near(out, before * factor[:, None], rel=1e-6)
        chosen, picked = np.array([2, 0], np.int32), np.zeros((2, n_cols), F32)
        rows = (emulator.rows(x), emulator.at(chosen), emulator.rows(picked))
        emulator.run(elementwise.select_outputs(*rows, n_cols, emulator.count(2)), order, seed)
        assert same_bits(picked, x[chosen])
        weight = rng.standard_normal(100).astype(F32)
        emulator.run(
            elementwise.rms_norm(emulator.rows(x), emulator.at(weight), emulator.rows(out), 3, 100, 1e-6, count),
            order,
            seed,
        )
        groups = x.reshape(n_rows, 3, 100).astype(np.float64)
        expected = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-6) * weight
        assert_near(out, expected.reshape(n_rows, -1), rel=1e-5, abs=1e-6)
        columns = rng.standard_normal((3, 100)).astype(F32)
        rows = (emulator.rows(x), emulator.at(columns), emulator.rows(out))
        emulator.run(elementwise.rms_norm(*rows, 3, 100, 1e-6, count, weight_step=100), order, seed)
        assert_near(out, (expected / weight * columns).reshape(n_rows, -1), rel=1e-5, abs=1e-6)
        launch = elementwise.rms_norm(emulator.rows(x), 0, emulator.rows(out), 3, 100, 1e-6, count)
        emulator.run(launch, order, seed)
        assert_near(out, (expected / weight).reshape(n_rows, -1), rel=1e-5, abs=1e-6)
        emulator.run(elementwise.rms_norm(*rows, 3, 100, 1e-6, count, weight_step=100, centers=True), order, seed)
        groups -= groups.mean(-1, keepdims=True)
        expected = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-6) * columns
        assert_near(out, expected.reshape(n_rows, -1), rel=1e-5, abs=1e-6)
        biases = rng.standard_normal((3, 100)).astype(F32)
        launch = elementwise.rms_norm(
            *rows, 3, 100, 1e-6, count, weight_step=100, centers=True, bias=emulator.at(biases)
        )
        emulator.run(launch, order, seed)
        assert_near(out, (expected + biases).reshape(n_rows, -1), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize("period", [1, 4])
def test_rope_is_accurate_at_long_positions(style: RopeStyle, period: int) -> None:
    rng, emulator = np.random.default_rng(4), Emulator()
    n_heads, head_dim, n_rot = 6, 50, 40
    x = rng.standard_normal((3, n_heads * head_dim)).astype(F32)
    positions, magnitude = np.array([0, 7, 130_001], np.int32), 1.5
    frequencies = (1e6 ** (-np.arange(n_rot // 2) / (n_rot // 2))).astype(F32)
    heads = x.reshape(3, n_heads, head_dim).astype(np.float64)
    angle = (positions // period * period)[:, None, None] * frequencies.astype(np.float64)
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    half = n_rot // 2
    first, second = (
        (slice(0, half), slice(half, n_rot)) if style == RopeStyle.NEOX else (slice(0, n_rot, 2), slice(1, n_rot, 2))
    )
    a, b = heads[..., first].copy(), heads[..., second].copy()
    heads[..., first], heads[..., second] = a * cos - b * sin, a * sin + b * cos
    how = (n_heads, head_dim, n_rot, style, magnitude, emulator.count(3), period)
    launch = elementwise.rope(emulator.rows(x), emulator.at(positions), emulator.at(frequencies), *how)
    emulator.run(launch)
    assert_near(x, heads.reshape(3, -1), abs=1e-5)


def check_forms(x: np.ndarray, made: dict[Activation, np.ndarray]) -> None:
    for activation, rows in made.items():
        assert (rows == _kernels.quantize_activations(x, activation)).all(), activation


def make_forms(emulator: Emulator, n_rows: int, n_cols: int, *wanted: Activation) -> tuple[Forms, dict]:
    empty = np.zeros((n_rows, n_cols), F32)
    made = {form: aligned(np.zeros_like(_kernels.quantize_activations(empty, form))) for form in wanted}
    places = (emulator.byte_rows(made[f]) if f in made else None for f in (Activation.Q8_256, Activation.Q8_32))
    return Forms(*places), made


FUNCTIONS = {
    Gating.SIGMOID: sigmoid,
    Gating.SILU: lambda x: x * sigmoid(x),
    Gating.SOFTPLUS: lambda x: np.logaddexp(0, x),
    Gating.RELU: lambda x: np.maximum(x, 0),
    Gating.PRODUCT: lambda x: x,
    Gating.GELU: lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    Gating.CLAMPED_SWISH: lambda x: np.minimum(x, 7) * sigmoid(1.702 * np.minimum(x, 7)),
    Gating.CLAMPED_SILU: lambda x: x * sigmoid(x),
}
NEED_LIMITS = {Gating.SITU, Gating.CLAMPED_SILU}  # so that no gate of attention is one


def gated(gating: Gating, x: np.ndarray, gate: np.ndarray, limit: float = 0.0, own_limit: float = 0.0) -> np.ndarray:
    if gating == Gating.SITU:
        x = own_limit * np.tanh(x / own_limit) if own_limit else x
        return limit * np.tanh(gate / limit) * sigmoid(gate) * x
    factor = FUNCTIONS[gating](np.minimum(gate, limit) if gating == Gating.CLAMPED_SILU else gate)
    if gating == Gating.CLAMPED_SWISH:
        return factor * (x.clip(-7, 7) + 1)
    return np.minimum(factor, limit) * x.clip(-limit, limit) if limit else factor * x


GATES = [(0, 1, 0.0), (8, 1, 0.0), (128, 1, 0.6), (256, 1, 0.0), (0, 64, 0.5)]  # head_size, gated_together, limit


@pytest.mark.parametrize(
    ("mode", "gating", "head_size", "gated_together", "limit"),
    [
        *(("fast", gating, *gate) for gating in Gating for gate in GATES),
        # The rules of memory: each function once, each kind of gate at least once.
        *((mode, gating, *GATES[i % len(GATES)]) for mode in ("race", "asan") for i, gating in enumerate(Gating)),
    ],
)
def test_gate(mode: str, gating: Gating, head_size: int, gated_together: int, limit: float) -> None:
    rng, emulator, n_rows, n_cols = np.random.default_rng(3), Emulator(mode), 3, 1280
    x = rng.standard_normal((n_rows, n_cols)).astype(F32)
    by = rng.standard_normal((n_rows, n_cols // gated_together)).astype(F32)
    own_limit = 0.0
    if gating == Gating.CLAMPED_SWISH:  # beyond its own limit
        x, by, limit = x * 8, by * 8, 0.0
    elif gating == Gating.SITU:
        limit, own_limit = limit or 1.5, limit and 0.8
    elif gating == Gating.CLAMPED_SILU:
        limit = 0.6
    weight = rng.standard_normal(max(1, head_size)).astype(F32)
    expected = x.astype(np.float64)
    if head_size:
        heads = expected.reshape(n_rows, -1, head_size)
        expected = (heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * weight).reshape(n_rows, -1)
    expected = gated(gating, expected, by.astype(np.float64).repeat(gated_together, 1), limit, own_limit)
    for order, seed in SCHEDULES:
        out = np.zeros_like(x)
        forms, made = make_forms(emulator, n_rows, n_cols, Activation.Q8_256, Activation.Q8_32)
        per_head = gated_together > 1
        places = (gated_together, 1) if per_head else (n_cols, n_cols)
        gate = GateOf(gating, emulator.rows(by), *places, per_head, limit, own_limit)
        count, weights = emulator.count(n_rows), emulator.at(weight)
        rows = emulator.rows(x), gate, emulator.rows(out)
        launch = kernels.gate(*rows, n_cols, count, forms, head_size, weights, 1e-6)
        emulator.run(launch, order, seed)
        assert_near(out, expected, rel=1e-5, abs=1e-6)
        check_forms(out, made)


@pytest.mark.parametrize(("n_cols", "n_streams", "mode"), [(1280, 4, "fast"), (96, 3, "race"), (40, 8, "asan")])
def test_gates_of_streams_that_are_added_up(n_cols: int, n_streams: int, mode: str) -> None:
    rng, emulator, n_rows = np.random.default_rng(3), Emulator(mode), 3
    x, by = (rng.standard_normal((n_rows, n_streams * n_cols)).astype(F32) for _ in range(2))
    expected = gated(Gating.SIGMOID, x.astype(np.float64), by).reshape(n_rows, n_streams, n_cols).sum(1)
    wanted = [form for form, size in ((Activation.Q8_256, 256), (Activation.Q8_32, 32)) if n_cols % size == 0]
    for order, seed in SCHEDULES:
        out = np.zeros((n_rows, n_cols), F32)
        forms, made = make_forms(emulator, n_rows, n_cols, *wanted)
        gate = GateOf(Gating.SIGMOID, emulator.rows(by), n_streams * n_cols, n_streams * n_cols)
        what = emulator.rows(x), gate, emulator.rows(out), n_cols, emulator.count(n_rows), forms
        emulator.run(kernels.gate(*what, n_streams=n_streams), order, seed)
        assert_near(out, expected, rel=1e-5, abs=1e-6)
        check_forms(out, made)


@pytest.mark.parametrize(("n_cols", "n_streams", "mode"), [(1300, 4, "fast"), (70, 3, "race"), (5, 2, "asan")])
def test_gate_by_agreement(n_cols: int, n_streams: int, mode: str) -> None:
    rng, emulator, n_rows = np.random.default_rng(3), Emulator(mode), 4
    a, b = (rng.standard_normal((n_rows, n_streams * n_cols)).astype(F32) for _ in range(2))
    x = rng.standard_normal((n_rows, n_cols)).astype(F32)
    a[0], a[1] = 0, a[1] * 1e-4  # no agreement, and less than the floor
    agreement = (a.astype(np.float64) * b).reshape(n_rows, n_streams, n_cols).sum(-1) / np.sqrt(n_cols)
    gate = sigmoid(np.sign(agreement) * np.sqrt(np.maximum(np.abs(agreement), 1e-4)))
    for order, seed in SCHEDULES:
        out = np.zeros_like(a)
        rows = (emulator.rows(array) for array in (a, b, x, out))
        emulator.run(ngrams.gate_by_agreement(*rows, n_streams, n_cols, 1e-4, emulator.count(n_rows)), order, seed)
        assert_near(out, (gate[..., None] * x[:, None]).reshape(n_rows, -1), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("n_hashed", "n_heads", "n", "mode"), [(3, 4, 290, "fast"), (8, 7, 23, "race"), (2, 1, 19, "asan")]
)
def test_tokens_are_hashed_as_the_cpu_hashes_them(n_hashed: int, n_heads: int, n: int, mode: str) -> None:
    """Of two sequences, however their tokens are cut into steps; one in five is where n-grams end."""
    rng, emulator, end_id = np.random.default_rng(3), Emulator(mode), 2
    tokens = rng.integers(0, 5, (2, n)).astype(np.int32)
    multipliers = rng.integers(0, 2**64, n_hashed, np.uint64)
    sizes, offsets = (rng.integers(1, 2**30, n_heads).astype(np.uint32) for _ in range(2))
    hashes = multipliers, sizes, offsets

    def cpu() -> np.ndarray:
        out, state = np.zeros((2 * n, n_heads), np.int32), np.zeros(2 * (n_hashed - 1), np.int32)
        program, step = _kernels.Program(2 * n, 2, 1), _kernels.Step(2 * n)
        places = state.ctypes.data, out.ctypes.data, n_heads, *(x.ctypes.data for x in hashes)
        program.hash_tokens(*places, n_hashed, n_heads, end_id)
        step.token_ids[:], step.slots[:] = tokens.ravel(), np.repeat([0, 1], n)
        step.positions[:], step.n_tokens = np.tile(np.arange(n), 2), 2 * n
        program.run(step)
        return out.reshape(2, n, n_heads)

    expected = cpu()
    for cuts in ([0, n], [0, 1, 2, 9, n]):
        state = np.full((3, n_hashed - 1), -1, np.int32)
        for begin, end in pairwise(cuts):
            m = end - begin
            found = np.zeros((2 * m, n_heads), np.int32)
            ids, positions, slots = (
                np.array(x, np.int32)
                for x in (tokens[:, begin:end].ravel(), [*range(begin, end)] * 2, np.repeat([2, 0], m))
            )
            how = ngrams.Hashes(*map(emulator.at, hashes), n_hashed, n_heads, end_id)
            place = Place(emulator.at(positions), emulator.at(slots))
            what = emulator.rows(found), how, emulator.at(ids), place, emulator.count(2 * m)
            emulator.run(ngrams.hash_tokens(emulator.at(state), *what))
            assert (found.reshape(2, m, n_heads) == expected[:, begin:end]).all()


@pytest.mark.parametrize(
    ("n_cols", "n_kept", "n", "mode"), [(300, 4, 9, "fast"), (70, 3, 7, "race"), (5, 9, 4, "asan")]
)
def test_rows_are_carried_over_as_on_the_cpu(n_cols: int, n_kept: int, n: int, mode: str) -> None:
    """Of two sequences, however their tokens are cut into steps; what is left behind is the same, too."""
    rng, emulator = np.random.default_rng(3), Emulator(mode)
    x = rng.standard_normal((2, n, n_cols)).astype(F32)
    for cuts in ([0, n], [0, 1, 2, n]):
        own, cpus = (np.zeros((3, n_kept, n_cols), F32) for _ in range(2))
        for (begin, end), (order, seed) in zip(pairwise(cuts), SCHEDULES, strict=False):
            m = end - begin
            rows = np.ascontiguousarray(x[:, begin:end]).reshape(2 * m, n_cols)
            positions, slots = (np.array(v, np.int32) for v in ([*range(begin, end)] * 2, np.repeat([2, 0], m)))
            found, expected = np.zeros_like(rows), np.zeros_like(rows)
            program, step = _kernels.Program(2 * m, 3, 1), _kernels.Step(2 * m)
            step.positions[:], step.slots[:], step.n_tokens = positions, slots, 2 * m
            program.carry_over(rows.ctypes.data, n_cols, cpus.ctypes.data, expected.ctypes.data, n_cols, n_cols, n_kept)
            program.run(step)
            at = emulator.at(positions), emulator.at(slots), emulator.count(2 * m)
            what = n_cols, n_kept, *at
            emulator.run(
                elementwise.carry_over(emulator.rows(rows), emulator.at(own), emulator.rows(found), *what), order, seed
            )
            assert same_bits(found, expected)
            assert same_bits(own, cpus)
            again, before = np.zeros_like(rows), own.copy()
            at = emulator.at(np.array([end], np.int32)), emulator.at(np.array([2], np.int32)), emulator.count(1)
            what = n_cols, n_kept, *at
            emulator.run(elementwise.carry_over(None, emulator.at(own), emulator.rows(again), *what), order, seed)
            assert same_bits(again[0], rows[m - 1])
            assert same_bits(own, before)


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
@pytest.mark.parametrize("centers", [False, True])
@pytest.mark.parametrize(("n_cols", "has_weight"), [(2304, True), (96, False), (9216, True)])
def test_the_norm_of_a_sum_comes_in_all_forms(mode: str, n_cols: int, has_weight: bool, centers: bool) -> None:
    rng, emulator, n_rows = np.random.default_rng(3), Emulator(mode), 3
    x, y = ((rng.standard_normal((n_rows, n_cols)) + 0.5).astype(F32) for _ in range(2))
    weight, bias = (rng.standard_normal(n_cols).astype(F32) for _ in range(2))
    wanted = [Activation.Q8_32] + [Activation.Q8_256] * (n_cols % 256 == 0)
    for order, seed in SCHEDULES:
        for added, has_bias in ((y, False), (None, False), (y, True)):
            total, out = np.zeros_like(x), np.zeros_like(x)
            forms, made = make_forms(emulator, n_rows, n_cols, *wanted)
            launch = kernels.residual(
                emulator.rows(x),
                None if added is None else emulator.rows(added),
                emulator.rows(total),
                n_cols,
                emulator.count(n_rows),
                emulator.at(weight) if has_weight else 0,
                1e-6,
                emulator.rows(out),
                forms,
                centers=centers,
                bias=emulator.at(bias) if has_bias else 0,
            )
            emulator.run(launch, order, seed)
            assert same_bits(total, np.zeros_like(x) if added is None else x + added)
            summed = (x if added is None else total).astype(np.float64)
            summed -= centers * summed.mean(-1, keepdims=True)
            expected = summed / np.sqrt((summed**2).mean(-1, keepdims=True) + 1e-6) * (weight if has_weight else 1)
            expected += has_bias * bias
            assert_near(out, expected, rel=1e-5, abs=1e-6)
            check_forms(out, made)


def answered(emulator: Emulator, answers: np.ndarray) -> Exchange:
    """What a layer shares with a CPU that has answered already: request 3 of step 1, layer 0 of 1."""
    words = np.array([0, 3, 0, 1, 1], np.uint32)
    at = [emulator.at(words[i : i + 1]) for i in range(len(words))]
    return Exchange(0, {}, emulator.at(answers), *at, n_layers=1)


@pytest.mark.parametrize("mode", ["fast", "race"])
@pytest.mark.parametrize("has_shared", [False, True])
@pytest.mark.parametrize("n_used", [4, 11])
def test_combination_takes_misses_from_the_answers(mode: str, has_shared: bool, n_used: int) -> None:
    rng, emulator = np.random.default_rng(5), Emulator(mode)
    n_tokens, n_cols = 3, 320
    expert_out, answers = (rng.standard_normal((n_tokens, n_used, n_cols)).astype(F32) for _ in range(2))
    residual, shared = (rng.standard_normal((n_tokens, n_cols)).astype(F32) for _ in range(2))
    weights, shared_gate = rng.random((n_tokens, n_used)).astype(F32), rng.standard_normal((n_tokens, 1)).astype(F32)
    ids, slots = (
        rng.integers(0, 8, (n_tokens, n_used)).astype(np.int32),
        np.array([0, -1, 2, -1, 3, 1, -1, -1], np.int32),
    )
    combined = Combined(
        Rows(emulator.at(expert_out), n_used * n_cols),
        answered(emulator, answers),
        emulator.at(ids),
        emulator.at(slots),
        emulator.at(weights) if has_shared else 0,
        n_used,
        emulator.rows(shared) if has_shared else None,
        emulator.rows(shared_gate) if has_shared else None,
        0.5,
    )
    values = np.where((slots[ids] < 0)[..., None], answers, expert_out)
    total = np.einsum("trh,tr->th", values, weights if has_shared else np.ones_like(weights))
    added_up = 0.5 * (total + has_shared * shared * sigmoid(shared_gate))
    for order, seed in SCHEDULES:
        for chosen_early, has_stream in ((False, True), (True, True), (True, False)):
            expected = residual + added_up if has_stream else added_up
            out, normalised = np.zeros_like(residual), np.zeros_like(residual)
            forms, made = make_forms(emulator, n_tokens, n_cols, Activation.Q8_32)
            added, count = combined._replace(chosen_early=chosen_early), emulator.count(n_tokens)
            rows = (emulator.rows(residual) if has_stream else NOTHING, added, emulator.rows(out))
            emulator.run(kernels.residual(*rows, n_cols, count), order, seed)
            assert_near(out, expected, rel=1e-5, abs=1e-5)
            for centers in (False, True):
                norm_of = (0, 1e-6, emulator.rows(normalised), forms)
                emulator.run(kernels.residual(*rows, n_cols, count, *norm_of, centers=centers), order, seed)
                centered = expected - centers * expected.mean(-1, keepdims=True)
                norm = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
                assert_near(normalised, norm, rel=1e-5, abs=1e-5)
                check_forms(normalised, made)


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
@pytest.mark.parametrize(
    ("n_experts", "n_groups", "n_groups_used", "scoring", "normalize", "has_bias"),
    [
        (128, 1, 1, Scoring.SOFTMAX, True, False),
        (64, 8, 3, Scoring.SIGMOID, True, True),
        (32, 1, 1, Scoring.SOFTMAX_OF_CHOSEN, False, False),
        (40, 4, 2, Scoring.SOFTMAX, False, True),
        (8, 1, 1, Scoring.SOFTMAX, True, False),
        (40, 1, 1, Scoring.SQRT_SOFTPLUS, True, True),
    ],
)
def test_router(
    mode: str, n_experts: int, n_groups: int, n_groups_used: int, scoring: Scoring, normalize: bool, has_bias: bool
) -> None:
    rng, emulator = np.random.default_rng(6), Emulator(mode)
    n_tokens, n_used = 3, 6
    logits = rng.standard_normal((n_tokens, n_experts)).astype(F32)
    logits[0, 3] = logits[0, 5] = 4.0  # a tie goes to the lower id
    bias = (rng.random(n_experts) * 0.1).astype(F32)
    ids, weights = np.zeros((n_tokens, n_used), np.int32), np.zeros((n_tokens, n_used), F32)

    routing = Routing(
        emulator.rows(logits),
        emulator.at(bias) if has_bias else 0,
        emulator.at(ids),
        emulator.at(weights),
        n_experts,
        n_used,
        scoring,
        n_groups,
        n_groups_used,
        normalize,
        2.5,
    )

    def run(order: str = "forward", seed: int = 1) -> None:
        emulator.run(kernels.router(routing, emulator.count(n_tokens)), order, seed)

    x = logits.astype(np.float64)
    softmax = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    scores = {
        Scoring.SOFTMAX: softmax,
        Scoring.SIGMOID: sigmoid(x),
        Scoring.SQRT_SOFTPLUS: np.sqrt(np.logaddexp(0, x)),
    }.get(scoring, x)
    choice = scores + bias * has_bias
    if n_groups > 1:
        groups = choice.reshape(n_tokens, n_groups, -1)
        rank = np.argsort(np.argsort(-np.sort(groups, -1)[..., -2:].sum(-1), -1, kind="stable"), -1, kind="stable")
        choice = np.where((rank < n_groups_used)[..., None], groups, -np.inf).reshape(choice.shape)
    expected_ids = np.argsort(-choice, -1, kind="stable")[:, :n_used]
    expected = np.take_along_axis(scores, expected_ids, -1)
    if scoring == Scoring.SOFTMAX_OF_CHOSEN:
        expected = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    if normalize:
        expected /= expected.sum(-1, keepdims=True)
    for order, seed in SCHEDULES:
        run(order, seed)
        assert (ids == expected_ids).all()
        assert_near(weights, expected * 2.5, rel=1e-5)

    logits[:] = np.nan  # whatever the weights are then, the ids must be ids, each once
    run()
    assert all(len(set(row)) == n_used and min(row) >= 0 and max(row) < n_experts for row in ids.tolist())


def test_quotients_by_one_divisor_are_correctly_rounded() -> None:
    """By the reciprocal, and one by one where a value is so small that this would not be exact."""
    rng, emulator, n = np.random.default_rng(8), Emulator(), 400
    is_small = np.arange(n) % 4 == 0  # a warp has values beside which nothing is left of a remainder
    smallest, largest = (np.where(is_small, *pair)[:, None] for pair in ((125, 70), (100, 0)))
    x = np.ldexp(rng.random((n, 256)) / 2 + 0.5, -rng.integers(largest, smallest, (n, 256))).astype(F32)
    x[:, 0], x[::2, 1], x[1::3, 2] = 1.0, 0.0, np.nextafter(F32(1.0), F32(0.0))
    divisors = np.ldexp(rng.random(n) / 2 + 0.5, rng.integers(1, np.where(is_small, 5, 21))).astype(F32)
    divisors[1:4], divisors[5:8] = (1.0, 3.0, 2.0**20), np.nextafter(F32([4.0, 128.0, 2.0**20]), F32(0.0))
    out, arrays = np.zeros_like(x), (x, divisors)
    source = str(Path(__file__).parent / "cusim" / "kernels" / "quotients.cu")
    pointers = tuple(pointer(emulator.at(array)) for array in (*arrays, out))
    emulator.run(Launch(source, "quotients", (), (n, 1, 1), WARP, pointers))
    assert same_bits(out, x / divisors[:, None])


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
@pytest.mark.parametrize(("n_experts", "n_used"), [(40, 6), (256, 6), (33, 33)])
def test_router_with_a_table(mode: str, n_experts: int, n_used: int) -> None:
    """A token's id says whom it goes to, in which order; weights are made of its logits."""
    rng, emulator, token_ids = np.random.default_rng(6), Emulator(mode), np.array([3, 0, 3, 8], np.int32)
    logits = rng.standard_normal((4, n_experts)).astype(F32)
    table = rng.random((9, n_experts)).argsort(-1)[:, :n_used].astype(np.int32)
    ids, weights = np.zeros((4, n_used), np.int32), np.zeros((4, n_used), F32)
    places = emulator.rows(logits), 0, emulator.at(ids), emulator.at(weights)
    how = n_experts, n_used, Scoring.SQRT_SOFTPLUS, 1, 1, True, 1.5
    routing = Routing(*places, *how, emulator.at(table), emulator.at(token_ids), len(table))
    expected = np.take_along_axis(np.sqrt(np.logaddexp(0, logits.astype(np.float64))), table[token_ids], -1)
    expected *= 1.5 / expected.sum(-1, keepdims=True)
    for order, seed in SCHEDULES:
        emulator.run(kernels.router(routing, emulator.count(4)), order, seed)
        assert (ids == table[token_ids]).all()
        assert_near(weights, expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
@pytest.mark.parametrize(("n_groups", "group_size", "n_used"), [(21, 2, 6), (33, 3, 35), (2, 4, 2)])
def test_group_router(mode: str, n_groups: int, group_size: int, n_used: int) -> None:
    rng, emulator, n_experts = np.random.default_rng(7), Emulator(mode), n_groups * group_size
    logits = rng.standard_normal((3, n_experts)).astype(F32)
    logits[2, :n_groups] -= 20  # nobody who is shared has a score that counts
    ids = np.stack([rng.permutation(n_experts)[:n_used] for _ in logits]).astype(np.int32)
    group_ids, weights = np.zeros_like(ids), np.zeros(ids.shape, F32)
    x = logits.astype(np.float64)
    expected = np.take_along_axis(np.exp(x) / np.exp(x).sum(-1, keepdims=True), ids // group_size, -1)
    expected /= np.maximum(expected.sum(-1, keepdims=True), 2.0**-14)
    for order, seed in SCHEDULES:
        to = emulator.at(ids), emulator.at(group_ids), emulator.at(weights)
        launch = kernels.group_router(emulator.rows(logits), *to, n_experts, n_used, group_size, emulator.count(3))
        emulator.run(launch, order, seed)
        assert (group_ids == ids // group_size).all()
        assert_near(weights, expected, rel=1e-5)


@pytest.mark.parametrize(
    ("n_streams", "n_cols", "n_rows", "adds", "n_scales", "mode"),
    [
        (4, 1000, 3, True, 2, "fast"),
        (4, 1000, 3, False, 2, "race"),
        (3, 32, 70, True, 2, "fast"),  # more rows than are taken at a time
        (3, 36, 70, True, 2, "race"),
        (8, 260, 2, True, 2, "asan"),
        (2, 520, 3, True, 1, "race"),
        (1, 8, 1, False, 1, "asan"),
        (2, 700, 3, True, 0, "race"),  # only the sum
        (4, 300, 70, True, 3, "race"),  # streams that are mixed
        (3, 36, 2, False, 3, "asan"),
    ],
)
@pytest.mark.parametrize("gate_magnitude", [0.0, 2.0])
def test_hyper_connections(
    n_streams: int, n_cols: int, n_rows: int, adds: bool, n_scales: int, mode: str, gate_magnitude: float
) -> None:
    rng, emulator, width, mixes = np.random.default_rng(4), Emulator(mode), n_streams * n_cols, n_scales == 3
    n_mixes, n_kept = n_streams * (2 + n_streams if mixes else n_scales), n_streams**2
    streams, row, gates, kept, matrix, base, scale = (
        aligned(rng.standard_normal(shape).astype(F32))
        for shape in (
            (n_rows, width),
            (n_rows, n_cols),
            (n_rows, n_streams),
            (n_rows, n_kept),
            (max(1, n_mixes), width),
            (max(1, n_mixes),),
            (3,),
        )
    )
    eps, offset, magnitude = 0.1, 0.25, 1.5
    x = streams.astype(np.float64)
    if adds and mixes:
        by_stream = x.reshape(n_rows, n_streams, n_cols), kept.reshape(n_rows, n_streams, n_streams)
        x = np.einsum("tih,tij->tjh", *by_stream).reshape(n_rows, -1)
    if adds:
        by = gate_magnitude * sigmoid(gates) if gate_magnitude else gates
        x += (by[:, :, None] * row.astype(np.float64)[:, None]).reshape(n_rows, -1)
    found = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) @ matrix.T
    of_mixes = np.concatenate([np.repeat(scale[:2], n_streams), np.repeat(scale[2], n_kept)])[: max(1, n_mixes)]
    found = of_mixes * found + base
    expected_kept = (
        normalized(found[:, 2 * n_streams :].reshape(-1, n_streams, n_streams), offset, 3) if mixes else None
    )
    found = sigmoid(found[:, : 2 * n_streams])
    expected = found[:, :n_streams] + offset, magnitude * found[:, n_streams:] + (0 if mixes else offset)

    n_done = np.zeros(n_rows, np.int32)
    partial = np.zeros(hyper_connections.n_partial(n_rows, width, n_mixes), F32)
    bits = set()
    for order, seed in SCHEDULES:
        sums, weights, new_gates, new_kept = (aligned(np.full_like(a, np.nan)) for a in (streams, gates, gates, kept))
        added, mixing = None, None
        if adds:
            mixing_before = emulator.rows(kept) if mixes else NOTHING
            added = hyper_connections.Added(
                emulator.rows(row), emulator.rows(gates), emulator.rows(sums), mixing_before, gate_magnitude
            )
        if n_scales:
            places = (emulator.at(array) for array in (matrix, scale, base, partial, n_done, weights))
            to = emulator.at(new_gates) if n_scales > 1 else 0
            to_kept = emulator.at(new_kept) if mixes else 0
            mixing = hyper_connections.Mixing(*places, to, to_kept, eps, offset, magnitude, 3)
        what = (emulator.rows(streams), added, n_streams, n_cols, mixing)
        emulator.run(hyper_connections.hyper_connections(*what, emulator.count(n_rows)), order, seed)
        if adds:
            assert_near(sums, x, rel=1e-5, abs=1e-6)
        if n_scales:
            assert_near(weights, expected[0], rel=1e-5)
        if n_scales > 1:
            assert_near(new_gates, expected[1], rel=1e-5, abs=1e-6)
        if expected_kept is not None:
            assert_near(new_kept, expected_kept.reshape(n_rows, -1), rel=1e-4)
        assert not n_done.any()
        bits.add((sums.tobytes(), weights.tobytes(), new_gates.tobytes(), new_kept.tobytes()))
    assert len(bits) == 1


def normalized(mixes: np.ndarray, offset: float, n_normalizations: int) -> np.ndarray:
    """How much streams keep of each other, see `graph.ReduceStreams`; [rows, streams, streams]."""
    e = np.exp(mixes - mixes.max(-1, keepdims=True))
    kept = e / e.sum(-1, keepdims=True) + offset
    for i in range(2 * n_normalizations - 1):
        kept = kept / (kept.sum(2 if i % 2 else 1, keepdims=True) + offset)
    return kept


@pytest.mark.parametrize(
    ("n_channels", "n_parts", "period", "has_scores", "mode"),
    [(150, 2, 4, True, "race"), (64, 1, 5, True, "fast"), (30, 2, 3, True, "asan"), (70, 1, 4, False, "race")],
)
def test_compress(n_channels: int, n_parts: int, period: int, has_scores: bool, mode: str) -> None:
    """Of two sequences, however their tokens are cut into steps."""
    rng, emulator, n, width = np.random.default_rng(2), Emulator(mode), 23, n_parts * n_channels
    values, scores = (rng.standard_normal((2, n, width)).astype(F32) * size for size in (1, 3))
    biases = rng.standard_normal((period, width)).astype(F32)
    weighed = has_scores * (scores.astype(np.float64) + biases[np.arange(n) % period])
    expected = np.zeros((2, n, n_channels))
    for t in range(n):
        first = t // period * period
        parts = [(values[:, first : t + 1, -n_channels:], weighed[:, first : t + 1, -n_channels:])]
        if n_parts == 2 and first:
            before = slice(None), slice(first - period, first), slice(0, n_channels)
            parts.insert(0, (values[before], weighed[before]))
        v, s = (np.concatenate(some, axis=1) for some in zip(*parts, strict=True))
        e = np.exp(s - s.max(1, keepdims=True))
        expected[:, t] = (v * e).sum(1) / e.sum(1)
    bits = set()
    for cuts in ([0, 23], [0, 1, 2, 9, 23], list(range(24))):
        state, out = aligned(np.full((3, n_parts, 3, n_channels), np.nan, F32)), np.zeros((2, n, n_channels), F32)
        for begin, end in pairwise(cuts):
            step = slice(begin, end)
            made = np.full((2 * (end - begin), n_channels), np.nan, F32)
            rows = [emulator.rows(x[:, step].reshape(-1, width).copy()) for x in (values, scores)[: 1 + has_scores]]
            rows += [None] * (2 - len(rows))
            positions, slots = (
                np.array(x, np.int32) for x in ([*range(begin, end)] * 2, np.repeat([2, 0], end - begin))
            )
            places = emulator.at(positions), emulator.at(slots)
            what = emulator.at(biases), emulator.at(state), emulator.rows(made), n_channels, n_parts, period, *places
            emulator.run(recurrent.compress(*rows, *what, emulator.count(2 * (end - begin))))
            out[:, step] = made.reshape(2, -1, n_channels)
        assert_near(out, expected, abs=1e-5)
        bits.add(out.tobytes())
    assert len(bits) == 1


@pytest.mark.parametrize(
    ("n_residuals", "n_cols", "adds", "normalizes", "has_weight", "mode"),
    [
        (9, 1280, True, True, True, "fast"),
        (3, 9216, True, True, True, "race"),  # more than one round
        (16, 520, False, True, False, "asan"),
        (1, 256, False, True, True, "race"),
        (2, 1032, True, False, False, "asan"),
    ],
)
def test_mix_residuals(
    n_residuals: int, n_cols: int, adds: bool, normalizes: bool, has_weight: bool, mode: str
) -> None:
    rng, emulator, n_rows = np.random.default_rng(6), Emulator(mode), 3
    given = [aligned(rng.standard_normal((n_rows, n_cols)).astype(F32) * (i + 1)) for i in range(n_residuals)]
    a, b = (aligned(rng.standard_normal((n_rows, n_cols)).astype(F32)) for _ in range(2))
    scorer, weight = (aligned(rng.standard_normal(n_cols).astype(F32) * 0.05) for _ in range(2))
    x = np.stack(given).astype(np.float64)
    if adds:
        x[-1] = a + b
    scores = x @ scorer.astype(np.float64) / np.sqrt((x**2).mean(-1) + 0.1)
    weights = np.exp(scores - scores.max(0))
    expected = np.einsum("ir,irc->rc", weights / weights.sum(0), x)
    expected_norm = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-3) * (weight if has_weight else 1)

    n_done, scored, bits = np.zeros(n_rows, np.int32), np.zeros((n_rows, n_residuals), F32), set()
    wanted = [Activation.Q8_32] * (n_cols % 32 == 0) + [Activation.Q8_256] * (n_cols % 256 == 0)
    for order, seed in SCHEDULES:
        rows = [array.copy() for array in given]
        rows[-1][:] = np.nan if adds else rows[-1]
        rows, mix, out = [aligned(array) for array in rows], *(aligned(np.full_like(a, np.nan)) for _ in range(2))
        forms, made = make_forms(emulator, n_rows, n_cols, *wanted)
        norm = residuals.Norm(emulator.at(weight) if has_weight else 0, 1e-3, emulator.rows(out), forms)
        launch = residuals.mix_residuals(
            [emulator.rows(array) for array in rows],
            [emulator.rows(array) for array in (a, b)] if adds else [],
            residuals.Scoring(emulator.at(scorer), 0.1, emulator.at(scored), emulator.at(n_done)),
            emulator.rows(mix),
            norm if normalizes else None,
            n_cols,
            emulator.count(n_rows),
        )
        emulator.run(launch, order, seed)
        assert same_bits(rows[-1], a + b if adds else given[-1])
        assert_near(mix, expected, rel=1e-5, abs=1e-5)
        if normalizes:
            assert_near(out, expected_norm, rel=1e-5, abs=1e-5)
            check_forms(out, made)
        assert not n_done.any()
        bits.add((mix.tobytes(), out.tobytes()))
    assert len(bits) == 1


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
@pytest.mark.parametrize(("name", "n_tokens"), [("F32", 2), ("Q8_0", 1)])
@pytest.mark.parametrize("asks", [False, True])
def test_the_launch_of_the_logits_can_choose_and_ask(mode: str, name: str, n_tokens: int, asks: bool) -> None:
    """As the launches one by one do; the counter is left as it was."""
    rng, emulator, weight_format = np.random.default_rng(11), Emulator(mode), BY_NAME[name]
    n_cols, n_experts, n_used = 320, 43, 4  # the matrices end at a multiple of 16 bytes
    matrix = aligned(random_weights(weight_format, n_experts + 1, n_cols))  # and the shared expert's gate
    x = rng.standard_normal((n_tokens, n_cols)).astype(F32)
    slots = rng.integers(-1, 1, n_experts).astype(np.int32)
    forms = {form: activations(x, form) for form in (Activation.F32, Activation.Q8_32)}  # both are sent
    rows, n_done = emulator.byte_rows(forms[weight_format.activation]), np.zeros(1, np.int32)
    for order, seed in SCHEDULES:
        found = []
        for together in (False, True):
            logits, gate = np.zeros((n_tokens, n_experts), F32), np.zeros((n_tokens, 1), F32)
            ids, weights = np.zeros((n_tokens, n_used), np.int32), np.zeros((n_tokens, n_used), F32)
            missing = np.full((n_tokens, n_used), 7, np.int32)
            sent = {form: np.zeros_like(values) for form, values in forms.items()}
            words = np.array([0, 0, 0, 5, 0], np.uint32)
            at = [emulator.at(words[i : i + 1]) for i in range(len(words))]
            to = {form: emulator.at(values) for form, values in sent.items()}
            exchange = Exchange(emulator.at(missing), to, 0, *at, n_layers=3, layer=2)
            x_rows = {form: emulator.byte_rows(values) for form, values in forms.items()}
            asked = Asked(emulator.at(slots), x_rows, n_cols, exchange) if asks else None
            matrices = [
                Matrix(emulator.at(matrix), n_experts, emulator.rows(logits)),
                Matrix(emulator.at(matrix) + n_experts * matrix.strides[0], 1, emulator.rows(gate)),
            ]
            places = (emulator.rows(logits), 0, emulator.at(ids), emulator.at(weights))
            routing = Routing(*places, n_experts, n_used, Scoring.SOFTMAX, 1, 1, True, 1.0)
            count = emulator.count(n_tokens, n_tokens)
            what = (rows, n_cols, weight_format, matrices, 0, count)
            if together:
                routed = Routed(routing, emulator.at(n_done), asked)
                emulator.run(kernels.linear(*what, routed=routed), order, seed)
            else:
                emulator.run([kernels.linear(*what), kernels.router(routing, count)], order, seed)
                if asked:
                    emulator.run(kernels.publish_misses(emulator.at(ids), n_used, asked, count), order, seed)
            found.append([part.copy() for part in (logits, gate, ids, weights, missing, words, *sent.values())])
        assert all((a.view(np.uint32) == b.view(np.uint32)).all() for a, b in zip(*found, strict=True))
        missing, words, *copies = found[1][4:]
        assert n_done[0] == 0
        assert words[0] == (5 * 4 + 2 + 1) * asks
        assert all((copy == (row if asks else 0)).all() for copy, row in zip(copies, forms.values(), strict=True))
        assert (missing == (np.where(slots[ids] < 0, ids, -1) if asks else 7)).all()


@pytest.mark.parametrize(
    ("names", "n_cols", "n_tokens", "mode"),
    [
        (("Q4_K", "Q6_K"), 1024, 1, "fast"),
        (("Q6_K", "Q4_K"), 512, 3, "race"),
        (("IQ3_S", "Q5_K"), 512, 2, "asan"),
        (("Q8_0", "Q4_0"), 96, 5, "fast"),
        (("MXFP4", "IQ4_NL"), 320, 1, "asan"),
    ],
)
def test_matrices_of_two_formats_are_one_launch(names: tuple[str, str], n_cols: int, n_tokens: int, mode: str) -> None:
    """As two launches do; some rows for a block of their own, some for a part of one."""
    rng, emulator = np.random.default_rng(13), Emulator(mode)
    formats = [BY_NAME[name] for name in names]
    x = activations(rng.standard_normal((n_tokens, n_cols)).astype(F32), formats[0].activation)
    sizes = ((37, 5), (20,)) if mode != "asan" else ((48, 16), (32,))  # these end at a multiple of 16 bytes
    weights = [
        [aligned(random_weights(weight_format, n, n_cols)) for n in own]
        for weight_format, own in zip(formats, sizes, strict=True)
    ]
    bias = rng.standard_normal(sizes[1]).astype(F32)
    code_books = [grid_of(weight_format) for weight_format in formats]
    grids = [0 if book is None else emulator.at(book) for book in code_books]
    for order, seed in SCHEDULES:
        found = []
        for together in (False, True):
            outs = [[np.zeros((n_tokens, n), F32) for n in own] for own in sizes]
            parts = [
                OfFormat(
                    weight_format,
                    [
                        Matrix(emulator.at(matrix), len(matrix), emulator.rows(out), emulator.at(bias) if part else 0)
                        for matrix, out in zip(weights[part], outs[part], strict=True)
                    ],
                    grids[part],
                )
                for part, weight_format in enumerate(formats)
            ]
            count = emulator.count(n_tokens)
            if together:
                launches = [kernels.linear(emulator.byte_rows(x), n_cols, *parts[0], count, second=parts[1])]
            else:
                launches = [kernels.linear(emulator.byte_rows(x), n_cols, *part, count) for part in parts]
            emulator.run(launches, order, seed)
            found.append([out for own in outs for out in own])
        assert all(same_bits(before, after) for before, after in zip(*found, strict=True))
        assert all(out.any() for out in found[0])


@pytest.mark.parametrize(
    ("mode", "n_cols", "name", "n_experts", "has_weight"),
    [
        ("fast", 4096, "F32", 300, True),
        ("fast", 2888, "F16", 43, False),
        ("race", 1544, "F32", 43, True),
        ("asan", 768, "BF16", 43, True),
        ("asan", 832, "F32", 46, True),  # pairs of rows
        ("race", 1600, "F32", 43, True),
    ],
)
@pytest.mark.parametrize("asks", [False, True])
def test_the_launch_of_the_logits_can_add_and_normalize_before(
    mode: str, n_cols: int, name: str, n_experts: int, has_weight: bool, asks: bool
) -> None:
    """As the launches one by one do."""
    rng, emulator, weight_format = np.random.default_rng(12), Emulator(mode), BY_NAME[name]
    n_used = 4
    matrix = aligned(random_weights(weight_format, n_experts + 1, n_cols))  # and the shared expert's gate
    bias, weight = rng.standard_normal(n_experts).astype(F32), aligned(rng.standard_normal(n_cols).astype(F32))
    a, b = (aligned(rng.standard_normal((1, n_cols)).astype(F32)) for _ in range(2))
    slots, n_done = rng.integers(-1, 1, n_experts).astype(np.int32), np.zeros(1, np.int32)
    wanted = [form for form, size in ((Activation.Q8_256, 256), (Activation.Q8_32, 32)) if n_cols % size == 0]
    for order, seed in SCHEDULES:
        found = []
        for together in (False, True):
            total, out = (aligned(np.zeros((1, n_cols), F32)) for _ in range(2))
            forms, made = make_forms(emulator, 1, n_cols, *wanted)
            logits, gate = np.zeros((1, n_experts), F32), np.zeros((1, 1), F32)
            ids, weights = np.zeros((1, n_used), np.int32), np.zeros((1, n_used), F32)
            missing = np.full((1, n_used), 7, np.int32)
            rows_of = made or {Activation.F32: out}
            sent = {form: np.zeros((1, kernels.activation_bytes(form, n_cols)), np.uint8) for form in rows_of}
            words = np.array([0, 0, 0, 5, 0], np.uint32)
            at = [emulator.at(words[i : i + 1]) for i in range(len(words))]
            to = {form: emulator.at(values) for form, values in sent.items()}
            exchange = Exchange(emulator.at(missing), to, 0, *at, n_layers=3, layer=2)
            x = {form: emulator.byte_rows(rows) for form, rows in rows_of.items()}
            asked = Asked(emulator.at(slots), x, n_cols, exchange)
            places = (emulator.rows(logits), 0, emulator.at(ids), emulator.at(weights))
            routing = Routing(*places, n_experts, n_used, Scoring.SOFTMAX, 1, 1, True, 1.0)
            routed = Routed(routing, emulator.at(n_done), asked if asks else None)
            matrices = [
                Matrix(emulator.at(matrix), n_experts, emulator.rows(logits), emulator.at(bias)),
                Matrix(emulator.at(matrix) + n_experts * matrix.strides[0], 1, emulator.rows(gate)),
            ]
            count = emulator.count(1, 1)
            summands = (emulator.rows(a), emulator.rows(b), emulator.rows(total))
            norm = (emulator.at(weight) if has_weight else 0, 1e-3, emulator.rows(out), forms)
            what = (emulator.byte_rows(out), n_cols, weight_format, matrices, 0, count)
            if together:
                launches = [kernels.linear(*what, routed=routed, normed=Normed(*summands, *norm))]
            else:
                launches = [kernels.residual(*summands, n_cols, count, *norm), kernels.linear(*what, routed=routed)]
            emulator.run(launches, order, seed)
            results = (total, out, *made.values(), logits, gate, ids, weights, missing, words, *sent.values())
            found.append([part.copy() for part in results])
        assert all(before.tobytes() == after.tobytes() for before, after in zip(*found, strict=True))
        assert n_done[0] == 0
        assert words[0] == (5 * 4 + 2 + 1) * asks
        assert logits.any()


# -- attention and recurrent layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_type", "dims", "group", "n_kv_heads", "window", "chunk", "cap", "n_rows", "mode", "tolerance"),
    [
        (KVType.F32, (64, 64), 4, 2, 0, 0, 0.0, 200, "fast", 1e-5),
        (KVType.F32, (64, 64), 4, 2, 50, 0, 1.25, 200, "fast", 1e-5),
        (KVType.F16, (128, 128), 1, 2, 50, 0, 0.0, 200, "fast", 2e-3),
        (KVType.Q8_0, (256, 256), 8, 1, 0, 40, 0.0, 200, "fast", 3e-2),
        (KVType.Q8_0, (40, 24), 3, 2, 7, 0, 0.75, 200, "race", 3e-2),
        (KVType.F32, (16, 16), 2, 1, 0, 0, 0.0, 200, "asan", 1e-5),
        (KVType.F32, (16, 16), 1, 130, 0, 0, 0.0, 200, "fast", 1e-5),  # parts of several tiles
        # Latent attention: values are parts of their keys.
        (KVType.F16, (576, 512), 11, 1, 0, 0, 0.0, 200, "fast", 2e-3),
        (KVType.F16, (512, 512), 8, 2, 0, 0, 0.0, 200, "fast", 2e-3),
        (KVType.F32, (512, 512), 3, 1, 60, 0, 0.0, 200, "fast", 1e-5),
        (KVType.F16, (576, 512), 3, 1, 60, 0, 0.0, 200, "fast", 2e-3),
        (KVType.F32, (64, 64), 4, 2, 50, 0, 0.0, 64, "fast", 1e-5),  # positions that share rows
        (KVType.Q8_0, (40, 24), 3, 2, 7, 0, 0.75, 32, "race", 3e-2),
        (KVType.F16, (16, 16), 2, 1, 0, 40, 0.0, 96, "asan", 2e-3),
    ],
)
def test_attention(
    kv_type: KVType,
    dims: tuple[int, int],
    group: int,
    n_kv_heads: int,
    window: int,
    chunk: int,
    cap: float,
    n_rows: int,
    mode: str,
    tolerance: float,
) -> None:
    """Of tokens at several positions, one of them early, in a cache that holds NaN where nothing was stored."""
    rng, emulator, (key_dim, value_dim) = np.random.default_rng(7), Emulator(mode), dims
    n_slots, n_kept, is_latent = 2, 150, key_dim == 576
    n_heads, scale = n_kv_heads * group, key_dim**-0.5
    cache = Cache(0, kv_type, n_slots, n_rows, n_kv_heads, key_dim, value_dim, is_latent)
    memory = aligned(np.full(cache.n_bytes, 0xFF, np.uint8))
    cache = cache._replace(address=emulator.at(memory))
    k, v = (rng.standard_normal((n_kept, n_kv_heads * dim)).astype(F32) for dim in dims)
    if is_latent:
        v = k[:, :value_dim]
    sinks = rng.standard_normal(n_heads).astype(F32) if window else None
    n_stored = min(n_kept, n_rows)  # in a ring the last ones
    all_positions, slots = np.arange(n_kept - n_stored, n_kept, dtype=np.int32), np.ones(n_kept, np.int32)
    positions = np.array([149, 33, *range(60, 68)] if n_stored == n_kept else [149, *range(138, 147)], np.int32)
    n_tokens = len(positions)
    q = rng.standard_normal((n_tokens, n_heads * key_dim)).astype(F32)
    values, parts = (
        np.full(n_bytes // 4, np.nan, F32) for n_bytes in attention.scratch_bytes(cache, n_heads, n_tokens)
    )
    store = attention.inputs(
        None,
        emulator.rows(q),
        Heads(emulator.rows(k[-n_stored:]), n_kv_heads, key_dim),
        None if is_latent else Heads(emulator.rows(v[-n_stored:]), n_kv_heads, value_dim),
        0.0,
        Rotation(),
        cache,
        Place(emulator.at(all_positions), emulator.at(slots)),
        emulator.count(n_stored, n_stored),
    )

    def attend(
        out: np.ndarray, gate: GateOf | None = None, forms: Forms = kernels.NO_FORMS, most: int = 0
    ) -> list[Launch]:
        sight = Sight(0 if sinks is None else emulator.at(sinks), window, chunk, cap)
        scratch, place = (emulator.at(values), emulator.at(parts)), Place(emulator.at(positions), emulator.at(slots))
        count = emulator.count(len(out), most or len(out))
        what = (cache, n_heads, scale, sight, scratch, place, count, gate, forms)
        return attention.attend(emulator.rows(q), emulator.rows(out), *what)

    wanted = [
        form for form, size in ((Activation.Q8_256, 256), (Activation.Q8_32, 32)) if n_heads * value_dim % size == 0
    ]
    gatings = list(Gating) if dims == (64, 64) and not window else [Gating.SIGMOID]  # each is a build of its own
    by = rng.standard_normal((4, n_heads, 2 * value_dim)).astype(F32)  # what is before each head's gate does not matter
    expected = []
    for token, position in enumerate(positions):
        first = max(position - window + 1 if window else 0, position // chunk * chunk if chunk else 0, 0)
        keys, vals = (
            side[first : position + 1].reshape(position + 1 - first, n_kv_heads, -1).repeat(group, 1).astype(np.float64)
            for side in (k, v)
        )
        scores = np.einsum("hd,phd->hp", q[token].reshape(n_heads, key_dim), keys) * scale
        p = np.exp(cap * np.tanh(scores / cap) if cap else scores)
        total = p.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks)[:, None])
        expected.append(np.einsum("hp,phd->hd", p / total, vals).ravel())
    for order, seed in SCHEDULES:
        out = np.zeros((n_tokens, n_heads * value_dim), F32)
        emulator.run([store, *attend(out)], order, seed)
        assert_near(out, np.stack(expected), abs=tolerance * 4)
        together = np.zeros_like(out)
        emulator.run(attend(together, most=attention.PROMPT_TOKENS + 1), order, seed)
        assert same_bits(together, out)
        few = np.zeros((4, n_heads * value_dim), F32)  # by parts that are merged afterwards
        emulator.run(attend(few), order, seed)
        assert same_bits(few, out[: len(few)])
        gate = Rows(emulator.rows(by).address + 4 * value_dim, n_heads * 2 * value_dim)
        of_values = by[:, :, value_dim:].reshape(few.shape)
        of_heads = np.ascontiguousarray(by[:, :, 0])
        for gating in (gating for gating in gatings if gating not in NEED_LIMITS):
            for seen, gate_of in (
                (of_values, GateOf(gating, gate, value_dim, 2 * value_dim)),
                (of_heads.repeat(value_dim, 1), GateOf(gating, emulator.rows(of_heads), value_dim, 1, per_head=True)),
            ):
                found, (forms, made) = np.zeros_like(few), make_forms(emulator, *few.shape, *wanted)
                _, merge = attend(found, gate_of, forms)  # of the same parts
                emulator.run(merge, order, seed)
                assert_near(found, gated(gating, few, seen), rel=1e-5)
                check_forms(found, made)


def indexer_cache(
    emulator: Emulator, kv_type: KVType, n_rows: int, keys: np.ndarray, slots: np.ndarray, period: int = 1
) -> tuple[Cache, Launch]:
    """A cache of an indexer's keys, NaN all over, and the launch that stores keys in it, from 0 on; some become 127."""
    n_kept, key_dim = keys.shape
    keys[:, ::32] = 127  # so that eight bits hold the others
    cache = Cache(0, kv_type, 2, n_rows, 1, key_dim, 0, True, period)
    cache = cache._replace(address=emulator.at(aligned(np.full(cache.n_bytes, 0xFF, np.uint8))))
    place = Place(emulator.at(np.arange(n_kept, dtype=np.int32)), emulator.at(slots))
    heads = Heads(emulator.rows(keys), 1, key_dim)
    count = emulator.count(n_kept, n_kept)
    return cache, attention.inputs(None, NOTHING, heads, None, 0.0, Rotation(), cache, place, count)


@pytest.mark.parametrize(
    ("kv_type", "n_heads", "key_dim", "top_k", "context_length", "equal", "period", "has_tail", "weighted", "mode"),
    [
        (KVType.F32, 5, 40, 20, 200, False, 1, False, True, "fast"),
        (KVType.F16, 64, 128, 37, 200, False, 1, False, True, "fast"),
        (KVType.F16, 3, 64, 64, 1500, True, 1, False, True, "fast"),  # more positions than threads, many of them alike
        (KVType.Q8_0, 32, 64, 50, 200, False, 1, False, True, "fast"),
        (KVType.F16, 17, 16, 20, 200, True, 1, False, True, "race"),
        (KVType.Q8_0, 5, 40, 20, 200, False, 1, False, True, "race"),
        (KVType.F32, 2, 8, 20, 200, True, 1, False, False, "asan"),
        (KVType.F16, 5, 40, 20, 200, False, 4, False, True, "fast"),  # rows that tokens share
        (KVType.F32, 2, 8, 9, 202, True, 4, False, True, "asan"),
        (KVType.F16, 17, 16, 30, 200, True, 3, False, True, "race"),
        (KVType.F16, 5, 40, 20, 200, False, 4, True, True, "fast"),  # and the one that is not whole
        (KVType.F32, 2, 8, 9, 202, True, 4, True, False, "asan"),
        (KVType.F32, 17, 16, 30, 203, True, 3, True, False, "race"),
    ],
)
def test_positions_are_selected(
    kv_type: KVType,
    n_heads: int,
    key_dim: int,
    top_k: int,
    context_length: int,
    equal: bool,
    period: int,
    has_tail: bool,
    weighted: bool,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whole numbers, so that scores are exact, in a cache that holds NaN where nothing was stored."""
    monkeypatch.setattr(selection, "_BLOCKS", selection.FEW_TOKENS + 1)  # fewer than tokens
    rng, emulator = np.random.default_rng(7), Emulator(mode)
    n_kept, most = context_length - 30, 1 if equal else 20
    keys = rng.integers(-most, most + 1, (n_kept, key_dim)).astype(F32)
    slots = np.ones(n_kept, np.int32)
    cache, store = indexer_cache(emulator, kv_type, context_length // period, keys, slots, period)
    positions = np.array([n_kept - 1, top_k - 1, top_k, 1, *range(90, 96)], np.int32)
    n_tokens = len(positions)
    q = rng.integers(-most, most + 1, (n_tokens, n_heads * key_dim)).astype(F32)
    weights = rng.integers(-most, most + 1, (n_tokens, n_heads)).astype(F32)
    weights = weights if weighted else np.ones_like(weights)
    expected = np.full((n_tokens, top_k + has_tail), -7, np.int32)
    for token, position in enumerate(positions):
        seen = keys[: position + 1][period - 1 :: period]
        by_head = np.maximum(q[token].reshape(n_heads, key_dim).astype(np.float64) @ seen.T, 0)
        chosen = np.argsort(-(weights[token] / 4 @ by_head), kind="stable")[:top_k]
        listed = [*np.sort(chosen), *[len(seen)] * has_tail]
        expected[token, : len(listed)] = listed
    scores = np.full(selection.scores_bytes(cache.n_rows, n_tokens) // 4, np.nan, F32)
    place = Place(emulator.at(positions), emulator.at(slots))
    for order, seed in SCHEDULES:
        for n in (n_tokens, 5):  # one block for each; many blocks
            out = np.full((n, top_k + has_tail), -7, np.int32)
            launches = selection.select_positions(
                emulator.rows(q),
                emulator.rows(weights) if weighted else None,
                emulator.rows(out),
                cache,
                n_heads,
                top_k,
                0.25,
                emulator.at(scores),
                place,
                emulator.count(n, n),
                has_tail=has_tail,
            )
            assert len(launches) == (1 if n > selection.FEW_TOKENS else 2)
            emulator.run([store, *launches], order, seed)
            assert (out == expected[:n]).all()


@pytest.mark.parametrize(
    ("kv_type", "n_heads", "key_dim", "top_k", "n_newest", "block_size", "equal", "mode"),
    [
        (KVType.F32, 2, 40, 4, 1, 8, False, "fast"),
        (KVType.F16, 4, 128, 3, 2, 128, False, "fast"),
        (KVType.F16, 17, 64, 6, 6, 5, True, "fast"),  # none but the newest; more heads than a tile has
        (KVType.Q8_0, 4, 64, 2, 1, 150, False, "fast"),  # blocks of more than a tile
        (KVType.F16, 3, 16, 7, 3, 3, True, "race"),
        (KVType.Q8_0, 2, 40, 2, 1, 130, True, "race"),
        (KVType.F32, 5, 8, 4, 1, 16, True, "asan"),
    ],
)
def test_blocks_are_selected(
    kv_type: KVType,
    n_heads: int,
    key_dim: int,
    top_k: int,
    n_newest: int,
    block_size: int,
    equal: bool,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whole numbers, so that scores are exact, in a cache that holds NaN where nothing was stored."""
    monkeypatch.setattr(selection, "_BLOCKS", selection.FEW_TOKENS + 1)  # fewer than tokens
    rng, emulator = np.random.default_rng(7), Emulator(mode)
    context_length, n_kept, most = 500, 490, 1 if equal else 20
    keys = rng.integers(-most, most + 1, (n_kept, key_dim)).astype(F32)
    slots = np.ones(n_kept, np.int32)
    cache, store = indexer_cache(emulator, kv_type, context_length, keys, slots)
    last = min(top_k * block_size, n_kept) - 1  # the last position that sees all blocks
    positions = np.array([n_kept - 1, last, min(last + 1, n_kept - 1), 3, *range(402, 408)], np.int32)
    n_tokens = len(positions)
    q = rng.integers(-most, most + 1, (n_tokens, n_heads, key_dim)).astype(F32)
    expected = np.full((n_tokens, n_heads, top_k), -7, np.int32)
    for token, head in np.ndindex(n_tokens, n_heads):
        own = positions[token] // block_size
        scores = q[token, head].astype(np.float64) @ keys[: own * block_size].T
        scores = scores.reshape(own, block_size).max(-1)
        newest = np.arange(max(0, own - n_newest + 1), own + 1)
        others = np.argsort(-scores[: newest[0]], kind="stable")[: top_k - n_newest]
        chosen = np.concatenate([np.sort(others), newest])
        expected[token, head, : len(chosen)] = chosen
    kept = np.full(selection.block_scores_bytes(context_length, n_heads, block_size, n_tokens) // 4, np.nan, F32)
    place = Place(emulator.at(positions), emulator.at(slots))
    for order, seed in SCHEDULES:
        for n in (n_tokens, 5):  # one block for each; many blocks
            out = np.full((n, n_heads * top_k), -7, np.int32)
            launches = selection.select_blocks(
                emulator.rows(q.reshape(n_tokens, -1)),
                emulator.rows(out),
                cache,
                n_heads,
                top_k,
                block_size,
                n_newest,
                emulator.at(kept),
                place,
                emulator.count(n, n),
            )
            assert len(launches) == (1 if n > selection.FEW_TOKENS else 2)
            emulator.run([store, *launches], order, seed)
            assert (out == expected[:n].reshape(n, -1)).all()


@pytest.mark.parametrize(
    ("kv_type", "n_heads", "key_dim", "apart", "message"),
    [
        (KVType.F16, 257, 64, False, "257 heads of 64"),
        (KVType.F32, 4, 256, False, "4 heads of 256"),
        (KVType.F16, 4, 12, False, "multiple of 8"),
        (KVType.F16, 128, 128, True, "128 heads of 128"),
    ],
)
def test_indexers_that_no_kernel_can_take(
    kv_type: KVType, n_heads: int, key_dim: int, apart: bool, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        selection.check_indexer(Cache(0, kv_type, 1, 64, 1, key_dim, 0, True), n_heads, apart=apart)


@pytest.mark.parametrize(
    ("kv_type", "dims", "group", "window", "cap", "mode"),
    [
        (KVType.F16, (128, 128), 8, 0, 0.0, "fast"),
        (KVType.Q8_0, (256, 256), 16, 0, 0.0, "fast"),
        (KVType.F32, (64, 64), 1, 70, 0.0, "fast"),
        (KVType.F32, (256, 256), 3, 0, 0.75, "fast"),
        (KVType.F16, (72, 40), 12, 33, 0.0, "race"),
        (KVType.Q8_0, (40, 24), 18, 0, 0.0, "fast"),
        (KVType.F16, (24, 40), 5, 20, 0.5, "asan"),
    ],
)
def test_tokens_of_a_prompt_share_tiles(
    kv_type: KVType,
    dims: tuple[int, int],
    group: int,
    window: int,
    cap: float,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three sequences in one step, also by several launches, with the bits of each token alone."""
    rng, emulator, (key_dim, value_dim), n_kv_heads, n_rows = np.random.default_rng(9), Emulator(mode), dims, 2, 128
    cache = Cache(0, kv_type, 3, n_rows, n_kv_heads, key_dim, value_dim)
    memory = aligned(np.zeros(cache.n_bytes, np.uint8))
    cache, n_heads = cache._replace(address=emulator.at(memory)), n_kv_heads * group
    k, v = (rng.standard_normal((3 * n_rows, n_kv_heads * dim)).astype(F32) for dim in dims)
    stored = [np.ascontiguousarray(x, np.int32) for x in (np.tile(np.arange(n_rows), 3), np.repeat([0, 1, 2], n_rows))]
    sides = (Heads(emulator.rows(x), n_kv_heads, dim) for x, dim in zip((k, v), dims, strict=True))
    kept = Place(*map(emulator.at, stored)), emulator.count(3 * n_rows, 3 * n_rows)
    emulator.run(attention.inputs(None, NOTHING, *sides, 0.0, Rotation(), cache, *kept))
    slots = np.repeat(np.array([1, 2, 0], np.int32), (2, 23, 5))
    positions = np.concatenate([[90, 91], np.arange(50, 73), np.arange(5)]).astype(np.int32)
    q = rng.standard_normal((len(slots), n_heads * key_dim)).astype(F32)
    sinks = rng.standard_normal(n_heads).astype(F32)
    sight, place = Sight(emulator.at(sinks), window, 0, cap), Place(*map(emulator.at, (positions, slots)))
    for order, seed in SCHEDULES:
        found = []
        for prompt_tokens, most_products in ((1 << 30, 1), (0, 1 << 40), (0, 1 << 20)):
            monkeypatch.setattr(attention, "PROMPT_TOKENS", prompt_tokens)
            monkeypatch.setattr(attention, "_MOST_PRODUCTS", most_products)
            out = np.full((len(q), n_heads * value_dim), np.nan, F32)
            rows, count = (emulator.rows(q), emulator.rows(out)), emulator.count(len(q), len(q) + 100)
            launches = attention.attend(*rows, cache, n_heads, key_dim**-0.5, sight, (0, 0), place, count)
            assert (len(launches) > 1) == (most_products == 1 << 20)
            emulator.run(launches, order, seed)
            found.append(out)
        assert not np.isnan(found[0]).any()
        assert same_bits(found[1], found[0])
        assert same_bits(found[2], found[0])


@pytest.mark.parametrize(
    ("kv_type", "dims", "group", "mode"),
    [
        (KVType.F16, (576, 512), 11, "fast"),
        (KVType.Q8_0, (40, 32), 18, "race"),
        (KVType.F32, (24, 16), 2, "asan"),
    ],
)
@pytest.mark.parametrize("top_k", [70, 200])
def test_attention_looks_at_selected_positions(
    kv_type: KVType, dims: tuple[int, int], group: int, mode: str, top_k: int
) -> None:
    """As if the others were not there; where all are selected with the bits of plain attention."""
    rng, emulator, (key_dim, value_dim) = np.random.default_rng(8), Emulator(mode), dims
    context_length, n_kept, scale = 200, 150, key_dim**-0.5
    caches = []
    positions = np.array([149, 33, *range(66, 74)], np.int32)
    slots, n_tokens = np.zeros(n_kept, np.int32), len(positions)
    q, k = (rng.standard_normal((n, m * key_dim)).astype(F32) for n, m in ((n_tokens, group), (n_kept, 1)))
    selected = np.full((n_tokens, top_k), 1 << 30, np.int32)
    gathered = np.zeros((n_tokens, top_k, key_dim), F32)  # the same keys, where plain attention finds nothing else
    for token, position in enumerate(positions):
        chosen = np.sort(rng.permutation(position + 1)[:top_k])
        selected[token, : len(chosen)], gathered[token, : len(chosen)] = chosen, k[chosen]

    def cache_of(keys: np.ndarray) -> Cache:
        cache = Cache(0, kv_type, 1, context_length, 1, key_dim, value_dim, True)
        caches.append(aligned(np.full(cache.n_bytes, 0xFF, np.uint8)))
        cache = cache._replace(address=emulator.at(caches[-1]))
        place = Place(emulator.at(np.arange(len(keys), dtype=np.int32)), emulator.at(slots))
        heads, count = Heads(emulator.rows(keys), 1, key_dim), emulator.count(len(keys), len(keys))
        emulator.run(attention.inputs(None, NOTHING, heads, None, 0.0, Rotation(), cache, place, count))
        return cache

    def attend(q: np.ndarray, positions: np.ndarray, cache: Cache, sight: Sight, order: str, seed: int) -> np.ndarray:
        out = np.zeros((len(q), group * value_dim), F32)
        scratch = attention.scratch_bytes(cache, group, len(q), sight)
        kept = [np.full(n_bytes // 4, np.nan, F32) for n_bytes in scratch]
        addresses = tuple(emulator.at(x) for x in kept)
        place, count = Place(emulator.at(positions), emulator.at(slots)), emulator.count(len(q), len(q))
        launches = attention.attend(
            emulator.rows(q), emulator.rows(out), cache, group, scale, sight, addresses, place, count
        )
        emulator.run(launches, order, seed)
        return out

    cache, sight = cache_of(k), Sight(selected=emulator.rows(selected), top_k=top_k)
    for order, seed in SCHEDULES:
        found = attend(q, positions, cache, sight, order, seed)
        assert same_bits(attend(q[:4], positions[:4], cache, sight, order, seed), found[:4])
    for token in range(2):
        n = min(int(positions[token]) + 1, top_k)
        plain = cache_of(gathered[token, :n].copy())
        sight = Sight(selected=emulator.rows(np.arange(top_k, dtype=np.int32)[None]), top_k=top_k)
        last = np.array([n - 1], np.int32)
        for other in (sight, Sight()):
            expected = attend(q[token : token + 1], last, plain, other, "forward", 1)
            assert_near(found[token], expected[0], abs=1e-6)
        assert same_bits(found[token], attend(q[token : token + 1], last, plain, sight, "forward", 1)[0])


@pytest.mark.parametrize(
    ("kv_type", "dims", "group", "block_size", "top_k", "has_tail", "mode"),
    [
        (KVType.F16, (128, 128), 16, 16, 4, False, "fast"),
        (KVType.Q8_0, (40, 32), 18, 5, 7, False, "race"),
        (KVType.F32, (24, 16), 2, 40, 2, False, "asan"),
        (KVType.F16, (64, 64), 4, 16, 10, False, "fast"),  # all of them
        (KVType.F16, (128, 128), 16, 16, 4, True, "fast"),
        (KVType.F32, (24, 16), 2, 4, 9, True, "asan"),
        (KVType.F32, (24, 16), 2, 3, 12, True, "race"),
        (KVType.F16, (64, 64), 4, 16, 10, True, "fast"),  # all of them
    ],
)
def test_attention_looks_at_the_blocks_of_each_key_head(
    kv_type: KVType, dims: tuple[int, int], group: int, block_size: int, top_k: int, has_tail: bool, mode: str
) -> None:
    """As at lists of their positions; where all are selected with the bits of plain attention.

    With a tail a token's own block is one like others once it is whole.
    """
    rng, emulator, (key_dim, value_dim), n_kv_heads = np.random.default_rng(8), Emulator(mode), dims, 3
    context_length, n_kept, scale, n_heads = 160, 150, key_dim**-0.5, 3 * group
    positions = np.array([149, 33, *range(76, 84)], np.int32)
    slots, n_tokens = np.zeros(n_kept, np.int32), len(positions)
    q = rng.standard_normal((n_tokens, n_heads * key_dim)).astype(F32)
    k, v = (rng.standard_normal((n_kept, n_kv_heads * dim)).astype(F32) for dim in dims)
    selected = np.full((n_tokens, n_kv_heads, top_k), 1 << 20, np.int32)
    for token, head in np.ndindex(n_tokens, n_kv_heads):
        own, rest = divmod(int(positions[token]) + has_tail, block_size)  # whole blocks before the last place
        chosen = [*np.sort(rng.permutation(own)[: top_k - 1]), *[own] * (rest > 0 or not has_tail)]
        selected[token, head, : len(chosen)] = chosen
    cache = Cache(0, kv_type, 1, context_length, n_kv_heads, key_dim, value_dim)
    memory = aligned(np.full(cache.n_bytes, 0xFF, np.uint8))
    cache = cache._replace(address=emulator.at(memory))
    place = Place(emulator.at(np.arange(n_kept, dtype=np.int32)), emulator.at(slots))
    heads = Heads(emulator.rows(k), n_kv_heads, key_dim), Heads(emulator.rows(v), n_kv_heads, value_dim)
    count = emulator.count(n_kept, n_kept)
    emulator.run(attention.inputs(None, NOTHING, *heads, 0.0, Rotation(), cache, place, count))

    def attend(n: int, sight: Sight, order: str = "forward", seed: int = 1) -> np.ndarray:
        out = np.zeros((n, n_heads * value_dim), F32)
        kept = [np.full(n_bytes // 4, np.nan, F32) for n_bytes in attention.scratch_bytes(cache, n_heads, n, sight)]
        addresses = tuple(emulator.at(x) for x in kept)
        place, count = Place(emulator.at(positions), emulator.at(slots)), emulator.count(n, n)
        what = (cache, n_heads, scale, sight, addresses, place, count)
        emulator.run(attention.attend(emulator.rows(q), emulator.rows(out), *what), order, seed)
        return out

    lists = emulator.rows(selected.reshape(n_tokens, -1))
    sight = Sight(selected=lists, top_k=top_k, block_size=block_size, by_head=True, has_tail=has_tail)
    for order, seed in SCHEDULES:
        found = attend(n_tokens, sight, order, seed)
        assert same_bits(attend(4, sight, order, seed), found[:4])
    tolerance = 0.02 if kv_type == KVType.Q8_0 else 2e-3
    for token, head in np.ndindex(n_tokens, n_heads):
        kv_head = head // group
        seen = np.arange(positions[token] + 1)
        seen = seen[np.isin(seen // block_size, selected[token, kv_head])]
        keys = k[seen].reshape(len(seen), n_kv_heads, key_dim)[:, kv_head].astype(np.float64)
        values = v[seen].reshape(len(seen), n_kv_heads, value_dim)[:, kv_head]
        weights = np.exp(keys @ q[token].reshape(n_heads, key_dim)[head] * scale)
        expected = weights @ values / weights.sum()
        assert_near(found[token].reshape(n_heads, value_dim)[head], expected, abs=tolerance)
    if (top_k - has_tail) * block_size >= n_kept:
        assert same_bits(attend(n_tokens, Sight()), found)


@pytest.mark.parametrize(
    ("kv_type", "dims", "group", "period", "top_k", "window", "mode"),
    [
        (KVType.F16, (512, 512), 11, 4, 12, 40, "fast"),
        (KVType.F16, (64, 64), 20, 5, 0, 40, "fast"),
        (KVType.Q8_0, (40, 32), 18, 3, 0, 7, "race"),
        (KVType.F16, (16, 16), 3, 2, 9, 33, "race"),
        (KVType.F32, (24, 16), 2, 4, 100, 0, "asan"),
        (KVType.F32, (24, 16), 2, 128, 0, 12, "asan"),
    ],
)
def test_attention_looks_at_rows_that_tokens_share(
    kv_type: KVType, dims: tuple[int, int], group: int, period: int, top_k: int, window: int, mode: str
) -> None:
    """Beside the window a token sees the rows of all periods before, or those that a list names; NaN lies elsewhere."""
    rng, emulator, (key_dim, value_dim) = np.random.default_rng(8), Emulator(mode), dims
    context_length, n_kept, scale = 200, 150, key_dim**-0.5
    positions = np.array([149, 33, 0, *range(66, 74)], np.int32)
    n_tokens, slots = len(positions), np.ones(n_kept, np.int32)
    q, k, shared_k = (
        rng.standard_normal((n, m * key_dim)).astype(F32) for n, m in ((n_tokens, group), (n_kept, 1), (n_kept, 1))
    )
    sinks, caches, memories = rng.standard_normal(group).astype(F32), [], []
    for keys, own in ((k, 1), (shared_k, period)):
        cache = Cache(0, kv_type, 2, context_length // own, 1, key_dim, value_dim, True, own)
        memories.append(aligned(np.full(cache.n_bytes, 0xFF, np.uint8)))
        caches.append(cache._replace(address=emulator.at(memories[-1])))
        place = Place(emulator.at(np.arange(n_kept, dtype=np.int32)), emulator.at(slots))
        heads, count = Heads(emulator.rows(keys), 1, key_dim), emulator.count(n_kept, n_kept)
        emulator.run(attention.inputs(None, NOTHING, heads, None, 0.0, Rotation(), caches[-1], place, count))
    selected = np.full((n_tokens, max(1, top_k)), 1 << 30, np.int32)
    expected = np.empty((n_tokens, group, value_dim))
    for token, position in enumerate(positions):
        rows = np.arange((position + 1) // period)
        if top_k:
            rows = np.sort(rng.permutation(rows)[:top_k])
            selected[token, : len(rows)] = rows
        near = slice(max(0, position - window + 1) if window else 0, position + 1)
        keys = np.concatenate([shared_k[period - 1 :: period][rows], k[near]]).astype(np.float64)
        scores = q[token].reshape(group, key_dim) @ keys.T * scale
        scores = np.exp(np.concatenate([scores, sinks[:, None]], -1))
        expected[token] = (scores / scores.sum(-1, keepdims=True))[:, :-1] @ keys[:, :value_dim]
    sight = Sight(emulator.at(sinks), window, selected=emulator.rows(selected), top_k=top_k, shared=caches[1])

    def attend(n: int, order: str, seed: int) -> np.ndarray:
        out = np.zeros((n, group * value_dim), F32)
        kept = [np.full(n_bytes // 4, np.nan, F32) for n_bytes in attention.scratch_bytes(caches[0], group, n, sight)]
        addresses = tuple(emulator.at(x) for x in kept)
        place, count = Place(emulator.at(positions), emulator.at(slots)), emulator.count(n, n)
        what = (caches[0], group, scale, sight, addresses, place, count)
        emulator.run(attention.attend(emulator.rows(q), emulator.rows(out), *what), order, seed)
        return out

    for order, seed in SCHEDULES:
        found = attend(n_tokens, order, seed)
        assert same_bits(attend(4, order, seed), found[:4])
    tolerance = {KVType.F32: 1e-5, KVType.F16: 2e-3, KVType.Q8_0: 0.03}[kv_type]
    assert_near(found, expected.reshape(n_tokens, -1), abs=tolerance)


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
def test_rows_that_tokens_share_are_stored_by_the_last_of_them(mode: str) -> None:
    """Rotated by the position of the first."""
    rng, emulator, n, dim, n_rot, period = np.random.default_rng(9), Emulator(mode), 11, 24, 16, 4
    k, frequencies = rng.standard_normal((n, dim)).astype(F32), (1e4 ** (-np.arange(8) / 8)).astype(F32)
    positions, slots, count = np.arange(3, 3 + n, dtype=np.int32), np.ones(n, np.int32), emulator.count(n)
    expected, at = k.copy(), emulator.at(positions)
    rope = (at, emulator.at(frequencies), 1, dim, n_rot, RopeStyle.NORM, 1.0, count, period)
    emulator.run(elementwise.rope(emulator.rows(expected), *rope))
    rotation = Rotation(emulator.at(frequencies), n_rot, RopeStyle.NORM, 1.0, period)
    for order, seed in SCHEDULES:
        memory = aligned(np.full((2, 5, dim), np.nan, F32))
        cache = Cache(emulator.at(memory), KVType.F32, 2, 5, 1, dim, dim, True, period)
        heads, place = Heads(emulator.rows(k), 1, dim, rotate=True), Place(at, emulator.at(slots))
        emulator.run(attention.inputs(None, NOTHING, heads, None, 0.0, rotation, cache, place, count), order, seed)
        assert same_bits(memory[1, :3], expected[[0, 4, 8]])
        assert np.isnan(memory[1, 3:]).all()
        assert np.isnan(memory[0]).all()


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
@pytest.mark.parametrize(("normalizes", "style"), [(True, RopeStyle.NEOX), (False, RopeStyle.NORM), (True, None)])
def test_attention_inputs_are_what_single_operations_make(mode: str, normalizes: bool, style: RopeStyle | None) -> None:
    """Queries lie beside gates; keys are rotated, values are not."""
    rng, emulator = np.random.default_rng(9), Emulator(mode)
    n_tokens, n_heads, n_kv_heads, dim, n_rot, eps = 3, 5, 2, 48, 32, 1e-6
    joined = rng.standard_normal((n_tokens, n_heads, 2 * dim)).astype(F32)
    k, v = (rng.standard_normal((n_tokens, n_kv_heads * dim)).astype(F32) for _ in range(2))
    q_weight, k_weight = (rng.standard_normal(dim).astype(F32) for _ in range(2))
    frequencies = (1e4 ** (-np.arange(n_rot // 2) / (n_rot // 2))).astype(F32)
    positions, slots = np.array([3, 40, 7], np.int32), np.array([0, 1, 1], np.int32)
    count, place = emulator.count(n_tokens), Place(emulator.at(positions), emulator.at(slots))

    def one_by_one(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x).reshape(n_tokens, -1).copy()
        n = x.shape[1] // dim
        if normalizes:
            out = np.zeros_like(x)
            emulator.run(
                elementwise.rms_norm(emulator.rows(x), emulator.at(weight), emulator.rows(out), n, dim, eps, count)
            )
            x = out
        if style is not None:
            rope = (place.positions, emulator.at(frequencies), n, dim, n_rot, style, 1.5, count)
            emulator.run(elementwise.rope(emulator.rows(x), *rope))
        return x

    expected_q, expected_k = one_by_one(joined[:, :, :dim], q_weight), one_by_one(k, k_weight)
    cache = Cache(0, KVType.F32, 2, 64, n_kv_heads, dim, dim)
    rotation = Rotation() if style is None else Rotation(emulator.at(frequencies), n_rot, style, 1.5)
    for order, seed in SCHEDULES:
        memory, q = np.zeros((2, *(2, 64, n_kv_heads * dim)), F32), np.zeros((n_tokens, n_heads * dim), F32)
        launch = attention.inputs(
            Heads(
                Rows(emulator.at(joined), n_heads * 2 * dim),
                n_heads,
                2 * dim,
                normalizes,
                emulator.at(q_weight),
                style is not None,
            ),
            emulator.rows(q),
            Heads(emulator.rows(k), n_kv_heads, dim, normalizes, emulator.at(k_weight), style is not None),
            Heads(emulator.rows(v), n_kv_heads, dim),
            eps,
            rotation,
            cache._replace(address=emulator.at(memory)),
            place,
            count,
        )
        emulator.run(launch, order, seed)
        assert_near(q, expected_q, rel=1e-5, abs=1e-6)
        assert_near(memory[0, slots, positions], expected_k, rel=1e-5, abs=1e-6)
        assert same_bits(memory[1, slots, positions], v)
        assert (memory != 0).sum() == (memory[:, slots, positions] != 0).sum()


@pytest.mark.parametrize(("name", "n_cols"), [("Q8_0", 25_600), ("Q5_1", 28_672), ("Q4_K", 28_672), ("F16", 20_480)])
def test_rows_that_leave_room_for_fewer_warps(name: str, n_cols: int) -> None:
    """The feed-forward networks of dense models, on GPUs with little shared memory."""
    rng, emulator, weight_format, n_rows = np.random.default_rng(9), Emulator(), BY_NAME[name], 11
    weights = aligned(random_weights(weight_format, n_rows, n_cols))
    x = rng.standard_normal((1, n_cols)).astype(F32)
    rows, out = activations(x, weight_format.activation), np.zeros((1, n_rows), F32)
    matrices = [Matrix(emulator.at(weights), n_rows, emulator.rows(out))]
    launch = kernels.linear(emulator.byte_rows(rows), n_cols, weight_format, matrices, 0, emulator.count(1))
    assert launch.shared_bytes <= 99 << 10
    emulator.run(launch)
    expected = _kernels.matmul(weight_format.ggml_type, weights, x)
    if weight_format.activation == Activation.F32:
        assert_near(out, expected, rel=1e-4, abs=1e-2)
    else:
        assert same_bits(out, expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F16"])
def test_heads_have_matrices_of_their_own(name: str) -> None:
    rng, emulator, weight_format = np.random.default_rng(9), Emulator(), BY_NAME[name]
    n_heads, n_rows, n_cols, n_tokens = 3, 5, 256, 2
    weights = aligned(random_weights(weight_format, n_heads * n_rows, n_cols))
    x = rng.standard_normal((n_tokens * n_heads, n_cols)).astype(F32)
    scale, out = rng.random(n_heads).astype(F32), np.zeros((n_tokens, n_heads * n_rows), F32)
    rows = activations(x, weight_format.activation)
    launch = kernels.linear(
        Rows(emulator.at(rows), n_heads * rows.strides[0]),
        n_cols,
        weight_format,
        [Matrix(emulator.at(weights), n_rows, emulator.rows(out), 0, emulator.at(scale))],
        0,
        emulator.count(n_tokens),
        MatrixHeads(n_heads, n_rows * weights.shape[1], rows.strides[0]),
    )
    emulator.run(launch)
    for head in range(n_heads):
        own = weights[head * n_rows : (head + 1) * n_rows]
        expected = _kernels.matmul(weight_format.ggml_type, own, np.ascontiguousarray(x[head::n_heads])) * scale[head]
        assert same_bits(np.ascontiguousarray(out[:, head * n_rows : (head + 1) * n_rows]), expected)


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "n_k_heads", "n_v_heads", "grouped", "kind", "bound", "lengths", "mode"),
    [
        (128, 128, 2, 4, False, "delta", 0.0, (2, 3), "fast"),
        (16, 24, 1, 2, True, "delta", 0.0, (2, 3), "race"),
        (16, 12, 1, 2, True, "delta", 0.0, (2, 17), "asan"),
        (32, 8, 2, 2, False, "delta", 0.0, (21, 40), "race"),
        (128, 16, 2, 4, False, "delta", 0.0, (33, 1), "fast"),
        (20, 12, 1, 2, True, "delta", -5.0, (3, 18), "asan"),
        (128, 16, 2, 2, False, "channels", 0.0, (2, 30), "fast"),
        (44, 12, 1, 2, True, "channels", 0.0, (17, 3), "asan"),
        (32, 8, 2, 4, False, "channels", 0.0, (21, 40), "race"),
        (128, 128, 2, 2, False, "channels", -5.0, (2, 30), "fast"),
        (44, 12, 1, 3, True, "channels", -0.25, (17, 3), "asan"),
        (32, 20, 2, 4, False, "channels", -5.0, (21, 40), "race"),
        (128, 64, 2, 4, True, "state space", 0.0, (2, 30), "fast"),
        (16, 12, 1, 2, True, "state space", 0.0, (17, 3), "asan"),
        (32, 8, 2, 4, True, "state space", 0.0, (21, 20), "race"),
        (128, 128, 3, 3, True, "lightning", 0.0, (2, 30), "fast"),
        (20, 12, 2, 2, True, "lightning", 0.0, (17, 3), "asan"),
        (32, 8, 2, 2, True, "lightning", 0.0, (21, 20), "race"),
    ],
)
def test_recurrent_layers(
    k_dim: int,
    v_dim: int,
    n_k_heads: int,
    n_v_heads: int,
    grouped: bool,
    kind: str,
    bound: float,
    lengths: tuple[int, int],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sequences in one step: one goes on from its state, the other begins."""
    is_delta, is_lightning = kind in {"delta", "channels"}, kind == "lightning"
    decay_dim = k_dim if kind == "channels" else 1
    rng, emulator = np.random.default_rng(8), Emulator(mode)
    slots = np.repeat(np.array([1, 0], np.int32), lengths)
    positions = np.concatenate([np.arange(4, 4 + lengths[0]), np.arange(lengths[1])]).astype(np.int32)
    n_tokens = sum(lengths)
    n_k, n_v = n_k_heads * k_dim, n_v_heads * v_dim
    n_channels, kernel_size, eps = 2 * n_k + n_v, 4, 1e-6
    x = rng.standard_normal((n_tokens, n_channels)).astype(F32)
    weight = rng.standard_normal((n_channels, kernel_size)).astype(F32)
    bias = (0 if is_delta else 1) * rng.standard_normal(n_channels).astype(F32)
    skip = rng.standard_normal(n_v_heads).astype(F32)
    old_conv = rng.standard_normal((2, kernel_size - 1, n_channels)).astype(F32)
    old_state = rng.standard_normal((2, n_v_heads, v_dim, k_dim)).astype(F32)
    beta, alpha = (rng.standard_normal((n_tokens, n_v_heads * n)).astype(F32) for n in (1, decay_dim))
    a, dt_bias = (rng.standard_normal(n_v_heads * n).astype(F32) for n in (1, decay_dim))
    signs = np.where(np.arange(n_v_heads) % 2, 1, -1)  # they say nothing where there is a bound
    a = signs * np.exp(a) if bound else np.exp(-np.exp(a)) if is_lightning else -np.exp(a)
    a = a.astype(F32)

    expected_conv, new_conv = np.zeros_like(x), old_conv.copy()
    for slot, first, end in ((1, 0, lengths[0]), (0, lengths[0], n_tokens)):
        before = old_conv[slot] if positions[first] else np.zeros_like(old_conv[slot])
        seen = np.concatenate([before, x[first:end]])
        y = sum(seen[j : j + end - first] * weight[:, j] for j in range(kernel_size)) + bias
        expected_conv[first:end] = y
        new_conv[slot] = seen[len(seen) - kernel_size + 1 :]

    q, k = (x[:, i * n_k : (i + 1) * n_k].reshape(n_tokens, n_k_heads, k_dim).astype(np.float64) for i in (0, 1))
    if is_delta:
        q, k = (t / np.sqrt((t**2).sum(-1, keepdims=True) + eps) for t in (q, k))
        q = q / np.sqrt(k_dim)
    v = x[:, 2 * n_k :].reshape(n_tokens, n_v_heads, v_dim)
    key_head = np.arange(n_v_heads) // (n_v_heads // n_k_heads) if grouped else np.arange(n_v_heads) % n_k_heads
    shifted = (alpha + dt_bias).reshape(n_tokens, n_v_heads, decay_dim)
    dt = np.logaddexp(0, shifted)
    decay = np.exp(bound * sigmoid(abs(a[:, None]) * shifted) if bound else a[:, None] * dt)
    if is_lightning:
        dt, decay, skip = np.ones_like(dt), np.broadcast_to(a[:, None], dt.shape), 0 * skip
    new_state = old_state.astype(np.float64)
    new_state[0] = 0
    expected = []
    for t in range(n_tokens):
        state = new_state[slots[t]] * decay[t, :, None]
        recalled = np.einsum("hvk,hk->hv", state, k[t, key_head])
        added = sigmoid(beta[t])[:, None] * (v[t] - recalled) if is_delta else dt[t] * v[t]
        state = state + np.einsum("hv,hk->hvk", added, k[t, key_head])
        new_state[slots[t]] = state
        found = np.einsum("hvk,hk->hv", state, q[t, key_head]) + (0 if is_delta else skip[:, None] * v[t])
        expected.append(found.ravel())

    places = (emulator.at(positions), emulator.at(slots), emulator.count(n_tokens))
    for order, seed in SCHEDULES:
        at_bias = 0 if is_delta else emulator.at(bias)
        for activates, expected_out in ((True, expected_conv * sigmoid(expected_conv)), (False, expected_conv)):
            conv, out = old_conv.copy(), np.zeros_like(x)
            rows = (emulator.rows(x), emulator.at(weight), at_bias, emulator.at(conv), emulator.rows(out))
            emulator.run(recurrent.causal_conv(*rows, n_channels, kernel_size, activates, *places), order, seed)
            assert_near(out, expected_out, rel=1e-5, abs=1e-5)
            assert same_bits(conv, new_conv)

        qkv, found = emulator.rows(x), []
        for many_rows in (1 << 30, 1)[
            : 1 + (k_dim == 128)
        ]:  # then with as many warps as long steps of large models have
            monkeypatch.setattr(recurrent, "_MANY_TOKENS", 0)
            monkeypatch.setattr(recurrent, "_MANY_ROWS", many_rows)
            state, out = old_state.copy(), np.zeros((n_tokens, n_v), F32)
            launch = recurrent.delta_net(
                qkv.address,
                qkv.address + 4 * n_k,
                qkv.address + 8 * n_k,
                qkv.stride,
                emulator.rows(beta) if is_delta else None,
                None if is_lightning else emulator.rows(alpha),
                emulator.at(a),
                0 if is_lightning else emulator.at(dt_bias),
                0 if is_delta or is_lightning else emulator.at(skip),
                emulator.at(state),
                emulator.rows(out),
                n_k_heads,
                n_v_heads,
                k_dim,
                v_dim,
                decay_dim,
                bound,
                grouped,
                eps,
                *places,
            )
            emulator.run(launch, order, seed)
            assert_near(out, np.stack(expected), rel=1e-4, abs=1e-5)
            assert_near(state, new_state, rel=1e-4, abs=1e-5)
            found.append(out.tobytes() + state.tobytes())
        assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("n_channels", "kernel_size", "dilation", "mode"), [(300, 4, 3, "fast"), (40, 2, 8, "race"), (7, 3, 2, "asan")]
)
def test_a_convolution_of_tokens_that_are_apart(n_channels: int, kernel_size: int, dilation: int, mode: str) -> None:
    """Of two sequences, however their tokens are cut into steps, with few tokens and with many."""
    rng, emulator, n, n_before = np.random.default_rng(2), Emulator(mode), 43, (kernel_size - 1) * dilation
    x = rng.standard_normal((2, n, n_channels)).astype(F32)
    weight = rng.standard_normal((n_channels, kernel_size)).astype(F32)
    padded = np.concatenate([np.zeros((2, n_before, n_channels)), x], 1)
    expected = sum(padded[:, j * dilation :][:, :n] * weight[:, j] for j in range(kernel_size))
    bits = set()
    for cuts in ([0, 43], [0, 1, 2, 9, 12, 43], [0, 20, 25, 26, 43]):
        state, out = np.full((3, n_before, n_channels), np.nan, F32), np.zeros_like(x)
        for begin, end in pairwise(cuts):
            made = np.full((2 * (end - begin), n_channels), np.nan, F32)
            now = x[:, begin:end].reshape(-1, n_channels).copy()
            positions, slots = (
                np.array(x, np.int32) for x in ([*range(begin, end)] * 2, np.repeat([2, 0], end - begin))
            )
            rows = emulator.rows(now), emulator.at(weight), 0, emulator.at(state), emulator.rows(made)
            places = emulator.at(positions), emulator.at(slots), emulator.count(2 * (end - begin))
            what = n_channels, kernel_size, False, *places, dilation
            emulator.run(recurrent.causal_conv(*rows, *what))
            out[:, begin:end] = made.reshape(2, -1, n_channels)
        assert_near(out, expected, rel=1e-5, abs=1e-5)
        assert same_bits(state[[2, 0]], x[:, n - n_before :])
        bits.add(out.tobytes())
    assert len(bits) == 1


@pytest.mark.parametrize(
    ("n_channels", "state_size", "lengths", "mode"),
    [
        (130, 16, (2, 3), "fast"),
        (64, 16, (1, 30), "race"),
        (70, 12, (17, 8), "asan"),
        (5, 1, (3, 2), "asan"),
        (40, 64, (9, 7), "race"),
        (20, 100, (2, 9), "asan"),
        (9, 256, (8, 3), "fast"),
    ],
)
def test_selective_scan(n_channels: int, state_size: int, lengths: tuple[int, int], mode: str) -> None:
    """Three sequences in one step: one goes on from its state, two begin, the last of which is one token."""
    rng, emulator = np.random.default_rng(9), Emulator(mode)
    slots = np.repeat(np.array([1, 0, 2], np.int32), (*lengths, 1))
    positions = np.concatenate([np.arange(4, 4 + lengths[0]), np.arange(lengths[1]), [0]]).astype(np.int32)
    n_tokens = len(slots)
    x, dt = (rng.standard_normal((n_tokens, n_channels)).astype(F32) * n for n in (1, 3))
    bc = rng.standard_normal((n_tokens, 2 * state_size)).astype(F32)
    a = -np.exp(rng.standard_normal((n_channels, state_size))).astype(F32)
    skip = rng.standard_normal(n_channels).astype(F32)
    old = rng.standard_normal((3, n_channels, state_size)).astype(F32)

    new, steps, expected = old.astype(np.float64), np.logaddexp(0, dt.astype(np.float64)), []
    for t, slot in enumerate(slots):
        kept = new[slot] if positions[t] else 0
        new[slot] = np.exp(a * steps[t, :, None]) * kept + (steps[t] * x[t])[:, None] * bc[t, :state_size]
        expected.append(new[slot] @ bc[t, state_size:] + skip * x[t])

    places = (emulator.at(positions), emulator.at(slots), emulator.count(n_tokens))
    for order, seed in SCHEDULES:
        state, out, b = old.copy(), np.zeros_like(x), emulator.rows(bc)
        c = b._replace(address=b.address + 4 * state_size)
        inputs = (emulator.rows(x), emulator.rows(dt), b, c, emulator.at(a), emulator.at(skip), emulator.at(state))
        launch = recurrent.selective_scan(*inputs, emulator.rows(out), n_channels, state_size, *places)
        emulator.run(launch, order, seed)
        assert_near(out, np.stack(expected), rel=1e-4, abs=1e-5 * state_size**0.5)
        assert_near(state, new, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    (
        "k_dim",
        "v_dim",
        "n_k_heads",
        "n_v_heads",
        "by_channel",
        "bound",
        "grouped",
        "kernel_size",
        "gating",
        "has_weight",
        "mode",
    ),
    [
        (128, 128, 2, 4, False, 0.0, False, 4, Gating.SILU, True, "fast"),
        (128, 128, 1, 3, False, 0.0, True, 4, Gating.SILU, True, "race"),
        (16, 64, 2, 6, False, 0.0, True, 3, Gating.SIGMOID, False, "asan"),
        (200, 8, 2, 4, False, 0.0, False, 2, Gating.SILU, True, "asan"),
        (256, 32, 1, 1, False, 0.0, True, 5, Gating.SIGMOID, True, "race"),
        (40, 32, 1, 3, False, -5.0, True, 4, Gating.SIGMOID, True, "asan"),
        (128, 128, 2, 2, True, 0.0, False, 4, Gating.SIGMOID, True, "fast"),
        (44, 64, 1, 3, True, 0.0, True, 3, Gating.SIGMOID, True, "asan"),
        (96, 32, 2, 2, True, 0.0, False, 4, Gating.SILU, False, "race"),
        (128, 128, 2, 2, True, -5.0, False, 4, Gating.SIGMOID, True, "fast"),
        (44, 64, 1, 3, True, -5.0, True, 3, Gating.SIGMOID, True, "asan"),
        (200, 32, 2, 2, True, -0.25, False, 4, Gating.SILU, False, "race"),
    ],
)
@pytest.mark.parametrize("position", [0, 6])
def test_one_token_of_a_delta_net_layer_has_the_bits_of_its_parts(
    k_dim: int,
    v_dim: int,
    n_k_heads: int,
    n_v_heads: int,
    by_channel: bool,
    bound: float,
    grouped: bool,
    kernel_size: int,
    gating: Gating,
    has_weight: bool,
    mode: str,
    position: int,
) -> None:
    """Result, forms and both states, of one of two sequences; the counters are left as they were."""
    rng, emulator = np.random.default_rng(14), Emulator(mode)
    n_k, n_cols, eps, norm_eps = n_k_heads * k_dim, n_v_heads * v_dim, 1e-6, 1e-5
    n_channels = 2 * n_k + n_cols

    def normal(*shape: int) -> np.ndarray:
        return aligned(rng.standard_normal(shape).astype(F32))

    decay_dim = k_dim if by_channel else 1
    x, beta, alpha, by = (normal(1, n) for n in (n_channels, n_v_heads, n_v_heads * decay_dim, n_cols))
    conv_weight, a, dt_bias, norm = (
        normal(n_channels, kernel_size),
        (1 if bound else -1) * np.exp(normal(n_v_heads)),
        normal(n_v_heads * decay_dim),
        normal(v_dim),
    )
    old_conv, old_state = normal(2, kernel_size - 1, n_channels), normal(2, n_v_heads, v_dim, k_dim)
    positions, slots = (np.array([n], np.int32) for n in (position, 1))
    form = Activation.Q8_256 if n_cols % 256 == 0 else Activation.Q8_32
    n_done = np.zeros(recurrent.n_counters(n_k_heads, n_v_heads, v_dim), np.int32)
    places, at_norm = (emulator.at(positions), emulator.at(slots)), emulator.at(norm) if has_weight else 0
    parameters = [emulator.at(array) for array in (conv_weight, a, dt_bias)]
    for order, seed in SCHEDULES:
        found = []
        for together in (False, True):
            conv_state, state = aligned(old_conv.copy()), aligned(old_state.copy())
            out, before = (aligned(np.zeros((1, n_cols), F32)) for _ in range(2))
            quantized = aligned(np.zeros((1, kernels.activation_bytes(form, n_cols)), np.uint8))
            rows = emulator.byte_rows(quantized)
            forms = Forms(rows, None) if form == Activation.Q8_256 else Forms(None, rows)
            sizes, states = (
                (n_k_heads, n_v_heads, k_dim, v_dim, decay_dim, bound),
                (emulator.at(conv_state), emulator.at(state)),
            )
            if together:
                net = recurrent.DeltaNet(
                    *sizes, kernel_size, grouped, eps, norm_eps, gating, *parameters, at_norm, *states
                )
                inputs = [emulator.at(array) for array in (x, beta, alpha, by)]
                outputs = [emulator.at(array) for array in (before, out, n_done)]
                launches = [recurrent.delta_net_step(*inputs, net, *outputs, *places, forms)]
            else:
                convolved, count = np.zeros_like(x), emulator.count(1, 1)
                q, stride = emulator.rows(convolved)
                parts = (q, q + 4 * n_k, q + 8 * n_k, stride, emulator.rows(beta), emulator.rows(alpha))
                conv = (
                    emulator.rows(x),
                    parameters[0],
                    0,
                    states[0],
                    emulator.rows(convolved),
                    n_channels,
                    kernel_size,
                    True,
                )
                net_sizes, own = (*sizes, grouped, eps, *places, count), (*parameters[1:], 0, states[1])
                gate = GateOf(gating, emulator.rows(by), n_cols, n_cols)
                launches = [
                    *recurrent.causal_conv(*conv, *places, count),
                    recurrent.delta_net(*parts, *own, emulator.rows(before), *net_sizes),
                    kernels.gate(
                        emulator.rows(before), gate, emulator.rows(out), n_cols, count, forms, v_dim, at_norm, norm_eps
                    ),
                ]
            emulator.run(launches, order, seed)
            found.append([part.copy() for part in (conv_state, state, before, out, quantized)])
        assert all(same_bits(one, other) for one, other in zip(*found, strict=True))
        assert not n_done.any()
        assert out.any()


# -- states that are kept ----------------------------------------------------------------------------------------------


def kept_launches(emulator: Emulator, rng: np.random.Generator, n: int, state: np.ndarray, name: str):
    """What makes the launches of a recurrent kernel for steps of tokens of the third of three sequences."""
    width = 64
    x, y = (rng.standard_normal((n, width)).astype(F32) for _ in range(2))
    bc, vector = rng.standard_normal((n, 16)).astype(F32), -np.abs(rng.standard_normal(width * 8)).astype(F32)
    ids = rng.integers(0, 9, n).astype(np.int32)
    hashes = [np.arange(5, 8).astype(np.uint64), *(np.arange(9, 13).astype(np.uint32) for _ in range(2))]

    def launches(first: int, end: int, kept: Kept) -> list[Launch]:
        m = end - first
        positions, slots = np.arange(first, end, dtype=np.int32), np.full(m, 2, np.int32)
        place, count = (emulator.at(positions), emulator.at(slots)), emulator.count(m)
        a, b, both = (emulator.rows(np.ascontiguousarray(values[first:end])) for values in (x, y, bc))
        out, at = emulator.rows(np.zeros((m, width), F32)), (emulator.at(vector), emulator.at(state))
        if name == "conv":
            return recurrent.causal_conv(a, at[0], 0, at[1], out, width, 4, True, *place, count, 2, kept)
        if name == "scan":
            c = both._replace(address=both.address + 32)
            return [recurrent.selective_scan(a, b, both, c, at[0], at[0], at[1], out, width, 8, *place, count, kept)]
        if name == "compress":
            return [recurrent.compress(a, b, at[0], at[1], out, 32, 2, 4, *place, count, kept)]
        if name == "hash":
            out = emulator.rows(np.zeros((m, 4), np.int32))
            how = ngrams.Hashes(*map(emulator.at, hashes), 3, 4, 2)
            tokens = emulator.at(np.ascontiguousarray(ids[first:end]))
            return [ngrams.hash_tokens(at[1], out, how, tokens, Place(*place), count, kept)]
        alpha = b._replace(stride=width)
        sizes = 1, 2, 16, 16, 1, 0.0, True, 1e-6
        parts = a.address, a.address + 64, a.address + 128, a.stride, alpha, alpha, at[0], at[0], 0
        return [recurrent.delta_net(*parts, at[1], out, *sizes, *place, count, kept)]

    return launches


@pytest.mark.parametrize(
    ("name", "size", "n_tokens", "mode"),
    [
        ("conv", 384, 7, "race"),
        ("conv", 384, 40, "asan"),
        ("scan", 512, 11, "race"),
        ("compress", 192, 13, "asan"),
        ("hash", 2, 9, "race"),
        ("delta", 512, 12, "asan"),
    ],
)
def test_a_step_keeps_the_state_after_one_of_its_tokens(name: str, size: int, n_tokens: int, mode: str) -> None:
    """The copy is what a step up to that token leaves behind; the state is that after all."""
    emulator, before = Emulator(mode), 5
    old = aligned(np.zeros((3, size), F32))
    launches = kept_launches(emulator, np.random.default_rng(4), before + n_tokens, old, name)
    for launch in launches(0, before, NOT_KEPT):
        emulator.run(launch)
    start = old.copy()
    for row in {0, 1, 2, n_tokens // 2, n_tokens - 1}:
        ends = []
        for end in (before + row + 1, before + n_tokens):
            old[:] = start
            for launch in launches(before, end, NOT_KEPT):
                emulator.run(launch)
            ends.append(old.copy())
        copy, at = aligned(np.full(size, 7, F32)), np.array([row], np.int32)
        old[:] = start
        for launch in launches(before, before + n_tokens, Kept(emulator.at(copy), emulator.at(at))):
            emulator.run(launch)
        assert same_bits(copy, ends[0][2])
        assert same_bits(old, ends[1])
        assert not same_bits(ends[0], ends[1]) or row == n_tokens - 1
        copy[:], at[:] = 7, -1
        for launch in launches(before, before + n_tokens, Kept(emulator.at(copy), emulator.at(at))):
            emulator.run(launch)
        assert (copy == 7).all()
