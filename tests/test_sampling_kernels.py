"""The sampling functions in C against their definition in `kernels/sampling.h`, in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _kernels as k

NEUTRAL = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "uniform": 0.0,
}


def sample(logits: np.ndarray, recent: object = (), **changes: float) -> int:
    values = np.asarray(logits, np.float32)
    return k.sample(values, np.asarray(recent, np.int32), **{**NEUTRAL, **changes})


def penalized(
    logits: np.ndarray, recent: list[int], repetition: float, presence: float, frequency: float
) -> np.ndarray:
    logits = logits.copy()
    for token in set(recent):
        if 0 <= token < len(logits):
            value = float(logits[token])
            value = value / repetition if value > 0 else value * repetition
            logits[token] = value - (presence + frequency * recent.count(token))
    return logits


def survivors(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[list[int], list]:
    """Ids that may be drawn, best first, and the running sums of their weights."""
    order = np.lexsort((np.arange(len(logits)), -logits))[: top_k or None]
    weights = np.exp((logits[order].astype(np.float64) - float(logits[order[0]])) / temperature)
    kept, total = [0], weights.sum()
    for i in range(1, len(order)):
        if weights[:i].sum() >= top_p * total or weights[i] < min_p:
            break
        kept.append(i)
    return order[kept].tolist(), np.cumsum(weights[kept]).tolist()


@settings(max_examples=200)
@given(
    st.integers(0, 2**32 - 1),
    st.one_of(st.integers(1, 200), st.integers(500, 1500)),  # less than a block of 256, and several
    st.lists(st.integers(-2, 210), max_size=30),
    st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 3, 40, 1000]),
    st.sampled_from([0.1, 0.5, 0.93, 1.0]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    st.sampled_from([(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.8, 0.5, -0.25), (1.1, -0.5, 0.125)]),
    st.floats(0, 1, exclude_max=True),
)
def test_sample(seed, n, recent, temperature, top_k, top_p, min_p, penalties, uniform):
    logits = (np.random.default_rng(seed).standard_normal(n) * 3).astype(np.float32)
    logits = np.round(logits * 8) / np.float32(8) if seed % 2 else logits  # half of them with ties
    before = logits.copy()
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    settings_ = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    token = sample(logits, recent, **settings_, **dict(zip(names, penalties, strict=True)))
    np.testing.assert_array_equal(logits, before)
    ids, sums = survivors(penalized(logits, recent, *penalties), temperature, top_k, top_p, min_p)
    wanted = uniform * sums[-1]
    # weights are float32: where a sum and the limit are that close, either neighbour is right
    slack = 2e-5 * sums[-1]
    first = next((i for i, s in enumerate(sums) if s > wanted - slack), len(ids) - 1)
    last = next((i for i, s in enumerate(sums) if s > wanted + slack), len(ids) - 1)
    assert token in ids[first : last + 1]


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 30), max_size=20),
    st.sampled_from([(1.0, 0.0, 0.0), (2.0, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, 0.5)]),
)
def test_greedy_comes_after_the_penalties(seed, recent, penalties):
    logits = np.random.default_rng(seed).standard_normal(31).astype(np.float32)
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    token = sample(logits, recent, temperature=0.0, **dict(zip(names, penalties, strict=True)))
    assert token == int(np.argmax(penalized(logits, recent, *penalties)))


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.125, 0.25, 0.125], np.float32))
    draws = [sample(logits, uniform=(i + 0.5) / 800) for i in range(800)]
    assert np.bincount(draws).tolist() == [400, 100, 200, 100]
    assert draws[:400] == [0] * 400  # the best first
    assert draws[-1] == 3  # of two equals the lower id first


@pytest.mark.parametrize("temperature", [1e-40, 1e-60, 1e-300, 5e-324])
@pytest.mark.parametrize("largest", [1e-3, 7.0, 1e30])
def test_next_to_no_temperature_takes_the_likeliest(temperature, largest):
    logits = np.full(1000, -np.float32(1.0), np.float32)
    logits[[70, 700]] = largest, np.nextafter(np.float32(largest), np.float32(-1))
    assert sample(logits, temperature=temperature, uniform=0.999) == 70


def test_a_tie_at_the_limit_of_top_k_goes_to_the_lower_id():
    assert {sample([1.0, 2.0, 1.0, 1.0], top_k=2, uniform=u / 16) for u in range(16)} == {1, 0}


@pytest.mark.parametrize("top_k", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("n_peaks", [0, 2, 7])
def test_the_best_are_found_wherever_they_lie(top_k, n_peaks):
    """With fewer or more blocks of 256 than `top_k`, peaks in one block or in all, and next to no other weight."""
    generator = np.random.default_rng(top_k)
    logits = generator.standard_normal(4 * 256 + 77).astype(np.float32)
    logits[generator.choice(300 if n_peaks == 7 else len(logits), n_peaks, replace=False)] += 60
    best = np.lexsort((np.arange(len(logits)), -logits))[:top_k]
    drawn = [sample(logits, top_k=top_k, temperature=1e3, uniform=(i + 0.5) / 400) for i in range(400)]
    assert list(dict.fromkeys(drawn)) == best.tolist()
    assert k.log_probabilities(logits, top_k)[0].tolist() == best.tolist()


def test_logits_that_are_no_numbers():
    nan, inf = float("nan"), float("inf")
    assert sample([nan, 1.0, nan], temperature=0.0) == 1
    assert {sample([nan, 1.0, nan, 0.5], uniform=u / 8) for u in range(8)} == {1, 3}
    assert sample([0.0, inf, inf], uniform=0.9) == 1
    assert sample([-inf, -inf, -inf], uniform=0.9) == 0
    assert sample([nan] * 3, uniform=0.9) == 0
    assert sample([nan] * 3, temperature=0.0) == 0
    assert k.argmax(np.array([nan, 2.0, nan, 2.0], np.float32)) == 1
    assert k.argmax(np.array([nan, nan], np.float32)) == 0
    ids, values, _ = k.log_probabilities(np.array([nan, 2.0, -inf, 3.0, nan], np.float32), 5)
    assert ids.tolist() == [3, 1, 0, 2, 4]
    assert values[2:].tolist() == [-inf] * 3
    _, _, log_sum = k.log_probabilities(np.array([-inf, nan], np.float32), 2)
    assert log_sum == -inf


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_argmax_is_the_first_of_the_largest(seed, n):
    logits = np.round(np.random.default_rng(seed).standard_normal(n) * 2).astype(np.float32)
    assert k.argmax(logits) == int(np.argmax(logits))


@given(st.integers(0, 2**32 - 1), st.integers(1, 120), st.integers(0, 120))
def test_log_probabilities(seed, n, n_top):
    n_top = min(n, n_top)
    logits = (np.random.default_rng(seed).standard_normal(n) * 5).astype(np.float32)
    logits = np.round(logits) if seed % 2 else logits
    ids, values, log_sum = k.log_probabilities(logits, n_top)
    exact = logits.astype(np.float64)
    assert log_sum == pytest.approx(np.log(np.exp(exact - exact.max()).sum()) + exact.max(), rel=1e-6, abs=1e-6)
    assert ids.tolist() == np.lexsort((np.arange(n), -exact))[:n_top].tolist()
    np.testing.assert_allclose(values, exact[ids] - log_sum, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("inf")}, "the penalties must be finite"),
        ({"frequency_penalty": float("nan")}, "the penalties must be finite"),
        ({"uniform": 1.0}, "uniform is 1.0"),
        ({"uniform": -0.5}, "uniform is -0.5"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        sample([1.0, 2.0], **change)


def test_no_logits_at_all():
    nothing = np.zeros(0, np.float32)
    for call in (lambda: sample(nothing), lambda: k.argmax(nothing), lambda: k.log_probabilities(nothing, 0)):
        with pytest.raises(ValueError, match="the number of logits is 0"):
            call()
    with pytest.raises(ValueError, match="n_top is 3; expected 0 to 2"):
        k.log_probabilities(np.zeros(2, np.float32), 3)


def test_only_float32_that_lies_together():
    for logits in (np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]):
        with pytest.raises(ValueError):
            k.argmax(logits)
