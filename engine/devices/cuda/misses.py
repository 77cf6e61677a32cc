"""The CPU's half of a step: answers the GPU's requests for experts that have no slot.

The protocol is written down in `cuda/handshake.cu`. The thread that answers is never the one that launches: a launch
may block until the graph is done, and the graph is not done before it is answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.cuda.kernels import Exchange
from engine.devices.cuda.lowering import ExpertLayer, Lowering
from engine.devices.cuda.runtime import PinnedMemory
from engine.devices.graph import Limits, WeightAccess
from engine.errors import DeviceError
from engine.quants.formats import Activation

_LINE = 64  # bytes of a cache line; each flag has one
_TIMEOUT_S = 30.0


class MissServer:
    """Computes misses on a thread of its own while a step runs.

    It holds one small CPU program for each layer: the activations put into the forms the weights take, and the experts.
    """

    def __init__(self, lowering: Lowering, weights: WeightAccess, n_threads: int, isa: str | None = None) -> None:
        limits = lowering.limits
        n_layers = len(lowering.expert_layers)
        n_choices, hidden_size = limits.max_tokens * lowering.n_used, lowering.hidden_size
        sizes = (3 * _LINE, 4 * n_choices, 4 * limits.max_tokens * hidden_size, 4 * n_choices * hidden_size)
        starts = np.cumsum([0, *(-(-size // _LINE) * _LINE for size in sizes)])
        self.memory = PinnedMemory(int(starts[-1]))
        flags, ids, x, answers = (self.memory.bytes[a : a + n] for a, n in zip(starts, sizes, strict=False))
        self._requested, self._answered, self._abandoned = (
            flags[i * _LINE : i * _LINE + 4].view(np.uint32) for i in range(3)
        )
        self._addresses = [self.memory.device_address + int(start) for start in starts[:4]]
        self._n_layers = n_layers
        self._keep: list[npt.NDArray[np.generic]] = []
        self._step = _kernels.Step(limits.max_tokens)
        self._step.positions[:] = np.arange(limits.max_tokens)
        self._programs = [
            self._program(layer, weights, limits, n_threads, isa, *(int(a.ctypes.data) for a in (ids, x, answers)))
            for layer in lowering.expert_layers
        ]
        self._error: BaseException | None = None
        self._wanted = threading.Condition()
        self._step_number: int | None = None
        self._last_request = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="expert-misses", daemon=True)
        self._thread.start()

    def exchange(self, base: int, lowering: Lowering) -> Exchange:
        """Return the addresses that the kernels need; `base` is where the device allocation begins."""
        flags, ids, x, answers = self._addresses
        return Exchange(
            ids,
            x,
            answers,
            flags,
            flags + _LINE,
            flags + 2 * _LINE,
            base + lowering.step.number,
            base + lowering.n_misses,
            self._n_layers,
        )

    def begin(self, step_number: int, n_tokens: int) -> None:
        """Answer the requests of one step, which is launched after this."""
        with self._wanted:
            self._error = None
            self._abandoned[0] = 0
            self._step.n_tokens = n_tokens
            self._last_request = int(self._requested[0])  # before the launch: the first request may come at once
            self._step_number = step_number
            self._wanted.notify()

    def end(self) -> None:
        """Wait until the step's requests are answered; raise `DeviceError` if one could not be."""
        with self._wanted:
            self._wanted.wait_for(lambda: self._step_number is None)
            error, self._error = self._error, None
        if error is not None:
            raise DeviceError(f"the CPU could not compute its share of the experts: {error}") from error

    def abandon(self) -> None:
        """Let the graph and the thread run to the end of the step without answers."""
        self._abandoned[0] = 1

    def close(self) -> None:
        """End the thread and free the memory; no step may be under way."""
        with self._wanted:
            self._is_closed = True
            self._wanted.notify()
        self._thread.join()
        del self._requested, self._answered, self._abandoned, self._programs
        self.memory.close()

    def _program(
        self,
        layer: ExpertLayer,
        weights: WeightAccess,
        limits: Limits,
        n_threads: int,
        isa: str | None,
        ids: int,
        x: int,
        answers: int,
    ) -> Callable[[], None]:
        program = _kernels.Program(limits.max_tokens, limits.n_slots, n_threads, isa)
        gate, up, _ = layer.weights
        hidden_size, n_used = gate.n_cols, layer.routing.ids.width
        forms: dict[Activation, tuple[int, int]] = {Activation.F32: (x, 4 * hidden_size)}
        for activation in (gate.format.activation, up.format.activation):
            if activation not in forms:
                row_bytes = _kernels.activation_bytes(activation, hidden_size)
                rows = self._zeros(limits.max_tokens * row_bytes)
                program.quantize(x, hidden_size, hidden_size, activation, rows, _kernels.ROWS_TOKENS)
                forms[activation] = (rows, row_bytes)
        gate_entry, up_entry, down_entry = (self._entry(layer, i, weights) for i in range(3))
        program.experts(
            *forms[gate.format.activation],
            *forms[up.format.activation],
            ids,
            layer.routing.n_experts,
            n_used,
            gate_entry,
            up_entry,
            down_entry,
            hidden_size,
            gate.n_rows,
            answers,
            n_used * hidden_size,
        )
        return lambda: program.run(self._step)

    def _entry(self, layer: ExpertLayer, matrix: int, weights: WeightAccess) -> tuple[int, int, int]:
        """Return one matrix of a layer's experts, as `_kernels.Program.experts` takes it."""
        weight = layer.weights[matrix]
        array = weights.array(weight.name)
        experts = (layer.expert(array, matrix, e) for e in range(layer.routing.n_experts))
        table = np.array([expert.ctypes.data for expert in experts], np.int64)
        self._keep.append(table)
        if weight.scale is None:
            return int(table.ctypes.data), weight.format.ggml_type, 0
        raw = weights.array(weight.scale.name).reshape(1, -1)
        scale = _kernels.dequantize(weight.scale.format.ggml_type, raw, weight.scale.size)
        self._keep.append(scale)
        return int(table.ctypes.data), weight.format.ggml_type, int(scale.ctypes.data)

    def _zeros(self, n_bytes: int) -> int:
        memory = np.zeros(n_bytes + _LINE, np.uint8)
        self._keep.append(memory)
        return -(-int(memory.ctypes.data) // _LINE) * _LINE

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._step_number is not None or self._is_closed)
                if self._step_number is None:
                    return
                number = self._step_number
            error: BaseException | None = None
            try:
                self._answer_step(number)
            except Exception as failure:  # whatever it is, the launching thread must hear of it, not wait for ever
                error = failure
                self.abandon()
            with self._wanted:
                self._error, self._step_number = error, None
                self._wanted.notify_all()

    def _answer_step(self, number: int) -> None:
        first = number * (self._n_layers + 1) + 1
        last = self._last_request
        while True:
            request = self._await_request(last)
            layer = (request - first) & 0xFFFFFFFF
            if layer >= self._n_layers:
                return
            self._programs[layer]()
            self._answered[0] = last = request

    def _await_request(self, last: int) -> int:
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            request = int(self._requested[0])
            if request != last:
                return request
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the GPU made no request for {_TIMEOUT_S:.0f} s (last request {last}, "
                    f"answered {int(self._answered[0])}); is another program using the GPU?"
                )
            if self._abandoned[0]:
                raise InterruptedError("the step was abandoned")
            time.sleep(0)
