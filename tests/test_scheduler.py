"""Answers that share their steps: the same bits as alone, fair shares, and nothing lost when a step is stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_engines import PROMPTS, open_engine

from engine import Engine, SamplingParams
from engine.errors import DeviceError, RequestError
from engine.generate.scheduler import MAX_UNREAD, share_out

PARAMS = SamplingParams(temperature=0.9, seed=7, max_tokens=10, logprobs=2)


@pytest.fixture(scope="module")
def alone(small_model: Path | None) -> list:
    """Every prompt answered by itself in an engine of its own."""
    with open_engine(small_model, 1) as engine:
        return [outcome(engine.generate(prompt, PARAMS)) for prompt in PROMPTS]


@pytest.fixture
def three(small_model: Path | None) -> Iterator[Engine]:
    with open_engine(small_model) as engine:
        yield engine


def outcome(answer) -> tuple:
    """Return what must not depend on other answers; log probabilities show single bits of the logits."""
    return answer.token_ids, answer.text, answer.finish_reason, answer.logprobs


def record_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Note the tokens of each sequence in each step that is run from now on."""
    steps: list[list[int]] = []
    run = engine._forward.program.run

    def recorded(token_ids, positions, slots, rows):
        steps.append(np.bincount(slots)[np.bincount(slots) > 0].tolist())
        return run(token_ids, positions, slots, rows)

    monkeypatch.setattr(engine._forward.program, "run", recorded)
    return steps


def test_many_together_are_as_each_alone(three: Engine, alone: list, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = record_steps(three, monkeypatch)
    found = dict(three.generate_many(PROMPTS, PARAMS))
    assert [outcome(found[i]) for i in range(len(PROMPTS))] == alone
    assert max(len(step) for step in steps) == 3
    assert len(steps) < 35  # one by one would be over fifty
    assert three.statistics.n_requests == 5
    assert three.statistics.n_decode_tokens == sum(len(answer[0]) - 1 for answer in alone)
    assert three.statistics.n_prompt_tokens == sum(answer.usage.n_prompt_tokens for answer in found.values()) - (
        three.statistics.n_reused_tokens
    )


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 5])
def test_the_cut_of_steps_changes_nothing(small_model: Path | None, alone: list, max_batch_tokens: int) -> None:
    with open_engine(small_model, max_batch_tokens=max_batch_tokens) as engine:
        found = dict(engine.generate_many(PROMPTS, PARAMS))
    assert [outcome(found[i]) for i in range(len(PROMPTS))] == alone


def test_threads_share_steps(three: Engine, alone: list, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = record_steps(three, monkeypatch)
    found: dict[int, tuple] = {}
    barrier = threading.Barrier(len(PROMPTS))

    def work(i: int) -> None:
        barrier.wait(30)
        *_, last = three.generate(PROMPTS[i], PARAMS, stream=True)
        found[i] = outcome(last.completion)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(PROMPTS))] == alone
    assert max(len(step) for step in steps) > 1


def test_a_new_prompt_joins_a_running_answer(three: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = record_steps(three, monkeypatch)
    with closing(three.generate(PROMPTS[0], PARAMS, stream=True)) as first:
        next(first)
        long = three.generate([5] * 100, SamplingParams(max_tokens=1, temperature=0.0))
        assert long.usage.n_prompt_tokens == 100
        together = [step for step in steps if len(step) == 2]
        assert [sum(step) for step in together[:3]] == [32, 32, 32]  # full steps, the answer's token in each of them
        assert all(1 in step for step in together)


def test_a_reader_who_does_not_read_is_not_worked_for(three: Engine, alone: list) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with closing(three.generate(PROMPTS[0], params, stream=True)) as unread:
        next(unread)
        before = three.statistics.n_decode_tokens
        three.generate(PROMPTS[1], params)
        assert three.statistics.n_decode_tokens - before == 59 + MAX_UNREAD
        rest = list(unread)
    assert rest[-1].completion.token_ids == three.generate(PROMPTS[0], params).token_ids


def test_errors_of_one_are_not_those_of_others(three: Engine, alone: list) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError("the caller's own")

    found = dict(three.generate_many([PROMPTS[0], "", [10**6], "x " * 500, PROMPTS[1]], PARAMS))
    assert outcome(found[0]) == alone[0]
    assert outcome(found[4]) == alone[1]
    for i, message in ((1, "empty"), (2, "not in the vocabulary"), (3, "context")):
        assert isinstance(found[i], RequestError)
        assert message in str(found[i])
    with closing(three.generate(PROMPTS[1], PARAMS, stream=True)) as other:
        next(other)
        with pytest.raises(RuntimeError, match="own"):
            three.generate(PROMPTS[0], PARAMS, progress=fail)
        assert list(other)[-1].completion.token_ids == alone[1][0]


@pytest.mark.parametrize("what", ["generate", "stream", "many", "session", "logits", "close"])
def test_a_callback_cannot_ask_for_anything(three: Engine, alone: list, what: str) -> None:
    """It would wait for the end of the step that waits for it."""
    calls = {
        "generate": lambda: three.generate(PROMPTS[1], PARAMS),
        "stream": lambda: next(three.generate(PROMPTS[1], PARAMS, stream=True)),
        "many": lambda: next(three.generate_many(PROMPTS, PARAMS)),
        "session": three.new_session,
        "logits": lambda: three.logits([1, 2]),
        "close": three.close,
    }
    with pytest.raises(RequestError, match="a callback that is told of a step cannot ask"):
        three.generate(PROMPTS[0], PARAMS, progress=lambda *_: calls[what]())
    assert [outcome(three.generate(prompt, PARAMS)) for prompt in PROMPTS] == alone
    assert three._slots._owner == [None] * 3


def test_an_answer_may_be_left_in_a_callback(three: Engine, alone: list) -> None:
    """As happens, too, to an iterator that is collected there."""
    streams = [three.generate(prompt, PARAMS, stream=True) for prompt in PROMPTS[1:3]]
    for stream in streams:
        next(stream)

    def leave(*_) -> None:
        while streams:
            streams.pop().close()

    assert outcome(three.generate(PROMPTS[0], PARAMS, progress=leave)) == alone[0]
    assert three._slots._owner == [None] * 3
    assert [outcome(three.generate(prompt, PARAMS)) for prompt in PROMPTS] == alone


def test_a_device_that_fails_ends_all_answers_and_no_more(
    three: Engine, alone: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*step):
        raise DeviceError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(three._forward.program, "run", fail)
        assert all(isinstance(answer, DeviceError) for _, answer in three.generate_many(PROMPTS, PARAMS))
    assert outcome(three.generate(PROMPTS[0], PARAMS)) == alone[0]


@pytest.mark.parametrize("at_step", [1, 4, 7])
def test_ctrl_c_in_one_reader_does_not_hurt_the_others(
    three: Engine, alone: list, at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [three.generate(prompt, PARAMS, stream=True) for prompt in PROMPTS[:2]]
    texts = [next(stream).text for stream in streams]
    run, n_steps = three._forward.program.run, 0

    def interrupted(*step):
        nonlocal n_steps
        n_steps += 1
        result = run(*step)  # the device has moved on when the signal is noticed
        if n_steps == at_step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(three._forward.program, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        three.generate(PROMPTS[2], PARAMS)
    for text, stream, expected in zip(texts, streams, alone, strict=False):
        rest = list(stream)
        assert outcome(rest[-1].completion) == expected
        assert text + "".join(chunk.text for chunk in rest) == expected[1]


def test_closing_early_gives_all_sequences_back(three: Engine) -> None:
    many = three.generate_many(PROMPTS, PARAMS)
    next(many)
    many.close()
    assert len(dict(three.generate_many(PROMPTS, PARAMS))) == 5
    held = [three.new_session() for _ in range(3)]
    with pytest.raises(RequestError, match="n_sequences"):
        next(three.generate_many(PROMPTS, PARAMS))
    for sequence in held:
        sequence.close()


@dataclass
class Waiting:
    n_pending: int
    last_step: int


@given(st.lists(st.builds(Waiting, st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=12), st.integers(1, 50))
def test_shares(waiting: list[Waiting], n_tokens: int) -> None:
    shares = share_out(waiting, n_tokens)
    given_out = sum(n for _, n in shares)
    assert given_out == min(n_tokens, sum(w.n_pending for w in waiting))  # no token of a step is left unused
    assert all(1 <= n <= w.n_pending for w, n in shares)
    assert len(shares) == min(n_tokens, len(waiting))
    left_out = [w for w in waiting if not any(w is chosen for chosen, _ in shares)]
    assert all(w.last_step >= chosen.last_step for w in left_out for chosen, _ in shares)
    for w, n in shares:  # who gets less than he needs gets no less than anybody else, but for rounding
        assert n == w.n_pending or n >= max(n for _, n in shares) - 1
