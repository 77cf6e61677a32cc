"""Opens the CPU as a device and runs compiled programs on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.cpu.lowering import Lowering
from engine.devices.cpu.sequence_state import passing_parts, state_parts, used_parts
from engine.devices.graph import Graph
from engine.devices.program import Limits, WeightAccess, kept_row, padded_routing
from engine.errors import DeviceError, RequestError
from engine.quants import install_grids


class CPUDevice:
    """All operations on the CPU, with `n_threads` threads at one instruction-set level."""

    def __init__(self, n_threads: int, isa: str | None = None) -> None:
        """Choose the level: `isa` caps it, one of `_kernels.isa_levels()`; None takes the best this CPU runs."""
        levels = _kernels.isa_levels()
        if isa is not None and isa not in levels:
            raise DeviceError(f"this CPU cannot run the instruction-set level {isa!r}; it runs {', '.join(levels)}")
        self.n_threads = n_threads
        self.isa = isa or levels[-1]
        install_grids()

    @property
    def description(self) -> str:
        """Return one line for people."""
        return f"CPU, {self.n_threads} thread{'s' * (self.n_threads != 1)}, {self.isa}"

    def compile(self, graph: Graph, weights: WeightAccess, limits: Limits) -> CPUProgram:
        """Make a flat program of a recorded forward pass. The weights must outlive it."""
        return CPUProgram(self, Lowering(graph, weights, limits, self.n_threads, self.isa))

    def close(self) -> None:
        """Do nothing: the memory is the programs'."""


class CPUProgram:
    """A compiled forward pass, the sequences it keeps, and the memory of both.

    Attributes:
        has_head: see `program.DraftingProgram`.
    """

    state_layout = "lanes"

    def __init__(self, device: CPUDevice, lowered: Lowering) -> None:
        self.device = device
        self._lowered = lowered
        self._program = lowered.program
        self._limits = lowered.limits
        self._step = _kernels.Step(lowered.limits.max_tokens)
        self._n_tokens = 0
        self._keeps: tuple[int, int] | None = None  # of the next step, the slot and tokens after which states are kept
        self.has_head = lowered.draft_program is not None

    @property
    def limits(self) -> Limits:
        """Return what a step may be."""
        return self._limits

    @property
    def state_bytes(self) -> int:
        """Return the bytes of all KV caches and recurrent states."""
        return self._lowered.state_bytes

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of all intermediate results."""
        return self._lowered.scratch_bytes

    @property
    def n_operations(self) -> int:
        """Return the number of C calls that one step makes."""
        return len(self._program)

    def run(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run one step; see `program.Program.run`. Raises `RequestError` for a step that does not fit the program."""
        self.begin(token_ids, positions, slots, output_rows)
        self.run_operations()
        return self.logits(len(output_rows))

    def logits(self, n_outputs: int) -> npt.NDArray[np.float32]:
        """Return the logits of the step that was run, [n_outputs, n_vocab]: a view that is valid until the next."""
        return self._lowered.logits[:n_outputs]

    def run_operations(self, first: int = 0, last: int = -1) -> None:
        """Run a part of the step that was taken last, see `_kernels.Program.run`; raise `RequestError` likewise."""
        try:
            self._program.run(self._step, first, last)
        except ValueError as error:
            raise RequestError(str(error)) from None

    def profile(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> list[tuple[str, float]]:
        """Run one step and return (operation, seconds) for each C call, in order."""
        self.begin(token_ids, positions, slots, output_rows)
        return self._program.profile(self._step)

    def begin(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> None:
        """Take in the inputs of a step."""
        step, n = self._step, len(token_ids)
        keeps, self._keeps = self._keeps, None
        if not 0 < n <= self._limits.max_tokens:
            raise RequestError(f"a step of {n} tokens was asked for; this program takes 1 to {self._limits.max_tokens}")
        step.token_ids[:n] = token_ids
        step.positions[:n] = positions
        step.slots[:n] = slots
        step.output_rows[: len(output_rows)] = output_rows
        step.n_tokens, step.n_outputs = n, len(output_rows)
        step.kept_row = kept_row(keeps, slots)
        self._n_tokens = n

    def draft(self, slot: int, token_id: int, position: int, n: int) -> list[int]:
        """Guess the tokens that follow one; see `program.DraftingProgram`."""
        guesses: list[int] = []
        for i in range(n):
            token_id = int(self.draft_logits(slot, token_id, position + i).argmax())
            guesses.append(token_id)
        return guesses

    def draft_logits(self, slot: int, token_id: int, position: int) -> npt.NDArray[np.float32]:
        """Return logits of what follows a token, or a guess, at a position, [n_vocab]: a view until the next call."""
        program, step = self._lowered.draft_program, self._step
        assert program is not None
        step.token_ids[0], step.positions[0], step.slots[0], step.output_rows[0] = token_id, position, slot, 0
        step.n_tokens, step.n_outputs, step.kept_row = 1, 1, -1
        try:
            program.run(step)
        except ValueError as error:
            raise RequestError(str(error)) from None
        logits: npt.NDArray[np.float32] = self._lowered.draft_logits[0]
        return logits

    def routing(self) -> npt.NDArray[np.int32]:
        """Return a copy of the experts chosen in the last step, [n_moe_layers, n_tokens, n_experts_used]."""
        lowered, n = self._lowered, self._n_tokens
        return padded_routing([ids[:n] for ids in lowered.routing_ids], n, lowered.n_experts)

    @property
    def guess_biases(self) -> Mapping[str, str]:
        """Return nothing: nobody guesses whom a router will choose."""
        return {}

    def write_vectors(self, names: Sequence[str], values: npt.NDArray[np.float32]) -> None:
        """Replace the values of some vectors, [len(names), size], for all steps from now on."""
        for name, row in zip(names, values, strict=True):
            self._lowered.vectors[name].reshape(-1)[:] = row

    def save_sequence(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what a sequence of `n_tokens` left in a slot, flat."""
        parts = used_parts(self._lowered.states, self._limits, slot, n_tokens)
        return np.concatenate([part.reshape(-1) for part in parts])

    def load_sequence(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_sequence` returned. Raises `RequestError` if it is not as long as this program needs."""
        parts = list(used_parts(self._lowered.states, self._limits, slot, n_tokens))
        needed = sum(part.size for part in parts)
        if saved.size != needed:
            raise RequestError(f"the saved state has {saved.size} bytes; {n_tokens} tokens of this model have {needed}")
        _fill(parts, saved)

    def save_states(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what the sequence of `n_tokens` in a slot overwrites as it goes on, flat."""
        parts = passing_parts(self._lowered.states, self._limits, slot, n_tokens)
        return np.concatenate([part.reshape(-1) for part in parts])

    def load_states(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_states` returned for this slot."""
        _fill(passing_parts(self._lowered.states, self._limits, slot, n_tokens), saved)

    def keep_states(self, slot: int, n_tokens: int) -> None:
        """Keep recurrent states of the next step; see `program.RewindingProgram`."""
        self._keeps = slot, n_tokens

    def rewind_states(self, slot: int) -> None:
        """Put back what was kept, of this slot."""
        at = 0
        for part in state_parts(self._lowered.states, slot):
            kept = self._lowered.kept_states.bytes[at : at + part.size]
            _kernels.parallel_copy(kept.ctypes.data, part.ctypes.data, part.size, self.device.n_threads)
            at += part.size

    def close(self) -> None:
        """Forget the program; its memory is freed with the last array that refers to it."""
        del self._program, self._lowered


def _fill(parts: Iterable[npt.NDArray[np.uint8]], saved: npt.NDArray[np.uint8]) -> None:
    """Copy flat bytes into views of memory, one after the other."""
    at = 0
    for part in parts:
        part[...] = saved[at : at + part.size].reshape(part.shape)
        at += part.size
