"""Opens a model file for tests: one program on the CPU, with every size in the test's hands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.devices.cpu import CPUDevice
from engine.devices.graph import KVType
from engine.devices.program import Limits
from engine.generate.forward import ForwardPass
from engine.gguf import WeightMemory
from engine.models import load_model
from engine.synthetic import open_model_file


class ModelRunner:
    """A model on the CPU with float32 keys and values, ready to run token ids."""

    def __init__(
        self,
        path: Path | str,
        *,
        max_tokens: int = 64,
        n_slots: int = 1,
        context_length: int = 512,
        kv_type: KVType = KVType.F32,
        n_threads: int = 2,
        isa: str | None = None,
        max_drafts: int = 0,
    ) -> None:
        self.file = open_model_file(path)
        self.model = load_model(self.file, drafts=max_drafts > 0)
        self.weights = WeightMemory.load(self.file, self.model.tensor_names, "mmap")
        limits = Limits(max_tokens, n_slots, context_length, kv_type, max_drafts=max_drafts)
        self.program = CPUDevice(n_threads, isa).compile(self.model.graph, self.weights, limits)
        spec = self.model.spec
        self.forward = ForwardPass(self.program, limits, spec.n_vocab, most_guesses=spec.most_guesses)

    def logits(self, token_ids: list[int], cuts: tuple[int, ...] = ()) -> np.ndarray:
        """Logits of every token of a fresh sequence, fed in pieces of the lengths `cuts` and one more for the rest."""
        parts, start = [], 0
        for length in (*cuts, len(token_ids) - sum(cuts)):
            parts.append(self.forward.run(0, token_ids[start : start + length], start, "all"))
            start += length
        return np.concatenate(parts)

    def experts(self, token_ids: list[int]) -> np.ndarray:
        """Chosen experts, [n_moe_layers, n_tokens, n_experts_used]."""
        steps = []
        for start in range(0, len(token_ids), self.forward.limits.max_tokens):
            self.forward.run(0, token_ids[start : start + self.forward.limits.max_tokens], start, "none")
            steps.append(self.program.routing())
        return np.concatenate(steps, axis=1)

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        logits = self.forward.run(0, prompt, 0)
        made: list[int] = []
        while True:
            made.append(int(logits[-1].argmax()))
            if len(made) == n:
                return made
            logits = self.forward.run(0, made[-1:], len(prompt) + len(made) - 1)

    def close(self) -> None:
        self.program.close()
        self.weights.close()
        self.file.close()

    def __enter__(self) -> ModelRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || logits) in nats at each position."""
    p, q = log_softmax(reference), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(-1)
