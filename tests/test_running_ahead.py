"""Steps that are begun before the tokens of the one before are looked at: texts, slots and failures as without."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ahead_program
import numpy as np
import pytest
from ahead_program import EagerProgram, run_ahead
from interrupter import Interrupter
from small_engines import PROMPTS, open_engine

from engine.config import SamplingParams
from engine.errors import DeviceError
from engine.generate import forward as forward_module
from engine.generate import scheduler as scheduler_module
from engine.runtime import Engine

PARAMS = SamplingParams(temperature=0.5, top_k=40, seed=7, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(small_model: Path | None) -> list[tuple[int, ...]]:
    """The tokens that follow each prompt, one answer after the other, nothing ahead."""
    with open_engine(small_model, 1) as engine:
        return [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]


@pytest.fixture
def engine(small_model: Path | None) -> Iterator[Engine]:
    with open_engine(small_model, 3) as engine:
        yield engine


@pytest.fixture
def program(engine: Engine) -> EagerProgram:
    return run_ahead(engine)


def check(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    """Nothing is under way, all slots are free, and texts are what they were."""
    assert engine._scheduler._ahead is None
    assert all(owner is None for owner in engine._slots._owner)
    found = dict(engine.generate_many(PROMPTS, PARAMS))
    assert [found[i].token_ids for i in range(len(PROMPTS))] == alone


def test_one_answer_is_run_ahead_but_for_its_ends(engine: Engine, program: EagerProgram, alone: list) -> None:
    """The first token comes out of the prompt, and none is run beyond the last one."""
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        before = program.n_steps, program.n_ahead
        found = engine.generate(prompt, PARAMS)
        assert found.token_ids == expected
        assert program.n_steps - before[0] in (PARAMS.max_tokens, PARAMS.max_tokens + 1)  # one or two for the prompt
        assert program.n_ahead - before[1] == PARAMS.max_tokens - 2
    assert engine.statistics.n_decode_tokens == len(PROMPTS) * (PARAMS.max_tokens - 1)
    check(engine, alone)


def test_many_together_are_as_each_alone(engine: Engine, program: EagerProgram, alone: list) -> None:
    """Answers of several lengths, more than there are sequences."""
    short = replace(PARAMS, max_tokens=4)
    assert all(found.token_ids == alone[i][:4] for i, found in engine.generate_many(PROMPTS, short))
    assert program.n_ahead > 0
    check(engine, alone)


def test_an_end_that_nobody_knew_of_leaves_a_slot_that_holds_it(
    small_model: Path | None, engine: Engine, program: EagerProgram, alone: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the next prompt of a chat begins with it, nothing of that has to be run again."""
    for n_made in (1, 2, 5, 9, 10):
        end = alone[0][n_made - 1]
        if end in alone[0][: n_made - 1]:
            continue
        monkeypatch.setattr(engine.tokenizer, "eog_ids", frozenset({end}))
        params = replace(PARAMS, ignore_eos=False)
        prompt = engine.prompt_ids(PROMPTS[0])
        found = engine.generate(prompt, params)
        assert found.token_ids == alone[0][:n_made]
        assert found.finish_reason == "stop"
        n_held = len(prompt) + n_made - (n_made in (1, 10))  # after the last that it may have nothing is run
        again = engine.generate([*prompt, *found.token_ids, 5, 6], replace(params, max_tokens=1))
        assert again.usage.n_reused_tokens == n_held
        with open_engine(small_model, 1) as other:
            assert again.token_ids == other.generate([*prompt, *found.token_ids, 5, 6], params).token_ids[:1]
    monkeypatch.undo()
    check(engine, alone)


def test_texts_that_end_an_answer(engine: Engine, program: EagerProgram, alone: list) -> None:
    """Where a state cannot be cut back the text could not go on from before the last token: nothing is run ahead."""
    text = engine.detokenize(alone[3])
    stop = replace(PARAMS, stop=(text[-6:-3],))
    before = program.n_ahead
    found = engine.generate(PROMPTS[3], stop)
    assert found.finish_reason == "stop"
    assert text.startswith(found.text)
    assert (program.n_ahead > before) == (engine._slots.cuts_back != 0)
    check(engine, alone)


@pytest.mark.parametrize("at_step", [2, 3, 6])
def test_tokens_that_cannot_be_drawn_after_all(
    engine: Engine, program: EagerProgram, alone: list, at_step: int
) -> None:
    """They are chosen from logits, which takes the steps since then once more; later ones are not run ahead."""
    program.gives_up = lambda step, row: step >= at_step and row == 0
    found = dict(engine.generate_many(PROMPTS, PARAMS))
    assert [found[i].token_ids for i in range(len(PROMPTS))] == alone
    program.gives_up = lambda *_: False
    check(engine, alone)


def test_what_is_looked_at_is_not_run_ahead(engine: Engine, program: EagerProgram) -> None:
    for params in ({"logprobs": 1}, {"repetition_penalty": 1.1}, {"top_k": 0}, {"top_k": 1000}):
        engine.generate(PROMPTS[0], replace(PARAMS, **params))
    assert program.n_ahead == 0


@pytest.mark.parametrize("n_read", [1, 2, 5])
def test_a_reader_who_leaves_early(engine: Engine, program: EagerProgram, alone: list, n_read: int) -> None:
    """Others go on, and what the slot holds can be used."""
    leaving, staying = (engine.generate(prompt, PARAMS, stream=True) for prompt in PROMPTS[:2])
    next(staying)
    tokens = [next(leaving).token_id for _ in range(n_read)]
    leaving.close()
    assert tokens == list(alone[0][:n_read])
    again = engine.generate(PROMPTS[0], PARAMS)
    assert again.token_ids == alone[0]
    assert list(staying)[-1].completion.token_ids == alone[1]
    check(engine, alone)


def test_something_else_between_two_tokens(engine: Engine, program: EagerProgram, alone: list, tmp_path: Path) -> None:
    """A session of its own, which runs, is saved and loaded, finds no step under way."""
    with engine.new_session() as session:
        expected = session.run([1, 2, 3]).copy()
        stream = engine.generate(PROMPTS[2], PARAMS, stream=True)
        tokens = []
        for i, chunk in enumerate(stream):
            if chunk.completion is None:
                tokens.append(chunk.token_id)
            if i == 2:
                assert engine._scheduler._ahead is not None
                session.save(tmp_path / "session")
                assert engine._scheduler._ahead is None
            if i == 4:
                with engine.load_session(tmp_path / "session") as loaded:
                    assert (loaded.run([4]) == session.run([4])).all()
            if i == 6:
                assert (engine.logits([1, 2, 3])[-1] == expected[-1]).all()
    assert tokens == list(alone[2])
    check(engine, alone)


def test_threads_that_read_leave_and_do_something_else(engine: Engine, program: EagerProgram, alone: list) -> None:
    """Two read answers, whole ones and beginnings; a third has a session of its own."""
    stop, errors = threading.Event(), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(12):
                i, n_read = int(rng.integers(len(PROMPTS))), int(rng.integers(1, 2 * PARAMS.max_tokens))
                stream = engine.generate(PROMPTS[i], PARAMS, stream=True)
                tokens = [c.token_id for c in itertools.islice(stream, n_read) if c.completion is None]
                stream.close()
                assert tokens == list(alone[i][:n_read])
        except BaseException as error:
            errors.append(error)

    def work() -> None:
        try:
            with engine.new_session() as session:
                expected = session.run([1, 2, 3])
            while not stop.is_set():
                with engine.new_session() as session:
                    assert (session.run([1, 2, 3]) == expected).all()
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in (1, 2)]
    worker = threading.Thread(target=work)
    for thread in (*readers, worker):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    worker.join()
    assert not errors
    assert program.n_ahead > 0
    check(engine, alone)


def test_an_answer_joins_those_that_are_run_ahead(engine: Engine, program: EagerProgram, alone: list) -> None:
    first = engine.generate(PROMPTS[0], PARAMS, stream=True)
    for _ in range(4):
        next(first)
    assert engine.generate(PROMPTS[3], PARAMS).token_ids == alone[3]
    assert list(first)[-1].completion.token_ids == alone[0]
    check(engine, alone)


def test_a_failing_step_ends_its_answers_and_no_more(engine: Engine, program: EagerProgram, alone: list) -> None:
    for at in range(1, 11):
        n_before = program.n_steps

        def fail(n: int, at: int = n_before + at) -> None:
            if n == at:
                program.is_broken = at % 2 == 0
                raise DeviceError("broken")

        program.before = fail
        first, *_ = engine.generate_many(PROMPTS[:2], PARAMS)
        assert isinstance(first[1], DeviceError)
        assert str(first[1]).endswith("broken")
        program.before, program.is_broken = lambda _: None, False
        check(engine, alone)


def test_a_callback_that_fails_is_its_own_answers_trouble(engine: Engine, program: EagerProgram, alone: list) -> None:
    def fail(done: int, total: int) -> None:
        raise RuntimeError("own")

    first = engine.generate(PROMPTS[0], PARAMS, stream=True)
    for _ in range(3):
        next(first)
    with pytest.raises(RuntimeError, match="own"):
        engine.generate(PROMPTS[1], PARAMS, progress=fail)
    assert list(first)[-1].completion.token_ids == alone[0]
    check(engine, alone)


def test_closing_the_engine_between_two_tokens(small_model: Path | None) -> None:
    with open_engine(small_model, 2) as engine:
        run_ahead(engine)
        stream = engine.generate(PROMPTS[0], PARAMS, stream=True)
        for _ in range(3):
            next(stream)
        assert engine._scheduler._ahead is not None
    with pytest.raises(Exception, match="closed"):
        list(stream)


def test_ctrl_c_anywhere_in_a_step(small_model: Path | None, alone: list) -> None:
    """Another answer goes on to its end, and the slots hold nothing false."""
    modules = [forward_module, ahead_program, scheduler_module]
    but_for = {"complete", "stream", "_lead", "remove", "_let_go", "_is_under_way", "drop"}  # around it; what cleans up
    with open_engine(small_model, 3) as engine:
        program, at_line, n_raised = run_ahead(engine), 1, 0
        while True:
            other = engine.generate(PROMPTS[1], PARAMS, stream=True)
            tokens = [next(other).token_id for _ in range(3)]
            with Interrupter(at_line, modules, but_for) as interrupter:
                try:
                    engine.generate(PROMPTS[0], PARAMS)
                except KeyboardInterrupt:
                    n_raised += 1
            tokens += [chunk.token_id for chunk in other if chunk.completion is None]
            assert tokens == list(alone[1])
            assert engine.generate(PROMPTS[0], PARAMS).token_ids == alone[0]
            if not interrupter.raised:
                break
            at_line += 11
        assert n_raised > 10
        assert program.n_ahead > 0
        check(engine, alone)
