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
from engine.devices.cuda.expert_layers import Streamed
from engine.devices.cuda.kernels import Asked, Combined, Routed
from engine.devices.cuda.launch import NOTHING, ExpertMatrix, Launch, Rows
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


def linear_and_router(recorder: Recorder, item: fusion.LinearAndRouter) -> None:
    """Record products, and the choice of experts by one of them: for few tokens that is one launch."""
    op, routing = item.linear, _routing(recorder, item.router)
    place = op.outs.index(item.router.logits)
    weight_format, sends_x = op.weights[place].format, item.experts.x == op.x
    n_done = recorder.constant("n_done", lambda: np.zeros(1, np.int32))
    forms = _forms_of_x(recorder, item.experts) if sends_x else {}

    def routed(p: Pass) -> Routed | None:
        count = p.count(op.x.rows)
        if p.linear(weight_format) is not kernels.linear or not kernels.can_route(
            weight_format, op.x.width, count.most
        ):
            return None
        return Routed(routing(p), p.base + n_done, _asked(recorder, item.experts, forms, p) if sends_x else None)

    def asks(p: Pass) -> bool:
        choice = routed(p)
        return choice is not None and choice.asked is not None

    operations.linear(recorder, op, (place, routed))
    recorder.record(lambda p: [] if routed(p) else [kernels.router(routing(p), p.count(op.x.rows))])
    recorder.experts.asks_early[item.router.out.ids.buffer] = asks


def experts(recorder: Recorder, op: ops.Experts, shared: _Shared | None = None) -> None:
    """Record routed experts; `shared` is one that every token takes, too."""
    tables = recorder.experts
    number = tables.number(op.routing)
    layer = tables.layers[number]
    factors = [(recorder.vector(w.scale), recorder.vector(b)) for w, b in zip(layer.weights, layer.biases, strict=True)]
    grids = [recorder.grid(weight.format) for weight in layer.weights]

    forms = _forms_of_x(recorder, op)
    x_gate, x_up = (forms[weight.format.activation] for weight in layer.weights[:2])
    out = recorder.use(op.out)
    n_used, ffn_size, hidden_size = op.routing.ids.width, op.gate.n_rows, op.x.width
    h = recorder.temporary(lambda n_tokens: n_tokens * (n_used + 1) * ffn_size * 4, ffn_size)
    form = op.down.format.activation
    if form == Activation.F32:
        h_in_form = Place(h.need, 0, ffn_size * 4)
    else:
        row_bytes = kernels.activation_bytes(form, ffn_size)
        h_in_form = recorder.temporary(lambda n_tokens: n_tokens * n_used * row_bytes, row_bytes)

    sizes = Sizes(layer.n_experts, n_used, hidden_size, ffn_size, tables.at_once)
    parts = recorder.temporaries(lambda n_tokens: tiles.groups_bytes(sizes, n_tokens))
    formats = [weight.format for weight in layer.weights]

    def matrices(p: Pass, addresses: Sequence[int], steps: Sequence[int]) -> list[ExpertMatrix]:
        """Return those of experts that lie so many bytes from one another, from these addresses on."""
        return [
            ExpertMatrix(address, step, weight.format, p.at(scale), p.at(bias))
            for address, step, weight, (scale, bias) in zip(addresses, steps, layer.weights, factors, strict=True)
        ]

    def in_slots(p: Pass) -> list[ExpertMatrix]:
        return matrices(p, [p.base + layer.first_place(i) for i in range(3)], [layer.expert_bytes] * 3)

    def by_choice(p: Pass) -> Iterable[Launch]:
        """Each choice for itself: for few tokens."""
        ids, slots, count = tables.ids(op.routing, p), tables.slots(op.routing, p), p.count(op.x.rows)
        gate, up, down = in_slots(p)
        own, own_out = shared.matrices(p) if shared is not None else (None, NOTHING)
        yield kernels.expert_gate_up(
            ids,
            slots,
            n_used,
            gate,
            up,
            p.rows(x_gate),
            p.rows(x_up),
            hidden_size,
            ffn_size,
            p.rows(h).address,
            (p.at(grids[0]), p.at(grids[1])),
            op.activation,
            count,
            (own[0], own[1]) if own else None,
        )
        yield kernels.expert_down(
            ids,
            slots,
            n_used,
            down,
            p.rows(h).address,
            hidden_size,
            ffn_size,
            p.rows(out),
            p.at(grids[2]),
            count,
            (own[2], own_out) if own else None,
            all_resident=layer.is_resident,
        )

    def by_expert(p: Pass) -> Iterable[Launch | Streamed]:
        """All tokens of an expert together, first of those in slots, then of those that pass through."""
        ids, slots, count = tables.ids(op.routing, p), tables.slots(op.routing, p), p.count(op.x.rows)
        groups = Groups(*(p.rows(part).address for part in parts))
        all_tiles = tiles.n_tiles(sizes, p.most)
        streams = p.streams and not layer.is_resident
        has_slots = bool(layer.n_kept if p.streams else layer.n_slots)

        def first_half(group: ctypes.c_int32, gate: ExpertMatrix, up: ExpertMatrix, most: int) -> Launch:
            return tiles.expert_gate_up(
                groups,
                group,
                sizes,
                gate,
                up,
                p.rows(x_gate),
                p.rows(x_up),
                p.rows(h).address,
                (p.at(grids[0]), p.at(grids[1])),
                op.activation,
                most,
            )

        def second_half(group: ctypes.c_int32, down: ExpertMatrix, most: int) -> Launch:
            return tiles.expert_down(groups, group, sizes, down, p.rows(h_in_form), p.rows(out), p.at(grids[2]), most)

        def streamed(wanted: tuple[int, ...], half: Callable[..., Launch]) -> Streamed:
            group, starts = ctypes.c_int32(), layer.staged(wanted, sizes.at_once)
            launches = []
            for buffer in p.staging:
                addresses = [0, 0, 0]
                for i, start in zip(wanted, starts, strict=True):
                    addresses[i] = buffer + start
                own = matrices(p, addresses, layer.slot_bytes)
                most = min(all_tiles, sizes.at_once * -(-p.most // 64))
                launches.append(half(group, *(own[i] for i in wanted), most))
            return Streamed(number, wanted, group, tuple(launches))

        yield from tiles.group_choices(ids, slots, sizes, groups, count)
        gate, up, down = in_slots(p)
        if has_slots:
            yield first_half(ctypes.c_int32(0), gate, up, all_tiles)
        if streams:
            yield streamed((0, 1), first_half)
        yield kernels.quantize(p.rows(h), ffn_size, form, p.rows(h_in_form), n_used, count)
        if has_slots:
            yield second_half(ctypes.c_int32(0), down, all_tiles)
        if streams:
            yield streamed((2,), second_half)

    def launches(p: Pass) -> Iterable[Launch | Streamed]:
        asked, asks_early = _asked(recorder, op, forms, p), tables.asks_early.get(op.routing.ids.buffer)
        if asked is not None and not (asks_early and asks_early(p)):
            # before our share, so that both work at the same time
            yield kernels.publish_misses(tables.ids(op.routing, p), n_used, asked, p.count(op.x.rows))
        can_group = all(tiles.has_integer_form(f) for f in formats)
        groups = p.streams or (can_group and tiles.pays_to_group(sizes, p.most))
        if shared is not None and (groups or not layer.n_slots):
            yield from shared.plain(p)
        if layer.n_slots or p.streams:
            yield from by_expert(p) if groups else by_choice(p)

    recorder.record(launches)


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
    total = recorder.use(op.out)
    expert_out, weights, stream = (recorder.use(t) for t in (op.expert_out, op.routing.weights, op.residual))
    shared = recorder.use(op.shared) if op.shared else None
    shared_gate = recorder.use(op.shared_gate) if op.shared_gate else None
    layer = recorder.experts.layers[recorder.experts.number(op.routing)]

    def summands(p: Pass) -> tuple[Rows, Combined, Rows]:
        return (
            p.rows(stream),
            Combined(
                p.rows(expert_out),
                recorder.experts.exchange(op.routing, p),
                recorder.experts.ids(op.routing, p),
                recorder.experts.slots(op.routing, p),
                p.rows(weights).address if op.weighted else 0,
                op.routing.ids.width,
                p.rows(shared) if shared else None,
                p.rows(shared_gate) if shared_gate else None,
                op.scale,
                chosen_early=layer.n_slots > 0,  # two launches at least lie between
            ),
            p.rows(total),
        )

    operations.residual(recorder, op.out, summands, norm)


def _routing(recorder: Recorder, op: ops.Router) -> Callable[[Pass], kernels.Routing]:
    """Return what says how experts are chosen."""
    logits, weights, bias = recorder.use(op.logits), recorder.use(op.out.weights), recorder.vector(op.bias)
    assert op.out.ids.width == recorder.experts.n_used, "layers that use different numbers of experts"
    return lambda p: kernels.Routing(
        p.rows(logits),
        p.at(bias),
        recorder.experts.ids(op.out, p),
        p.rows(weights).address,
        op.out.n_experts,
        op.out.ids.width,
        op.scoring,
        op.n_groups,
        op.n_groups_used,
        op.normalize,
        op.scale,
    )


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
