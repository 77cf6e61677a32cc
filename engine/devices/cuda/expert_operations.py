"""How routed experts are lowered: their choice, gate, up and down, and the sum of what they give.

For few tokens each choice is computed for itself, for many all tokens of an expert together. Those experts that have no
slot are computed by the CPU, which is asked before the device begins with its own, or pass through staging buffers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.devices import graph as ops
from engine.devices.cuda import fusion, kernels, operations, tiles
from engine.devices.cuda.expert_layers import PLACE_BYTES, ExpertLayer, Streamed
from engine.devices.cuda.kernels import Asked, Combined, Normed, Routed
from engine.devices.cuda.launch import NOTHING, ExpertMatrix, Launch, Matrix, Rows
from engine.devices.cuda.places import Pass, Place
from engine.devices.cuda.recorder import Launches, Recorder
from engine.devices.cuda.tiles import Groups, Sizes
from engine.quants.formats import Activation


@dataclass(frozen=True, slots=True)
class _Shared:
    """A shared expert: its matrices and where its result goes, and the launches that compute it alone."""

    matrices: Callable[[Pass], tuple[list[ExpertMatrix], Rows]]
    plain: Launches


def router(recorder: Recorder, op: ops.Router) -> None:
    """Record the choice of experts."""
    routing = _routing(recorder, op)
    recorder.record(lambda p: [kernels.router(routing(p), p.count(op.logits.rows))])


def group_router(recorder: Recorder, op: ops.GroupRouter) -> None:
    """Record the choice of the experts that groups share."""
    logits, group_ids, weights = (recorder.use(tensor) for tensor in (op.logits, op.out.ids, op.out.weights))
    n_experts, n_used = op.routing.n_experts, op.routing.ids.width

    def launches(p: Pass) -> Iterable[Launch]:
        ids, to = recorder.experts.ids(op.routing, p), (p.rows(group_ids).address, p.rows(weights).address)
        count = p.count(op.logits.rows)
        yield kernels.group_router(p.rows(logits), ids, *to, n_experts, n_used, op.group_size, count)

    recorder.record(launches)


def norm_and_router(recorder: Recorder, item: fusion.NormAndRouter) -> None:
    """Record a sum and its norm, products of that, and the choice by one of them: for one token that is one launch."""
    total, norm = item.sum.sum, item.sum.norm
    assert isinstance(total, ops.Add)
    assert isinstance(total.b, ops.Tensor)
    a, b, sums, out = (recorder.use(tensor) for tensor in (total.a, total.b, total.out, norm.out))
    weight, finish = recorder.vector(norm.weight), recorder.finish(norm.out)
    weight_format = item.choice.linear.weights[0].format

    def normed(p: Pass) -> Normed | None:
        if not kernels.can_normalize(weight_format, total.out.width, p.count(total.out.rows).most):
            return None
        return Normed(p.rows(a), p.rows(b), p.rows(sums), p.at(weight), norm.eps, p.rows(out), finish.at(p))

    apart = recorder.aside(lambda: operations.add(recorder, total, norm))
    recorder.record(lambda p: [] if normed(p) else apart(p))
    linear_and_router(recorder, item.choice, normed)


def linear_and_router(
    recorder: Recorder, item: fusion.LinearAndRouter, normed: Callable[[Pass], Normed | None] = lambda _: None
) -> None:
    """Record products, and the choice of experts by one of them: for few tokens that is one launch.

    `normed` says what else is part of that.
    """
    op, routing = item.linear, _routing(recorder, item.router)
    place = op.outs.index(item.router.logits)
    weight_format, sends_x = op.weights[place].format, item.experts.x == op.x
    n_done = recorder.constant("n_done", lambda: np.zeros(1, np.int32))
    forms = _forms_of_x(recorder, item.experts) if sends_x else {}

    def routed(p: Pass) -> Routed | None:
        count = p.count(op.x.rows)
        if p.linear is not kernels.linear or not kernels.can_route(weight_format, op.x.width, count.most):
            return None
        return Routed(routing(p), p.base + n_done, _asked(recorder, item.experts, forms, p) if sends_x else None)

    def asks(p: Pass) -> bool:
        choice = routed(p)
        return choice is not None and choice.asked is not None

    operations.linear(recorder, op, operations.Choice(place, routed, normed))
    recorder.record(lambda p: [] if routed(p) else [kernels.router(routing(p), p.count(op.x.rows))])
    recorder.experts.asks_early[item.router.out.ids.buffer] = asks


def experts(recorder: Recorder, op: ops.Experts, shared: _Shared | None = None) -> None:
    """Record routed experts; `shared` is one that every token takes, too."""
    if recorder.experts.has(op.routing):
        recorder.record(_Experts(recorder, op, shared).launches)
    else:
        recorder.record(_DenseExperts(recorder, op).launches)


def can_group(op: ops.Experts) -> bool:
    """Return whether many tokens can be computed expert by expert, so that no choice needs blocks of its own."""
    return all(tiles.has_integer_form(weight.format) for weight in op.stacks)


class _Experts:
    """The routed experts of one layer: what their launches need, and the launches."""

    def __init__(self, recorder: Recorder, op: ops.Experts, shared: _Shared | None) -> None:
        """Note what is needed."""
        self.op = op
        self.shared = shared
        self.tables = tables = recorder.experts
        self.layer = layer = self._layer()
        self.recorder = recorder
        self.formats = [weight.format for _, weight, _ in layer.projections]
        self.factors = [(recorder.vector(w.scale), recorder.vector(bias)) for _, w, bias in layer.projections]
        self.grids = [recorder.grid(weight_format) for weight_format in self.formats]

        self.forms = _forms_of_x(recorder, op)
        self.x_gate, self.x_up = (self.forms[weight_format.activation] for weight_format in self.formats[:2])
        self.out = recorder.use(op.out)
        self.n_used, self.ffn_size, self.hidden_size = n_used, ffn_size, hidden_size = (
            op.routing.ids.width,
            op.gate.n_rows,
            op.x.width,
        )
        self.h = recorder.temporary(lambda n_tokens: n_tokens * (n_used + 1) * ffn_size * 4, ffn_size)
        self.h_form = op.down.format.activation
        if self.h_form == Activation.F32:
            self.h_in_form = Place(self.h.need, 0, ffn_size * 4)
        else:
            row_bytes = kernels.activation_bytes(self.h_form, ffn_size)
            self.h_in_form = recorder.temporary(lambda n_tokens: n_tokens * n_used * row_bytes, row_bytes)
        self.sizes = sizes = Sizes(layer.n_experts, n_used, hidden_size, ffn_size, tables.at_once)
        self.parts = recorder.temporaries(lambda n_tokens: tiles.groups_bytes(sizes, n_tokens))
        next_router = tables.next_routers.get(tables.number(op.routing)) if tables.has(op.routing) else None
        self.guess = _guess(recorder, *next_router) if next_router else None

    def _layer(self) -> ExpertLayer:
        """Return the layer that these experts are."""
        return self.tables.layers[self.tables.number(self.op.routing)]

    def launches(self, p: Pass) -> Iterable[Launch | Streamed]:
        """Yield the launches: the request, the shared expert where it goes by itself, the others."""
        asked = _asked(self.recorder, self.op, self.forms, p)
        asks_early = self.tables.asks_early.get(self.op.routing.ids.buffer)
        if asked is not None and not (asks_early and asks_early(p)):
            # before our share, so that both work at the same time
            ids, count = self._ids(p), p.count(self.op.x.rows)
            yield kernels.publish_misses(ids, self.n_used, asked, count)
        pays_to_group = can_group(self.op) and tiles.pays_to_group(self.sizes, p.most)
        groups = (p.streams and not self.layer.is_resident) or pays_to_group
        if self.shared is not None and (groups or not self.layer.n_slots):
            yield from self.shared.plain(p)
        if self.layer.n_slots or p.streams:
            yield from self._by_expert(p) if groups else self._by_choice(p)
        if asked is not None and self.guess is not None:
            yield from self.guess(p)  # while the CPU computes its share

    def _by_choice(self, p: Pass) -> Iterable[Launch]:
        """Each choice for itself: for few tokens."""
        ids, slots = self._ids(p), self._slots(p)
        count, h = p.count(self.op.x.rows), p.rows(self.h).address
        gate, up, down = self._in_slots(p)
        own, own_out = self.shared.matrices(p) if self.shared is not None else (None, NOTHING)
        yield kernels.expert_gate_up(
            ids,
            slots,
            self.n_used,
            gate,
            up,
            p.rows(self.x_gate),
            p.rows(self.x_up),
            self.hidden_size,
            self.ffn_size,
            h,
            (p.at(self.grids[0]), p.at(self.grids[1])),
            self.op.activation,
            self.op.limit,
            self.op.up_limit,
            count,
            (own[0], own[1]) if own else None,
        )
        yield kernels.expert_down(
            ids,
            slots,
            self.n_used,
            down,
            h,
            self.hidden_size,
            self.ffn_size,
            p.rows(self.out),
            p.at(self.grids[2]),
            count,
            (own[2], own_out) if own else None,
            all_resident=self.layer.is_resident,
        )

    def _by_expert(self, p: Pass) -> Iterable[Launch | Streamed]:
        """All tokens of an expert together, first of those in slots, then of those that pass through."""
        ids, slots = self._ids(p), self._slots(p)
        count, most = p.count(self.op.x.rows), tiles.n_tiles(self.sizes, p.most)
        streams = p.streams and not self.layer.is_resident
        has_slots = self.layer.n_slots > 0
        groups, first = self._groups(p), ctypes.c_int32(0)
        gate, up, down = self._in_slots(p)
        yield from tiles.group_choices(ids, slots, self.sizes, groups, count)
        if has_slots:
            yield self._first_half(p, first, gate, up, most)
        if streams:
            yield self._streamed(p, self.layer.halves[0], self._first_half)
        yield kernels.quantize(p.rows(self.h), self.ffn_size, self.h_form, p.rows(self.h_in_form), self.n_used, count)
        if has_slots:
            yield self._second_half(p, first, down, most)
        if streams:
            yield self._streamed(p, self.layer.halves[1], self._second_half)

    def _first_half(self, p: Pass, group: ctypes.c_int32, gate: ExpertMatrix, up: ExpertMatrix, most: int) -> Launch:
        return tiles.expert_gate_up(
            self._groups(p),
            group,
            self.sizes,
            gate,
            up,
            p.rows(self.x_gate),
            p.rows(self.x_up),
            p.rows(self.h).address,
            (p.at(self.grids[0]), p.at(self.grids[1])),
            self.op.activation,
            self.op.limit,
            self.op.up_limit,
            most,
        )

    def _second_half(self, p: Pass, group: ctypes.c_int32, down: ExpertMatrix, most: int) -> Launch:
        rows = p.rows(self.h_in_form), p.rows(self.out)
        return tiles.expert_down(self._groups(p), group, self.sizes, down, *rows, p.at(self.grids[2]), most)

    def _streamed(self, p: Pass, wanted: tuple[int, ...], half: Callable[..., Launch]) -> Streamed:
        """Return half of what experts need that pass through, which is launched again for each batch of them."""
        group, starts = ctypes.c_int32(), self.layer.staged(wanted, self.sizes.at_once)
        most = min(tiles.n_tiles(self.sizes, p.most), self.sizes.at_once * -(-p.most // 64))
        launches = []
        for buffer in p.staging:
            addresses = [0] * len(self.layer.weights)
            for i, start in zip(wanted, starts, strict=True):
                addresses[i] = buffer + start
            own = self._matrices(p, addresses, self.layer.slot_bytes)
            needed = [matrix for matrix, (i, _, _) in zip(own, self.layer.projections, strict=True) if i in wanted]
            launches.append(half(p, group, *needed, most))
        return Streamed(self.tables.number(self.op.routing), wanted, group, tuple(launches))

    def _ids(self, p: Pass) -> int:
        return self.tables.ids(self.op.routing, p)

    def _slots(self, p: Pass) -> int:
        return self.tables.slots(self.op.routing, p)

    def _groups(self, p: Pass) -> Groups:
        return Groups(*(p.rows(part).address for part in self.parts))

    def _in_slots(self, p: Pass) -> list[ExpertMatrix]:
        n = len(self.layer.weights)
        return self._matrices(p, [p.base + self.layer.matrix_offset(i) for i in range(n)], [PLACE_BYTES] * n)

    def _matrices(self, p: Pass, addresses: Sequence[int], steps: Sequence[int]) -> list[ExpertMatrix]:
        """Return gate, up and down of experts whose matrices lie so many bytes apart, from these addresses on."""
        return [
            ExpertMatrix(addresses[i], steps[i], weight.format, p.at(scale), p.at(bias))
            for (i, weight, _), (scale, bias) in zip(self.layer.projections, self.factors, strict=True)
        ]


class _DenseExperts(_Experts):
    """Routed experts that lie where the dense weights are, as the file has them: all are always there, in order."""

    def __init__(self, recorder: Recorder, op: ops.Experts) -> None:
        """Note what is needed."""
        super().__init__(recorder, op, None)
        n_experts = op.routing.n_experts
        self.ids = recorder.use(op.routing.ids)
        self.places = recorder.constant(("places", n_experts), lambda: np.arange(n_experts, dtype=np.int32))
        self.offsets = [recorder.matrix(weight) for weight in self.layer.weights]

    def _layer(self) -> ExpertLayer:
        return ExpertLayer(self.op, self.op.routing.n_experts, 0, 0)

    def _ids(self, p: Pass) -> int:
        return p.rows(self.ids).address

    def _slots(self, p: Pass) -> int:
        return p.base + self.places

    def _in_slots(self, p: Pass) -> list[ExpertMatrix]:
        steps = [self.layer.stretch(i)[1] for i in range(len(self.offsets))]
        return self._matrices(p, [p.base + offset for offset in self.offsets], steps)


def shared_expert(recorder: Recorder, item: fusion.SharedExpert) -> None:
    """Record experts with a shared one: for few tokens it is computed like one more that was chosen."""
    plain = recorder.aside(
        lambda: operations.linear(recorder, item.gate_up),
        lambda: operations.gate(recorder, item.gate),
        lambda: operations.linear(recorder, item.down),
    )
    weights = (*item.gate_up.weights, *item.down.weights)
    offsets, out = [recorder.matrix(weight) for weight in weights], recorder.use(item.down.outs[0])

    def matrices(p: Pass) -> tuple[list[ExpertMatrix], Rows]:
        own = zip(offsets, weights, strict=True)
        return [ExpertMatrix(p.base + offset, 0, weight.format) for offset, weight in own], p.rows(out)

    experts(recorder, item.experts, _Shared(matrices, plain))


def combine(recorder: Recorder, op: ops.Combine, norm: ops.RMSNorm | None = None) -> None:
    """Record the sum of what the experts gave into the residual stream, with the norm behind it if there is one."""
    total, expert_out, weights = (recorder.use(t) for t in (op.out, op.expert_out, op.routing.weights))
    stream = recorder.use(op.residual) if op.residual else None
    shared = recorder.use(op.shared) if op.shared else None
    shared_gate = recorder.use(op.shared_gate) if op.shared_gate else None
    tables = recorder.experts
    number = tables.number(op.routing) if tables.has(op.routing) else None

    def summands(p: Pass) -> tuple[Rows, Combined, Rows]:
        return (
            p.rows(stream) if stream else NOTHING,
            Combined(
                p.rows(expert_out),
                tables.exchange(op.routing, p),
                0 if number is None else tables.ids(op.routing, p),
                0 if number is None else tables.slots(op.routing, p),
                p.rows(weights).address if op.weighted else 0,
                op.routing.ids.width,
                p.rows(shared) if shared else None,
                p.rows(shared_gate) if shared_gate else None,
                op.scale,
                chosen_early=number is None or tables.layers[number].n_slots > 0,  # two launches at least lie between
            ),
            p.rows(total),
        )

    operations.residual(recorder, op.out, summands, norm)
    if number is not None and number + 1 in {tables.n_step_layers, len(tables.layers)}:
        recorder.record(lambda p: [] if p.exchange is None else [kernels.publish_end(p.exchange)])


def _routing(recorder: Recorder, op: ops.Router) -> Callable[[Pass], kernels.Routing]:
    """Return what says how experts are chosen."""
    logits, weights = recorder.use(op.logits), recorder.use(op.out.weights)
    bias = recorder.vector(op.bias)
    return _choice(recorder, op, logits, bias, lambda p: recorder.experts.ids(op.out, p), weights)


def _choice(
    recorder: Recorder,
    op: ops.Router,
    logits: Place,
    bias: int | None,
    ids: Callable[[Pass], int],
    weights: Place,
) -> Callable[[Pass], kernels.Routing]:
    """Return how a router chooses, with logits and a bias from somewhere, and results that go somewhere."""
    table, n_vocab = recorder.expert_table(op.table, op.out.n_experts), op.table.n_rows if op.table else 0
    return lambda p: kernels.Routing(
        p.rows(logits),
        p.at(bias),
        ids(p),
        p.rows(weights).address,
        op.out.n_experts,
        op.out.ids.width,
        op.scoring,
        op.n_groups,
        op.n_groups_used,
        op.normalize,
        op.scale,
        p.at(table),
        p.base + p.step.token_ids,
        n_vocab,
    )


def _guess(recorder: Recorder, x: ops.Tensor, linear: ops.Linear, router: ops.Router) -> Launches:
    """Note what a router needs to choose experts of another layer's activations; return what makes the launch.

    It tells the CPU which of them have no slot. For steps of one token.
    """
    i = linear.outs.index(router.logits)
    weight, n_experts, n_used = linear.weights[i], router.out.n_experts, router.out.ids.width
    assert weight.n_cols == x.width, "layers of different widths"
    activations, grid = recorder.activations(x, weight.format.activation), recorder.grid(weight.format)
    matrix, bias, scale = recorder.matrix(weight), recorder.vector(linear.biases[i]), recorder.vector(weight.scale)
    logits, ids, weights = recorder.temporaries(lambda _: (4 * n_experts, 4 * n_used, 4 * n_used))
    own_bias = None
    if router.bias is not None:  # whoever tells routers whom to choose may tell a guess something else
        name = recorder.experts.guess_biases[router.bias.name] = f"{router.bias.name} of a guess"
        own_bias = recorder.copy_of_vector(router.bias, name)
    choice = _choice(recorder, router, logits, own_bias, lambda p: p.rows(ids).address, weights)
    n_done = recorder.constant("n_done", lambda: np.zeros(1, np.int32))

    def launches(p: Pass) -> Iterable[Launch]:
        exchange = recorder.experts.exchange(router.out, p)
        if exchange is None or p.most > 1 or not kernels.can_route(weight.format, x.width, 1):
            return
        asked = Asked(recorder.experts.slots(router.out, p), {}, x.width, exchange.of_guess)
        out = Matrix(p.base + matrix, weight.n_rows, Rows(p.rows(logits).address, n_experts), p.at(bias), p.at(scale))
        what = p.rows(activations), x.width, weight.format, [out], p.at(grid), p.count(x.rows)
        yield kernels.linear(*what, routed=Routed(choice(p), p.base + n_done, asked))

    return launches


def _forms_of_x(recorder: Recorder, op: ops.Experts) -> dict[Activation, Place]:
    """Say where the activations of experts lie, in the one or two forms that gate and up take."""
    return {
        weight.format.activation: recorder.activations(op.x, weight.format.activation) for weight in (op.gate, op.up)
    }


def _asked(recorder: Recorder, op: ops.Experts, forms: Mapping[Activation, Place], p: Pass) -> Asked | None:
    """Return what the CPU is asked with, if it computes some of these experts."""
    exchange = recorder.experts.exchange(op.routing, p)
    if exchange is None:
        return None
    rows = {form: p.rows(place) for form, place in forms.items()}
    return Asked(recorder.experts.slots(op.routing, p), rows, op.x.width, exchange)
