"""Long steps on the CUDA device, here the stand-in driver: tiles, and experts streamed through staging buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from test_cuda_device import Model, Opened, driver  # noqa: F401 - the fixture that steers the stand-in

from engine.devices.graph import KVType, Limits, Rows
from engine.gguf.weights import WeightMemory
from tests.cusim import missing_requirement

# Without g++, which running the package does not need, there is no emulator.
pytestmark = pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))

SMALL = "qwen3moe/qwen3moe-micro-Q8_0.gguf"
LIMITS = Limits(max_tokens=12, n_slots=2, context_length=64, kv_type=KVType.F16)
N_TOKENS = 30  # of the prompt
SETTINGS = {"limits": LIMITS, "prompt_tokens": 40, "bypass_n_tokens": 10}


@pytest.fixture(scope="module", params=["mmap", "memory"])
def prompt_model(request, golden_path) -> Iterator[Model]:
    """A small model, its weights mapped, so that they go through pinned buffers, or in memory that can be pinned."""
    model = Model(golden_path(SMALL))
    if request.param == "memory":
        model.weights = WeightMemory.load(model.file, model.model.tensor_names, "memory")
    model.tokens = np.random.default_rng(3).integers(0, model.n_vocab, N_TOKENS).tolist()
    yield model
    model.close()


_kept: list[np.ndarray] = []


@pytest.fixture
def single_tokens(prompt_model: Model) -> np.ndarray:
    """Logits of the prompt, fed token by token to a device that holds all experts."""
    if not _kept:
        with prompt_model.open(limits=replace(LIMITS, max_tokens=1)) as opened:
            _kept.append(prompt(opened))
    return _kept[0]


def prompt(opened: Opened, cuts: tuple[int, ...] = (), slot: int = 0) -> np.ndarray:
    """Logits of all tokens of the prompt, cut at these places; the last one's only where a step gives no more."""
    limits, tokens = opened.program.limits, np.array(opened.model.tokens, np.int32)
    parts, ends = [], [*cuts, len(tokens)] if limits.max_tokens > 1 else range(1, len(tokens) + 1)
    for start, end in zip([0, *ends], ends, strict=False):
        positions = np.arange(start, end, dtype=np.int32)
        rows = np.arange(max(0, end - start - limits.most(Rows.OUTPUTS)), end - start, dtype=np.int32)
        logits = opened.program.run(tokens[start:end], positions, np.full(end - start, slot, np.int32), rows)
        parts.append(np.full((end - start, opened.model.n_vocab), np.nan, np.float32))
        parts[-1][rows] = logits
    return np.concatenate(parts)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    known = ~np.isnan(found[:, 0])
    assert known[-1]
    assert (found[known].view(np.uint32) == expected[known].view(np.uint32)).all()


@pytest.mark.parametrize("hot_k", [None, 3, 0])
def test_long_steps_have_the_bits_of_single_tokens(
    hot_k: int | None, prompt_model: Model, single_tokens: np.ndarray
) -> None:
    with prompt_model.open(hot_k=hot_k, **SETTINGS) as opened:
        assert opened.program.limits.max_tokens == 40
        for cuts in ((), (17,), (9, 10, 22)):  # streamed; and parts for which the CPU is asked
            assert_same(prompt(opened, cuts, slot=1), single_tokens)
