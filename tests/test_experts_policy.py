"""Policies by name, twin layers, and the swaps they ask for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.experts.forecast import CLOSELY, FIRST_WEIGHTS, HORIZON, Forecast
from engine.experts.policy import POLICIES, make_policy
from engine.experts.swaps import Swaps, hottest
from engine.experts.tracker import DecayedCounts
from engine.experts.twins import Twins

N_LAYERS, N_EXPERTS, N_USED = 6, 12, 3


def routing(seed: int, n_tokens: int, n_layers: int = N_LAYERS, n_experts: int = N_EXPERTS, n_used: int = N_USED):
    """Skewed choices, [n_tokens, n_layers, n_used] in uint16: each layer has its own favourites."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(0, 1.5, (n_layers, n_experts))
    scores = taste + rng.gumbel(size=(n_tokens, n_layers, n_experts))
    return np.argsort(-scores, axis=2)[:, :, :n_used].astype(np.uint16)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), slots=st.lists(st.integers(0, N_EXPERTS), min_size=N_LAYERS, max_size=N_LAYERS))
def test_swaps_can_always_be_made_and_are_the_same_again(name: str, seed: int, slots: list[int]) -> None:
    n_slots = np.array(slots)
    chosen = routing(seed, 30)
    runs = []
    for _ in range(2):
        policy = make_policy(name, N_LAYERS, N_EXPERTS)
        resident = np.zeros((N_LAYERS, N_EXPERTS), bool)
        asked = []
        for token in chosen:
            policy.observe(token)
            before = resident.copy()
            swaps = policy.plan(resident, n_slots)
            assert np.array_equal(resident, before)
            assert not resident[swaps.layers, swaps.loads].any()
            full = swaps.evicts >= 0
            assert resident[swaps.layers[full], swaps.evicts[full]].all()
            swaps.apply(resident)
            assert (resident.sum(1) == before.sum(1) + np.bincount(swaps.layers[~full], minlength=N_LAYERS)).all()
            assert (resident.sum(1) <= n_slots).all()
            asked.append((swaps.layers.tolist(), swaps.loads.tolist(), swaps.evicts.tolist()))
        runs.append(asked)
    assert runs[0] == runs[1]


def test_lru_keeps_the_most_recent() -> None:
    policy = make_policy("lru", 1, 10)
    resident = np.zeros((1, 10), bool)
    for expert in (1, 2, 3, 1, 4):
        policy.observe(np.array([[expert]]))
        policy.plan(resident, np.array([3])).apply(resident)
    assert np.flatnonzero(resident[0]).tolist() == [1, 3, 4]


def test_window_topk_acts_at_its_interval_only() -> None:
    policy = make_policy("window_topk:interval=4,window=8", 1, 10)
    resident = np.zeros((1, 10), bool)
    acted = []
    for t in range(12):
        policy.observe(np.array([[t // 4]]))
        swaps = policy.plan(resident, np.array([1]))
        swaps.apply(resident)
        acted.append(len(swaps))
    # The second time 0 and 1 were chosen as often, and equal heat does not swap; the third time 0 has left the window.
    assert acted == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert np.flatnonzero(resident[0]).tolist() == [1]


def test_static_fills_free_slots_and_then_never_swaps() -> None:
    policy = make_policy("static", 1, 10)
    resident = hottest(np.eye(1, 10, dtype=np.float32), np.array([1]))
    for expert in (5, 5, 6, 7, 7, 7):
        policy.observe(np.array([[expert]]))
        policy.plan(resident, np.array([2])).apply(resident)
    assert np.flatnonzero(resident[0]).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mru", "adaptive, decayed"),
        ("lru:half_life=3", "no setting 'half_life'"),
        ("decayed:half_lief=3", "half_life, interval, margin, max_swaps"),
        ("decayed:half_life=soon", "'soon' is not a number"),
        ("decayed:half_life=0", "too small"),
        ("decayed:margin=nan", "too small"),
        ("window_topk:interval=1.5", "not a whole number"),
        ("window_topk:interval=0", "too small"),
        ("decayed:margin=-1", "too small"),
    ],
)
def test_a_wrong_policy_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_policy(text, 2, 4)


def twin_routing(seed: int, n_tokens: int, agreement: float, n_layers: int = 24, lag: int = 12):
    """Layers `lag` and up repeat the choices of layer l - lag with some probability, rank by rank."""
    chosen = routing(seed, n_tokens, n_layers, 64, 6)
    rng = np.random.default_rng(seed + 1)
    for token in chosen:
        for layer in range(lag, n_layers):
            copied = [e for e in token[layer - lag] if rng.random() < agreement]
            rest = [e for e in token[layer] if e not in copied]
            token[layer] = (copied + rest)[:6]
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_twins_are_found_and_others_are_not_taken_for_twins(seed: int) -> None:
    twins = Twins(24, 64)
    for token in twin_routing(seed, 64, 0.7):
        twins.observe(token)
    assert twins.of.tolist() == [-1] * 12 + list(range(12))
    assert np.all(twins.confidence[12:].mean(1) > 0.5)
    strangers = Twins(24, 64)
    for token in routing(seed, 200, 24, 64, 6):
        strangers.observe(token)
    assert not len(strangers.layers)


def test_layers_with_the_same_favourites_are_not_twins() -> None:
    """Popularity alone makes these agree; for the same token they agree no more than for different ones."""
    rng = np.random.default_rng(5)
    taste = np.tile(rng.normal(0, 2.5, 64), (24, 1))
    scores = taste + rng.gumbel(size=(200, 24, 64))
    twins = Twins(24, 64)
    for token in np.argsort(-scores, axis=2)[:, :, :6]:
        twins.observe(token)
    assert not len(twins.layers)


def test_what_is_not_recorded_counts_for_nothing() -> None:
    twins, blank = Twins(8, 16), np.full((8, 4), 65535, np.uint16)
    for _ in range(64):
        twins.observe(blank)
    assert not len(twins.layers)
    for token in twin_routing(0, 64, 0.9, n_layers=8, lag=4)[:, :, :4] % 16:
        twins.observe(token)
    assert twins.foretell(blank).sum() == 0


@pytest.mark.parametrize("seed", range(3))
def test_swaps_of_a_layer_do_not_depend_on_later_layers_of_the_token(seed: int) -> None:
    """With `ahead` a layer is decided before it runs: nothing that comes after its twin may matter."""
    chosen = twin_routing(seed, 80, 0.8)
    policy = make_policy("adaptive", 24, 64)
    n_slots = np.full(24, 10)
    for token in chosen[:-1]:
        policy.observe(token)
    resident = hottest(policy.heat, n_slots)
    resident = np.roll(resident, 3, axis=1)
    rng = np.random.default_rng(seed)

    def of_layer(swaps: Swaps, layer: int) -> list[tuple[int, int]]:
        mine = swaps.pick(swaps.layers == layer)
        return list(zip(mine.loads.tolist(), mine.evicts.tolist(), strict=True))

    full = policy.plan(resident, n_slots, chosen[-1])
    assert len(full)
    for layer in range(24):
        masked = chosen[-1].copy()
        first_unknown = max(layer - 4 + 1, 0)
        masked[first_unknown:] = rng.integers(0, 64, masked[first_unknown:].shape)
        assert of_layer(policy.plan(resident, n_slots, masked), layer) == of_layer(full, layer)


def test_a_budget_cuts_the_list_where_its_bytes_end() -> None:
    swaps = Swaps(np.array([0, 1, 0]), np.array([1, 2, 3]), np.array([4, 5, -1]), np.array([1.0, 3.0, 2.0], np.float32))
    sizes = np.array([10, 7])
    assert swaps.widest_first().loads.tolist() == [2, 3, 1]
    assert [len(swaps.within(sizes, n)) for n in (9, 10, 16, 17, 26, 27)] == [0, 1, 1, 2, 2, 3]


def forecast_of(tokens: np.ndarray, n_experts: int) -> tuple[Forecast, np.ndarray, np.ndarray]:
    """Return a forecast that has seen all tokens, what it foretold in the second half, and what came true."""
    n_tokens, n_layers, _ = tokens.shape
    forecast, heats = Forecast(n_layers, n_experts), []
    for token in tokens:
        forecast.observe(token)
        heats.append(forecast.heat.copy())
    came = np.zeros((n_tokens + 1, n_layers, n_experts))
    for t in range(n_tokens - 1, -1, -1):
        chosen = np.zeros((n_layers, n_experts))
        np.put_along_axis(chosen, tokens[t].astype(np.intp), 1.0, axis=1)
        came[t] = (1.0 - 1.0 / HORIZON) * came[t + 1] + chosen
    known = slice(n_tokens // 2, n_tokens - 4 * HORIZON)  # the rest of the horizon weighs next to nothing
    return forecast, np.stack(heats)[known], came[1:][known]


def bursts(seed: int, n_tokens: int, n_layers: int = 4, n_experts: int = 32, n_used: int = 4) -> np.ndarray:
    """Favourites that change every 24 tokens: what was chosen long ago says nothing."""
    rng, parts = np.random.default_rng(seed), []
    for _ in range(n_tokens // 24):
        scores = rng.normal(0, 2.0, (n_layers, n_experts)) + rng.gumbel(size=(24, n_layers, n_experts))
        parts.append(np.argsort(-scores, axis=2)[:, :, :n_used])
    return np.concatenate(parts)


@pytest.mark.parametrize("seed", range(3))
def test_a_forecast_learns_how_long_a_choice_means_something(seed: int) -> None:
    lasting, _, _ = forecast_of(routing(seed, 1200, 4, 32, 4), 32)
    passing, _, _ = forecast_of(bursts(seed, 1200), 32)
    slow = slice(3, 5)  # a half-life of 256 tokens, and none
    assert lasting.weights[slow].sum() > 0.5 > 4 * FIRST_WEIGHTS[slow].sum()
    assert passing.weights[slow].sum() < 0.15
    assert passing.weights[:2].sum() > 2 * lasting.weights[:2].sum()


@pytest.mark.parametrize("make", [bursts, lambda seed, n: routing(seed, n, 4, 32, 4)])
def test_a_forecast_foretells_better_than_any_count_and_in_true_numbers(make) -> None:
    tokens = make(7, 1200)
    _, foretold, came = forecast_of(tokens, 32)
    # How often those who were given a lead of one over the average came more often than the average.
    lead, gain = foretold - foretold.mean(2, keepdims=True), came - came.mean(2, keepdims=True)
    ahead = lead > 1.0
    assert gain[ahead].mean() == pytest.approx(lead[ahead].mean(), rel=0.25)
    for half_life in (4.0, 16.0, 64.0, 1e9):
        counts, seen = DecayedCounts(4, 32, half_life), []
        for token in tokens:
            counts.observe(token)
            seen.append(counts.heat.copy())
        heat = np.stack(seen)[600 : 600 + len(came)]
        of_counts = np.corrcoef((heat - heat.mean(2, keepdims=True)).ravel(), gain.ravel())[0, 1]
        assert np.corrcoef(lead.ravel(), gain.ravel())[0, 1] > of_counts - 0.005


@pytest.mark.parametrize("n_tokens", [1, CLOSELY, CLOSELY + 1, 200])
def test_a_prompt_at_once_counts_as_its_tokens_do(n_tokens: int) -> None:
    """With the same bits if all of it is learned from, too, and with choices that are not known."""
    before, tokens = routing(4, 150), routing(5, n_tokens)
    tokens[::3, 1:3, 0] = 65535
    at_once, one_by_one = Forecast(N_LAYERS, N_EXPERTS), Forecast(N_LAYERS, N_EXPERTS)
    for forecast in (at_once, one_by_one):
        for chosen in before:
            forecast.observe(chosen)
    at_once.observe_prompt(tokens)
    for chosen in tokens:
        one_by_one.observe(chosen)
    assert at_once.n_tokens == one_by_one.n_tokens == len(before) + n_tokens
    if n_tokens <= CLOSELY:
        np.testing.assert_array_equal(at_once.heat, one_by_one.heat)
    np.testing.assert_allclose(at_once.rates, one_by_one.rates, rtol=1e-5, atol=1e-6)


def test_a_forecast_takes_twins_into_account() -> None:
    """A layer that has seen next to nothing yet is told by its twin who is in demand."""
    with_twin, alone = Forecast(2, 16), Forecast(2, 16)
    with_twin.set_twins(np.array([-1, 0]))
    token = np.array([[3, 4], [65535, 65535]])
    for _ in range(8):
        with_twin.observe(token)
        alone.observe(token)
    assert alone.heat[1].max() == 0
    assert np.flatnonzero(with_twin.heat[1]).tolist() == [3, 4]
    with_twin, alone = Forecast(2, 16), Forecast(2, 16)  # and the earlier one by the later one
    with_twin.set_twins(np.array([-1, 0]))
    with_twin.observe(token[::-1])
    assert np.flatnonzero(with_twin.heat[0]).tolist() == [3, 4]


def test_a_model_without_favourites_is_left_in_peace() -> None:
    rng = np.random.default_rng(0)
    policy = make_policy("adaptive", 4, 32)
    plain = make_policy("decayed", 4, 32)
    n_slots, loads = np.full(4, 8), [0, 0]
    for i, p in enumerate((policy, plain)):
        resident = np.zeros((4, 32), bool)
        for t in range(600):
            p.observe(np.stack([rng.permutation(32)[:4] for _ in range(4)]))
            swaps = p.plan(resident, n_slots)
            swaps.apply(resident)
            loads[i] += len(swaps) * (t >= 300)
    assert loads[0] < loads[1] / 4


def swaps_for_a_burst(n_before: int, n_burst: int, **settings: float) -> int:
    """Return how often a newcomer that is chosen a few times in a row gets in, after residents were chosen by turns."""
    policy = make_policy("adaptive:" + ",".join(f"{k}={v}" for k, v in settings.items()), 1, 16)
    resident = np.arange(16)[None, :] < 4
    for t in range(n_before):
        policy.observe(np.array([[t % 4]]))
    for _ in range(n_burst):
        policy.observe(np.array([[9]]))
    return len(policy.plan(resident, np.array([4])))


def test_a_load_must_pay_what_it_costs_and_more_while_a_chat_is_young() -> None:
    needed = {
        (n, cost): next(k for k in range(1, 100) if swaps_for_a_burst(n, k, break_even=cost))
        for n in (8, 64)
        for cost in (1.0, 4.0, 8.0)
    }
    for n in (8, 64):
        assert needed[n, 1.0] < needed[n, 4.0] < needed[n, 8.0]
    assert needed[8, 8.0] > 1
    assert not swaps_for_a_burst(64, 1, margin=3.0)
