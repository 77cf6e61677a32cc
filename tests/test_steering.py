"""Routing that is played back to models of random weights: every device chooses exactly those experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig, EngineSettings, MoESettings
from engine.data import tiny_model_path
from engine.devices.cuda import program as cuda_program
from engine.errors import ConfigError
from engine.experts import steering
from engine.experts.routing_process import RoutingProcess
from engine.experts.steering import GUESSED, PLAYED_OF_PROMPT, Steering
from engine.experts.trace import ANSWER, PROMPT, Trace, load_trace, save_trace
from engine.experts.tracker import count_choices
from engine.runtime import Engine
from engine.synthetic import PUBLISHED
from tests.cusim import needs_emulator

NAME = "synthetic:tiny:layers=3"  # 16 experts, 4 of them used
PROMPT_TOKENS, N_TOKENS = 6, 5


def routing_of_run(device: str, tmp_path: Path, routing: str) -> np.ndarray:
    """Return the experts of some tokens made after a prompt, [n_tokens, n_layers, n_used]."""
    recorded = tmp_path / f"{device}.npz"
    settings = EngineSettings(device=device, n_threads=2, context_length=32, max_batch_tokens=8)
    moe = MoESettings(hot_k=0 if device == "cpu" else 5, routing=routing, record_trace=str(recorded))
    with Engine.open(NAME, EngineConfig(engine=settings, moe=moe)) as engine, engine.new_session() as session:
        session.run(list(range(PROMPT_TOKENS)))
        for token in range(N_TOKENS):
            session.run([token])
    trace = load_trace(recorded)
    assert trace.phase.tolist() == [PROMPT] * PROMPT_TOKENS + [ANSWER] * N_TOKENS
    assert (
        len({tuple(sorted(chosen)) for chosen in trace.ids[:PROMPT_TOKENS, 0].tolist()}) > 1
    )  # a prompt's are its own
    return trace.ids[PROMPT_TOKENS:]


@pytest.fixture
def process() -> np.ndarray:
    """The experts that the made-up process chooses first."""
    return RoutingProcess(3, 16, 4).next_tokens(N_TOKENS)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_made_up_routing_is_what_the_routers_choose(device: str, tmp_path: Path, process: np.ndarray) -> None:
    np.testing.assert_array_equal(routing_of_run(device, tmp_path, "made-up"), process)


def test_the_cache_is_told_what_is_played_for_the_end_of_a_prompt() -> None:
    """The answer goes on from there."""
    played = RoutingProcess(3, 16, 4).next_tokens(PLAYED_OF_PROMPT + 1)
    settings = EngineSettings(device="emulated", n_threads=2, context_length=64)
    moe = MoESettings(hot_k=5, routing="made-up")
    with Engine.open(NAME, EngineConfig(engine=settings, moe=moe)) as engine, engine.new_session() as session:
        session.run(list(range(50)))
        assert engine.statistics.cache is not None
        cache = engine._caching.cache
        assert cache is not None
        expected = count_choices(played[:-1], 16)
        np.testing.assert_array_equal(cache.counts, expected)
        session.run([50])
        assert engine.statistics.cache.choices.tolist() == [4] * 3
        np.testing.assert_array_equal(cache.counts, expected + count_choices(played[-1:], 16))


class Told:
    """A program that keeps what its routers are told."""

    def __init__(self, guess_biases: Mapping[str, str] | None = None) -> None:
        self.guess_biases = guess_biases or {}
        self.names, self.values, self.n_times = [], np.zeros((0, 16), np.float32), 0

    def write_vectors(self, names: Sequence[str], values: np.ndarray) -> None:
        self.names, self.values = list(names), values.copy()
        self.n_times += 1


def test_what_is_played_is_the_same_if_it_is_found_early() -> None:
    """Before the step that needs it; a prompt in between makes no difference."""
    told: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for is_early, seen in told.items():
        program = Told()
        steering = Steering(program, ["a", "b", "c"], range(3), 16, iter(RoutingProcess(3, 16, 4).next_tokens(200)))
        for n_tokens in (1, 1, 1, 5, 5, 1, 1, 2, 1):
            steering.begin_step(n_tokens)
            seen.append(program.values.copy())
            if is_early:
                steering.find_next()
            if n_tokens > 1:
                seen.append(steering.end_of_prompt(np.zeros((3, n_tokens, 4), np.int32)))
        assert program.n_times == 8  # the second of two prompts needs nothing
    for late, early in zip(told[False], told[True], strict=True):
        np.testing.assert_array_equal(late, early)


def test_layers_that_nobody_can_tell_are_seen_as_they_were() -> None:
    """Such as those that choose experts by token id; a prompt of few tokens counts several times."""
    expected = RoutingProcess(2, 16, 4).next_tokens(PLAYED_OF_PROMPT)
    steering = Steering(Told(), ["b", "d"], [1, 3], 16, iter(expected))
    routing = np.random.default_rng(0).integers(0, 16, (4, 5, 4), np.int32)
    told = steering.end_of_prompt(routing)
    np.testing.assert_array_equal(told[[1, 3]], expected.swapaxes(0, 1))
    np.testing.assert_array_equal(told[[0, 2], -5:], routing[[0, 2]])
    np.testing.assert_array_equal(told[[0, 2], -10:-5], routing[[0, 2]])


def test_routing_is_played_beside_layers_that_choose_by_token_id(monkeypatch) -> None:
    published = PUBLISHED["deepseek-v4-flash"]
    sizes = {"embedding_length": 256, "expert_feed_forward_length": 256, "attention.head_count": 8}
    sizes |= {"attention.indexer.head_count": 8, "attention.q_lora_rank": 256}
    sizes |= {"attention.output_group_count": 2, "attention.output_lora_rank": 256}
    monkeypatch.setitem(PUBLISHED, "narrow", replace(published, keys={**published.keys, **sizes}))
    name = "synthetic:narrow@q8_0:layers=5,experts=16,used=4,vocab=4096"
    settings = EngineSettings(device="emulated", n_threads=2, context_length=128, max_batch_tokens=64)
    moe = MoESettings(hot_k=5, routing="made-up", hot_pp_bypass_n_tokens=16)
    with Engine.open(name, EngineConfig(engine=settings, moe=moe)) as engine, engine.new_session() as session:
        session.run(list(range(50)))
        session.run([50])
        assert engine.statistics.cache is not None
        assert engine.statistics.cache.choices.tolist() == [4] * 5


def test_guesses_are_right_as_often_as_a_trained_model_s() -> None:
    """Those of the layers that are guessed about; the best rank is still the first."""
    n_tokens, n_right = 500, 0
    program, expected = Told({"b": "b'", "c": "c'"}), RoutingProcess(3, 16, 4).next_tokens(n_tokens)
    steering = Steering(program, ["a", "b", "c"], range(3), 16, iter(expected))
    for ids in expected:
        steering.begin_step(1)
        assert program.names == ["a", "b", "c", "b'", "c'"]
        np.testing.assert_array_equal(np.argsort(-program.values[:3], kind="stable")[:, :4], ids)
        told, guessed = program.values[1:3], program.values[3:]
        is_right = guessed > 0
        np.testing.assert_array_equal(guessed[is_right], told[is_right])
        assert not guessed[~is_right].any()
        n_right += is_right.sum()
    assert n_right / (n_tokens * 8) == pytest.approx(GUESSED, abs=0.02)
    steering.begin_step(2)
    assert not program.values.any()


@needs_emulator
@pytest.mark.parametrize("in_background", [False, True])
def test_the_gpu_chooses_them_too(
    in_background: bool, driver, tmp_path: Path, process: np.ndarray, monkeypatch
) -> None:
    monkeypatch.setattr(cuda_program, "n_logical_cpus", lambda: 64 if in_background else 1)
    driver.set(order="random", copy_us=200)
    np.testing.assert_array_equal(routing_of_run("cuda", tmp_path, "made-up"), process)


@needs_emulator
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_gpu_guesses_what_it_is_told(share: float, driver, monkeypatch) -> None:
    """And by itself in place of the rest: an untrained router hardly ever guesses right."""
    monkeypatch.setattr(steering, "GUESSED", share)
    settings = EngineSettings(device="cuda", n_threads=2, context_length=64, max_batch_tokens=8)
    name, moe = "synthetic:tiny:layers=3,experts=64,used=2", MoESettings(hot_k=5, routing="made-up")
    with Engine.open(name, EngineConfig(engine=settings, moe=moe)) as engine, engine.new_session() as session:
        session.run(list(range(PROMPT_TOKENS)))
        for token in range(12):
            session.run([token])
        times = engine.statistics.layer_times
    assert times is not None
    n_asked, n_guessed = times.guesses.tolist()
    assert n_asked > 0
    assert n_guessed == n_asked if share == 1.0 else n_guessed < n_asked / 4


def test_the_answer_of_a_trace_is_played_again_and_again(tmp_path: Path) -> None:
    trace = RoutingProcess(6, 16, 5, seed=3).trace(4, 3)
    save_trace(tmp_path / "played.npz", trace)
    found = routing_of_run("cpu", tmp_path, str(tmp_path / "played.npz"))
    expected = trace.ids[4:, ::2, :4]  # every other layer of six, the best four of five
    np.testing.assert_array_equal(found, np.concatenate([expected, expected])[:N_TOKENS])


def test_without_it_the_routers_choose_for_themselves(tmp_path: Path, process: np.ndarray) -> None:
    found = routing_of_run("cpu", tmp_path, "own")
    assert (np.sort(found) != np.sort(process)).any()


def refused(path: object, config: EngineConfig) -> str:
    with pytest.raises(ConfigError) as error:
        Engine.open(path, config)  # type: ignore[arg-type]
    return str(error.value)


def test_what_cannot_be_played_is_refused(tmp_path: Path) -> None:
    config = EngineConfig(engine=EngineSettings(device="cpu"), moe=MoESettings(routing="made-up"))
    assert 'set moe.routing = "own"' in refused(tiny_model_path(), config)
    missing = replace(config, moe=MoESettings(routing=str(tmp_path / "none.npz")))
    assert "none.npz: cannot be read as a routing trace" in refused(NAME, missing)
    save_trace(tmp_path / "other.npz", RoutingProcess(3, 8, 2).trace(1, 1))
    other = replace(config, moe=MoESettings(routing=str(tmp_path / "other.npz")))
    assert "8 experts, 2 of them used; the model has 16 and uses 4" in refused(NAME, other)
    nothing = Trace("x", np.full((2, 3, 4), 65535, np.uint16), np.full(2, ANSWER, np.uint8), 16)
    save_trace(tmp_path / "nothing.npz", nothing)
    empty = replace(config, moe=MoESettings(routing=str(tmp_path / "nothing.npz")))
    assert "no token of this trace has the routing of all layers" in refused(NAME, empty)
