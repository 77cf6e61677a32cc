"""A compiled forward pass on a GPU, ready to run steps; beside them experts are copied into slots."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.devices.context_slots import SequenceLengths
from engine.devices.cuda import drawing
from engine.devices.cuda.elementwise import transfer
from engine.devices.cuda.host_memory import ExpertPaths, PinnedTensors, how_experts_come, pinned_experts
from engine.devices.cuda.jit import Progress
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.misses import MissServer
from engine.devices.cuda.runtime import Context, DeviceMemory, Graph, PinnedMemory, Stream
from engine.devices.cuda.sequence_state import Part, kept_states, passing_parts, used_parts
from engine.devices.cuda.step_memory import StepMemory
from engine.devices.cuda.steps import DRAFT, Steps
from engine.devices.cuda.streaming import ExpertStream
from engine.devices.cuda.swaps import Copy, ExpertCopies
from engine.devices.graph import Rows
from engine.devices.lending import UsableSlots
from engine.devices.program import DRAW, Drawn, Limits, Step, WeightAccess, kept_row
from engine.devices.slots import Ticket
from engine.devices.timing import Bandwidths, LayerTimes
from engine.errors import DeviceError, RequestError
from engine.machine import n_logical_cpus
from engine.resources import Resources

_log = logging.getLogger("engine")
_DONE = Copy(-1, -1, -1, is_done=True)
_LIKELIEST = np.array([(0.0, 1.0, 0.0, 1.0, 1)], DRAW)
_THREADS_TO_SPARE = 8  # from so many on one is better left to the cache, if there is no other CPU for it


class _Passage(NamedTuple):
    """When a step, by its number from 1 on, is done with the slots of a layer."""

    step: int
    layer: int


class _UnderWay(NamedTuple):
    """A step that was begun: its number, tokens, rows of logits, the size of its launches, and where its data are.

    `gives_logits` says that they are wanted, or some row draws no token; `misses` computes its experts without a slot,
    None if all pass through the device; `is_served` says that it was told so before the step was launched.
    """

    number: int
    n_tokens: int
    n_outputs: int
    size: int
    buffer: int
    gives_logits: bool
    misses: MissServer | None
    is_served: bool


def _step_number(n_begun: int) -> int:
    """Return the number that the GPU has for the n-th step."""
    return n_begun & 0x7FFFFFFF


class CUDAProgram:
    """A compiled forward pass, the sequences it keeps, and the memory of both. Implements `WaitingProgram`.

    Layers that have a slot for every expert are filled here and stay as they are. The slots of all others are empty at
    first. What is published before a step is begun holds for all of it, what is published meanwhile for this one or the
    next.

    Attributes:
        leaves_a_cpu: see `WaitingProgram`.
        runs_ahead: see `StagedProgram`.
        has_head: see `DraftingProgram`.
    """

    state_layout = "positions"

    def __init__(
        self,
        context: Context,
        lowering: Lowering,
        usable: UsableSlots,
        weights: WeightAccess,
        tables: PinnedTensors,
        bandwidths: Bandwidths,
        *,
        n_threads: int,
        isa: str | None,
        progress: Progress | None,
    ) -> None:
        """Reserve and fill all memory, and compile.

        Args:
            context: the GPU, of the caller's.
            lowering: says what lies where, and which launches a step has.
            usable: which slots which steps leave alone.
            weights: must outlive the program.
            tables: of them that the device reads in RAM; the program closes them.
            bandwidths: of the machine.
            n_threads: CPU threads for the experts without a slot.
            isa: instruction-set level that they may use; None for the best.
            progress: called while kernels are compiled.
        """
        self._context = context
        self._lowering = lowering
        self._weights = weights
        self._bandwidths = bandwidths
        self._limits = limits = lowering.limits
        self._vector_writes: dict[tuple[str | int, ...], list[tuple[PinnedMemory, Graph]]] = {}  # by names and size
        self._misses: MissServer | None = None
        self._copies: ExpertCopies | None = None
        self._expert_stream: ExpertStream | None = None
        self._stream_n_tokens = limits.max_tokens + 1  # no step streams experts
        self._n_begun = self._n_over = 0  # steps
        self.leaves_a_cpu = False
        self._under_way: deque[_UnderWay] = deque()  # one step, or two
        self._prepared: tuple[Step, _UnderWay] | None = None
        self._keeps: tuple[int, int] | None = None  # of the next step, the slot and tokens after which states are kept
        self._usable, self._lengths = usable, SequenceLengths(limits.n_slots)
        self._n_slots = np.array([layer.n_slots for layer in lowering.experts.step_layers], np.intp)
        self.has_head = lowering.can_draft
        self._all_slots = usable.of(0, 0)
        with Resources() as held:
            held.own(tables)
            self._memory = held.own(DeviceMemory(lowering.layout.n_bytes))
            self._stream = held.own(Stream(context))
            self._step_memory = held.own(StepMemory(lowering))
            self._places, self._logits = self._step_memory.places, self._step_memory.logits
            self._routing = self._step_memory.buffers[0].routing(1, 0)  # of the last step
            self._expert_in = np.full(self._all_slots.shape, -1, np.int32)  # of each layer's slots, -1: nobody's
            self._upload_constants()
            exchange = None
            if lowering.needs_cpu:
                experts = held.own(pinned_experts(lowering, weights))
                is_pinned = not experts.reason
                paths = ExpertPaths(lowering, weights, self._memory.address, n_threads, is_pinned)
                self._copies = held.own(ExpertCopies(context, paths))
                if lowering.staging is not None:
                    self._expert_stream = held.own(ExpertStream(context, paths))
                    self._stream_n_tokens = lowering.staging.from_n_tokens
                most = min(limits.max_tokens, self._stream_n_tokens - 1)
                if is_pinned:  # else the threads must fill buffers, too
                    self.leaves_a_cpu = n_logical_cpus() > n_threads or n_threads >= _THREADS_TO_SPARE
                    n_threads -= n_logical_cpus() <= n_threads and n_threads >= _THREADS_TO_SPARE
                self._misses = held.own(MissServer(lowering, weights, most, n_threads, isa, look=self._look))
                exchange = self._misses.exchange(self._memory.address)
                _log.info("%s", self._describe_streaming(how_experts_come(experts)))
            self.runs_ahead = self.leaves_a_cpu or not lowering.needs_cpu
            self._steps = held.own(
                Steps(
                    context,
                    self._stream,
                    lowering,
                    self._memory.address,
                    self._step_memory,
                    exchange,
                    self._expert_stream,
                    progress,
                )
            )
            self._held = held.pop_all()

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
        return self._lowering.scratch_bytes

    def run(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run one step; see `program.Program.run`.

        Raises `RequestError` for a step that does not fit the program, `DeviceError` if the device or the CPU's share
        failed; after a failure of the CPU's share the program can be used on.
        """
        _, logits = self._run(Step(token_ids, positions, slots, output_rows, None))
        assert logits is not None
        return logits

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
    ) -> Drawn:
        """Run one step and draw tokens; see `program.DrawingProgram.run_and_draw`, and `run` for what it raises."""
        assert len(draws) == len(output_rows)
        return self._run(Step(token_ids, positions, slots, output_rows, draws))

    def _run(self, step: Step) -> Drawn:
        self.prepare(step)
        self.launch()
        self.finish_layers()
        return self.collect()

    def draft(self, slot: int, token_id: int, position: int, n: int) -> list[int]:
        """Guess the tokens that follow one, see `program.DraftingProgram`; raises as `run` does."""
        assert not self._under_way
        drafts: list[int] = []
        for i in range(n):
            ids, positions, slots, rows = np.array([[token_id], [position + i], [slot], [0]], np.int32)
            self._prepare(Step(ids, positions, slots, rows, _LIKELIEST), is_draft=True)
            self.launch()
            self.finish_layers()
            (token_id,) = self.collect()[0].tolist()
            if token_id < 0:  # not a number
                break
            drafts.append(token_id)
        return drafts

    def prepare(self, step: Step) -> None:
        """Take the inputs of the next step, which may be behind the one under way; see `program.StagedProgram`."""
        self._prepare(step)

    def _prepare(self, step: Step, *, is_draft: bool = False) -> None:
        assert self._prepared is None
        assert len(self._under_way) < 2
        before = self._under_way[-1] if self._under_way else None
        try:
            self._check(step, 0 if before is None else before.n_outputs)
            n, n_outputs = len(step.token_ids), len(step.output_rows)
            size = DRAFT if is_draft else self._steps.size_for(n)
            number, index = self._n_begun + 1, 0 if before is None else 1 - before.buffer
            buffer, misses = self._step_memory.buffers[index], None if n >= self._stream_n_tokens else self._misses
            if is_draft and not self._lowering.draft_asks_cpu:
                misses = None
            buffer.put(_step_number(number), step, -1 if is_draft else kept_row(self._keeps, step.slots))
            self._keeps = self._keeps if is_draft else None
            gives_logits = step.draws is None or not buffer.all_draw(n_outputs)
            is_served = misses is not None and before is not None and before.misses is not None
            if misses is not None and is_served:
                misses.serve_behind(_step_number(number), n)
            self._prepared = step, _UnderWay(number, n, n_outputs, size, index, gives_logits, misses, is_served)
        except BaseException:
            self.drop()
            raise

    def launch(self) -> None:
        """Launch the step that was prepared, behind the one under way if there is one."""
        assert self._prepared is not None
        (inputs, step), self._prepared = self._prepared, None
        begins = step.misses if not step.is_served else None
        try:
            if step.size != DRAFT:  # which keeps nothing where experts may lie
                self._take_memory(step.n_tokens, inputs.positions, inputs.slots)
            self._context.make_current()
            if begins is not None:
                begins.begin()
            self._n_begun = step.number
            self._steps.launch(step.size, step.buffer, behind=bool(self._under_way))
            self._under_way.append(step)
            if begins is not None:  # not before the launch, which its threads are not to delay
                begins.serve(_step_number(step.number), step.n_tokens, is_draft=step.size == DRAFT)
        except BaseException:
            self.drop()
            raise

    def finish_layers(self) -> None:
        """Wait until the oldest step under way does not need the CPU any more."""
        misses = self._under_way[0].misses
        if misses is not None:
            try:
                misses.wait()
            except BaseException:
                self.drop()
                raise

    def collect(self) -> Drawn:
        """Wait for the oldest step under way; return what was drawn, -1 for nothing, and all logits if need be."""
        step, steps = self._under_way[0], self._steps
        buffer, is_last, logits = self._step_memory.buffers[step.buffer], len(self._under_way) == 1, None
        assert is_last or not step.gives_logits, "the step behind overwrites them"
        try:
            if step.gives_logits:
                logits = self._download_logits(step)
            if is_last:
                steps.synchronize()
            else:
                steps.wait_for_passed()
            chosen = buffer.drawn(step.n_outputs)
            if step.size != DRAFT:
                self._routing = buffer.routing(step.size, step.n_tokens)
            if is_last and logits is None and step.size != DRAFT and min(chosen.tolist(), default=0) < 0:
                logits = self._download_logits(step)  # now, for swaps may take this memory when the step is over
                steps.synchronize()
        except BaseException:
            self.drop()
            raise
        self._under_way.popleft()
        self._n_over = step.number
        return chosen, logits

    def drop(self) -> None:
        """Stop all steps under way; the device goes through them without the CPU's answers."""
        try:
            if self._misses is not None:
                self._misses.abandon()
            self._steps.synchronize()
        finally:
            self._under_way.clear()
            self._prepared = self._keeps = None
            self._n_over = self._n_begun

    def _download_logits(self, step: _UnderWay) -> npt.NDArray[np.float32]:
        """Queue what brings all logits of the last step to the host; return where they will be."""
        logits = self._logits[: step.n_outputs]
        if step.n_outputs > len(self._logits):
            logits = np.empty((step.n_outputs, self._logits.shape[1]), np.float32)
        if step.n_outputs:
            self._steps.download_logits(logits, step.size)
        return logits

    def _take_memory(self, n_tokens: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> None:
        """Note that a step uses the memory of the slots that it does not leave alone."""
        usable = self.usable_slots(n_tokens, self.longest_after(positions, slots))
        if usable is not self._all_slots:
            # One look: another thread may be publishing, in slots that the step leaves alone.
            is_published = self._expert_in >= 0
            assert not (is_published & ~usable).any(), "the step needs the memory of an expert that is published"
        self._lengths.note(positions, slots)

    def _look(self) -> None:
        """Raise `DeviceError` if the device has failed."""
        self._context.make_current()
        self._stream.is_idle()

    @property
    def layer_times(self) -> LayerTimes:
        """Return the times of all steps of one token so far in which the CPU may have had to help."""
        misses, nothing = self._misses, np.zeros(len(self._n_slots))
        if misses is None:
            return LayerTimes(0, nothing, nothing, np.zeros(2, np.int64))
        device, cpu = misses.seconds[:, : len(self._n_slots)].copy()
        return LayerTimes(misses.n_single_tokens, device, cpu, misses.guesses.copy())

    def routing(self) -> npt.NDArray[np.int32]:
        """Return a copy of the experts chosen in the last step, [n_moe_layers, n_tokens, n_experts_used]."""
        routing: npt.NDArray[np.int32] = self._routing.copy()
        return routing

    @property
    def guess_biases(self) -> Mapping[str, str]:
        """Return, by the name of a router's bias, that of the bias with which its choice is guessed."""
        return self._lowering.experts.guess_biases

    def write_vectors(self, names: Sequence[str], values: npt.NDArray[np.float32]) -> None:
        """Replace the values of some vectors, [len(names), size], for all steps from now on."""
        self._context.make_current()
        key = (*names, values.shape[1])
        if key not in self._vector_writes:
            self._vector_writes[key] = [self._vector_write(names, values) for _ in range(2)]
        writes = self._vector_writes[key]
        writes.reverse()
        memory, graph = writes[0]
        memory.bytes[:] = values.reshape(-1).view(np.uint8)  # the last but one were fetched before the step at hand
        graph.launch(self._stream)

    def _vector_write(self, names: Sequence[str], values: npt.NDArray[np.float32]) -> tuple[PinnedMemory, Graph]:
        """Return memory for values such as these, and what brings them to their places."""
        memory = self._held.own(PinnedMemory(values.nbytes))
        offsets = [self._lowering.recorder.vector_offset(name, values.shape[1]) for name in names]
        n_words, to = values.shape[1], self._memory.address
        pieces = [(memory.device_address + 4 * n_words * i, to + at, n_words) for i, at in enumerate(offsets)]
        launches = transfer(pieces)

        def fetch_all() -> None:
            for launch in launches:
                self._stream.launch(launch)

        return memory, self._held.own(self._stream.capture(fetch_all))

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

    def save_states(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what the sequence of `n_tokens` in a slot overwrites as it goes on, flat."""
        return self._download(passing_parts(self._lowering.recorder.states, self._limits, slot, n_tokens))

    def load_states(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_states` returned for this slot."""
        self._upload(passing_parts(self._lowering.recorder.states, self._limits, slot, n_tokens), saved)

    def keep_states(self, slot: int, n_tokens: int) -> None:
        """Keep recurrent states of the step that is prepared next; see `program.RewindingProgram`."""
        self._keeps = slot, n_tokens

    def rewind_states(self, slot: int) -> None:
        """Put back what was kept, of this slot; queued behind all steps."""
        recorder, base = self._lowering.recorder, self._memory.address
        self._context.make_current()
        for (offset, n_bytes), kept in kept_states(recorder.states, recorder.kept, slot):
            self._stream.copy(base + offset, base + kept, n_bytes)

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
        """Stop what is under way and free all memory."""
        self._context.make_current()
        if self._under_way:
            with contextlib.suppress(DeviceError):  # what has failed can be freed
                self.drop()
        self._misses = self._copies = self._expert_stream = None
        self._held.close()

    # -- slots -------------------------------------------------------------------------------------------------------

    @property
    def n_slots(self) -> npt.NDArray[np.intp]:
        """Return the slots of each MoE layer."""
        return self._n_slots

    def usable_slots(self, n_tokens: int, n_positions: int) -> npt.NDArray[np.bool_]:
        """Return which slots a step leaves alone."""
        return self._usable.of(n_tokens, n_positions)

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
        return np.array([layer.expert_bytes for layer in self._lowering.experts.step_layers], np.int64)

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
                if layer < lowering.experts.n_step_layers:
                    self._expert_in[layer, expert] = expert
            for i, weight in enumerate(experts.weights):
                array = self._weights.array(weight.name)
                for expert, offset in enumerate(experts.offsets):
                    source = experts.expert(array, i, expert)
                    to = base + offset + experts.matrix_offset(i)
                    stream.upload(to, int(source.ctypes.data), source.nbytes)
        stream.synchronize()
        lowering.recorder.uploads.clear()

    def _describe_streaming(self, how: str) -> str:
        """Return one line: how experts without a slot get to the device."""
        staging, lowering = self._lowering.staging, self._lowering
        if staging is None:
            return f"{how}; the CPU computes those without a slot in steps of any length"
        size = staging.n_buffers * lowering.staging_buffer_bytes
        n_lent = sum(layer.n_lent for layer in lowering.experts.step_layers)
        return (
            f"{how}; steps of {self._stream_n_tokens} to {self._limits.max_tokens} tokens of a prompt "
            f"stream those without a slot through {staging.n_buffers} buffers ({size / 1e6:.0f} MB), "
            f"in memory that holds {n_lent} experts in between"
        )

    def _check(self, step: Step, n_drawn: int) -> None:
        """Raise `RequestError` for a step that does not fit; the one before draws so many tokens."""
        token_ids, positions, slots, output_rows = step.inputs
        limits, n = self._limits, len(token_ids)
        most_outputs = limits.most(Rows.OUTPUTS)
        if len(output_rows) > most_outputs:
            raise RequestError(
                f"a step with logits of {len(output_rows)} tokens was asked for; this program gives {most_outputs}"
            )
        if not 0 < n <= limits.max_tokens:
            raise RequestError(f"a step of {n} tokens was asked for; this program takes 1 to {limits.max_tokens}")
        for name, values, first, end in (
            ("token id", token_ids, -n_drawn, self._lowering.n_embeddings),
            ("position", positions, 0, limits.context_length),
            ("sequence slot", slots, 0, limits.n_slots),
            ("output row", output_rows, 0, n),
        ):
            numbers = values.tolist()  # of one token Python is quicker
            if numbers and not first <= min(numbers) <= max(numbers) < end:
                wrong = next(v for v in numbers if not first <= v < end)
                raise RequestError(f"{name} {wrong} is not in the range 0 to {end - 1} that this program takes")
