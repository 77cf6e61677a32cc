"""Every kernel launch: which file, specialised how, with which grid and arguments.

A function here checks what its kernel assumes and returns a `Launch`; nothing runs. The vocabulary is in `launch.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.devices import graph
from engine.devices.cuda.launch import (
    MOST_SHARED,
    NOTHING,
    ONE_HEAD,
    WARP,
    WITH_CODES,
    WITH_MINIMUM,
    Count,
    ExpertMatrix,
    Heads,
    Launch,
    Matrix,
    OfFormat,
    Rows,
    at,
    ceil_div,
    float32,
    int32,
    int64,
    pack_expert_matrix,
    pack_matrices,
    pointer,
)
from engine.devices.graph import Gating, Scoring
from engine.errors import DeviceError
from engine.quants.formats import Activation, QuantFormat

N_WARPS = 4  # of a block that multiplies rows; `linear.cu`, `expert_*.cu`

LANE = 8  # columns that a lane takes; `residual.cu`, `gate.cu`
_EXPERT_COLUMNS = 4  # of the experts' sum that a thread takes; `residual.cu`

_STAGES = 2  # chunks of weights on the way or in use; `rows.cuh`, as all below
_FLOAT_STAGES = 4
_FLOAT_COLUMNS, _FLOAT_ROWS = 512, 2  # of a piece
_MULTIPROCESSORS = 128  # of the largest GPUs, about
_WARPS_WANTED = 1536  # that multiply rows: about what is at work at the same time on the largest GPUs
_FLOAT_WARPS_WANTED = 2112
_MAX_ROWS_PER_WARP = 16
_RECORDS_BYTES = 40 << 10  # most shared memory for activations of several tokens
_NORMED_COLUMNS = 4 * N_WARPS * WARP * LANE  # of a row that each block normalises for itself; `norm_and_route.cu`
_THIRD_BYTES = 75 << 10  # for a block where there are three


class _RowsOf(ctypes.Structure):
    _fields_ = [
        ("row_bytes", ctypes.c_int64),
        ("grid", ctypes.c_void_p),
        ("rows_per_warp", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


class _Forms(ctypes.Structure):
    _fields_ = [
        ("q256", ctypes.c_void_p),
        ("q32", ctypes.c_void_p),
        ("q256_row_bytes", ctypes.c_int64),
        ("q32_row_bytes", ctypes.c_int64),
    ]


class _Sent(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("to", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
    ]


class _Exchange(ctypes.Structure):
    _fields_ = [
        ("missing_ids", ctypes.c_void_p),
        ("requested", ctypes.c_void_p),
        ("answered", ctypes.c_void_p),
        ("abandoned", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("n_misses", ctypes.c_void_p),
        ("layer", ctypes.c_int32),
        ("n_layers", ctypes.c_int32),
    ]


class _Routing(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("n_used", ctypes.c_int32),
        ("n_groups_used", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("n_vocab", ctypes.c_int32),
    ]


class _Experts(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("answers", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("shared_stride", ctypes.c_int64),
        ("shared_gate", ctypes.c_void_p),
        ("shared_gate_stride", ctypes.c_int64),
        ("exchange", _Exchange),
        ("scale", ctypes.c_float),
        ("chosen_early", ctypes.c_int32),
    ]


def rows_per_warp(weight_format: QuantFormat, n_cols: int, n_rows: int, n_tokens: int = 1) -> int:
    """Return how many rows a warp takes: as many as leave enough warps for the whole GPU."""
    most = _MAX_ROWS_PER_WARP
    if weight_format.activation == Activation.F32:
        return max(_FLOAT_ROWS, min(ceil_div(n_rows, _FLOAT_WARPS_WANTED), most // n_tokens))
    wanted = ceil_div(n_rows, _WARPS_WANTED)
    n_blocks = n_cols // weight_format.block_size

    def wasted(rows: int) -> tuple[float, int]:
        n_items = rows * n_blocks
        return ceil_div(n_items, WARP) * WARP / n_items, abs(rows - wanted)

    nearby = range(max(1, wanted // 2), max(1, min(2 * wanted, most)) + 1)
    return min(nearby, key=wasted) if wanted <= most else most  # leaves the fewest lanes without work


def _row_warps(weight_format: QuantFormat, n_wanted: int, most: int) -> int:
    """Return how many warps of a block take rows: with float weights, whose rows are long, few for few rows."""
    if weight_format.activation != Activation.F32:
        wanted = N_WARPS
    else:
        wanted = next((n for n in (4, 2) if n_wanted >= n * _MULTIPROCESSORS), 1)
    return next((n for n in (4, 2) if n <= min(wanted, most)), 1)


def _round_up_128(n_bytes: int) -> int:
    return ceil_div(n_bytes, 128) * 128


def _chunk(weight_format: QuantFormat) -> int:
    """Return the blocks that a warp takes together; `RowDots::CHUNK`."""
    return WARP * (1 if weight_format.block_size == 256 else 4)


def _warp_bytes(weight_format: QuantFormat, rows: int, n_cols: int, n_tokens: int = 1) -> int:
    """Return the shared memory of a warp of so many rows; `RowDots::scratch_bytes`."""
    size, n_bytes = weight_format.block_size, weight_format.block_bytes
    if weight_format.activation == Activation.F32:
        return _FLOAT_STAGES * _FLOAT_ROWS * ((_FLOAT_COLUMNS // size * n_bytes + 45) // 16 * 16)
    chunk, term = _chunk(weight_format), 16 if weight_format.name in WITH_MINIMUM else 8
    n_chunks = ceil_div(rows * (n_cols // size), chunk)
    most_kept = ((4 if size == 256 else 6) + n_tokens // 2) // n_tokens  # `CHUNKS_KEPT`
    terms = n_tokens * (min(most_kept, n_chunks) * chunk + rows) * term
    return _round_up_128(min(_STAGES, n_chunks) * _round_up_128(chunk * n_bytes + 16) + terms)


def _pair_bytes(n_cols: int) -> int:
    """Return the shared memory of a block with two float32 rows; `RowPair::BYTES`."""
    return 3 * 4 * (n_cols // 64 * 68)


def _can_pair(weight_format: QuantFormat, n_cols: int) -> bool:
    """Return whether a block can take two rows of a matrix as `row_pair.cuh` does."""
    return weight_format.name == "F32" and n_cols % 64 == 0 and n_cols >= 256 and _pair_bytes(n_cols) <= MOST_SHARED


def _records_bytes(activation: Activation, n_cols: int, n_tokens: int) -> int:
    """Return the shared memory of activations; `Record`."""
    if activation == Activation.F32:
        return ceil_div(4 * n_tokens * n_cols, 16) * 16
    size, record = (256, 304) if activation == Activation.Q8_256 else (32, 48)
    return n_tokens * _round_up_128(n_cols // size * (record + 4))


def _tokens_at_once(weight_format: QuantFormat, n_cols: int, most: int) -> int:
    """Return how many tokens share a reading of the weights: as many as shared memory has room for, of float weights.

    Of integers there are at most four: of eight, what is read from shared memory takes as long as twice four. And it is
    two, if four would leave a multiprocessor of the GPUs that have most shared memory less than three blocks.
    """
    activation = weight_format.activation

    def fits(n: int) -> bool:
        records = _records_bytes(activation, n_cols, n)
        if activation == Activation.F32:
            return records <= _RECORDS_BYTES
        needed = records + N_WARPS * _warp_bytes(weight_format, _MAX_ROWS_PER_WARP, n_cols, n)
        return needed <= (MOST_SHARED if n == 2 else _THIRD_BYTES)

    sizes = (2, 4, 8) if activation == Activation.F32 else (2, 4)
    fitting = [1, *filter(fits, sizes)]
    return next((n for n in fitting if n >= most), fitting[-1])


# -- matrix products --------------------------------------------------------------------------------------------------


def activation_bytes(activation: Activation, n_cols: int) -> int:
    """Return the bytes of an activation row; layout in `common.cuh`, the same as on the CPU."""
    if activation == Activation.F32:
        return ceil_div(4 * n_cols, 64) * 64
    group = 256 if activation == Activation.Q8_256 else 32
    return sum(ceil_div(n, 64) * 64 for n in (n_cols, n_cols // group * 4, n_cols // 16 * 2))


def quantize(x: Rows, n_cols: int, activation: Activation, out: Rows, rows_per_token: int, count: Count) -> Launch:
    """Put float32 rows into the form of an integer format; `out.stride` is in bytes."""
    assert activation != Activation.F32
    group = 256 if activation == Activation.Q8_256 else 32
    assert n_cols % group == 0
    assert out.address % 64 == 0
    assert out.stride % 64 == 0
    return Launch(
        "quantize.cu",
        "quantize",
        (f"GROUP={group}",),
        (count.most * rows_per_token, ceil_div(n_cols, 1024), 1),
        4 * WARP,
        (*at(x), int32(n_cols), *at(out), int32(rows_per_token), pointer(count.address)),
    )


def can_join(a: QuantFormat, b: QuantFormat) -> bool:
    """Return whether `linear` can multiply matrices of both formats in one launch: they take the same activations."""
    return a.activation == b.activation != Activation.F32 and (a.name in WITH_CODES) == (b.name in WITH_CODES)


def linear(
    x: Rows,
    n_cols: int,
    weight_format: QuantFormat,
    matrices: Sequence[Matrix],
    grid: int,
    count: Count,
    heads: Heads = ONE_HEAD,
    routed: Routed | None = None,
    normed: Normed | None = None,
    second: OfFormat | None = None,
) -> Launch:
    """Multiply several matrices with the same activation rows; `x.stride` is in bytes.

    They are of one format, with a `second` of two, see `can_join`. With several heads the one matrix is the first
    head's, as is `x`. With `routed` the same launch chooses experts from what some matrix gives, see `can_route`; with
    `normed`, too, it makes x before that, see `can_normalize`.
    """
    assert n_cols % 4 or x.address % 16 == x.stride % 16 == heads.x_bytes % 16 == 0
    parts = [OfFormat(weight_format, matrices, grid), *([second] if second else [])]
    assert second is None or (routed is None and can_join(weight_format, second.format))
    n_tokens = min(_tokens_at_once(part.format, n_cols, count.most) for part in parts)
    n_rows = sum(matrix.n_rows for part in parts for matrix in part.matrices)
    per_warp = [rows_per_warp(part.format, n_cols, n_rows, n_tokens) for part in parts]
    records = _records_bytes(weight_format.activation, n_cols, n_tokens)
    of_warp = max(_warp_bytes(part.format, n, n_cols, n_tokens) for part, n in zip(parts, per_warp, strict=True))
    n_wanted = ceil_div(n_rows, min(per_warp))
    row_warps = _row_warps(weight_format, n_wanted, (MOST_SHARED - records) // of_warp)
    packed, n_blocks = pack_matrices([(part, row_warps * n) for part, n in zip(parts, per_warp, strict=True)], heads)
    shared = records + row_warps * of_warp
    is_short = heads == ONE_HEAD and count.most == row_warps == 1 and per_warp == [_FLOAT_ROWS]
    pair_columns = n_cols if is_short and _can_pair(weight_format, n_cols) else 0
    if pair_columns:
        shared = _pair_bytes(n_cols)
    shape = f"ROW_WARPS={row_warps}", f"PAIR_COLUMNS={pair_columns}"
    rows = [_RowsOf(part.format.row_bytes(n_cols), part.grid, n) for part, n in zip(parts, per_warp, strict=True)]
    if routed is not None:
        assert heads == ONE_HEAD
        assert count.most <= n_tokens
        shared = max(shared, N_WARPS * routed.routing.scratch_bytes)
        compiled = (f"FORMAT={weight_format.name}", *shape, *routed.routing.definitions)
        if normed is not None:
            assert can_normalize(weight_format, n_cols, count.most)
            return Launch(
                "norm_and_route.cu",
                "norm_and_route",
                (*compiled, normed.forms.definition, f"N_COLS={n_cols}", f"THREADS={N_WARPS * WARP}"),
                (n_blocks + 1, 1, 1),
                N_WARPS * WARP,
                (packed, *rows, *normed.arguments, *routed.arguments, pointer(count.address)),
                shared,
            )
        return Launch(
            "linear.cu",
            "linear_and_route",
            (*compiled, f"N_TOKENS={n_tokens}"),
            (n_blocks, 1, 1),
            N_WARPS * WARP,
            (packed, *rows, *at(x), int32(n_cols), *routed.arguments, pointer(count.address)),
            shared,
        )
    formats = [f"{key}={part.format.name}" for key, part in zip(("FORMAT", "SECOND"), parts, strict=False)]
    return Launch(
        "linear.cu",
        "linear",
        (*formats, f"N_TOKENS={n_tokens}", *shape, "N_EXPERTS=0"),
        (n_blocks, ceil_div(count.most, n_tokens), heads.n),
        N_WARPS * WARP,
        (
            packed,
            rows[0],
            rows[-1],
            int64(heads.weight_bytes),
            *at(x),
            int64(heads.x_bytes),
            int32(n_cols),
            pointer(count.address),
        ),
        shared,
    )


def can_normalize(weight_format: QuantFormat, n_cols: int, most: int) -> bool:
    """Return whether `linear` can make the activations itself before it chooses experts."""
    return most == 1 and weight_format.activation == Activation.F32 and n_cols <= _NORMED_COLUMNS


def can_route(weight_format: QuantFormat, n_cols: int, most: int) -> bool:
    """Return whether `linear` can choose experts for so many tokens: they must share one reading of the weights."""
    return most <= _tokens_at_once(weight_format, n_cols, most)


def _no_expert(like: ExpertMatrix) -> ExpertMatrix:
    return ExpertMatrix(0, 0, like.format)


def expert_gate_up(
    ids: int,
    slots: int,
    n_used: int,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    x_gate: Rows,
    x_up: Rows,
    hidden_size: int,
    ffn_size: int,
    h: int,
    grids: tuple[int, int],
    activation: graph.Activation,
    limit: float,
    up_limit: float,
    count: Count,
    shared: tuple[ExpertMatrix, ExpertMatrix] | None = None,
) -> Launch:
    """First half of the resident experts, and of a shared expert, which has gate and up of the same formats and sizes.

    h is float32 [tokens * (n_used + 1 for the shared expert), ffn_size], activation strides are in bytes.
    """
    # Of two matrices, but half of the experts may have no slot.
    per_warp = rows_per_warp(gate.format, hidden_size, ffn_size * n_used)
    gate_form, up_form = ((f.format.activation, f.format.name in WITH_CODES) for f in (gate, up))
    forms = [gate_form] if x_gate == x_up and gate_form == up_form else [gate_form, up_form]
    return Launch(
        "expert_gate_up.cu",
        "expert_gate_up",
        (
            f"GATE_FORMAT={gate.format.name}",
            f"UP_FORMAT={up.format.name}",
            f"ACTIVATION={int(activation)}",
            f"LIMIT={limit}f",
            f"UP_LIMIT={up_limit}f",
        ),
        (ceil_div(ffn_size, N_WARPS // 2 * per_warp), count.most * (n_used + (shared is not None)), 1),
        N_WARPS * WARP,
        (
            pointer(ids),
            pointer(slots),
            int32(n_used),
            pack_expert_matrix(gate, hidden_size),
            pack_expert_matrix(up, hidden_size),
            *(pack_expert_matrix(matrix, hidden_size) for matrix in shared or (_no_expert(gate), _no_expert(up))),
            *at(x_gate),
            *at(x_up),
            int32(hidden_size),
            int32(ffn_size),
            pointer(h),
            pointer(grids[0]),
            pointer(grids[1]),
            int32(per_warp),
            pointer(count.address),
        ),
        sum(_records_bytes(form, hidden_size, 1) for form, _ in forms)
        + N_WARPS * max(_warp_bytes(matrix.format, per_warp, hidden_size) for matrix in (gate, up)),
    )


def expert_down(
    ids: int,
    slots: int,
    n_used: int,
    down: ExpertMatrix,
    h: int,
    hidden_size: int,
    ffn_size: int,
    out: Rows,
    grid: int,
    count: Count,
    shared: tuple[ExpertMatrix, Rows] | None = None,
    *,
    all_resident: bool = False,
) -> Launch:
    """Second half of the resident experts, and of a shared one: its matrix, and where its result goes.

    `all_resident` says that no choice is left to the CPU.
    """
    assert h % 16 == 0
    n_hits = n_used if all_resident else ceil_div(n_used, 2)
    per_warp = rows_per_warp(down.format, ffn_size, hidden_size * n_hits)
    shared_down, shared_out = shared or (_no_expert(down), NOTHING)
    return Launch(
        "expert_down.cu",
        "expert_down",
        (f"DOWN_FORMAT={down.format.name}",),
        (ceil_div(hidden_size, N_WARPS * per_warp), count.most * (n_used + (shared is not None)), 1),
        N_WARPS * WARP,
        (
            pointer(ids),
            pointer(slots),
            int32(n_used),
            pack_expert_matrix(down, ffn_size),
            pack_expert_matrix(shared_down, ffn_size),
            pointer(h),
            int32(hidden_size),
            int32(ffn_size),
            *at(out),
            *at(shared_out),
            pointer(grid),
            int32(per_warp),
            pointer(count.address),
        ),
        _records_bytes(down.format.activation, ffn_size, 1) + N_WARPS * _warp_bytes(down.format, per_warp, ffn_size),
    )


# -- what is between the products ------------------------------------------------------------------------------------


class Forms(NamedTuple):
    """Where activation rows go that are made beside a float32 result; strides in bytes, None for those not wanted."""

    q256: Rows | None = None
    q32: Rows | None = None

    @property
    def definition(self) -> str:
        """Return what the kernel is compiled for."""
        return f"FORMS={(self.q256 is not None) + 2 * (self.q32 is not None)}"

    @property
    def argument(self) -> Any:
        """Return the kernel's argument."""
        q256, q32 = self.q256 or NOTHING, self.q32 or NOTHING
        return _Forms(q256.address, q32.address, q256.stride, q32.stride)


NO_FORMS = Forms()


class Normed(NamedTuple):
    """A row that is made by the launch that multiplies it, and beside it what else `residual` makes of one token.

    Attributes:
        a, b, total: what is added up, and where the sum goes.
        weight: of the norm, 0 if all are 1.
        eps: of the norm.
        out, forms: where the norm goes.
    """

    a: Rows
    b: Rows
    total: Rows
    weight: int
    eps: float
    out: Rows
    forms: Forms = NO_FORMS

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the kernel's arguments."""
        addresses = (self.a.address, self.b.address, self.total.address, self.weight, self.out.address)
        assert all(address % 16 == 0 for address in addresses)
        before = (pointer(address) for address in addresses[:4])
        return (*before, float32(self.eps), pointer(self.out.address), self.forms.argument)


class Combined(NamedTuple):
    """What a layer's experts add to the residual stream: experts in rank order, and the shared expert.

    Attributes:
        out: float32 [tokens, n_used, n_cols].
        exchange: where the answers for experts without a slot come from; None if all have one.
        ids, slots: who was chosen, and where they are.
        weights: 0 if all are 1.
        n_used: experts of a token.
        shared, shared_gate: None if there is none, or it is ungated.
        scale: of all of it.
        chosen_early: ids, slots and weights are older than the kernel before.
    """

    out: Rows
    exchange: Exchange | None
    ids: int
    slots: int
    weights: int
    n_used: int
    shared: Rows | None = None
    shared_gate: Rows | None = None
    scale: float = 1.0
    chosen_early: bool = False


def check_width(n_cols: int) -> None:
    """Raise `DeviceError` for rows that a lane's columns do not divide."""
    if n_cols % LANE:
        raise DeviceError(
            f"this model has rows of {n_cols} values; on a GPU they must be a multiple of {LANE}; "
            'set [engine] device = "cpu"'
        )


def residual(
    a: Rows,
    added: Rows | Combined | None,
    total: Rows,
    n_cols: int,
    count: Count,
    weight: int = 0,
    eps: float = 0.0,
    out: Rows | None = None,
    forms: Forms = NO_FORMS,
    *,
    centers: bool = False,
    bias: int = 0,
) -> Launch:
    """Add to the residual stream, a + added = total (without `added`: a, and `total` is not written); normalise that.

    `weight` and `bias` may be 0; without `out` nothing is normalised. centers: see `graph.RMSNorm`.
    """
    combined = added if isinstance(added, Combined) else Combined(NOTHING, None, 0, 0, 0, 0)
    shared, shared_gate = combined.shared or NOTHING, combined.shared_gate or NOTHING
    plain = added if isinstance(added, Rows) else NOTHING
    rows = (a, plain, total, out or NOTHING, combined.out, shared)
    check_width(n_cols)
    assert all(r.address % 16 == 0 and r.stride % 4 == 0 for r in rows)
    assert weight % 16 == 0
    assert bias % 16 == 0
    has_experts = isinstance(added, Combined)
    n_warps = min(ceil_div(n_cols, (_EXPERT_COLUMNS if has_experts else LANE) * WARP), 32)
    return Launch(
        "residual.cu",
        "residual",
        (
            f"SOURCE={0 if added is None else 2 if has_experts else 1}",
            f"N_USED={combined.n_used}",
            f"NORMALIZE={int(out is not None)}",
            f"CENTER={int(centers)}",
            forms.definition,
            f"N_COLS={n_cols}",
            f"THREADS={n_warps * WARP}",
        ),
        (1, count.most, 1),
        n_warps * WARP,
        (
            *at(a),
            *at(plain),
            _Experts(
                *combined.out,
                combined.exchange.answers if combined.exchange else 0,
                combined.ids,
                combined.slots,
                combined.weights,
                *shared,
                *shared_gate,
                combined.exchange.argument if combined.exchange else _Exchange(),
                combined.scale,
                combined.chosen_early,
            ),
            *at(total),
            pointer(weight),
            pointer(bias),
            float32(eps),
            *at(out or NOTHING),
            forms.argument,
            pointer(count.address),
        ),
        n_cols * 4 if has_experts and out is not None else 0,
    )


def can_gate_heads(head_size: int) -> bool:
    """Return whether `gate` can normalise heads of that size."""
    return 8 <= head_size <= 256 and head_size & (head_size - 1) == 0


class GateOf(NamedTuple):
    """A gate: float32 rows that begin with the first head's, the values of a head, and from one head to the next.

    With `per_head` there is one value for `width` columns. limit, own_limit: see `graph.Gate`.
    """

    gating: Gating
    x: Rows
    width: int
    step: int
    per_head: bool = False
    limit: float = 0.0
    own_limit: float = 0.0


def gate(
    x: Rows,
    by: GateOf,
    out: Rows,
    n_cols: int,
    count: Count,
    forms: Forms = NO_FORMS,
    head_size: int = 0,
    weight: int = 0,
    eps: float = 0.0,
    n_streams: int = 1,
) -> Launch:
    """Multiply by a function of a gate; with a `head_size`, x is normalised head by head before that.

    With more than one stream of `n_cols` in x they are added up.
    """
    for width in (n_cols, by.width):
        check_width(width)
    assert by.per_head or by.step % 4 == 0
    assert all(r.address % 16 == 0 and r.stride % 4 == 0 for r in ((x, out) if by.per_head else (x, by.x, out)))
    assert weight % 16 == 0
    assert head_size == 0 or (can_gate_heads(head_size) and n_cols % head_size == 0)
    assert n_streams == 1 or (head_size == 0 and by.width == n_streams * n_cols)
    return Launch(
        "gate.cu",
        "gate",
        (
            f"GATING={int(by.gating)}",
            f"LIMIT={by.limit}f",
            f"OWN_LIMIT={by.own_limit}f",
            f"PER_HEAD={int(by.per_head)}",
            f"HEAD_SIZE={head_size}",
            f"N_STREAMS={n_streams}",
            forms.definition,
        ),
        (ceil_div(n_cols, 4 * WARP * LANE), count.most, 1),
        4 * WARP,
        (
            *at(x),
            *at(by.x),
            int32(by.width),
            int32(by.step),
            pointer(weight),
            float32(eps),
            *at(out),
            forms.argument,
            int32(n_cols),
            pointer(count.address),
        ),
    )


# -- the choice of experts -------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """How experts are chosen, see `router.cuh`: logits float32 rows, ids int32 and weights float32 [tokens, n_used].

    With a `table`, int32 [n_vocab, n_used], by `token_ids`.
    """

    logits: Rows
    bias: int
    ids: int
    weights: int
    n_experts: int
    n_used: int
    scoring: Scoring
    n_groups: int
    n_groups_used: int
    normalize: bool
    scale: float
    table: int = 0
    token_ids: int = 0
    n_vocab: int = 0

    @property
    def argument(self) -> Any:
        """Return the kernels' argument."""
        assert not self.table or (self.token_ids and self.n_vocab and not self.bias and self.n_groups == 1)
        assert self.n_used <= self.n_experts
        assert self.n_experts % (4 * WARP) or self.logits.address % 16 == 4 * self.logits.stride % 16 == 0
        assert self.n_experts % self.n_groups == 0
        assert self.n_groups == 1 or self.n_used <= self.n_experts // self.n_groups * self.n_groups_used
        return _Routing(
            *self.logits,
            self.bias,
            self.ids,
            self.weights,
            self.table,
            self.token_ids,
            self.n_used,
            self.n_groups_used,
            self.normalize,
            self.scale,
            self.n_vocab,
        )

    @property
    def definitions(self) -> tuple[str, ...]:
        """Return what the choice is compiled for."""
        return f"N_EXPERTS={self.n_experts}", f"SCORING={int(self.scoring)}", f"N_GROUPS={self.n_groups}"

    @property
    def scratch_bytes(self) -> int:
        """Return the shared memory of a warp that chooses."""
        return 8 * (self.n_experts + self.n_groups) + 4 * self.n_used


class Routed(NamedTuple):
    """A choice that is made in the launch that computes its logits.

    Attributes:
        routing: the choice.
        n_done: address of a zero in device memory.
        asked: who has a slot, what is sent, and to where; None if nobody is asked.
    """

    routing: Routing
    n_done: int
    asked: Asked | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the kernel's arguments."""
        nobody = (pointer(0), _Sent(), _Sent(), _Exchange())
        return (self.routing.argument, pointer(self.n_done), *(self.asked.arguments if self.asked else nobody))


def router(routing: Routing, count: Count) -> Launch:
    """Choose experts."""
    assert routing.scratch_bytes <= 48 << 10
    return Launch(
        "router.cu",
        "router",
        routing.definitions,
        (1, count.most, 1),
        WARP,
        (routing.argument, pointer(count.address)),
        routing.scratch_bytes,
    )


def group_router(
    logits: Rows, ids: int, group_ids: int, weights: int, n_experts: int, n_used: int, group_size: int, count: Count
) -> Launch:
    """Choose the experts that groups of `group_size` share."""
    return Launch(
        "group_router.cu",
        "group_router",
        (),
        (1, count.most, 1),
        WARP,
        (
            *at(logits),
            pointer(ids),
            pointer(group_ids),
            pointer(weights),
            int32(n_experts),
            int32(n_used),
            int32(group_size),
            pointer(count.address),
        ),
    )


# -- misses -----------------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """Device addresses of what a layer shares with the CPU; see `handshake.cuh`.

    `x` is where activations go, by the form of their rows. The last three are what a guess has in place of
    `missing_ids`, `requested` and `n_misses`.
    """

    missing_ids: int
    x: Mapping[Activation, int]
    answers: int
    requested: int
    answered: int
    abandoned: int
    step: int  # in device memory, as is n_misses
    n_misses: int
    n_layers: int
    layer: int = 0
    guessed_ids: int = 0
    guessed: int = 0
    n_guessed: int = 0

    @property
    def of_guess(self) -> Exchange:
        """Return where a guess of the layer's request goes: what is like a request, but that nobody waits for it."""
        return self._replace(missing_ids=self.guessed_ids, requested=self.guessed, n_misses=self.n_guessed)

    @property
    def argument(self) -> Any:
        """Return the kernels' argument."""
        words = (self.requested, self.answered, self.abandoned, self.step, self.n_misses)
        return _Exchange(self.missing_ids, *words, self.layer, self.n_layers)


class Asked(NamedTuple):
    """What the CPU is asked with.

    Attributes:
        slots: of the experts.
        x: activation rows of `n_cols` in the forms that gate and up take, one or two; strides in bytes.
        n_cols: values in a row.
        exchange: where they go.
    """

    slots: int
    x: Mapping[Activation, Rows]
    n_cols: int
    exchange: Exchange

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the kernels' arguments."""
        sent = []
        for activation, rows in self.x.items():
            n_bytes = activation_bytes(activation, self.n_cols)
            assert rows.address % 16 == rows.stride % 16 == 0
            sent.append(_Sent(*rows, self.exchange.x[activation], n_bytes))
        return (pointer(self.slots), *sent, *[_Sent()] * (2 - len(sent)), self.exchange.argument)


def publish_misses(ids: int, n_used: int, asked: Asked, count: Count) -> Launch:
    """Ask the CPU for the experts that have no slot."""
    slots, *what = asked.arguments
    arguments = (pointer(ids), slots, int32(n_used), *what, pointer(count.address))
    return Launch("handshake.cu", "publish_misses", (), (1, 1, 1), 512, arguments)


def publish_end(exchange: Exchange) -> Launch:
    """Tell the CPU that it will be asked for nothing more in this step."""
    end = exchange._replace(layer=exchange.n_layers)
    return Launch("handshake.cu", "publish_end", (), (1, 1, 1), 1, (end.argument,))
