"""A device that computes a recorded forward pass in plain float64 numpy: the oracle for every other device.

One sequence, nothing fast: each operation is the formula in the docstring of its class in `engine.devices.graph`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable

import numpy as np

from engine.devices import graph as ops
from engine.devices.graph import Activation, Gating, Graph, RopeStyle, Scoring, Tensor, Vector, Weight
from engine.devices.program import WeightAccess
from engine.quants import reference

SMALLEST_SUM = 2.0**-14  # of router weights, before they are divided by it


class ReferenceProgram:
    """Holds one sequence; `run` appends tokens to it and returns the logits of all of them."""

    def __init__(self, graph: Graph, weights: WeightAccess, context_length: int = 512) -> None:
        self.graph = graph
        self.context_length = context_length
        self._weights = weights
        self._dense: dict[str, np.ndarray] = {}
        self.keys: dict[object, np.ndarray] = {}
        self.states: dict[object, np.ndarray] = {}
        self.position = 0

    def run(self, token_ids: list[int]) -> np.ndarray:
        self.token_ids = np.asarray(token_ids)
        self.positions = self.position + np.arange(len(token_ids))
        self.values: dict[object, np.ndarray] = {}
        for operation in self.graph.operations:
            _RUN[type(operation)](self, operation)
        self.position += len(token_ids)
        return self[self.graph.logits]

    def draft(self, token_id: int, behind: int = 0) -> np.ndarray:
        """Logits of what follows a token that is not run, `behind` others that were drafted before it."""
        self.token_ids, self.positions = np.array([token_id]), np.array([self.position + behind])
        self.values = {}
        for operation in self.graph.draft.operations:
            _RUN[type(operation)](self, operation)
        return self[self.graph.draft.logits][0]

    def experts(self) -> np.ndarray:
        """The experts chosen in the last run, [n_moe_layers, n_tokens, n_experts_used]."""
        return np.stack([self[r.ids].astype(int) for r in self.graph.routings])

    def __getitem__(self, tensor: Tensor) -> np.ndarray:
        return self.values[tensor.buffer][:, tensor.offset : tensor.offset + tensor.width]

    def __setitem__(self, tensor: Tensor, value: np.ndarray) -> None:
        whole = self.values.setdefault(tensor.buffer, np.zeros((len(value), tensor.buffer.width)))
        whole[:, tensor.offset : tensor.offset + tensor.width] = value

    def vector(self, vector: Vector) -> np.ndarray:
        raw = self._weights.array(vector.name).reshape(1, -1)
        values = reference.dequantize(vector.format, raw, vector.stored_size or vector.size)[0]
        return values[vector.first : vector.first + vector.size].astype(np.float64)

    def matrices(self, weight: Weight) -> np.ndarray:
        """[n_experts, n_rows, n_cols]"""
        if weight.name not in self._dense:
            rows = self._weights.array(weight.name).reshape(-1, weight.format.row_bytes(weight.n_cols))
            self._dense[weight.name] = reference.dequantize(weight.format, rows, weight.n_cols).astype(np.float64)
        stored = self._dense[weight.name].reshape(weight.n_experts, -1, weight.n_cols)
        stored = stored[:, weight.first_row : weight.first_row + weight.n_rows]
        return stored if weight.scale is None else stored * self.vector(weight.scale)[:, None, None]

    # -- operations --------------------------------------------------------------------------------------------------

    def embed(self, op: ops.Embed) -> None:
        ids = self.token_ids if op.ids is None else self[op.ids].astype(int)
        self[op.out] = self.matrices(op.table)[0][ids].reshape(len(ids), -1) * op.scale

    def hash_tokens(self, op: ops.HashTokens) -> None:
        n_hashed, n_heads = len(op.multipliers), len(op.sizes) // (len(op.multipliers) - 1)
        before = self.states.get(op.state, np.zeros(0, int))
        tokens = np.concatenate([before, self.token_ids])
        self.states[op.state] = tokens
        rows = []
        for end in range(len(before) + 1, len(tokens) + 1):
            ids = [int(tokens[end - 1])]
            earlier = tokens[: end - 1][::-1][: n_hashed - 1].tolist()
            earlier = earlier[: earlier.index(op.end_id)] if op.end_id in earlier else earlier
            ids += earlier + [op.end_id] * (n_hashed - 1 - len(earlier))
            products = [i * int(m) % 2**64 for i, m in zip(ids, op.multipliers, strict=True)]
            row = []
            for n in range(2, n_hashed + 1):
                mixed = functools.reduce(operator.xor, products[:n])
                heads = slice((n - 2) * n_heads, (n - 1) * n_heads)
                row += [mixed % int(m) + int(at) for m, at in zip(op.sizes[heads], op.offsets[heads], strict=True)]
            rows.append(row)
        self[op.out] = np.array(rows)

    def rms_norm(self, op: ops.RMSNorm) -> None:
        x = self[op.x].reshape(len(self.token_ids), -1, op.group_size)
        x = x - op.centers * x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + op.eps)
        if op.weight is not None:
            x = x * self.vector(op.weight).reshape(-1, op.group_size)
        if op.bias is not None:
            x = x + self.vector(op.bias).reshape(-1, op.group_size)
        self[op.out] = x.reshape(len(x), -1)

    def linear(self, op: ops.Linear) -> None:
        for weight, bias, out in zip(op.weights, op.biases, op.outs, strict=True):
            self[out] = self[op.x] @ self.matrices(weight)[0].T + (0 if bias is None else self.vector(bias))

    def head_linear(self, op: ops.HeadLinear) -> None:
        n, weight = len(self.token_ids), op.weight
        x = self[op.x].reshape(n, weight.n_experts, weight.n_cols)
        self[op.out] = np.einsum("thc,hrc->thr", x, self.matrices(weight)).reshape(n, -1)

    def add(self, op: ops.Add) -> None:
        self[op.out] = self[op.a] + (self.vector(op.b) if isinstance(op.b, Vector) else self[op.b])

    def scale(self, op: ops.Scale) -> None:
        by = self.vector(op.by) if isinstance(op.by, Vector) else 1 if op.by is None else self[op.by]
        self[op.out] = self[op.x] * op.factor * by

    def soft_cap(self, op: ops.SoftCap) -> None:
        self[op.out] = op.cap * np.tanh(self[op.x] / op.cap)

    def clamp(self, op: ops.Clamp) -> None:
        self[op.out] = np.clip(self[op.x], -op.limit, op.limit)

    def scale_by_position(self, op: ops.ScaleByPosition) -> None:
        factor = 1 + op.slope * np.log1p((self.positions + op.offset) // op.period)
        self[op.x] = self[op.x] * factor[:, None]

    def gate(self, op: ops.Gate) -> None:
        x, gate = self[op.x], self[op.gate]
        if op.n_streams > 1:
            self[op.out] = (x * _GATINGS[op.gating](gate)).reshape(len(x), op.n_streams, -1).sum(1)
            return
        if op.gating == Gating.SITU:
            self[op.out] = _situ(gate, x, op.limit, op.own_limit)
            return
        gate = np.minimum(gate, op.limit) if op.gating == Gating.CLAMPED_SILU else gate
        if op.gating == Gating.CLAMPED_SWISH:
            x = np.clip(x, -7, 7) + 1
        factor = _GATINGS[op.gating](gate).repeat(op.x.width // op.gate.width, 1)
        self[op.out] = np.minimum(factor, op.limit) * np.clip(x, -op.limit, op.limit) if op.limit else x * factor

    def gate_by_agreement(self, op: ops.GateByAgreement) -> None:
        a, b = (self[t].reshape(len(self.token_ids), op.n_streams, -1) for t in (op.a, op.b))
        agreement = (a * b).sum(-1, keepdims=True) / math.sqrt(op.x.width)
        gate = _sigmoid(np.sign(agreement) * np.sqrt(np.maximum(np.abs(agreement), op.floor)))
        self[op.out] = (self[op.x][:, None] * gate).reshape(len(a), -1)

    def split_heads(self, op: ops.SplitHeads) -> None:
        x = self[op.x].reshape(len(self.token_ids), op.n_heads, -1)
        first_dim = op.first.width // op.n_heads
        self[op.first] = x[..., :first_dim].reshape(len(x), -1)
        self[op.second] = x[..., first_dim:].reshape(len(x), -1)

    def join_heads(self, op: ops.JoinHeads) -> None:
        parts = [self[t].reshape(len(self.token_ids), op.n_heads, -1) for t in (op.first, op.second)]
        self[op.out] = np.concatenate(parts, axis=-1).reshape(len(self.token_ids), -1)

    def rope(self, op: ops.Rope) -> None:
        x = self[op.x].reshape(len(self.token_ids), op.n_heads, op.head_dim).copy()
        n_pairs = len(op.frequencies)
        frequencies = op.frequencies.astype(np.float64)
        divisors = op.divisors_of(self.context_length)
        if divisors is not None:
            frequencies = frequencies / self.vector(divisors)
        angle = (self.positions // op.period * op.period)[:, None, None] * frequencies
        cos, sin = np.cos(angle) * op.magnitude, np.sin(angle) * op.magnitude
        if op.style == RopeStyle.NEOX:
            first, second = slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)
        else:
            first, second = slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
        a, b = x[..., first].copy(), x[..., second].copy()
        x[..., first], x[..., second] = a * cos - b * sin, a * sin + b * cos
        self[op.x] = x.reshape(len(x), -1)

    def shared_keys(self, k: Tensor, cache: ops.KVCache) -> np.ndarray:
        """Append what the last tokens of periods bring; return all."""
        new = self[k][(self.positions + 1) % cache.period == 0]
        self.keys[cache] = np.concatenate([self.keys.get(cache, np.zeros((0, k.width))), new])
        return self.keys[cache]

    def select_positions(self, op: ops.SelectPositions) -> None:
        keys = self.shared_keys(op.k, op.cache)
        q = self[op.q].reshape(len(self.token_ids), op.n_heads, -1)
        by_head = np.maximum(np.einsum("qhd,kd->qhk", q, keys), 0)
        weights = np.ones(q.shape[:2]) if op.weights is None else self[op.weights]
        scores = np.einsum("qhk,qh->qk", by_head, weights * op.scale)
        scores[np.arange(len(keys)) >= (self.positions[:, None] + 1) // op.cache.period] = -np.inf
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : op.top_k]
        is_there = np.take_along_axis(scores, chosen, -1) > -np.inf
        nothing = len(keys) + 1  # beyond the block that is not whole
        chosen = np.sort(np.where(is_there, chosen, nothing), axis=-1)
        chosen = np.pad(chosen, ((0, 0), (0, op.top_k - chosen.shape[1])), constant_values=nothing)
        if op.has_tail:
            n_before = self.positions[:, None] + 1
            own = np.where(n_before % op.cache.period, n_before // op.cache.period, nothing)
            chosen = np.concatenate([chosen, own], axis=-1)
        self[op.out] = chosen

    def select_blocks(self, op: ops.SelectBlocks) -> None:
        keys = np.concatenate([self.keys.get(op.cache, np.zeros((0, op.k.width))), self[op.k]])
        self.keys[op.cache] = keys
        n, n_blocks, now = len(self.token_ids), -(-len(keys) // op.block_size), self.positions[:, None, None]
        scores = np.einsum("qhd,kd->qhk", self[op.q].reshape(n, op.n_heads, -1), keys)
        scores = np.where(np.arange(len(keys)) > now, -np.inf, scores)
        margin = n_blocks * op.block_size - len(keys)
        scores = np.pad(scores, ((0, 0), (0, 0), (0, margin)), constant_values=-np.inf)
        scores = scores.reshape(n, op.n_heads, n_blocks, op.block_size).max(-1)
        age = now // op.block_size - np.arange(n_blocks)
        scores = np.where((age >= 0) & (age < op.n_newest), np.inf, scores)
        chosen = np.argsort(-scores, axis=-1, kind="stable")[..., : op.top_k]
        is_there = np.take_along_axis(scores, chosen, -1) > -np.inf
        chosen = np.sort(np.where(is_there, chosen, n_blocks), axis=-1)
        missing = op.top_k - chosen.shape[-1]
        self[op.out] = np.pad(chosen, ((0, 0), (0, 0), (0, missing)), constant_values=n_blocks).reshape(n, -1)

    def attention(self, op: ops.Attention) -> None:
        n, cache = len(self.token_ids), op.cache
        k = self[op.k].reshape(n, cache.n_kv_heads, cache.head_dim)
        v = k[..., : cache.value_dim] if op.v is None else self[op.v].reshape(n, cache.n_kv_heads, cache.value_dim)
        k, v = self.append(cache, k, v)
        group = op.n_heads // cache.n_kv_heads
        k, v = (np.repeat(x, group, axis=1) for x in (k, v))
        q = self[op.q].reshape(n, op.n_heads, cache.head_dim)
        scores = np.einsum("qhd,khd->hqk", q, k) * op.scale
        scores = op.cap * np.tanh(scores / op.cap) if op.cap else scores
        past, now = np.arange(len(k)), self.positions[:, None]
        hidden = past > now
        if op.window:
            hidden |= now - past >= op.window
        if op.chunk:
            hidden |= past < now // op.chunk * op.chunk
        scores[:, hidden] = -np.inf
        if op.shared_cache:
            shared = self.shared_keys(op.shared_k, op.shared_cache)
            own = np.einsum("qhd,kd->hqk", q, shared) * op.scale
            is_hidden = np.arange(len(shared)) >= (now + 1) // op.shared_cache.period
            if op.selected:
                is_hidden = is_hidden | ~(self[op.selected.blocks][:, None] == np.arange(len(shared))[:, None]).any(-1)
            own[:, is_hidden] = -np.inf
            scores = np.concatenate([scores, own], axis=-1)
            v = np.concatenate([v, np.repeat(shared[:, None, : cache.value_dim], op.n_heads, axis=1)])
        elif op.selected:
            lists = self[op.selected.blocks].reshape(n, op.selected.n_lists, 1, -1)
            is_seen = (lists == past[:, None] // op.selected.block_size).any(-1)  # [tokens, lists, positions]
            scores[~is_seen.repeat(op.n_heads // op.selected.n_lists, 1).swapaxes(0, 1)] = -np.inf
        sinks = np.full(op.n_heads, -np.inf) if op.sinks is None else self.vector(op.sinks)
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (op.n_heads, n, 1))], axis=-1)
        self[op.out] = np.einsum("hqk,khd->qhd", _softmax(scores)[..., :-1], v).reshape(n, -1)

    def append(self, cache: ops.KVCache, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put keys and values behind those of the tokens before; return all."""
        if cache in self.keys:
            before = (x[: self.positions[0]] for x in self.keys[cache])
            k, v = (np.concatenate([old, new]) for old, new in zip(before, (k, v), strict=True))
        self.keys[cache] = k, v
        return k, v

    def store_keys(self, op: ops.StoreKeys) -> None:
        n, cache = len(self.token_ids), op.cache
        k = self[op.k].reshape(n, cache.n_kv_heads, cache.head_dim)
        v = k[..., : cache.value_dim] if op.v is None else self[op.v].reshape(n, cache.n_kv_heads, cache.value_dim)
        self.append(cache, k, v)

    def carry_over(self, op: ops.CarryOver) -> None:
        kept = self.states.setdefault(op.state, {})  # by position
        new = {} if op.x is None else dict(zip(self.positions.tolist(), self[op.x], strict=True))
        if op.out is not None:
            rows = kept | new
            self[op.out] = np.array([rows.get(p - 1, np.zeros(op.width)) for p in self.positions.tolist()])
        kept.update(new)

    def compress(self, op: ops.Compress) -> None:
        period, width = op.period, op.out.width
        values, scores = self[op.values], np.zeros((len(self.token_ids), op.values.width))
        if op.scores is not None:
            scores = self[op.scores] + self.vector(op.biases).reshape(period, -1)[self.positions % period]
        if op.state in self.states:
            values, scores = (
                np.concatenate(pair) for pair in zip(self.states[op.state], (values, scores), strict=True)
            )
        self.states[op.state] = values, scores
        outs = []
        for position in self.positions:
            first, end = position // period * period, position + 1
            v, s = values[first:end, -width:], scores[first:end, -width:]
            if op.overlaps and first:
                before = slice(first - period, first)
                v, s = (np.concatenate([x[before, :width], own]) for x, own in ((values, v), (scores, s)))
            outs.append((_softmax(s.T) * v.T).sum(-1))
        self[op.out] = np.stack(outs)

    def causal_conv(self, op: ops.CausalConv) -> None:
        kernel = np.concatenate([self.vector(weight) for weight in op.weights]).reshape(op.x.width, op.kernel_size)
        before = self.states.get(op.state, np.zeros((op.n_before, op.x.width)))
        x = np.concatenate([before, self[op.x]])
        self.states[op.state] = x[len(x) - op.n_before :]
        n, step = len(self.token_ids), op.dilation
        sums = sum(x[j * step : j * step + n] * kernel[:, j] for j in range(op.kernel_size))
        sums = sums + (0 if op.bias is None else self.vector(op.bias))
        self[op.out] = _silu(sums) if op.activates else sums

    def delta_net(self, op: ops.DeltaNet) -> None:
        n, n_k, n_v = len(self.token_ids), op.n_k_heads, op.n_v_heads
        q, k = (self[t].reshape(n, n_k, -1) for t in (op.q, op.k))
        v = self[op.v].reshape(n, n_v, -1)
        if op.alpha is None:
            dt, decay = np.ones((n, n_v)), np.tile(op.decays.astype(np.float64)[:, None, None], (n, 1, 1, 1))
        else:
            x, a = self[op.alpha] + self.vector(op.dt_bias), self.vector(op.a)[:, None]
            dt, by_head = np.logaddexp(0, x), (n, n_v, -1)  # one decay for each, or one for each of its channels
            exponent = a * dt.reshape(by_head)
            if op.decay_bound:
                exponent = op.decay_bound * _sigmoid(abs(a) * x.reshape(by_head))
            decay = np.exp(exponent)[:, :, None]
        recalls = op.beta is not None
        if op.beta is not None:
            q, k = (t / np.sqrt((t**2).sum(-1, keepdims=True) + op.eps) for t in (q, k))
            q, rate, skip = q / math.sqrt(q.shape[-1]), _sigmoid(self[op.beta]), np.zeros_like(v)
        else:
            rate, skip = dt, 0 * v if op.skip is None else self.vector(op.skip)[:, None] * v
        key_head = np.arange(n_v) // (n_v // n_k) if op.grouped else np.arange(n_v) % n_k
        state = self.states.get(op.state, np.zeros((n_v, v.shape[-1], k.shape[-1])))
        outs = []
        for t in range(n):
            state = state * decay[t]
            recalled = np.einsum("hvk,hk->hv", state, k[t, key_head]) if recalls else 0
            state = state + np.einsum("hv,hk->hvk", rate[t, :, None] * (v[t] - recalled), k[t, key_head])
            outs.append((np.einsum("hvk,hk->hv", state, q[t, key_head]) + skip[t]).reshape(-1))
        self.states[op.state] = state
        self[op.out] = np.stack(outs)

    def selective_scan(self, op: ops.SelectiveScan) -> None:
        x, b, c, dt = self[op.x], self[op.b], self[op.c], np.logaddexp(0, self[op.dt])
        a, skip = self.vector(op.a).reshape(-1, op.state_size), self.vector(op.skip)
        state = self.states.get(op.state, np.zeros(a.shape))
        outs = []
        for t in range(len(x)):
            state = np.exp(a * dt[t, :, None]) * state + (dt[t] * x[t])[:, None] * b[t]
            outs.append(state @ c[t] + skip * x[t])
        self.states[op.state] = state
        self[op.out] = np.stack(outs)

    def router(self, op: ops.Router) -> None:
        logits = self[op.logits]
        scores = _SCORINGS[op.scoring](logits)
        choice = scores + (0 if op.bias is None else self.vector(op.bias))
        if op.n_groups > 1:
            groups = choice.reshape(len(choice), op.n_groups, -1)
            best = np.sort(groups, axis=-1)[..., -2:].sum(-1)
            rank = np.argsort(np.argsort(-best, axis=-1, kind="stable"), axis=-1, kind="stable")
            choice = np.where((rank < op.n_groups_used)[..., None], groups, -np.inf).reshape(choice.shape)
        ids = np.argsort(-choice, axis=-1, kind="stable")[:, : op.out.ids.width]
        if op.table is not None:
            ids = self._weights.array(op.table.name).view(np.int32).reshape(-1, op.table.n_cols)[self.token_ids]
        weights = np.take_along_axis(scores, ids, axis=-1)
        if op.scoring == Scoring.SOFTMAX_OF_CHOSEN:
            weights = _softmax(weights)
        if op.normalize:
            weights = weights / np.maximum(weights.sum(-1, keepdims=True), SMALLEST_SUM)
        self[op.out.ids], self[op.out.weights] = ids, weights * op.scale

    def group_router(self, op: ops.GroupRouter) -> None:
        ids = self[op.routing.ids].astype(int) // op.group_size
        weights = np.take_along_axis(_softmax(self[op.logits]), ids, axis=-1)
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), SMALLEST_SUM)
        self[op.out.ids], self[op.out.weights] = ids, weights

    def run_experts(self, op: ops.Experts) -> None:
        weights, biases = (op.gate, op.up, op.down), (op.gate_bias, op.up_bias, op.down_bias)
        gate, up, down = (self.matrices(w) for w in weights)
        gate_b, up_b, down_b = (
            np.zeros((w.n_experts, w.n_rows)) if b is None else self.vector(b).reshape(w.n_experts, w.n_rows)
            for w, b in zip(weights, biases, strict=True)
        )
        rows = []
        for x, ids in zip(self[op.x], self[op.routing.ids].astype(int), strict=True):
            hidden = [_activate(op, gate[e] @ x + gate_b[e], up[e] @ x + up_b[e]) for e in ids]
            rows.append(np.concatenate([down[e] @ h + down_b[e] for e, h in zip(ids, hidden, strict=True)]))
        self[op.out] = np.stack(rows)

    def combine(self, op: ops.Combine) -> None:
        expert_out = self[op.expert_out].reshape(len(self.token_ids), op.routing.ids.width, -1)
        weights = self[op.routing.weights]
        total = np.einsum("trh,tr->th", expert_out, weights if op.weighted else np.ones_like(weights))
        if op.shared is not None:
            total = total + self[op.shared] * (1 if op.shared_gate is None else _sigmoid(self[op.shared_gate]))
        self[op.out] = op.scale * total + (0 if op.residual is None else self[op.residual])

    def reduce_streams(self, op: ops.ReduceStreams) -> None:
        x, n, (first, *more) = self[op.x], op.n_streams, self.vector(op.scale)
        mixes = x / np.sqrt((x**2).mean(-1, keepdims=True) + op.eps) @ self.vector(op.matrix).reshape(-1, op.x.width).T
        base = self.vector(op.base)
        weights = _sigmoid(first * mixes[:, :n] + base[:n]) + op.offset
        self[op.out] = np.einsum("tih,ti->th", x.reshape(len(x), n, -1), weights)
        if op.gates is not None:
            found = op.magnitude * _sigmoid(more[0] * mixes[:, n : 2 * n] + base[n : 2 * n])
            self[op.gates] = found if op.mixing else found + op.offset
        if op.mixing is not None:
            kept = _softmax((more[1] * mixes[:, 2 * n :] + base[2 * n :]).reshape(-1, n, n)) + op.offset
            for i in range(2 * op.n_normalizations - 1):
                kept = kept / (kept.sum(2 if i % 2 else 1, keepdims=True) + op.offset)
            self[op.mixing] = kept.reshape(-1, n * n)

    def add_to_streams(self, op: ops.AddToStreams) -> None:
        gates, x = self[op.gates], self[op.x]
        gates = op.magnitude * _sigmoid(gates) if op.magnitude else gates
        added = gates[:, :, None] * self[op.added][:, None]
        if op.mixing is not None:
            n = op.gates.width
            x = np.einsum("tih,tij->tjh", x.reshape(len(x), n, -1), self[op.mixing].reshape(-1, n, n)).reshape(x.shape)
        self[op.out] = x + added.reshape(len(added), -1)

    def mix_residuals(self, op: ops.MixResiduals) -> None:
        x = np.stack([self[residual] for residual in op.residuals], 1)  # [tokens, residuals, columns]
        scores = x @ self.vector(op.scorer) / np.sqrt((x**2).mean(-1) + op.eps)
        self[op.out] = np.einsum("tr,trc->tc", _softmax(scores), x)

    def select_outputs(self, op: ops.SelectOutputs) -> None:
        self[op.out] = self[op.x]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _situ(gate: np.ndarray, up: np.ndarray, limit: float, up_limit: float) -> np.ndarray:
    up = up_limit * np.tanh(up / up_limit) if up_limit else up
    return limit * np.tanh(gate / limit) * _sigmoid(gate) * up


def _activate(op: ops.Experts, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if op.activation == Activation.SILU and op.limit:
        return np.minimum(_silu(gate), op.limit) * np.clip(up, -op.limit, op.limit)
    if op.activation == Activation.SILU:
        return _silu(gate) * up
    if op.activation == Activation.CLAMPED_SILU:
        return _silu(np.minimum(gate, op.limit)) * np.clip(up, -op.limit, op.limit)
    if op.activation == Activation.RELU:
        return np.maximum(gate, 0) * up
    if op.activation == Activation.GELU:
        return _gelu(gate) * up
    if op.activation == Activation.SITU:
        return _situ(gate, up, op.limit, op.up_limit)
    gate = np.minimum(gate, 7)
    return gate * _sigmoid(1.702 * gate) * (np.clip(up, -7, 7) + 1)


_GATINGS = {
    Gating.SIGMOID: _sigmoid,
    Gating.SILU: _silu,
    Gating.SOFTPLUS: lambda x: np.logaddexp(0, x),
    Gating.RELU: lambda x: np.maximum(x, 0),
    Gating.PRODUCT: lambda x: x,
    Gating.GELU: _gelu,
    Gating.CLAMPED_SILU: _silu,
    Gating.CLAMPED_SWISH: lambda x: np.minimum(x, 7) * _sigmoid(1.702 * np.minimum(x, 7)),
}


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


_SCORINGS = {
    Scoring.SOFTMAX: _softmax,
    Scoring.SIGMOID: _sigmoid,
    Scoring.SOFTMAX_OF_CHOSEN: lambda x: x,
    Scoring.SQRT_SOFTPLUS: lambda x: np.sqrt(np.logaddexp(0, x)),
}


_RUN: dict[type[ops.Operation], Callable[[ReferenceProgram, ops.Operation], None]] = {
    ops.Embed: ReferenceProgram.embed,
    ops.HashTokens: ReferenceProgram.hash_tokens,
    ops.RMSNorm: ReferenceProgram.rms_norm,
    ops.Linear: ReferenceProgram.linear,
    ops.HeadLinear: ReferenceProgram.head_linear,
    ops.Add: ReferenceProgram.add,
    ops.Scale: ReferenceProgram.scale,
    ops.SoftCap: ReferenceProgram.soft_cap,
    ops.Clamp: ReferenceProgram.clamp,
    ops.ScaleByPosition: ReferenceProgram.scale_by_position,
    ops.Gate: ReferenceProgram.gate,
    ops.GateByAgreement: ReferenceProgram.gate_by_agreement,
    ops.SplitHeads: ReferenceProgram.split_heads,
    ops.JoinHeads: ReferenceProgram.join_heads,
    ops.Rope: ReferenceProgram.rope,
    ops.SelectPositions: ReferenceProgram.select_positions,
    ops.SelectBlocks: ReferenceProgram.select_blocks,
    ops.Attention: ReferenceProgram.attention,
    ops.Compress: ReferenceProgram.compress,
    ops.StoreKeys: ReferenceProgram.store_keys,
    ops.CarryOver: ReferenceProgram.carry_over,
    ops.CausalConv: ReferenceProgram.causal_conv,
    ops.DeltaNet: ReferenceProgram.delta_net,
    ops.SelectiveScan: ReferenceProgram.selective_scan,
    ops.Router: ReferenceProgram.router,
    ops.GroupRouter: ReferenceProgram.group_router,
    ops.Experts: ReferenceProgram.run_experts,
    ops.Combine: ReferenceProgram.combine,
    ops.ReduceStreams: ReferenceProgram.reduce_streams,
    ops.AddToStreams: ReferenceProgram.add_to_streams,
    ops.MixResiduals: ReferenceProgram.mix_residuals,
    ops.SelectOutputs: ReferenceProgram.select_outputs,
}
