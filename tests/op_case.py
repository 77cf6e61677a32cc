"""Runs recorded operations on fresh memory, in every way that must not matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from engine import _kernels

SPARE = 3  # columns between two rows that nobody may write
UNTOUCHED = {np.float32: np.nan, np.int32: -77}

Record = Callable[[_kernels.Program, SimpleNamespace], None]


def ways(isa_levels: Sequence[str]) -> list[tuple[str, int]]:
    """Every level with one thread, the best one with more threads than the machine may have cores."""
    return [(isa, 1) for isa in isa_levels] + [(isa_levels[-1], n_threads) for n_threads in (2, 3)]


@dataclass
class Case:
    """Some operations with their inputs.

    `record` gets a program and the memory: for each name of `inputs` and `outputs` an (address, stride), for each name
    of `fixed` and `state` an address. Rows of inputs belong to the tokens; where a step ends decides `cuts`.
    """

    record: Record
    inputs: Mapping[str, np.ndarray]  # [n_tokens, width], float32 or int32
    outputs: Mapping[str, tuple[int, type]] = field(default_factory=dict)  # width and dtype
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)
    state: Mapping[str, int] = field(default_factory=dict)  # bytes
    packed: Sequence[str] = ()  # inputs and outputs whose rows lie without a gap
    results: Sequence[str] = ("out",)
    slots: Sequence[int] | None = None  # of each token; default: one sequence
    n_slots: int = 1
    start: int = 0  # position of the first token of every sequence
    token_ids: Sequence[int] | None = None

    @property
    def n_tokens(self) -> int:
        if self.token_ids is not None:
            return len(self.token_ids)
        return len(next(iter(self.inputs.values())))

    def run(self, isa: str | None = None, n_threads: int = 1, cuts: Sequence[int] = ()) -> dict[str, np.ndarray]:
        """The results of all tokens, in steps that end at `cuts`."""
        n = self.n_tokens
        bounds = [0, *cuts, n]
        max_tokens = max(end - first for first, end in itertools.pairwise(bounds))
        memory, at = {}, SimpleNamespace()
        for name, (width, dtype) in {
            **{name: (x.shape[1], x.dtype.type) for name, x in self.inputs.items()},
            **self.outputs,
        }.items():
            spare = 0 if name in self.packed else SPARE
            rows = np.full((max_tokens, width + spare), UNTOUCHED[dtype], dtype)
            memory[name] = rows
            setattr(at, name, (rows.ctypes.data, rows.shape[1]))
        kept = {name: np.ascontiguousarray(x) for name, x in self.fixed.items()}
        kept |= {name: np.full(n_bytes + 64, 171, np.uint8) for name, n_bytes in self.state.items()}
        for name, x in kept.items():
            setattr(at, name, x.ctypes.data + (-x.ctypes.data % 64 if name in self.state else 0))

        program = _kernels.Program(max_tokens, self.n_slots, n_threads, isa)
        self.record(program, at)
        slots = np.zeros(n, np.int32) if self.slots is None else np.asarray(self.slots, np.int32)
        positions = np.array([self.start + np.count_nonzero(slots[:i] == s) for i, s in enumerate(slots)], np.int32)
        step = _kernels.Step(max_tokens)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.results}
        for first, end in itertools.pairwise(bounds):
            size = end - first
            for name, (_, dtype) in self.outputs.items():
                memory[name][:] = UNTOUCHED[dtype]
            for name, x in self.inputs.items():
                memory[name][:size, : x.shape[1]] = x[first:end]
            if self.token_ids is not None:
                step.token_ids[:size] = self.token_ids[first:end]
            step.positions[:size], step.slots[:size] = positions[first:end], slots[first:end]
            step.output_rows[:size] = range(size)
            step.n_tokens = step.n_outputs = size
            program.run(step)
            for name in self.results:
                width = self.outputs[name][0] if name in self.outputs else self.inputs[name].shape[1]
                parts[name].append(memory[name][:size, :width].copy())
        for name, rows in memory.items():
            width = self.outputs[name][0] if name in self.outputs else self.inputs[name].shape[1]
            untouched = UNTOUCHED[rows.dtype.type]
            np.testing.assert_array_equal(rows[:, width:], untouched, f"something was written between rows of {name}")
        return {name: np.concatenate(rows) for name, rows in parts.items()}

    def check(self, expected: Mapping[str, np.ndarray], rtol: float = 2e-6, atol: float = 2e-6) -> None:
        """Compare with the exact results, and the bits of every way to run it with one another.

        `atol` is relative to the largest exact value. NaN stands for a float32 that must not be written.
        """
        first = self.run(_kernels.isa_levels()[0])
        for name, exact in expected.items():
            scale = float(np.nanmax(np.abs(exact), initial=0.0))
            np.testing.assert_allclose(first[name], exact, rtol=rtol, atol=atol * scale, err_msg=name)
        n = self.n_tokens
        all_cuts = [(), *([(n // 2,), tuple(range(1, n, 5))] if n > 1 else [])]
        for i, (isa, n_threads) in enumerate(ways(_kernels.isa_levels())):
            cuts = all_cuts[i % len(all_cuts)]
            again = self.run(isa, n_threads, cuts)
            for name, values in first.items():
                where = f"{name}: {isa}, {n_threads} threads, cut at {cuts}"
                assert values.tobytes() == again[name].tobytes(), where


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def blocks(format_name: str, seed: int, n_rows: int, n_cols: int) -> np.ndarray:
    """Random weight rows, uint8 [n_rows, row_bytes], of a format that these tests use."""
    random = np.random.default_rng(seed)
    if format_name == "F32":
        return (random.standard_normal((n_rows, n_cols)) * n_cols**-0.5).astype(np.float32).view(np.uint8)
    block_size, block_bytes, scales_at = {"Q8_0": (32, 34, (0,)), "Q4_K": (256, 144, (0, 2))}[format_name]
    raw = random.integers(0, 256, (n_rows * n_cols // block_size, block_bytes), np.uint8)
    for at in scales_at:
        scale = random.uniform(0.001, 0.003, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scale[:, None].view(np.uint8)
    return raw.reshape(n_rows, -1)
