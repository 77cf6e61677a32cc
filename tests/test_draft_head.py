"""Heads for multi-token prediction: what they guess is what llama.cpp's guess, on every device, and no text changes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cached_runner import MACHINE
from golden_files import HEADS
from golden_model import GoldenModel
from model_runner import ModelRunner, divergence
from reference_device import ReferenceProgram

from engine.__main__ import main
from engine.config import EngineConfig, EngineSettings, MoESettings, SamplingParams
from engine.devices.cpu import CPUDevice
from engine.devices.cpu.device import CPUProgram
from engine.devices.cuda import CUDADevice
from engine.devices.emulated import EmulatedDevice
from engine.devices.footprint import measure, row_tables
from engine.devices.graph import Attention, CarryOver, Experts, KVType, StoreKeys
from engine.devices.placement import Wish
from engine.devices.program import DraftingProgram, Limits
from engine.devices.timing import Bandwidths
from engine.errors import RequestError
from engine.generate.drafting import Drafter, DraftPolicy
from engine.models.binding import Keys
from engine.runtime import Engine
from tests.cusim import StandInCompiler, needs_emulator

CUTS = ((1,) * 28, (28,), (5, 8, 1, 2, 7, 3, 2), (27, 1))  # of the tokens before the chain
FILES = tuple(f"{name}-{kind}" for name in HEADS for kind in ("F32", "Q8_0"))
GOLDEN = "qwen35moe/qwen35moe-mtp-Q8_0"  # with a tokenizer
LIMITS = Limits(16, 2, 64, KVType.F32, max_drafts=7)


@contextlib.contextmanager
def open_head(data: Path, name: str) -> Iterator[GoldenModel]:
    path = data / "peers" / f"{name}.gguf"
    with np.load(path.with_suffix(".npz")) as z, ModelRunner(path, context_length=64, max_drafts=7) as runner:
        yield GoldenModel(path, dict(z), runner)


@pytest.fixture(scope="module", params=FILES)
def head(request: pytest.FixtureRequest, data: Path) -> Iterator[GoldenModel]:
    with open_head(data, request.param) as head:
        yield head


def run(program, tokens: list[int], start: int, slot: int = 0) -> np.ndarray:
    """Logits of tokens of a sequence, from position `start` on."""
    n = len(tokens)
    places = np.arange(start, start + n, dtype=np.int32)
    rows = np.arange(n, dtype=np.int32)
    return program.run(np.array(tokens, np.int32), places, np.full(n, slot, np.int32), rows).copy()


# -- what is guessed ---------------------------------------------------------------------------------------------------


def test_guesses_are_those_of_llama_cpp(head: GoldenModel) -> None:
    """Of every token that is about to be run, with all before it run one by one."""
    program, found = head.runner.program, []
    for i, token_id in enumerate(head.prompt):
        found.append(program.draft_logits(0, token_id, i).copy())
        run(program, [token_id], i)
    exact = head.reference["drafts_exact"]
    as_judged = {"logits_exact": exact, "tokens": head.reference["tokens"]}
    if "drafts" in head.reference:
        as_judged["logits"] = head.reference["drafts"]
    replace(head, reference=as_judged).check(exact, np.array(found))


@pytest.mark.parametrize("cuts", CUTS)
def test_a_chain_of_guesses_is_that_of_llama_cpp_however_a_prompt_is_cut(
    head: GoldenModel, cuts: tuple[int, ...]
) -> None:
    program, tokens, at = head.runner.program, head.prompt, 0
    for n in cuts:
        run(program, tokens[at : at + n], at, slot=0)
        at += n
    found = []
    for i, token_id in enumerate([tokens[at], *head.reference["chain_tokens"][:2]]):
        found.append(program.draft_logits(0, int(token_id), at + i).copy())
    if head.is_f32:
        assert np.abs(np.array(found) - head.reference["chain_exact"]).max() < 1e-4
        assert program.draft(0, tokens[at], at, 3) == head.reference["chain_tokens"].tolist()
    else:
        assert divergence(head.reference["chain_exact"], np.array(found)).max() < 0.02


def test_guesses_follow_the_formulas(head: GoldenModel) -> None:
    reference = ReferenceProgram(head.runner.model.graph, head.runner.weights)
    program, at = head.runner.program, 0
    for n in (3, 1, 4):
        token_id = head.prompt[at]
        for behind in range(3 if head.is_f32 else 1):  # with 8 bits other experts may be chosen sooner or later
            expected, found = reference.draft(token_id, behind), program.draft_logits(0, token_id, at + behind)
            assert np.abs(expected - found).max() < (1e-4 if head.is_f32 else 0.6)  # activations have 8 bits
            token_id = int(expected.argmax())
        reference.run(head.prompt[at : at + n])
        run(program, head.prompt[at : at + n], at)
        at += n


def test_logits_have_the_bits_that_they_have_without_a_head(head: GoldenModel) -> None:
    with ModelRunner(head.path, context_length=64) as plain:
        assert plain.model.graph.draft is None
        assert not plain.program.has_head
        expected = plain.logits(head.prompt)
    program, found = head.runner.program, []
    for i, token_id in enumerate(head.prompt):
        program.draft(0, token_id, i, 1 + i % 3)
        found.append(run(program, [token_id], i))
    assert (np.concatenate(found).view(np.uint32) == expected.view(np.uint32)).all()


def test_a_guess_after_wrong_drafts_is_that_without_them(head: GoldenModel) -> None:
    """Rows of the last tokens are found by their positions, wherever the sequence is cut back to."""
    program, tokens = head.runner.program, head.prompt
    wrong = [(token_id + 1) % head.runner.model.spec.n_vocab for token_id in tokens]
    run(program, tokens[:8], 0)
    expected = program.draft_logits(0, tokens[8], 8).copy()
    program.keep_states(0, 1)
    assert (program.draft_logits(0, tokens[8], 8) == expected).all()
    run(program, [tokens[8], *wrong[9:14]], 8)
    program.rewind_states(0)
    run(program, tokens[9:10], 9)
    after = program.draft_logits(0, tokens[10], 10).copy()
    run(program, tokens[:10], 0)
    assert (program.draft_logits(0, tokens[10], 10) == after).all()


def test_keys_in_a_window_go_around(data: Path) -> None:
    """MiMo's head sees few positions, so that its cache is a ring where a step is short, and none where it is long."""
    path, tokens = data / "peers" / "mimo2-mtp-F32.gguf", np.random.default_rng(0).integers(0, 128, 300).tolist()
    found = []
    for max_tokens in (16, 512):
        with ModelRunner(path, context_length=512, max_tokens=max_tokens, max_drafts=7) as runner:
            (cache,) = runner.model.graph.draft.kv_caches
            assert runner.forward.limits.is_ring(cache) == (max_tokens == 16)
            runner.logits(tokens)
            found.append([runner.program.draft_logits(0, 5, 300 + i).copy() for i in range(3)])
    assert (np.array(found[0]).view(np.uint32) == np.array(found[1]).view(np.uint32)).all()


def test_only_what_keys_are_made_of_is_computed_of_tokens_that_are_run(head: GoldenModel) -> None:
    graph = head.runner.model.graph
    assert graph.draft is not None
    (store,) = (op for op in graph.operations if isinstance(op, StoreKeys))
    (attention,) = (op for op in graph.draft.operations if isinstance(op, Attention))
    assert store.cache is attention.cache
    assert sum(isinstance(op, CarryOver) for op in graph.operations) == 1
    own = graph.operations[graph.operations.index(next(op for op in graph.operations if isinstance(op, CarryOver))) :]
    assert not any(isinstance(op, Experts | Attention) for op in own)
    widths = {"qwen35moe-mtp": 2}.get(head.path.stem.removesuffix("-F32"), 0)
    if widths:  # no queries and no gates: k and v alone
        (projection,) = (op for op in own if getattr(op, "outs", ())[:1] and store.v in op.outs)
        assert len(projection.outs) == widths


def test_of_several_blocks_the_first_guesses_one_token(head: GoldenModel) -> None:
    n_blocks = sum(name.endswith(".nextn.eh_proj.weight") for name in head.runner.file.tensors)
    assert (n_blocks > 1) == head.path.stem.startswith("step35")
    assert head.runner.forward.most_by_head == (1 if n_blocks > 1 else 7)
    with ModelRunner(head.path) as plain:
        assert plain.forward.most_by_head == 0


def test_a_step_that_does_not_fit_is_refused(head: GoldenModel) -> None:
    program = head.runner.program
    for slot, token_id, position in ((0, -1, 1), (0, head.runner.model.spec.n_vocab, 1), (0, 1, 64), (1, 1, 1)):
        with pytest.raises(RequestError):
            program.draft(slot, token_id, position, 1)


# -- devices -----------------------------------------------------------------------------------------------------------


def check_devices(head: GoldenModel, device, n_tokens: int = 14) -> DraftingProgram:
    """Two sequences on a device and on the CPU: the same guesses, and near logits."""
    graph, weights = head.runner.model.graph, head.runner.weights
    cpu, program = CPUDevice(2).compile(graph, weights, LIMITS), device.compile(graph, weights, LIMITS)
    assert program.has_head
    tokens = head.prompt[:n_tokens]
    for slot in (0, 1):
        at = 0
        for n in (5, 1, 2, 1, 3, 1, 1):
            assert program.draft(slot, tokens[at], at, 3) == cpu.draft(slot, tokens[at], at, 3)
            found, expected = (run(one, tokens[at : at + n], at, slot) for one in (program, cpu))
            assert np.abs(found - expected).max() < 1e-4
            at += n
    cpu.close()
    program.close()
    return program


def check_on_gpu(head: GoldenModel, hot_k: int | None) -> None:
    """Experts of the head have slots where all others have, and else none: then the CPU is asked for them."""
    settings = {"bandwidths": Bandwidths(ram=50e9, pcie=25e9, vram=1000e9), "n_threads": 2, "stream_n_tokens": 32}
    device = CUDADevice(compiler=StandInCompiler(), wish=Wish(hot_k), **settings)
    try:
        program = check_devices(head, device)
        has_experts = any(isinstance(op, Experts) for op in head.runner.model.graph.draft.operations)
        assert program._lowering.draft_asks_cpu == (has_experts and hot_k is not None)
    finally:
        device.close()


# Every head beside a cache; where all experts or none have slots, those of two.
PLACES = [*((f"{name}-F32", 3) for name in HEADS)]
PLACES += [(f"{name}-Q8_0", hot_k) for name in ("qwen35moe-mtp", "glm4moe-mtp") for hot_k in (0, None)]


@needs_emulator
@pytest.mark.parametrize(("name", "hot_k"), PLACES)
def test_the_gpu_guesses_as_the_cpu_does(name: str, hot_k: int | None, data: Path, driver) -> None:
    driver.set(order="random", copy_us=200)
    with open_head(data, name) as head:
        check_on_gpu(head, hot_k)


@needs_emulator
@pytest.mark.usefixtures("driver")
def test_where_the_experts_of_a_head_do_not_fit_beside_all_others_it_is_not_used(data: Path) -> None:
    with ModelRunner(data / "peers" / "glm4moe-mtp-F32.gguf", max_drafts=7) as runner:
        graph, weights = runner.model.graph, runner.weights
        settings = {"bandwidths": Bandwidths(ram=50e9, pcie=25e9, vram=1000e9), "n_threads": 2}

        def opened(budget: int | None) -> tuple[bool, int, bool]:
            device = CUDADevice(compiler=StandInCompiler(), vram_budget=budget, **settings)
            program = device.compile(graph, weights, LIMITS)
            found = program.has_head, program.device_bytes, bool((program.n_slots == program.n_experts).all())
            program.close()
            device.close()
            return found

        has_head, n_bytes, is_resident = opened(None)
        assert has_head
        assert is_resident
        assert opened(n_bytes + 4096)[0]
        has_head, fewer, is_resident = opened(n_bytes - 4096)
        assert is_resident
        assert not has_head
        assert fewer < n_bytes


def test_the_emulated_device_guesses_as_the_cpu_does_and_takes_time_for_it(head: GoldenModel) -> None:
    device = EmulatedDevice(MACHINE, wish=Wish(2 if head.runner.model.spec.moe.n_experts else None))
    check_devices(head, device)
    program = device.compile(head.runner.model.graph, head.runner.weights, LIMITS)
    before = program.now()
    program.draft(0, 1, 0, 2)
    assert program.now() > before
    program.close()


def test_a_head_is_planned_for(head: GoldenModel) -> None:
    graph = head.runner.model.graph
    with ModelRunner(head.path) as plain:
        without, found = (measure(g, LIMITS) for g in (plain.model.graph, graph))
        tables = {table.name for table in row_tables(graph)} - {table.name for table in row_tables(plain.model.graph)}
    own = f"blk.{head.runner.model.spec.draft_layer}.nextn.embed_tokens.weight"
    assert tables == ({own} if own in head.runner.model.tensor_names else set())
    assert found.dense_bytes > without.dense_bytes
    assert without.read_bytes < found.read_bytes < found.dense_bytes
    assert found.state_bytes > without.state_bytes
    assert found.recurrent_bytes == without.recurrent_bytes
    assert found.expert_total_bytes == without.expert_total_bytes
    assert set(head.runner.model.tensor_names) >= set(plain.model.tensor_names)


# -- texts -------------------------------------------------------------------------------------------------------------

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class Eager(DraftPolicy):
    """Always has the head guess."""

    def by_head(self, most: int):
        return super().by_head(most)._replace(n=min(most, 3), gain=9.0) if most else super().by_head(most)


@pytest.mark.parametrize("device", ["cpu", "emulated", pytest.param("cuda", marks=needs_emulator)])
def test_the_text_is_the_same(device: str, golden_path, request: pytest.FixtureRequest) -> None:
    if device == "cuda":
        request.getfixturevalue("driver").set(order="random", copy_us=200)
    n = 10 if device == "cuda" else 24
    config = EngineConfig(
        engine=EngineSettings(device=device, n_threads=2, context_length=64, max_batch_tokens=8),
        moe=MoESettings(hot_k=3 if device != "cpu" else "auto"),
    )
    sampled = replace(PARAMS, temperature=0.8, top_k=30, seed=5)
    with Engine.open(golden_path(f"{GOLDEN}.gguf"), config) as engine:
        assert engine._forward.most_by_head == 7
        policy, turns = engine.drafts, [PARAMS, sampled, replace(sampled, repetition_penalty=1.3, logprobs=2)]
        assert policy is not None
        for params in (replace(turn, max_tokens=n) for turn in turns):
            engine.drafts = None
            with engine.new_session() as session:
                expected = session.generate([5, 6, 7, 8], params)
            engine.drafts, before = Eager(7, loses_all=policy.loses_all), engine.statistics.n_drafts
            with engine.new_session() as session:
                found = session.generate([5, 6, 7, 8], params)
            assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
            assert engine.statistics.n_drafts > before


def test_a_head_is_asked_for_no_more_than_it_guesses(golden_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_head = Keys.with_head
    monkeypatch.setattr(Keys, "with_head", lambda *args: replace(with_head(*args), most_guesses=1))
    settings = EngineSettings(device="cpu", n_threads=2, context_length=64)
    asked: list[int] = []
    with Engine.open(golden_path(f"{GOLDEN}.gguf"), EngineConfig(engine=settings)) as engine:
        forward = engine._forward
        assert forward.most_by_head == 1
        draft = forward.draft
        monkeypatch.setattr(forward, "draft", lambda *args: (asked.append(args[-1]), draft(*args))[1])
        engine.drafts = Eager(7, loses_all=True)
        engine.generate([5, 6, 7, 8], PARAMS)
    assert len(asked) > 5
    assert set(asked) == {1}


def test_a_session_is_saved_without_what_heads_need(golden_path, tmp_path: Path) -> None:
    """So it can be opened whether or not tokens are drafted then."""
    path = golden_path(f"{GOLDEN}.gguf")

    def opened(max_drafts: int) -> Engine:
        settings = EngineSettings(device="cpu", n_threads=2, context_length=64, max_drafts=max_drafts)
        return Engine.open(path, EngineConfig(engine=settings))

    for first, second in ((7, 0), (0, 7)):
        with opened(first) as engine, engine.new_session() as session:
            session.generate([5, 6, 7, 8], PARAMS)
            session.save(tmp_path / "session")
        with opened(second) as engine, engine.load_session(tmp_path / "session") as session:
            prompt = [*session.token_ids, 9]
            found = session.generate(prompt, PARAMS).token_ids
        with opened(0) as engine:
            assert engine.generate(prompt, PARAMS).token_ids == found


def test_the_bench_asks_the_head(golden_path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On the emulated device it takes time, whatever becomes of what it says."""
    file, model = tmp_path / "drafts.json", str(golden_path(f"{GOLDEN}.gguf"))
    how = "--device", "emulated", "--prompt-tokens", "16", "--gen-tokens", "40", "--reps", "1", "-q"
    assert main(["bench", "-m", model, *how, "--drafts", "1,0", "--json", str(file)]) == 0
    assert "after the time that the model's own head takes" in capsys.readouterr().out
    _, right, wrong = json.loads(file.read_text())["rows"]
    assert right["guess_s"] > 0
    assert right["gain"] > 1.2
    assert wrong["gain"] < 1.05


# -- when --------------------------------------------------------------------------------------------------------------


def policy_with(more: float, right: float, guess_s: float, **settings) -> DraftPolicy:
    """A policy that knows what steps take, and how often a head's guesses come true."""
    policy, random = DraftPolicy(7, **settings), np.random.default_rng(0)
    for _ in range(40):
        for n_tokens in (1, 4):
            policy.note_step(n_tokens, 1 + more * (n_tokens - 1))
    for _ in range(8):
        policy.note_guess_time(1, guess_s)
    for _ in range(400):
        wrong = np.flatnonzero(random.random(7) >= right)
        n_right = int(wrong[0]) if len(wrong) else 7
        policy.note_guesses(min(n_right + 1, 7), n_right)
    return policy


def test_as_many_guesses_are_made_as_pay() -> None:
    assert policy_with(0.05, 0.95, 0.02).by_head(7).n >= 5
    assert policy_with(0.05, 0.95, 0.02).by_head(2).n == 2
    assert policy_with(0.4, 0.8, 0.05).by_head(7).n in {1, 2}
    assert policy_with(0.4, 0.3, 0.05).by_head(7).n == 0
    assert policy_with(0.05, 0.9, 2.0).by_head(7).n == 0  # a head that takes longer than a step
    assert policy_with(0.05, 0.95, 0.02).by_head(0).n == 0


def test_a_head_is_tried_before_it_is_judged_and_again_later() -> None:
    policy = DraftPolicy(7)
    assert policy.by_head(7).n == 0  # before a step was timed
    for _ in range(2):
        policy.note_step(1, 1.0)
    n_tried = 0
    while n := policy.by_head(7).n:
        assert n_tried >= 8 or n == (3, 1, 7, 7, 3, 1, 3, 1)[n_tried]
        policy.note_guess_time(n, 0.1 * n)
        policy.note_guesses(1, 0)
        n_tried += 1
    assert 8 <= n_tried < 20
    n_waited = 0
    while not policy.by_head(7).n:
        n_waited += 1
    assert 100 < n_waited <= 1000


@pytest.mark.parametrize("loses_all", [False, True])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize(("first", "more", "guess"), [(0.5, 0.15, 0.15), (0.1, 0.3, 0.1), (0.3, 0.9, 0.15)])
def test_a_head_is_asked_where_that_pays(
    first: float, more: float, guess: float, right: float, loses_all: bool
) -> None:
    """The first token more costs more than the others, the first step of each size twice as much as later ones.

    Three thousand tokens, against the best that always as many guesses could do.
    """

    def n_right_of(random: np.random.Generator, n: int) -> int:
        wrong = np.flatnonzero(random.random(n) >= right)
        return int(wrong[0]) if len(wrong) else n

    def seconds(choose, note) -> float:
        random, spent, n_made, again, seen = np.random.default_rng(3), 0.0, 0, 0, set()
        while n_made < 3000:
            n = choose() if not again else 0
            n_tokens, n_right = 1 + again + n, n_right_of(random, n)
            step = 1 + (n_tokens > 1) * first + more * (n_tokens - 1)
            step *= 1 if n_tokens in seen else 2
            seen.add(n_tokens)
            spent, n_made = spent + step + n * guess, n_made + 1 + n_right
            again = n_right if loses_all and n_right < n else 0
            note(n_tokens, step, n, n_right)
        return spent / n_made

    policy = DraftPolicy(7, loses_all=loses_all)

    def note(n_tokens: int, step: float, n: int, n_right: int) -> None:
        policy.note_step(n_tokens, step)
        if n:
            policy.note_guess_time(n, n * guess)
            policy.note_guesses(min(n_right + 1, n), n_right)

    found = seconds(lambda: policy.by_head(7).n, note)
    of_each = [seconds(lambda n=n: n, lambda *_: None) for n in range(8)]
    assert found <= 1.03 * of_each[0]
    assert found <= 1.2 * min(of_each)  # more guesses than were ever tried are not trusted


def test_what_promises_more_is_drafted() -> None:
    """Here a text that repeats itself, which is right more often and costs nothing; there the head."""
    asked: list[int] = []

    def head(n: int) -> tuple[list[int], float]:
        asked.append(n)
        return [100] * n, 0.01

    policy = policy_with(0.1, 0.6, 0.05)
    for _ in range(200):
        policy.note_drafts(9, 1, 1)
    drafter = Drafter(policy, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 2)
    assert drafter.propose([1, 2, 3], 4, head, 4) == [4, 5, 6, 7]
    assert not asked
    drafter = Drafter(policy, [1, 2, 3])
    found = drafter.propose([4], 4, head, 4)
    assert found == [100] * asked[-1]
    assert drafter.is_promising([4, 100], 4, 4)
    assert Drafter(policy, [1, 2, 3]).propose([4], 4) == []
    assert drafter.propose([4, 100], 4, head, 4)
    before = policy._guesses.share(0)
    assert len(drafter.propose([4, 100, 7], 4, head, 1)) == 1
    assert policy._guesses.share(0) < before  # it was wrong


def test_programs_say_whether_they_have_a_head(data: Path) -> None:
    with ModelRunner(data / "peers" / "qwen3-F32.gguf", max_drafts=7) as runner:
        assert isinstance(runner.program, CPUProgram)
        assert not runner.program.has_head
