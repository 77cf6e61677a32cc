"""The engine as a library: answers, streams, reuse, threads, and everything that can go wrong with a request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from model_runner import ModelRunner

from engine import Engine, EngineConfig, SamplingParams
from engine.config import EngineSettings, ModelSettings, MoESettings
from engine.data import tiny_model_path
from engine.devices.graph import KVType
from engine.devices.traffic import count_weights
from engine.errors import ConfigError, DeviceError, GGUFError, RequestError, TokenizerError
from engine.gguf.reader import DEFAULT_ALIGNMENT, GGUFFile
from engine.gguf.writer import encode_head
from engine.models import load_model
from engine.runtime import resolve
from engine.synthetic import open_model_file

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPT = "def main():"


def config(load="mmap", **settings) -> EngineConfig:
    settings = {"n_threads": 2, "context_length": 128, "max_batch_tokens": 32, **settings}
    return EngineConfig(ModelSettings(load=load), EngineSettings(**settings))


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The bundled model, which has recurrent layers."""
    with Engine.open(config=config()) as opened:
        yield opened


@pytest.fixture(scope="module")
def attention_path(golden_path) -> Path:
    """A model of attention layers only."""
    return golden_path("qwen3moe/qwen3moe-micro-Q8_0.gguf")


@pytest.fixture(scope="module", params=[("deepseek4", "deepseek-v3"), ("qwen4exp", "qwen35")], ids=lambda kind: kind[0])
def shared_keys_path(request, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which some tokens share a key, with a tokenizer."""
    name, pre = request.param
    path = tmp_path_factory.mktemp(name) / "model.gguf"
    with GGUFFile.open(data / "peers" / f"{name}-F32.gguf") as file:
        values = {key: file.metadata.value(key) for key in file.metadata}
        texts = {"model": "gpt2", "pre": pre, "tokens": [f"t{i}" for i in range(128)], "merges": []}
        values |= {f"tokenizer.ggml.{key}": value for key, value in texts.items()}
        values["tokenizer.ggml.token_type"] = np.ones(128, np.int32)
        parts = [encode_head(values, file.tensors.values())]
        for name, info in file.tensors.items():
            stored = file.mapped(name)
            assert stored is not None
            parts.append(stored.tobytes() + bytes(-info.n_bytes % DEFAULT_ALIGNMENT))
    path.write_bytes(b"".join(parts))
    return path


# -- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_says_everything_about_itself(engine: Engine) -> None:
    answer = engine.generate(PROMPT, GREEDY)
    assert answer.text == engine.detokenize(answer.token_ids)
    assert len(answer.token_ids) == 12
    assert answer.finish_reason == "length"
    assert answer.usage.n_prompt_tokens == len(engine.tokenize(PROMPT, add_special=True))
    assert answer.usage.n_generated_tokens == 12
    assert answer.logprobs == ()
    assert 0 < answer.timings.prompt_s <= answer.timings.first_token_s
    assert answer.timings.decode_tok_s == pytest.approx(11 / answer.timings.decode_s)


def test_the_greedy_answer_is_the_best_logit_each_time(engine: Engine) -> None:
    ids = engine.tokenize(PROMPT, add_special=True)
    answer = list(engine.generate(ids, GREEDY).token_ids)
    logits = engine.logits(ids + answer)
    assert logits.shape == (len(ids) + 12, engine.spec.n_vocab)
    assert logits.dtype == np.float32
    assert logits[len(ids) - 1 : -1].argmax(1).tolist() == answer


def test_a_stream_gives_the_same_answer_in_pieces(engine: Engine) -> None:
    whole = engine.generate(PROMPT, GREEDY)
    chunks = list(engine.generate(PROMPT, GREEDY, stream=True))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(chunk.token_id for chunk in chunks[:-1]) == whole.token_ids
    assert all(chunk.completion is None for chunk in chunks[:-1])
    assert chunks[-1].token_id is None
    assert chunks[-1].completion.text == whole.text


def test_a_seed_gives_the_same_text_again(engine: Engine) -> None:
    free = engine.generate(PROMPT, SamplingParams(temperature=1.5, top_k=0, top_p=1.0, max_tokens=12))
    params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, max_tokens=12, seed=free.seed)
    assert engine.generate(PROMPT, params).token_ids == free.token_ids
    assert engine.generate(PROMPT, SamplingParams(temperature=1.5, max_tokens=12, seed=5)).seed == 5


def test_log_probabilities(engine: Engine) -> None:
    ids = engine.tokenize(PROMPT, add_special=True)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3)
    answer = engine.generate(ids, params)
    logits = engine.logits(ids + list(answer.token_ids))[len(ids) - 1 : -1].astype(np.float64)
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    assert len(answer.logprobs) == 4
    for i, rated in enumerate(answer.logprobs):
        assert rated.chosen == rated.top[0]
        assert [entry.token_id for entry in rated.top] == np.argsort(-expected[i], kind="stable")[:3].tolist()
        assert [entry.logprob for entry in rated.top] == pytest.approx(np.sort(expected[i])[:-4:-1], abs=1e-4)
    assert "".join(rated.chosen.text for rated in answer.logprobs) == answer.text
    none = engine.generate(ids, SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)).logprobs
    assert none[0].top == ()
    assert none[0].chosen == answer.logprobs[0].chosen


def test_stop_texts_end_the_answer(engine: Engine) -> None:
    whole = engine.generate(PROMPT, GREEDY).text
    stop = whole[5:8]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=(stop,))
    answer = engine.generate(PROMPT, params)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_messages_go_through_the_chat_template(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hello<|im_end|>"}]
    text = engine.detokenize(engine.prompt_ids(messages), skip_special=False)
    assert "hello" in text
    assert "<|im_start|>assistant" in text
    assert engine.generate(messages, GREEDY).usage.n_prompt_tokens == len(engine.prompt_ids(messages))


def test_a_chat_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    settings = EngineConfig(ModelSettings(chat_template=str(path)), EngineSettings(context_length=64))
    messages = [{"role": "user", "content": "hello"}]
    with Engine.open(config=settings) as engine:
        assert engine.detokenize(engine.prompt_ids(messages)) == "user: hello\nassistant:"
    path.unlink()
    with pytest.raises(ConfigError, match=r"model\.chat_template.*own\.jinja"):
        Engine.open(config=settings)


def test_default_sampling_is_that_of_the_settings() -> None:
    settings = EngineConfig(engine=EngineSettings(context_length=64), sampling=SamplingParams(max_tokens=3))
    with Engine.open(config=settings) as engine:
        assert len(engine.generate(PROMPT).token_ids) == 3


# -- reuse of what was run -------------------------------------------------------------------------------------------


def test_attention_reuses_the_common_prefix_without_changing_a_bit(attention_path: Path) -> None:
    with Engine.open(attention_path, config()) as warm, Engine.open(attention_path, config()) as cold:
        ids = list(range(40, 80))
        params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=5, ignore_eos=True)
        warm.generate(ids, params)
        for prompt in (ids, [*ids[:25], 3, 4, 5], ids[:10]):
            reused, fresh = warm.generate(prompt, params), cold.generate(prompt, params)
            assert reused.usage.n_reused_tokens > 0
            assert reused.token_ids == fresh.token_ids
            assert reused.logprobs == fresh.logprobs
            cold.logits([0])  # forget
        assert warm.statistics.n_reused_tokens >= 39 + 25 + 9


def test_what_makes_shared_keys_is_not_cut_back(shared_keys_path: Path) -> None:
    """A prompt that leaves another behind its beginning, in the midst of tokens that share a key, starts anew."""
    ids = np.random.default_rng(5).integers(0, 128, 60).tolist()
    prompts = [ids[:41], [*ids[:30], 7, 9], [*ids[:30], 7, 9, *ids[40:50]], ids]
    with Engine.open(shared_keys_path, config=config()) as warm:
        found = [warm.generate(prompt, GREEDY) for prompt in prompts]
    for prompt, answer in zip(prompts, found, strict=True):
        with Engine.open(shared_keys_path, config=config()) as cold:
            assert cold.generate(prompt, GREEDY).token_ids == answer.token_ids
    assert len({answer.token_ids for answer in found}) == len(prompts)
    with Engine.open(shared_keys_path, config=config(n_sequences=3)) as engine:
        together = dict(engine.generate_many(prompts, GREEDY))
    assert [together[i].token_ids for i in range(len(prompts))] == [answer.token_ids for answer in found]


def test_recurrent_layers_reuse_a_conversation_that_goes_on(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=5, ignore_eos=True)
    ids = engine.tokenize("import os\n\ndef read(path):", add_special=True)
    engine.logits([1, 2, 3])
    first = engine.generate(ids, params)
    assert first.usage.n_reused_tokens == 0
    longer = [*ids, *first.token_ids, *engine.tokenize("\n\nclass A:")]
    second = engine.generate(longer, params)
    assert second.usage.n_reused_tokens == len(ids) + 4  # the last token that was chosen was never run
    engine.logits([1, 2, 3])
    fresh = engine.generate(longer, params)
    assert fresh.usage.n_reused_tokens == 0
    assert (fresh.token_ids, fresh.logprobs) == (second.token_ids, second.logprobs)
    # Shorter: a state goes back to where it was remembered, two tokens before the end of a prompt, and to nothing else.
    assert engine.generate(longer[:-1], params).usage.n_reused_tokens == len(longer) - 2
    assert engine.generate(longer[:-2], params).usage.n_reused_tokens == len(ids) - 2
    assert engine.generate(ids[:-2], params).usage.n_reused_tokens == 0


def test_sequences_with_the_same_tokens_share_a_copy(engine: Engine) -> None:
    ids = engine.tokenize("import os\n\ndef read(path):", add_special=True)
    longer = [*ids[:-2], *engine.tokenize("name):")]
    expected = engine.generate(longer, GREEDY)
    with (
        Engine.open(config=config(n_sequences=2, n_snapshots=1)) as warm,
        warm.new_session() as one,
        warm.new_session() as other,
    ):
        sessions = (one, other)
        for session in sessions:
            session.generate(ids, GREEDY)
        for session in sessions:
            answer = session.generate(longer, GREEDY)
            assert answer.usage.n_reused_tokens == len(ids) - 2
            assert answer.token_ids == expected.token_ids


def reused_and_fresh(warm: Engine, cold: Engine, prompt: list[int], params: SamplingParams) -> int:
    """Answer in both, check that they agree to the bit, and return how much `warm` reused."""
    reused, fresh = warm.generate(prompt, params), cold.generate(prompt, params)
    assert fresh.usage.n_reused_tokens == 0
    assert (reused.token_ids, reused.logprobs) == (fresh.token_ids, fresh.logprobs)
    cold.logits([0])  # forget
    return reused.usage.n_reused_tokens


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_chat_whose_history_is_edited_is_taken_up_at_the_end_of_a_message(device: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=7, logprobs=5, ignore_eos=True)
    settings = {"device": device, "context_length": 256}
    with Engine.open(config=config(**settings)) as warm, Engine.open(config=config(n_snapshots=0, **settings)) as cold:
        (end,) = warm.tokenize("<|im_end|>", parse_special=True)
        assert end in warm.tokenizer.eog_ids
        head, first = warm.tokenize("user:"), [*warm.tokenize("import os\n\nand then some more of it"), end]
        assert reused_and_fresh(warm, cold, [*first, *head], params) == 0
        assert warm.statistics.snapshot_bytes > 0
        # The head of the answer is written differently, as when its thinking is left out.
        second = [*first, *warm.tokenize("x = 1"), end, *warm.tokenize("and what is x?"), end]
        assert reused_and_fresh(warm, cold, [*second, *head], params) == len(first)
        # The same once more, and with another question: both times back to the end of a message.
        assert reused_and_fresh(warm, cold, [*second, *head], params) == len(second)
        other = [*first, *warm.tokenize("y = 2 * 3"), end]
        assert reused_and_fresh(warm, cold, [*other, *head], params) == len(first)
        # What was cut off is gone: the end of `second` cannot be gone back to.
        assert reused_and_fresh(warm, cold, [*second, *head], params) == len(first)
        # Without messages: all but the last two tokens.
        plain = warm.tokenize("def main():\n    return 0")
        assert reused_and_fresh(warm, cold, plain, params) == 0
        assert reused_and_fresh(warm, cold, plain, params) == len(plain) - 2
        assert warm.statistics.snapshot_bytes <= 4 * warm.statistics.state_bytes
        assert cold.statistics.snapshot_bytes == 0


def test_what_prompts_begin_with_is_run_twice_and_no_more() -> None:
    """The same instructions, then a question each: the second prompt tells that there are such."""
    params = SamplingParams(temperature=0.0, max_tokens=7, logprobs=5, ignore_eos=True)
    with Engine.open(config=config()) as warm, Engine.open(config=config(n_snapshots=0)) as cold:
        instructions = (warm.tokenize("def read_config(path):\n    return") * 20)[:70]
        questions = [warm.tokenize(text) for text in ("1 + 1", "x = None", "import os", "0")]
        found = [reused_and_fresh(warm, cold, [*instructions, *question], params) for question in questions]
    assert found == [0, 0, 70, 70]


def test_a_session_goes_back_and_is_saved_there(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=5, ignore_eos=True)
    with Engine.open(config=config(n_sequences=2)) as engine, engine.new_session() as session:
        prompt = engine.tokenize("import os\n\ndef read(path):")
        first = session.generate(prompt, params)
        again = session.generate(prompt, params, stream=True)
        next(again)
        again.close()  # cut back, and stopped after a token
        assert session.n_tokens == len(prompt)
        session.save(tmp_path / "there")
        session.close()
        with engine.load_session(tmp_path / "there") as loaded:
            longer = [*prompt, *first.token_ids]
            assert loaded.generate(longer, params).usage.n_reused_tokens == len(prompt)
            assert loaded.generate(longer, params).logprobs == engine.generate(longer, params).logprobs


def test_a_step_that_is_interrupted_goes_back_to_the_last_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(config=config()) as engine:
        prompt = engine.tokenize(PROMPT)
        expected, run, n_steps = engine.generate(prompt, GREEDY), engine._program.run, 0
        engine.logits([1, 2])

        def interrupted(*args):
            nonlocal n_steps
            result = run(*args)
            n_steps += 1
            if n_steps == 5:  # two steps of the prompt, three of the answer
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(engine._program, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompt, GREEDY)
        monkeypatch.undo()
        again = engine.generate(prompt, GREEDY)
        assert again.usage.n_reused_tokens == len(prompt) - 2
        assert again.token_ids == expected.token_ids


def test_without_memory_for_a_snapshot_answers_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(slot: int, n_tokens: int) -> None:
        raise MemoryError

    expected = engine.generate(PROMPT, GREEDY)
    with Engine.open(config=config()) as without:
        monkeypatch.setattr(without._program, "save_states", full)
        for prompt in ("import re", "class A:", PROMPT):
            found = without.generate(prompt, GREEDY)
        assert found.token_ids == expected.token_ids
    assert [r.message for r in caplog.records if "n_snapshots" in r.message] == [
        "no memory for more than 0 copies of states: set n_snapshots = 0"
    ]


# -- sequences and threads -------------------------------------------------------------------------------------------


def test_closing_a_stream_frees_its_sequence_and_counts_it(engine: Engine) -> None:
    before = engine.statistics
    stream = engine.generate(PROMPT, GREEDY, stream=True)
    made = [next(stream).token_id for _ in range(3)]
    with pytest.raises(RequestError, match="n_sequences"):
        engine.generate(PROMPT, GREEDY)
    stream.close()
    assert tuple(made) == engine.generate(PROMPT, GREEDY).token_ids[:3]
    after = engine.statistics
    assert after.n_requests == before.n_requests + 2  # one was refused
    assert after.n_decode_tokens == before.n_decode_tokens + 2 + 11


def test_a_stream_nobody_reads_holds_nothing(engine: Engine) -> None:
    stream = engine.generate(PROMPT, GREEDY, stream=True)
    assert engine.generate(PROMPT, GREEDY).finish_reason == "length"
    assert len(list(stream)) == 13


def test_interleaved_streams_do_not_see_each_other(engine: Engine) -> None:
    prompts = (PROMPT, "# Installing\n\nTo install")
    alone = [engine.generate(prompt, GREEDY).token_ids for prompt in prompts]
    with Engine.open(config=config(n_sequences=2)) as two:
        streams = [two.generate(prompt, GREEDY, stream=True) for prompt in prompts]
        made: list[list[int]] = [[], []]
        for _ in range(12):
            for ids, stream in zip(made, streams, strict=True):
                ids.append(next(stream).token_id)
        assert [tuple(ids) for ids in made] == alone


def test_threads_take_turns(engine: Engine) -> None:
    prompts = [f"x{i} = " for i in range(5)]
    expected = [engine.generate(prompt, GREEDY).token_ids for prompt in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def work(i: int, shared: Engine) -> None:
        found[i] = shared.generate(prompts[i], GREEDY).token_ids

    with Engine.open(config=config(n_sequences=2)) as shared:
        threads = [threading.Thread(target=work, args=(i, shared)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found[i] for i in range(5)] == expected


def test_a_sequence_in_the_callers_hands(engine: Engine) -> None:
    ids = engine.tokenize(PROMPT, add_special=True)
    expected = engine.logits(ids)
    with engine.new_session() as sequence:
        assert sequence.run(ids[:2], "none").shape == (0, engine.spec.n_vocab)
        last = sequence.run(ids[2:-1])
        end = sequence.run(ids[-1:], "all")
        assert sequence.n_tokens == len(ids)
    assert np.array_equal(bits(last), bits(expected[-2:-1]))
    assert np.array_equal(bits(end), bits(expected[-1:]))


def test_interrupt_in_the_middle_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(config=config()) as engine:
        expected = engine.generate(PROMPT, GREEDY).token_ids
        run, steps = engine._program.run, []

        def interrupted(*args):
            result = run(*args)  # the device has moved on when the signal is noticed
            steps.append(args)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(engine._program, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPT, GREEDY)
        monkeypatch.undo()
        assert engine.generate(PROMPT, GREEDY).token_ids == expected


# -- agreement with the parts below ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 3}, {"n_threads": 1, "isa": "scalar"}, {"load": "memory"}])
def test_settings_that_must_not_change_a_bit(engine: Engine, settings: dict) -> None:
    ids = engine.tokenize("from pathlib import Path\n\nclass Reader:", add_special=True)
    expected = engine.logits(ids)
    with Engine.open(config=config(**settings)) as other:
        assert np.array_equal(bits(other.logits(ids)), bits(expected))
    with ModelRunner(tiny_model_path(), kv_type=KVType.F16) as runner:
        assert np.array_equal(bits(runner.logits(ids)), bits(expected))


def test_statistics_add_up(engine: Engine) -> None:
    statistics = engine.statistics
    model = load_model(open_model_file(tiny_model_path()))
    weights = count_weights(model.graph)
    assert statistics.weights == weights
    assert weights.chosen_bytes == weights.expert_bytes * 4 // 56
    assert weights.expert_layers == 8
    assert weights.token_bytes < weights.dense_bytes + weights.expert_bytes
    assert sum(weights.by_format.values()) == pytest.approx(statistics.file_bytes, rel=0.02)  # vectors left out
    parts = (statistics.file_bytes, statistics.state_bytes, statistics.scratch_bytes, statistics.snapshot_bytes)
    assert statistics.ram_bytes == sum(parts)
    assert statistics.state_bytes > 0
    assert "tiny-moe" in statistics.model
    assert "2 threads" in statistics.device


def test_progress_is_told(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.generate([5] * 70, SamplingParams(max_tokens=1), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(32, 70), (64, 70), (68, 70), (70, 70)]  # the state is remembered before the last tokens
    loaded: list[tuple[str, int, int]] = []
    with Engine.open(config=config(load="memory"), progress=lambda *step: loaded.append(step)):
        assert loaded[-1][1] == loaded[-1][2] > 10_000_000
        assert {what for what, _, _ in loaded} == {"loading weights"}


def test_profile_names_every_operation(engine: Engine) -> None:
    times = engine.profile(engine.tokenize(PROMPT))
    assert len(times) > 8 * engine.spec.n_layers
    assert all(seconds >= 0 for _, seconds in times)
    named = {part for name, _ in times for part in name.split("+")}  # one call may do several operations
    assert {"router", "rms_norm", "linear", "attention", "delta_net"} <= named
    with pytest.raises(RequestError, match="33 tokens"):
        engine.profile([1] * 33)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_served(engine: Engine) -> None:
    for prompt in ("", [], ()):
        with pytest.raises(RequestError, match="empty"):
            engine.generate(prompt, GREEDY)
    with pytest.raises(RequestError, match=r"129 tokens.*128.*context_length"):
        engine.generate([1] * 129, GREEDY)
    for ids in ([1, 4096], [-1]):
        with pytest.raises(RequestError, match=r"token id .* not in the vocabulary; expected 0 to 4095"):
            engine.generate(ids, GREEDY)
        with pytest.raises(RequestError, match="not in the vocabulary"):
            engine.logits(ids)
    with pytest.raises(RequestError, match="empty"):
        engine.logits([])
    with pytest.raises(RequestError, match="context"):
        engine.logits([1] * 129)
    with pytest.raises(TokenizerError, match="role"):
        engine.generate([{"content": "hello"}], GREEDY)
    assert engine.generate(PROMPT, GREEDY).finish_reason == "length"  # still well


def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    answer = engine.generate([5] * 120, SamplingParams(max_tokens=0, temperature=0.0, ignore_eos=True))
    assert answer.usage.n_generated_tokens == 9  # eight places, and one token that needs none
    assert answer.finish_reason == "length"
    assert engine.generate([5] * 128, SamplingParams(max_tokens=50, ignore_eos=True)).usage.n_generated_tokens == 1


def test_a_closed_engine_says_so() -> None:
    engine = Engine.open(config=config())
    stream = engine.generate(PROMPT, GREEDY, stream=True)
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        next(stream)
    with pytest.raises(RequestError, match="closed"):
        engine.generate(PROMPT, GREEDY)
    with pytest.raises(RequestError, match="closed"):
        engine.logits([1])
    with closing(engine.generate(PROMPT, GREEDY, stream=True)) as unread:
        assert unread is not None


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"nothing\.gguf"):
        Engine.open(tmp_path / "nothing.gguf")
    (tmp_path / "broken.gguf").write_bytes(tiny_model_path().read_bytes()[:100_000])
    with pytest.raises(GGUFError, match=r"broken\.gguf"):
        Engine.open(tmp_path / "broken.gguf")


def test_too_little_memory_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runtime.placing.machine.available_memory", lambda: 10_000)
    monkeypatch.setattr("engine.runtime.engine.WeightMemory.load", None)
    with pytest.raises(
        DeviceError, match=r"1 x 128 tokens.* need .* GB of RAM, and .*; lower \[engine\] context_length"
    ):
        Engine.open(config=config())


@pytest.mark.parametrize("device", ["cuda"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(DeviceError, match=f"engine.device is '{device}'"):
        Engine.open(config=config(device=device))


# -- settings that the model and the machine decide ------------------------------------------------------------------


def test_auto_values_become_what_is_used(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    used = resolve(EngineConfig(), engine.spec).engine
    assert used.n_threads >= 1
    assert used.isa in {"scalar", "avx2", "avx512", "avx512_vbmi"}
    assert used.context_length == 1024  # the model was trained for no more
    assert used.max_batch_tokens == 512
    assert resolve(EngineConfig(engine=EngineSettings(isa="scalar")), engine.spec).engine.isa == "scalar"
    assert not caplog.records
    longer = resolve(EngineConfig(engine=EngineSettings(context_length=5000)), engine.spec)
    assert longer.engine.context_length == 5000
    assert "more than the 1024 tokens" in caplog.text


def test_a_cache_type_the_heads_do_not_fit(attention_path: Path) -> None:
    model = load_model(open_model_file(attention_path))
    settings = EngineConfig(engine=EngineSettings(kv_type="q8_0"))
    if model.spec.attention.head_dim % 32:
        with pytest.raises(ConfigError, match=r"q8_0.*multiple of 32"):
            resolve(settings, model.spec)
    else:
        assert resolve(settings, model.spec).engine.kv_type == "q8_0"


def test_one_line_says_what_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "engine"):
        settings = EngineConfig(engine=EngineSettings(n_threads=2, device="cpu"), moe=MoESettings(hot_k=0))
        Engine.open(config=settings).close()
    assert len(caplog.records) == 1
    line = caplog.text
    for part in ("tiny-moe (qwen35moe)", "4 of 56 experts", "MiB", "2 threads", "context 1024", "cache off: no GPU"):
        assert part in line
