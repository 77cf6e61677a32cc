"""Who runs a forward pass: devices, which compile a graph to a program, and what programs can do.

A step is some tokens of one or more sequences. All sizes but the number of tokens are fixed; one program serves a
single token and a whole chunk of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.devices.graph import Graph, KVCache, KVType, Rows

_RING_ROWS = 256  # a ring has a multiple of them: attention takes so many at once, or a part (`ops.h`, `attention.cu`)
_SPARE_ROWS = 16  # of a ring at least, so that a sequence can be cut back by as many tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that a program is compiled for.

    Attributes:
        max_tokens: tokens in a step at most.
        n_slots: sequences that are kept at the same time.
        context_length: tokens in a sequence at most.
        kv_type: how keys and values are stored.
        max_outputs: tokens of a step whose logits are wanted, at most; 0 for all.
        max_drafts: tokens that a sequence may run on the chance that they follow; see `RewindingProgram`.
    """

    max_tokens: int
    n_slots: int
    context_length: int
    kv_type: KVType
    max_outputs: int = 0
    max_drafts: int = 0

    @property
    def max_draws(self) -> int:
        """Return how many tokens a step may draw: one for each sequence, and one behind each draft."""
        return min(self.n_slots + self.max_drafts, self.most(Rows.OUTPUTS))

    def most(self, rows: Rows) -> int:
        """Return how many rows there are at most."""
        return self.max_outputs if rows == Rows.OUTPUTS and self.max_outputs else self.max_tokens

    def up_to(self, n_tokens: int) -> Limits:
        """Return the limits of those steps that have at most so many tokens."""
        most = min(self.max_tokens, n_tokens)
        return replace(self, max_tokens=most, max_outputs=min(self.max_outputs, most))

    def n_rows(self, cache: KVCache) -> int:
        """Return the rows of a sequence in a cache, at least one.

        With a window there are as many as positions that the tokens of a step see, if these are fewer than a context
        has: then position p has row p % n_rows, and takes it from one that nobody will look at any more.
        """
        if not cache.window:
            return max(1, self.context_length // cache.period)
        n_needed = cache.window + self.max_tokens + _SPARE_ROWS
        return min(self.context_length, -(-n_needed // _RING_ROWS) * _RING_ROWS)

    def is_ring(self, cache: KVCache) -> bool:
        """Return whether positions of a sequence share rows of a cache."""
        return cache.window > 0 and self.n_rows(cache) < self.context_length


def ring_pieces(first: int, end: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of a ring, or of a cache that is none, in which positions from `first` to `end` lie, in order."""
    while first < end:
        row = first % n_rows
        n = min(end - first, n_rows - row)
        yield row, row + n
        first += n


def cuts_back(graph: Graph, limits: Limits) -> int | None:
    """Return by how many tokens, of all that it ever had, a sequence can be cut back without being run again.

    None says to any place: so it is where every layer keeps keys and values of all positions.
    """
    if graph.states:
        return 0
    windows = [cache for cache in graph.kv_caches if cache.window]
    rings = [limits.n_rows(cache) - cache.window + 1 for cache in windows if limits.is_ring(cache)]
    return min(rings, default=limits.context_length) if windows else None


class WeightAccess(Protocol):
    """Where a device finds the weights in RAM."""

    @property
    def is_own_memory(self) -> bool:
        """Return whether each tensor has own pages of anonymous memory, 16 bytes behind it included, not of a file."""
        ...

    def array(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, flat and read-only, valid until the owner is closed."""
        ...


class Program(Protocol):
    """A compiled forward pass and the sequences it keeps."""

    @property
    def limits(self) -> Limits:
        """Return what a step may be: what was asked for, or more tokens where the device gains by it."""
        ...

    @property
    def state_bytes(self) -> int:
        """Return the bytes of all KV caches and recurrent states."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of all intermediate results."""
        ...

    def run(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run one step; return logits [n_outputs, n_vocab], a view that is valid until the next step.

        The tokens of one sequence stand together and in order; a token at position 0 starts its sequence afresh.
        """
        ...

    def routing(self) -> npt.NDArray[np.int32]:
        """Return a copy of the experts chosen in the last step, [n_moe_layers, n_tokens, n_experts_used].

        Where a layer uses fewer than another, the number of experts stands for nobody (`padded_routing`).
        """
        ...

    def close(self) -> None:
        """Free all memory."""
        ...


@runtime_checkable
class ProfiledProgram(Protocol):
    """A program that can tell where the time of a step goes."""

    def profile(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
    ) -> list[tuple[str, float]]:
        """Run one step as `Program.run` does; return (operation, seconds) in order."""
        ...


DRAW = np.dtype(
    [
        ("uniform", np.float64),  # in [0, 1)
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("inverse_temperature", np.float32),
        ("top_k", np.int32),  # 0: all; 1: the likeliest token, whatever the rest says; NO_DRAW: no token
    ]
)  # how a token is drawn, without penalties: see `kernels/sampling.h`
NO_DRAW = -1
MOST_TOP_K = 256  # that a program draws; with more, or all, it may give up
Draw = tuple[float, float, float, float, int]  # a value of it
Drawn: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32] | None]  # tokens; logits if any were asked for


@runtime_checkable
class DrawingProgram(Protocol):
    """A program that can draw tokens itself, with the bits of `_kernels.sample`."""

    def allow(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Say which tokens may be drawn from now on, [n_vocab]; until then all may."""
        ...

    def run_and_draw(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        output_rows: npt.NDArray[np.int32],
        draws: npt.NDArray[np.void],
    ) -> Drawn:
        """Run one step as `Program.run` does, and draw a token from each row of logits.

        Args:
            token_ids: as for `Program.run`, like the next two.
            positions: of the tokens.
            slots: of their sequences.
            output_rows: at most `Limits.max_draws`.
            draws: how, `DRAW` [n_outputs].

        Returns:
            The tokens, int32 [n_outputs], -1 where none was asked for or a draw takes all logits; and the logits, as
            `Program.run` returns them, if there is such a row.
        """
        ...


_Ints: TypeAlias = npt.NDArray[np.int32]


def padded_routing(of_layers: Sequence[npt.NDArray[np.int32]], n_tokens: int, n_experts: int) -> npt.NDArray[np.int32]:
    """Return a copy of the choices of all layers, [n_layers, n_tokens, n_experts_used], from those of each.

    Where a layer uses fewer than another, `n_experts` stands for nobody.
    """
    n_used = max((ids.shape[1] for ids in of_layers), default=0)
    routing = np.full((len(of_layers), n_tokens, n_used), n_experts, np.int32)
    for padded, ids in zip(routing, of_layers, strict=True):
        padded[:, : ids.shape[1]] = ids
    return routing


def kept_row(keeps: tuple[int, int] | None, slots: _Ints) -> int:
    """Return after which row of a step states are kept, if they are after so many tokens of a slot; else -1."""
    if keeps is None:
        return -1
    slot, n_tokens = keeps
    first: int = slots.tolist().index(slot)
    return first + n_tokens - 1


class Step(NamedTuple):
    """What `DrawingProgram.run_and_draw` takes, in one; `draws` may be None: no token is drawn."""

    token_ids: _Ints
    positions: _Ints
    slots: _Ints
    output_rows: _Ints
    draws: npt.NDArray[np.void] | None

    @property
    def inputs(self) -> tuple[_Ints, _Ints, _Ints, _Ints]:
        """Return what `Program.run` takes."""
        return self.token_ids, self.positions, self.slots, self.output_rows


@runtime_checkable
class StagedProgram(DrawingProgram, Protocol):
    """One whose steps are run in four calls: `prepare`, `launch`, `finish_layers`, `collect`.

    The next step may be prepared and launched as soon as one was launched, and starts by itself when that is over. For
    it a token id of -1 - i stands for the token that output row i of the step before draws: the device need not wait
    until the host has seen that. Whatever raises leaves no step under way, and in their sequences nothing of use.

    Attributes:
        runs_ahead: whether it pays to launch a step before the one before is collected: there is a CPU for it.
    """

    runs_ahead: bool

    def prepare(self, step: Step) -> None:
        """Take the inputs of the next step. Raises `RequestError` for one that does not fit the program."""
        ...

    def launch(self) -> None:
        """Launch the step that was prepared."""
        ...

    def finish_layers(self) -> None:
        """Wait for the CPU's part in the oldest step under way; when that is done only its output head may be left."""
        ...

    def collect(self) -> Drawn:
        """Wait for the end of that step; return tokens and logits as `run_and_draw` does.

        There are no logits if a step was launched after it: a token that could not be drawn after all is -1, and both
        steps have to be run again.
        """
        ...

    def drop(self) -> None:
        """Stop all steps under way."""
        ...


class AheadProgram(Protocol):
    """A program whose next step can be begun before the tokens of the one at hand are known; see `StagedProgram`."""

    runs_ahead: bool

    def begin(self, step: Step) -> None:
        """Begin a step. Raises `RequestError` for one that does not fit the program."""
        ...

    def end(self, then: Step | None = None) -> Drawn:
        """Wait for the end of the step that was begun first, having begun another one; return what `collect` does."""
        ...

    def drop(self) -> None:
        """Stop all steps under way."""
        ...


@runtime_checkable
class TunableProgram(Protocol):
    """A program whose vectors can be changed.

    Attributes:
        guess_biases: by the name of a router's bias, that of the bias with which it is guessed whom this router will
            choose; empty where nobody guesses.
    """

    guess_biases: Mapping[str, str]

    def write_vectors(self, names: Sequence[str], values: npt.NDArray[np.float32]) -> None:
        """Replace the values of some vectors for all steps from now on; values: [len(names), size], all of one size."""
        ...


@runtime_checkable
class SavingProgram(Protocol):
    """A program whose sequences can be taken out and put back.

    Attributes:
        state_layout: names the order in which what was taken out lies; only programs of the same one take it.
    """

    state_layout: str

    def save_sequence(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of what a sequence of `n_tokens` left in a slot, flat."""
        ...

    def load_sequence(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_sequence` returned; raise `RequestError` if it does not fit."""
        ...


@runtime_checkable
class RecurrentProgram(Protocol):
    """A program of which that can be taken out and put back which a sequence overwrites as it goes on.

    These are recurrent states, and keys and values in a window; all other keys and values stay where they are.
    """

    def save_states(self, slot: int, n_tokens: int) -> npt.NDArray[np.uint8]:
        """Return a copy of this for the sequence of `n_tokens` in a slot, flat."""
        ...

    def load_states(self, slot: int, n_tokens: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `save_states` returned for this slot."""
        ...


@runtime_checkable
class RewindingProgram(Protocol):
    """A program that can go back to where a sequence was in the middle of a step, by up to `Limits.max_drafts` tokens.

    Keys and values stay where they are, those in a window too: so many tokens leave what the next one sees of them.
    """

    def keep_states(self, slot: int, n_tokens: int) -> None:
        """Have the next step keep a copy of a sequence's recurrent states, as they are after its first tokens there.

        There is room for one; whoever runs a step later may overwrite it.
        """
        ...

    def rewind_states(self, slot: int) -> None:
        """Put back what was kept, of this slot."""
        ...


@runtime_checkable
class DraftingProgram(Protocol):
    """A program that can guess tokens, if its model has a head for multi-token prediction (`Graph.draft`).

    Attributes:
        has_head: whether it has one.
    """

    has_head: bool

    def draft(self, slot: int, token_id: int, position: int, n: int) -> list[int]:
        """Return `n` tokens that may follow one, each the likeliest behind those before; no step is under way.

        Args:
            slot: of the sequence.
            token_id: the token, which is to be run in the next step.
            position: of it: how many tokens of the sequence have been run.
            n: at least one.
        """
        ...


class Device(Protocol):
    """A place where forward passes run."""

    @property
    def description(self) -> str:
        """Return one line for people: what it is and how it is used."""
        ...

    def compile(self, graph: Graph, weights: WeightAccess, limits: Limits) -> Program:
        """Make a program of a recorded forward pass. The weights must outlive it."""
        ...

    def close(self) -> None:
        """Give the device back; its programs must be closed before."""
        ...
