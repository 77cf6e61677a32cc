"""Launches of recurrent layers: causal convolution, gated delta rule, all of that for one token, scan, shared rows.

As in `kernels.py`, a function here checks what its kernel assumes and returns a `Launch`.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from engine.devices.cuda.kernels import NO_FORMS, Forms, can_gate_heads
from engine.devices.cuda.launch import (
    NOT_KEPT,
    NOTHING,
    WARP,
    Count,
    Kept,
    Launch,
    Rows,
    at,
    ceil_div,
    float32,
    int32,
    int64,
    pointer,
)
from engine.devices.graph import MOST_CONVOLVED, Gating

_CHANNELS = 256  # of a block
_CONVOLVED_AT_ONCE = 16  # tokens of a thread; `causal_conv.cu`
_ROW_LANES = 8  # that have a row of the state, or two of up to 128 values; `delta_net.cu`
_MANY_TOKENS, _MANY_ROWS = 64, 8192  # from more tokens, and so many rows on a block of it has more warps
_STEP_WARPS, _STEP_ROWS = 8, 32  # of a block, and of the state; `delta_net_step.cu`
_GATED = 256  # columns that are gated together; likewise
_MAX_KEY_DIM = 256  # or values of a state
_SCAN_THREADS = 256  # of a block of `selective_scan.cu`
_COMPRESSED = 64  # channels of a block of `compress.cu`
_SCAN_VALUES = 8  # of a state, of a lane


class _Layer(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("alpha", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("conv_weight", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("dt_bias", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("conv_state", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("n_k_heads", ctypes.c_int32),
        ("is_grouped", ctypes.c_int32),
        ("decay_bound", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
    ]


def causal_conv(
    x: Rows,
    weight: int,
    bias: int,
    state: int,
    out: Rows,
    n_channels: int,
    kernel_size: int,
    activates: bool,
    positions: int,
    slots: int,
    count: Count,
    dilation: int = 1,
    kept: Kept = NOT_KEPT,
) -> list[Launch]:
    """Convolve over time, then SiLU: few tokens one after the other, many at the same time. Not in place."""
    assert kernel_size >= 2
    assert 1 <= dilation * (kernel_size - 1) <= MOST_CONVOLVED
    n_blocks = ceil_div(n_channels, _CHANNELS)
    definitions = (f"KERNEL_SIZE={kernel_size}", f"DILATION={dilation}", f"ACTIVATES={int(activates)}")
    places = (int32(n_channels), pointer(positions), pointer(slots), pointer(count.address))
    what = (*at(x), pointer(weight), pointer(bias), pointer(state), *at(out), *places)
    if count.most <= _CONVOLVED_AT_ONCE:
        few = (*what, kept.argument)
        return [Launch("causal_conv.cu", "causal_conv", definitions, (n_blocks, 1, 1), _CHANNELS, few)]
    grid = (n_blocks, ceil_div(count.most, _CONVOLVED_AT_ONCE), 1)
    last = (*at(x), pointer(state), *places, kept.argument)
    return [
        Launch("causal_conv.cu", "convolve", definitions, grid, _CHANNELS, what),
        Launch("causal_conv.cu", "keep_inputs", definitions, (n_blocks, 1, 1), _CHANNELS, last),
    ]


def delta_net(
    q: int,
    k: int,
    v: int,
    qkv_stride: int,
    beta: Rows | None,
    alpha: Rows | None,
    a: int,
    dt_bias: int,
    skip: int,
    state: int,
    out: Rows,
    n_k_heads: int,
    n_v_heads: int,
    k_dim: int,
    v_dim: int,
    decay_dim: int,
    decay_bound: float,
    grouped: bool,
    eps: float,
    positions: int,
    slots: int,
    count: Count,
    kept: Kept = NOT_KEPT,
) -> Launch:
    """Run the gated delta rule, without beta a state-space model, or without alpha, too, lightning attention."""
    assert n_v_heads % n_k_heads == 0
    assert decay_dim in {1, k_dim}
    assert k_dim <= _MAX_KEY_DIM
    assert decay_bound == 0 or (beta is not None and decay_bound < 0)
    assert alpha is not None or not (beta or dt_bias or skip)
    assert decay_dim == 1 or beta is not None
    n_warps = 8 if count.most > _MANY_TOKENS and n_v_heads * v_dim >= _MANY_ROWS else 4
    rows = n_warps * WARP // _ROW_LANES * (2 if k_dim <= 128 else 1)
    return Launch(
        "delta_net.cu",
        "delta_net",
        (
            f"K_DIM={k_dim}",
            f"V_DIM={v_dim}",
            f"IS_DELTA={int(beta is not None)}",
            f"BY_CHANNEL={int(decay_dim > 1)}",
            f"N_WARPS={n_warps}",
        ),
        (n_v_heads, ceil_div(v_dim, rows), 1),
        n_warps * WARP,
        (
            pointer(q),
            pointer(k),
            pointer(v),
            int64(qkv_stride),
            *at(beta or NOTHING),
            *at(alpha or NOTHING),
            pointer(a),
            pointer(dt_bias),
            pointer(skip),
            pointer(state),
            *at(out),
            int32(n_k_heads),
            int32(grouped),
            float32(decay_bound),
            float32(eps),
            pointer(positions),
            pointer(slots),
            pointer(count.address),
            kept.argument,
        ),
    )


def selective_scan(
    x: Rows,
    dt: Rows,
    b: Rows,
    c: Rows,
    a: int,
    skip: int,
    state: int,
    out: Rows,
    n_channels: int,
    state_size: int,
    positions: int,
    slots: int,
    count: Count,
    kept: Kept = NOT_KEPT,
) -> Launch:
    """Run a state-space model whose channels have states and decays of their own."""
    assert 1 <= state_size <= _MAX_KEY_DIM
    n_lanes = next(n for n in (4, 8, 16, WARP) if state_size <= _SCAN_VALUES * n)
    return Launch(
        "selective_scan.cu",
        "selective_scan",
        (f"STATE_SIZE={state_size}", f"CHANNEL_LANES={n_lanes}"),
        (ceil_div(n_channels, _SCAN_THREADS // n_lanes), 1, 1),
        _SCAN_THREADS,
        (
            *at(x),
            *at(dt),
            *at(b),
            *at(c),
            pointer(a),
            pointer(skip),
            pointer(state),
            *at(out),
            int32(n_channels),
            pointer(positions),
            pointer(slots),
            pointer(count.address),
            kept.argument,
        ),
    )


def compress(
    values: Rows,
    scores: Rows | None,
    biases: int,
    state: int,
    out: Rows,
    n_channels: int,
    n_parts: int,
    period: int,
    positions: int,
    slots: int,
    count: Count,
    kept: Kept = NOT_KEPT,
) -> Launch:
    """Make rows that the tokens of a period share, channel by channel."""
    assert n_parts in {1, 2}
    assert all(rows.stride >= n_parts * n_channels for rows in (values, scores) if rows)
    assert scores is None or biases
    return Launch(
        "compress.cu",
        "compress",
        (f"N_PARTS={n_parts}",),
        (ceil_div(n_channels, _COMPRESSED), 1, 1),
        _COMPRESSED,
        (
            *at(values),
            *at(scores or NOTHING),
            pointer(biases),
            pointer(state),
            *at(out),
            int32(n_channels),
            int32(period),
            pointer(positions),
            pointer(slots),
            pointer(count.address),
            kept.argument,
        ),
    )


class DeltaNet(NamedTuple):
    """Sizes of a delta-net layer, and the device addresses of its parameters and states, all float32.

    Attributes:
        n_k_heads, n_v_heads, k_dim, v_dim, decay_dim, decay_bound, kernel_size, grouped: see `graph.DeltaNet` and
            `graph.CausalConv`.
        eps, norm_eps: of the keys and queries, and of the heads' norm.
        gating: how the heads are gated.
        conv_weight: [channels, kernel_size], the channels those of queries, keys, then values.
        a, dt_bias: [n_v_heads], [n_v_heads, decay_dim].
        norm_weight: [v_dim], or 0.
        conv_state, state: of all sequences.
    """

    n_k_heads: int
    n_v_heads: int
    k_dim: int
    v_dim: int
    decay_dim: int
    decay_bound: float
    kernel_size: int
    grouped: bool
    eps: float
    norm_eps: float
    gating: Gating
    conv_weight: int
    a: int
    dt_bias: int
    norm_weight: int
    conv_state: int
    state: int


def n_counters(n_k_heads: int, n_v_heads: int, v_dim: int) -> int:
    """Return how many words `delta_net_step` counts its blocks with."""
    return n_k_heads + ceil_div(n_v_heads * v_dim, _GATED)


def can_step(k_dim: int, v_dim: int) -> bool:
    """Return whether `delta_net_step` can take heads of these sizes."""
    return k_dim <= _MAX_KEY_DIM and can_gate_heads(v_dim)


def delta_net_step(
    x: int,
    beta: int,
    alpha: int,
    gate: int,
    net: DeltaNet,
    found: int,
    out: int,
    n_done: int,
    positions: int,
    slots: int,
    forms: Forms = NO_FORMS,
) -> Launch:
    """Do what `causal_conv`, `delta_net` and `gate` do, for one token, with the same bits.

    Addresses of float32 rows: `x` of what is convolved, `gate` and `out` of the gate and the result, `found` of the
    result before its norm. n_done: zeros in device memory, `n_counters` words.
    """
    assert net.n_v_heads % net.n_k_heads == 0
    assert can_step(net.k_dim, net.v_dim)
    assert net.gating.is_factor
    assert net.decay_dim in {1, net.k_dim}
    assert found % 16 == out % 16 == gate % 16 == 0
    parameters = (net.conv_weight, net.a, net.dt_bias, net.norm_weight)
    sizes = (net.n_k_heads, net.grouped, net.decay_bound, net.eps, net.norm_eps)
    layer = _Layer(x, beta, alpha, gate, *parameters, net.conv_state, net.state, *sizes)
    return Launch(
        "delta_net_step.cu",
        "delta_net_step",
        (
            f"K_DIM={net.k_dim}",
            f"V_DIM={net.v_dim}",
            f"BY_CHANNEL={int(net.decay_dim > 1)}",
            f"KERNEL_SIZE={net.kernel_size}",
            "DILATION=1",
            "ACTIVATES=1",
            f"GATING={int(net.gating)}",
            forms.definition,
        ),
        (net.n_v_heads, ceil_div(net.v_dim, _STEP_ROWS), 1),
        _STEP_WARPS * WARP,
        (layer, pointer(found), pointer(out), forms.argument, pointer(n_done), pointer(positions), pointer(slots)),
    )
