"""Pinned memory of steps: what goes in, and what comes out."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.devices.cuda.elementwise import transfer
from engine.devices.cuda.launch import Launch
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.places import DRAW_WORDS
from engine.devices.cuda.runtime import PinnedMemory
from engine.devices.program import DRAW, MOST_TOP_K, NO_DRAW, Step, padded_routing
from engine.resources import Resources

T = TypeVar("T", bound=np.generic)


class StepBuffer:
    """Inputs and results of one step. What is put here holds for a step that is launched after it."""

    def __init__(self, lowering: Lowering) -> None:
        """Reserve the memory."""
        self._lowering, step, limits = lowering, lowering.step, lowering.limits
        experts, n_rows = lowering.experts, lowering.drawing.n_rows  # what decoding asks for
        with Resources() as held:
            self._inputs = held.own(PinnedMemory(4 * step.n_words))
            self._ids = held.own(PinnedMemory(4 * max(1, experts.n_step_layers * limits.max_tokens * experts.n_used)))
            self._drawn = held.own(PinnedMemory(4 * n_rows))
            self._held = held.pop_all()
        self._words = self._inputs.bytes.view(np.int32)
        self._draws = self._words[step.first_draw :].view(DRAW)
        self._top_k: npt.NDArray[np.int32] = self._draws["top_k"]
        self._chosen = _array(self._drawn, (n_rows,), np.int32)

    def put(self, number: int, step: Step, kept_row: int = -1) -> None:
        """Set the inputs of a step, of which `number` is the device's count; states are kept after a row of it.

        Rows draw tokens as the step says where the device can do so; all others draw none.
        """
        draws = step.draws
        self._words[:4] = len(step.token_ids), len(step.output_rows), number, kept_row
        for i, values in enumerate(step.inputs):
            start = 4 + i * self._lowering.limits.max_tokens
            self._words[start : start + len(values)] = values
        n = 0 if draws is None else len(draws)
        assert n <= len(self._draws)
        if draws is not None:
            self._draws[:n] = draws
            self._top_k[:n][draws["top_k"] > MOST_TOP_K] = NO_DRAW
        self._top_k[n:] = NO_DRAW

    def all_draw(self, n_rows: int) -> bool:
        """Return whether so many rows all draw a token."""
        return NO_DRAW not in self._top_k[:n_rows].tolist()  # of few Python is quicker

    def drawn(self, n_rows: int) -> npt.NDArray[np.int32]:
        """Return a copy of the tokens that the first rows drew, -1 for none; no more than can draw."""
        return np.where(self._top_k[:n_rows] == NO_DRAW, np.int32(-1), self._chosen[:n_rows])

    def routing(self, size: int, n_tokens: int) -> npt.NDArray[np.int32]:
        """Return the chosen experts, [n_moe_layers, n_tokens, n_experts_used]; valid until the next step that is put.

        `size` is the one that the step's launches were made for.
        """
        experts = self._lowering.experts
        rows = _array(self._ids, (experts.n_step_layers, size * experts.n_used), np.int32)
        if experts.are_alike:
            return rows.reshape(experts.n_step_layers, size, experts.n_used)[:, :n_tokens]
        widths = [layer.op.routing.ids.width for layer in experts.step_layers]  # a layer's rows lie close together
        own = [row[: size * n].reshape(size, n)[:n_tokens] for row, n in zip(rows, widths, strict=True)]
        return padded_routing(own, n_tokens, experts.n_experts)

    def fetch(self, base: int, size: int, table: PinnedMemory, before: StepBuffer) -> list[Launch]:
        """Return the launches that begin steps of at most `size` tokens: they bring all inputs to the device.

        Tokens may be those that the step before draws, whose buffer is `before`.
        """
        lowering, step = self._lowering, self._lowering.step
        host, stride = self._inputs.device_address, 4 * lowering.limits.max_tokens
        counts, *arrays = step.offset, step.token_ids, step.positions, step.slots, step.output_rows
        pieces = [(host + 16 + i * stride, base + array, size) for i, array in enumerate(arrays)]
        places = table.device_address, base + lowering.experts.slot_table, lowering.experts.n_places
        draws = host + 4 * step.first_draw, base + step.draws, min(size, len(self._draws)) * DRAW_WORDS
        return transfer([*pieces, (host, base + counts, 4), draws, places], 0, before._drawn.device_address)

    def end(self, base: int, size: int) -> list[Launch]:
        """Return the launches that end them: they draw tokens, and bring these and who was chosen to the host."""
        experts = self._lowering.experts
        n_ids = experts.n_step_layers * size * experts.n_used
        routing = transfer([(base + experts.chosen, self._ids.device_address, n_ids)]) if n_ids else []
        return [*self._lowering.draw(base, size, self._drawn.device_address), *routing]

    def end_draft(self, base: int) -> list[Launch]:
        """Return the launches that end the guess of a token."""
        return self._lowering.draw(base, 1, self._drawn.device_address, is_draft=True)

    def close(self) -> None:
        """Free the memory; views of it must not be used after that."""
        self._held.close()


class StepMemory:
    """What steps share, and buffers for two: one can be begun while the one before runs.

    Attributes:
        buffers: of a step and the one after it.
        places: int32 [n_moe_layers, n_experts], where each expert's slot lies, -1 for none; a step takes a copy along.
        logits: float32 [rows, n_vocab], room for those that decoding asks for.
        table: the memory of `places`.
    """

    def __init__(self, lowering: Lowering) -> None:
        """Reserve it; nobody has a slot."""
        experts, n_rows = lowering.experts, lowering.drawing.n_rows
        with Resources() as held:
            self.table = held.own(PinnedMemory(4 * max(1, experts.n_places)))
            logits = held.own(PinnedMemory(4 * n_rows * lowering.n_vocab))
            self.buffers = held.own(StepBuffer(lowering)), held.own(StepBuffer(lowering))
            self._held = held.pop_all()
        self.places = _array(self.table, (len(experts.layers), experts.n_experts), np.int32)
        self.places[:] = -1
        self.logits = _array(logits, (n_rows, lowering.n_vocab), np.float32)

    def close(self) -> None:
        """Free the memory; views of it must not be used after that."""
        self._held.close()


def _array(memory: PinnedMemory, shape: tuple[int, ...], dtype: type[T]) -> npt.NDArray[T]:
    """Return the first bytes of memory as an array."""
    return np.frombuffer(memory.bytes, dtype, math.prod(shape)).reshape(shape)
