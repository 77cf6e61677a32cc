"""The whole CUDA device on the stand-in driver: golden models, the promise, swaps, and what happens on failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import UnionType

import numpy as np
import pytest
from golden_files import PEERS, model_path
from model_runner import divergence

from engine import _kernels
from engine.devices.cpu import CPUDevice
from engine.devices.cuda import CUDADevice
from engine.devices.cuda.driver import probe
from engine.devices.cuda.program import CUDAProgram
from engine.devices.graph import Add, AddToStreams, Gating, Graph, KVType, MixResiduals, ScaleByPosition, Weight
from engine.devices.placement import Wish
from engine.devices.program import DRAW, NO_DRAW, Limits, Step
from engine.devices.timing import Bandwidths
from engine.errors import DeviceError, RequestError
from engine.generate.forward import ForwardPass
from engine.gguf.reader import GGUFFile
from engine.gguf.weights import WeightMemory
from engine.models import load_model
from engine.quants.formats import BY_NAME
from tests.cusim import StandInCompiler, needs_emulator

pytestmark = [needs_emulator, pytest.mark.usefixtures("driver")]

SMALL = "qwen3moe/qwen3moe-micro-Q8_0.gguf"
LIMITS = Limits(max_tokens=8, n_slots=2, context_length=64, kv_type=KVType.F32)
N_TOKENS = 6
SPEEDS = Bandwidths(ram=50e9, pcie=25e9, vram=1000e9)


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
    """The model on the CUDA device, with the hottest experts of nobody in its slots: the first ones."""

    def __init__(self, model: Model, limits: Limits = LIMITS, hot_k: int | None = None, **settings) -> None:
        self.model = model
        settings = {"bandwidths": SPEEDS, "n_threads": 2, "stream_n_tokens": 32} | settings
        self.device = CUDADevice(compiler=StandInCompiler(), wish=Wish(hot_k), **settings)
        try:
            self.program: CUDAProgram = self.device.compile(model.model.graph, model.weights, limits)
        except BaseException:
            self.device.close()
            raise
        self.forward = ForwardPass(self.program, limits, model.n_vocab)
        for layer, n_slots in enumerate(self.program.n_slots.tolist()):
            for slot in range(n_slots):
                self.copy(layer, slot, slot)

    def copy(self, layer: int, expert: int, slot: int) -> None:
        ticket = self.program.copy_expert(layer, expert, slot)
        self.program.wait_all()
        assert self.program.is_done(ticket)
        self.program.publish(layer, expert, slot)

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


@pytest.fixture(scope="module")
def small(golden_path) -> Iterator[Model]:
    model = Model(golden_path(SMALL))
    yield model
    model.close()


@pytest.mark.parametrize(
    "name",
    [
        "qwen35moe/qwen35moe-micro-F32",
        "qwen35moe/qwen35moe-fusedgu-Q8_0",
        "qwen35moe/qwen35moe-wide-IQ4_XS",
        "qwen3moe/qwen3moe-tied-BF16",
        "qwen3moe/qwen3moe-wide-Q4_K_M",
        "deepseek2/deepseek2-v2lite-micro-Q8_0",
        "deepseek2/deepseek2-v3-micro-F32",
        "glm4moe/glm4moe-micro-F32",
        "gpt-oss/gpt-oss-micro-F32",
        "gpt-oss/gpt-oss-micro-MXFP4",
        "llama-moe/mixtral-micro-F32",
        "olmoe/olmoe-wide-Q6_K",
        "qwen2moe/qwen2moe-micro-F32",
        "qwen3next/qwen3next-wide-Q4_K_M",
    ],
)
def test_golden_models(name: str, golden_path) -> None:
    check_logits(golden_path(f"{name}.npz"))


@pytest.mark.parametrize("name", PEERS)
def test_peers(name: str, data: Path) -> None:
    check_logits(data / "peers" / f"{name}-F32.npz")


@pytest.mark.parametrize(
    "name",
    [
        "deepseek32",
        "deepseek4",
        "dots3note",
        "glm-dsa",
        "glm5-next",
        "hy_v4",
        "minimax-m3",
        "qwen4exp",
        "qwen4exp-single",
    ],
)
def test_peers_that_choose_what_attention_looks_at(name: str, data: Path) -> None:
    """Of more tokens than are chosen; the Q8_0 file's keys are stored in float16."""
    for kind, kv_type in (("F32", KVType.F32), ("Q8_0", KVType.F16)):
        references = data / "peers" / f"{name}-{kind}.npz"
        reference, model = np.load(references), Model(references.with_suffix(".gguf"))
        tokens, exact = reference["tokens"].tolist(), reference["logits_exact"]
        with model.open(limits=replace(LIMITS, kv_type=kv_type), hot_k=3) as opened:
            cuts = [0, 8, 16, 24, 25]
            parts = [opened.forward.run(0, tokens[i:j], i, "all").copy() for i, j in pairwise(cuts)]
            saved = opened.program.save_sequence(0, 25)  # before it goes on: states cannot be cut back
            parts += [opened.forward.run(0, [tokens[i]], i, "all").copy() for i in range(25, len(tokens))]
            logits = np.concatenate(parts)
            opened.program.load_sequence(1, 25, saved)
            for i in range(25, len(tokens)):
                assert (opened.forward.run(1, [tokens[i]], i, "all") == logits[i]).all()
        kl = divergence(exact, logits)
        noise = divergence(exact, reference["logits"]) if "logits" in reference else np.zeros(1)
        assert kl.mean() <= max(2 * noise.mean(), 1e-9)
        assert kl.max() <= max(4 * noise.max(), 1e-8)
        model.close()


@pytest.mark.parametrize("name", ["gemma4", "deepseek4"])
def test_rings_have_the_bits_of_a_whole_context(name: str, data: Path) -> None:
    """In steps of many tokens and of few; a sequence that is saved comes back to either, and so do states."""
    model, n_saved, n_tokens = Model(data / "peers" / f"{name}-F32.gguf"), 270, 276
    tokens = np.random.default_rng(3).integers(0, model.n_vocab, n_tokens).tolist()
    found, saved = [], []
    for max_tokens in (300, 54):
        limits = Limits(max_tokens, 2, 300, KVType.F16)
        with model.open(limits=limits, hot_k=3, prompt_tokens=max_tokens) as opened:
            caches = [cache for cache in model.model.graph.kv_caches if cache.window]
            assert {opened.program.limits.is_ring(cache) for cache in caches} == {max_tokens == 54}
            opened.forward.run(1, tokens[:n_saved], 0, "none")
            saved.append(opened.program.save_sequence(1, n_saved))
            states = opened.program.save_states(1, n_saved)

            def rest(slot: int, cuts: tuple[int, ...], opened: Opened = opened) -> np.ndarray:
                ends = [n_saved, *cuts, n_tokens]
                parts = [opened.forward.run(slot, tokens[i:j], i, "all").copy() for i, j in pairwise(ends)]
                return np.concatenate(parts)

            found += [rest(1, (271, 274))]
            opened.program.load_states(1, n_saved, states)
            found += [rest(1, ())]
            opened.program.load_sequence(0, n_saved, saved[0])
            found += [rest(0, (272,))]
    model.close()
    assert np.array_equal(*saved)
    assert all((logits.view(np.uint32) == found[0].view(np.uint32)).all() for logits in found)


@pytest.mark.parametrize(("name", "kinds"), [("hy_v4", AddToStreams), ("kimi-k3", Add | MixResiduals)])
def test_residuals_that_are_added_to_by_a_launch_of_its_own_have_the_same_bits(
    name: str, kinds: type | UnionType, data: Path
) -> None:
    """Something stands between, which changes nothing."""
    model = Model(data / "peers" / f"{name}-F32.gguf")
    graph, found = model.model.graph, []
    for is_split in (False, True):
        if is_split:
            graph.operations = [
                item
                for op in graph.operations
                for item in ((op, ScaleByPosition(op.out, 0, 1, 0.0)) if isinstance(op, kinds) else (op,))
            ]
        with model.open(hot_k=3) as opened:
            found.append(opened.logits())
    model.close()
    assert (found[0] == found[1]).all()


def check_logits(references: Path) -> None:
    """As near to the exact logits as the golden files ask, and as the CPU device is."""
    reference, model = np.load(references), Model(model_path(references))
    model.tokens = reference["tokens"][:N_TOKENS].tolist()
    exact = reference["logits_exact"][:N_TOKENS] if "logits_exact" in reference else None
    has_experts = bool(model.model.spec.moe.n_experts)
    with model.open(hot_k=3 if has_experts else None) as opened:
        logits, routing = opened.logits(), opened.program.routing()
    if exact is not None:
        kl = divergence(exact, logits)
        if "logits" in reference:
            noise = divergence(exact, reference["logits"][:N_TOKENS])
            assert kl.mean() <= max(2 * noise.mean(), 3e-5)
            assert kl.max() <= max(4 * noise.max(), 1e-4)
        else:
            assert kl.mean() <= 1e-9
    cpu = CPUDevice(2).compile(model.model.graph, model.weights, LIMITS)
    expected = ForwardPass(cpu, LIMITS, model.n_vocab).run(0, model.tokens, 0, "all")
    # A difference in the last bit of a sum can turn one rounding of an activation, which then shows in later tokens.
    assert divergence(expected, logits)[0] <= 1e-5
    assert not has_experts or (np.sort(routing) == np.sort(cpu.routing())).mean() > 0.9
    cpu.close()
    model.close()


@pytest.mark.parametrize("kv_type", KVType)
def test_slots_and_cuts_never_change_a_bit(kv_type: KVType, small: Model) -> None:
    limits = Limits(8, 2, 64, kv_type)
    with small.open(limits=limits) as opened:
        expected = opened.logits()
        assert opened.program.n_slots.min() == opened.program.n_experts
        for cut in (1, 3):
            assert (opened.logits(cut, slot=1).view(np.uint32) == expected.view(np.uint32)).all()
    for n_slots in (0, 1, 3):
        with small.open(limits=limits, hot_k=n_slots) as opened:
            assert (opened.program.n_slots == n_slots).all()
            for cut in (4, 1):
                assert (opened.logits(cut).view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize(
    "settings", [{}, {"copy_us": 3000}, {"jitter_us": 300}, {"order": "random"}, {"order": "reverse"}], ids=str
)
def test_swaps_never_change_a_bit(settings: dict, small: Model, driver) -> None:
    """Slots change hands all the time, by the rules: unpublish, copy, publish."""
    with small.open() as opened:
        expected = opened.logits()
    driver.set(**settings)
    rng, n_published = np.random.default_rng(1), 0
    with small.open(hot_k=3) as opened:
        program, under_way = opened.program, {}
        held = {(layer, slot): slot for layer in range(len(program.n_slots)) for slot in range(3)}

        def swap() -> None:
            nonlocal n_published
            for place, (expert, ticket) in list(under_way.items()):
                if program.is_done(ticket):
                    program.publish(place[0], expert, place[1])
                    held[place] = expert
                    del under_way[place]
                    n_published += 1
            for _ in range(3):
                place = (int(rng.integers(len(program.n_slots))), int(rng.integers(3)))
                busy = {held.get((place[0], slot), -1) for slot in range(3)}
                busy |= {expert for (layer, _), (expert, _) in under_way.items() if layer == place[0]}
                if place not in under_way:
                    program.publish(place[0], held.pop(place), -1)
                    cold = [e for e in range(program.n_experts) if e not in busy]
                    expert = int(rng.choice(cold))
                    under_way[place] = (expert, program.copy_expert(place[0], expert, place[1]))

        for _ in range(2):
            assert (opened.logits(1, between=swap).view(np.uint32) == expected.view(np.uint32)).all()
        program.wait_all()
    assert n_published > 0


@pytest.mark.parametrize("settings", [{"jitter_us": 300}, {"copy_us": 1000}, {"order": "random"}], ids=str)
def test_slots_may_be_overwritten_while_a_step_runs_that_has_passed_their_layer(
    settings: dict, small: Model, driver
) -> None:
    """A thread swaps all the time, by the rules: unpublish, wait for the fence, copy, publish."""
    with small.open() as opened:
        expected = opened.logits()
    driver.set(**settings)
    rng, stop = np.random.default_rng(2), threading.Event()
    with small.open(hot_k=3) as opened, ThreadPoolExecutor(1) as pool:
        program, held = opened.program, [[0, 1, 2] for _ in opened.program.n_slots]

        def wait_for(ticket: object) -> None:
            while not program.is_done(ticket):
                time.sleep(1e-5)

        def swap() -> int:
            n_early = 0
            while not stop.is_set():
                layer, slot = int(rng.integers(len(held))), int(rng.integers(3))
                program.publish(layer, held[layer][slot], -1)
                fence = program.fence(layer)
                wait_for(fence)
                n_early += fence.step > program._n_over
                expert = int(rng.choice([e for e in range(program.n_experts) if e not in held[layer]]))
                wait_for(program.copy_expert(layer, expert, slot))
                program.publish(layer, expert, slot)
                held[layer][slot] = expert
            return n_early

        swapping = pool.submit(swap)
        try:
            found = [opened.logits(1).view(np.uint32) for _ in range(3)]
        finally:
            stop.set()
        assert swapping.result() > 0
        assert all((bits == expected.view(np.uint32)).all() for bits in found)


def test_a_fence_is_passed_with_its_layer(small: Model) -> None:
    """As soon as a later layer asks the CPU, or the step is over; numbers of earlier steps say nothing."""
    with small.open(hot_k=3) as opened:
        program, n_layers = opened.program, len(opened.program.n_slots)
        misses, first = program._misses, opened.logits(1)
        assert misses is not None
        assert all(program.is_done(program.fence(layer)) for layer in range(n_layers))
        program._n_begun = 1 << 31  # of which the GPU's count is 0
        fences = [program.fence(layer) for layer in range(n_layers)]
        assert not any(program.is_done(fence) for fence in fences)
        for asking in range(n_layers + 1):
            misses._requested[0] = 1 + asking
            assert [program.is_done(fence) for fence in fences] == [layer < asking for layer in range(n_layers)]
        for other in (0, n_layers + 2, 1 << 31):
            misses._requested[0] = other
            assert not any(program.is_done(fence) for fence in fences)
        program._n_over = program._n_begun
        assert all(program.is_done(fence) for fence in fences)
        assert (opened.logits(1).view(np.uint32) == first.view(np.uint32)).all()


def test_before_the_output_head_the_step_needs_the_cpu_no_more(small: Model) -> None:
    with small.open(hot_k=3) as opened:
        program, n_layers = opened.program, len(opened.program.n_slots)
        assert program._misses is not None
        launches = program._lowering.launches(0, 1, program._misses.exchange(0))
        end = next(i for i, launch in enumerate(launches) if launch.kernel == "publish_end")
        assert [launch.source for launch in launches[end + 1 :]] == ["elementwise.cu", "residual.cu", "linear.cu"]
        step = Step(*(np.array([value], np.int32) for value in (small.tokens[0], 0, 0, 0)), None)
        expected = program.run(*step.inputs).copy()
        for _ in range(4):
            begin(program, step)
            fences = [program.fence(layer) for layer in range(n_layers)]
            program.finish_layers()
            assert all(program.is_done(fence) for fence in fences)
            assert (program.collect()[1].view(np.uint32) == expected.view(np.uint32)).all()


def test_more_copies_than_buffers(small: Model) -> None:
    """They wait in a queue; a layer whose experts are all on the device needs none."""
    with small.open(hot_k=5) as opened:
        program = opened.program
        tickets = [
            program.copy_expert(layer, 7 - slot, slot) for layer in range(len(program.n_slots)) for slot in range(5)
        ]
        assert len(tickets) > 8
        program.wait_all()
        assert all(program.is_done(ticket) for ticket in tickets)
    with small.open() as opened:
        assert opened.program.is_done(opened.program.copy_expert(0, 3, 5))
        expected = opened.logits()
        opened.program.publish(0, 3, -1)
        assert (opened.logits().view(np.uint32) == expected.view(np.uint32)).all()


def test_a_copy_that_fails_is_an_error(small: Model, driver) -> None:
    with small.open(hot_k=2) as opened:
        driver.fail("cuMemcpyHtoDAsync", 1, "CUDA_ERROR_UNKNOWN")
        ticket = opened.program.copy_expert(0, 5, 1)
        opened.program.wait_all()
        with pytest.raises(DeviceError, match="cuMemcpyHtoDAsync failed"):
            opened.program.is_done(ticket)


def test_two_sequences_in_one_step(small: Model) -> None:
    """Interleaved in one program, each as if it were alone."""
    tokens, half = np.array(small.tokens, np.int32), N_TOKENS // 2
    with small.open(hot_k=3) as opened:
        alone = opened.forward.run(0, tokens[:half], 0, "all").copy()
        other = opened.forward.run(1, tokens[half : half + 3], 0, "all").copy()
        positions = np.array([*range(half), *range(3)], np.int32)
        slots = np.array([1] * half + [0] * 3, np.int32)
        rows = np.arange(half + 3, dtype=np.int32)
        both = opened.program.run(np.concatenate([tokens[:half], tokens[half : half + 3]]), positions, slots, rows)
        assert (both[:half].view(np.uint32) == alone.view(np.uint32)).all()
        assert (both[half:].view(np.uint32) == other.view(np.uint32)).all()
        more, at = tokens[:2], np.array([half, 3], np.int32)
        pair = opened.program.run(more, at, np.array([1, 0], np.int32), np.array([0, 1], np.int32)).copy()
        whole = np.append(tokens[:half], more[0]), np.append(tokens[half : half + 3], more[1])
        ends = [opened.forward.run(0, part, 0).copy() for part in whole]
        assert (pair.view(np.uint32) == np.concatenate(ends).view(np.uint32)).all()


@pytest.mark.parametrize("hot_k", [None, 2])
def test_steps_are_launched_for_hardly_more_tokens_than_they_have(small: Model, monkeypatch, hot_k) -> None:
    """Also where all experts have a slot: blocks of tokens that are not there take their time."""
    monkeypatch.setattr("engine.devices.footprint.LEAST_LONG_STEP", 8)
    limits = replace(LIMITS, max_tokens=20, context_length=48, n_slots=1)
    with small.open(limits=limits, hot_k=hot_k, prompt_tokens=100, stream_n_tokens=18) as opened:
        assert opened.program.limits.max_tokens == 48
        assert all(opened.program._steps.size_for(n) <= 2 * n for n in range(1, 49))


def test_the_last_row_of_a_table_that_fills_its_pages_is_read_in_ram(golden_path, monkeypatch) -> None:
    """Kernels read whole words, which reach beyond it: on a GPU what lies there must be pinned, too."""
    model = Model(golden_path("qwen35moe/qwen35moe-fusedgu-Q8_0.gguf"))
    assert model.weights.array("token_embd.weight").nbytes % 4096 == 0
    last, found = model.n_vocab - 1, []
    for mode, free in (("mmap", 0), ("memory", 0), ("mmap", 1 << 30)):  # in VRAM, in our own memory, in a copy
        monkeypatch.setattr("engine.devices.cuda.host_memory.available_memory", lambda free=free: free)
        model.weights.close()
        model.weights = WeightMemory.load(model.file, model.model.tensor_names, mode)
        with model.open(hot_k=2) as opened:
            found.append(opened.forward.run(0, [last, 0, last], 0, "all").copy())
    model.close()
    for other in found[1:]:
        assert (other.view(np.uint32) == found[0].view(np.uint32)).all()


@pytest.mark.parametrize("stream_n_tokens", [32, 4])
def test_tokens_are_drawn_as_the_cpu_draws_them(stream_n_tokens: int, small: Model) -> None:
    """One row and two, of short and long steps; where one cannot be drawn all logits come along."""
    nothing, allowed = np.zeros(0, np.int32), np.ones(small.n_vocab, np.bool_)
    tokens, positions = np.array(small.tokens, np.int32), np.arange(N_TOKENS, dtype=np.int32)
    slots, last = np.zeros(N_TOKENS, np.int32), np.array([N_TOKENS - 1], np.int32)
    with small.open(hot_k=3, stream_n_tokens=stream_n_tokens) as opened:
        program = opened.program

        def drawn(logits: np.ndarray, draw: tuple[float, float, float, float, int]) -> int:
            uniform, top_p, min_p, inverse, top_k = draw
            kept = np.where(allowed, logits, -np.inf).astype(np.float32)
            return _kernels.sample(kept, nothing, 1 / inverse, top_k, top_p, min_p, 1.0, 0.0, 0.0, uniform)

        logits = program.run(tokens, positions, slots, last)[0].copy()
        draws = [(0.0, 1.0, 0.0, 1.0, 1), (0.8, 0.9, 0.0, 0.5, 40), (0.4, 1.0, 0.1, 2.0, 0)]
        for _ in range(2):
            for draw in draws:
                found, rest = program.run_and_draw(tokens, positions, slots, last, np.array([draw], DRAW))
                assert found.tolist() == [drawn(logits, draw)]
                assert rest is None
            allowed[logits.argmax()] = False
            program.allow(allowed)
        for draw in ((0.5, 1.0, 0.0, 1.0, 1000), (0.0, 1.0, 0.0, 1.0, NO_DRAW)):
            found, rest = program.run_and_draw(tokens, positions, slots, last, np.array([draw], DRAW))
            assert found.tolist() == [-1]
            assert rest is not None
            assert (rest[0].view(np.uint32) == logits.view(np.uint32)).all()

        both = np.array([1, 5], np.int32), np.array([N_TOKENS, 0], np.int32), np.array([0, 1], np.int32)
        two = program.run(*both, np.array([0, 1], np.int32)).copy()
        program.run(tokens, positions, slots, last)
        for pair in ((draws[1], draws[2]), (draws[0], (0.0, 1.0, 0.0, 1.0, NO_DRAW))):
            found, rest = program.run_and_draw(*both, np.array([0, 1], np.int32), np.array(list(pair), DRAW))
            expected = [drawn(row, draw) if draw[4] >= 0 else -1 for row, draw in zip(two, pair, strict=True)]
            assert found.tolist() == expected
            assert (rest is None) == (min(expected) >= 0)


GREEDY, SAMPLED = (0.0, 1.0, 0.0, 1.0, 1), (0.7, 0.9, 0.0, 0.8, 40)


def a_step(token_ids: Sequence[int], position: int, draw: tuple[float, float, float, float, int] | None) -> Step:
    """Return a step of as many sequences, each with a token at that place."""
    n = len(token_ids)
    arrays = (np.array(v, np.int32) for v in (token_ids, [position] * n, range(n), range(n)))
    return Step(*arrays, None if draw is None else np.array([draw] * n, DRAW))


def begin(program: CUDAProgram, step: Step) -> None:
    program.prepare(step)
    program.launch()


def end(program: CUDAProgram, then: Step | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Finish the step under way, with another one behind it."""
    if then is not None:
        begin(program, then)
    program.finish_layers()
    return program.collect()


@pytest.fixture(scope="module", params=[SMALL, "qwen35moe/qwen35moe-fusedgu-Q8_0.gguf", "qwen4exp-F32.gguf"])
def either(request, golden_path, data: Path) -> Iterator[Model]:
    """With recurrent states and without, one of which is made of the tokens themselves."""
    model = Model(golden_path(request.param) if "/" in request.param else data / "peers" / request.param)
    yield model
    model.close()


@pytest.mark.parametrize("hot_k", [None, 3, 0])
@pytest.mark.parametrize(("first", "order"), [([5], "reverse"), ([5, 9], "random")])
def test_steps_that_are_begun_ahead_give_the_same_bits(
    first: list[int], order: str, hot_k: int | None, either: Model, driver
) -> None:
    """With tokens that the host has not seen; slots change hands meanwhile."""
    rng = np.random.default_rng(0)
    driver.set(order=order, copy_us=100)
    with either.open(hot_k=hot_k, stream_n_tokens=8) as opened:
        program, tokens, draws = (
            opened.program,
            [first],
            [GREEDY, SAMPLED, GREEDY, GREEDY, SAMPLED, SAMPLED, GREEDY],
        )
        for position, draw in enumerate(draws):
            step = a_step(tokens[-1], position, draw)
            found, logits = program.run_and_draw(*step.inputs, step.draws)
            assert logits is None
            tokens.append(found.tolist())
        expected = program.run(*a_step(tokens[-1], len(draws), None).inputs).copy()

        unknown = [-1 - i for i in range(len(first))]
        begin(program, a_step(first, 0, draws[0]))
        for position, draw in enumerate([*draws[1:], None], 1):
            found, _ = end(program, a_step(unknown, position, draw))
            assert found.tolist() == tokens[position]
            if 0 < program.n_slots[0] < program.n_experts and rng.random() < 0.7:
                layer, expert = rng.integers(len(program.n_slots)), rng.integers(program.n_experts)
                program.publish(layer, int(expert), -1)
        _, logits = end(program)
        assert logits is not None
        assert (logits.view(np.uint32) == expected.view(np.uint32)).all()


def test_a_token_that_could_not_be_drawn_is_told_with_the_step_behind_it(small: Model) -> None:
    with small.open(hot_k=3) as opened:
        program, expected = opened.program, opened.logits()
        program.allow(np.zeros(small.n_vocab, np.bool_))
        begin(program, a_step([5], 0, SAMPLED))
        found, logits = end(program, a_step([-1], 1, SAMPLED))
        assert (found.tolist(), logits) == ([-1], None)
        found, logits = end(program)
        assert found.tolist() == [-1]
        assert logits is not None  # of a token that does not exist
        assert (opened.logits().view(np.uint32) == expected.view(np.uint32)).all()


def test_steps_under_way_can_be_dropped(small: Model, monkeypatch) -> None:
    """At will, with a step behind them that does not fit, after a failure of the CPU's, and when all is closed."""
    monkeypatch.setattr("engine.devices.cuda.misses._TIMEOUT_S", 0.2)
    with small.open(hot_k=1) as opened:
        program, expected = opened.program, opened.logits()

        def check() -> None:
            assert not program._under_way
            assert program._n_over == program._n_begun
            assert (opened.logits().view(np.uint32) == expected.view(np.uint32)).all()

        program.drop()
        check()
        for n in (1, 2):
            for needs_the_cpu in (False, True):
                begin(program, a_step([5], 0, GREEDY))
                if not needs_the_cpu:
                    program.finish_layers()
                if n == 2:
                    begin(program, a_step([-1], 1, GREEDY))
                program.drop()
                check()
        for wrong in (a_step([-2], 1, GREEDY), a_step([-1], 64, GREEDY)):
            begin(program, a_step([5], 0, GREEDY))
            with pytest.raises(RequestError):
                end(program, wrong)
            check()
        with pytest.raises(RequestError, match="token id -1 is not in the range 0 to"):
            begin(program, a_step([-1], 0, GREEDY))
        check()

        class Failing:
            seconds = np.zeros(1)

            def run(self, *_: object) -> None:
                raise MemoryError("no memory for this")

        begin(program, a_step([5], 0, GREEDY))
        with monkeypatch.context() as patch:
            program.finish_layers()
            patch.setattr(program._misses, "_server", Failing())
            begin(program, a_step([-1], 1, GREEDY))
            assert program.collect()[0].tolist() >= [0]
            with pytest.raises(DeviceError, match="no memory for this"):
                end(program)
        check()
        with monkeypatch.context() as patch:
            patch.setattr(program._misses, "_server", Failing())
            begin(program, a_step([5], 0, GREEDY))
            begin(program, a_step([-1], 1, GREEDY))
            with pytest.raises(DeviceError, match="no memory for this"):
                end(program)
        check()
        begin(program, a_step([5], 0, GREEDY))
        begin(program, a_step([-1], 1, GREEDY))


def test_what_the_device_gives_up_on_comes_with_all_logits(small: Model) -> None:
    step = [np.array(values, np.int32) for values in ([1], [0], [0], [0])]
    with small.open(hot_k=3) as opened:
        logits = opened.program.run(*step)[0].copy()
        opened.program.allow(np.zeros(small.n_vocab, np.bool_))  # so that there is nothing to draw
        found, rest = opened.program.run_and_draw(*step, np.array([(0.5, 0.9, 0.0, 1.0, 40)], DRAW))
        assert found.tolist() == [-1]
        assert rest is not None
        assert (rest[0].view(np.uint32) == logits.view(np.uint32)).all()


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_of_the_cpus_share_is_an_error_and_the_device_goes_on(small: Model, monkeypatch) -> None:
    with small.open(hot_k=1) as opened:
        expected = opened.logits()

        class Failing:
            seconds = np.zeros(1)

            def run(self, *_: object) -> None:
                raise MemoryError("no memory for this")

        with monkeypatch.context() as patch:
            patch.setattr(opened.program._misses, "_server", Failing())
            with pytest.raises(DeviceError, match="no memory for this"):
                opened.logits()
        assert (opened.logits().view(np.uint32) == expected.view(np.uint32)).all()


def test_a_gpu_that_asks_nothing_ends_in_an_error(small: Model, monkeypatch) -> None:
    """The watchdog: here the step's graph is simply not launched."""
    monkeypatch.setattr("engine.devices.cuda.misses._TIMEOUT_S", 0.2)
    with small.open(hot_k=1) as opened:
        monkeypatch.setattr("engine.devices.cuda.runtime.Graph.launch", lambda *_: None)
        with pytest.raises(DeviceError, match=r"made no request for .*the last was"):
            opened.logits()


@pytest.mark.parametrize("event", ["kernel", "cuGraphLaunch"])
def test_a_failing_launch_is_an_error_and_frees_everything(event: str, small: Model, driver) -> None:
    opened = small.open(hot_k=1)
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
        assert 0 < opened.program.n_slots.max() < opened.program.n_experts
        assert opened.program.device_bytes <= all_bytes - 40_000
        assert (opened.logits().view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("dim", [20, 584])
def test_heads_that_no_kernel_takes_are_a_clear_error(dim: int) -> None:
    graph = Graph()
    q, k, v = (graph.embed(Weight("w", BY_NAME["F32"], 4, 2 * dim)) for _ in range(3))
    graph.logits = graph.attention(q, k, v, 2, 2, 1.0)
    device = CUDADevice(compiler=StandInCompiler(), bandwidths=SPEEDS)
    with pytest.raises(DeviceError, match=rf"keys of {dim} values; .* multiple of 8, at most 576"):
        device.compile(graph, WeightMemory({"w": np.zeros(32 * dim, np.uint8)}, "memory"), LIMITS)
    device.close()


@pytest.mark.parametrize("gating", [None, Gating.SILU])
@pytest.mark.parametrize("width", [36, 41])
def test_widths_that_no_kernel_takes_are_a_clear_error(width: int, gating: Gating | None) -> None:
    graph = Graph()
    x, y = (graph.embed(Weight("w", BY_NAME["F32"], 4, width)) for _ in range(2))
    graph.logits = graph.add(x, y) if gating is None else graph.gate(x, y, gating)
    device = CUDADevice(compiler=StandInCompiler(), bandwidths=SPEEDS)
    with pytest.raises(DeviceError, match=rf"rows of {width} values; .* multiple of 8; set .* \"cpu\""):
        device.compile(graph, WeightMemory({"w": np.zeros(16 * width, np.uint8)}, "memory"), LIMITS)
    device.close()


def test_too_little_memory_is_a_clear_error(small: Model) -> None:
    with pytest.raises(DeviceError, match=r"needs .* GB of VRAM .* may be used"):
        small.open(hot_k=2, vram_budget=50_000)


def test_a_failing_allocation_frees_everything(small: Model, driver) -> None:
    driver.fail("cuMemHostAlloc", 2, "CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(
        DeviceError, match=r"cuMemHostAlloc failed: CUDA_ERROR_OUT_OF_MEMORY .*; use fewer expert slots"
    ):
        small.open(hot_k=1)


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
    with small.open(hot_k=0) as opened, pytest.raises(RequestError, match=message):
        opened.program.run(*(np.array(values, np.int32) for values in step))


def test_rows_too_long_for_a_gpu_are_an_error_that_says_so(small: Model, driver, monkeypatch) -> None:
    little = replace(probe(), shared_bytes=1 << 10)
    monkeypatch.setattr("engine.devices.cuda.device.probe", lambda index: little)
    with pytest.raises(DeviceError, match=r"rows .* are too long for .* KB of shared memory, and there are 1; use a"):
        small.open()
