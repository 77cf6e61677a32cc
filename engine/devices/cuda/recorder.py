"""What the lowering of operations writes to: the memory that they need, and the calls that make their launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.devices.cuda import kernels
from engine.devices.cuda.attention import Cache
from engine.devices.cuda.expert_layers import ExpertTables, Streamed
from engine.devices.cuda.launch import Launch
from engine.devices.cuda.places import Finish, Layout, Pass, Place
from engine.devices.cuda.scratch import Need, Scratch
from engine.devices.cuda.sequence_state import Owners, kept_bytes, kept_places
from engine.devices.graph import Graph, KVCache, State, Table, Tensor, Vector, Weight
from engine.devices.program import Limits, WeightAccess
from engine.devices.tables import expert_table
from engine.quants.formats import Activation, QuantFormat
from engine.quants.grids import GRID_NAMES, load_grid

Launches: TypeAlias = Callable[[Pass], Iterable[Launch | Streamed]]
"""Makes the launches of an operation."""


class Recorder:
    """Notes what the operations of a graph need, in their order, and what makes their launches.

    Attributes:
        experts: what the experts of all layers share.
        states: the caches and states of sequences, each with its offset.
        kept: by state, the offset of a copy of that of one sequence, where there are drafts.
        context_length: positions that a sequence may have.
        uploads: offset and contents of what is uploaded once.
        index: of the operation at hand, set by whoever walks them.
    """

    def __init__(
        self,
        weights: WeightAccess,
        limits: Limits,
        layout: Layout,
        experts: ExpertTables,
        tables: Mapping[str, int],
    ) -> None:
        """Begin with nothing.

        Args:
            weights: of the model.
            limits: of a step.
            layout: where weights, caches and states get their places.
            experts: of all layers.
            tables: addresses of those that stay in RAM, by name.
        """
        self.experts = experts
        self.states: Owners = []
        self.uploads: list[tuple[int, npt.NDArray[np.generic]]] = []
        self.index = 0
        self.kept: dict[State, int] = {}
        self._weights = weights
        self._tables = tables
        self.context_length = limits.context_length
        self._limits = limits
        self._layout = layout
        self._offsets: dict[object, int] = {}  # of weights, vectors, tables, caches and states
        self._of_drafts: Sequence[KVCache | State] = ()
        self._needs: dict[object, Need] = {}
        self._calls: list[Launches] = []
        self._finishes: dict[tuple[object, int, int], Finish] = {}  # by buffer, offset and width of what they make

    # -- launches ----------------------------------------------------------------------------------------------------

    def record(self, launches: Launches) -> None:
        """Note what makes the next launches."""
        self._calls.append(launches)

    def aside(self, *records: Callable[[], None]) -> Launches:
        """Return the launches that some recordings would add, without adding them."""
        calls, self._calls = self._calls, []
        for record in records:
            record()
        recorded, self._calls = self._calls, calls
        return lambda p: (launch for call in recorded for launch in call(p))

    def launches(self, p: Pass) -> list[Launch | Streamed]:
        """Return all launches, in order."""
        return [launch for call in self._calls for launch in call(p)]

    # -- results -----------------------------------------------------------------------------------------------------

    def use(self, tensor: Tensor) -> Place:
        """Note that the operation at hand uses a tensor."""
        rows, width = tensor.rows, tensor.buffer.width
        need = self._need(tensor.buffer, lambda limits: limits.most(rows) * width * 4)
        return Place(need, tensor.offset * 4, width)

    def temporary(self, n_bytes: Callable[[int], int], stride: int = 0) -> Place:
        """Reserve memory for the operation at hand only; n_bytes: for a number of tokens."""
        return Place(self._need(object(), lambda limits: n_bytes(limits.max_tokens)), 0, stride)

    def temporaries(self, n_bytes: Callable[[int], Sequence[int]]) -> list[Place]:
        """Reserve memory for several things that the operation at hand needs; n_bytes: of each."""

        def one(i: int) -> Place:
            return self.temporary(lambda n_tokens: n_bytes(n_tokens)[i])

        return [one(i) for i in range(len(n_bytes(1)))]

    def finish(self, out: Tensor) -> Finish:
        """Note that the operation at hand can make activation rows of `out`, too."""
        return self._finishes.setdefault((out.buffer, out.offset, out.width), Finish(self.index))

    def activations(self, x: Tensor, activation: Activation) -> Place:
        """Say where x lies in the form that a weight format takes, after recording the conversion if there is none."""
        if activation == Activation.F32:
            place = self.use(x)
            return Place(place.need, place.offset, place.stride * 4)
        row_bytes = kernels.activation_bytes(activation, x.width)
        key = (x.buffer, x.offset, x.width, activation)
        is_new, finish, rows = key not in self._needs, self._finishes.get(key[:3]), x.rows
        converted = Place(self._need(key, lambda limits: limits.most(rows) * row_bytes), 0, row_bytes)
        if is_new and finish is not None:
            converted.need.first = finish.index
            finish.forms[activation] = converted
        elif is_new:
            source, width = self.use(x), x.width
            self.record(
                lambda p: [
                    kernels.quantize(
                        p.rows(source),
                        width,
                        activation,
                        p.rows(converted),
                        1,
                        p.count(rows),
                    )
                ]
            )
        return converted

    def scratch_for(self, limits: Limits) -> Scratch:
        """Return a plan of the intermediate results of steps within some limits, which lies nowhere yet."""
        return Scratch(self._needs.values(), limits)

    def _need(self, key: object, n_bytes: Callable[[Limits], int]) -> Need:
        """Note that the operation at hand makes or uses a result."""
        need = self._needs.setdefault(key, Need(n_bytes, self.index, self.index))
        need.last = self.index
        return need

    # -- caches and states -------------------------------------------------------------------------------------------

    def reserve_states(self, graph: Graph) -> None:
        """Give the caches and states of all sequences their places."""
        owners: list[KVCache | State] = [*graph.kv_caches, *graph.states]
        self._of_drafts = [*graph.draft.kv_caches, *graph.draft.states] if graph.draft else []
        for owner in (*owners, *self._of_drafts):
            self._offsets[owner] = self._layout.reserve(_owned_bytes(owner, self._limits))
        self.states += [(owner, self._offsets[owner]) for owner in owners]
        if self._limits.max_drafts:
            at = self._layout.reserve(kept_bytes(graph.states))
            self.kept = {state: at + place for state, place in kept_places(graph.states)}

    def state_bytes(self, limits: Limits) -> int:
        """Return what caches and states would take with other limits."""
        owners = (*(owner for owner, _ in self.states), *self._of_drafts)
        return sum(_owned_bytes(owner, limits) for owner in owners)

    def state(self, owner: KVCache | State) -> int:
        """Return the offset of a cache or state."""
        return self._offsets[owner]

    def cache(self, cache: KVCache) -> Cache:
        """Return the shape of a cache, without its address."""
        return _shape(cache, self._limits)

    # -- constants ---------------------------------------------------------------------------------------------------

    def constant(self, key: object, make: Callable[[], npt.NDArray[np.generic]]) -> int:
        """Return the offset of values that are uploaded once."""
        if key not in self._offsets:
            values = make()
            self._offsets[key] = self._layout.reserve(values.nbytes)
            self.uploads.append((self._offsets[key], values))
        return self._offsets[key]

    def numbers(self, values: npt.NDArray[np.generic]) -> int:
        """Return the offset of numbers that are none of the file's."""
        return self.constant((str(values.dtype), values.tobytes()), lambda: values)

    def counters_of_rows(self) -> int:
        """Return the offset of a word for each row of a step that kernels may count their blocks with; 0 when idle."""
        n_rows = self._limits.max_tokens
        return self.constant("counters of rows", lambda: np.zeros(n_rows, np.int32))

    def values(self, vector: Vector) -> npt.NDArray[np.float32]:
        """Return float32 values, whatever the file stores."""
        raw = self._weights.array(vector.name).reshape(1, -1)
        stored = _kernels.dequantize(vector.format.ggml_type, raw, vector.stored_size or vector.size)
        return stored.reshape(-1)[vector.first : vector.first + vector.size]

    def vector(self, vector: Vector | None) -> int | None:
        """Return the offset of float32 values; None for None."""
        if vector is None:
            return None
        values = vector
        return self.constant((vector.name, vector.first, vector.size), lambda: self.values(values))

    def copy_of_vector(self, vector: Vector | None, name: str) -> int | None:
        """Return the offset of a copy that can be changed by itself, under a name of its own; None for None."""
        if vector is None:
            return None
        values = vector
        return self.constant((name, vector.first, vector.size), lambda: self.values(values))

    def expert_table(self, table: Table | None, n_experts: int) -> int | None:
        """Return the offset of the experts of each token id, int32; None for None."""
        if table is None:
            return None
        return self.constant(table.name, lambda: expert_table(self._weights, table, n_experts))

    def joined(self, vectors: tuple[Vector, ...]) -> int:
        """Return the offset of the values of some vectors, one after the other."""
        key = tuple((vector.name, vector.first, vector.size) for vector in vectors)
        return self.constant(key, lambda: np.concatenate([self.values(vector) for vector in vectors]))

    def vector_offset(self, name: str, size: int) -> int:
        """Return where the `size` values of a whole vector are."""
        return self._offsets[name, 0, size]

    def matrix(self, weight: Weight) -> int:
        """Return the offset of a matrix that always stays on the device."""
        first = self.constant(weight.name, lambda: self._weights.array(weight.name))
        return first + weight.first_row * weight.format.row_bytes(weight.n_cols)

    def table(self, weight: Weight) -> Callable[[Pass], int]:
        """Return what gives the address of a matrix that rows are looked up in, on the device or in RAM."""
        address = self._tables.get(weight.name)
        if address is not None:
            first = address + weight.first_row * weight.format.row_bytes(weight.n_cols)
            return lambda _: first
        offset = self.matrix(weight)
        return lambda p: p.base + offset

    def grid(self, weight_format: QuantFormat) -> int | None:
        """Return the offset of an IQ format's code book."""
        name = "IQ1_S" if weight_format.name == "IQ1_M" else weight_format.name
        return self.constant(("grid", name), lambda: load_grid(name)) if name in GRID_NAMES else None


def _shape(cache: KVCache, limits: Limits) -> Cache:
    """Return the shape of a cache, without its address."""
    return Cache(
        0,
        limits.kv_type,
        limits.n_slots,
        limits.n_rows(cache),
        cache.n_kv_heads,
        cache.head_dim,
        cache.value_dim,
        cache.values_in_keys,
        cache.period,
    )


def _owned_bytes(owner: KVCache | State, limits: Limits) -> int:
    return owner.width * 4 * limits.n_slots if isinstance(owner, State) else _shape(owner, limits).n_bytes
