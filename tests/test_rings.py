"""Keys and values of layers with a window: kept for a window and a step only, they give the bits of a whole context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_runner import ModelRunner
from small_engines import open_engine

from engine import SamplingParams
from engine.devices.graph import KVCache, KVType
from engine.devices.program import Limits, ring_pieces

N_TOKENS, CONTEXT, N_SAVED = 620, 640, 300
RING, WHOLE = 60, 640  # tokens of a step
CASES = [
    *[("mimo2", kv_type) for kv_type in (KVType.F32, KVType.F16)],  # with sinks
    ("gemma4", KVType.F16),  # with other heads than the layers without a window
    ("dots3note", KVType.F16),  # latent
    *[("deepseek4", kv_type) for kv_type in KVType],  # beside keys that tokens share, and states
]


def tokens_of(path: Path) -> list[int]:
    n_vocab = int(np.load(path.with_suffix(".npz"))["tokens"].max())
    return np.random.default_rng(5).integers(0, n_vocab, N_TOKENS).tolist()


def opened(path: Path, max_tokens: int, kv_type: KVType, n_slots: int = 1) -> ModelRunner:
    """A model with rings, or if its steps are as long as the context without any."""
    runner = ModelRunner(path, max_tokens=max_tokens, n_slots=n_slots, context_length=CONTEXT, kv_type=kv_type)
    caches = [cache for cache in runner.model.graph.kv_caches if cache.window]
    assert caches
    assert {runner.forward.limits.is_ring(cache) for cache in caches} == {max_tokens == RING}
    return runner


@pytest.mark.parametrize(("name", "kv_type"), CASES)
def test_a_ring_has_the_bits_of_a_whole_context(name: str, kv_type: KVType, data: Path) -> None:
    """However a prompt is cut; a sequence that is saved fits both, and so does what is overwritten of one."""
    path = data / "peers" / f"{name}-F32.gguf"
    tokens = tokens_of(path)
    with opened(path, WHOLE, kv_type, n_slots=2) as whole, opened(path, RING, kv_type) as ring:
        expected = whole.logits(tokens)
        assert ring.program.state_bytes < whole.program.state_bytes
        assert np.array_equal(ring.logits(tokens[:N_SAVED], (60, 1, 1, 59, 60, 60, 7)), expected[:N_SAVED])
        saved, states = ring.program.save_sequence(0, N_SAVED), ring.program.save_states(0, N_SAVED)

        def check_rest(runner: ModelRunner, slot: int) -> None:
            rest = runner.forward.run(slot, tokens[N_SAVED:], N_SAVED, "all")
            assert np.array_equal(rest, expected[N_SAVED:])

        check_rest(ring, 0)  # others are in all rows then
        ring.program.load_states(0, N_SAVED, states)
        check_rest(ring, 0)
        ring.logits(tokens[::-1])
        for runner, slot in ((ring, 0), (whole, 1)):
            runner.program.load_sequence(slot, N_SAVED, saved)
            check_rest(runner, slot)


def test_a_sequence_goes_back_a_little_by_itself_and_further_from_a_copy(golden_path, tmp_path: Path) -> None:
    path = golden_path("gpt-oss/gpt-oss-micro-F32.gguf")
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    tokens = np.random.default_rng(5).integers(0, 256, N_TOKENS).tolist()
    settings = {"context_length": CONTEXT, "max_batch_tokens": 32, "n_sequences": 1}
    with open_engine(path, **settings, n_snapshots=8) as engine, open_engine(path, **settings) as fresh:

        def check(prompt: list[int], n_reused: int) -> None:
            answer = engine.generate(prompt, params)
            assert answer.usage.n_reused_tokens == n_reused
            fresh.generate([1], params)
            assert answer.token_ids == fresh.generate(prompt, params).token_ids

        check(tokens[:300], 0)
        check(tokens[:610], 300)
        check([*tokens[:608], *tokens[:9]], 608)
        check([*tokens[:400], *tokens[:210]], 400)  # of 621 tokens the last 241 can be taken back
        check([*tokens[:375], 1, 2], 298)  # to where the first prompt ended
        check([*tokens[:297], 1, 2], 0)
        with fresh.new_session() as session:
            session.generate(tokens[:500], params)
            session.save(tmp_path / "there")
            n_held = session.n_tokens
        with fresh.load_session(tmp_path / "there") as loaded:
            assert loaded.generate([*loaded.token_ids, 3], params).usage.n_reused_tokens == n_held
            # The file has no more than a window; the copy of the state two tokens before the end serves it, too.
            assert loaded.generate(tokens[:499], params).usage.n_reused_tokens == 498
        with open_engine(path, **settings) as other, other.load_session(tmp_path / "there") as loaded:
            assert loaded.generate(tokens[:499], params).usage.n_reused_tokens == 0


def test_a_ring_has_room_for_a_window_and_a_step() -> None:
    limits = Limits(max_tokens=500, n_slots=1, context_length=8192, kv_type=KVType.F16)
    for window, max_tokens, n_rows in (
        (0, 500, 8192),
        (128, 500, 768),
        (252, 500, 768),
        (253, 500, 1024),
        (8000, 512, 8192),
    ):
        step = Limits(max_tokens, 1, 8192, KVType.F16)
        assert step.n_rows(KVCache(1, 64, 64, window=window)) == n_rows
        assert step.is_ring(KVCache(1, 64, 64, window=window)) == (n_rows < 8192)
    assert limits.n_rows(KVCache(1, 64, 64, period=4)) == 2048
    assert list(ring_pieces(5, 23, 10)) == [(5, 10), (0, 10), (0, 3)]
    assert list(ring_pieces(3, 3, 10)) == []
