"""Opens a GPU as a device and runs compiled programs on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.context_slots import SequenceLengths, UsableSlots
from engine.devices.cuda import drawing, tiles
from engine.devices.cuda.driver import probe
from engine.devices.cuda.elementwise import fetch
from engine.devices.cuda.expert_layers import Staging, Streamed
from engine.devices.cuda.host_memory import ExpertPaths, PinnedExperts
from engine.devices.cuda.jit import Compiler, Progress
from engine.devices.cuda.kernels import Exchange
from engine.devices.cuda.launch import Launch
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.misses import MissServer
from engine.devices.cuda.places import DRAW_WORDS, reserved_bytes
from engine.devices.cuda.runtime import Context, DeviceMemory, Graph, PinnedMemory, Stream, close_all
from engine.devices.cuda.sequence_state import Part, recurrent_parts, used_parts
from engine.devices.cuda.speeds import measure_speeds
from engine.devices.cuda.streaming import ExpertStream
from engine.devices.cuda.swaps import Copy, ExpertCopies
from engine.devices.footprint import lends_from, measure
from engine.devices.graph import DRAW, NO_DRAW, Limits, Rows, WeightAccess
from engine.devices.graph import Graph as ForwardGraph
from engine.devices.placement import STAGED_EXPERTS, MemoryPlan, Wish, plan_memory
from engine.devices.slots import Ticket
from engine.devices.timing import CPU_MACS, Bandwidths, LayerTimes
from engine.errors import RequestError
from engine.machine import n_logical_cpus
from engine.quants import install_grids

_log = logging.getLogger("engine")
_DONE = Copy(-1, -1, -1, is_done=True)
_THREADS_TO_SPARE = 8  # from so many on one is better left to the cache, if there is no other CPU for it
T = TypeVar("T", DeviceMemory, PinnedMemory, Stream, Graph)
MARGIN_BYTES = 256 << 20  # left to the driver, the display and fragmentation
_SIZES = (1, 4, 8, 64, 512)  # steps of up to so many tokens have launches made for that size
_LARGEST_GRAPH = 64  # larger steps are launched one kernel after the other, which costs little beside their work
_PROMPT_SHARE = 1 / 8  # of the memory left for experts that larger steps of a prompt may take
_STAGING_SHARE = 1 / 16  # likewise the ring that experts pass through
_MOST_BUFFERS = 32  # of the ring
_LEAST_PROMPT_TOKENS = 64


class CUDADevice:
    """All operations on one GPU, but for experts that have no slot there: those the CPU computes at the same time."""

    def __init__(
        self,
        index: int = 0,
        *,
        wish: Wish | None = None,
        vram_budget: int | None = None,
        n_threads: int = 1,
        isa: str | None = None,
        bandwidths: Bandwidths | None = None,
        prompt_tokens: int = 4096,
        stream_n_tokens: int | None = None,
        guesses: bool = True,
        compiler: Compiler | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Open GPU `index`; raise `DeviceError` if there is none that can be used.

        Args:
            index: which GPU.
            wish: what to do with its memory; by default as many expert slots as fit.
            vram_budget: bytes of device memory to use at most; None for what is free.
            n_threads: CPU threads for the experts without a slot.
            isa: instruction-set level that they may use; None for the best.
            bandwidths: of the machine; None to measure them.
            prompt_tokens: of a prompt that are run together, if memory allows and more than `Limits.max_tokens`.
            stream_n_tokens: steps of this many tokens or more bring the experts that have no slot to the GPU; in
                smaller ones the CPU computes them. None for where that pays.
            guesses: whether the CPU fetches what the next layer will likely ask it for while it waits.
            compiler: makes the kernels; None for NVIDIA's.
            progress: called while kernels are compiled.
        """
        self.gpu = probe(index)
        self.wish = wish or Wish()
        self.vram_budget = vram_budget
        self.n_threads = n_threads
        self.isa = isa
        self.bandwidths = bandwidths
        self.prompt_tokens = prompt_tokens
        self.stream_n_tokens = stream_n_tokens
        self.guesses = guesses
        self.progress = progress
        install_grids()
        self.context = Context(self.gpu, compiler)

    @property
    def description(self) -> str:
        """Return one line for people."""
        return f"CUDA: {self.gpu.description}; {self.n_threads} CPU thread{'s' * (self.n_threads != 1)}"

    def compile(self, graph: ForwardGraph, weights: WeightAccess, limits: Limits) -> CUDAProgram:
        """Make a program of a recorded forward pass. The weights must outlive it."""
        self.context.make_current()
        speeds = self.bandwidths or self._measure_speeds()
        lowering, plan = self._fit(graph, weights, limits, speeds)
        return CUDAProgram(self, lowering, plan.usable, weights, speeds)

    def close(self) -> None:
        """Give the GPU back; programs must be closed before."""
        self.context.close()

    def _measure_speeds(self) -> Bandwidths:
        stream = Stream(self.context)
        try:
            return measure_speeds(stream, self.n_threads)
        finally:
            stream.close()

    def _where_streaming_pays(self, graph: ForwardGraph, limits: Limits, speeds: Bandwidths) -> int:
        """Return from how many tokens on; at most what was asked for in a step, as only streaming allows more."""
        cpu_macs = self.n_threads * CPU_MACS[self.isa or _kernels.isa_levels()[-1]]
        return min(measure(graph, limits).streaming_pays_from(speeds, cpu_macs), limits.max_tokens)

    def _fit(
        self, graph: ForwardGraph, weights: WeightAccess, limits: Limits, speeds: Bandwidths
    ) -> tuple[Lowering, MemoryPlan]:
        """Plan the memory, with as many expert slots as asked for or as fit."""
        allowed = self.context.free_bytes() - MARGIN_BYTES
        if self.vram_budget is not None:
            allowed = min(allowed, self.vram_budget)
        bare = self._bare(graph, weights, limits)
        threshold = self.stream_n_tokens or self._where_streaming_pays(graph, limits, speeds)
        threshold = max(threshold, tiles.MIN_TOKENS)
        limits = self._larger_steps(bare, int((allowed - bare.layout.n_bytes) * _PROMPT_SHARE), threshold)
        bare = self._bare(graph, weights, limits)
        staging = self._staging(bare, int((allowed - bare.layout.n_bytes) * _STAGING_SHARE), threshold)
        scratch_bytes = reserved_bytes(bare.scratch.n_bytes)
        footprint = replace(
            measure(graph, limits),
            dense_bytes=bare.layout.n_bytes - bare.state[1] - scratch_bytes,
            state_bytes=bare.state[1],
            scratch_bytes=scratch_bytes,
            expert_bytes=np.array([layer.expert_bytes for layer in bare.experts.layers], np.int64),
        )
        staging_bytes = 0
        if staging is not None:
            staging_bytes = reserved_bytes(staging.n_buffers * _batch_bytes(bare, staging.at_once))
            shorter = bare.recorder.scratch_for(limits.up_to(lends_from(threshold) - 1))
            behind_slots = reserved_bytes(0) + reserved_bytes(shorter.n_bytes)
            footprint = replace(footprint, scratch_bytes=behind_slots, long_scratch_bytes=scratch_bytes)
        plan = plan_memory(footprint, allowed, self.wish, staging_bytes)
        streams = bool((plan.n_kept < bare.experts.n_experts).any())
        lowering = Lowering(graph, weights, limits, plan, staging if streams else None, guesses=self.guesses)
        assert lowering.layout.n_bytes <= allowed
        return lowering, plan

    def _bare(self, graph: ForwardGraph, weights: WeightAccess, limits: Limits) -> Lowering:
        """Return what is needed without any expert."""
        bare = Lowering(graph, weights, limits, guesses=self.guesses)
        bare.recorder.uploads.clear()  # they hold the weights, and a recorder refers to itself: it may live on for long
        return bare

    def _larger_steps(self, bare: Lowering, n_bytes: int, threshold: int) -> Limits:
        """Return limits with as many tokens in a step as asked for, or halved until `n_bytes` more scratch suffice."""
        limits = bare.limits
        n_tokens = min(self.prompt_tokens, limits.n_slots * limits.context_length)
        if not bare.can_stream or threshold > limits.max_tokens:
            return limits  # they would have to go through the CPU
        max_outputs = max(limits.max_tokens, limits.n_slots)
        while n_tokens > limits.max_tokens:
            larger = replace(limits, max_tokens=n_tokens, max_outputs=min(max_outputs, n_tokens))
            if bare.recorder.scratch_for(larger).n_bytes <= n_bytes + bare.scratch.n_bytes:
                return larger
            n_tokens //= 2
        return limits

    @staticmethod
    def _staging(bare: Lowering, n_bytes: int, threshold: int) -> Staging | None:
        """Return a ring of about so many bytes, two buffers of one expert at least; None if none can be used."""
        if not bare.can_stream or bare.limits.max_tokens < threshold:
            return None
        one = _batch_bytes(bare, 1)
        at_once = max(1, min(STAGED_EXPERTS, bare.experts.n_experts, n_bytes // (2 * one)))
        n_buffers = max(2, min(_MOST_BUFFERS, n_bytes // _batch_bytes(bare, at_once)))
        return Staging(n_buffers, at_once, threshold)


class _Passage(NamedTuple):
    """When a step, by its number from 1 on, is done with the slots of a layer."""

    step: int
    layer: int


def _step_number(n_begun: int) -> int:
    """Return the number that the GPU has for the n-th step."""
    return n_begun & 0x7FFFFFFF


def _kernels_of(step: Launch | Streamed) -> tuple[Launch, ...]:
    return (step,) if isinstance(step, Launch) else step.launches


def _batch_bytes(lowering: Lowering, at_once: int) -> int:
    """Return the bytes of a staging buffer."""
    return max(layer.batch_bytes(at_once) for layer in lowering.experts.layers)


class CUDAProgram:
    """A compiled forward pass, the sequences it keeps, and the memory of both. Implements `WaitingProgram`.

    Layers that have a slot for every expert are filled here and stay as they are. The slots of all others are empty at
    first. A step is over when `run` returns: whatever is published between two calls holds for the whole next step,
    and what is published meanwhile for this one or the next.

    Attributes:
        leaves_a_cpu, while_waiting, before_end: another thread may work, and move experts, while a step runs; see
            `WaitingProgram`.
    """

    state_layout = "positions"

    def __init__(
        self,
        device: CUDADevice,
        lowering: Lowering,
        usable: UsableSlots,
        weights: WeightAccess,
        bandwidths: Bandwidths,
    ) -> None:
        self._context = context = device.context
        self._lowering = lowering
        self._weights = weights
        self._bandwidths = bandwidths
        self._limits = limits = lowering.limits
        self._owned: list[DeviceMemory | PinnedMemory | Stream | Graph] = []
        self._vector_writes: dict[tuple[str | int, ...], tuple[PinnedMemory, Graph]] = {}  # by names and size
        self._misses: MissServer | None = None
        self._copies: ExpertCopies | None = None
        self._pinned: PinnedExperts | None = None
        self._expert_stream: ExpertStream | None = None
        self._stream_n_tokens = limits.max_tokens + 1  # no step streams experts
        self._long_steps: dict[int, list[Launch | Streamed]] = {}
        self._graphs: dict[int, Graph] = {}
        self._n_begun = self._n_over = 0  # steps
        self.leaves_a_cpu = False
        self.while_waiting: Callable[[], object] | None = None
        self.before_end: Callable[[], object] | None = None
        self._seconds = np.zeros((2, len(lowering.experts.layers)))  # see `layer_times`
        self._n_single_tokens = 0
        self._usable, self._lengths = usable, SequenceLengths(limits.n_slots)
        self._n_slots = np.array([layer.n_slots for layer in lowering.experts.layers], np.intp)
        self._all_slots = usable.of(False, 0)
        n_layers, n_experts, n_used = len(lowering.experts.layers), lowering.experts.n_experts, lowering.experts.n_used
        try:
            self._memory = self._own(DeviceMemory(lowering.layout.n_bytes))
            self._stream = self._own(Stream(context))
            self._step = self._own(PinnedMemory(4 * lowering.step.n_words))
            self._words = self._step.bytes.view(np.int32)
            self._table = self._own(PinnedMemory(4 * max(1, n_layers * n_experts)))
            self._ids = self._own(PinnedMemory(4 * max(1, n_layers * limits.max_tokens * n_used)))
            rows = lowering.drawing.n_rows  # one for each sequence: what decoding asks for
            logits = self._own(PinnedMemory(4 * rows * lowering.n_vocab))
            self._logits: npt.NDArray[np.float32] = logits.bytes.view(np.float32).reshape(rows, -1)
            self._draws = self._words[lowering.step.first_draw :].view(DRAW)
            self._top_k: npt.NDArray[np.int32] = self._draws["top_k"]
            self._drawn = self._own(PinnedMemory(4 * rows))
            self._chosen: npt.NDArray[np.int32] = self._drawn.bytes.view(np.int32)[:rows]
            self._places = self._table.bytes.view(np.int32)[: n_layers * n_experts].reshape(n_layers, -1)
            self._places[:] = -1
            self._routing: npt.NDArray[np.int32] = np.zeros((n_layers, 0, n_used), np.int32)  # of the last step
            self._expert_in = np.full(self._all_slots.shape, -1, np.int32)  # of each layer's slots, -1: nobody's
            self._upload_constants()
            exchange = None
            if lowering.needs_cpu:
                self._pinned = PinnedExperts(lowering, weights)
                is_pinned = self._pinned.is_pinned
                paths = ExpertPaths(lowering, weights, self._memory.address, device.n_threads, is_pinned)
                self._copies = ExpertCopies(context, paths)
                if lowering.staging is not None:
                    self._expert_stream = ExpertStream(context, paths)
                    self._stream_n_tokens = lowering.staging.from_n_tokens
                most = min(limits.max_tokens, self._stream_n_tokens - 1)
                n_threads = device.n_threads
                if self._pinned.is_pinned:  # else the threads must fill buffers, too
                    self.leaves_a_cpu = n_logical_cpus() > n_threads or n_threads >= _THREADS_TO_SPARE
                    n_threads -= n_logical_cpus() <= n_threads and n_threads >= _THREADS_TO_SPARE
                self._misses = MissServer(lowering, weights, most, n_threads, device.isa)
                exchange = self._misses.exchange(self._memory.address)
                _log.info("%s", self._describe_streaming(self._pinned))
            self._prepare_steps(exchange, device.progress)
        except BaseException:
            self.close()
            raise

    @property
    def limits(self) -> Limits:
        """Return what a step may be: of more tokens than were asked for, where memory allows and it helps."""
        return self._limits

    @property
    def state_bytes(self) -> int:
        """Return the bytes of all KV caches and recurrent states."""
        return self._lowering.state[1]

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of all intermediate results."""
        return self._lowering.long_scratch.n_bytes

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
        self._top_k[:] = NO_DRAW
        _, logits = self._run(token_ids, positions, slots, output_rows)
        assert logits is not None or not len(output_rows)
        return self._logits[:0] if logits is None else logits

    def allow(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Say which tokens may be drawn from now on, [n_vocab]."""
        assert len(allowed) == self._lowering.n_vocab
        bits = drawing.as_bits(allowed)
        self._upload([(self._lowering.drawing.allowed, bits.nbytes)], bits.view(np.uint8))

    def run_and_draw(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
        draws: npt.NDArray[np.void],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Run one step and draw tokens; see `graph.DrawingProgram.run_and_draw`, and `run` for what it raises."""
        n = len(output_rows)
        assert len(draws) == n <= len(self._draws)
        self._draws[:n] = draws
        self._top_k[:n][draws["top_k"] > drawing.MOST_TOP_K] = NO_DRAW
        self._top_k[n:] = NO_DRAW
        return self._run(token_ids, positions, slots, output_rows)

    def _run(self, *step: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        """Run a step, checked; return what was drawn, -1 for nothing, and all logits if that is so anywhere."""
        self._check(*step)
        token_ids, positions, slots, _ = step
        self._take_memory(len(token_ids), positions, slots)
        self._context.make_current()
        self._n_begun += 1
        try:
            return self._run_step(*step)
        finally:
            self._n_over = self._n_begun

    def _take_memory(self, n_tokens: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> None:
        """Note that a step uses the memory of the slots that it does not leave alone."""
        usable = self.usable_slots(n_tokens, self.longest_after(positions, slots))
        if usable is not self._all_slots:
            # One look: another thread may be publishing, in slots that the step leaves alone.
            is_published = self._expert_in >= 0
            assert not (is_published & ~usable).any(), "the step needs the memory of an expert that is published"
        self._lengths.note(positions, slots)

    def _run_step(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]:
        n, n_outputs = len(token_ids), len(output_rows)
        lowering, limits = self._lowering, self._limits
        self._words[:3] = n, n_outputs, _step_number(self._n_begun)
        for i, values in enumerate((token_ids, positions, slots, output_rows)):
            start = 4 + i * limits.max_tokens
            self._words[start : start + len(values)] = values
        most = next(size for size in self._sizes if size >= n)
        streams = n >= self._stream_n_tokens
        logits = self._logits[:n_outputs]
        if n_outputs > len(self._logits):
            logits = np.empty((n_outputs, lowering.n_vocab), np.float32)
        may_do_without = NO_DRAW not in self._top_k[:n_outputs].tolist()  # of few Python is quicker

        misses = None if streams else self._misses
        if misses is not None:
            misses.begin(n)
        try:
            if most in self._graphs:
                self._graphs[most].launch(self._stream)
            else:
                self._launch(most, streams)
            if self.while_waiting is not None:
                self.while_waiting()
            if misses is not None:
                misses.serve(_step_number(self._n_begun), self._stream.is_idle)
            if not may_do_without:
                self._download_logits(logits, most)
            if misses is not None:
                self._count_seconds(misses, n)
                if self.before_end is not None:
                    self.before_end()
        except BaseException:
            if misses is not None:
                misses.abandon()
            self._synchronize()
            raise
        self._synchronize()
        self._routing = self._routing_of[most][:, :n]
        if not may_do_without:
            return np.where(self._top_k[:n_outputs] != NO_DRAW, self._chosen[:n_outputs], -1), logits
        chosen = self._chosen[:n_outputs].copy()
        if min(chosen.tolist(), default=0) >= 0:
            return chosen, None
        self._download_logits(logits, most)  # now, for swaps may take this memory when the step is over
        self._synchronize()
        return chosen, logits

    def _count_seconds(self, misses: MissServer, n_tokens: int) -> None:
        if n_tokens == 1:
            self._seconds += misses.seconds
            self._n_single_tokens += 1
        misses.seconds[:] = 0.0

    @property
    def layer_times(self) -> LayerTimes:
        """Return the times of all steps of one token so far in which the CPU may have had to help."""
        device, cpu = self._seconds.copy()
        guesses = np.zeros(2, np.int64) if self._misses is None else self._misses.guesses.copy()
        return LayerTimes(self._n_single_tokens, device, cpu, guesses)

    def routing(self) -> npt.NDArray[np.int32]:
        """Return a copy of the experts chosen in the last step, [n_moe_layers, n_tokens, n_experts_used]."""
        routing: npt.NDArray[np.int32] = self._routing.copy()
        return routing

    def write_vectors(self, names: Sequence[str], values: npt.NDArray[np.float32]) -> None:
        """Replace the values of some vectors, [len(names), size], for all steps from now on."""
        self._context.make_current()
        key = (*names, values.shape[1])
        if key not in self._vector_writes:
            memory = self._own(PinnedMemory(values.nbytes))
            offsets = [self._lowering.recorder.vector_offset(name, values.shape[1]) for name in names]

            n_words, to = values.shape[1], self._memory.address
            pieces = [(memory.device_address + 4 * n_words * i, to + at, n_words) for i, at in enumerate(offsets)]
            self._vector_writes[key] = memory, self._own(self._captured(fetch(pieces)))
        memory, graph = self._vector_writes[key]
        memory.bytes[:] = values.reshape(-1).view(np.uint8)  # the last ones were fetched before the step at hand
        graph.launch(self._stream)

    def save_sequence(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what a sequence of `n_tokens` left in a slot, flat."""
        return self._download(list(used_parts(self._lowering.recorder.states, self._limits, slot, n_tokens)))

    def load_sequence(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_sequence` returned. Raises `RequestError` if it is not as long as this program needs."""
        parts = list(used_parts(self._lowering.recorder.states, self._limits, slot, n_tokens))
        needed = sum(n_bytes for _, n_bytes in parts)
        if saved.size != needed:
            raise RequestError(f"the saved state has {saved.size} bytes; {n_tokens} tokens of this model have {needed}")
        if n_tokens:
            self._take_memory(1, np.array([n_tokens - 1], np.int32), np.array([slot], np.int32))
        self._upload(parts, saved)

    def save_states(self, slot: int) -> npt.NDArray[np.uint8]:
        """Return a copy of the recurrent states of the sequence in a slot, flat."""
        return self._download(recurrent_parts(self._lowering.recorder.states, slot))

    def load_states(self, slot: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_states` returned for this slot."""
        self._upload(recurrent_parts(self._lowering.recorder.states, slot), saved)

    def _download(self, parts: list[Part]) -> npt.NDArray[np.uint8]:
        self._context.make_current()
        saved, at = np.empty(sum(n_bytes for _, n_bytes in parts), np.uint8), 0
        try:
            for offset, n_bytes in parts:
                self._stream.download(int(saved.ctypes.data) + at, self._memory.address + offset, n_bytes)
                at += n_bytes
        finally:
            self._stream.synchronize()
        return saved

    def _upload(self, parts: list[Part], saved: npt.NDArray[np.uint8]) -> None:
        self._context.make_current()
        source, at = np.ascontiguousarray(saved), 0
        try:
            for offset, n_bytes in parts:
                self._stream.upload(self._memory.address + offset, int(source.ctypes.data) + at, n_bytes)
                at += n_bytes
        finally:
            self._stream.synchronize()

    def close(self) -> None:
        """Free all memory."""
        self._context.make_current()
        misses, self._misses = self._misses, None
        copies, self._copies = self._copies, None
        expert_stream, self._expert_stream = self._expert_stream, None
        pinned, self._pinned = self._pinned, None
        owned, self._owned = [*self._owned, *self._graphs.values()], []
        self._graphs.clear()
        self._long_steps.clear()
        close_all([*owned[::-1], *(c for c in (copies, expert_stream, misses, pinned) if c is not None)])

    # -- slots -------------------------------------------------------------------------------------------------------

    @property
    def n_slots(self) -> npt.NDArray[np.intp]:
        """Return the slots of each MoE layer."""
        return self._n_slots

    def usable_slots(self, n_tokens: int, n_positions: int) -> npt.NDArray[np.bool_]:
        """Return which slots a step leaves alone."""
        staging = self._lowering.staging
        return self._usable.of(staging is not None and n_tokens >= staging.lends_from, n_positions)

    def longest_after(self, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> int:
        """Return how many tokens the longest sequence has after a step with tokens there."""
        return self._lengths.longest_after(positions, slots)

    @property
    def n_experts(self) -> int:
        """Return the experts of each MoE layer."""
        return self._lowering.experts.n_experts

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Return the size of one expert of each MoE layer, int64 [n_moe_layers]."""
        return np.array([layer.expert_bytes for layer in self._lowering.experts.layers], np.int64)

    @property
    def bandwidths(self) -> Bandwidths:
        """Return the speeds that decide which swaps pay."""
        return self._bandwidths

    @property
    def device_bytes(self) -> int:
        """Return the bytes of device memory in all."""
        return self._lowering.layout.n_bytes

    def copy_expert(self, layer: int, expert: int, slot: int) -> Ticket:
        """Start to copy an expert from RAM into a slot that no step reads."""
        if self._lowering.experts.layers[layer].is_resident:
            return _DONE
        assert self._copies is not None
        self._context.make_current()
        return self._copies.begin(layer, expert, slot)

    def fence(self, layer: int) -> Ticket:
        """Return a ticket that is done when no step started so far reads a slot of the layer any more."""
        return _Passage(self._n_begun, layer)

    def is_done(self, ticket: Ticket) -> bool:
        """Return whether the work is done; raise `DeviceError` if it failed."""
        if isinstance(ticket, _Passage):
            if self._n_over >= ticket.step:
                return True
            misses = self._misses
            return misses is not None and misses.has_passed(_step_number(ticket.step), ticket.layer)
        assert isinstance(ticket, Copy)
        if not ticket.is_done and self._copies is not None:
            self._context.make_current()
            self._copies.advance()
        if ticket.error is not None:
            raise ticket.error
        return ticket.is_done

    def publish(self, layer: int, expert: int, slot: int) -> None:
        """Tell steps started from now on where an expert is: in a slot, or only in RAM (-1)."""
        experts = self._lowering.experts.layers[layer]
        if not experts.is_resident:
            self._places[layer, expert] = -1 if slot < 0 else experts.place(slot)
            held = self._expert_in[layer]
            held[held == expert] = -1
            if slot >= 0:
                held[slot] = expert

    def wait_all(self) -> None:
        """Wait for all copies; those that failed do not raise."""
        if self._copies is not None:
            self._context.make_current()
            self._copies.wait_all()

    # -- setting up --------------------------------------------------------------------------------------------------

    def _own(self, thing: T) -> T:
        self._owned.append(thing)
        return thing

    def _upload_constants(self) -> None:
        """Fill the device memory: constants, zero states, and the first experts into the slots."""
        lowering, base, stream = self._lowering, self._memory.address, self._stream
        stream.fill(base + lowering.state[0], 0, lowering.state[1])
        for offset, values in lowering.recorder.uploads:
            stream.upload(base + offset, int(values.ctypes.data), values.nbytes)
        for layer, experts in enumerate(lowering.experts.layers):
            if not experts.is_resident:
                continue
            for expert in range(experts.n_experts):
                self._places[layer, expert] = experts.place(expert)
                self._expert_in[layer, expert] = expert
            for i, weight in enumerate(experts.weights):
                array = self._weights.array(weight.name)
                for expert, offset in enumerate(experts.offsets):
                    source = experts.expert(array, i, expert)
                    to = base + offset + experts.matrix_offset(i)
                    stream.upload(to, int(source.ctypes.data), source.nbytes)
        stream.synchronize()
        lowering.recorder.uploads.clear()

    def _describe_streaming(self, pinned: PinnedExperts) -> str:
        """Return one line: how experts without a slot get to the device."""
        staging, lowering = self._lowering.staging, self._lowering
        if staging is None:
            return f"{pinned.describe()}; the CPU computes those without a slot in steps of any length"
        size = staging.n_buffers * lowering.staging_buffer_bytes
        n_lent = sum(layer.n_lent for layer in lowering.experts.layers)
        return (
            f"{pinned.describe()}; steps of {self._stream_n_tokens} to {self._limits.max_tokens} tokens of a prompt "
            f"stream those without a slot through {staging.n_buffers} buffers ({size / 1e6:.0f} MB), "
            f"in memory that holds {n_lent} experts in between"
        )

    def _prepare_steps(self, exchange: Exchange | None, progress: Progress | None) -> None:
        """Make the launches for steps of some sizes, and graphs of them where the CPU takes part or they are short.

        The launches of a step that waits for the CPU must all be queued before it is answered: only a graph is.
        """
        lowering, base, max_tokens = self._lowering, self._memory.address, self._limits.max_tokens
        drawn = self._drawn.device_address
        largest = min(self._stream_n_tokens - 1, max_tokens)  # of the steps that stream nothing
        recorded: dict[int, Sequence[Launch | Streamed]] = {}
        staging = lowering.staging
        short = largest if staging is None else staging.lends_from - 1  # no larger step may take a short one's launches
        for size in sorted({min(size, largest) for size in (*_SIZES, short, largest)}):
            first, last = self._fetch_step(size, self._table), lowering.draw(base, size, drawn)
            recorded[size] = [*first, *lowering.launches(base, size, exchange), *last]
        if self._expert_stream is not None:
            table = self._expert_stream.table
            for size in sorted({min(size, max_tokens) for size in (*_SIZES, max_tokens) if size > largest}):
                first, last = self._fetch_step(size, table), lowering.draw(base, size, drawn)
                recorded[size] = [*first, *lowering.streaming_launches(base, size), *last]
        kernels = [k for steps in recorded.values() for step in steps for k in _kernels_of(step)]
        self._context.prepare(kernels, progress)
        for launch in kernels:
            self._context.function(launch)  # no look-up may happen while a graph waits
        self._sizes = list(recorded)
        n_layers, n_used = len(lowering.experts.layers), lowering.experts.n_used
        ids = self._ids.bytes.view(np.int32)
        self._routing_of = {n: ids[: n_layers * n * n_used].reshape(n_layers, n, n_used) for n in self._sizes}
        for size, steps in recorded.items():
            if size <= largest and (exchange is not None or size <= _LARGEST_GRAPH):
                self._graphs[size] = self._captured([step for step in steps if isinstance(step, Launch)], size)
            else:
                self._long_steps[size] = list(steps)

    def _fetch_step(self, most: int, table: PinnedMemory) -> list[Launch]:
        """Return what gets from the host what changes from step to step, in steps of so many tokens at most."""
        lowering, step = self._lowering, self._lowering.step
        to, host, stride = self._memory.address, self._step.device_address, 4 * self._limits.max_tokens
        counts, *arrays = step.offset, step.token_ids, step.positions, step.slots, step.output_rows
        pieces = [(host + 16 + i * stride, to + array, most) for i, array in enumerate(arrays)]
        places = table.device_address, to + lowering.experts.slot_table, self._places.size
        draws = host + 4 * step.first_draw, to + step.draws, min(most, len(self._draws)) * DRAW_WORDS
        return fetch([(host, to + counts, 4), *pieces, draws, places])

    def _captured(self, launches: Sequence[Launch], results_of: int | None = None) -> Graph:
        """Return launches as a graph, and the download of the results of so many tokens if asked for."""

        def work() -> None:
            for launch in launches:
                self._stream.launch(launch)
            if results_of is not None:
                self._download_results(results_of)

        return self._stream.capture(work)

    def _launch(self, most: int, streams: bool) -> None:
        """Queue a step that is no graph."""
        if streams and self._expert_stream is not None:
            self._expert_stream.begin(self._places)
            self._expert_stream.launch(self._long_steps[most], self._stream)
        else:
            for launch in self._long_steps[most]:
                assert isinstance(launch, Launch)
                self._stream.launch(launch)
        self._download_results(most)

    def _download_logits(self, logits: npt.NDArray[np.float32], most: int) -> None:
        source = self._memory.address + self._lowering.logits(most)
        self._stream.download(int(logits.ctypes.data), source, logits.nbytes)

    def _download_results(self, most: int) -> None:
        """Queue what every step of so many tokens at most gives: routing."""
        lowering = self._lowering
        n_ids = len(lowering.experts.layers) * most * lowering.experts.n_used
        if n_ids:
            self._stream.download(self._ids.address, self._memory.address + lowering.experts.chosen, 4 * n_ids)

    def _synchronize(self) -> None:
        """Wait for the step, and for the copies that it began; those may fail, too."""
        if self._expert_stream is not None:
            self._expert_stream.synchronize()
        self._stream.synchronize()

    def _check(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> None:
        limits, n = self._limits, len(token_ids)
        most_outputs = limits.most(Rows.OUTPUTS)
        if len(output_rows) > most_outputs:
            raise RequestError(
                f"a step with logits of {len(output_rows)} tokens was asked for; this program gives {most_outputs}"
            )
        if not 0 < n <= limits.max_tokens:
            raise RequestError(f"a step of {n} tokens was asked for; this program takes 1 to {limits.max_tokens}")
        for name, values, end in (
            ("token id", token_ids, self._lowering.n_embeddings),
            ("position", positions, limits.context_length),
            ("sequence slot", slots, limits.n_slots),
            ("output row", output_rows, n),
        ):
            numbers = values.tolist()  # of one token Python is quicker
            if numbers and not 0 <= min(numbers) <= max(numbers) < end:
                wrong = next(v for v in numbers if not 0 <= v < end)
                raise RequestError(f"{name} {wrong} is not in the range 0 to {end - 1} that this program takes")
