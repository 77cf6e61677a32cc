"""Opens a GPU as a device and runs compiled programs on it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.devices.cuda.driver import probe
from engine.devices.cuda.jit import Compiler, Progress
from engine.devices.cuda.kernels import Exchange
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.misses import MissServer
from engine.devices.cuda.runtime import Context, DeviceMemory, Graph, PinnedMemory, Stream, close_all
from engine.devices.cuda.swaps import Swaps
from engine.devices.graph import Graph as ForwardGraph
from engine.devices.graph import Limits, WeightAccess
from engine.errors import DeviceError, RequestError

T = TypeVar("T", DeviceMemory, PinnedMemory, Stream)
_MARGIN_BYTES = 256 << 20  # left to the driver, the display and fragmentation


class CUDADevice:
    """All operations on one GPU, but for experts that have no slot there: those the CPU computes at the same time."""

    def __init__(
        self,
        index: int = 0,
        *,
        n_expert_slots: int | None = None,
        vram_budget: int | None = None,
        n_threads: int = 1,
        compiler: Compiler | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Open GPU `index`; raise `DeviceError` if there is none that can be used.

        Args:
            index: which GPU.
            n_expert_slots: experts of each layer that are kept on the GPU; None for as many as fit.
            vram_budget: bytes of device memory to use at most; None for what is free.
            n_threads: CPU threads for the experts without a slot.
            compiler: makes the kernels; None for NVIDIA's.
            progress: called while kernels are compiled.
        """
        self.gpu = probe(index)
        self.n_expert_slots = n_expert_slots
        self.vram_budget = vram_budget
        self.n_threads = n_threads
        self._progress = progress
        self.context = Context(self.gpu, compiler)

    @property
    def description(self) -> str:
        """Return one line for people."""
        return f"CUDA: {self.gpu.description}"

    def compile(self, graph: ForwardGraph, weights: WeightAccess, limits: Limits) -> CUDAProgram:
        """Make a program of a recorded forward pass. The weights must outlive it."""
        self.context.make_current()
        lowering = self._fit(graph, weights, limits)
        return CUDAProgram(self.context, lowering, weights, self.n_threads, self._progress)

    def close(self) -> None:
        """Give the GPU back; programs must be closed before."""
        self.context.close()

    def _fit(self, graph: ForwardGraph, weights: WeightAccess, limits: Limits) -> Lowering:
        """Plan the memory, with as many expert slots as asked for or as fit."""
        free = self.context.free_bytes() - _MARGIN_BYTES
        allowed = free if self.vram_budget is None else min(free, self.vram_budget)

        def plan(n_slots: int | None) -> Lowering:
            return Lowering(graph, weights, limits, n_slots)

        if self.n_expert_slots is not None:
            lowering = plan(self.n_expert_slots)
        else:
            lowering = plan(None)
            if lowering.layout.n_bytes > allowed and lowering.n_experts:
                none = plan(0).layout.n_bytes
                per_slot = (lowering.layout.n_bytes - none) / lowering.n_experts
                n_slots = max(0, int((allowed - none) / per_slot))
                lowering = plan(n_slots)
                while lowering.layout.n_bytes > allowed and n_slots > 0:  # places are rounded up
                    n_slots -= 1
                    lowering = plan(n_slots)
        if lowering.layout.n_bytes > allowed:
            raise DeviceError(
                f"the model needs {lowering.layout.n_bytes / 1e9:.2f} GB of GPU memory with "
                f"{lowering.n_expert_slots} expert slots in each layer; {allowed / 1e9:.2f} GB may be used: "
                "use a shorter context, fewer slots or a smaller chunk of prompt tokens"
            )
        return lowering


class CUDAProgram:
    """A compiled forward pass, the sequences it keeps, and the memory of both."""

    def __init__(
        self,
        context: Context,
        lowering: Lowering,
        weights: WeightAccess,
        n_threads: int,
        progress: Progress | None = None,
    ) -> None:
        self._context = context
        self._lowering = lowering
        self._weights = weights
        self._limits = limits = lowering.limits
        self._owned: list[DeviceMemory | PinnedMemory | Stream | Graph] = []
        self._misses: MissServer | None = None
        self._graphs: dict[int, Graph] = {}
        self._step_number = 0
        self._n_tokens = 0
        self._routing_rows = 1
        try:
            self._memory = self._own(DeviceMemory(lowering.layout.n_bytes))
            self._stream = self._own(Stream(context))
            self._step = self._own(PinnedMemory(4 * lowering.step.n_words))
            self._words = self._step.bytes.view(np.int32)
            self._table = self._own(PinnedMemory(4 * max(1, len(lowering.expert_layers) * lowering.n_experts)))
            self._logits = self._own(PinnedMemory(4 * lowering.n_vocab))
            self.expert_table = self._table.bytes.view(np.int32).reshape(len(lowering.expert_layers), -1)
            self._upload_constants()
            exchange = None
            if not lowering.all_resident:
                self._misses = MissServer(lowering, weights, n_threads)
                exchange = self._misses.exchange(self._memory.address, lowering)
            self._graphs = {most: self._capture(most, exchange, progress) for most in sorted({1, limits.max_tokens})}
        except BaseException:
            self.close()
            raise

    @property
    def state_bytes(self) -> int:
        """Return the bytes of all KV caches and recurrent states."""
        return self._lowering.state[1]

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of all intermediate results."""
        return self._lowering.scratch_bytes

    @property
    def device_bytes(self) -> int:
        """Return the bytes of device memory in all."""
        return self._lowering.layout.n_bytes

    @property
    def n_expert_slots(self) -> int:
        """Return how many experts of each layer have a slot."""
        return self._lowering.n_expert_slots

    def run(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run one step; see `graph.Program.run`.

        Raises `RequestError` for a step that does not fit the program, `DeviceError` if the device or the CPU's share
        failed; after a failure of the CPU's share the program can be used on.
        """
        n, n_outputs = len(token_ids), len(output_rows)
        self._check(token_ids, positions, slots, output_rows)
        self._context.make_current()
        lowering, limits = self._lowering, self._limits
        self._words[:3] = n, n_outputs, self._step_number
        for i, values in enumerate((token_ids, positions, slots, output_rows)):
            start = 4 + i * limits.max_tokens
            self._words[start : start + len(values)] = values
        most = 1 if n == 1 else limits.max_tokens
        logits = self._logits.bytes.view(np.float32).reshape(1, -1)
        if n_outputs != 1:
            logits = np.empty((n_outputs, lowering.n_vocab), np.float32)

        number, self._step_number = self._step_number, (self._step_number + 1) & 0x7FFFFFFF
        if self._misses is not None:
            self._misses.begin(number, n)
        try:
            self._graphs[most].launch(self._stream)
            if n_outputs:
                self._stream.download(
                    int(logits.ctypes.data), self._memory.address + lowering.logits, 4 * n_outputs * lowering.n_vocab
                )
            self._stream.synchronize()
        except BaseException:
            if self._misses is not None:
                self._misses.abandon()
            raise
        if self._misses is not None:
            self._misses.end()
        self._n_tokens, self._routing_rows = n, most
        return logits

    def routing(self) -> npt.NDArray[np.int32]:
        """Return a copy of the experts chosen in the last step, [n_moe_layers, n_tokens, n_experts_used]."""
        self._context.make_current()
        lowering = self._lowering
        ids = np.empty((len(lowering.expert_layers), self._routing_rows, lowering.n_used), np.int32)
        self._stream.download(int(ids.ctypes.data), self._memory.address + lowering.routing_offset, ids.nbytes)
        self._stream.synchronize()
        return ids[:, : self._n_tokens]

    def swaps(self, n_buffers: int = 2, n_threads: int = 1) -> Swaps:
        """Return what moves experts into slots between steps; close it before the program."""
        self._context.make_current()
        return Swaps(
            self._context,
            self._lowering,
            self._weights,
            self._memory.address,
            self.expert_table,
            n_buffers,
            n_threads,
        )

    def close(self) -> None:
        """Free all memory."""
        self._context.make_current()
        misses, self._misses = self._misses, None
        owned, self._owned = [*self._owned, *self._graphs.values()], []
        self._graphs.clear()
        close_all(owned[::-1])
        if misses is not None:
            misses.close()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _own(self, thing: T) -> T:
        self._owned.append(thing)
        return thing

    def _upload_constants(self) -> None:
        """Fill the device memory: constants, zero states, and the first experts into the slots."""
        lowering, base, stream = self._lowering, self._memory.address, self._stream
        stream.fill(base + lowering.state[0], 0, lowering.state[1])
        for offset, values in lowering.uploads:
            stream.upload(base + offset, int(values.ctypes.data), values.nbytes)
        self.expert_table[:] = -1
        for layer, experts in enumerate(lowering.expert_layers):
            for expert in range(min(lowering.n_expert_slots, experts.routing.n_experts)):
                for i, weight in enumerate(experts.weights):
                    source = experts.expert(self._weights.array(weight.name), i, expert)
                    to = base + experts.slots[i] + expert * experts.slot_bytes[i]
                    stream.upload(to, int(source.ctypes.data), source.nbytes)
                self.expert_table[layer, expert] = expert
        stream.synchronize()
        lowering.uploads.clear()

    def _capture(self, most: int, exchange: Exchange | None, progress: Progress | None) -> Graph:
        lowering, base, stream = self._lowering, self._memory.address, self._stream
        launches = lowering.launches(base, most, exchange)
        self._context.prepare(launches, progress)
        for launch in launches:
            self._context.function(launch)  # no look-up may happen while a graph waits

        def work() -> None:
            stream.upload(base + lowering.step.offset, self._step.device_address, self._step.n_bytes)
            stream.upload(base + lowering.expert_table, self._table.device_address, self._table.n_bytes)
            for launch in launches:
                stream.launch(launch)

        return stream.capture(work)

    def _check(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> None:
        limits, n = self._limits, len(token_ids)
        if not 0 < n <= limits.max_tokens:
            raise RequestError(f"a step of {n} tokens was asked for; this program takes 1 to {limits.max_tokens}")
        for name, values, end in (
            ("token id", token_ids, self._lowering.n_embeddings),
            ("position", positions, limits.context_length),
            ("sequence slot", slots, limits.n_slots),
            ("output row", output_rows, n),
        ):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < end:
                wrong = next(int(v) for v in values if not 0 <= v < end)
                raise RequestError(f"{name} {wrong} is not in the range 0 to {end - 1} that this program takes")
