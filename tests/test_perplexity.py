"""The tiny trained model on held-out text: perplexity as llama.cpp measured it.

The method of llama-perplexity with -c 512: the text is cut into windows of 512 tokens, each run from an empty state;
the second half of a window is scored. The recorded figures stand in the README beside the texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from model_runner import ModelRunner, log_softmax

from engine.devices.graph import KVType
from engine.tokenizer import Tokenizer

WINDOW = 512
ALLOWED = 0.005  # relative

# llama.cpp's figures by domain, code to prose, of two files that take turns.
RECORDED = {
    "c_code": ("Q8_0", 3.7263),
    "js_code": ("Q4_K_M", 5.7141),
    "py_code": ("Q8_0", 5.6363),
    "man": ("Q4_K_M", 8.2855),
    "web_docs": ("Q8_0", 10.1019),
    "manuals": ("Q4_K_M", 11.3699),
}


def perplexity(runner: ModelRunner, token_ids: list[int]) -> float:
    losses = []
    half = WINDOW // 2
    for start in range(0, len(token_ids) - WINDOW + 1, WINDOW):
        window = token_ids[start : start + WINDOW]
        runner.forward.run(0, window[:half], 0, "none")
        logits = runner.forward.run(0, window[half:], half, "all")[:-1]
        losses.append(-log_softmax(logits)[np.arange(half - 1), window[half + 1 :]])
    return float(np.exp(np.mean(losses)))


@pytest.fixture(scope="module")
def models(shared: Path) -> Iterator[dict[str, ModelRunner]]:
    runners = {
        quant: ModelRunner(shared / "models" / f"tiny-moe-{quant}.gguf", max_tokens=256, kv_type=KVType.F16)
        for quant in ("Q8_0", "Q4_K_M")
    }
    yield runners
    for runner in runners.values():
        runner.close()


@pytest.mark.slow
@pytest.mark.parametrize("domain", RECORDED)
def test_perplexity_is_that_of_llama_cpp(domain: str, models: dict[str, ModelRunner], shared: Path) -> None:
    text = next((shared / "models" / "heldout_text").glob(f"{domain}*.txt")).read_text(encoding="utf-8")
    quant, recorded = RECORDED[domain]
    token_ids = Tokenizer.from_metadata(models[quant].file.metadata).encode(text)
    assert perplexity(models[quant], token_ids) == pytest.approx(recorded, rel=ALLOWED)
