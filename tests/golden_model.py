"""A model with logits that another program computed, and how ours are judged against them.

For an F32 file: mean KL divergence up to 1e-9 and logits within 1e-3 of the exact ones. For a quantised file, where our
activations are rounded to 8 bits as llama.cpp's are: up to twice the mean and four times the largest divergence that
llama.cpp itself shows on the same file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cached_runner import Model, Setup
from golden_files import model_path
from model_runner import ModelRunner, divergence

from engine.experts.hot_cache import CacheStatistics

FLOOR = 3e-5  # of the mean divergence of a quantised file: below it llama.cpp's own noise is no measure
F32_FLOOR, F32_LOGIT = 1e-9, 1e-3
BUSY = Setup((3, 1, 0, 5), "lru", adversarial=True, bypass_n_tokens=30)  # a cache that has much to do


@dataclass
class GoldenModel:
    """A model file, its references, and our engine on it."""

    path: Path
    reference: dict[str, np.ndarray]
    runner: ModelRunner

    @property
    def is_f32(self) -> bool:
        return "logits" not in self.reference

    @property
    def prompt(self) -> list[int]:
        return self.reference["tokens"].tolist()

    @property
    def continued(self) -> list[int]:
        """The prompt and the reference's greedy continuation."""
        return self.prompt + self.reference["greedy_ids"].tolist()

    def check(self, exact: np.ndarray, logits: np.ndarray, extra: float = 0.0) -> None:
        """Judge logits against the exact ones; `extra` is allowed on top of the mean."""
        found = divergence(exact, logits)
        if self.is_f32:
            assert found.mean() <= F32_FLOOR + extra
            assert extra or np.abs(exact - logits).max() <= F32_LOGIT
            return
        mean, largest = self.llama_noise("kl_greedy_llama", "kl_b_llama")
        assert found.mean() <= max(FLOOR, 2 * mean) + extra
        assert found.max() <= max(10 * FLOOR, 4 * largest) + 10 * extra

    def check_with_a_cache(self, setup: Setup = BUSY, n_prompt: int = 12, chunk: int = 1) -> CacheStatistics:
        """Demand the same bits on the emulated device while experts come and go; return what its cache did.

        The prompt is run in steps as long as they may be, but for its end, which is run `chunk` tokens at a time.
        """
        expected = self.runner.logits(self.prompt)
        model = Model(self.path)
        forward, cache, program = model.open(setup)
        logits = model.logits(forward, self.prompt, min(n_prompt, len(self.prompt)), chunk)
        cache.close()
        cache.table.check_integrity()
        program.close()
        model.close()
        assert np.array_equal(logits.view(np.uint32), expected.view(np.uint32))
        return cache.statistics

    def llama_noise(self, *more: str) -> tuple[float, float]:
        """Return mean and largest divergence of llama.cpp's own logits for this file."""
        z = self.reference
        noise = [divergence(z["logits_exact"], z["logits"]), *(z[name] for name in more if name in z)]
        together = np.concatenate(noise)
        return float(together.mean()), float(together.max())


@contextlib.contextmanager
def open_golden(references: Path) -> Iterator[GoldenModel]:
    """Open the model that a file of references belongs to."""
    path = model_path(references)
    with np.load(references, allow_pickle=False) as z, ModelRunner(path) as runner:
        yield GoldenModel(path, dict(z), runner)
