"""Times an engine: prompt and answer apart, as somebody has them who reads the answer token by token.

Random tokens are a prompt that a bench can give every program alike; where a cache of experts is measured it is text,
as experts have favourites in text alone. Answers are drawn, the same ones wherever experts are, and end tokens mean
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np

from engine.bench.limits import read_bandwidth
from engine.config import SamplingParams
from engine.devices.timing import Bandwidths, LayerTimes, Machine, StepWork, Traffic, time_step, traffic_of
from engine.experts.hot_cache import CacheStatistics
from engine.machine import resident_bytes
from engine.runtime import Engine

Progress = Callable[[str, int, int], None]  # what, done, in all

COLD_TOKENS = 16  # of an answer, in which a cache that was just filled has learned little
_WARM_UP = 8  # tokens


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Sum up samples, of which there must be one."""
        return cls(median(samples), min(samples), max(samples))


@dataclass(frozen=True, slots=True)
class Placed:
    """What a row says more where experts are placed on a device with memory of its own. Of decoding, all runs together.

    Attributes:
        vram_bytes: memory of the device in use.
        hit_rate: share of the chosen experts that were read from it.
        swaps: experts copied into slots for a token.
        ram_bytes_s, link_bytes_s, vram_bytes_s: read from RAM, sent over PCIe and read from VRAM in a second.
        cold_tok_s: tokens a second of the first tokens after the start, `COLD_TOKENS` at most.
        first_turn_tok_s: of the whole first run.
        steady_tok_s: of all later ones together; of the first if there is no other.
        share_of_limit: time that the memories need for those bytes, in the order in which a token needs them, over the
            time it took: what `engine plan` computes with the measured bandwidths, without its fixed costs. RAM's are
            those around each run.
        device_s, cpu_s, other_s: of a token, while the CPU had nothing to do until it was asked for experts, until it
            had answered, and for all else; 0 if the device does not measure it.
        is_virtual: times are those of a virtual clock.
    """

    vram_bytes: int
    hit_rate: float
    swaps: float
    ram_bytes_s: float
    link_bytes_s: float
    vram_bytes_s: float
    cold_tok_s: float
    first_turn_tok_s: float
    steady_tok_s: float
    share_of_limit: float
    device_s: float
    cpu_s: float
    other_s: float
    is_virtual: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run a model, measured: a line of the table.

    Attributes:
        name: what ran.
        n_prompt, n_gen: tokens of prompt and answer.
        prompt_tok_s, decode_tok_s: tokens a second.
        first_token_s: from the start of the prompt to the choice of the first token.
        ram_bytes: held by the process afterwards, mapped pages included.
        token_bytes: weights that making one token reads; 0 if not known.
        read_bandwidth: of the RAM, bytes a second around each run; None where the clock is a virtual one.
        note: what a reader must know to compare.
        placed: where experts are placed, for devices with memory of their own.
        gains: in decode speed over other rows, by what those are called in a table.
    """

    name: str
    n_prompt: int
    n_gen: int
    prompt_tok_s: Spread
    first_token_s: Spread
    decode_tok_s: Spread
    ram_bytes: int
    token_bytes: int
    read_bandwidth: Spread | None = None
    note: str = ""
    placed: Placed | None = None
    gains: Mapping[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Return the bytes of weights a second that decoding read."""
        return self.token_bytes * self.decode_tok_s.median


@dataclass(frozen=True, slots=True)
class CacheWork:
    """What the expert cache did in one run, and the bytes that all its tokens moved."""

    hits: int
    choices: int
    n_loads: int
    work: StepWork


@dataclass(frozen=True, slots=True)
class Sample:
    """One run, in seconds; `cold_s` are those of the first `COLD_TOKENS` tokens of `decode_s`, 0 if not known.

    `device_s` and `cpu_s` are parts of `decode_s`, as in `Placed`; `read_bandwidth` is that of the RAM just before and
    after, 0 if not measured.
    """

    prompt_s: float
    first_token_s: float
    decode_s: float
    cold_s: float = 0.0
    device_s: float = 0.0
    cpu_s: float = 0.0
    cache: CacheWork | None = None
    read_bandwidth: float = 0.0


def random_tokens(n: int, n_vocab: int) -> list[int]:
    """Return token ids, the same for the same arguments."""
    ids: list[int] = np.random.Generator(np.random.PCG64(1)).integers(0, n_vocab, n).tolist()
    return ids


def summarise(name: str, samples: Sequence[Sample], n_prompt: int, n_gen: int, token_bytes: int, note: str = "") -> Row:
    """Make a row of the runs of one kind."""
    return Row(
        name,
        n_prompt,
        n_gen,
        Spread.of([n_prompt / s.prompt_s for s in samples]),
        Spread.of([s.first_token_s for s in samples]),
        Spread.of([n_gen / s.decode_s for s in samples]),
        resident_bytes(),
        token_bytes,
        Spread.of([s.read_bandwidth for s in samples]) if samples[0].read_bandwidth else None,
        note,
    )


def with_bandwidth(run: Callable[[], Sample], n_threads: int, buffer_bytes: int) -> Sample:
    """Make a run, and measure the RAM's bandwidth before and after it: a minute later it may be another one."""
    before = read_bandwidth(n_threads, buffer_bytes)
    sample = run()
    return replace(sample, read_bandwidth=(before + read_bandwidth(n_threads, buffer_bytes)) / 2)


Prompts = Callable[[int, int], Sequence[int]]  # (repetition, how many tokens) -> ids


def measure(
    engine: Engine,
    name: str,
    prompt_lengths: Sequence[int],
    n_gen: int,
    reps: int,
    progress: Progress,
    prompts: Prompts | None = None,
    limits: Bandwidths | None = None,
) -> list[Row]:
    """Time an engine; return a row for each prompt length, in the order given.

    Without `prompts` they are random. `limits` are what rows are compared with; None for what the engine measured. The
    RAM's is measured around each run, unless the engine's clock is a virtual one.
    """
    config, is_virtual = engine.config, engine.statistics.has_virtual_clock
    ram = config.engine.n_threads, config.bench.bandwidth_mb << 20
    chosen = prompts or (lambda _, n: random_tokens(n, engine.spec.n_vocab))
    if prompts is None:  # first use of threads and pages
        _run(engine, random_tokens(min(_WARM_UP, prompt_lengths[0]), engine.spec.n_vocab), min(_WARM_UP, n_gen), 0)
    samples: dict[int, list[Sample]] = {n: [] for n in prompt_lengths}
    total, done = reps * len(prompt_lengths), 0
    for rep in range(reps):  # repetitions go round, so that a slow minute of the machine does not hit one length alone
        for n_prompt in prompt_lengths:
            progress(f"{name}, {n_prompt} + {n_gen} tokens", done, total)
            run = partial(_run, engine, chosen(rep, n_prompt), n_gen, rep)
            samples[n_prompt].append(run() if is_virtual else with_bandwidth(run, *ram))
            done += 1
    progress(name, total, total)
    token_bytes = engine.statistics.weights.token_bytes
    rows = [summarise(name, samples[n], n, n_gen, token_bytes) for n in prompt_lengths]
    return [replace(row, placed=_placed(engine, samples[row.n_prompt], n_gen, limits)) for row in rows]


def sampling(n_tokens: int, seed: int) -> SamplingParams:
    """Return how answers that are measured are drawn: any token may come, and none ends them early."""
    return SamplingParams(max_tokens=n_tokens, temperature=1.0, top_p=1.0, seed=seed, ignore_eos=True)


def _run(engine: Engine, prompt: Sequence[int], n_gen: int, seed: int) -> Sample:
    """Read an answer: its first token, and so many after it."""
    params = sampling(1 + n_gen, seed)
    with engine.new_session() as session:
        start = engine.now()
        chunks = session.generate(prompt, params, stream=True)
        next(chunks)
        first, before = engine.now(), engine.statistics
        ends = []
        for chunk in chunks:
            if chunk.completion is None:
                ends.append(engine.now())
            else:
                prompt_s = chunk.completion.timings.prompt_s
    cold, positions = ends[min(COLD_TOKENS, len(ends)) - 1], range(len(prompt), len(prompt) + n_gen)
    work = _cache_work(engine, before.cache, positions)
    times = _seconds(engine.statistics.layer_times, before.layer_times)
    return Sample(prompt_s, first - start, ends[-1] - first, cold - first, *times, work)


def _seconds(now: LayerTimes | None, before: LayerTimes | None) -> tuple[float, float]:
    """Return how long the device and the CPU worked between two looks; zeros if nobody measured it."""
    if now is None or before is None:
        return 0.0, 0.0
    times = now - before
    return float(times.device.sum()), float(times.cpu.sum())


def _cache_work(engine: Engine, before: CacheStatistics | None, positions: range) -> CacheWork | None:
    """Return what the cache did for tokens that were run one by one, and what of model and cache was moved for them."""
    after, footprint = engine.statistics.cache, engine.footprint
    if before is None or after is None:
        return None
    hits, choices = after.hits - before.hits, after.choices - before.choices
    nothing = np.zeros(len(hits))
    work = StepWork(
        n_layers=footprint.n_layers,
        dense_bytes=float(len(positions) * footprint.read_bytes),
        attention_bytes=float(sum(footprint.attention_bytes(position) for position in positions)),
        dense_macs=0.0,
        hit_bytes=(hits * footprint.expert_bytes).astype(np.float64),
        hit_macs=nothing,
        miss_bytes=((choices - hits) * footprint.expert_bytes).astype(np.float64),
        miss_macs=nothing,
        streamed_bytes=nothing,
        copied_bytes=float(after.loaded_bytes - before.loaded_bytes),
    )
    return CacheWork(int(hits.sum()), int(choices.sum()), after.n_loads - before.n_loads, work)


def _limit_s(work: StepWork, speeds: Bandwidths) -> float:
    """Return the seconds that some work takes if nothing but the memories' bandwidths holds it back."""
    return time_step(Machine(speeds, 0, handshake_s=0.0, layer_s=0.0), work).total_s


def _placed(engine: Engine, samples: Sequence[Sample], n_gen: int, limits: Bandwidths | None) -> Placed | None:
    works = [sample.cache for sample in samples if sample.cache is not None]
    statistics = engine.statistics
    limits = limits or statistics.bandwidths
    if not works or limits is None:
        return None
    seconds = sum(sample.decode_s for sample in samples)
    later, n_tokens = samples[1:] or samples, n_gen * len(samples)
    device_s, cpu_s = sum(sample.device_s for sample in samples), sum(sample.cpu_s for sample in samples)
    moved = sum((traffic_of(work.work) for work in works), Traffic())
    speeds = [replace(limits, ram=sample.read_bandwidth or limits.ram) for sample in samples]
    least = sum(_limit_s(work.work, speed) for work, speed in zip(works, speeds, strict=True))
    return Placed(
        statistics.device_bytes,
        sum(work.hits for work in works) / max(sum(work.choices for work in works), 1),
        sum(work.n_loads for work in works) / (n_gen * len(works)),
        moved.ram / seconds,
        moved.link / seconds,
        moved.vram / seconds,
        min(COLD_TOKENS, n_gen) / samples[0].cold_s,
        n_gen / samples[0].decode_s,
        n_gen * len(later) / sum(sample.decode_s for sample in later),
        least / seconds,
        device_s / n_tokens,
        cpu_s / n_tokens,
        (seconds - device_s - cpu_s) / n_tokens if device_s else 0.0,
        statistics.has_virtual_clock,
    )
