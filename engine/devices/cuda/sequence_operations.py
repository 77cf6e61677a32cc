"""How the operations that know a token's position, or what lies before it in its sequence, are lowered."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from engine.devices import graph as ops
from engine.devices.cuda import attention, elementwise, fusion, kernels, ngrams, operations, recurrent, selection
from engine.devices.cuda.expert_layers import Streamed
from engine.devices.cuda.kernels import GateOf
from engine.devices.cuda.launch import NOT_KEPT, Kept, Launch, Rows
from engine.devices.cuda.places import Pass
from engine.devices.cuda.recorder import Recorder


def scale_by_position(recorder: Recorder, op: ops.ScaleByPosition) -> None:
    """Record a product with a factor that grows with the position."""
    x = recorder.use(op.x)
    recorder.record(
        lambda p: [
            elementwise.scale_by_position(
                p.rows(x), p.base + p.step.positions, op.x.width, op.offset, op.period, op.slope, p.count(op.x.rows)
            )
        ]
    )


def rope(recorder: Recorder, op: ops.Rope) -> None:
    """Record a rotation of heads."""
    x, (frequencies, n_rot) = recorder.use(op.x), _frequencies(recorder, op)
    recorder.record(
        lambda p: [
            elementwise.rope(
                p.rows(x),
                p.base + p.step.positions,
                p.base + frequencies,
                op.n_heads,
                op.head_dim,
                n_rot,
                op.style,
                op.magnitude,
                p.count(op.x.rows),
                op.period,
            )
        ]
    )


def _frequencies(recorder: Recorder, op: ops.Rope) -> tuple[int, int]:
    """Return the offset of a rotation's frequencies, and how many values of a head turn."""
    divisors = op.divisors_of(recorder.context_length)
    with np.errstate(all="ignore"):  # a damaged file may hold zeros; its text is then as damaged
        divided = op.frequencies if divisors is None else op.frequencies / recorder.values(divisors)
    values = np.ascontiguousarray(divided, np.float32)
    return recorder.numbers(values), 2 * len(values)


def select_positions(recorder: Recorder, op: ops.SelectPositions, item: fusion.Selection | None = None) -> None:
    """Record the choice of what attention looks at, perhaps with what makes its queries and keys ready."""
    cache = recorder.cache(op.cache)
    selection.check_indexer(cache, op.n_heads)
    q, out, weights = recorder.use(op.q), recorder.use(op.out), recorder.use(op.weights) if op.weights else None
    store = _indexer_inputs(recorder, op, item)
    scores = recorder.temporary(lambda n_tokens: selection.scores_bytes(cache.n_rows, n_tokens))

    def launches(p: Pass) -> Iterable[Launch]:
        count, own = p.count(op.q.rows), cache._replace(address=p.base + recorder.state(op.cache))
        yield store(p)
        yield from selection.select_positions(
            p.rows(q),
            p.rows(weights) if weights else None,
            p.rows(out),
            own,
            op.n_heads,
            op.top_k,
            op.scale,
            p.rows(scores).address,
            attention.Place(p.base + p.step.positions, p.base + p.step.slots),
            count,
            has_tail=op.has_tail,
        )

    recorder.record(launches)


def select_blocks(recorder: Recorder, op: ops.SelectBlocks, item: fusion.Selection | None = None) -> None:
    """Record the choice of the blocks that attention looks at, likewise."""
    cache = recorder.cache(op.cache)
    selection.check_indexer(cache, op.n_heads, apart=True)
    q, out, store = recorder.use(op.q), recorder.use(op.out), _indexer_inputs(recorder, op, item)
    scores = recorder.temporary(
        lambda n_tokens: selection.block_scores_bytes(cache.n_rows, op.n_heads, op.block_size, n_tokens)
    )

    def launches(p: Pass) -> Iterable[Launch]:
        count, own = p.count(op.q.rows), cache._replace(address=p.base + recorder.state(op.cache))
        yield store(p)
        yield from selection.select_blocks(
            p.rows(q),
            p.rows(out),
            own,
            op.n_heads,
            op.top_k,
            op.block_size,
            op.n_newest,
            p.rows(scores).address,
            attention.Place(p.base + p.step.positions, p.base + p.step.slots),
            count,
        )

    recorder.record(launches)


def _indexer_inputs(
    recorder: Recorder, op: ops.SelectPositions | ops.SelectBlocks, item: fusion.Selection | None
) -> Callable[[Pass], Launch]:
    """Return what normalises and rotates an indexer's queries and keys, if that belongs to it, and stores keys."""
    cache, q_out = recorder.cache(op.cache), recorder.use(op.q)
    if item and item.shared_keys:
        return _shared_indexer_inputs(recorder, op, item.q_rope, item.shared_keys)
    q_norm, k_norm, rope = (item.q_norm, item.k_norm, item.q_rope) if item else (None, None, None)
    q, k = recorder.use(q_norm.x if q_norm else op.q), recorder.use(k_norm.x if k_norm else op.k)
    q_weight, k_weight = (recorder.vector(norm.weight) if norm else None for norm in (q_norm, k_norm))
    frequencies, n_rot = _frequencies(recorder, rope) if rope else (0, 0)

    def launch(p: Pass) -> Launch:
        count, own = p.count(op.q.rows), cache._replace(address=p.base + recorder.state(op.cache))
        place = attention.Place(p.base + p.step.positions, p.base + p.step.slots)
        eps, rotation, rotates = q_norm.eps if q_norm else 0.0, attention.Rotation(), rope is not None
        if rope:
            rotation = attention.Rotation(p.at(frequencies), n_rot, rope.style, rope.magnitude, rope.period)
        dim, normalizes = cache.key_dim, q_norm is not None
        queries = attention.Heads(p.rows(q), op.n_heads, dim, normalizes, p.at(q_weight), rotates)
        keys = attention.Heads(p.rows(k), 1, dim, normalizes, p.at(k_weight), rotates)
        return attention.inputs(queries if item else None, p.rows(q_out), keys, None, eps, rotation, own, place, count)

    return launch


def _shared_indexer_inputs(
    recorder: Recorder, op: ops.SelectPositions | ops.SelectBlocks, q_rope: ops.Rope | None, keys: fusion.SharedKeys
) -> Callable[[Pass], Launch]:
    """Return what rotates an indexer's queries, and makes and stores its keys that tokens share."""
    q, store = recorder.use(op.q), _shared_keys(recorder, op.cache, keys)

    def launch(p: Pass) -> Launch:
        queries = attention.Heads(p.rows(q), op.n_heads, op.cache.head_dim, rotate=True) if q_rope else None
        return store(p, queries, p.rows(q))

    return launch


def _shared_keys(
    recorder: Recorder, owner: ops.KVCache, item: fusion.SharedKeys
) -> Callable[[Pass, attention.Heads | None, Rows], Launch]:
    """Return what makes keys of rows that tokens share and stores them, with queries of the same angles beside them."""
    cache, rope, norm = recorder.cache(owner), item.rope, item.norm
    rows, weight, (frequencies, n_rot) = (
        recorder.use(item.compress.out),
        recorder.vector(norm.weight),
        _frequencies(recorder, rope),
    )

    def launch(p: Pass, queries: attention.Heads | None, q_out: Rows) -> Launch:
        own = cache._replace(address=p.base + recorder.state(owner))
        heads = attention.Heads(p.rows(rows), 1, cache.key_dim, normalize=True, weight=p.at(weight), rotate=True)
        rotation = attention.Rotation(p.at(frequencies), n_rot, rope.style, rope.magnitude, rope.period)
        place = attention.Place(p.base + p.step.positions, p.base + p.step.slots)
        return attention.inputs(queries, q_out, heads, None, norm.eps, rotation, own, place, p.count(rope.x.rows))

    return launch


def attention_layer(recorder: Recorder, item: fusion.Attention) -> None:
    """Record attention with what makes its inputs ready, and the gate behind it."""
    op, cache = item.attention, recorder.cache(item.attention.cache)
    attention.check_heads(cache.key_dim, cache.value_dim)
    q, k, v = recorder.use(item.q), recorder.use(item.k), recorder.use(op.v) if op.v else None
    q_out, found, sinks = recorder.use(op.q), recorder.use(op.out), recorder.vector(op.sinks)
    q_weight, k_weight = (recorder.vector(norm.weight) if norm else None for norm in (item.q_norm, item.k_norm))
    frequencies, n_rot = _frequencies(recorder, item.rope) if item.rope else (0, 0)
    q_step = cache.key_dim + (cache.value_dim if item.split else 0)
    by = recorder.use(item.gate.gate) if item.gate and not item.split else q
    out = item.gate.out if item.gate else op.out
    to, finish = recorder.use(out), recorder.finish(out)
    selected, listed = recorder.use(op.selected.blocks) if op.selected else None, attention.Sight()
    if op.selected:
        lists = op.selected
        listed = attention.Sight(
            top_k=lists.top_k, block_size=lists.block_size, by_head=lists.n_lists > 1, has_tail=lists.has_tail
        )
    listed = listed._replace(window=op.window)
    shared, store = op.shared_cache, _stored_keys(recorder, item)
    if shared:
        listed = listed._replace(shared=recorder.cache(shared))
    scratch = recorder.temporaries(lambda n_tokens: attention.scratch_bytes(cache, op.n_heads, n_tokens, listed))

    def gate(p: Pass) -> GateOf | None:
        if item.gate is None:
            return None
        first, stride = p.rows(by)
        if item.split:
            return GateOf(item.gate.gating, Rows(first + 4 * cache.key_dim, stride), cache.value_dim, q_step)
        return operations.gate_of(item.gate, Rows(first, stride), cache.value_dim)

    def launches(p: Pass) -> Iterable[Launch]:
        count, own = p.count(op.q.rows), cache._replace(address=p.base + recorder.state(op.cache))
        place = attention.Place(p.base + p.step.positions, p.base + p.step.slots)
        q_heads = attention.Heads(
            p.rows(q), op.n_heads, q_step, item.q_norm is not None, p.at(q_weight), item.q_rope is not None
        )
        k_heads = attention.Heads(
            p.rows(k),
            cache.n_kv_heads,
            cache.key_dim,
            item.k_norm is not None,
            p.at(k_weight),
            item.k_rope is not None,
        )
        yield attention.inputs(
            q_heads if item.split or item.q_norm or item.q_rope else None,
            p.rows(q_out),
            k_heads,
            attention.Heads(p.rows(v), cache.n_kv_heads, cache.value_dim) if v else None,
            item.norm.eps if item.norm else 0.0,
            attention.Rotation(p.at(frequencies), n_rot, item.rope.style, item.rope.magnitude, item.rope.period)
            if item.rope
            else attention.Rotation(),
            own,
            place,
            count,
        )
        sight = listed._replace(sinks=p.at(sinks), chunk=op.chunk, cap=op.cap)
        if shared and store:
            yield store(p, None, p.rows(q_out))
            sight = sight._replace(shared=recorder.cache(shared)._replace(address=p.base + recorder.state(shared)))
        if selected:
            sight = sight._replace(selected=p.rows(selected))
        addresses = (p.rows(scratch[0]).address, p.rows(scratch[1]).address)
        what = (own, op.n_heads, op.scale, sight, addresses, place, count)
        if p.most <= attention.FEW_TOKENS:
            yield from attention.attend(p.rows(q_out), p.rows(to), *what, gate(p), finish.at(p))
            return
        yield from attention.attend(p.rows(q_out), p.rows(found), *what)
        by_heads = gate(p)
        if by_heads:
            yield kernels.gate(p.rows(found), by_heads, p.rows(to), out.width, count, finish.at(p))
        else:
            for form, rows in finish.forms.items():
                yield kernels.quantize(p.rows(to), out.width, form, p.rows(rows), 1, count)

    recorder.record(launches)


def _stored_keys(
    recorder: Recorder, item: fusion.Attention
) -> Callable[[Pass, attention.Heads | None, Rows], Launch] | None:
    """Return what stores keys that tokens share for attention, if there are any; they may be ready as they come."""
    owner, k = item.attention.shared_cache, item.attention.shared_k
    if owner is None or k is None:
        return None
    if item.shared_keys:
        return _shared_keys(recorder, owner, item.shared_keys)
    cache, rows = recorder.cache(owner), recorder.use(k)

    def launch(p: Pass, queries: attention.Heads | None, q_out: Rows) -> Launch:
        own, heads = (
            cache._replace(address=p.base + recorder.state(owner)),
            attention.Heads(p.rows(rows), 1, cache.key_dim),
        )
        place = attention.Place(p.base + p.step.positions, p.base + p.step.slots)
        return attention.inputs(queries, q_out, heads, None, 0.0, attention.Rotation(), own, place, p.count(k.rows))

    return launch


def store_keys(recorder: Recorder, op: ops.StoreKeys) -> None:
    """Record that keys and values go to a cache as they are."""
    cache, k, v = recorder.cache(op.cache), recorder.use(op.k), recorder.use(op.v) if op.v else None

    def launch(p: Pass) -> Launch:
        own = cache._replace(address=p.base + recorder.state(op.cache))
        keys = attention.Heads(p.rows(k), cache.n_kv_heads, cache.key_dim)
        values = attention.Heads(p.rows(v), cache.n_kv_heads, cache.value_dim) if v else None
        place, count = attention.Place(p.base + p.step.positions, p.base + p.step.slots), p.count(op.k.rows)
        return attention.inputs(None, p.rows(k), keys, values, 0.0, attention.Rotation(), own, place, count)

    recorder.record(lambda p: [launch(p)])


def carry_over(recorder: Recorder, op: ops.CarryOver) -> None:
    """Record that rows are carried over to the next tokens."""
    x, out = (recorder.use(tensor) if tensor else None for tensor in (op.x, op.out))

    def launch(p: Pass) -> Launch:
        rows = [p.rows(place) if place else None for place in (x, out)]
        state, place = p.base + recorder.state(op.state), (p.base + p.step.positions, p.base + p.step.slots)
        return elementwise.carry_over(
            rows[0], state, rows[1], op.width, ops.N_CARRIED, *place, p.count(ops.Rows.TOKENS)
        )

    recorder.record(lambda p: [launch(p)])


def hash_tokens(recorder: Recorder, op: ops.HashTokens) -> None:
    """Record the rows that hashes of the last tokens choose."""
    out, n_hashed, n_heads = recorder.use(op.out), len(op.multipliers), op.out.width
    multipliers, sizes, offsets = (recorder.numbers(values) for values in (op.multipliers, op.sizes, op.offsets))

    def launches(p: Pass) -> Iterable[Launch]:
        addresses = p.base + multipliers, p.base + sizes, p.base + offsets
        yield ngrams.hash_tokens(
            p.base + recorder.state(op.state),
            p.rows(out),
            ngrams.Hashes(*addresses, n_hashed, n_heads, op.end_id),
            p.base + p.step.token_ids,
            attention.Place(p.base + p.step.positions, p.base + p.step.slots),
            p.count(op.out.rows),
            _kept(recorder, op.state, p),
        )

    recorder.record(launches)


def _kept(recorder: Recorder, state: ops.State, p: Pass) -> Kept:
    """Return where a step keeps a copy of a state, and where it is told after which row."""
    place = recorder.kept.get(state)
    return NOT_KEPT if place is None else Kept(p.base + place, p.base + p.step.kept_row)


def causal_conv(recorder: Recorder, op: ops.CausalConv) -> None:
    """Record a convolution with the tokens before."""
    x, out, weight, bias = (
        recorder.use(op.x),
        recorder.use(op.out),
        recorder.joined(op.weights),
        recorder.vector(op.bias),
    )
    recorder.record(
        lambda p: recurrent.causal_conv(
            p.rows(x),
            p.at(weight),
            p.at(bias),
            p.base + recorder.state(op.state),
            p.rows(out),
            op.x.width,
            op.kernel_size,
            op.activates,
            p.base + p.step.positions,
            p.base + p.step.slots,
            p.count(op.x.rows),
            op.dilation,
            _kept(recorder, op.state, p),
        )
    )


def delta_net(recorder: Recorder, op: ops.DeltaNet) -> None:
    """Record the recurrence of a delta net."""
    q, k, v, out = recorder.use(op.q), recorder.use(op.k), recorder.use(op.v), recorder.use(op.out)
    beta, alpha = (recorder.use(tensor) if tensor else None for tensor in (op.beta, op.alpha))
    a, dt_bias, skip = (recorder.vector(vector) for vector in (op.a, op.dt_bias, op.skip))
    if op.decays is not None:
        a = recorder.numbers(op.decays)
    assert q.stride == k.stride == v.stride
    recorder.record(
        lambda p: [
            recurrent.delta_net(
                p.rows(q).address,
                p.rows(k).address,
                p.rows(v).address,
                q.stride,
                p.rows(beta) if beta else None,
                p.rows(alpha) if alpha else None,
                p.at(a),
                p.at(dt_bias),
                p.at(skip),
                p.base + recorder.state(op.state),
                p.rows(out),
                op.n_k_heads,
                op.n_v_heads,
                op.k.width // op.n_k_heads,
                op.v.width // op.n_v_heads,
                op.decay_dim,
                op.decay_bound,
                op.grouped,
                op.eps,
                p.base + p.step.positions,
                p.base + p.step.slots,
                p.count(op.q.rows),
                _kept(recorder, op.state, p),
            )
        ]
    )


def selective_scan(recorder: Recorder, op: ops.SelectiveScan) -> None:
    """Record the recurrence of a state-space model whose channels have states of their own."""
    x, dt, b, c, out = (recorder.use(tensor) for tensor in (op.x, op.dt, op.b, op.c, op.out))
    a, skip = recorder.vector(op.a), recorder.vector(op.skip)
    recorder.record(
        lambda p: [
            recurrent.selective_scan(
                p.rows(x),
                p.rows(dt),
                p.rows(b),
                p.rows(c),
                p.at(a),
                p.at(skip),
                p.base + recorder.state(op.state),
                p.rows(out),
                op.x.width,
                op.state_size,
                p.base + p.step.positions,
                p.base + p.step.slots,
                p.count(op.x.rows),
                _kept(recorder, op.state, p),
            )
        ]
    )


def compress(recorder: Recorder, op: ops.Compress) -> None:
    """Record rows that the tokens of a period share."""
    values, out, biases = recorder.use(op.values), recorder.use(op.out), recorder.vector(op.biases)
    scores = recorder.use(op.scores) if op.scores else None
    recorder.record(
        lambda p: [
            recurrent.compress(
                p.rows(values),
                p.rows(scores) if scores else None,
                p.at(biases),
                p.base + recorder.state(op.state),
                p.rows(out),
                op.out.width,
                op.values.width // op.out.width,
                op.period,
                p.base + p.step.positions,
                p.base + p.step.slots,
                p.count(op.out.rows),
                _kept(recorder, op.state, p),
            )
        ]
    )


def delta_net_layer(recorder: Recorder, item: fusion.DeltaNetLayer) -> None:
    """Record all between the products of a delta-net layer: for one token that is one launch."""
    conv, net, norm, gate = item.conv, item.net, item.norm, item.gate
    plain = recorder.aside(
        lambda: causal_conv(recorder, conv),
        lambda: delta_net(recorder, net),
        lambda: operations.gate(recorder, gate, norm),
    )
    finish = recorder.finish(gate.out)
    assert net.beta is not None
    assert net.alpha is not None
    x, beta, alpha, by = (recorder.use(t) for t in (conv.x, net.beta, net.alpha, gate.gate))
    found, out = recorder.use(net.out), recorder.use(gate.out)
    conv_weight = recorder.joined(conv.weights)
    a, dt_bias, norm_weight = (recorder.vector(vector) for vector in (net.a, net.dt_bias, norm.weight))
    v_dim = net.v.width // net.n_v_heads
    n_counters = recurrent.n_counters(net.n_k_heads, net.n_v_heads, v_dim)
    n_done = recorder.constant(("n_done", n_counters), lambda: np.zeros(n_counters, np.int32))

    def launches(p: Pass) -> Iterable[Launch | Streamed]:
        if p.most > 1:
            yield from plain(p)
            return
        layer = recurrent.DeltaNet(
            net.n_k_heads,
            net.n_v_heads,
            net.k.width // net.n_k_heads,
            v_dim,
            net.decay_dim,
            net.decay_bound,
            conv.kernel_size,
            net.grouped,
            net.eps,
            norm.eps,
            gate.gating,
            p.at(conv_weight),
            p.at(a),
            p.at(dt_bias),
            p.at(norm_weight),
            p.base + recorder.state(conv.state),
            p.base + recorder.state(net.state),
        )
        yield recurrent.delta_net_step(
            p.rows(x).address,
            p.rows(beta).address,
            p.rows(alpha).address,
            p.rows(by).address,
            layer,
            p.rows(found).address,
            p.rows(out).address,
            p.base + n_done,
            p.base + p.step.positions,
            p.base + p.step.slots,
            finish.at(p),
        )

    recorder.record(launches)
