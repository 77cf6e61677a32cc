"""Every architecture, in float64 numpy straight from its recorded forward pass, against logits of llama.cpp.

What is judged here is the model files and the formulas: a pass leaves only the kernels of a device to be wrong.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_files import ALL_FILES, model_path
from reference_device import ReferenceProgram

from engine.gguf.reader import GGUFFile
from engine.gguf.weights import WeightMemory
from engine.models import load_model

N_TOKENS = 16


@pytest.mark.parametrize("name", ALL_FILES)
def test_formulas(name: str, golden_path) -> None:
    references: Path = golden_path(name + ".npz")
    with np.load(references, allow_pickle=False) as z:
        tokens, logits, experts = (z[key] for key in ("tokens", "logits_exact", "topk_exact"))
    with GGUFFile.open(model_path(references)) as file:
        model = load_model(file)
        weights = WeightMemory.load(file, model.tensor_names, "mmap")
        program = ReferenceProgram(model.graph, weights)
        parts = [program.run(part.tolist()) for part in (tokens[:9], tokens[9:N_TOKENS])]
        assert np.abs(np.concatenate(parts) - logits[:N_TOKENS]).max() < 1e-4
        assert np.array_equal(np.sort(program.experts(), -1), np.sort(experts[:, 9:N_TOKENS], -1))
        weights.close()
