"""The sampler: random numbers without state, tokens that must not come, and what is handed to the kernel."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_data import small

from engine.config import SamplingParams
from engine.errors import RequestError
from engine.generate.sampling import Sampler, uniform
from engine.generate.sequence import Sequence
from engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_metadata(small())  # 263 tokens; 261 and 262 are unused
N_LOGITS = TOKENIZER.n_vocab + 9  # a model may have logits for ids that are no tokens


def params(**changes) -> SamplingParams:
    plain = {"max_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    return SamplingParams(**plain | changes)


def make(sampling: SamplingParams, n_tokens: int, logits: np.ndarray, prompt=()) -> list[int]:
    """Make tokens, all from the same logits."""
    sampler, sequence = Sampler(sampling, TOKENIZER), Sequence(TOKENIZER, sampling, prompt)
    before = logits.copy()
    for _ in range(n_tokens):
        sequence.append(sampler.choose(logits, sequence))
        sequence.finish_reason = None
    np.testing.assert_array_equal(logits, before)
    return sequence.token_ids


def flat_logits(**values: float) -> np.ndarray:
    """Return logits that exclude all tokens but those named: `_7=0.5` for token 7."""
    logits = np.full(N_LOGITS, -100, np.float32)
    for name, value in values.items():
        logits[int(name[1:])] = value
    return logits


def test_uniform_is_splitmix64():
    """Seed 0 gives the published sequence of the generator that starts at 0; its upper 24 bits count."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniform(0, step) * 2**24 for step in range(3)] == [x >> 40 for x in published]


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**40))
def test_uniform_is_below_one_in_float32_too(seed, step):
    value = uniform(seed, step)
    assert 0 <= value < 1
    assert float(np.float32(value)) == value
    assert uniform(seed, step) == value


@pytest.mark.parametrize("along", ["steps", "seeds"])
def test_uniform_is_even(along):
    values = [uniform(5, i) if along == "steps" else uniform(i, 5) for i in range(20_000)]
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert np.square(counts - 1000).sum() / 1000 < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    pairs = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(pairs) < 0.03


def test_greedy_takes_the_largest_logit_and_the_lower_id_of_two():
    assert make(params(temperature=0.0), 2, flat_logits(_7=1.0, _9=1.0, _3=0.5)) == [7, 7]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unused_tokens_and_ids_that_are_no_tokens_never_come(temperature):
    logits = flat_logits(_7=0.0, _261=50.0, _262=60.0)
    logits[TOKENIZER.n_vocab :] = 90.0
    assert make(params(temperature=temperature), 20, logits) == [7] * 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_unused_token_among_others_never_comes(temperature):
    few = SimpleNamespace(n_sampled=10, unused_among_sampled=np.array([3]))
    logits = flat_logits(_3=50.0, _7=0.0, _11=90.0)
    sampler, sequence = Sampler(params(temperature=temperature), few), Sequence(TOKENIZER, params(), ())
    assert {sampler.choose(logits, sequence) for _ in range(5)} == {7}


def test_the_same_seed_gives_the_same_tokens_and_another_one_does_not():
    logits = np.random.default_rng(0).normal(size=N_LOGITS).astype(np.float32)
    first = make(params(seed=3), 50, logits)
    assert make(params(seed=3), 50, logits) == first
    assert make(params(seed=4), 50, logits) != first


def test_a_new_seed_is_told_so_that_it_can_be_used_again():
    seeds = {Sampler(params(seed=-1), TOKENIZER).seed for _ in range(5)}
    assert len(seeds) == 5
    for seed in seeds:
        assert Sampler(params(seed=seed), TOKENIZER).seed == seed


def test_draws_follow_the_softmax():
    logits = flat_logits(_1=0.0, _2=1.0, _3=2.0)
    counts = np.bincount(make(params(), 4000, logits), minlength=4)[1:4]
    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum() * 4000
    assert (
        np.square((counts - expected) / np.sqrt(expected)).sum() < 13.8
    )  # chi-square, 2 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({"top_k": 1}, {3}), ({"top_p": 0.6}, {3}), ({"top_p": 0.0}, {3}), ({"min_p": 0.3}, {2, 3}), ({}, {1, 2, 3})],
)
def test_what_may_be_drawn_is_cut_as_asked(changes, allowed):
    assert set(make(params(**changes), 300, flat_logits(_1=0.0, _2=1.0, _3=2.0))) == allowed


def test_penalties_look_back_over_the_window_of_prompt_and_answer():
    logits = flat_logits(_1=3.0, _2=2.0, _3=1.0)
    greedy = {"temperature": 0.0, "presence_penalty": 10.0}
    assert make(params(**greedy, penalty_window=2), 4, logits) == [1, 2, 3, 1]
    assert make(params(**greedy, penalty_window=2), 3, logits, prompt=[1]) == [2, 3, 1]
    assert make(params(**greedy, penalty_window=0), 2, logits, prompt=[1, *[9] * 200]) == [2, 3]
    assert make(params(temperature=0.0, repetition_penalty=2.0), 2, logits) == [1, 2]
    assert make(params(temperature=0.0, frequency_penalty=0.6), 4, logits) == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected"),
        ({"temperature": float("nan")}, "temperature is nan; expected"),
        ({"top_p": 1.5}, "top_p is 1.5; expected"),
        ({"top_k": "x"}, "top_k is 'x'; expected"),
        ({"max_tokens": -1}, "max_tokens is -1; expected"),
        ({"stop": ("",)}, "stop holds an empty text"),
    ],
    ids=str,
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(RequestError, match=message):
        params(**changes)
