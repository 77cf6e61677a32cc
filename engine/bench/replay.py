"""`python -m engine.bench --replay`: what cache policies would have done with recorded routing."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.bench.table import write_file
from engine.bench.units import format_bytes
from engine.errors import ConfigError
from engine.experts.policy import POLICIES, make_policy
from engine.experts.replay import Clairvoyant, Replay, replay, static_optimum
from engine.experts.trace import Trace, load_trace
from engine.tables import parse_bytes

BELADY = "Belady, bypass"
STATIC_OPTIMUM = "best static set"
_MOST_LAG, _MOST_EXPERT_BYTES = 1_000_000, 10**12


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on one trace.

    Attributes:
        trace: the trace's name.
        policy: the policy as asked for, or the name of a bound.
        is_bound: whether it needs to know the future.
        slots: of each layer.
        experts: of each layer.
        tokens: counted.
        hit_rate: share of the choices served from slots.
        late_hit_rate: the same, of the second half of the tokens.
        cost_weighted: share of the bytes of all choices that were not read from RAM, loads being reads too.
        of_optimum: hit rate as a share of Belady's.
        swaps_per_token: experts loaded, over all layers.
        loads_per_layer: experts loaded for a token and layer.
        bytes_per_token: copied into slots; None if the size of an expert is not known.
    """

    trace: str
    policy: str
    is_bound: bool
    slots: int
    experts: int
    tokens: int
    hit_rate: float
    late_hit_rate: float
    cost_weighted: float
    of_optimum: float
    swaps_per_token: float
    loads_per_layer: float
    bytes_per_token: float | None


@dataclass(frozen=True, slots=True)
class Study:
    """All policies on one trace: rows for tables, and the replays by policy for plots."""

    trace: Trace
    rows: list[Row]
    replays: dict[str, Replay]


def study(
    trace: Trace,
    policies: Sequence[str],
    slots: str,
    *,
    ahead: bool = False,
    lag: int = 0,
    swap_bytes: float = np.inf,
    expert_bytes: npt.NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> Study:
    """Replay a trace with each policy, and with the two that know the future.

    Args:
        trace: the routing.
        policies: as `make_policy` takes them.
        slots: of each layer: a number, or a share of the experts such as `17%`.
        ahead: see `experts.replay.replay`.
        lag: likewise.
        swap_bytes: that may be copied for each token.
        expert_bytes: int64 [n_layers]; None if not known.
        progress: shows a line for each policy.

    Raises `ConfigError` for an impossible number of slots, or a policy that does not exist.
    """
    n_slots = np.full(trace.n_layers, parse_slots(slots, trace.n_experts))
    sizes = np.ones(trace.n_layers, np.int64) if expert_bytes is None else expert_bytes
    replays = {STATIC_OPTIMUM: static_optimum(trace, n_slots)}
    # Belady first: all others are compared to it.
    for name in (BELADY, *policies):
        policy = Clairvoyant(trace) if name == BELADY else make_policy(name, trace.n_layers, trace.n_experts)
        title, total = f"{trace.name}: {name}", trace.n_tokens - trace.n_prompt
        shown = _ShownProgress(progress, title, total) if progress else None
        replays[name] = replay(
            trace,
            policy,
            n_slots,
            ahead=ahead and name != BELADY,
            lag=0 if name == BELADY else lag,
            swap_bytes=np.inf if name == BELADY else swap_bytes,
            expert_bytes=sizes,
            progress=shown,
        )
    optimum = replays[BELADY].hit_rate
    rows = [
        _row(trace, name, replays[name], int(n_slots[0]), sizes, optimum, expert_bytes is not None)
        for name in (*policies, STATIC_OPTIMUM, BELADY)
    ]
    return Study(trace, rows, replays)


class _ShownProgress:
    """One line of a progress display, set by calls with the tokens done."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress, self._task = progress, progress.add_task(title, total=total)

    def __call__(self, done: int) -> None:
        self._progress.update(self._task, completed=done)


def _row(
    trace: Trace, name: str, played: Replay, n_slots: int, sizes: npt.NDArray[np.int64], optimum: float, sized: bool
) -> Row:
    half = played.n_tokens // 2
    late = played.hits_over_time[half:].sum() / max(int(played.choices_over_time[half:].sum()), 1)
    return Row(
        trace=trace.name,
        policy=name,
        is_bound=name in (BELADY, STATIC_OPTIMUM),
        slots=n_slots,
        experts=trace.n_experts,
        tokens=played.n_tokens,
        hit_rate=played.hit_rate,
        late_hit_rate=float(late),
        cost_weighted=played.saved(sizes),
        of_optimum=played.hit_rate / optimum if optimum else 0.0,
        swaps_per_token=float(played.loads.sum() / max(played.n_tokens, 1)),
        loads_per_layer=played.loads_per_layer,
        bytes_per_token=played.bytes_per_token(sizes) if sized else None,
    )


def parse_slots(text: str, n_experts: int) -> int:
    """Return the slots that `17%` or `22` means for a layer of `n_experts`; raise `ConfigError` if out of range."""
    try:
        n = round(float(text[:-1]) / 100 * n_experts) if text.endswith("%") else int(text)
    except ValueError:
        n = -1
    if not 0 <= n <= n_experts:
        raise ConfigError(f"slots {text!r}: expected a number from 0 to {n_experts}, or a share such as 17%")
    return n


def parse_policies(text: str) -> list[str]:
    """Split `lru,decayed:half_life=64,margin=1.5,static` into its policies."""
    policies: list[str] = []
    for item in filter(None, text.split(",")):
        if "=" in item and ":" not in item and policies:
            policies[-1] += f",{item}"
        else:
            policies.append(item.strip())
    return policies


def table_of(found: Study) -> Table:
    """Return the table that people see."""
    trace, rows = found.trace, found.rows
    sized = rows[0].bytes_per_token is not None
    share = rows[0].slots / trace.n_experts
    table = Table(
        title=f"{trace.name}: {rows[0].slots} of {trace.n_experts} experts ({share:.0%}) in each of {trace.n_layers} "
        f"layers, top-{trace.n_experts_used}, {rows[0].tokens} tokens",
        title_justify="left",
    )
    table.add_column("policy", overflow="fold")
    for name in ("hits", "late", "net", "of best", "swaps", "loads", *(["copied"] if sized else [])):
        table.add_column(name, justify="right", no_wrap=True)
    bounds_begin = len(rows) - 2
    for i, row in enumerate(rows):
        cells = [
            row.policy,
            f"{row.hit_rate:.1%}",
            f"{row.late_hit_rate:.1%}",
            f"{row.cost_weighted:.1%}",
            f"{row.of_optimum:.0%}",
            f"{row.swaps_per_token:.1f}",
            f"{row.loads_per_layer:.2f}",
        ]
        if row.bytes_per_token is not None:
            cells.append(format_bytes(row.bytes_per_token))
        table.add_row(*cells, style="dim" if row.is_bound else None, end_section=i == bounds_begin - 1)
    return table


LEGEND = (
    "hits: share of choices served from slots; late: in the second half; net: share of expert bytes not read from RAM, "
    "loads being reads too; of best: hits as a share of Belady's; swaps, copied: a token, over all layers; loads: a "
    "token and layer. The last two rows know the future."
)


def add_arguments(parser: argparse.ArgumentParser, modes: argparse._MutuallyExclusiveGroup) -> None:
    """Add the options of a replay: its own mode, and settings. `run` also wants --json, --csv and --plot."""
    modes.add_argument("--replay", nargs="+", metavar="TRACE", help="routing traces (npz) to play against policies")
    group = parser.add_argument_group("replay of recorded routing")
    group.add_argument(
        "--policy",
        default=",".join(POLICIES),
        help=f"comma-separated: {', '.join(POLICIES)}; settings after a colon, as in decayed:half_life=64,margin=1.5",
    )
    group.add_argument("--slots", default="17%", help="expert slots of each layer, a number or a share (default 17%%)")
    group.add_argument("--ahead", action="store_true", help="let swaps be made between the layers of one token")
    group.add_argument("--lag", type=int, default=0, metavar="N", help="tokens by which swaps are late (default 0)")
    group.add_argument("--expert-bytes", metavar="SIZE", help="bytes of one expert, for example 5.3MB")
    group.add_argument("--swap-budget", metavar="SIZE", help="bytes that may be copied into slots for each token")


def run(args: argparse.Namespace, out: Console, console: Console) -> None:
    """Do the replay that the options ask for: the tables to `out`, progress to `console`.

    Raises `ConfigError` for what cannot be read or played, `RequestError` for what cannot be written.
    """
    policies = parse_policies(args.policy)
    if not policies:
        raise ConfigError(f"--policy {args.policy!r} names no policy; there are {', '.join(POLICIES)}")
    if args.swap_budget and not args.expert_bytes:
        raise ConfigError("--swap-budget needs --expert-bytes, the size of one expert")
    if not 0 <= args.lag <= _MOST_LAG or (args.lag and args.ahead):
        raise ConfigError(f"--lag {args.lag}: expected 0 to {_MOST_LAG} tokens, and 0 with --ahead")
    swap_bytes = float(parse_bytes(args.swap_budget, "--swap-budget")) if args.swap_budget else np.inf
    expert_bytes = parse_bytes(args.expert_bytes, "--expert-bytes") if args.expert_bytes else None
    if expert_bytes is not None and expert_bytes > _MOST_EXPERT_BYTES:
        raise ConfigError(f"--expert-bytes is {args.expert_bytes!r}; expected the size of one expert, 1 TB at most")
    traces = [load_trace(path) for path in args.replay]
    studies = []
    with Progress(console=console, transient=True, disable=args.quiet or not console.is_terminal) as progress:
        for trace in traces:
            sizes = None
            if expert_bytes is not None:
                sizes = np.full(trace.n_layers, expert_bytes, np.int64)
            studies.append(
                study(
                    trace,
                    policies,
                    args.slots,
                    ahead=args.ahead,
                    lag=args.lag,
                    swap_bytes=swap_bytes,
                    expert_bytes=sizes,
                    progress=progress,
                )
            )
    for found in studies:
        out.print(table_of(found))
    out.print(LEGEND)
    write_rows([row for found in studies for row in found.rows], args.json, args.csv)
    if args.plot:
        from engine.bench.plots import plot_replays  # noqa: PLC0415 - matplotlib is optional and slow to import

        plot_replays(studies, args.plot)


def write_rows(rows: Sequence[Row], json_path: Path | None, csv_path: Path | None) -> None:
    """Write rows as JSON, CSV or both. Raises `RequestError` if a file cannot be written."""
    if json_path:
        write_file(json_path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if csv_path:
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        write_file(csv_path, out.getvalue())
