"""The benchmark that only reads, `bench/read.cu`: it reads every word, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_launcher import Emulator

from bench.gpu import READ_SHAPES, read_launch
from tests.cusim import needs_emulator

pytestmark = needs_emulator


@pytest.mark.parametrize("mode", ["fast", "asan"])
@pytest.mark.parametrize("shape", READ_SHAPES[:2] + READ_SHAPES[-1:], ids=str)
def test_every_word_is_read(shape: tuple[int, int, int], mode: str) -> None:
    emulator, rng, n_words = Emulator(mode), np.random.default_rng(0), 5003
    for at in (0, 4 * n_words - 1, *rng.integers(0, 4 * n_words, 6 if mode == "fast" else 1).tolist(), None):
        data, out = np.zeros((n_words, 4), np.uint32), np.zeros(1, np.uint32)
        if at is not None:
            data.reshape(-1)[at] = 0x12345678
        emulator.run(read_launch(emulator.at(data), data.nbytes, emulator.at(out), shape, n_multiprocessors=2))
        assert out[0] == (0 if at is None else 0x12345678)
