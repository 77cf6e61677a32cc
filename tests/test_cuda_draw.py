"""Tokens drawn by `cuda/draw.cu` against `_kernels.sample`: the same ones, or none where it takes all logits."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_launcher import SCHEDULES, Emulator

from engine import _kernels
from engine.devices.cuda import drawing
from engine.devices.program import DRAW, NO_DRAW
from tests.cusim import needs_emulator

pytestmark = needs_emulator


def draw_with(
    emulator: Emulator,
    logits: np.ndarray,
    draws: np.ndarray,
    allowed: np.ndarray | None = None,
    schedules: tuple[tuple[str, int], ...] = SCHEDULES[:1],
) -> np.ndarray:
    """Draw from each row, in each schedule; -2 where nothing was written."""
    n_rows, n_vocab = logits.shape
    if allowed is None:
        allowed = np.ones(n_vocab, np.bool_)
    bits, maxima = drawing.as_bits(allowed), np.full((n_rows, 1024), np.nan, np.float32)
    sums, n_done, found = np.zeros(n_rows, np.uint64), np.zeros(n_rows, np.uint32), None
    for order, seed in schedules:
        chosen = np.full(n_rows + 1, -2, np.int32)
        places = (emulator.at(a) for a in (bits, draws, maxima, sums, n_done, chosen))
        launches = drawing.launches(emulator.rows(logits), n_vocab, *places, emulator.count(n_rows))
        emulator.run(launches, order, seed)
        assert not sums.any()
        assert not n_done.any()
        assert chosen[-1] == -2  # of a row that there might have been
        assert found is None or (found == chosen).all()
        found = chosen
    assert found is not None
    return found[:-1]


def make_draws(n_rows: int, **values: object) -> np.ndarray:
    draws = np.zeros(n_rows, DRAW)
    for name, value in ({"top_p": 1.0, "inverse_temperature": 1.0} | values).items():
        draws[name] = value
    return draws


def sampled(logits: np.ndarray, draws: np.ndarray, temperature: float) -> list[int]:
    """What the CPU draws."""
    return [
        _kernels.sample(
            np.ascontiguousarray(row), np.zeros(0, np.int32), temperature, int(d["top_k"]), float(d["top_p"]),
            float(d["min_p"]), 1.0, 0.0, 0.0, float(d["uniform"])
        )
        for row, d in zip(logits, draws, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("n_vocab", [1, 31, 700, 1024, 1500, 9001])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_draws_are_those_of_the_cpu(n_vocab: int, temperature: float) -> None:
    rng = np.random.default_rng(n_vocab)
    settings = [
        (top_k, top_p, min_p)
        for top_k in (0, 1, 3, 40, 256)
        for top_p, min_p in ((1.0, 0.0), (0.5, 0.0), (0.95, 0.05), (2.0**-53, 0.0), (1.0, 0.3))
    ]
    logits = (rng.standard_normal((len(settings), n_vocab)) * 3).astype(np.float32)
    logits[::2] = np.round(logits[::2] * 4) / 4  # with ties
    draws = make_draws(len(settings), inverse_temperature=np.float32(1 / temperature))
    draws["top_k"], draws["top_p"], draws["min_p"] = zip(*settings, strict=True)
    n_drawn = 0
    for uniform in (0.0, 0.3, 1 - 2.0**-24):
        draws["uniform"] = uniform
        found = draw_with(Emulator(), logits, draws)
        expected = np.array(sampled(logits, draws, temperature))
        assert np.isin(found, [-1, *expected]).all()
        assert (found[found >= 0] == expected[found >= 0]).all()
        n_drawn += int((found >= 0).sum())
        is_short = (draws["top_k"] > 0) & (draws["top_k"] <= 40) & (np.arange(len(draws)) % 2 == 1)
        assert (found[is_short] >= 0).all()  # such are drawn wherever ties are few
    assert n_drawn >= 3 * 0.6 * len(settings)


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
def test_draws_break_no_rule(mode: str) -> None:
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((4, 20_000)) * 4).astype(np.float32)
    draws = make_draws(4, uniform=0.7)
    draws["top_k"], draws["top_p"] = (1, 40, 0, NO_DRAW), (1.0, 0.9, 0.8, 1.0)
    found = draw_with(Emulator(mode), logits, draws, schedules=SCHEDULES)
    assert found.tolist() == [*sampled(logits[:3], draws[:3], 1.0), -2]
    assert found[0] == logits[0].argmax()


def test_only_allowed_tokens_are_drawn() -> None:
    logits = np.tile(np.random.default_rng(0).uniform(-1, 0, 3000).astype(np.float32), (3, 1))
    logits[:, 2000:] += 5
    logits[:, [0, 7, 1999]] = 0.5, 1.0, 2.0
    allowed = np.arange(3000) < 2000
    allowed[1999] = False
    draws = make_draws(3, top_k=(1, 1, 2), uniform=(0.0, 0.9, 0.9))
    assert draw_with(Emulator(), logits, draws, allowed).tolist() == [7, 7, 0]
    assert draw_with(Emulator(), logits[:1], draws[:1], ~allowed).tolist() == [2000 + logits[0, 2000:].argmax()]


def test_logits_that_are_no_numbers() -> None:
    nan, inf = np.nan, np.inf
    logits = np.full((5, 40), -inf, np.float32)
    logits[0, [3, 9, 11]] = nan, 1.0, 1.0
    logits[1, [3, 9]] = nan, 1.0
    logits[2] = nan
    logits[4, 8] = inf
    draws = make_draws(5, top_k=(1, 0, 1, 1, 1), uniform=0.99)
    assert draw_with(Emulator(), logits, draws).tolist() == [9, 9, -1, -1, -1]  # what is left is the CPU's to decide


def test_what_takes_all_logits_is_left_to_the_cpu() -> None:
    logits = np.zeros((3, 5000), np.float32)  # all the same: more candidates than are kept
    draws = make_draws(3, top_k=(0, 40, 257), uniform=0.5)
    assert draw_with(Emulator(), logits, draws).tolist() == [-1, -1, -2]
