"""The CPU's half of a step: answers the GPU's requests for experts that have no slot.

The protocol is written down in `cuda/handshake.cuh`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.cuda.expert_layers import ExpertLayer
from engine.devices.cuda.kernels import Exchange
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.runtime import PinnedMemory
from engine.devices.graph import Vector, Weight
from engine.devices.program import WeightAccess
from engine.errors import DeviceError
from engine.quants.formats import Activation
from engine.resources import Resources

_WORD = 0xFFFFFFFF  # request numbers are taken modulo 2^32
_LINE = 64  # bytes of a cache line; each flag has one
_TIMEOUT_S = 30.0  # without any request
_LOOK_S = 0.5  # after which the GPU is asked whether it still lives


class MissServer:
    """Computes misses while steps run, with one team of threads from a step's first layer to its last.

    It holds one small CPU program for each layer. The activations come in the forms that the weights take. The team's
    first thread is the server's own: a step may be under way while whoever runs steps is at something else.

    Attributes:
        n_single_tokens: steps of one token so far.
        seconds: float64 [2, n_moe_layers], waited for each layer's request, and spent to answer it, in all of these.
        guesses: int64 [2], experts asked for in layers that were guessed about, and those that had been guessed.
    """

    def __init__(
        self,
        lowering: Lowering,
        weights: WeightAccess,
        max_tokens: int,
        n_threads: int,
        isa: str | None = None,
        *,
        look: Callable[[], object] = lambda: None,
    ) -> None:
        """Get ready for steps of so many tokens.

        `look` is called now and then, by the server's thread, while the GPU asks for nothing; it raises if the GPU has
        failed.
        """
        self._limits = limits = replace(lowering.limits, max_tokens=max_tokens)
        n_choices, hidden_size = limits.max_tokens * lowering.experts.n_used, lowering.experts.hidden_size
        forms = {w.format.activation for layer in lowering.experts.layers for w in (layer.op.gate, layer.op.up)}
        self._row_bytes = {form: _kernels.activation_bytes(form, hidden_size) for form in sorted(forms)}
        x_sizes = (limits.max_tokens * n_bytes for n_bytes in self._row_bytes.values())
        n_guessed = lowering.experts.n_used
        sizes = (4 * _LINE, 4 * n_choices, 4 * n_guessed, 4 * n_choices * hidden_size, *x_sizes)
        self._starts = np.cumsum([0, *(-(-size // _LINE) * _LINE for size in sizes)]).tolist()
        n_bytes = self._starts.pop()
        self._n_layers = len(lowering.experts.layers)
        self._lowering = lowering
        self._weights = weights
        self._keep: list[npt.NDArray[np.generic]] = []
        self._step = _kernels.Step(limits.max_tokens)
        self._step.positions[:] = np.arange(limits.max_tokens)
        self._last_request = 0
        self._look = look
        self._serving: deque[Future[None]] = deque()  # the steps that the thread is at
        self.n_single_tokens = 0
        with Resources() as held:
            self.memory = held.own(PinnedMemory(n_bytes))
            flags = self.memory.address
            words = self.memory.bytes[: 3 * _LINE].view(np.uint32)
            self._requested, self._answered, self._abandoned = (words[i * _LINE // 4 :][:1] for i in range(3))
            programs: list[_kernels.Program] = []
            for layer in lowering.experts.layers:
                programs.append(self._program(layer, n_threads, isa, programs[-1] if programs else None))
            guess = (flags + 3 * _LINE, self._shared(flags)[2]) if lowering.experts.next_routers else (0, 0)
            self._server = _kernels.RequestServer(programs, flags, flags + _LINE, flags + 2 * _LINE, *guess)
            self.seconds, self.guesses = np.zeros_like(self._server.seconds), self._server.guesses
            self._thread = ThreadPoolExecutor(1, "experts")
            held.defer(self._thread.shutdown)
            self._held = held.pop_all()

    def exchange(self, base: int) -> Exchange:
        """Return the addresses that the kernels need; `base` is where the device allocation begins."""
        flags, ids, guess, answers, x = self._shared(self.memory.device_address)
        return Exchange(
            ids,
            x,
            answers,
            flags,
            flags + _LINE,
            flags + 2 * _LINE,
            base + self._lowering.step.number,
            base + self._lowering.experts.n_misses,
            self._n_layers,
            guessed_ids=guess,
            guessed=flags + 3 * _LINE,
            n_guessed=base + self._lowering.experts.n_guessed,
        )

    def _shared(self, base: int) -> tuple[int, int, int, int, dict[Activation, int]]:
        """Return where flags, ids, a guess, answers and activations lie in the memory that begins at an address."""
        flags, ids, guess, answers, *x = (base + start for start in self._starts)
        return flags, ids, guess, answers, dict(zip(self._row_bytes, x, strict=True))

    def begin(self) -> None:
        """Get ready for a step, which is launched after this; no other one is under way."""
        self._abandoned[0] = 0
        self._last_request = int(self._requested[0])  # before the launch: the first request may come at once

    def serve(self, step_number: int, n_tokens: int, *, is_draft: bool = False) -> None:
        """Begin to answer the requests of the step that was launched; a draft is not timed as those of one token."""
        last = self._last_request
        self._serving.append(self._thread.submit(self._serve, step_number, n_tokens, last, is_draft=is_draft))

    def serve_behind(self, step_number: int, n_tokens: int) -> None:
        """Have the requests of a step answered that is launched behind the one before; its thread need not wake up."""
        last = (self._first_request(step_number) - 1) & _WORD  # the end of the step before
        self._serving.append(self._thread.submit(self._serve, step_number, n_tokens, last))

    def wait(self) -> None:
        """Wait until the oldest step asks for nothing more.

        Raises `DeviceError` if the CPU could not do its share, or nothing was asked for a long time; the rest of the
        step is then abandoned: its graph runs to its end with wrong values.
        """
        self._serving[0].result()
        self._serving.popleft()

    def _serve(self, step_number: int, n_tokens: int, last: int, *, is_draft: bool = False) -> None:
        """Answer all requests of a step."""
        self._step.n_tokens = n_tokens
        try:
            self._answer(step_number, last)
        finally:
            if n_tokens == 1 and not is_draft:
                self.seconds += self._server.seconds
                self.n_single_tokens += 1
            self._server.seconds[:] = 0.0

    def _answer(self, step_number: int, last: int) -> None:
        first = self._first_request(step_number)
        silent_s, slice_s = 0.0, min(_LOOK_S, _TIMEOUT_S)
        try:
            while silent_s < _TIMEOUT_S and not self._serve_for(slice_s, first, last):
                self._look()
                answered, silent_s = int(self._answered[0]), silent_s + slice_s
                if answered != last and (answered - first) & _WORD < self._n_layers:
                    last, silent_s = answered, 0.0  # go on after what was answered before the silence
        except (ValueError, MemoryError) as error:
            self._abandoned[0] = 1
            raise DeviceError(f"the CPU could not compute its share of the experts: {error}") from error
        except BaseException:
            self._abandoned[0] = 1
            raise
        if silent_s >= _TIMEOUT_S:
            self._abandoned[0] = 1
            raise DeviceError(
                f"the GPU made no request for {silent_s:g} s (the last was {int(self._requested[0])}, answered "
                f"{int(self._answered[0])}); is another program using the GPU?"
            )

    def has_passed(self, step_number: int, layer: int) -> bool:
        """Return whether the GPU is known to be done with a layer in a step; any thread may ask, at any time.

        It is known where a later layer asks for experts, or none will: kernels run one after the other.
        """
        asking = (int(self._requested[0]) - self._first_request(step_number)) & _WORD
        return layer < asking <= self._n_layers

    def _first_request(self, step_number: int) -> int:
        """Return the number of the request that a step's first layer may make."""
        return (step_number * (self._n_layers + 1) + 1) & _WORD

    def _serve_for(self, seconds: float, first: int, last: int) -> bool:
        """Return whether the step asks for nothing more, or was abandoned; False if nothing was asked for so long."""
        try:
            self._server.run(self._step, first, last, seconds)
        except TimeoutError:
            return False
        return True

    def abandon(self) -> None:
        """Let the graph run to the end of the step without answers; nothing is computed any more on return."""
        self._abandoned[0] = 1
        wait(self._serving)
        self._serving.clear()

    def close(self) -> None:
        """End the thread and free the memory; no step may be under way."""
        self._held.close()

    def _program(
        self, layer: ExpertLayer, n_threads: int, isa: str | None, before: _kernels.Program | None
    ) -> _kernels.Program:
        """Return a program of one layer; it shares memory with that of the layer before."""
        limits, op = self._limits, layer.op
        _, ids, _, answers, x = self._shared(self.memory.address)
        program = _kernels.Program(limits.max_tokens, limits.n_slots, n_threads, isa, before)
        hidden_size, n_used = op.gate.n_cols, op.routing.ids.width
        forms = [(x[w.format.activation], self._row_bytes[w.format.activation]) for w in (op.gate, op.up)]
        tables = [self._table(layer, i) for i in range(len(layer.weights))]
        gate, up, down = (self._matrix(tables[i], weight, bias) for i, weight, bias in layer.projections)
        program.experts(
            *forms[0],
            *forms[1],
            ids,
            layer.n_experts,
            n_used,
            gate,
            up,
            down,
            op.activation,
            op.limit,
            op.up_limit,
            hidden_size,
            op.gate.n_rows,
            answers,
            n_used * hidden_size,
        )
        return program

    def _table(self, layer: ExpertLayer, matrix: int) -> int:
        """Return a table of where one matrix of each expert lies."""
        array = self._weights.array(layer.weights[matrix].name)
        experts = (layer.expert(array, matrix, e) for e in range(layer.n_experts))
        return self._kept(np.array([expert.ctypes.data for expert in experts], np.int64))

    def _matrix(self, table: int, weight: Weight, bias: Vector | None) -> tuple[int, int, int, int]:
        """Return one matrix of a layer's experts, as `_kernels.Program.experts` takes it."""
        scale_at, bias_at = (
            0 if vector is None else self._kept(self._lowering.recorder.values(vector))
            for vector in (weight.scale, bias)
        )
        return table, weight.format.ggml_type, scale_at, bias_at

    def _kept(self, values: npt.NDArray[np.generic]) -> int:
        """Return the address of an array that lives as long as the server."""
        self._keep.append(values)
        return int(values.ctypes.data)
