"""Times the experts of weight formats at every instruction-set level, against the memory's bandwidth.

For decode, one token goes through eight experts a layer of 3 x 1024 x 3072 weights, what a 122B model reads, in more
layers than the caches hold. Between any two such steps the bandwidth is measured, since other work on the machine
changes it within seconds. For prompts, a batch of tokens goes through one expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.errors import RequestError
from engine.machine import last_level_cache_bytes
from engine.quants import install_grids
from engine.quants.formats import BY_NAME, FORMATS, Activation, QuantFormat

N_EXPERTS, HIDDEN_SIZE, FFN_SIZE = 8, 3072, 1024
N_PROMPT_TOKENS = 64
_SECONDS, _MIN_STEPS = 0.25, 3
_LONG_STEP_S = 0.5  # one such step is enough: plain C takes seconds for more than a large cache holds


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Bytes of weights a second, and the bandwidth that was measured in turn with it."""

    n_threads: int
    bytes_s: float
    bandwidth: float

    @property
    def share(self) -> float:
        """Return the share of the bandwidth."""
        return self.bytes_s / self.bandwidth


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """One format at one level; `is_fast` if there is vector code of its own for it.

    Attributes:
        decode: with one thread, and with all threads if there are more.
        macs_s: multiply-adds a second of a prompt, all threads.
    """

    format: str
    isa: str
    decode: tuple[DecodeSpeed, ...]
    macs_s: float
    is_fast: bool


def named_formats(names: str) -> list[QuantFormat]:
    """Return the formats of a list like "Q4_K,MXFP4", all of them for "all"; raise `RequestError` for another name."""
    if names == "all":
        return list(FORMATS)
    found = []
    for name in map(str.strip, names.split(",")):
        if name.upper() not in BY_NAME:
            raise RequestError(f"--kernels {names}: there is no format {name!r}; there are {', '.join(BY_NAME)}")
        found.append(BY_NAME[name.upper()])
    return found


def measure_kernels(
    formats: Sequence[QuantFormat], n_threads: int, buffer_bytes: int, progress: Callable[[str, int, int], None]
) -> list[KernelSpeed]:
    """Time some formats at all levels of this CPU; the bandwidth is that of a buffer of `buffer_bytes`."""
    install_grids()
    levels = _kernels.isa_levels()
    buffer = np.empty(buffer_bytes, np.uint8)
    found: list[KernelSpeed] = []
    total = len(formats) * len(levels)
    for fmt in formats:
        layers = _layers(fmt, n_threads)
        for isa in levels:
            progress(f"{fmt.name} {isa}", len(found), total)
            decode = tuple(_time_decode(fmt, layers, n, isa, buffer) for n in sorted({1, n_threads}))
            prompt = _time_prompt(fmt, layers[0], n_threads, isa)
            found.append(KernelSpeed(fmt.name, isa, decode, prompt, fmt.ggml_type in _kernels.fast_formats(isa)))
    progress("kernels", total, total)
    return found


class _Layer:
    """The experts of a layer, made of random blocks."""

    def __init__(self, fmt: QuantFormat, seed: int, n_threads: int) -> None:
        self.matrices: list[npt.NDArray[np.uint8]] = []
        for n_rows, n_cols in ((FFN_SIZE, HIDDEN_SIZE), (FFN_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, FFN_SIZE)):
            matrix = np.empty((N_EXPERTS * n_rows, fmt.row_bytes(n_cols)), np.uint8)
            _kernels.fill_random_blocks(fmt.ggml_type, matrix, n_cols, seed + len(self.matrices), n_threads)
            self.matrices.append(matrix)
        numbers = np.arange(N_EXPERTS, dtype=np.int64)
        self.tables = [m.ctypes.data + m.nbytes // N_EXPERTS * numbers for m in self.matrices]
        self.n_bytes = sum(m.nbytes for m in self.matrices)


def _layers(fmt: QuantFormat, n_threads: int) -> list[_Layer]:
    """Return layers of more bytes than the caches hold."""
    layers = [_Layer(fmt, 0, n_threads)]
    while sum(layer.n_bytes for layer in layers) < 4 * last_level_cache_bytes() or len(layers) < 2:
        layers.append(_Layer(fmt, 3 * len(layers), n_threads))
    return layers


class _Step:
    """Some tokens through some experts of each layer, as one program."""

    def __init__(
        self, fmt: QuantFormat, layers: list[_Layer], n_tokens: int, n_experts_used: int, n_threads: int, isa: str
    ) -> None:
        x = np.random.Generator(np.random.PCG64(1)).standard_normal((n_tokens, HIDDEN_SIZE), np.float32)
        is_float = fmt.activation == Activation.F32
        self._rows = x if is_float else _kernels.quantize_activations(x, fmt.activation, isa)
        self._ids = np.tile(np.arange(n_experts_used, dtype=np.int32), (n_tokens, 1))
        self._outputs = [np.empty((n_tokens, n_experts_used * HIDDEN_SIZE), np.float32) for _ in layers]
        self._program = _kernels.Program(n_tokens, 1, n_threads, isa)
        at = int(self._rows.ctypes.data), self._rows.strides[0]
        for layer, out in zip(layers, self._outputs, strict=True):
            gate, up, down = ((int(table.ctypes.data), fmt.ggml_type, 0, 0) for table in layer.tables)
            self._program.experts(
                *at,
                *at,
                int(self._ids.ctypes.data),
                N_EXPERTS,
                n_experts_used,
                gate,
                up,
                down,
                _kernels.ACTIVATE_SILU,
                0.0,
                0.0,
                HIDDEN_SIZE,
                FFN_SIZE,
                int(out.ctypes.data),
                out.shape[1],
            )
        self._step = _kernels.Step(n_tokens)
        self._step.n_tokens = n_tokens
        self._step.positions[:] = range(n_tokens)

    def run(self) -> float:
        """Return the seconds that a step takes."""
        start = time.perf_counter()
        self._program.run(self._step)
        return time.perf_counter() - start


def _times(step: _Step) -> Iterator[float]:
    """Yield the seconds of some steps behind a first one; of a long one these alone."""
    first = step.run()
    if first >= _LONG_STEP_S:
        yield first
        return
    n, total_s = 0, 0.0
    while n < _MIN_STEPS or total_s < _SECONDS:
        seconds = step.run()
        n, total_s = n + 1, total_s + seconds
        yield seconds


def _time_decode(
    fmt: QuantFormat, layers: list[_Layer], n_threads: int, isa: str, buffer: npt.NDArray[np.uint8]
) -> DecodeSpeed:
    """Return the medians of steps and of passes over the buffer, taken in turn."""
    step = _Step(fmt, layers, 1, N_EXPERTS, n_threads, isa)
    pairs = [(seconds, _kernels.read_bandwidth(buffer, n_threads, 1)) for seconds in _times(step)]
    seconds, bandwidth = np.median(pairs, 0).tolist()
    return DecodeSpeed(n_threads, sum(layer.n_bytes for layer in layers) / seconds, bandwidth)


def _time_prompt(fmt: QuantFormat, layer: _Layer, n_threads: int, isa: str) -> float:
    """Return the multiply-adds a second of the median step."""
    step = _Step(fmt, [layer], N_PROMPT_TOKENS, 1, n_threads, isa)
    return float(N_PROMPT_TOKENS * 3 * FFN_SIZE * HIDDEN_SIZE / np.median(list(_times(step))))
