"""Sessions: what they hold, that saving and loading changes no bit, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf_mutations import parts_of

from engine import Engine, EngineConfig, SamplingParams
from engine.config import EngineSettings, ModelSettings
from engine.data import tiny_model_path
from engine.devices.program import SavingProgram
from engine.errors import DeviceError, RequestError
from engine.generate.session_file import VERSION
from engine.gguf.model_file import TensorInfo
from engine.quants.formats import BY_NAME

PARAMS = SamplingParams(temperature=0.0, max_tokens=9, logprobs=3, ignore_eos=True)
PROMPT = list(range(40, 77))


def open_engine(path: Path, **settings) -> Engine:
    settings = {"n_threads": 2, "context_length": 96, "max_batch_tokens": 32, "n_sequences": 2, **settings}
    return Engine.open(path, EngineConfig(ModelSettings(), EngineSettings(**settings)))


@pytest.fixture(params=["recurrent", "attention"])
def path(request: pytest.FixtureRequest, golden_path) -> Path:
    return tiny_model_path() if request.param == "recurrent" else golden_path("qwen3moe/qwen3moe-micro-Q8_0.gguf")


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("other", [{}, {"context_length": 70, "n_sequences": 1, "max_batch_tokens": 7}])
def test_a_saved_session_goes_on_with_the_same_bits(path: Path, kv_type: str, other: dict, tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    with open_engine(path, kv_type=kv_type) as engine, engine.new_session() as _, engine.new_session() as session:
        first = session.generate(PROMPT, PARAMS)
        session.save(file)
        longer = [*PROMPT, *first.token_ids, 5, 6]
        expected = session.generate(longer, PARAMS)
        assert expected.usage.n_reused_tokens == len(PROMPT) + 8
    with open_engine(path, kv_type=kv_type, **other) as engine:
        with engine.new_session() as another:
            another.run([1, 2, 3, 4, 5] * 9)  # what lay there before must not matter
        with engine.load_session(file) as session:
            assert session.token_ids == (*PROMPT, *first.token_ids[:-1])
            found = session.generate(longer, PARAMS)
            assert found.usage.n_reused_tokens == len(PROMPT) + 8
            assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)


def test_sessions_and_answers_do_not_meet(path: Path) -> None:
    with open_engine(path) as engine:
        expected = engine.generate(PROMPT, PARAMS).token_ids
        with engine.new_session() as session:
            stream = session.generate(PROMPT, PARAMS, stream=True)
            made = [next(stream).token_id for _ in range(3)]
            assert engine.generate(PROMPT, PARAMS).token_ids == expected
            stream.close()
            assert tuple(made) == expected[:3]
            assert session.token_ids[: len(PROMPT)] == tuple(PROMPT)
            assert session.generate(PROMPT, PARAMS).token_ids == expected
            logits = session.run([3, 4], "all")
            assert logits.shape == (2, engine.spec.n_vocab)
            assert session.n_tokens == len(PROMPT) + 8 + 2
        whole = engine.logits([*PROMPT, *expected[:-1], 3, 4])[-2:]
        assert np.array_equal(whole.view(np.uint32), logits.view(np.uint32))


def test_a_session_does_one_thing_at_a_time_and_nothing_once_it_is_closed(path: Path, tmp_path: Path) -> None:
    with open_engine(path, n_sequences=1) as engine:
        expected = engine.generate(PROMPT, PARAMS).token_ids
        session = engine.new_session()
        stream = session.generate(PROMPT, PARAMS, stream=True)
        found = [next(stream).token_id]
        for busy in (lambda: session.run([1, 2]), lambda: session.generate(PROMPT, PARAMS)):
            with pytest.raises(RequestError, match="an answer of this session is under way"):
                busy()
        session.close()  # the stream keeps the sequence
        found += [chunk.token_id for chunk in stream if chunk.completion is None]
        assert tuple(found) == expected
        assert engine.generate(PROMPT, PARAMS).token_ids == expected
        for closed in (
            lambda: session.run([1, 2]),
            lambda: session.generate(PROMPT, PARAMS),
            lambda: session.save(tmp_path / "s"),
            lambda: session.token_ids,
        ):
            with pytest.raises(RequestError, match="the session is closed"):
                closed()


def test_a_session_that_nobody_refers_to_is_closed(path: Path) -> None:
    with open_engine(path, n_sequences=1) as engine:
        session = engine.new_session()
        with pytest.warns(ResourceWarning, match="a session was not closed"):
            del session
        with engine.new_session() as session:
            assert session.n_tokens == 0


def test_a_run_that_is_stopped_leaves_what_the_session_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(path, max_batch_tokens=8) as engine, engine.new_session() as session:
        session.run(PROMPT)
        steps = engine._forward.program.run

        def stopped(ids, positions, *rest):
            if positions[0] >= len(PROMPT) + 8:
                raise KeyboardInterrupt
            return steps(ids, positions, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(engine._forward.program, "run", stopped)
            with pytest.raises(KeyboardInterrupt):
                session.run(list(range(30)))
        held = session.token_ids
        assert held in {(), tuple(PROMPT)}
        found = session.run([5, 6])
        with pytest.raises(RequestError, match="do not fit the context"):
            session.run(list(range(96)))
        assert session.token_ids == (*held, 5, 6)
    with open_engine(path) as engine, engine.new_session() as session:
        assert np.array_equal(session.run([*held, 5, 6]), found)


def test_files_that_are_refused(golden_path, tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    with open_engine(tiny_model_path()) as engine:
        with engine.new_session() as session:
            session.run(PROMPT)
            session.save(file)
            with pytest.raises(RequestError, match="cannot be written"):
                session.save(tmp_path / "no" / "where")
        good = file.read_bytes()
        about, _, rest = good.partition(b"\n")
        newer = json.loads(about) | {"version": VERSION + 1}
        bad = {
            "is not a saved session": [
                b"",
                b"hello\n",
                b"[]\n",
                b'{"kind": "x"}\n',
                tiny_model_path().read_bytes()[:9999],
            ],
            "format version": [json.dumps(newer).encode() + b"\n" + rest],
            "is damaged": [good[:-1], good + b"x", good[:-5] + b"\0\1\2\3\4", about + b"\n\7" + rest[1:]],
        }
        for message, contents in bad.items():
            for content in contents:
                file.write_bytes(content)
                with pytest.raises(RequestError, match=message):
                    engine.load_session(file)
        with pytest.raises(RequestError, match="cannot be read"):
            engine.load_session(tmp_path / "nothing")
        file.write_bytes(good)
        held = [engine.new_session(), engine.load_session(file)]  # no sequence was lost on the way
        for session in held:
            session.close()
    other = golden_path("qwen3moe/qwen3moe-micro-Q8_0.gguf")
    with open_engine(other) as engine, pytest.raises(RequestError, match="of another model"):
        engine.load_session(file)
    with (
        open_engine(tiny_model_path(), kv_type="f32") as engine,
        pytest.raises(RequestError, match="f16 keys and values"),
    ):
        engine.load_session(file)
    with (
        open_engine(tiny_model_path(), context_length=20) as engine,
        pytest.raises(RequestError, match="context_length"),
    ):
        engine.load_session(file)


def test_keys_that_were_rotated_otherwise_are_refused(golden_path, tmp_path: Path) -> None:
    """LongRoPE: how a key is rotated depends on how long the context may become."""
    file, path = tmp_path / "talk.session", tmp_path / "long.gguf"
    parts = parts_of(golden_path("qwen3moe/qwen3moe-micro-F32.gguf"))
    n_pairs = parts.values["qwen3moe.attention.key_length"] // 2
    names = "rope_factors_short.weight", "rope_factors_long.weight"
    parts.tensors.extend(TensorInfo(name, BY_NAME["F32"], (n_pairs,), 4 * n_pairs) for name in names)
    parts.values["qwen3moe.rope.scaling.original_context_length"] = 80
    path.write_bytes(parts.encode() + bytes(4 << 20))
    with open_engine(path) as engine, engine.new_session() as session:
        session.run(PROMPT)
        session.save(file)
        engine.load_session(file).close()
    with (
        open_engine(path, context_length=80) as engine,
        pytest.raises(RequestError, match="context_length for which this model rotates otherwise"),
    ):
        engine.load_session(file)


def test_a_device_that_cannot_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(tiny_model_path()) as engine, engine.new_session() as session:
        assert isinstance(engine._program, SavingProgram)
        monkeypatch.setattr(engine, "_program", object())
        with pytest.raises(DeviceError, match="cannot save or load sessions"):
            session.save(tmp_path / "x")
        monkeypatch.undo()
