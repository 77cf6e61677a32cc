"""The three ways to place experts that are compared, at equal VRAM: on the CPU, in whole layers, and the hot ones."""

from __future__ import annotations

from dataclasses import replace

from engine.bench.measure import COLD_TOKENS, Progress, Prompts, Row, measure, random_tokens, sampling
from engine.cli.terminal import Bars
from engine.config import EngineConfig
from engine.devices.footprint import Footprint
from engine.devices.placement import least_cpu_layers
from engine.errors import DeviceError
from engine.experts.steering import GUESSED, MADE_UP, OWN
from engine.runtime import Engine, EngineStatistics
from engine.synthetic import PREFIX

SMALL_VOCABULARY = 256
SHORT_TEXT = 16  # random tokens that a model goes on after, to make text


def measure_placements(config: EngineConfig, bars: Bars) -> tuple[EngineConfig, EngineStatistics, list[Row]]:
    """Measure the rows "all experts on the CPU", "whole layers on the GPU" and "hot experts on the GPU".

    Returns the settings in use, what the engine of the last row said of itself, and the rows. All three get the VRAM
    that the hot experts take, and the same prompts: text of the model's own, or random ones for a model of random
    weights, whose routers are told whom to choose.
    """
    config = _with_favourites(config)
    hot = replace(config, moe=replace(config.moe, n_cpu_moe=-1))
    prompts = _random_prompts(config) if config.model.path.startswith(PREFIX) else _text(hot, bars)
    with Engine.open(config=hot, progress=bars.loading) as engine:
        found = _measure(engine, f"hot experts ({config.moe.policy})", config, prompts, bars.steps)
        statistics, used, footprint = engine.statistics, engine.config, engine.footprint
    layers = _measure_layers(used, footprint, statistics, prompts, bars)
    cpu = replace(config, moe=replace(config.moe, hot_k=0, n_cpu_moe=-1))
    with Engine.open(config=cpu, progress=bars.loading) as engine:
        on_cpu = _measure(engine, "all experts on the CPU", config, prompts, bars.steps, statistics)
    rows = []
    for cpu_row, layers_row, hot_row in zip(on_cpu, layers, found, strict=True):
        rows += [cpu_row, _compared(layers_row, CPU=cpu_row), _compared(hot_row, CPU=cpu_row, layers=layers_row)]
    return used, statistics, rows


def explain(config: EngineConfig, statistics: EngineStatistics) -> list[str]:
    """Return what a reader of the rows must know."""
    limits = statistics.bandwidths
    notes = [
        statistics.cache_line,
        f"Rows use equal VRAM. cold: the first {COLD_TOKENS} tokens after the start; first turn: the whole first run; "
        "steady: all later ones. gain: in decode speed. swaps: experts copied for a token; of limit: the time the "
        "memories need for the bytes moved, dense weights and experts one after the other, over the time taken.",
    ]
    if statistics.layer_times is not None:
        notes.append(
            "GPU, CPU, other ms: of a token, until the CPU is asked for experts, until it has answered (the GPU "
            "computes its own meanwhile), and all else."
        )
    if limits is not None:
        is_virtual = statistics.has_virtual_clock
        ram = f"{limits.ram / 1e9:.3g}" if is_virtual else "what it gave just before and after each run"
        others = (f"{speed / 1e9:.3g}" for speed in (limits.pcie, limits.vram))
        notes.append("The limits, in GB/s: {} from RAM, {} over PCIe, {} from VRAM.".format(ram, *others))
    if statistics.has_virtual_clock:
        notes.append("All times of this table are a virtual clock's: computed from bytes and bandwidths, not measured.")
    if config.model.path.startswith(PREFIX):
        notes.append(
            f"The weights are random, and so would be the routing; instead it is {_played(config)}. A prompt runs with "
            "its own; the cache is told the played one for the end of it."
        )
        if config.moe.fetch_ahead and not statistics.has_virtual_clock:
            notes.append(
                f"What a layer will ask the CPU for is guessed for {GUESSED:.0%} of the experts, which is played, too: "
                "it is the share of the bundled model, which was trained."
            )
    return notes


def _compared(row: Row, **baselines: Row) -> Row:
    """Return a row with its gains over others."""
    speed = row.decode_tok_s.median
    return replace(row, gains={name: speed / other.decode_tok_s.median - 1 for name, other in baselines.items()})


def _with_favourites(config: EngineConfig) -> EngineConfig:
    """Give a model of random weights routing that has favourites, unless the settings name some."""
    if config.moe.routing == OWN and config.model.path.startswith(PREFIX):
        return replace(config, moe=replace(config.moe, routing=MADE_UP))
    return config


def _played(config: EngineConfig) -> str:
    if config.moe.routing in {OWN, MADE_UP}:
        return "made-up routing, which behaves like that of trained models"
    return f"that of {config.moe.routing}"


def _measure(
    engine: Engine,
    name: str,
    config: EngineConfig,
    prompts: Prompts,
    progress: Progress,
    hot: EngineStatistics | None = None,
) -> list[Row]:
    """Measure one engine; all are compared with the limits that the one with hot experts found, the first."""
    bench, limits = config.bench, hot.bandwidths if hot else None
    return measure(engine, name, bench.prompt_tokens, bench.gen_tokens, bench.reps, progress, prompts, limits)


def _measure_layers(
    used: EngineConfig, footprint: Footprint, hot: EngineStatistics, prompts: Prompts, bars: Bars
) -> list[Row]:
    """Measure with as many whole layers as the hot experts' memory holds."""
    n_layers, budget = len(footprint.expert_bytes), hot.device_bytes
    for n_cpu in range(least_cpu_layers(footprint, budget), n_layers + 1):
        config = replace(
            used,
            engine=replace(used.engine, vram_budget=f"{budget}B"),
            moe=replace(used.moe, hot_k="auto", n_cpu_moe=n_cpu),
        )
        try:
            with Engine.open(config=config, progress=bars.loading) as engine:
                name = f"whole layers (n_cpu_moe = {n_cpu})"
                return _measure(engine, name, used, prompts, bars.steps, hot)
        except DeviceError:
            if n_cpu == n_layers:  # else a device that lays its memory out in larger steps than the plan
                raise
    raise AssertionError("the last number of layers either fits or raises")


def _random_prompts(config: EngineConfig) -> Prompts:
    """Return a source of ids that every vocabulary has; each repetition goes on where the last one ended."""
    longest = max(config.bench.prompt_tokens)
    return lambda rep, n: random_tokens((rep + 1) * longest, SMALL_VOCABULARY)[rep * longest :][:n]


def _text(config: EngineConfig, bars: Bars) -> Prompts:
    """Return a source of text that the model makes up, another one for each repetition."""
    longest, reps = max(config.bench.prompt_tokens), config.bench.reps
    texts: list[list[int]] = []
    with Engine.open(config=config, progress=bars.loading) as engine:
        for rep in range(reps):
            bars.steps("making text", rep, reps)
            prompt = random_tokens(SHORT_TEXT * (rep + 1), engine.spec.n_vocab)[-SHORT_TEXT:]
            n = max(1, longest - SHORT_TEXT)
            texts.append([*prompt, *engine.generate(prompt, sampling(n, rep)).token_ids])
        bars.steps("making text", reps, reps)
    return lambda rep, n: texts[rep][:n]
