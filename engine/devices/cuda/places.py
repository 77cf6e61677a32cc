"""Where things lie on the device: places in one allocation, and the addresses that they have in a list of launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.devices import graph
from engine.devices.cuda import tiles
from engine.devices.cuda.kernels import Exchange, Forms
from engine.devices.cuda.launch import PADDING, Count, Launch, Rows
from engine.devices.cuda.scratch import Need, Scratch
from engine.devices.program import DRAW, Limits
from engine.quants.formats import Activation

ALIGNMENT = 256
DRAW_WORDS = DRAW.itemsize // 4


class Layout:
    """Hands out places in one device allocation that does not exist yet."""

    def __init__(self) -> None:
        self.n_bytes = ALIGNMENT  # weight matrices need some bytes before them, see `launch.PADDING`

    def reserve(self, n_bytes: int) -> int:
        """Return the offset of a new place, with some bytes of nothing behind it."""
        offset = self.n_bytes
        self.n_bytes += reserved_bytes(n_bytes)
        return offset


def reserved_bytes(n_bytes: int) -> int:
    """Return what a place of so many bytes takes in all."""
    return aligned(n_bytes + PADDING)


def aligned(n_bytes: int) -> int:
    """Return so many bytes or a few more, such that what follows them is aligned for every kernel."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


class StepLayout:
    """The inputs of a step: counts and the step's number, then one array after the other, and how tokens are drawn.

    Attributes:
        n_words: four-byte words in all.
        first_draw: the word where `program.DRAW` of the first row begins; all words before are int32.
    """

    def __init__(self, layout: Layout, max_tokens: int, n_draws: int) -> None:
        self.first_draw = 4 + 4 * max_tokens
        self.n_words = self.first_draw + n_draws * DRAW_WORDS
        self.offset = layout.reserve(4 * self.n_words)
        self.n_rows = {graph.Rows.TOKENS: self.offset, graph.Rows.OUTPUTS: self.offset + 4}
        self.number, self.kept_row = self.offset + 8, self.offset + 12
        self.token_ids, self.positions, self.slots, self.output_rows = (
            self.offset + 4 * (4 + i * max_tokens) for i in range(4)
        )
        self.draws = self.offset + 4 * self.first_draw


@dataclass(slots=True)
class Place:
    """Where a tensor lies in what is kept of it in scratch memory."""

    need: Need
    offset: int
    stride: int  # values from one row to the next, or bytes for activation rows


@dataclass(frozen=True, slots=True)
class Pass:
    """One list of launches under construction, for steps of at most `most` rows: what has which address in it.

    Attributes:
        limits: of any step.
        step: the inputs.
        scratch: the intermediate results.
        most: rows.
        base: address of the allocation.
        exchange: memory shared with the CPU, None if it computes no experts.
        staging: addresses of the buffers that experts without a slot pass through, if they do.
    """

    limits: Limits
    step: StepLayout
    scratch: Scratch
    most: int
    base: int
    exchange: Exchange | None = None
    staging: tuple[int, ...] = ()

    @property
    def streams(self) -> bool:
        """Return whether experts without a slot pass through the staging buffers."""
        return bool(self.staging)

    def count(self, rows: graph.Rows) -> Count:
        """Return how many rows an operation has."""
        return Count(self.base + self.step.n_rows[rows], min(self.most, self.limits.most(rows)))

    @property
    def linear(self) -> Callable[..., Launch]:
        """Return what multiplies matrices with the rows of a step."""
        return tiles.linear_for(self.most)

    def rows(self, place: Place) -> Rows:
        """Return the rows of a tensor."""
        return Rows(self.base + self.scratch.offset_of(place.need) + place.offset, place.stride)

    def at(self, offset: int | None) -> int:
        """Return the address of something that may not exist: 0 then."""
        return 0 if offset is None else self.base + offset


@dataclass(slots=True)
class Finish:
    """A launch that makes float32 rows, and beside them those activation rows that are asked for later.

    Attributes:
        index: of the operation that it is part of.
        forms: where they go.
    """

    index: int
    forms: dict[Activation, Place] = field(default_factory=dict)

    def at(self, p: Pass) -> Forms:
        """Return the addresses."""
        places = (self.forms.get(form) for form in (Activation.Q8_256, Activation.Q8_32))
        return Forms(*(p.rows(place) if place else None for place in places))
