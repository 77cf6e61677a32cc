"""Long steps on the CUDA device, here the stand-in driver: tiles, and experts streamed through staging buffers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_files import model_path
from test_cuda_device import Model, Opened

from engine.config import EngineConfig, EngineSettings
from engine.devices.cuda import host_memory
from engine.devices.cuda.expert_layers import Staging
from engine.devices.cuda.host_memory import PinnedTensors
from engine.devices.cuda.launch import PADDING, Launch
from engine.devices.cuda.runtime import Stream
from engine.devices.graph import KVType, Rows
from engine.devices.program import Limits
from engine.errors import DeviceError
from engine.gguf.weights import WeightMemory
from engine.runtime import Engine
from tests.cusim import needs_emulator

pytestmark = [needs_emulator, pytest.mark.usefixtures("driver")]

SMALL = "qwen3moe/qwen3moe-micro-Q8_0.gguf"
LIMITS = Limits(max_tokens=12, n_slots=2, context_length=64, kv_type=KVType.F16)
N_TOKENS = 30  # of the prompt
SETTINGS = {"limits": LIMITS, "prompt_tokens": 40, "stream_n_tokens": 10}


@pytest.fixture(scope="module", params=["mmap", "memory"])
def prompt_model(request, golden_path) -> Iterator[Model]:
    """A small model, its weights mapped, so that they go through pinned buffers, or in memory that can be pinned."""
    model = Model(golden_path(SMALL))
    if request.param == "memory":
        model.weights = WeightMemory.load(model.file, model.model.tensor_names, "memory")
    model.tokens = np.random.default_rng(3).integers(0, model.n_vocab, N_TOKENS).tolist()
    yield model
    model.close()


_kept: list[np.ndarray] = []


@pytest.fixture
def single_tokens(prompt_model: Model) -> np.ndarray:
    """Logits of the prompt, fed token by token to a device that holds all experts."""
    if not _kept:
        with prompt_model.open(limits=replace(LIMITS, max_tokens=1)) as opened:
            _kept.append(prompt(opened))
    return _kept[0]


def prompt(opened: Opened, cuts: tuple[int, ...] = (), slot: int = 0) -> np.ndarray:
    """Logits of all tokens of the prompt, cut at these places; the last one's only where a step gives no more."""
    limits, tokens = opened.program.limits, np.array(opened.model.tokens, np.int32)
    parts, ends = [], [*cuts, len(tokens)] if limits.max_tokens > 1 else range(1, len(tokens) + 1)
    for start, end in zip([0, *ends], ends, strict=False):
        positions = np.arange(start, end, dtype=np.int32)
        rows = np.arange(max(0, end - start - limits.most(Rows.OUTPUTS)), end - start, dtype=np.int32)
        logits = opened.program.run(tokens[start:end], positions, np.full(end - start, slot, np.int32), rows)
        parts.append(np.full((end - start, opened.model.n_vocab), np.nan, np.float32))
        parts[-1][rows] = logits
    return np.concatenate(parts)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    known = ~np.isnan(found[:, 0])
    assert known[-1]
    assert (found[known].view(np.uint32) == expected[known].view(np.uint32)).all()


@pytest.mark.parametrize("hot_k", [None, 3, 0])
def test_long_steps_have_the_bits_of_single_tokens(
    hot_k: int | None, prompt_model: Model, single_tokens: np.ndarray
) -> None:
    with prompt_model.open(hot_k=hot_k, **SETTINGS) as opened:
        assert opened.program.limits.max_tokens == 40
        for cuts in ((), (17,), (9, 10, 14, 17, 26)):  # streamed; and parts for which the CPU is asked
            assert_same(prompt(opened, cuts, slot=1), single_tokens)


@pytest.mark.parametrize(
    "name",
    [
        "afmoe",
        "arctic",
        "bailingmoe3",
        "cohere2moe",
        "deepseek32",
        "deepseek4",
        "dots3note",
        "gemma4",
        "glm-dsa",
        "glm5-next",
        "minimax-m3",
        "granite_swa",
        "grok",
        "grovemoe",
        "hy_v4",
        "jamba",
        "kimi-k3",
        "kimi-linear",
        "laguna",
        "lfm2moe",
        "mimo2",
        "minimax-01",
        "nemotron_h_moe",
        "phimoe-long",
        "qwen4exp",
        "smallthinker",
        "step35",
    ],
)
def test_long_steps_of_other_architectures(name: str, data: Path) -> None:
    """What only some have: experts of two matrices, gates, limits, caps, other heads in every layer, choices."""
    model = Model(data / "peers" / f"{name}-Q8_0.gguf")
    model.tokens = np.random.default_rng(3).integers(0, model.n_vocab, N_TOKENS).tolist()
    with model.open(limits=replace(LIMITS, max_tokens=1)) as opened:
        expected = prompt(opened)
    for hot_k in (3, 0):
        with model.open(hot_k=hot_k, **SETTINGS) as opened:
            for cuts in ((), (9, 17)):
                assert_same(prompt(opened, cuts, slot=1), expected)
    model.close()


@pytest.mark.parametrize(
    "settings", [{"copy_us": 500}, {"jitter_us": 300}, {"order": "random"}, {"order": "reverse"}], ids=str
)
def test_swaps_between_long_steps_never_change_a_bit(
    settings: dict,
    prompt_model: Model,
    single_tokens: np.ndarray,
    driver,
    monkeypatch,
) -> None:
    """Experts change hands between steps, and are on their way into slots while a step streams the same ones.

    The ring is as short as can be: whoever does not wait reads another expert, or overwrites one that is still read.
    """
    monkeypatch.setattr("engine.devices.cuda.device._MOST_BUFFERS", 2)
    monkeypatch.setattr("engine.devices.cuda.device.STAGED_EXPERTS", 1)
    driver.set(**settings)
    rng = np.random.default_rng(4)
    with prompt_model.open(hot_k=3, **SETTINGS) as opened:
        program = opened.program
        for _ in range(3):
            assert_same(prompt(opened, (13,)), single_tokens)
            for layer in range(len(program.n_slots)):
                program.wait_all()
                slot, expert = int(rng.integers(3)), int(rng.integers(3, program.n_experts))
                if program._expert_in[layer, slot] >= 0:
                    program.publish(layer, int(program._expert_in[layer, slot]), -1)
                ticket = program.copy_expert(layer, expert, slot)
                if rng.random() < 0.5 and program._places[layer, expert] < 0:
                    program.wait_all()
                    assert program.is_done(ticket)
                    program.publish(layer, expert, slot)


@pytest.mark.parametrize("nth", [1, 3], ids=["embeddings", "experts"])
def test_where_memory_cannot_be_pinned_the_device_gets_copies(
    nth: int,
    prompt_model: Model,
    single_tokens: np.ndarray,
    driver,
    caplog,
) -> None:
    """Of the table of embeddings one that stays, of experts some that go through buffers."""
    caplog.set_level(logging.INFO, logger="engine")
    dense_bytes = []
    for fails in (False, True):
        caplog.clear()
        if fails:
            driver.fail("cuMemHostRegister", nth, "CUDA_ERROR_UNKNOWN")
        with prompt_model.open(hot_k=2, **SETTINGS) as opened:
            assert_same(prompt(opened), single_tokens)
            dense_bytes.append(opened.program._lowering.layout.n_bytes)
        if not prompt_model.weights.is_own_memory:
            assert "embeddings are read from RAM, row by row of a copy:" in caplog.text
            told = 'through pinned buffers: the weights are mapped from the file ([model] load = "mmap")'
            assert told in caplog.text
        else:
            embeddings, experts = fails and nth == 1, fails and nth == 3
            failed = "cuMemHostRegister failed: CUDA_ERROR_UNKNOWN"
            assert (f"MB of VRAM: {failed}" in caplog.text) == embeddings
            assert ("embeddings are read from RAM, row by row:" in caplog.text) == (not embeddings)
            assert (f"experts are copied to the GPU through pinned buffers: {failed}" in caplog.text) == experts
            assert ("straight from where they lie" in caplog.text) == (not experts)
    table = prompt_model.weights.array("token_embd.weight").nbytes
    copied = prompt_model.weights.is_own_memory and nth == 1
    assert (dense_bytes[1] - dense_bytes[0] >= table) == copied


def test_what_is_pinned_has_the_bytes_behind_it_that_kernels_read(prompt_model: Model, monkeypatch) -> None:
    """The last row of a table is read in whole words, too; beyond pinned pages that would end the process."""
    pinned: list[int] = []

    class Pinned:
        device_address = 0

        def __init__(self, *what: int) -> None:
            pinned.append(what[-1])
            self.bytes = np.zeros(what[-1], np.uint8)

        def close(self) -> None:
            pinned.remove(len(self.bytes))

    for name in ("PinnedPages", "PinnedMemory"):
        monkeypatch.setattr(host_memory, name, Pinned)
    names = ["token_embd.weight", "blk.0.ffn_down_exps.weight"]
    tensors = PinnedTensors(prompt_model.weights, names, most_copied=1 << 30)
    assert tensors.addresses.keys() == set(names)
    assert pinned == [prompt_model.weights.array(name).nbytes + PADDING for name in names]
    tensors.close()
    assert not pinned


def test_a_table_in_a_file_is_not_copied_where_memory_is_short(
    prompt_model: Model, single_tokens: np.ndarray, caplog, monkeypatch
) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    table = prompt_model.weights.array("token_embd.weight").nbytes
    for free, is_copied in ((4 * table + 4, True), (4 * table - 4, False)):
        caplog.clear()
        monkeypatch.setattr("engine.devices.cuda.host_memory.available_memory", lambda free=free: free)
        with prompt_model.open(hot_k=2, **SETTINGS) as opened:
            assert_same(prompt(opened), single_tokens)
        in_ram = is_copied or prompt_model.weights.is_own_memory
        assert ("embeddings are read from RAM" in caplog.text) == in_ram
        assert ("MB of VRAM: the weights are mapped from the file" in caplog.text) == (not in_ram)


@pytest.mark.parametrize("after", [0, 3, 30, 60])
def test_an_interrupt_leaves_the_device_usable(
    after: int, prompt_model: Model, single_tokens: np.ndarray, monkeypatch
) -> None:
    """While kernels and copies are being queued, those queued already still run."""
    with prompt_model.open(hot_k=3, **SETTINGS) as opened:
        queued, launch = 0, Stream.launch

        def interrupted(stream: Stream, kernel: Launch) -> None:
            nonlocal queued
            if queued == after:
                raise KeyboardInterrupt
            queued += 1
            launch(stream, kernel)

        with monkeypatch.context() as patch:
            patch.setattr(Stream, "launch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prompt(opened)
        assert_same(prompt(opened), single_tokens)


@pytest.mark.parametrize(("event", "nth"), [("copy", 3), ("copy", 9), ("kernel", 60), ("cuMemcpyHtoDAsync", 8)])
def test_a_failure_in_a_long_step_is_an_error_and_frees_everything(
    event: str,
    nth: int,
    prompt_model: Model,
    driver,
) -> None:
    opened = prompt_model.open(hot_k=1, **SETTINGS)
    driver.fail(event, nth)
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
        prompt(opened)
    driver.reset()  # a crashed device frees nothing by itself; here its context ends


def test_steps_and_ring_shrink_with_the_memory(prompt_model: Model, single_tokens: np.ndarray) -> None:
    """Down to two buffers of one expert, beside which there always is room for steps of half the length."""
    with prompt_model.open(hot_k=0, **SETTINGS) as opened:
        largest = opened.program.device_bytes
        assert opened.program._lowering.staging == Staging(32, 8, 10)

    def sizes_within(budget: int) -> tuple[int, int, int] | None:
        try:
            opened = prompt_model.open(hot_k=0, vram_budget=budget, **SETTINGS)
        except DeviceError as error:
            assert "of VRAM" in str(error)  # noqa: PT017 - some budgets are too small for everything
            return None
        with opened:
            assert opened.program.device_bytes <= budget
            assert_same(prompt(opened, (12, 24)), single_tokens)
            staging = opened.program._lowering.staging
            assert staging is not None
            return opened.program.limits.max_tokens, staging.n_buffers, staging.at_once

    found = [sizes_within(int(budget)) for budget in np.geomspace(largest, largest / 8, 16)]
    fitting = [sizes for sizes in found if sizes is not None]
    assert found == fitting + [None] * (len(found) - len(fitting))
    assert fitting[0][0] == 40
    assert fitting[-1] == (20, 2, 1)
    assert all(n_buffers >= 2 and at_once >= 1 for _, n_buffers, at_once in fitting)
    n_tokens = [sizes[0] for sizes in fitting]
    assert n_tokens == sorted(n_tokens, reverse=True)


@pytest.mark.parametrize(
    "name",
    [
        "qwen35moe/qwen35moe-fusedgu-Q8_0",  # gate and up in one tensor; recurrent layers
        "qwen3next/qwen3next-wide-Q4_K_M",  # minimums
        "gpt-oss/gpt-oss-micro-MXFP4",  # biases, sinks, windows
        "deepseek2/deepseek2-v2lite-micro-Q8_0",  # latent attention
        "olmoe/olmoe-wide-Q6_K",  # scales of 16 weights
    ],
)
def test_long_steps_of_other_models_have_the_bits_of_single_tokens(name: str, golden_path) -> None:

    model = Model(model_path(golden_path(f"{name}.npz")))
    model.tokens = np.random.default_rng(3).integers(0, model.n_vocab, 14).tolist()
    try:
        with model.open(limits=replace(LIMITS, max_tokens=1)) as opened:
            expected = prompt(opened)
        with model.open(hot_k=2, **SETTINGS) as opened:
            assert opened.program._lowering.staging is not None
            assert_same(prompt(opened), expected)
    finally:
        model.close()


@pytest.mark.parametrize("name", ["gpt-oss/gpt-oss-micro-F32", "qwen35moe/qwen35moe-fusedgu-Q8_0"])
def test_a_prompt_in_one_step_has_the_bits_of_short_ones(name: str, golden_path) -> None:
    """From 65 tokens on they share tiles of keys and values; here with windows and sinks, or recurrent layers."""
    found = []
    for most in (128, 5):
        sizes = {"n_threads": 2, "context_length": 128, "max_batch_tokens": most, "kv_type": "q8_0"}
        settings = EngineConfig(engine=EngineSettings(device="cuda", **sizes))
        with Engine.open(golden_path(f"{name}.gguf"), settings) as engine, engine.new_session() as session:
            found.append(session.run([(7 * i + 3) % 250 for i in range(100)]))
    assert (found[0].view(np.uint32) == found[1].view(np.uint32)).all()
