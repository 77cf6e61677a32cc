"""Layers that differ in the width of their experts and in how many of them a token uses (Nemotron 3 Puzzle)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cached_runner import Setup
from golden_model import GoldenModel, open_golden
from model_runner import ModelRunner, divergence
from reference_device import ReferenceProgram
from test_cuda_device import Model
from test_cuda_prompts import LIMITS, N_TOKENS, SETTINGS, assert_same, prompt
from uneven_experts import ARCHITECTURE, USED, write_uneven

from engine.devices.footprint import measure
from engine.devices.graph import Experts, KVType
from engine.errors import GGUFError
from engine.experts.trace import NOT_RECORDED, PROMPT, TraceRecorder
from tests.cusim import needs_emulator

TOKENS = np.random.default_rng(5).integers(0, 128, 24).tolist()


@pytest.fixture(params=["F32", "Q8_0"])
def uneven(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Path:
    return write_uneven(data / "peers" / f"{ARCHITECTURE}-{request.param}.gguf", tmp_path / "uneven.gguf")


@pytest.fixture
def runner(uneven: Path) -> Iterator[ModelRunner]:
    with ModelRunner(uneven) as runner:
        yield runner


def test_every_layer_has_its_own(runner: ModelRunner) -> None:
    moe, graph = runner.model.spec.moe, runner.model.graph
    assert (moe.n_experts_used, moe.ffn_size, moe.layer_experts_used) == (5, 64, USED)
    assert [routing.ids.width for routing in graph.routings] == [2, 5]
    assert [op.down.n_cols for op in graph.operations if isinstance(op, Experts)] == [32, 64]
    footprint = measure(graph, LIMITS)
    assert footprint.experts_used.tolist() == [2, 5]
    narrow, wide = footprint.expert_bytes.tolist()
    assert wide == 2 * narrow
    assert footprint.chosen_bytes == 2 * narrow + 5 * wide


def test_logits_are_those_of_the_formulas(runner: ModelRunner) -> None:
    program = ReferenceProgram(runner.model.graph, runner.weights)
    exact = np.concatenate([program.run(part) for part in (TOKENS[:9], TOKENS[9:])])
    is_exact = runner.file.tensors["blk.3.ffn_up_exps.weight"].format.name == "F32"
    assert divergence(exact, runner.logits(TOKENS)).mean() < (
        1e-9 if is_exact else 1e-3
    )  # else activations are rounded


def test_weights_that_add_nothing_change_nothing(data: Path, tmp_path: Path) -> None:
    """Logits of llama.cpp for the model that this one is made of."""
    with open_golden(data / "peers" / f"{ARCHITECTURE}-F32.npz") as golden:
        n_used = golden.runner.model.spec.moe.n_experts_used
        path = write_uneven(golden.path, tmp_path / "same.gguf", (0, n_used, 0, n_used), adds=False)
        with ModelRunner(path) as runner:
            assert runner.model.spec.moe.layer_experts_used == ()
            golden.check(golden.reference["logits_exact"], runner.logits(golden.prompt))


def test_who_was_chosen_is_told_and_nobody_where_a_layer_uses_fewer(runner: ModelRunner) -> None:
    chosen, n_experts = runner.experts(TOKENS), runner.model.spec.moe.n_experts
    assert chosen.shape == (2, len(TOKENS), 5)
    assert (chosen[0, :, 2:] == n_experts).all()
    assert (chosen[0, :, :2] < n_experts).all()
    assert (chosen[1] < n_experts).all()


@pytest.mark.parametrize(
    "setup", [Setup((3, 1), "lru", adversarial=True, bypass_n_tokens=30), Setup((4, 2), "adaptive")]
)
def test_a_cache_changes_no_bit_and_counts_what_was_chosen(uneven: Path, runner: ModelRunner, setup: Setup) -> None:
    statistics = GoldenModel(uneven, {"tokens": np.array(TOKENS)}, runner).check_with_a_cache(setup, 8)
    n_tokens = statistics.choices // np.array([2, 5])
    assert n_tokens[0] == n_tokens[1] > 0
    assert (statistics.choices == n_tokens * [2, 5]).all()
    assert (statistics.hits <= statistics.choices).all()


def test_a_recorded_trace_says_what_is_not_known(runner: ModelRunner) -> None:
    recorder = TraceRecorder("uneven", 8)
    recorder.append(runner.experts(TOKENS), PROMPT)
    ids = recorder.trace().ids
    assert (ids[:, 0, 2:] == NOT_RECORDED).all()
    assert (ids[:, 0, :2] < 8).all()
    assert (ids[:, 1] < 8).all()


@needs_emulator
@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("hot_k", [3, 0])
def test_on_a_gpu_neither_slots_nor_long_steps_change_a_bit(uneven: Path, runner: ModelRunner, hot_k: int) -> None:
    model = Model(uneven)
    model.tokens = np.random.default_rng(3).integers(0, model.n_vocab, N_TOKENS).tolist()
    limits = replace(LIMITS, kv_type=KVType.F32)
    with model.open(limits=replace(limits, max_tokens=1)) as opened:
        expected = prompt(opened)
    with model.open(hot_k=hot_k, **SETTINGS | {"limits": limits}) as opened:
        streams = opened.program.limits.max_tokens >= N_TOKENS  # integers only
        for cuts in (
            ((), (9, 17)) if streams else ((10, 20),)
        ):  # the last of (9, 17) streamed, for the others the CPU is asked
            assert_same(prompt(opened, cuts, slot=1), expected)
        routing = opened.program.routing()
    chosen = runner.experts(model.tokens)[:, -routing.shape[1] :]
    assert routing.shape == chosen.shape
    assert (np.sort(routing) == np.sort(chosen)).mean() > 0.9
    assert divergence(runner.logits(model.tokens), expected)[0] <= 1e-5
    model.close()


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ((0, 2, 3), r"one number, or one for each of 4 layers"),
        ((0, 2, 3, 0), r"has a router \(blk.3.ffn_gate_inp.weight\) of which no expert is used"),
        ((0, 2, 0, 9), r"expert_used_count is 9; expected at most expert_count \(8\)"),
    ],
)
def test_counts_that_do_not_fit_are_refused(used: tuple[int, ...], message: str, data: Path, tmp_path: Path) -> None:
    path = write_uneven(data / "peers" / f"{ARCHITECTURE}-F32.gguf", tmp_path / "wrong.gguf", used)
    with pytest.raises(GGUFError, match=message), ModelRunner(path):
        pass
