"""How long the cache takes to think: what it does after each token, on the shape of a 122B model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from engine.devices.timing import Bandwidths
from engine.experts.cost import SwapBudget
from engine.experts.hot_cache import HotCache
from engine.experts.policy import POLICIES, make_policy
from engine.experts.replay import replay
from engine.experts.routing_process import RoutingProcess
from engine.experts.slots import SlotTable
from engine.experts.swaps import hottest

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


def test_cache_step(benchmark, trace) -> None:
    """One token of the whole cache: observe, budget, plan, swaps begun and finished, on a device that takes no time."""
    device = FakeSlots(N_LAYERS, N_EXPERTS, seed=0)
    cache = HotCache(
        device,
        SlotTable(np.full(N_LAYERS, N_SLOTS), N_EXPERTS, np.full(N_LAYERS, EXPERT_BYTES)),
        make_policy("adaptive", N_LAYERS, N_EXPERTS),
        SwapBudget(Bandwidths(60e9, 25e9, 900e9).pcie, EXPERT_BYTES, 0.2),
    )
    routing = trace.ids.transpose(1, 0, 2).astype(np.int32)
    cache.observe(routing[:, :64])
    tokens = iter(range(10**9))

    def token() -> None:
        t = next(tokens) % 320
        cache.observe(routing[:, t : t + 1])
        device.finish(1.0)
        cache.step(0.03)

    benchmark(token)


def test_replay(benchmark, trace) -> None:
    """256 tokens x 48 layers against the adaptive policy."""
    n_slots = np.full(N_LAYERS, N_SLOTS)
    benchmark(lambda: replay(trace, make_policy("adaptive", N_LAYERS, N_EXPERTS), n_slots))
