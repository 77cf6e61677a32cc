"""The whole CUDA device on the stand-in driver: golden models, the promise, swaps, and what happens when things fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from model_runner import divergence

from engine.devices.cpu import CPUDevice
from engine.devices.cuda import CUDADevice
from engine.devices.cuda.device import CUDAProgram
from engine.devices.graph import KVType, Limits
from engine.errors import DeviceError, RequestError
from engine.generate.forward import ForwardPass
from engine.gguf.reader import GGUFFile
from engine.gguf.weights import WeightMemory
from engine.models import load_model
from tests.cusim import StandInCompiler, missing_requirement, stand_in_driver

pytestmark = pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))

SMALL = "qwen3moe/qwen3moe-micro-Q8_0.gguf"
LIMITS = Limits(max_tokens=8, n_slots=2, context_length=64, kv_type=KVType.F32)
N_TOKENS = 10


class Model:
    """A model file, opened."""

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile.open(path)
        self.model = load_model(self.file)
        self.weights = WeightMemory.load(self.file, self.model.tensor_names, "mmap")
        self.n_vocab = self.model.spec.n_vocab
        self.tokens = np.random.default_rng(0).integers(0, self.n_vocab, N_TOKENS).tolist()

    def open(self, **settings) -> Opened:
        return Opened(self, **settings)

    def close(self) -> None:
        self.weights.close()
        self.file.close()


class Opened:
    """The model on the CUDA device."""

    def __init__(self, model: Model, limits: Limits = LIMITS, **settings) -> None:
        self.model = model
        self.device = CUDADevice(compiler=StandInCompiler(), **settings)
        try:
            self.program: CUDAProgram = self.device.compile(model.model.graph, model.weights, limits)
        except BaseException:
            self.device.close()
            raise
        self.forward = ForwardPass(self.program, limits, model.n_vocab)

    def logits(self, cut: int = N_TOKENS, slot: int = 0, between=lambda: None) -> np.ndarray:
        """Logits of the model's tokens, fed `cut` at a time."""
        parts = []
        for start in range(0, N_TOKENS, cut):
            parts.append(self.forward.run(slot, self.model.tokens[start : start + cut], start, "all").copy())
            between()
        return np.concatenate(parts)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.close()
        self.device.close()


@pytest.fixture(autouse=True)
def driver() -> Iterator:
    """A fresh stand-in driver for each test; afterwards nothing may be left of what the test allocated."""
    stand_in = stand_in_driver()
    stand_in.reset()
    yield stand_in
    assert stand_in.device_bytes == 0
    assert stand_in.pinned_allocations == 0
    stand_in.reset()


@pytest.fixture(scope="module")
def small(golden_path) -> Iterator[Model]:
    model = Model(golden_path(SMALL))
    yield model
    model.close()


@pytest.mark.parametrize(
    ("name", "n_slots"),
    [
        ("qwen35moe/qwen35moe-micro-F32", None),
        ("qwen3moe/qwen3moe-micro-F16", 5),
        ("qwen35moe/qwen35moe-fusedgu-Q8_0", 3),
        ("qwen3moe/qwen3moe-wide-Q4_K_M", 3),
        ("qwen35moe/qwen35moe-wide-IQ4_XS", 0),
    ],
)
def test_golden_models(name: str, n_slots: int | None, golden_path) -> None:
    """As near to the exact logits as the golden files ask, and as the CPU device is."""
    model, reference = Model(golden_path(f"{name}.gguf")), np.load(golden_path(f"{name}.npz"))
    model.tokens = reference["tokens"][:N_TOKENS].tolist()
    exact = reference["logits_exact"][:N_TOKENS]
    with model.open(n_expert_slots=n_slots) as opened:
        logits, routing = opened.logits(), opened.program.routing()
    kl = divergence(exact, logits)
    if "logits" in reference:
        noise = divergence(exact, reference["logits"][:N_TOKENS])
        assert kl.mean() <= max(2 * noise.mean(), 3e-5)
        assert kl.max() <= max(4 * noise.max(), 1e-4)
    else:
        assert kl.mean() <= 1e-9
    cpu = CPUDevice(2).compile(model.model.graph, model.weights, LIMITS)
    expected = ForwardPass(cpu, LIMITS, model.n_vocab).run(0, model.tokens, 0, "all")
    assert divergence(expected, logits).mean() <= 1e-5
    assert (routing == cpu.routing()).all()
    cpu.close()
    model.close()


@pytest.mark.parametrize("kv_type", KVType)
def test_slots_and_cuts_never_change_a_bit(kv_type: KVType, small: Model) -> None:
    limits = Limits(8, 2, 64, kv_type)
    with small.open(limits=limits) as opened:
        expected = opened.logits()
        assert opened.program.n_expert_slots > 3
        for cut in (1, 3):
            assert (opened.logits(cut, slot=1).view(np.uint32) == expected.view(np.uint32)).all()
    for n_slots in (0, 1, 3):
        with small.open(limits=limits, n_expert_slots=n_slots) as opened:
            assert opened.program.n_expert_slots == n_slots
            for cut in (4, 1):
                assert (opened.logits(cut).view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize(
    "settings", [{}, {"copy_us": 3000}, {"jitter_us": 300}, {"order": "random"}, {"order": "reverse"}], ids=str
)
def test_swaps_never_change_a_bit(settings: dict, small: Model, driver) -> None:
    with small.open() as opened:
        expected = opened.logits()
    driver.set(**settings)
    rng, n_published = np.random.default_rng(1), 0
    with small.open(n_expert_slots=3) as opened:
        swaps, table = opened.program.swaps(), opened.program.expert_table

        def swap() -> None:
            nonlocal n_published
            n_published += swaps.publish()
            layer, slot = int(rng.integers(len(table))), int(rng.integers(3))
            busy = [(s.layer, s.slot) for s in swaps._under_way]
            coming = [s.expert for s in swaps._under_way if s.layer == layer]
            cold = [e for e in np.flatnonzero(table[layer] < 0).tolist() if e not in coming]
            if (layer, slot) not in busy:
                swaps.begin(layer, int(rng.choice(cold)), slot)

        for _ in range(2):
            assert (opened.logits(1, between=swap).view(np.uint32) == expected.view(np.uint32)).all()
        swaps.close()
    assert n_published > 0


def test_two_sequences_in_one_step(small: Model) -> None:
    """Interleaved in one program, each as if it were alone."""
    tokens, half = np.array(small.tokens, np.int32), N_TOKENS // 2
    with small.open(n_expert_slots=3) as opened:
        alone = opened.forward.run(0, tokens[:half], 0, "all").copy()
        other = opened.forward.run(1, tokens[half : half + 3], 0, "all").copy()
        positions = np.array([*range(half), *range(3)], np.int32)
        slots = np.array([1] * half + [0] * 3, np.int32)
        rows = np.arange(half + 3, dtype=np.int32)
        both = opened.program.run(np.concatenate([tokens[:half], tokens[half : half + 3]]), positions, slots, rows)
        assert (both[:half].view(np.uint32) == alone.view(np.uint32)).all()
        assert (both[half:].view(np.uint32) == other.view(np.uint32)).all()


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_of_the_cpus_share_is_an_error_and_the_device_goes_on(small: Model) -> None:
    with small.open(n_expert_slots=1) as opened:
        expected = opened.logits()
        server = opened.program._misses

        def fail() -> None:
            raise MemoryError("no memory for this")

        good, server._programs[1] = server._programs[1], fail
        with pytest.raises(DeviceError, match="no memory for this"):
            opened.logits()
        server._programs[1] = good
        assert (opened.logits().view(np.uint32) == expected.view(np.uint32)).all()


def test_a_gpu_that_asks_nothing_ends_in_an_error(small: Model, monkeypatch) -> None:
    """The watchdog: here the step's graph is simply not launched."""
    monkeypatch.setattr("engine.devices.cuda.misses._TIMEOUT_S", 0.2)
    with small.open(n_expert_slots=1) as opened:
        monkeypatch.setattr("engine.devices.cuda.runtime.Graph.launch", lambda *_: None)
        with pytest.raises(DeviceError, match=r"made no request for .* last request"):
            opened.logits()


@pytest.mark.parametrize("event", ["kernel", "cuGraphLaunch"])
def test_a_failing_launch_is_an_error_and_frees_everything(event: str, small: Model, driver) -> None:
    opened = small.open(n_expert_slots=1)
    driver.fail(event, 1)
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
        opened.logits()
    driver.reset()  # a crashed device frees nothing by itself; here its context ends


def test_slots_shrink_to_what_fits(small: Model, driver) -> None:
    with small.open() as opened:
        all_bytes, expected = opened.program.device_bytes, opened.logits()
    margin = 256 << 20
    driver.set(device_bytes=margin + all_bytes - 40_000)
    with small.open() as opened:
        assert 0 < opened.program.n_expert_slots < opened.program.expert_table.shape[1]
        assert opened.program.device_bytes <= all_bytes - 40_000
        assert (opened.logits().view(np.uint32) == expected.view(np.uint32)).all()


def test_too_little_memory_is_a_clear_error(small: Model) -> None:
    with pytest.raises(DeviceError, match=r"needs .* GB of GPU memory with 2 expert slots.*may be used"):
        small.open(n_expert_slots=2, vram_budget=50_000)


def test_a_failing_allocation_frees_everything(small: Model, driver) -> None:
    driver.fail("cuMemHostAlloc", 2, "CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(
        DeviceError, match=r"cuMemHostAlloc failed: CUDA_ERROR_OUT_OF_MEMORY .*; use fewer expert slots"
    ):
        small.open()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (([], [], [], []), "a step of 0 tokens"),
        (([1] * 9, range(9), [0] * 9, []), "a step of 9 tokens"),
        (([1 << 20], [0], [0], [0]), "token id 1048576"),
        (([1], [64], [0], [0]), "position 64"),
        (([1], [0], [2], [0]), "sequence slot 2"),
        (([1], [0], [0], [1]), "output row 1"),
        (([1], [-1], [0], [0]), "position -1"),
    ],
)
def test_steps_that_do_not_fit_are_refused(step: tuple, message: str, small: Model) -> None:
    with small.open(n_expert_slots=0) as opened, pytest.raises(RequestError, match=message):
        opened.program.run(*(np.array(values, np.int32) for values in step))
