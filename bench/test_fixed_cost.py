"""What a layer costs beside its weights, and what Python costs a token.

For the first, a model of a published geometry is compiled with every product cut down to a few rows of one block: the
same operations, barriers and activations, next to no weights. What is left is norms, gates, routing, quantisation,
the sum over experts, attention over an almost empty cache and the hand-over between threads. What reads and writes
recurrent state (delta net, convolution) is also given apart: it is a matter of bandwidth, as weights are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from engine import Engine, SamplingParams, _kernels
from engine.devices.cpu import CPUDevice, lowering
from engine.devices.cpu.device import CPUProgram
from engine.devices.graph import KVType
from engine.devices.program import Limits
from engine.models import load_model
from engine.quants.formats import BY_NAME, BY_TYPE
from engine.synthetic import SyntheticModel
from tests.zero_weights import ZeroWeights

ROWS, COLUMNS = 8, 256  # what is left of every product
EXPERT_SIZE, EXPERT_TYPE = 8, BY_NAME["F32"].ggml_type  # the same for the experts
N_LAYERS = 8


class WithoutWeights:
    """Records like `_kernels.Program`, but small products in the place of large ones."""

    def __init__(self, *arguments: object) -> None:
        self.program = _kernels.Program(*arguments)
        self.hidden: list[np.ndarray] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.program, name)

    def __len__(self) -> int:
        return len(self.program)

    def linear(self, x, x_row_bytes, n_cols, weights, rows) -> None:
        cut = [(at, kind, min(n_rows, ROWS), *rest) for at, kind, n_rows, *rest in weights]
        self.program.linear(x, x_row_bytes, min(n_cols, COLUMNS), cut, rows)

    def experts(self, *arguments) -> None:
        *before, gate, up, down, activation, limit, up_limit, _, ffn_size, out, stride = arguments
        small = [(table, EXPERT_TYPE, *rest) for table, _, *rest in (gate, up, down)]
        self.program.experts(*before, *small, activation, limit, up_limit, EXPERT_SIZE, EXPERT_SIZE, out, stride)
        # what lies between the experts' two products keeps its size
        n_values, form = before[-1] * ffn_size, BY_TYPE[down[1]].activation
        hidden = np.ones(n_values, np.float32)
        quantized = np.zeros(_kernels.activation_bytes(form, n_values), np.uint8)
        self.hidden += [hidden, quantized]
        self.program.quantize(hidden.ctypes.data, n_values, n_values, form, quantized.ctypes.data, _kernels.ROWS_TOKENS)


@pytest.fixture
def compiled():
    """Compiles a synthetic model without its weights."""

    def compile_(name: str, n_threads: int) -> CPUProgram:
        model_file = SyntheticModel.open(name)
        model = load_model(model_file)
        parts = {**vars(_kernels), "Program": WithoutWeights}
        with mock.patch.object(lowering, "_kernels", SimpleNamespace(**parts)):
            limits = Limits(1, 1, 512, KVType.F16)
            return CPUDevice(n_threads).compile(model.graph, ZeroWeights(model_file), limits)

    return compile_


def step(position: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], np.int32) for value in (1, position, 0, 0))


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("model", ["qwen3.5-122b-a10b", "qwen3-30b-a3b"])
def test_fixed_cost_of_a_layer(benchmark, compiled, model, n_threads):
    """The step over its layers is the figure; `groups` tells where it goes, with a barrier after each."""
    program = compiled(f"synthetic:{model}:layers={N_LAYERS},vocab=4096", n_threads)
    for position in range(3):
        program.run(*step(position))
    profiles = [program.profile(*step(3)) for _ in range(200)]
    median = np.median([[seconds for _, seconds in profile] for profile in profiles], axis=0) * 1e6
    groups: dict[str, float] = {}
    for (name, _), us in zip(profiles[0], median, strict=True):
        groups[name] = groups.get(name, 0.0) + us / N_LAYERS
    benchmark.extra_info["groups"] = {name: round(us, 2) for name, us in sorted(groups.items(), key=lambda g: -g[1])}
    benchmark(program.run, *step(3))
    if benchmark.disabled:
        return
    whole = benchmark.stats.stats.median * 1e6 / N_LAYERS
    benchmark.extra_info["us a layer"] = round(whole, 2)
    with_state = sum(us for name, us in groups.items() if name.startswith(("delta_net", "causal_conv")))
    benchmark.extra_info["us a layer without recurrent state"] = round(whole - with_state, 2)
    # Where there is much state, its time differs between the two, so that the difference says little; this does not.
    others = sum(groups.values()) - with_state
    benchmark.extra_info["us a layer of all other operations, with a barrier after each"] = round(others, 2)


@contextmanager
def seconds_in_c() -> Iterator[list[float]]:
    """Adds up the time of the C calls that a token makes: the program and the sampler."""
    spent = [0.0]

    def timed(call):
        def run(*arguments):
            start = time.perf_counter()
            result = call(*arguments)
            spent[0] += time.perf_counter() - start
            return result

        return run

    class TimedProgram:
        def __init__(self, program: _kernels.Program) -> None:
            self.run = timed(program.run)

    original = CPUProgram.__init__

    def init(self, device, lowered) -> None:
        original(self, device, lowered)
        self._program = TimedProgram(self._program)

    with mock.patch.object(CPUProgram, "__init__", init), mock.patch.object(_kernels, "sample", timed(_kernels.sample)):
        yield spent


def test_python_time_of_a_token(benchmark):
    """One C call a token runs all layers, so this does not grow with them."""
    n_tokens = 256
    with seconds_in_c() as spent, Engine.open() as engine:
        params = SamplingParams(max_tokens=n_tokens, temperature=0.8, seed=1, ignore_eos=True)
        engine.generate("def main():", params)
        costs = []

        def generate() -> None:
            spent[0] = 0.0
            start = time.perf_counter()
            engine.generate("def main():", params)
            costs.append((time.perf_counter() - start - spent[0]) / n_tokens)

        benchmark.pedantic(generate, rounds=5)
    benchmark.extra_info["us of Python a token"] = round(1e6 * float(np.median(costs)), 1)
