"""Predictions: made-up routing behaves like recorded routing, and more bandwidth or memory is never slower."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.__main__ import main
from engine.bench.plan import measure_on_gpu, predict, predict_wish
from engine.config import EngineConfig, EngineSettings, MoESettings, SamplingParams
from engine.data import tiny_model_path
from engine.devices.footprint import measure
from engine.devices.graph import KVType
from engine.devices.placement import Wish, longest_step
from engine.devices.program import Limits
from engine.devices.timing import Bandwidths, Machine, StepWork, streaming_pays_from, time_step
from engine.experts.policy import make_policy
from engine.experts.replay import Clairvoyant, replay
from engine.experts.routing_process import RoutingProcess
from engine.experts.twins import Twins
from engine.gguf.reader import GGUFFile
from engine.models import load_model
from engine.runtime import Engine
from engine.synthetic import open_model_file

MACHINE = Machine(Bandwidths(60e9, 25e9, 900e9), 24 * 10**9)


@pytest.fixture(scope="module")
def trace():
    return RoutingProcess(16, 256, 8, seed=1).trace(100, 250)


# -- made-up routing -------------------------------------------------------------------------------------------------


def test_made_up_routing_is_valid_and_repeatable(trace) -> None:
    ids = trace.ids
    assert ids.shape == (350, 16, 8)
    assert int(ids.max()) < 256
    assert (np.sort(ids, axis=2)[:, :, 1:] != np.sort(ids, axis=2)[:, :, :-1]).all()  # no expert twice
    again = RoutingProcess(16, 256, 8, seed=1)
    one_by_one = np.concatenate([again.next_tokens(1) for _ in range(100)])
    assert (one_by_one == ids[:100]).mean() > 0.999  # sums in another order may tell equal experts apart
    assert not np.array_equal(RoutingProcess(16, 256, 8, seed=2).next_tokens(1)[0], ids[0])


def test_made_up_routing_is_as_repetitive_as_recorded_routing(trace) -> None:
    a, b = trace.ids[:-1], trace.ids[1:]
    overlap = (a[:, :, :, None] == b[:, :, None, :]).any(3).mean()
    assert 0.37 < overlap < 0.52
    n_slots = np.full(16, 57)
    lru = replay(trace, make_policy("lru", 16, 256), n_slots).hit_rate
    belady = replay(trace, Clairvoyant(trace), n_slots).hit_rate
    assert 0.70 < lru < 0.87
    assert lru + 0.03 < belady < 0.95


def test_twins_are_found_where_they_were_put() -> None:
    process = RoutingProcess(48, 128, 8, twins=True, seed=5)
    twins = Twins(48, 128)
    for chosen in process.next_tokens(120):
        twins.observe(chosen)
    assert set(range(20, 42)) <= set(twins.layers.tolist())
    assert (twins.of[20:30] == np.arange(8, 18)).all()
    assert 0.5 < twins.agreement[20:42].mean() < 0.75
    none = Twins(16, 128)
    process = RoutingProcess(16, 128, 8, seed=5)
    for chosen in process.next_tokens(120):
        none.observe(chosen)
    assert not len(none.layers)


# -- predictions -----------------------------------------------------------------------------------------------------


def test_values_that_are_part_of_keys_are_stored_once_on_a_gpu(data: Path) -> None:
    limits = Limits(64, 2, 256, KVType.F16)
    for name, has_such in (("glm-dsa", True), ("dbrx", False)):
        with GGUFFile.open(data / "peers" / f"{name}-F32.gguf") as file:
            graph = load_model(file).graph
        on_cpu, on_gpu = measure(graph, limits), measure(graph, limits, stores_once=True)
        assert on_gpu.state_bytes >= 256 * sum(on_gpu.stretches) == 256 * sum(on_cpu.stretches)
        assert (on_cpu.state_bytes > on_gpu.state_bytes) == has_such
        assert (on_cpu.attention_bytes(255) > on_gpu.attention_bytes(255)) == has_such


@pytest.fixture(scope="module")
def footprint():
    model_file = open_model_file("synthetic:qwen3-30b-a3b")
    try:
        return measure(load_model(model_file).graph, Limits(512, 1, 8192, KVType.F16))
    finally:
        model_file.close()


def test_the_cache_beats_whole_layers_and_these_the_cpu(footprint, trace) -> None:
    cpu, layers, hot = predict(MACHINE, lambda _: footprint, 8 * 10**9, trace, 1000)
    assert cpu.decode_tok_s < layers.decode_tok_s < hot.decode_tok_s
    assert cpu.hit_rate == 0
    assert 0.2 < layers.hit_rate < 0.5 < hot.hit_rate < 1
    assert max(p.vram_bytes for p in (cpu, layers, hot)) <= 8 * 10**9
    assert cpu.decode_tok_s < 60e9 / footprint.chosen_bytes


def test_prompts_are_run_in_steps_as_long_as_the_memory_allows(trace) -> None:
    model_file = open_model_file("synthetic:qwen3-30b-a3b")
    try:
        graph, limits = load_model(model_file).graph, Limits(512, 1, 8192, KVType.F16)
        little, much = (replace(MACHINE, vram_bytes=megabytes * 10**6) for megabytes in (2000, 12_000))
        small, large = (measure_on_gpu(graph, limits, machine, Wish()) for machine in (little, much))
        assert measure_on_gpu(graph, replace(limits, context_length=1500), much, Wish()).max_tokens == 1500
    finally:
        model_file.close()
    assert (small.max_tokens, large.max_tokens) == (4096, 8192)
    assert small.long_scratch_bytes < large.long_scratch_bytes < 10**9  # logits are kept for 512 tokens only
    assert small.scratch_bytes == large.scratch_bytes < small.long_scratch_bytes
    slow, fast = [predict_wish(MACHINE, size, 12 * 10**9, Wish(hot_k=0), trace, 1000) for size in (small, large)]
    assert slow.decode_tok_s == fast.decode_tok_s
    assert 1.5 * slow.prompt_tok_s < fast.prompt_tok_s < 2 * slow.prompt_tok_s  # one pass for twice as many


def test_long_steps_take_what_slots_get_back_and_leave_experts_that_stay() -> None:
    layers = np.full(10, 100)

    def longest(left: int, wish: Wish = Wish(), taken: int = 0) -> int:  # noqa: B008, it is never changed
        return longest_step(800, 100, left, layers, wish, lambda n: (n - 100, taken))

    assert [longest(left) for left in (150, 300, 700, 950)] == [100, 200, 400, 400]  # half of it
    assert [longest(left) for left in (1000, 1100, 1300, 1700)] == [100, 200, 400, 800]  # beside all experts
    assert longest(1700, Wish(hot_k=4)) == 800
    assert [longest(950, taken=n) for n in (20, 25)] == [400, 400 // 2]  # eight times as dear
    whole = [longest(left, Wish(n_cpu_moe=4)) for left in (600, 700, 900, 1600, 3200)]
    assert whole == [100, 200, 400, 800, 800]  # what is beside six layers, or a sixteenth
    assert longest(1600, Wish(n_cpu_moe=0)) == longest(1600)


def test_whole_layers_are_as_many_as_fit_beside_the_steps_they_get(footprint, trace) -> None:
    """What layers on the CPU leave free may go to longer steps, beside which one layer less fits."""
    layer_bytes = int(footprint.expert_bytes[0]) * footprint.n_experts
    longer = replace(footprint, scratch=tuple((n, n_bytes + layer_bytes) for n, n_bytes in footprint.scratch))
    found = predict(MACHINE, lambda wish: longer if wish.n_cpu_moe else footprint, 8 * 10**9, trace, 1000)[1]
    shorter, expected = (predict(MACHINE, lambda _, f=f: f, 8 * 10**9, trace, 1000)[1] for f in (footprint, longer))
    assert shorter.setting != expected.setting == found.setting


def test_with_room_for_everything_both_are_the_same(footprint, trace) -> None:
    _, layers, hot = predict(MACHINE, lambda _: footprint, 24 * 10**9, trace, 1000)
    assert layers.hit_rate == hot.hit_rate == 1
    assert layers.decode_tok_s == hot.decode_tok_s
    assert layers.setting == "n_cpu_moe = 0"


def test_more_memory_or_bandwidth_is_faster(footprint, trace) -> None:
    def speed(machine: Machine, gigabytes: int) -> float:
        return predict(machine, lambda _: footprint, gigabytes * 10**9, trace, 1000)[2].decode_tok_s

    base = speed(MACHINE, 6)
    assert speed(MACHINE, 9) > base
    assert speed(replace(MACHINE, bandwidths=Bandwidths(90e9, 25e9, 900e9)), 6) > base
    assert speed(replace(MACHINE, handshake_s=100e-6), 6) < base


def test_the_prediction_is_what_the_emulated_device_then_does() -> None:
    """One model of time behind both: decoding on the CPU's experts alone has no routing in it that could differ."""
    config = EngineConfig(
        engine=EngineSettings(device="emulated", context_length=256, max_batch_tokens=64, n_threads=2, max_drafts=0),
        moe=MoESettings(hot_k=0),
    )
    with Engine.open(config=config) as engine:
        answer = engine.generate([7] * 100, SamplingParams(max_tokens=21, temperature=0.0, ignore_eos=True))
        measured = answer.timings.decode_tok_s
    model_file = open_model_file(tiny_model_path())
    try:
        footprint = measure(load_model(model_file).graph, Limits(64, 1, 256, KVType.F16))
    finally:
        model_file.close()
    trace = RoutingProcess(8, 56, 4).trace(8, 8)
    machine = Machine(Bandwidths(60e9, 25e9, 900e9), 24 * 10**9)
    assert predict(machine, lambda _: footprint, 10**9, trace, 110)[0].decode_tok_s == pytest.approx(measured, rel=1e-3)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_what_others_measured_beside_its_prediction(capsys) -> None:
    assert main(["plan", "-q", "-m", "synthetic:qwen3.5-122b-a10b@q4_k_l:layers=8", "--machine", "4090"]) == 0
    shown = capsys.readouterr().out
    assert all(figure in shown for figure in ("15.65", "17.87", "22.67", "predicted, not measured", "use [moe]"))


def test_the_command_writes_json_for_a_machine_of_ones_own(capsys) -> None:
    figures = ["--vram", "14MB", "--ram", "1GB", "--ram-bandwidth", "10GB/s", "--pcie", "5GB/s"]
    assert main(["plan", "-q", "--json", *figures, "--vram-bandwidth", "100GB/s", "-c", "128"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["setting"] for row in rows][0::2] == ["hot_k = 0", 'hot_k = "auto"']
    assert rows[0]["step"]["wait_s"] > 0
    assert main(["plan", "-q", *figures]) == 2
    assert "--vram-bandwidth: missing" in capsys.readouterr().err


def test_a_trace_can_be_replayed_whatever_its_shape(data, capsys) -> None:
    trace = data / "traces" / "gpt-oss-120b_chat_bigmoe.npz"
    assert main(["plan", "-q", "--machine", "4090", "--vram", "20MB", "-c", "128", "--trace", str(trace)]) == 0
    assert "gpt-oss" in capsys.readouterr().out


# -- streaming -------------------------------------------------------------------------------------------------------


def test_streaming_pays_where_the_cpu_gets_slower_than_the_link() -> None:
    """By hand: 100 bytes over a link of 10 take 10 s; the CPU has its 100 MACs done for n / 8 experts in n / 8 s."""
    slow_link = Bandwidths(ram=1000.0, pcie=10.0, vram=1e6)
    assert streaming_pays_from(slow_link, 100.0, 100.0, 100.0, 1 / 8) == 80
    assert streaming_pays_from(slow_link, 200.0, 100.0, 100.0, 1 / 8) == 160
    fast_link = Bandwidths(ram=50.0, pcie=100.0, vram=1e6)  # half of the experts are chosen by 0.875^n = 0.5: n = 5.2
    assert streaming_pays_from(fast_link, 1e9, 100.0, 100.0, 1 / 8) == 6
    assert streaming_pays_from(fast_link, 1e9, 100.0, 100.0, 1.0) == 10**7


def test_steps_that_stream_are_those_for_which_it_is_quicker(footprint) -> None:
    """The same threshold by the clock of all predictions, for a model whose every expert is in RAM."""
    threshold = footprint.streaming_pays_from(MACHINE.bandwidths, MACHINE.cpu_macs)
    n_layers = len(footprint.expert_bytes)
    for n, streams in ((threshold // 2, False), (2 * threshold, True)):
        chosen = footprint.n_experts * (1 - (1 - footprint.experts_used / footprint.n_experts) ** n)
        work = StepWork(
            n_layers=footprint.n_layers,
            dense_bytes=0.0,
            attention_bytes=0.0,
            dense_macs=0.0,
            hit_bytes=np.zeros(n_layers),
            hit_macs=np.zeros(n_layers),
            miss_bytes=chosen * footprint.expert_bytes.astype(float),
            miss_macs=n * footprint.experts_used.astype(float) * footprint.expert_macs,
            streamed_bytes=np.zeros(n_layers),
        )
        sent = float(footprint.expert_total_bytes) / MACHINE.bandwidths.pcie
        assert (time_step(MACHINE, work).total_s > sent) == streams
