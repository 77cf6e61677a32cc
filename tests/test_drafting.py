"""Tokens that are guessed and checked together: the same text on every device, and only where that is faster."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from golden_files import PEERS, model_path
from hypothesis import given
from hypothesis import strategies as st
from interrupter import Interrupter
from model_runner import ModelRunner
from small_engines import PROMPTS, open_engine

from engine.__main__ import main
from engine.bench.rehearsal import Rehearsal
from engine.config import EngineConfig, EngineSettings, MoESettings, SamplingParams
from engine.devices.cuda import CUDADevice
from engine.devices.program import RewindingProgram
from engine.devices.timing import Bandwidths
from engine.errors import RequestError
from engine.generate import leases, scheduler
from engine.generate.answer import Completion
from engine.generate.drafting import Drafter, DraftPolicy, Lookup, StepTimes
from engine.generate.forward import ForwardPass
from engine.runtime import Engine
from tests.cusim import StandInCompiler, needs_emulator

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = replace(PARAMS, temperature=0.9, top_k=40, seed=3)
PENALISED = replace(SAMPLED, repetition_penalty=1.3, logprobs=2)


# -- what is drafted --------------------------------------------------------------------------------------------------


def longest_match(ids: Sequence[int]) -> tuple[int, int]:
    """The rule, said as plainly as possible: among the last eight places where three tokens are the same."""
    places = [i for i in range(2, len(ids) - 1) if list(ids[i - 2 : i + 1]) == list(ids[-3:])][-8:]

    def n_same(place: int) -> int:
        n = 0
        while n < 17 and n <= place and ids[place - n] == ids[len(ids) - 1 - n]:
            n += 1
        return n

    best = max(places, key=lambda place: (n_same(place), place), default=None)
    return (0, -1) if best is None else (n_same(best), best + 1)


@given(st.lists(st.integers(0, 2), max_size=80), st.integers(0, 80))
def test_the_longest_match_is_found(ids: list[int], cut: int) -> None:
    text = Lookup()
    text.extend(ids[:cut])
    text.extend(ids[cut:])
    assert len(text) == len(ids)
    if len(ids) >= 3:
        assert text.find() == longest_match(ids)


def test_a_text_that_repeats_itself_is_copied_beyond_its_end() -> None:
    text = Lookup()
    text.extend([9, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3])
    length, start = text.find()
    assert (length, start) == (7, 8)
    assert text.copied(start, 7) == [4, 1, 2, 3, 4, 1, 2]
    text.extend([5, 5, 5, 5])
    assert text.copied(text.find()[1], 3) == [5, 5, 5]


def test_a_short_text_has_no_match() -> None:
    text = Lookup()
    for token_id in (1, 1):
        assert text.find()[0] == 0
        text.extend([token_id])
    assert text.find()[0] == 0


# -- when -------------------------------------------------------------------------------------------------------------


def step_s(n_tokens: int, more: float) -> float:
    """Seconds of a step: one with one token takes 1, each token more adds so much."""
    return 1 + more * (n_tokens - 1)


def policy_of(more: float, right: float, **settings) -> DraftPolicy:
    """A policy that has seen steps that take so long, and drafts that came true so often."""
    policy, random = DraftPolicy(7, **settings), np.random.default_rng(0)
    for _ in range(40):
        for n_tokens in (1, 4):
            policy.note_step(n_tokens, step_s(n_tokens, more))
    for _ in range(400):
        for length in (3, 4, 6, 9, 17):
            policy.note_drafts(length, 1, int(random.random() < right))
    return policy


def test_as_many_tokens_are_drafted_as_pay() -> None:
    assert policy_of(0.05, 0.98).n_drafts(9, 100) == 7
    assert policy_of(0.05, 0.98).n_drafts(9, 3) == 3
    assert 0 < policy_of(0.25, 0.6).n_drafts(9, 100) < 4
    assert policy_of(0.25, 0.2).n_drafts(9, 100) == 0
    assert policy_of(1.0, 0.99).n_drafts(9, 100) == 0  # where time goes with tokens nothing is gained
    assert policy_of(0.05, 0.98).n_drafts(0, 100) == 0
    # Where right tokens must be run again after a wrong one, fewer pay.
    lenient, strict = (policy_of(0.3, 0.75, loses_all=loses) for loses in (False, True))
    assert lenient.n_drafts(9, 100) > strict.n_drafts(9, 100)


def test_nothing_is_drafted_before_a_step_was_timed() -> None:
    policy = DraftPolicy(7)
    assert policy.n_drafts(17, 7) == 0
    policy.note_step(1, 9.0)  # the first is not counted
    policy.note_step(3, 9.0)
    assert policy.n_drafts(17, 7) == 0
    policy.note_step(1, 1.0)
    assert policy.n_drafts(17, 7) > 0


def test_the_first_step_of_a_size_counts_until_there_is_a_faster_one() -> None:
    times = StepTimes(8)
    for seconds in (9.0, 1.0, 1.0):
        times.note(1, seconds)
    times.note(4, 3.9)
    assert times.all()[3] == 3.9
    times.note(4, 1.5)
    assert times.all()[3] == 1.5
    times.note(4, 1.7)
    assert 1.5 < times.all()[3] < 1.6


def test_a_bad_minute_is_forgotten() -> None:
    policy = policy_of(0.1, 0.95)
    for _ in range(20):
        for n in range(2, 9):
            policy.note_step(n, 50.0)
    assert policy.n_drafts(9, 7) == 0
    n = next(i for i in range(10000) if policy.n_drafts(9, 7))
    assert n > 100


@pytest.mark.parametrize("loses_all", [False, True])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize(("first", "more"), [(0.0, 0.1), (0.3, 0.3), (0.6, 0.5), (0.5, 0.9)])
def test_drafts_cost_little_where_they_are_wrong(first: float, more: float, right: float, loses_all: bool) -> None:
    """The first token more costs more than the others, and a step behind one with drafts was not begun ahead.

    Three thousand tokens, against the best that always as many drafts could do.
    """
    alone, behind = 1.0, 1.1

    def n_right_of(random: np.random.Generator, n: int) -> int:
        wrong = np.flatnonzero(random.random(n) >= right)
        return int(wrong[0]) if len(wrong) else n

    def seconds(choose, note) -> float:
        random, spent, n_made, again, is_behind = np.random.default_rng(3), 0.0, 0, 0, False
        while n_made < 3000:
            n = choose() if not again else 0
            n_tokens = 1 + again + n
            step = (behind if n or is_behind or again else alone) + (n_tokens > 1) * first + more * (n_tokens - 1)
            n_right = n_right_of(random, n)
            spent, n_made = spent + step, n_made + 1 + n_right
            again = n_right if loses_all and n_right < n else 0
            is_behind = n > 0
            note(n_tokens, step, n, n_right)
        return spent / n_made

    policy, random = DraftPolicy(7, loses_all=loses_all), np.random.default_rng(1)

    def note(n_tokens: int, step: float, n: int, n_right: int) -> None:
        policy.note_step(n_tokens, step)
        n_tried = min(n_right + 1, n) if n else 1
        policy.note_drafts(9, n_tried, n_right if n else int(random.random() < right))

    found = seconds(lambda: policy.n_drafts(9, 7), note)
    of_each = [seconds(lambda n=n: n, lambda *_: None) for n in range(8)]
    assert found <= 1.03 * of_each[0]
    assert found <= 1.15 * min(of_each)


def test_drafts_are_counted_though_nothing_is_run() -> None:
    """A policy that drafts nothing still learns how often it would have been right."""
    policy = DraftPolicy(7)
    drafter, made = Drafter(policy, [1, 2, 3, 4, 5, 6, 7, 8] * 2), [1, 2, 3]
    before = policy.chance(9)
    for token_id in (4, 5, 6, 7, 8, 1, 2, 3) * 4:
        assert drafter.propose(made, 7) == []
        made.append(token_id)
    assert policy.chance(17) > before
    drafter.propose(made, 7)
    high = policy.chance(17)
    for _ in range(3):
        made += [100]
        assert drafter.propose(made, 7) == []
    assert policy.chance(17) < high


# -- the same text ----------------------------------------------------------------------------------------------------


def rehearsal(engine: Engine, policy: DraftPolicy, answer: Completion, right: float, n: int) -> Rehearsal:
    """Drafts of an answer, so many at a time."""
    return Rehearsal(
        7,
        loses_all=policy.loses_all,
        token_ids=answer.token_ids,
        n_vocab=engine.spec.n_vocab,
        right=right,
        n_always=n,
    )


def rehearse(engine: Engine, prompt: str, params: SamplingParams, right: float, n: int) -> None:
    """Make an answer without drafts, and again with those that are right now and then; nothing may differ."""
    policy, engine.drafts = engine.drafts, None
    assert policy is not None
    expected, before = engine.generate(prompt, params), engine.statistics
    forget(engine)
    engine.drafts = Rehearsal(
        7,
        loses_all=policy.loses_all,
        n_vocab=engine.spec.n_vocab,
        token_ids=expected.token_ids,
        right=right,
        n_always=n,
    )
    pieces = list(engine.generate(prompt, params, stream=True))
    found, after = pieces[-1].completion, engine.statistics
    assert found is not None
    assert found.token_ids == expected.token_ids
    assert found.logprobs == expected.logprobs
    assert [piece.token_id for piece in pieces[:-1]] == list(expected.token_ids)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert after.n_drafts > before.n_drafts
    n_right = after.n_drafts_right - before.n_drafts_right
    assert (n_right > 0) == (right > 0)
    assert found.usage.n_drafted_tokens == n_right
    assert n_right <= after.n_drafts - before.n_drafts
    assert after.n_decode_tokens - before.n_decode_tokens == len(found.token_ids) - 1
    # What is left in the slot is of use, and right.
    longer = [*engine.prompt_ids(prompt), *found.token_ids, 5]
    again = engine.generate(longer, params)
    assert again.usage.n_reused_tokens >= len(longer) - 2 - n
    forget(engine)
    engine.drafts = None
    fresh = engine.generate(longer, params)
    assert (again.token_ids, again.logprobs) == (fresh.token_ids, fresh.logprobs)
    forget(engine)
    engine.drafts = policy


def forget(engine: Engine) -> None:
    with engine.new_session():
        pass


@pytest.mark.parametrize(
    ("right", "n"), [(1.0, 7), (0.8, 3), (0.5, 7), (0.0, 2)], ids=["always", "mostly", "sometimes", "never"]
)
@pytest.mark.parametrize("params", [PARAMS, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_the_text_is_the_same(small_model: Path | None, params: SamplingParams, right: float, n: int) -> None:
    with open_engine(small_model, 1) as engine:
        assert isinstance(engine._program, RewindingProgram)
        for prompt in PROMPTS[:3]:
            rehearse(engine, prompt, params, right, n)


@pytest.mark.parametrize("name", PEERS)
def test_a_sequence_goes_back_to_before_wrong_drafts(name: str, data: Path) -> None:
    """Of every architecture, on the CPU: logits after a step that was taken back are those without it."""
    references = data / "peers" / f"{name}-F32.npz"
    tokens = np.load(references)["tokens"][:24].tolist()
    check_rewinding(ModelRunner(model_path(references), context_length=64, max_drafts=7), tokens)


def check_rewinding(runner: ModelRunner, tokens: list[int]) -> None:
    with runner:
        expected = runner.logits(tokens, (9, 1, 7))
        wrong = [(token_id + 1) % runner.model.spec.n_vocab for token_id in tokens]
        forward, program, found, at = runner.forward, runner.program, [], 0
        for n, n_right in ((9, 0), (1, 0), (1, 2), (1, 6), (3, 3), (1, 0)):
            program.keep_states(0, n)
            step = [*tokens[at : at + n + n_right], *wrong[at + n + n_right : at + n + 7]]
            found.append(forward.run(0, step, at, "all")[:n])
            program.rewind_states(0)
            at += n
        found.append(forward.run(0, tokens[at:], at, "all"))
        assert (np.concatenate(found).view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_emulator)])
def test_a_step_that_is_refused_keeps_no_states(device: str, golden_path, request: pytest.FixtureRequest) -> None:
    """What was asked for it is not done by the next one, which may have fewer tokens."""
    with ModelRunner(golden_path("qwen35moe/qwen35moe-fusedgu-Q8_0.gguf"), max_tokens=8, max_drafts=3) as runner:
        program, gpu = runner.program, None
        if device == "cuda":
            request.getfixturevalue("driver")
            gpu = CUDADevice(compiler=StandInCompiler(), bandwidths=Bandwidths(50e9, 25e9, 1e12), n_threads=1)
            program = gpu.compile(runner.model.graph, runner.weights, runner.forward.limits)
        forward = ForwardPass(program, runner.forward.limits, runner.model.spec.n_vocab)
        expected = forward.run(0, [3, 4], 0, "all").copy()
        program.keep_states(0, 6)
        with pytest.raises(RequestError):
            program.run(*(np.full(9, 0, np.int32) for _ in range(4)))
        assert np.array_equal(forward.run(0, [3, 4], 0, "all"), expected)
        if gpu is not None:
            program.close()
            gpu.close()


@pytest.mark.parametrize("device", ["emulated", pytest.param("cuda", marks=needs_emulator)])
@pytest.mark.parametrize("name", ["qwen35moe/qwen35moe-fusedgu-Q8_0", "qwen3moe/qwen3moe-micro-Q8_0"])
def test_the_text_is_the_same_with_slots(name: str, device: str, golden_path, request: pytest.FixtureRequest) -> None:
    if device == "cuda":
        request.getfixturevalue("driver").set(order="random", copy_us=200)
    settings = EngineSettings(device=device, n_threads=2, context_length=48, max_batch_tokens=8)
    config = EngineConfig(engine=settings, moe=MoESettings(hot_k=3))
    with Engine.open(golden_path(f"{name}.gguf"), config) as engine:
        for params in (PARAMS, PENALISED, SAMPLED):
            rehearse(engine, "ab", replace(params, max_tokens=12), 0.7, 4)


def test_drafts_end_at_stop_texts_and_at_the_last_token(small_model: Path | None) -> None:
    with open_engine(small_model, 1) as engine:
        policy, engine.drafts = engine.drafts, None
        whole = engine.generate(PROMPTS[0], PARAMS)
        for n in range(1, 9):
            few = replace(PARAMS, max_tokens=n)
            stop = replace(PARAMS, stop=(whole.text[2 * n : 2 * n + 3],))
            for params in (few, stop):
                engine.drafts = None
                forget(engine)
                expected = engine.generate(PROMPTS[0], params)
                engine.drafts = rehearsal(engine, policy, whole, 1.0, 7)
                forget(engine)
                found = engine.generate(PROMPTS[0], params)
                assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
                assert found.finish_reason == expected.finish_reason


def test_answers_beside_each_other_are_not_drafted(small_model: Path | None) -> None:
    """The one that is left alone at the end is."""
    with open_engine(small_model, 2) as engine:
        policy, engine.drafts = engine.drafts, None
        alone = [engine.generate(prompt, PARAMS) for prompt in PROMPTS[:2]]
        forget(engine)
        engine.drafts = rehearsal(engine, policy, alone[0], 1.0, 7)
        found = dict(engine.generate_many(PROMPTS[:2], PARAMS))
        assert [found[i].token_ids for i in range(2)] == [answer.token_ids for answer in alone]
        assert engine.statistics.n_drafts == 0


def test_an_interrupt_while_drafts_are_checked_leaves_nothing_false(small_model: Path | None) -> None:
    with open_engine(small_model, 1) as engine:
        policy, engine.drafts = engine.drafts, None
        expected = engine.generate(PROMPTS[1], PARAMS)
        n_raised = 0
        for at in range(1, 400, 23):
            forget(engine)
            engine.drafts = Rehearsal(
                7,
                loses_all=policy.loses_all,
                n_vocab=engine.spec.n_vocab,
                token_ids=expected.token_ids,
                right=0.7,
                n_always=7,
            )
            stream = engine.generate(PROMPTS[1], PARAMS, stream=True)
            for _ in range(5):
                next(stream)
            with (
                contextlib.suppress(KeyboardInterrupt),
                Interrupter(at, (scheduler, leases), ("_lead", "__exit__")) as interrupter,
            ):
                next(stream)
                next(stream)
            n_raised += interrupter.raised
            stream.close()
            assert engine.generate(PROMPTS[1], PARAMS).token_ids == expected.token_ids
            engine.drafts = None
            assert engine.generate(PROMPTS[1], PARAMS).token_ids == expected.token_ids
        assert n_raised > 5


# -- settings ---------------------------------------------------------------------------------------------------------


def test_text_that_repeats_itself_is_drafted_by_default() -> None:
    prompt = "x = [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" * 6
    answers = []
    for max_drafts in (0, 7):
        with open_engine(None, 1, context_length=256, max_drafts=max_drafts) as engine:
            answers.append(engine.generate(prompt, replace(PARAMS, max_tokens=60)).token_ids)
            assert (engine.statistics.n_drafts > 0) == (max_drafts > 0)
            assert engine.config.engine.max_drafts == max_drafts
    first, second = answers
    assert first == second


def test_where_routing_is_recorded_or_played_nothing_is_drafted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine")
    settings = EngineSettings(device="cpu", n_threads=1, context_length=64)
    for path, moe, why in (
        (None, MoESettings(record_trace=str(tmp_path / "trace.npz")), "routing is recorded"),
        ("synthetic:qwen3-30b-a3b:layers=1,vocab=4096", MoESettings(routing="made-up"), "routing is played"),
    ):
        caplog.clear()
        with Engine.open(path, EngineConfig(moe=moe, engine=settings)) as engine:
            assert engine.config.engine.max_drafts == 0
            assert engine.drafts is None
        assert f"no tokens drafted, as {why}" in caplog.text


def test_states_are_kept_only_for_drafts(small_model: Path | None) -> None:
    sizes = []
    for max_drafts in (0, 1, 7):
        with open_engine(small_model, 1, max_drafts=max_drafts) as engine:
            sizes.append(engine.statistics.state_bytes)
            assert engine.footprint.state_bytes <= engine.statistics.state_bytes
    grown = [b - a for a, b in pairwise(sizes)]
    assert grown[1] == 0
    assert (grown[0] > 0) == (small_model is None)


def test_the_bench_measures_what_drafts_gain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, emulated = tmp_path / "drafts.json", ("--device", "emulated", "--prompt-tokens", "16", "--gen-tokens", "40")
    assert main(["bench", *emulated, "--reps", "2", "--drafts", "1,0", "--json", str(file), "-q"]) == 0
    shown = capsys.readouterr().out
    for part in ("drafts right", "none made", "100%", "every text was the same"):
        assert part in shown
    plain, right, wrong = json.loads(file.read_text())["rows"]
    assert right["guess_s"] == 0
    assert (plain["drafts"], plain["gain"]) == (0, 1)
    assert right["gain"] > 3
    assert wrong["gain"] == pytest.approx(1, abs=0.05)
    assert main(["bench", *emulated, "--drafts", "--set", "engine.max_drafts=0"]) == 1
    assert "there are no drafts: engine.max_drafts is 0" in capsys.readouterr().err
