"""Slots in the memory of keys and values on the CUDA device, here the stand-in driver: no bit changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from model_runner import ModelRunner
from test_cuda_device import Model, Opened
from test_cuda_lending import cached, same_bits

from engine.devices.cpu import CPUDevice
from engine.devices.cpu.device import CPUProgram
from engine.devices.cuda import CUDADevice
from engine.devices.cuda.program import CUDAProgram
from engine.devices.cuda.sequence_state import used_parts
from engine.devices.footprint import measure
from engine.devices.graph import KVType
from engine.devices.program import Limits
from engine.devices.timing import Bandwidths
from engine.errors import DeviceError
from engine.experts.watched_program import WatchedProgram
from engine.gguf.weights import WeightMemory
from engine.resources import Resources
from tests.cusim import StandInCompiler, needs_emulator

pytestmark = [needs_emulator, pytest.mark.usefixtures("driver", "least")]

N_TOKENS = 28
N_SEQUENCES = 2
NAMES = ("qwen3moe/qwen3moe-micro-Q8_0", "qwen3next/qwen3next-wide-Q4_K_M")  # the latter's layers differ in size


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.devices.context_slots.LEAST_POSITIONS", 3)


class Borrowing:
    """A model with a context in whose end one expert fits, and a GPU that has room for few others."""

    def __init__(self, path, kv_type: KVType) -> None:
        self.model = model = Model(path)
        model.weights.close()
        model.weights = WeightMemory.load(model.file, model.model.tensor_names, "memory")
        model.tokens = np.random.default_rng(4).integers(0, model.n_vocab, N_TOKENS).tolist()
        footprint = measure(model.model.graph, Limits(1, 1, 64, kv_type))
        n_bytes = int(footprint.expert_bytes.max()) + 3 * 256 + 256
        context_length = n_bytes // min(footprint.stretches) + N_TOKENS // 2
        self.limits = Limits(max_tokens=12, n_slots=N_SEQUENCES, context_length=context_length, kv_type=kv_type)
        with model.open(limits=self.limits, vram_budget=10**9) as opened:
            self.expected = [one_by_one(opened.program, model, sequence) for sequence in range(N_SEQUENCES)]
            whole = opened.program.device_bytes
        self.budget = next(budget for budget in range(whole // 4, whole, whole // 40) if self._borrows(budget))

    def _borrows(self, budget: int) -> bool:
        with suppress(DeviceError), self.open(budget) as opened:
            n_left = opened.program.usable_slots(1, N_TOKENS).sum(1)
            return bool((n_left > 0).all() and (n_left < opened.program.n_slots).any())
        return False

    def open(self, budget: int = 0, **settings) -> Opened:
        """Open it, with no expert in any slot."""
        opened = self.model.open(limits=self.limits, vram_budget=budget or self.budget, prompt_tokens=24, **settings)
        assert opened.program.device_bytes <= (budget or self.budget)
        opened.program._places[:] = opened.program._expert_in[:] = -1
        return opened

    def close(self) -> None:
        self.model.close()


@pytest.fixture(scope="module")
def opened_models() -> Iterator[dict[tuple[str, KVType], Borrowing]]:
    models: dict[tuple[str, KVType], Borrowing] = {}
    yield models
    for model in models.values():
        model.close()


KINDS = [(NAMES[0], KVType.F16), (NAMES[0], KVType.Q8_0), (NAMES[1], KVType.F16)]


@pytest.fixture(params=KINDS, ids=str)
def borrowing(request, golden_path, driver, least, opened_models) -> Borrowing:
    """A model, opened by the first test that has the driver."""
    name, kv_type = request.param
    if request.param not in opened_models:
        opened_models[request.param] = Borrowing(golden_path(f"{name}.gguf"), kv_type)
    return opened_models[request.param]


def step(program, model: Model, at: int, sequence: int) -> np.ndarray:
    """Logits of one token; each sequence has its own."""
    token = (model.tokens[at] + sequence) % model.n_vocab
    args = (np.array([value], np.int32) for value in (token, at, sequence, 0))
    return program.run(*args).copy()


def prompt(program, model: Model, start: int, end: int) -> np.ndarray:
    """Logits of the last of some tokens of the first sequence."""
    positions = np.arange(start, end, dtype=np.int32)
    tokens = np.array(model.tokens[start:end], np.int32)
    return program.run(tokens, positions, np.zeros_like(positions), np.array([end - start - 1], np.int32)).copy()


def one_by_one(program, model: Model, sequence: int) -> np.ndarray:
    return np.concatenate([step(program, model, at, sequence) for at in range(N_TOKENS)])


@pytest.mark.parametrize(
    ("borrowing", "driver_settings"),
    [
        *((KINDS[0], settings) for settings in ({}, {"copy_us": 300, "jitter_us": 200}, {"order": "random"})),
        *((kind, {"order": "random", "copy_us": 300, "jitter_us": 200}) for kind in KINDS[1:]),
    ],
    indirect=["borrowing"],
    ids=str,
)
def test_sequences_grow_and_begin_anew_with_the_same_bits(borrowing: Borrowing, driver, driver_settings: dict) -> None:
    """Experts lie where keys and values will be, are gone when these come, and come back with the next sequence."""
    driver.set(**driver_settings)
    model, found = borrowing.model, []
    with borrowing.open() as opened:
        program, cache = opened.program, cached(opened)
        watched = WatchedProgram(program, cache)
        everybody = np.ones((len(program.n_slots), program.n_experts), np.float32)
        for _ in range(2):
            for at in range(N_TOKENS):
                for sequence in range(N_SEQUENCES):
                    logits = step(watched, model, at, sequence)
                    assert same_bits(logits, borrowing.expected[sequence][at : at + 1])
                if at == 0:  # all slots are back
                    cache.fill(everybody, wait=True)
                n_left = program.usable_slots(1, N_TOKENS).sum(1)
                found.append(int((cache.table.ready.sum(1) > n_left).sum()))
        cache.close()
        cache.table.check_integrity()
    assert found[0] > 0 < found[N_TOKENS]  # tokens found experts there
    assert found[N_TOKENS - 1] == found[-1] == 0


def test_long_steps_leave_experts_in_the_context_alone(borrowing: Borrowing) -> None:
    """Until the prompt itself has come to there."""
    model, n_seen = borrowing.model, 0
    expected = borrowing.expected[0]
    with borrowing.open(stream_n_tokens=10) as opened:
        program, cache = opened.program, cached(opened, "static")
        watched = WatchedProgram(program, cache)
        step(watched, model, 0, 0)
        cache.fill(np.ones((len(program.n_slots), program.n_experts), np.float32), wait=True)
        before = cache.table.ready.copy()
        for start, end in ((0, 10), (10, 22)):
            logits = prompt(watched, model, start, end)
            assert same_bits(logits, expected[end - 1 : end])
            left = program.usable_slots(10, end)
            assert cache.table.ready.sum(1).tolist() == left.sum(1).tolist()
            assert (cache.table.ready <= before).all()
            n_seen += int((left.sum(1) > program.usable_slots(10, N_TOKENS).sum(1)).sum())
        for at in range(22, N_TOKENS):
            assert same_bits(step(watched, model, at, 0), expected[at : at + 1])
        cache.close()
        cache.table.check_integrity()
    assert n_seen > 0


def test_the_memory_is_really_that_of_keys_and_values(borrowing: Borrowing) -> None:
    """Whoever believes the contents of a slot that was lent gets other logits, and the device refuses to lend one."""
    model, expected = borrowing.model, borrowing.expected[0]
    with borrowing.open() as opened:
        program, left = opened.program, opened.program.usable_slots(1, N_TOKENS)
        lent = [(layer, slot) for layer, n in enumerate(program.n_slots) for slot in range(n) if not left[layer, slot]]
        for layer, n_slots in enumerate(program.n_slots.tolist()):
            for slot in range(n_slots):
                opened.copy(layer, slot, slot)
        at = 0
        while (program.usable_slots(1, at + 1).sum(1) == program.n_slots).all():
            assert same_bits(step(program, model, at, 0), expected[at : at + 1])
            at += 1
        assert 3 <= at < N_TOKENS
        with pytest.raises(AssertionError, match="needs the memory of an expert that is published"):
            step(program, model, at, 0)
        for layer, slot in lent:
            program.publish(layer, slot, -1)
        for later in range(at, N_TOKENS):
            assert same_bits(step(program, model, later, 0), expected[later : later + 1])
        step(program, model, 0, 0)  # the sequence begins anew: its memory is free
        for layer, slot in lent:
            program.publish(layer, slot, slot)
        believed = np.concatenate([step(program, model, i, 0) for i in range(at)])
        assert not same_bits(believed, expected[:at])


def test_a_sequence_that_is_put_back_takes_the_memory_of_experts(borrowing: Borrowing) -> None:
    model, expected = borrowing.model, borrowing.expected[0]
    with borrowing.open() as opened:
        program, cache = opened.program, cached(opened)
        watched = WatchedProgram(program, cache)
        for at in range(N_TOKENS - 1):
            step(watched, model, at, 0)
        saved = program.save_sequence(0, N_TOKENS - 1)
        step(watched, model, 0, 0)
        heat = np.ones((len(program.n_slots), program.n_experts), np.float32)
        cache.fill(heat, wait=True)
        assert cache.table.ready.sum() == program.n_slots.sum()
        with pytest.raises(AssertionError, match="needs the memory of an expert that is published"):
            program.load_sequence(0, N_TOKENS - 1, saved)
        watched.load_sequence(0, N_TOKENS - 1, saved)
        assert same_bits(step(watched, model, N_TOKENS - 1, 0), expected[-1:])
        cache.close()


def test_slots_lie_in_the_ends_of_stretches(borrowing: Borrowing) -> None:
    """No two overlap; each is behind as many positions as it outlasts, in the keys or values of one sequence."""
    with borrowing.open() as opened:
        lowering, program, limits = opened.program._lowering, opened.program, opened.program.limits
        state_start, n_state_bytes = lowering.state
        taken = []
        for number, layer in enumerate(lowering.experts.layers):
            for slot in range(layer.n_kept, layer.n_kept + layer.n_in_contexts):
                start, end = layer.offsets[slot], layer.offsets[slot] + layer.expert_bytes
                assert state_start <= start < end <= state_start + n_state_bytes
                outlasts = max(n for n in range(limits.context_length) if program.usable_slots(1, n)[number, slot])
                taken.append((start, end, outlasts))
        taken.sort()
        assert all(end <= start for (_, end, _), (start, _, _) in pairwise(taken))
        for sequence in range(N_SEQUENCES):
            for n in sorted({n for _, _, n in taken}):
                for offset, n_bytes in used_parts(lowering.recorder.states, limits, sequence, n):
                    clear = all(end <= offset or start >= offset + n_bytes for start, end, m in taken if m >= n)
                    assert clear, f"{n} positions reach into a slot"


def test_guesses_beyond_a_boundary_leave_the_experts_there_alone(data: Path) -> None:
    """What guesses tokens keeps nothing where experts may lie, so nobody has made room for it."""
    limits, tokens = Limits(8, 1, 192, KVType.F32, max_drafts=3), np.arange(1, 193, dtype=np.int32)
    with ModelRunner(data / "peers" / "qwen35moe-mtp-Q8_0.gguf", max_drafts=3) as runner:
        graph, weights = runner.model.graph, runner.weights

        def guessed(program: CUDAProgram | CPUProgram, n: int) -> list[int]:
            """Three tokens after n, of which the last has to be one that was run alone."""
            for at in range(n):
                place = np.array([[at], [0]], np.int32)
                program.run(tokens[at : at + 1], *place, np.zeros(1, np.int32))
            return program.draft(0, int(tokens[n]), n, 3)

        def budget_with_slots_in_contexts() -> int:
            whole = int(measure(graph, limits).expert_bytes.sum()) * 16
            for budget in range(whole // 4, 4 * whole, whole // 16):
                with suppress(DeviceError), opened(budget) as program:
                    if (program.usable_slots(1, 1) & ~program.usable_slots(1, 192)).any():
                        return budget
            raise AssertionError

        @contextmanager
        def opened(budget: int) -> Iterator[CUDAProgram]:
            speeds = Bandwidths(ram=50e9, pcie=25e9, vram=1000e9)
            compiler = StandInCompiler()
            device = CUDADevice(compiler=compiler, vram_budget=budget, bandwidths=speeds, n_threads=2)
            with Resources() as held:
                held.own(device)
                yield held.own(device.compile(graph, weights, limits))

        with opened(budget_with_slots_in_contexts()) as program:
            n_usable = [int(program.usable_slots(1, n).sum()) for n in range(1, 193)]
            boundary = next(n for n, (now, then) in enumerate(pairwise(n_usable), 1) if then < now)
            for layer, usable in enumerate(program.usable_slots(1, boundary)):
                for expert, slot in enumerate(np.flatnonzero(usable).tolist()):
                    ticket = program.copy_expert(layer, expert, slot)
                    program.wait_all()
                    assert program.is_done(ticket)
                    program.publish(layer, expert, slot)
            found = guessed(program, boundary - 1)
            with pytest.raises(AssertionError, match="memory of an expert that is published"):
                program.run(tokens[:1], np.array([boundary], np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))
        cpu = CPUDevice(2).compile(graph, weights, limits)
        assert found == guessed(cpu, boundary - 1)
        cpu.close()
