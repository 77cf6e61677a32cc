"""How long the cache takes to think: what it does after each token, on the shape of a 122B model."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.devices.program import StagedProgram, Step
from engine.devices.timing import Bandwidths
from engine.experts.cost import SwapBudget
from engine.experts.hot_cache import HotCache
from engine.experts.policy import POLICIES, make_policy
from engine.experts.replay import replay
from engine.experts.routing_process import RoutingProcess
from engine.experts.slots import SlotTable
from engine.experts.swaps import hottest
from engine.experts.watched_program import WatchedProgram

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from fake_slots import FakeSlots

N_LAYERS, N_EXPERTS, N_USED, N_SLOTS = 48, 256, 8, 44
EXPERT_BYTES = 5_300_000


@pytest.fixture(scope="module")
def trace():
    return RoutingProcess(N_LAYERS, N_EXPERTS, N_USED).trace(64, 256)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policy(benchmark, trace, name) -> None:
    """One token: observe and plan, over all layers."""
    policy = make_policy(name, N_LAYERS, N_EXPERTS)
    n_slots = np.full(N_LAYERS, N_SLOTS)
    for chosen in trace.ids[:64]:
        policy.observe(chosen)
    resident = hottest(policy.heat, n_slots)
    tokens = iter(range(10**9))

    def token() -> None:
        policy.observe(trace.ids[next(tokens) % 320])
        policy.plan(resident, n_slots).apply(resident)

    benchmark(token)


def make_cache(device) -> HotCache:
    return HotCache(
        device,
        SlotTable(np.full(N_LAYERS, N_SLOTS), N_EXPERTS, np.full(N_LAYERS, EXPERT_BYTES)),
        make_policy("adaptive", N_LAYERS, N_EXPERTS),
        SwapBudget(Bandwidths(60e9, 25e9, 900e9).pcie, EXPERT_BYTES, 0.2),
    )


def test_cache_step(benchmark, trace) -> None:
    """One token of the whole cache: observe, budget, plan, swaps begun and finished, on a device that takes no time."""
    device = FakeSlots(N_EXPERTS, 0, [N_SLOTS] * N_LAYERS)
    cache = make_cache(device)
    routing = trace.ids.transpose(1, 0, 2).astype(np.int32)
    cache.observe(routing[:, :64])
    tokens = iter(range(10**9))

    def token() -> None:
        t = next(tokens) % 320
        cache.observe(routing[:, t : t + 1])
        device.finish(1.0)
        cache.step(0.03)

    benchmark(token)


class Asleep(StagedProgram):
    """A device with slots and its program, whose steps sleep from layer to layer. It trusts the cache."""

    runs_ahead = True
    slept_s = 0.0
    PAUSES, STEP_S, COPY_S = 12, 9e-3, 1e-4

    def __init__(self, routing: np.ndarray) -> None:
        """routing: int32 [n_layers, n_tokens, n_used], of one token after the other."""
        self.usable = np.ones((N_LAYERS, N_SLOTS), bool)
        self.tokens, self.n_begun, self.n_over, self.layer = routing, 0, 0, 0

    def prepare(self, step: Step) -> None:
        pass

    def launch(self) -> None:
        self.n_begun += 1
        for _ in range(2):
            os.sched_yield()  # as the driver does, of which a step is asked for: it lets go of the interpreter

    def finish_layers(self) -> None:
        start = time.perf_counter()
        for layer in range(0, N_LAYERS, N_LAYERS // self.PAUSES):
            self.layer = layer
            time.sleep(self.STEP_S / self.PAUSES)
        Asleep.slept_s += time.perf_counter() - start

    def collect(self) -> tuple[np.ndarray, np.ndarray]:
        self.n_over = self.n_begun
        return np.zeros(1, np.int32), np.zeros((1, 1), np.float32)

    def routing(self) -> np.ndarray:
        t = self.n_over % self.tokens.shape[1]
        return self.tokens[:, t : t + 1]

    def copy_expert(self, layer: int, expert: int, slot: int) -> float:
        return time.perf_counter() + self.COPY_S

    def fence(self, layer: int) -> tuple[int, int]:
        return self.n_begun, layer

    def is_done(self, ticket: float | tuple[int, int]) -> bool:
        if isinstance(ticket, tuple):
            return self.n_over >= ticket[0] or self.layer > ticket[1]
        return time.perf_counter() >= ticket

    def publish(self, layer: int, expert: int, slot: int) -> None:
        pass

    def usable_slots(self, n_tokens: int, n_positions: int) -> np.ndarray:
        return self.usable

    def longest_after(self, positions: np.ndarray, slots: np.ndarray) -> int:
        return 0

    def wait_all(self) -> None:
        pass


@pytest.mark.benchmark(timer=lambda: time.perf_counter() - Asleep.slept_s)
def test_what_comes_on_top_of_a_step(benchmark, trace) -> None:
    """For the thread that runs steps, while another one looks after the cache. The step's own time is not counted."""
    device = Asleep(trace.ids.transpose(1, 0, 2).astype(np.int32))
    watched = WatchedProgram(device, make_cache(device), in_background=True)
    nothing = np.zeros(1, np.int32)
    benchmark.pedantic(watched.run, (nothing, nothing, nothing, nothing), rounds=200, warmup_rounds=50, iterations=1)
    watched.close()


def test_replay(benchmark, trace) -> None:
    """256 tokens x 48 layers against the adaptive policy."""
    n_slots = np.full(N_LAYERS, N_SLOTS)
    benchmark(lambda: replay(trace, make_policy("adaptive", N_LAYERS, N_EXPERTS), n_slots))
