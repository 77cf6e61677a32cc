"""The engine on the CUDA device, here the stand-in driver: texts, the cache, and what is said when it fails."""

from __future__ import annotations

import io
import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from interrupter import Interrupter
from rich.console import Console

from engine.__main__ import main
from engine.bench.measure import measure
from engine.cli.layers import layer_table
from engine.config import EngineConfig, EngineSettings, ModelSettings, MoESettings, SamplingParams
from engine.devices.cuda import jit, misses, probe
from engine.devices.cuda import program as cuda_program
from engine.devices.cuda.program import CUDAProgram
from engine.devices.cuda.steps import Steps
from engine.errors import DeviceError, RequestError
from engine.gguf import weights
from engine.runtime import Engine, placing
from tests.cusim import needs_emulator

pytestmark = [needs_emulator, pytest.mark.usefixtures("driver")]

SMALL = "qwen35moe/qwen35moe-fusedgu-Q8_0.gguf"  # recurrent layers, too; a fraction of the work of the bundled model
PROMPT = "def add(a, b):\n    return"
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def config(device: str = "cuda", **moe) -> EngineConfig:
    settings = EngineSettings(device=device, n_threads=2, context_length=32, max_batch_tokens=8)
    return EngineConfig(model=ModelSettings(load="mmap"), engine=settings, moe=MoESettings(**moe))


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    """The answer of the CPU device."""
    with Engine.open(config=config("cpu")) as engine:
        return engine.generate(PROMPT, GREEDY).token_ids


@pytest.fixture(scope="module")
def small(golden_path: Callable[[str], Path]) -> Path:
    """A model for what is asked of the engine around the device."""
    return golden_path(SMALL)


@pytest.fixture(scope="module")
def expected_of_small(small: Path) -> tuple[int, ...]:
    """Its answer on the CPU device."""
    with Engine.open(small, config("cpu")) as engine:
        return engine.generate(PROMPT, GREEDY).token_ids


@pytest.mark.parametrize(
    ("moe", "free", "load"),
    [({}, 1 << 40, "mmap"), ({"hot_k": 4}, 1 << 40, "memory"), ({"hot_k": 4}, 1 << 20, "mmap")],
    ids=["all in VRAM", "fits the RAM", "does not fit it"],
)
def test_weights_are_read_into_memory_where_that_serves_the_gpu(
    moe: dict, free: int, load: str, small, expected_of_small, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(placing.machine, "available_memory", lambda: free)
    auto = replace(config(**moe), model=ModelSettings())
    with caplog.at_level(logging.WARNING), Engine.open(small, auto) as engine:
        assert engine.config.model.load == load
        assert engine.generate(PROMPT, GREEDY).token_ids == expected_of_small
    assert ("the weights stay in the pages of the file" in caplog.text) == (free < 1 << 30)


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"hot_k": 9, "policy": "lru", "hot_pp_bypass_n_tokens": 1000, "stream_n_tokens": 1000},
        {"n_cpu_moe": 5},
        {"hot_k": 9, "hot_pp_bypass_n_tokens": 4, "stream_n_tokens": 4},
    ],
    ids=str,
)
def test_the_text_is_the_same_with_every_setting(moe: dict, expected, driver) -> None:
    driver.set(order="random", copy_us=500)
    with Engine.open(config=config(**moe)) as engine:
        assert engine.generate(PROMPT, GREEDY).token_ids == expected
        found = engine.statistics
    assert found.device_bytes > 0
    assert found.cache is not None
    if moe.get("policy") == "lru":
        assert found.cache.n_loads > 0
        assert 0 < found.cache.hit_rate < 1


@pytest.mark.parametrize(
    ("params", "draws"),
    [
        ({}, True),
        ({"top_k": 0, "min_p": 0.0}, True),
        ({"top_k": 1000, "min_p": 0.0}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logprobs": 2}, False),
    ],
    ids=str,
)
def test_a_text_is_the_same_whoever_draws_it(params: dict, draws: bool, small: Path, monkeypatch) -> None:
    """The GPU, or the CPU from the same logits; and logits are fetched only if somebody looks at them."""
    n_fetched = 0
    download = Steps.download_logits

    def count(*args) -> None:
        nonlocal n_fetched
        n_fetched += 1
        download(*args)

    monkeypatch.setattr(Steps, "download_logits", count)
    sampling = SamplingParams(**({"max_tokens": 8, "ignore_eos": True, "seed": 3} | params))
    with Engine.open(small, config(hot_k=3)) as engine:
        assert isinstance(engine._program, CUDAProgram)
        drawn = engine.generate(PROMPT, sampling)
        n_while_drawing = n_fetched
        engine._forward.draws = False
        chosen = engine.generate(PROMPT, sampling)
    assert drawn.token_ids == chosen.token_ids
    assert drawn.logprobs == chosen.logprobs
    assert n_while_drawing == (0 if draws else 8)


def test_the_cache_works_while_steps_run(small: Path, expected_of_small, driver, monkeypatch) -> None:
    """Where memory is pinned and a CPU is left; swaps, counts and text as in the thread that runs the steps."""
    driver.set(order="random", copy_us=300)
    found = {}
    for n_logical in (1, 64):
        monkeypatch.setattr("engine.devices.cuda.program.n_logical_cpus", lambda n=n_logical: n)
        loaded = replace(config(hot_k=3, policy="lru"), model=ModelSettings(load="memory"))
        with Engine.open(small, loaded) as engine:
            assert engine._program.leaves_a_cpu == (n_logical > 2)
            assert engine.generate(PROMPT, GREEDY).token_ids == expected_of_small
            statistics = engine.statistics.cache
            assert statistics is not None
            assert statistics.n_tokens == len(engine.prompt_ids(PROMPT)) + GREEDY.max_tokens - 1
            assert statistics.n_loads > 0
            found[n_logical] = statistics
            engine._caching.cache.table.check_integrity()
    assert found[1].choices.tolist() == found[64].choices.tolist()


@pytest.fixture
def in_background(monkeypatch) -> EngineConfig:
    """Settings with which a thread moves experts while steps run, and steps are begun ahead."""
    monkeypatch.setattr("engine.devices.cuda.program.n_logical_cpus", lambda: 64)
    return replace(config(hot_k=3, policy="lru"), model=ModelSettings(load="memory"))


@pytest.mark.parametrize("hot_k", ["auto", 3])
def test_steps_that_decode_are_begun_ahead(
    hot_k: str | int, small: Path, expected_of_small, in_background, driver, monkeypatch
) -> None:
    """All but the first and those that might not be needed; one answer or several, whatever else there is to do."""
    driver.set(order="random", copy_us=300)
    launch, n_behind = Steps.launch, 0

    def count(steps: Steps, size: int, buffer: int, *, behind: bool = False) -> None:
        nonlocal n_behind
        n_behind += behind
        launch(steps, size, buffer, behind=behind)

    monkeypatch.setattr(Steps, "launch", count)
    settings = replace(in_background, moe=replace(in_background.moe, hot_k=hot_k))
    settings = replace(settings, engine=replace(settings.engine, n_sequences=2))
    with Engine.open(small, settings) as engine:
        assert engine.generate(PROMPT, GREEDY).token_ids == expected_of_small
        assert n_behind == GREEDY.max_tokens - 2
        answers = dict(engine.generate_many([PROMPT, PROMPT[:7], PROMPT], GREEDY))
        assert answers[0].token_ids == answers[2].token_ids == expected_of_small
        stream = engine.generate(PROMPT, GREEDY, stream=True)
        assert [next(stream).token_id for _ in range(3)] == list(expected_of_small[:3])
        assert engine.generate(PROMPT[:7], GREEDY).token_ids == answers[1].token_ids
        assert list(stream)[-1].completion.token_ids == expected_of_small
        stream = engine.generate(PROMPT, GREEDY, stream=True)
        for _ in range(3):
            next(stream)
    with pytest.raises(RequestError, match="closed"):
        list(stream)
    assert n_behind > 3 * (GREEDY.max_tokens - 2)


def test_ctrl_c_while_steps_are_under_way(small: Path, in_background, driver) -> None:
    """At any line of what begins them and waits for them: the same engine then gives the same text."""
    driver.set(order="random", copy_us=100)
    modules, but_for = [cuda_program, misses], {"drop", "abandon", "copy_expert", "fence", "is_done", "publish"}
    with Engine.open(small, in_background) as engine:
        request = PROMPT[:3], replace(GREEDY, max_tokens=4)
        expected = engine.generate(*request).token_ids
        at_line, n_raised = 20, 0
        while True:
            with Interrupter(at_line, modules, but_for) as interrupter:
                try:
                    engine.generate(*request)
                except KeyboardInterrupt:
                    n_raised += 1
            assert engine.generate(*request).token_ids == expected
            if not interrupter.raised:
                break
            at_line += 43
    assert n_raised > 5


def test_the_bench_says_where_the_time_of_a_token_goes(small: Path) -> None:
    with Engine.open(small, config(hot_k=3)) as engine:
        (row,) = measure(engine, "hot experts", [3], 4, 1, lambda *_: None)
    placed = row.placed
    assert placed is not None
    parts = placed.device_s, placed.cpu_s, placed.other_s
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(1 / row.decode_tok_s.median)


def test_it_is_measured_how_gpu_and_cpu_share_the_time(small: Path) -> None:
    with Engine.open(small, config(hot_k=3)) as engine:
        engine.generate(PROMPT, GREEDY)
        before = engine.statistics
        engine.generate(PROMPT[::-1], replace(GREEDY, max_tokens=3))
        now = engine.statistics
    assert now.layer_times is not None
    assert before.layer_times is not None
    times = now.layer_times - before.layer_times
    assert times.n_tokens == 2  # the first token comes out of the prompt
    assert (times.cpu > 0).any()
    assert ((times.device > 0) == (times.cpu > 0)).all()  # layers that found all they needed in slots did not ask
    out = Console(width=200, record=True, file=io.StringIO())
    out.print(layer_table("answer", now, before))
    text = " ".join(out.export_text().split())
    assert "until the CPU is asked" in text
    assert "of what it was asked for had been guessed" in text


@pytest.mark.parametrize("moe", [{"hot_k": 0}, {"hot_k": 12}, {"n_cpu_moe": 6}], ids=str)
def test_the_cpu_guesses_what_it_will_be_asked_for(moe: dict, expected) -> None:
    with Engine.open(config=config(**moe)) as engine:
        assert engine.generate(PROMPT, GREEDY).token_ids == expected
        assert engine.statistics.layer_times is not None
        n_asked, n_guessed = engine.statistics.layer_times.guesses
        n_experts, n_used = engine.spec.moe.n_experts, engine.spec.moe.n_experts_used
    assert n_asked > 0
    assert 2 * n_used / n_experts < n_guessed / n_asked < 1  # far more than chance, and not what was asked itself


@pytest.mark.parametrize("moe", [{"fetch_ahead": False}, {"hot_k": "auto"}], ids=str)
def test_nobody_guesses_unless_the_cpu_takes_part_and_may(moe: dict, small: Path, expected_of_small) -> None:
    with Engine.open(small, config(**{"hot_k": 3, **moe})) as engine:
        assert engine.generate(PROMPT, GREEDY).token_ids == expected_of_small
        times = engine.statistics.layer_times
    assert times is not None
    assert times.guesses.tolist() == [0, 0]


@pytest.mark.parametrize("moe", [{"hot_k": 0}, {"hot_k": 9}, {"n_cpu_moe": 5}], ids=str)
def test_closing_frees_the_weights_at_once(moe: dict, monkeypatch) -> None:
    """Also while the closed engine is still held: the next one may need the memory."""
    allocated = []
    allocate = weights._allocate

    def watch(*args):
        memory = allocate(*args)
        allocated.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(weights, "_allocate", watch)
    with Engine.open(config=replace(config(**moe), model=ModelSettings(load="memory"))) as engine:
        engine.generate(PROMPT[:4], replace(GREEDY, max_tokens=2))
        assert [memory() is not None for memory in allocated] == [True]
    assert allocated[0]() is None
    assert engine.statistics.n_requests == 1


def test_auto_takes_the_gpu_and_says_so(caplog) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    with Engine.open(config=config("auto", hot_k=4)):
        pass
    assert "; CUDA: stand-in device" in caplog.text
    assert "(found)" in caplog.text
    assert "hot-expert cache: 4 of 56 experts" in caplog.text
    assert 'through pinned buffers: the weights are mapped from the file ([model] load = "mmap")' in caplog.text


def test_it_says_how_prompts_are_streamed(caplog) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    loaded = replace(config(hot_k=4, hot_pp_bypass_n_tokens=5, stream_n_tokens=5), model=ModelSettings(load="memory"))
    with Engine.open(config=loaded):
        pass
    assert (
        "straight from where they lie; steps of 5 to 32 tokens of a prompt stream those without a slot" in caplog.text
    )


def test_without_a_gpu_auto_takes_the_cpu_and_says_why(caplog, driver) -> None:
    caplog.set_level(logging.INFO, logger="engine")
    driver.set(n_devices=0)
    with Engine.open(config=config("auto", hot_k=4)):
        pass
    assert "CPU, 2 threads" in caplog.text
    assert "no GPU is used: no GPU was found; check nvidia-smi" in caplog.text
    assert "moe.hot_k has no effect" in caplog.text
    with pytest.raises(DeviceError, match=r"device is 'cuda', but no GPU was found"):
        Engine.open(config=config())


def test_a_missing_compiler_names_the_package(monkeypatch) -> None:
    def missing() -> None:
        raise DeviceError("NVIDIA's run-time compiler cannot be loaded (none); pip install nvidia-cuda-nvrtc-cu12")

    monkeypatch.setattr(jit, "_load_nvrtc", missing)
    monkeypatch.setattr("engine.devices.cuda.runtime.NVRTCCompiler", jit.NVRTCCompiler)
    with pytest.raises(DeviceError, match="pip install nvidia-cuda-nvrtc-cu12"):
        Engine.open(config=config())


@pytest.mark.parametrize(
    ("call", "nth"),
    [
        ("cuMemAlloc", 2),
        ("cuMemHostAlloc", 3),
        ("cuMemHostAlloc", 9),
        ("cuMemHostGetDevicePointer", 1),
        ("cuMemHostGetDevicePointer", 20),
        ("cuStreamCreate", 3),
        ("cuEventCreate", 40),
        ("cuModuleLoadData", 5),
        ("cuMemcpyHtoDAsync", 9),
        ("cuGraphInstantiate", 2),
    ],
)
def test_whatever_fails_while_opening_frees_everything(call: str, nth: int, small: Path, driver) -> None:
    driver.fail(call, nth, "CUDA_ERROR_OUT_OF_MEMORY")
    loaded = replace(config(hot_k=4, stream_n_tokens=5), model=ModelSettings(load="memory"))
    with pytest.raises(DeviceError, match=f"{call}.* failed: CUDA_ERROR_OUT_OF_MEMORY"):
        Engine.open(small, loaded)


@pytest.mark.parametrize("what", ["WeightMemory.load", "ExpertCaching", "Scheduler"])
def test_what_fails_around_the_device_frees_it(what: str, small: Path, monkeypatch) -> None:
    monkeypatch.setattr(f"engine.runtime.engine.{what}", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Engine.open(small, config())


@pytest.mark.parametrize("call", ["cuGraphExecDestroy", "cuStreamDestroy", "cuEventDestroy", "cuModuleUnload"])
def test_what_fails_while_closing_is_told_and_all_else_is_freed(call: str, small: Path, driver) -> None:
    engine = Engine.open(small, config(hot_k=4))
    driver.fail(call, 1, "CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceError, match=f"{call} failed: CUDA_ERROR_LAUNCH_FAILED"):
        engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("n_sequences", "max_batch_tokens", "stream_n_tokens"), [(9, 16, 8), (2, 1, 1 << 20), (4, 2, 1 << 20)]
)
def test_there_may_be_more_sequences_than_tokens_in_a_step(
    n_sequences: int, max_batch_tokens: int, stream_n_tokens: int, small: Path, expected_of_small, monkeypatch
) -> None:
    """Also where a step is begun behind the one before, for which there are launches of their own."""
    monkeypatch.setattr(cuda_program, "n_logical_cpus", lambda: 16)
    settings = config(hot_k=4, stream_n_tokens=stream_n_tokens, hot_pp_bypass_n_tokens=1)
    sizes = {"n_sequences": n_sequences, "max_batch_tokens": max_batch_tokens}
    settings = replace(settings, model=ModelSettings(load="memory"), engine=replace(settings.engine, **sizes))
    with Engine.open(small, settings) as engine:
        assert engine._forward.runs_ahead
        assert engine.generate(PROMPT, GREEDY).token_ids == expected_of_small
        answers = dict(engine.generate_many([PROMPT] * n_sequences, GREEDY))
    assert {answer.token_ids for answer in answers.values()} == {expected_of_small}


def test_info_looks_at_the_gpu_and_leaves_it_as_it_was(capsys: pytest.CaptureFixture[str], driver) -> None:
    assert main(["info", "--json", "-c", "32", "--vram-budget", "10MB"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["GPU"] == probe().description
    assert facts["VRAM_free_bytes"] == 10_000_000
    assert 0 < facts["share_of_experts_in_VRAM"] < 1
    assert facts["decode_tok_s_expected"] > 0
    assert facts["VRAM_bandwidth_GB_s"] > 0
    driver.set(n_devices=0)
    assert main(["info", "--json"]) == 0
    assert "no GPU was found" in json.loads(capsys.readouterr().out)["GPU"]
