"""Taking the state of a sequence off the GPU and putting it back, on the stand-in driver: the bits stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_cuda_device import Model

from engine.config import EngineConfig, EngineSettings, MoESettings, SamplingParams
from engine.devices.graph import KVType
from engine.devices.program import Limits
from engine.errors import DeviceError, RequestError
from engine.runtime import Engine
from tests.cusim import needs_emulator

pytestmark = [needs_emulator, pytest.mark.usefixtures("driver")]

RECURRENT = "qwen35moe/qwen35moe-fusedgu-Q8_0"
PARAMS = SamplingParams(temperature=0.0, max_tokens=3, logprobs=3, ignore_eos=True)


def open_engine(path: Path, device: str = "cuda", **settings) -> Engine:
    settings = {"n_threads": 2, "context_length": 40, "max_batch_tokens": 8, "n_sequences": 2, **settings}
    moe = MoESettings(hot_k=4 if device == "cuda" else 0)
    return Engine.open(path, EngineConfig(engine=EngineSettings(device=device, **settings), moe=moe))


@pytest.mark.parametrize(
    ("name", "kv_type"),
    [(RECURRENT, "f16"), ("qwen3moe/qwen3moe-micro-Q8_0", "q8_0"), ("deepseek2/deepseek2-v2lite-micro-Q8_0", "f32")],
)
def test_a_session_goes_on_with_the_same_bits(name: str, kv_type: str, golden_path, tmp_path: Path, driver) -> None:
    driver.set(order="random", copy_us=200)
    path, file, prompt = golden_path(f"{name}.gguf"), tmp_path / "talk", list(range(9))
    with open_engine(path, kv_type=kv_type) as engine, engine.new_session() as _, engine.new_session() as session:
        first = session.generate(prompt, PARAMS)
        session.save(file)
        longer = [*prompt, *first.token_ids, 5, 6]
        expected = session.generate(longer, PARAMS)
    with open_engine(path, kv_type=kv_type, context_length=32, n_sequences=1) as engine:
        with engine.new_session() as another:
            another.run([1, 2, 3, 4, 5] * 4)  # what lay there before must not matter
        with engine.load_session(file) as session:
            found = session.generate(longer, PARAMS)
    assert found.usage.n_reused_tokens == expected.usage.n_reused_tokens == len(prompt) + 2
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    with (
        open_engine(path, "cpu", kv_type=kv_type) as engine,
        pytest.raises(RequestError, match="another kind of device"),
    ):
        engine.load_session(file)


def test_a_chat_whose_history_is_edited_is_taken_up_at_the_end_of_a_message(golden_path, driver) -> None:
    driver.set(order="random", copy_us=200)
    path = golden_path(f"{RECURRENT}.gguf")
    with open_engine(path, n_sequences=1) as warm, open_engine(path, n_sequences=1, n_snapshots=0) as cold:
        (end,) = warm.tokenize("<|im_end|>", parse_special=True)
        first = [*range(40, 52), end]
        for prompt, n_reused in (([*first, 7, 8], 0), ([*first, 9, 10, end, 7], len(first))):
            found, expected = warm.generate(prompt, PARAMS), cold.generate(prompt, PARAMS)
            assert found.usage.n_reused_tokens == n_reused
            assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
            cold.logits([0])  # forget
        assert 0 < warm.statistics.snapshot_bytes < warm.statistics.state_bytes * 4
        driver.fail("cuMemcpyHtoDAsync", 1, "CUDA_ERROR_UNKNOWN")
        with pytest.raises(DeviceError, match="cuMemcpyHtoDAsync failed"):
            warm.generate([*first, 7, 8], PARAMS)
        found, expected = warm.generate([*first, 7, 8], PARAMS), cold.generate([*first, 7, 8], PARAMS)
        assert found.usage.n_reused_tokens == 0  # nothing false was left
        assert found.logprobs == expected.logprobs


@pytest.mark.parametrize(
    ("name", "n_slots"),
    [
        (f"golden/{RECURRENT}", 1),
        (f"golden/{RECURRENT}", 2),
        ("peers/deepseek4-F32", 1),
        ("peers/jamba-Q8_0", 2),
        ("peers/qwen4exp-single-F32", 1),
    ],
)
def test_a_step_of_wrong_drafts_is_taken_back(name: str, n_slots: int, data: Path, golden_path) -> None:
    """Logits behind it have the bits of those without it, beside other sequences, too."""
    path = golden_path(f"{RECURRENT}.gguf") if name.startswith("golden") else data / f"{name}.gguf"
    model = Model(path)
    limits = Limits(max_tokens=8, n_slots=n_slots, context_length=64, kv_type=KVType.F16, max_drafts=4)
    slot = n_slots - 1
    with model.open(limits=limits, hot_k=3) as opened:
        forward, program = opened.forward, opened.program
        tokens = [3, 1, 4, 1, 5, 9, 2, 6]
        forward.run(0, tokens[::-1], 0, "all")
        expected = [forward.run(slot, tokens[i : i + 1], i, "all") for i in range(8)]
        other = forward.run(0, [7], 8, "all") if slot else None
        forward.run(slot, tokens[:2], 0, "none")
        if slot:
            forward.run(0, tokens[::-1], 0, "none")
        for at in (2, 3, 5):
            n = 2 if at == 3 else 1
            program.keep_states(slot, n)
            found = forward.run(slot, [*tokens[at : at + n], *[8] * (4 - n)], at, "all")
            program.rewind_states(slot)
            assert np.array_equal(found[:n], np.concatenate(expected[at : at + n]))
        if slot:
            assert np.array_equal(forward.run(0, [7], 8, "all"), other)
    model.close()
