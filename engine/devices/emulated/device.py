"""Opens a GPU that is not there: its memory is counted, its time is computed, its arithmetic is the CPU's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engine.devices.context_slots import SequenceLengths
from engine.devices.cpu.device import CPUDevice, CPUProgram
from engine.devices.cpu.lowering import Lowering
from engine.devices.emulated.clock import Event, Timetable, VirtualClock
from engine.devices.emulated.slot_memory import Copy, SlotMemory, check_ticket
from engine.devices.emulated.staging import StagingAreas
from engine.devices.footprint import Footprint, measure
from engine.devices.graph import Graph
from engine.devices.placement import MemoryPlan, Wish, plan_memory
from engine.devices.program import Limits, WeightAccess
from engine.devices.slots import Ticket
from engine.devices.timing import (
    STAGED_LAYERS,
    Bandwidths,
    Machine,
    StepTime,
    StepWork,
    Traffic,
    time_step,
    traffic_of,
)
from engine.devices.traffic import count_weights
from engine.errors import DeviceError
from engine.machine import available_memory

Routing: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the emulated device does that a real one would do by chance.

    Attributes:
        seed: of all of it; the same seed and calls give the same run.
        adversarial: copies end in any order, and late.
        failing: share of copies that fail.
    """

    seed: int = 0
    adversarial: bool = False
    failing: float = 0.0


class EmulatedDevice:
    """A GPU with `machine.vram_bytes` of memory beside the CPU."""

    def __init__(
        self,
        machine: Machine,
        *,
        wish: Wish | None = None,
        vram_budget: int | None = None,
        stream_n_tokens: int | None = None,
        n_threads: int = 1,
        isa: str | None = None,
        behaviour: Behaviour | None = None,
    ) -> None:
        """Open it.

        Args:
            machine: its speeds and sizes.
            wish: what to do with its memory; by default as many expert slots as fit.
            vram_budget: bytes of it to use at most; None for all.
            stream_n_tokens: steps of this many tokens or more stream the experts that have no slot; None for where
                that pays.
            n_threads: of the CPU, which does the arithmetic of both.
            isa: instruction-set level that is not to be exceeded.
            behaviour: chance; None for none.
        """
        self.machine, self.wish = machine, wish or Wish()
        self.allowed_bytes = min(machine.vram_bytes, vram_budget or machine.vram_bytes)
        self.stream_n_tokens = stream_n_tokens
        self.behaviour = behaviour or Behaviour()
        self.cpu = CPUDevice(n_threads, isa)

    @property
    def description(self) -> str:
        """Return one line for people."""
        speeds = self.machine.bandwidths
        return (
            f"emulated GPU, {self.machine.vram_bytes / 1e9:.3g} GB at {speeds.vram / 1e9:,.0f} GB/s, PCIe "
            f"{speeds.pcie / 1e9:.3g} GB/s, RAM {speeds.ram / 1e9:.3g} GB/s, times from a virtual clock; "
            f"arithmetic by {self.cpu.description}"
        )

    def compile(self, graph: Graph, weights: WeightAccess, limits: Limits) -> EmulatedProgram:
        """Make a program; raise `DeviceError` if it needs more device memory than there is."""
        machine = self.machine
        threshold = self.stream_n_tokens or measure(graph, limits).streaming_pays_from(
            machine.bandwidths, machine.cpu_macs
        )
        footprint = measure(graph, limits, threshold)
        plan = plan_memory(footprint, self.allowed_bytes, self.wish)
        _check_ram(footprint, plan)
        lowered = Lowering(graph, weights, limits, self.cpu.n_threads, self.cpu.isa)
        draft, speeds = count_weights(graph.draft or Graph()), machine.bandwidths
        draft_s = draft.dense_bytes / speeds.vram + draft.chosen_bytes / speeds.ram  # its experts have no slots
        return EmulatedProgram(self, lowered, footprint, plan, threshold, draft_s)

    def close(self) -> None:
        """Do nothing: the memory is the programs'."""


class EmulatedProgram:
    """A compiled forward pass with slots for experts. Implements `SlotProgram`, `ClockedProgram`, `MeteredProgram`.

    Attributes:
        plan: how the device memory is used.
        footprint: what the model needs.
        has_head: see `DraftingProgram`.
    """

    state_layout = CPUProgram.state_layout

    def __init__(
        self,
        device: EmulatedDevice,
        lowered: Lowering,
        footprint: Footprint,
        plan: MemoryPlan,
        stream_n_tokens: int,
        draft_s: float = 0.0,
    ) -> None:
        self._device, self.plan, self.footprint = device, plan, footprint
        self._program = CPUProgram(device.cpu, lowered)
        self._clock = VirtualClock()
        behaviour = device.behaviour
        self._timetable = Timetable(
            self._clock,
            device.machine.bandwidths.pcie,
            behaviour.seed,
            adversarial=behaviour.adversarial,
            failing=behaviour.failing,
        )
        self._tables = lowered.expert_tables
        self._memory = SlotMemory(self._tables, [int(n) for n in plan.n_slots], self._clock)
        self._usable, self._lengths = plan.usable, SequenceLengths(self.limits.n_slots)
        self._stream_n_tokens = stream_n_tokens
        self._staging: StagingAreas | None = None  # made for the first step that streams experts
        self._last_reader = Event(0.0)
        self._rewind_s = 2 * footprint.recurrent_bytes / device.machine.bandwidths.vram  # read, and written
        self.has_head, self._draft_s = self._program.has_head, draft_s
        self._copied_bytes = 0
        self._time_spent = StepTime()
        self._traffic = Traffic()

    # -- a program ---------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """Return what a step may be."""
        return self._program.limits

    @property
    def state_bytes(self) -> int:
        """Return the bytes of all KV caches and recurrent states."""
        return self._program.state_bytes

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of all intermediate results."""
        return self._program.scratch_bytes

    def run(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run one step, and move the clock by the time it would take; see `program.Program.run`."""
        self._memory.settle()
        usable = self._lend(len(positions), positions, slots)
        cold = self._without_slot()
        if len(positions) >= self._stream_n_tokens and any(map(len, cold)):
            self._program.begin(token_ids, positions, slots, output_rows)
            work, spent = self._stream(positions, slots, cold)
            logits = self._program.logits(len(output_rows))
            self._last_reader = self._timetable.end_step(spent.total_s)
        else:
            logits = self._program.run(token_ids, positions, slots, output_rows)
            work = self._work(positions, slots)
            spent = time_step(self._device.machine, work)
            self._last_reader = self._timetable.step(spent.total_s)
        self._copied_bytes = 0
        self._time_spent += spent
        self._traffic += traffic_of(work)
        self._memory.note_readers(self._last_reader.at)
        self._memory.note_lent(usable, self._last_reader.at)
        self._memory.settle()
        return logits

    def _lend(self, n_tokens: int, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> list[list[bool]]:
        """Take the memory of the slots that a step needs; return which of each layer it leaves alone."""
        usable: list[list[bool]] = self.usable_slots(n_tokens, self.longest_after(positions, slots)).tolist()
        self._memory.lend(usable)
        self._lengths.note(positions, slots)
        return usable

    def _without_slot(self) -> list[npt.NDArray[np.intp]]:
        """Return the experts of each layer that steps read from RAM."""
        return [np.delete(np.arange(self.n_experts), experts) for experts in self._memory.published()]

    def _stream(
        self, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32], cold: list[npt.NDArray[np.intp]]
    ) -> tuple[StepWork, StepTime]:
        """Run the step that was begun layer by layer, with the copies of the next layer's experts under way."""
        if self._staging is None:
            self._staging = StagingAreas(self._tables, self._clock)
        staging, program, clock, machine = self._staging, self._program, self._clock, self._device.machine
        staging.settle()
        n_layers, waits, at = len(cold), np.zeros(len(cold)), 0

        def begin_copy(layer: int) -> None:
            if layer < n_layers and len(cold[layer]):
                n_bytes = len(cold[layer]) * int(self.expert_bytes[layer])
                staging.begin_copy(layer, cold[layer], self._timetable.copy(n_bytes, may_fail=False))

        for layer in range(STAGED_LAYERS):
            begin_copy(layer)
        for layer, table in enumerate(self._tables):
            first, last = table.operations
            program.run_operations(at, first)
            spent = time_step(machine, self._work(positions, slots, cold, n_known=layer + 1), waits)
            clock.advance_to(clock.now + (spent.dense_s + spent.attention_s) / n_layers)
            if len(cold[layer]):
                waits[layer] = max(staging.arrival(layer) - clock.now, 0.0)
                clock.advance_to(staging.arrival(layer))
                staging.stage(layer)
            program.run_operations(first, last)
            clock.advance_to(clock.now + float(spent.layers[0, layer]))
            if len(cold[layer]):
                staging.retire(layer, clock.now)
            begin_copy(layer + STAGED_LAYERS)
            at = last
        program.run_operations(at)
        work = self._work(positions, slots, cold, n_known=n_layers)
        return work, time_step(machine, work, waits)

    def routing(self) -> Routing:
        """Return a copy of the experts chosen in the last step, [n_moe_layers, n_tokens, n_experts_used]."""
        return self._program.routing()

    @property
    def guess_biases(self) -> Mapping[str, str]:
        """Return nothing: nobody guesses whom a router will choose."""
        return {}

    def write_vectors(self, names: Sequence[str], values: npt.NDArray[np.float32]) -> None:
        """Replace the values of some vectors, [len(names), size], for all steps from now on."""
        self._program.write_vectors(names, values)

    def save_sequence(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what a sequence of `n_tokens` left in a slot, flat."""
        return self._program.save_sequence(slot, n_tokens)

    def load_sequence(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_sequence` returned; raise `RequestError` if it does not fit."""
        self._memory.settle()
        if n_tokens:
            self._lend(1, np.array([n_tokens - 1], np.int32), np.array([slot], np.int32))
        self._program.load_sequence(slot, n_tokens, saved)

    def save_states(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what the sequence of `n_tokens` in a slot overwrites as it goes on, flat."""
        return self._program.save_states(slot, n_tokens)

    def load_states(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_states` returned for this slot."""
        self._program.load_states(slot, n_tokens, saved)

    def keep_states(self, slot: int, n_tokens: int) -> None:
        """Keep recurrent states of the next step; see `program.RewindingProgram`. They are written as it runs."""
        self._program.keep_states(slot, n_tokens)
        self._clock.advance_to(self._clock.now + self._rewind_s / 2)

    def rewind_states(self, slot: int) -> None:
        """Put back what was kept, of this slot."""
        self._program.rewind_states(slot)
        self._clock.advance_to(self._clock.now + self._rewind_s)

    def draft(self, slot: int, token_id: int, position: int, n: int) -> list[int]:
        """Guess the tokens that follow one; see `program.DraftingProgram`."""
        self._clock.advance_to(self._clock.now + n * self._draft_s)
        return self._program.draft(slot, token_id, position, n)

    def close(self) -> None:
        """Free all memory; raise `HazardError` if copies are under way."""
        self._memory.check_closed()
        self._program.close()

    # -- slots -------------------------------------------------------------------------------------------------------

    @property
    def n_slots(self) -> npt.NDArray[np.intp]:
        """Return the slots of each MoE layer."""
        return self.plan.n_slots

    def usable_slots(self, n_tokens: int, n_positions: int) -> npt.NDArray[np.bool_]:
        """Return which slots a step leaves alone."""
        return self._usable.of(n_tokens, n_positions)

    def longest_after(self, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> int:
        """Return how many tokens the longest sequence has after a step with tokens there."""
        return self._lengths.longest_after(positions, slots)

    @property
    def n_experts(self) -> int:
        """Return the experts of each MoE layer."""
        return self.footprint.n_experts

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Return the size of one expert of each MoE layer, int64 [n_moe_layers]."""
        return self.footprint.expert_bytes

    @property
    def bandwidths(self) -> Bandwidths:
        """Return the speeds that decide which swaps pay."""
        return self._device.machine.bandwidths

    @property
    def device_bytes(self) -> int:
        """Return the device memory that a real GPU would use."""
        return self.plan.n_bytes

    def copy_expert(self, layer: int, expert: int, slot: int) -> Ticket:
        """Start to copy an expert from RAM into a slot that no step reads."""
        n_bytes = int(self.expert_bytes[layer])
        self._copied_bytes += n_bytes
        return self._memory.begin_copy(layer, expert, slot, self._timetable.copy(n_bytes))

    def fence(self, layer: int) -> Ticket:
        """Return a ticket that is done when all steps started so far are: nobody asks while one runs."""
        del layer
        return self._last_reader

    def is_done(self, ticket: Ticket) -> bool:
        """Return whether the work is done; raise `DeviceError` if it failed."""
        self._memory.settle()
        event = ticket.event if isinstance(ticket, Copy) else ticket
        assert isinstance(event, Event)
        if event.at > self._clock.now:
            return False
        check_ticket(event, "the copy")
        return True

    def publish(self, layer: int, expert: int, slot: int) -> None:
        """Tell steps started from now on where an expert is: in a slot, or only in RAM (-1)."""
        self._memory.settle()
        self._memory.publish(layer, expert, slot)

    def wait_all(self) -> None:
        """Let the clock run until all steps and copies are over."""
        for event in (self._last_reader, *(copy.event for copy in self._memory.under_way)):
            self._clock.advance_to(event.at)
        self._memory.settle()

    # -- time --------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the seconds on the virtual clock."""
        return self._clock.now

    @property
    def time_spent(self) -> StepTime:
        """Return where the time of all steps so far went."""
        return self._time_spent

    @property
    def traffic(self) -> Traffic:
        """Return what steps and copies so far moved, as a real machine would."""
        return self._traffic + Traffic(self._copied_bytes, self._copied_bytes)

    def _work(
        self,
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        cold: list[npt.NDArray[np.intp]] | None = None,
        n_known: int | None = None,
    ) -> StepWork:
        """Return what the step at hand has to do.

        Args:
            positions: of its tokens.
            slots: of its tokens.
            cold: the experts of each layer that are streamed for it; None if it streams none.
            n_known: layers that have chosen their experts; those of the others are left out. None for all.
        """
        footprint, n_tokens, n_layers = self.footprint, len(positions), len(self.footprint.expert_bytes)
        counts: npt.NDArray[np.float64] = np.zeros((n_layers, footprint.n_experts))
        if n_layers:
            layers = np.arange(n_layers)[:n_known, None, None]
            routing = self.routing()[:n_known]
            layers, known = np.broadcast_to(layers, routing.shape), routing < footprint.n_experts
            np.add.at(counts, (layers[known], routing[known]), 1.0)
        on_device = np.full(counts.shape, cold is not None)
        for layer, experts in enumerate(self._memory.published()):
            on_device[layer, experts] = True
        chosen = counts > 0
        sizes, macs = footprint.expert_bytes.astype(np.float64), footprint.expert_macs.astype(np.float64)
        return StepWork(
            n_layers=footprint.n_layers,
            dense_bytes=footprint.read_bytes,
            attention_bytes=sum(footprint.attention_bytes(float(p)) for p in _last_positions(positions, slots)),
            dense_macs=footprint.dense_macs * n_tokens,
            hit_bytes=(chosen & on_device).sum(1) * sizes,
            hit_macs=(counts * on_device).sum(1) * macs,
            miss_bytes=(chosen & ~on_device).sum(1) * sizes,
            miss_macs=(counts * ~on_device).sum(1) * macs,
            streamed_bytes=np.array([len(experts) for experts in cold]) * sizes if cold else np.zeros(n_layers),
            copied_bytes=self._copied_bytes,
        )


def _check_ram(footprint: Footprint, plan: MemoryPlan) -> None:
    """Raise `DeviceError` if the RAM cannot play the part of the device's memory."""
    needed, available = plan.slot_bytes, available_memory()
    if (plan.n_slots < plan.n_experts).any():
        needed += STAGED_LAYERS * plan.n_experts * int(footprint.expert_bytes.max())
    if available is not None and needed > available:
        raise DeviceError(
            f"the experts in the emulated GPU's memory need {needed / 1e9:.1f} GB of RAM beside the weights, and "
            f"{available / 1e9:.1f} GB are free; lower [moe] hot_k, [engine] vram_budget or [emulated] vram"
        )


def _last_positions(positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the last position of each sequence of a step: its tokens share what they read."""
    last: npt.NDArray[np.int32] = positions[np.append(slots[1:] != slots[:-1], True)]
    return last
