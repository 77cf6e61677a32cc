"""How long a step takes on a machine with a GPU, from the bytes it has to read: one model for every prediction.

The emulated device sets its clock by it and `engine plan` predicts with it. In each MoE layer the device reads the
chosen experts that are in its slots while the CPU reads the others from RAM, so the slower of the two counts; dense
weights, keys and values are read by the device alone. A prompt reads each weight once for many tokens and is bounded
by arithmetic, too. Copies into slots read RAM beside the misses and cross PCIe beside everything else. Long prompts
have the experts without a slot sent to the device layer by layer, two layers ahead of the computation: so the slower of
link and computation counts. That the CPU fetches experts ahead while it waits is left out: a token then takes
4 to 10 % less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Speeds of a machine, in bytes a second: reading RAM, copying RAM to VRAM, reading VRAM."""

    ram: float
    pcie: float
    vram: float

    @property
    def break_even(self) -> float:
        """Return how many misses a load must turn into hits to pay for itself; infinite if it never does."""
        gain = 1.0 / self.ram - 1.0 / self.vram
        return 1.0 / (self.ram * gain) if gain > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine with one GPU, in numbers. Bandwidths are what kernels reach, not what the data sheet says.

    Attributes:
        bandwidths: of its memories and of the link.
        vram_bytes: of the GPU.
        handshake_s: what it costs to have the CPU compute some experts of a layer.
        layer_s: what a layer costs the device beside reading weights: small kernels, and gaps between them.
        device_macs: multiply-adds a second with quantised weights, on the device, in prompts with all that is around
            them; by default what the kernels reach on an H200.
        cpu_macs: likewise, on the CPU.
    """

    bandwidths: Bandwidths
    vram_bytes: int
    handshake_s: float = 6e-6
    layer_s: float = 30e-6
    device_macs: float = 50e12
    cpu_macs: float = 16 * 40e9


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step has to do; arrays are float64 [n_moe_layers].

    Attributes:
        n_layers: of the model.
        dense_bytes: weights that the device reads whatever is routed where.
        attention_bytes: keys, values and states that it reads.
        dense_macs: multiply-adds with dense weights, of all tokens.
        hit_bytes: experts read on the device.
        hit_macs: multiply-adds with them.
        miss_bytes: experts read by the CPU.
        miss_macs: multiply-adds with them.
        streamed_bytes: experts sent to the device for this step alone (a long prompt), among the hits as well.
        copied_bytes: experts that were copied into slots meanwhile.
    """

    n_layers: int
    dense_bytes: float
    attention_bytes: float
    dense_macs: float
    hit_bytes: Bytes
    hit_macs: Bytes
    miss_bytes: Bytes
    miss_macs: Bytes
    streamed_bytes: Bytes
    copied_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Where the time of one or more steps goes, in seconds.

    Attributes:
        dense_s: dense layers, on the device.
        attention_s: keys, values and states, on the device.
        hits_s: the device computes experts, and nobody waits for the CPU.
        cpu_s: the CPU computes experts while the device does so or waits.
        wait_s: the part of `cpu_s` in which the device waits.
        stream_s: the device waits for the experts of a long prompt to arrive.
        layers: hits, CPU and waiting of each MoE layer, float64 [3, n_moe_layers]; empty before the first step.
    """

    dense_s: float = 0.0
    attention_s: float = 0.0
    hits_s: float = 0.0
    cpu_s: float = 0.0
    wait_s: float = 0.0
    stream_s: float = 0.0
    layers: Bytes = field(default_factory=lambda: np.zeros((3, 0)), compare=False, repr=False)

    @property
    def total_s(self) -> float:
        """Return the whole."""
        return self.dense_s + self.attention_s + self.hits_s + self.wait_s + self.stream_s

    def __add__(self, other: StepTime) -> StepTime:
        return self._combined(other, 1.0)

    def __sub__(self, other: StepTime) -> StepTime:
        return self._combined(other, -1.0)

    def _combined(self, other: StepTime, sign: float) -> StepTime:
        layers = self.layers + sign * other.layers if self.layers.size and other.layers.size else self.layers
        if not self.layers.size:
            layers = sign * other.layers
        return StepTime(
            self.dense_s + sign * other.dense_s,
            self.attention_s + sign * other.attention_s,
            self.hits_s + sign * other.hits_s,
            self.cpu_s + sign * other.cpu_s,
            self.wait_s + sign * other.wait_s,
            self.stream_s + sign * other.stream_s,
            layers,
        )


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Where the time of decoding went, measured; seconds, float64 [n_moe_layers].

    Attributes:
        n_tokens: that were made one by one.
        device: the device worked, and the CPU had nothing to do until it was asked for this layer's experts.
        cpu: the CPU answered. The device computed those in its slots meanwhile, and waited.
        guesses: int64 [2], experts that the CPU was asked for where it had a guess before, and those that were guessed.
    """

    n_tokens: int
    device: Bytes
    cpu: Bytes
    guesses: npt.NDArray[np.int64]

    def __sub__(self, other: LayerTimes) -> LayerTimes:
        return LayerTimes(
            self.n_tokens - other.n_tokens,
            self.device - other.device,
            self.cpu - other.cpu,
            self.guesses - other.guesses,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved, by path: read from RAM, sent over PCIe, read from VRAM."""

    ram: float = 0.0
    link: float = 0.0
    vram: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.ram + other.ram, self.link + other.link, self.vram + other.vram)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.ram - other.ram, self.link - other.link, self.vram - other.vram)


def traffic_of(work: StepWork) -> Traffic:
    """Return what a step moves."""
    streamed, missed = float(work.streamed_bytes.sum()), float(work.miss_bytes.sum())
    on_device = work.dense_bytes + work.attention_bytes + float(work.hit_bytes.sum())
    return Traffic(missed + streamed + work.copied_bytes, streamed + work.copied_bytes, on_device)


# Of a CPU thread, in products with experts that have a few tokens each.
CPU_MACS = {"avx512_vbmi": 40e9, "avx512": 40e9, "avx2": 20e9, "scalar": 1e9}


def streaming_pays_from(
    speeds: Bandwidths, cpu_macs: float, expert_bytes: float, expert_macs: float, used_share: float
) -> int:
    """Return how many tokens a step must have for the device to do its experts sooner than the CPU.

    The device has to be sent all experts that it lacks, however few tokens there are; the CPU reads those that are
    chosen, 1 - (1 - used_share)^n of them, and multiplies each token with its own. All of it is proportional to how
    many the device lacks.

    Args:
        speeds: of the machine.
        cpu_macs: multiply-adds a second of all its threads.
        expert_bytes: one expert.
        expert_macs: multiply-adds of one token with it.
        used_share: of a layer's experts that a token uses.
    """
    sending = expert_bytes / speeds.pcie
    by_arithmetic = sending * cpu_macs / (used_share * expert_macs)
    by_reading = math.inf
    if speeds.ram < speeds.pcie and used_share < 1:
        by_reading = math.log1p(-speeds.ram / speeds.pcie) / math.log1p(-used_share)
    return max(1, math.ceil(min(by_arithmetic, by_reading)))


STAGED_LAYERS = 2  # that have their experts on the device, or on the way, at the same time


def stream_waits(copies_s: Bytes, dense_s: float, hits_s: Bytes) -> Bytes:
    """Return how long the device waits for the experts of each layer in a step that streams them.

    Args:
        copies_s: float64 [n_moe_layers], what the link takes for each layer's experts.
        dense_s: of everything but experts, between two layers' experts.
        hits_s: float64 [n_moe_layers], what the device takes to compute experts.
    """
    waits = np.zeros(len(copies_s))
    ends: list[float] = []  # of the computation of each layer
    link_is_free_at = now = 0.0
    for layer, (copy_s, hit_s) in enumerate(zip(copies_s.tolist(), hits_s.tolist(), strict=True)):
        area_is_free_at = ends[layer - STAGED_LAYERS] if layer >= STAGED_LAYERS else 0.0
        link_is_free_at = max(link_is_free_at, area_is_free_at) + copy_s
        now += dense_s
        if copy_s:
            waits[layer] = max(link_is_free_at - now, 0.0)
        now += float(waits[layer]) + hit_s
        ends.append(now)
    return waits


def time_step(machine: Machine, work: StepWork, streaming_s: Bytes | None = None) -> StepTime:
    """Return how long a step takes, and where the time goes.

    streaming_s: float64 [n_moe_layers], how long the device waited for streamed experts; None to compute it.
    """
    ram, vram, pcie = machine.bandwidths.ram, machine.bandwidths.vram, machine.bandwidths.pcie
    dense = max(work.dense_bytes / vram, work.dense_macs / machine.device_macs) + work.n_layers * machine.layer_s
    hits = np.maximum(work.hit_bytes / vram, work.hit_macs / machine.device_macs)
    # A copy's reads of RAM come on top of the misses', in proportion: both want the same memory.
    missed = float(work.miss_bytes.sum())
    slowed = 1.0 + work.copied_bytes / missed if missed else 1.0
    misses = np.maximum(work.miss_bytes * slowed / ram, work.miss_macs / machine.cpu_macs)
    misses += machine.handshake_s * (work.miss_bytes > 0)
    waits = np.maximum(misses - hits, 0.0)
    attention = work.attention_bytes / vram
    if streaming_s is None:
        streaming_s = stream_waits(work.streamed_bytes / pcie, (dense + attention) / max(len(hits), 1), hits)
    return StepTime(
        dense,
        attention,
        float(hits.sum()),
        float(misses.sum()),
        float(waits.sum()),
        float(streaming_s.sum()),
        np.stack([hits, misses, waits + streaming_s]),
    )
