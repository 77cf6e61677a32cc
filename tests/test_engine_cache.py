"""The engine with a hot-expert cache: same text, settings, profiles, traces, statistics, and what goes wrong."""

from __future__ import annotations

import errno
import io
import logging
import mmap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.__main__ import main
from engine.bench.replay import study
from engine.config import EmulatedSettings, EngineConfig, EngineSettings, ModelSettings, MoESettings, SamplingParams
from engine.data import tiny_model_path
from engine.errors import ConfigError, DeviceError
from engine.experts.profile import Profile, load_profile, merge_profiles, save_profile
from engine.experts.trace import Trace, load_trace, save_trace
from engine.runtime import Engine

PROMPT = "def add(a, b):\n    return a + b\n\nclass Queue:\n    def __init__(self):\n        self.items = []\n"
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
MODEL = "qwen35moe/tiny-moe/8x56"


def config(vram_budget: str = "", **moe) -> EngineConfig:
    return EngineConfig(
        engine=EngineSettings(
            device="emulated", n_threads=2, context_length=256, max_batch_tokens=32, vram_budget=vram_budget
        ),
        moe=MoESettings(**{"hot_pp_bypass_n_tokens": 8, "stream_n_tokens": 8, **moe}),
    )


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    """The answer of the CPU device."""
    plain = EngineSettings(device="cpu", n_threads=2, context_length=256, max_batch_tokens=32)
    with Engine.open(config=EngineConfig(engine=plain)) as engine:
        return engine.generate(PROMPT, GREEDY).token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hot_k": 0},
        {"hot_k": 3},
        {"hot_k": 3, "policy": "lru", "hot_pp_bypass_n_tokens": 1000, "stream_n_tokens": 1000},
        {"hot_k": 12, "policy": "window_topk", "hot_rebalance_interval": 2},
        {"hot_k": 12, "policy": "static", "prompt_seeds_heat": True},
        {"n_cpu_moe": 0},
        {"n_cpu_moe": 5},
        {"n_cpu_moe": 8},
        {"vram_budget": "12MB"},
    ],
    ids=str,
)
def test_the_text_is_the_same_with_every_setting(settings, expected) -> None:
    with Engine.open(config=config(**settings)) as engine:
        assert engine.generate(PROMPT, GREEDY).token_ids == expected
        found = engine.statistics
        assert found.cache is not None
        assert found.time_spent is not None
        assert found.traffic is not None
        if settings.get("hot_k") == 0 or settings.get("n_cpu_moe") == 8:
            assert found.cache.hit_rate == 0
        if settings in ({}, {"n_cpu_moe": 0}):
            assert found.cache.hit_rate == 1
            assert found.time_spent.cpu_s == 0
        if settings.get("vram_budget"):
            assert found.device_bytes <= 12_000_000
            assert 0 < found.cache.hit_rate < 1


def test_one_line_says_what_the_cache_does_or_why_it_does_nothing(caplog) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    with Engine.open(config=config(hot_k=0, stream_n_tokens=1000)) as engine:
        least = engine.statistics.device_bytes
    lines = [
        (config(hot_k=8), "hot-expert cache: 8 of 56 experts in each of 8 layers (14%"),
        (config(hot_k=0), "hot-expert cache off: all experts on the CPU, as hot_k is 0; set"),
        (config(vram_budget=f"{least}B", stream_n_tokens=1000), "as no VRAM is left for a slot; raise vram_budget"),
        (config(n_cpu_moe=3), "experts of the first 3 of 8 MoE layers on the CPU"),
        (EngineConfig(engine=EngineSettings(device="cpu")), "hot-expert cache off: no GPU in use"),
    ]
    for wanted, line in lines:
        caplog.clear()
        with Engine.open(config=wanted) as engine:
            assert line in engine.statistics.cache_line
        assert line in caplog.text
    with Engine.open(config=config(hot_k=8)) as engine:
        engine.generate(PROMPT, GREEDY)
        assert "hits" in engine.statistics.cache_line
        assert "swaps a token" in engine.statistics.cache_line


def test_a_cache_that_can_hardly_pay_warns_once(caplog) -> None:
    with Engine.open(config=config(hot_k=2)):
        assert caplog.text.count("2 slots a layer hold less than one token's 4 experts") == 1
    caplog.clear()
    slow = replace(config(hot_k=8), emulated=EmulatedSettings(vram_bandwidth=10.0, ram_bandwidth=60.0))
    with Engine.open(config=slow):
        assert "not faster than RAM" in caplog.text


def test_an_interval_that_the_policy_does_not_know_is_told(caplog) -> None:
    for policy, n_warnings in (("adaptive", 1), ("window_topk", 0)):
        caplog.clear()
        with Engine.open(config=config(hot_k=8, policy=policy, hot_rebalance_interval=30)):
            assert caplog.text.count("moe.hot_rebalance_interval is 30, which has no effect") == n_warnings


def test_the_cache_stays_warm_from_turn_to_turn(expected) -> None:
    with Engine.open(config=config(hot_k=12)) as engine:
        first = engine.generate(PROMPT, GREEDY)
        assert first.token_ids == expected
        cold = engine.statistics.cache
        again = engine.generate(PROMPT, GREEDY)
        assert again.token_ids == expected
        warm = engine.statistics.cache
        assert cold is not None
        assert warm is not None
        second = (warm.hits.sum() - cold.hits.sum()) / (warm.choices.sum() - cold.choices.sum())
        assert second > cold.hit_rate


def test_speeds_are_those_of_the_virtual_clock() -> None:
    slow = replace(config(hot_k=0), emulated=EmulatedSettings(ram_bandwidth=0.001))
    with Engine.open(config=slow) as engine:
        answer = engine.generate(PROMPT, replace(GREEDY, max_tokens=5))
        chosen = engine.statistics.weights.chosen_bytes
        assert answer.timings.decode_s > 4 * chosen / 1e6  # seconds that nobody waited for
        assert engine.now() > answer.timings.decode_s
        assert "virtual clock" in engine.statistics.device


# -- traces and profiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["emulated", "cpu"])
def test_a_run_can_be_recorded_and_replayed(tmp_path, device, expected) -> None:
    path = tmp_path / "run.npz"
    settings = config(hot_k=0 if device == "cpu" else 8, record_trace=str(path))
    settings = replace(settings, engine=replace(settings.engine, device=device))
    with Engine.open(config=settings) as engine:
        answer = engine.generate(PROMPT, GREEDY)
        assert answer.token_ids == expected
    trace = load_trace(path)
    assert trace.ids.shape == (answer.usage.n_prompt_tokens + 39, 8, 4)
    assert trace.n_experts == 56
    assert trace.n_prompt == answer.usage.n_prompt_tokens
    assert study(trace, ["adaptive"], "20%").rows[0].hit_rate > 0.1


def test_a_trace_or_profile_that_cannot_be_written_is_refused_at_once(tmp_path) -> None:
    nowhere = str(tmp_path / "missing" / "x.npz")
    for refused in (config(hot_k=8, record_trace=nowhere), config(hot_k=8, profile=nowhere)):
        with pytest.raises(ConfigError, match="cannot be written: there is no folder"):
            Engine.open(config=refused)


def test_a_trace_replaces_another_trace_and_nothing_else(tmp_path, expected) -> None:
    path = tmp_path / "run.npz"
    path.write_text("a model, perhaps")
    with pytest.raises(ConfigError, match=r"run.npz', which is there and is no routing trace; give another name"):
        Engine.open(config=config(hot_k=8, record_trace=str(path)))
    assert path.read_text() == "a model, perhaps"
    path.unlink()
    for n_tokens in (3, 5):
        with Engine.open(config=config(hot_k=8, record_trace=str(path))) as engine:
            n_prompt = engine.generate(PROMPT, replace(GREEDY, max_tokens=n_tokens)).usage.n_prompt_tokens
        assert load_trace(path).n_tokens == n_prompt + n_tokens - 1


def test_a_folder_that_is_gone_at_the_end_costs_a_warning(tmp_path, caplog) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    nowhere = str(folder / "x.npz")
    with Engine.open(config=config(hot_k=8, record_trace=nowhere, profile=nowhere)) as engine:
        engine.generate(PROMPT, replace(GREEDY, max_tokens=3))
        folder.rmdir()
    assert "the expert profile is not saved" in caplog.text
    assert "the routing trace is not saved" in caplog.text


def test_a_profile_warms_the_next_run(tmp_path, expected) -> None:
    path = tmp_path / "profile.npz"
    settings = config(hot_k=12, profile=str(path), policy="static", hot_pp_bypass_n_tokens=1, stream_n_tokens=1)
    with Engine.open(config=settings) as engine:
        engine.generate(PROMPT, GREEDY)
    saved = load_profile(path, MODEL)
    assert load_profile(path).model == MODEL
    assert saved.counts.sum() == saved.n_tokens * 8 * 4
    with Engine.open(
        config=replace(settings, moe=replace(settings.moe, hot_pp_bypass_n_tokens=1000, stream_n_tokens=1000))
    ) as engine:
        assert engine.generate(PROMPT, GREEDY).token_ids == expected
        assert engine.statistics.cache is not None
        assert engine.statistics.cache.hit_rate > 0.4
    assert load_profile(path, MODEL).n_tokens == 2 * saved.n_tokens


def test_a_profile_of_another_model_or_a_damaged_one_is_refused(tmp_path) -> None:
    path = tmp_path / "profile.npz"
    counts = np.ones((8, 56), np.float32)
    save_profile(path, Profile("other", "qwen3moe/other/8x56", 10, counts))
    with pytest.raises(ConfigError, match="profile of qwen3moe/other"):
        Engine.open(config=config(hot_k=8, profile=str(path)))
    for wrong in (b"", b"text", path.read_bytes()[:200]):
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match="profile"):
            load_profile(path, MODEL)
    for counts_of in (-counts, counts * np.float32(np.nan), counts[:, :5]):
        save_profile(path, Profile("bad", MODEL, 10, counts_of))
        with pytest.raises(ConfigError):
            load_profile(path, MODEL)
    np.savez(path, counts=counts, meta=np.array("{}"))
    with pytest.raises(ConfigError, match="is no profile"):
        load_profile(path, MODEL)


@settings(max_examples=150)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans(), is_trace=st.booleans())
def test_a_damaged_file_is_refused_whatever_is_damaged(tmp_path_factory, at, value, cut, is_trace) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    if is_trace:
        ids = np.zeros((3, 2, 1), np.uint16)
        save_trace(path, Trace("x", ids, np.zeros(3, np.uint8), 4))
    else:
        save_profile(path, Profile("x", MODEL, 10, np.ones((8, 56), np.float32)))
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] = value
    path.write_bytes(data[:at] if cut else data)
    try:
        load_trace(path) if is_trace else load_profile(path, MODEL)
    except ConfigError as error:
        assert path.name in str(error)  # noqa: PT017 - a damage that changes nothing raises nothing


def test_profiles_merge_and_old_counts_fade() -> None:
    ones = np.ones((8, 56), np.float32)
    merged = merge_profiles([Profile("a", MODEL, 100, ones), Profile("b", MODEL, 50, 3 * ones)], "both")
    assert (merged.name, merged.n_tokens) == ("both", 150)
    assert (merged.counts == 4).all()
    old = merge_profiles([Profile("a", MODEL, 200_000, ones), Profile("b", MODEL, 100_000, ones)], "x")
    assert old.n_tokens == 200_000
    assert (old.counts == 1.5).all()
    with pytest.raises(ConfigError, match="different models"):
        merge_profiles([Profile("a", MODEL, 1, ones), Profile("b", "other/8x56", 1, ones)], "x")


# -- settings that cannot be met -------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_names_what_to_change() -> None:
    with pytest.raises(DeviceError, match="may be used; use a shorter"):
        Engine.open(config=config(vram_budget="1MB"))
    with pytest.raises(DeviceError, match=r"hot_k is 50, .* use a smaller hot_k"):
        Engine.open(config=config(vram_budget="10MB", hot_k=50))
    with pytest.raises(DeviceError, match=r"n_cpu_moe = [5-8] fits"):
        Engine.open(config=config(vram_budget="9MB", n_cpu_moe=1))


def test_memory_that_the_system_refuses_at_any_time_costs_no_more_than_an_error(expected, monkeypatch) -> None:
    """The n-th allocation fails, for every n: so does opening, or the answer that needed it; the next one is right."""
    real, left, refused = mmap.mmap, 0, []

    def grudging(fileno, *args, **options):
        nonlocal left
        left -= fileno == -1
        if fileno == -1 and left == 0:
            refused.append(args)
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(fileno, *args, **options)

    monkeypatch.setattr(mmap, "mmap", grudging)
    settings = replace(config(hot_k=8), model=ModelSettings(load="memory"))
    n_opened = 0
    for n in range(1, 100):
        left = n
        try:
            with Engine.open(config=settings) as engine:
                n_opened += 1
                try:
                    assert engine.generate(PROMPT, GREEDY).token_ids == expected
                except DeviceError as error:
                    assert "the system gave no memory" in str(error)  # noqa: PT017 - one of the two must fail
                    assert engine.generate(PROMPT, GREEDY).token_ids == expected
                engine._caching.cache.table.check_integrity()
        except DeviceError as error:
            assert "the system gave no memory" in str(error)  # noqa: PT017
        if len(refused) < n:
            break
    assert len(refused) >= 5  # weights, states, scratch, slots, staging
    assert n_opened >= 2


def test_an_emulated_gpu_larger_than_the_ram_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("engine.devices.emulated.device.available_memory", lambda: 10**6)
    with pytest.raises(DeviceError, match=r"emulated GPU's memory need .* GB are free; lower .moe. hot_k"):
        Engine.open(config=config(hot_k=20))


# -- what people see -------------------------------------------------------------------------------------------------


def test_a_chat_can_show_the_cache_layer_by_layer(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    options = ["--stats", "--hot-k", "8", "-n", "8", "--seed", "1", "-t", "2"]
    assert main(["chat", str(tiny_model_path()), "--device", "emulated", *options]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "this answer:" in err
    assert "wait us" in err
    assert "hot-expert cache: 8 of 56 experts" in err


def test_a_run_ends_with_what_the_cache_did(capsys) -> None:
    assert main(["run", "-p", "def", "--device", "emulated", "--hot-k", "8", "-n", "8", "-t", "2"]) == 0
    *_, speeds, cache = capsys.readouterr().err.splitlines()
    assert speeds.endswith("(speeds of a virtual clock)")
    assert "swaps a token" in cache


def test_what_is_in_the_slots_from_the_start_is_no_swap() -> None:
    with Engine.open(config=config()) as engine:
        engine.generate(PROMPT, replace(GREEDY, max_tokens=3))
        assert engine.statistics.cache_line.endswith("100% hits, 0.0 swaps a token")
