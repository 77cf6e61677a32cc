"""Trackers and the swap rule against the plainest code that says the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.experts.swaps import UNLIMITED, swap_for_hotter
from engine.experts.tracker import CountOverAge, DecayedCounts, LastUse, WindowCounts

N_LAYERS, N_EXPERTS, N_USED = 3, 7, 2


@st.composite
def routings(draw) -> np.ndarray:
    """[n_tokens, n_layers, n_used]; now and then "not known"."""
    seed, n_tokens = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 12))
    rng = np.random.default_rng(seed)
    chosen = np.stack([[rng.permutation(N_EXPERTS)[:N_USED] for _ in range(N_LAYERS)] for _ in range(n_tokens)])
    chosen[rng.random(n_tokens) < 0.1] = 65535
    return chosen.astype(np.uint16)


def uses(routing: np.ndarray, layer: int, expert: int) -> list[int]:
    return [t for t, chosen in enumerate(routing) if expert in chosen[layer]]


@pytest.mark.parametrize(
    ("tracker", "heat"),
    [
        (lambda: DecayedCounts(N_LAYERS, N_EXPERTS, 4.0), lambda used, n: sum(0.5 ** ((n - 1 - t) / 4) for t in used)),
        (lambda: WindowCounts(N_LAYERS, N_EXPERTS, 5), lambda used, n: sum(t >= n - 5 for t in used)),
        (lambda: LastUse(N_LAYERS, N_EXPERTS), lambda used, n: max(used, default=-1) + 1),
        (lambda: CountOverAge(N_LAYERS, N_EXPERTS), lambda used, n: len(used) / (n - used[-1]) if used else 0),
    ],
    ids=["decayed", "window", "last use", "count over age"],
)
@given(routing=routings())
def test_heat_is_its_definition(tracker, heat, routing: np.ndarray) -> None:
    tracked = tracker()
    for chosen in routing:
        tracked.observe(chosen)
    expected = [[heat(uses(routing, la, e), len(routing)) for e in range(N_EXPERTS)] for la in range(N_LAYERS)]
    np.testing.assert_allclose(tracked.heat, expected, rtol=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.lists(st.integers(0, N_EXPERTS), min_size=N_LAYERS, max_size=N_LAYERS),
    margin=st.sampled_from([0.0, 1.0, 2.0]),
    deviations=st.sampled_from([None, 0.0, 0.75, 1.0]),
    max_swaps=st.sampled_from([1, 2, UNLIMITED]),
)
def test_swaps_are_those_of_a_plain_loop(
    seed: int, slots: list[int], margin: float, deviations: float | None, max_swaps: int
) -> None:
    rng = np.random.default_rng(seed)
    heat = rng.integers(0, 6, (N_LAYERS, N_EXPERTS)).astype(np.float32)
    resident = np.zeros((N_LAYERS, N_EXPERTS), bool)
    for layer, n in enumerate(slots):
        resident[layer, rng.permutation(N_EXPERTS)[: rng.integers(0, n + 1)]] = True
    before = resident.copy()
    swaps = swap_for_hotter(heat, resident, np.array(slots), margin=margin, deviations=deviations, max_swaps=max_swaps)
    assert np.array_equal(resident, before)

    found = {layer: [] for layer in range(N_LAYERS)}
    for layer, load, evict in zip(swaps.layers, swaps.loads, swaps.evicts, strict=True):
        found[layer].append((load, evict))
    for layer in range(N_LAYERS):
        inside, expected = set(np.flatnonzero(resident[layer])), []
        outside = set(range(N_EXPERTS)) - inside
        n_free = slots[layer] - len(inside)
        n_replaced = 0
        while outside and slots[layer] and (n_free or n_replaced < max_swaps):
            load = min(outside, key=lambda e: (-heat[layer, e], e))
            evict = -1 if n_free else min(inside, key=lambda e: (heat[layer, e], e), default=None)
            if evict is None or not heat[layer, load] > 0:
                break
            if not n_free:
                chance = (deviations or 0.0) * np.sqrt(heat[layer, load] + heat[layer, evict])
                if not heat[layer, load] - heat[layer, evict] > max(margin, chance):
                    break
            expected.append((load, evict))
            outside.remove(load)
            n_replaced += not n_free
            n_free -= bool(n_free)
            inside.discard(evict)
        assert found[layer] == expected
