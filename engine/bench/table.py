"""A bench report: for people as a table, for programs as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from engine import machine
from engine.bench.measure import Placed, Row, Spread
from engine.cli.command import program_version
from engine.errors import RequestError
from engine.files import whole_file


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one bench run found.

    Attributes:
        facts: of machine, program and model, for the header; in reading order.
        rows: one for each way of running and prompt length.
        notes: what a reader must know.
    """

    facts: dict[str, str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def machine_facts() -> dict[str, str]:
    """Return what this machine and program are."""
    facts = {
        "machine": f"{machine.cpu_name()}, {machine.n_physical_cores()} cores, {machine.ram_bytes() / 1e9:.0f} GB RAM",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "version": program_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    commit = _commit()
    if commit:
        facts["commit"] = commit
    return facts


def _commit() -> str:
    """Return the commit of this checkout, marked if there are changes; empty if it is none."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git: the report is only a little poorer
        return ""


# -- the lines of the table: what it is, and its text for a row of the report (empty: nothing to say) ------------------


def _spread(value: Spread) -> str:
    """Return the median and, below it, the lowest and the highest."""
    text = _figure(value.median)
    return text if value.low == value.high else f"{text}\n{_figure(value.low)}-{_figure(value.high)}"


def _figure(value: float) -> str:
    """Return a number with at least three digits that mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def _scaled(value: Spread, factor: float) -> Spread:
    return Spread(value.median * factor, value.low * factor, value.high * factor)


def _gigabytes(value: float) -> str:
    return _figure(value / 1e9) if value else ""


def _share_of_limit(row: Row) -> str:
    if row.placed is not None:
        return f"{row.placed.share_of_limit:.0%}"
    return f"{row.bandwidth / row.read_bandwidth.median:.0%}" if row.token_bytes and row.read_bandwidth else ""


def _read_bandwidth(row: Row) -> str:
    bandwidth = row.read_bandwidth
    return "" if bandwidth is None else _spread(_scaled(bandwidth, 1e-9))


def _part_ms(seconds: float) -> str:
    return _figure(seconds * 1e3) if seconds else ""


def _note(row: Row) -> str:
    virtual = "virtual clock" if row.placed is not None and row.placed.is_virtual else ""
    return ", ".join(filter(None, (row.note, virtual)))


def _of_placed(text: Callable[[Placed], str]) -> Callable[[Row], str]:
    return lambda row: "" if row.placed is None else text(row.placed)


def _gain_over(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row.gains[name]:+.0%}" if name in row.gains else ""


Line = tuple[str, Callable[[Row], str]]

LINES: tuple[Line, ...] = (
    ("tokens", lambda row: f"{row.n_prompt} + {row.n_gen}"),
    ("prompt tok/s", lambda row: _spread(row.prompt_tok_s)),
    ("first token ms", lambda row: _spread(_scaled(row.first_token_s, 1e3))),
    ("decode tok/s", lambda row: _spread(row.decode_tok_s)),
    ("  cold", _of_placed(lambda placed: _figure(placed.cold_tok_s))),
    ("  first turn", _of_placed(lambda placed: _figure(placed.first_turn_tok_s))),
    ("  steady", _of_placed(lambda placed: _figure(placed.steady_tok_s))),
    ("  GPU ms", _of_placed(lambda placed: _part_ms(placed.device_s))),
    ("  CPU ms", _of_placed(lambda placed: _part_ms(placed.cpu_s))),
    ("  other ms", _of_placed(lambda placed: _part_ms(placed.other_s))),
    ("  over CPU", _gain_over("CPU")),
    ("  over layers", _gain_over("layers")),
    ("VRAM GB", _of_placed(lambda placed: _gigabytes(placed.vram_bytes))),
    ("RAM GB", lambda row: _gigabytes(row.ram_bytes)),
    ("hits", _of_placed(lambda placed: f"{placed.hit_rate:.0%}")),
    ("swaps a token", _of_placed(lambda placed: _figure(placed.swaps))),
    ("GB a token", lambda row: "" if row.placed else _gigabytes(row.token_bytes)),
    ("GB/s", lambda row: "" if row.placed else _gigabytes(row.bandwidth)),
    ("RAM GB/s", _of_placed(lambda placed: _gigabytes(placed.ram_bytes_s))),
    ("PCIe GB/s", _of_placed(lambda placed: _gigabytes(placed.link_bytes_s))),
    ("VRAM GB/s", _of_placed(lambda placed: _gigabytes(placed.vram_bytes_s))),
    ("RAM gave GB/s", _read_bandwidth),
    ("of limit", _share_of_limit),
    ("", _note),
)


def render(report: Report, console: Console) -> None:
    """Print the report, a column for each row so that a narrow terminal has room, without lines that say nothing."""
    header = Table(show_header=False, box=None, pad_edge=False)
    for key, value in report.facts.items():
        header.add_row(key, value)
    console.print(header)

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for row in report.rows:
        table.add_column(row.name.replace(" (", "\n(").replace(" on the", "\non the"), justify="right", no_wrap=True)
    for name, text in LINES:
        cells = [text(row) for row in report.rows]
        if any(cells):
            table.add_row(name, *cells)
    console.print(table)
    for note in report.notes:
        console.print(note)


def to_json(report: Report) -> str:
    """Return the report with every figure."""
    return json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"


def to_csv(report: Report) -> str:
    """Return one line for each row, figures in base units."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spreads = ("prompt_tok_s", "first_token_s", "decode_tok_s", "read_bandwidth")
    placed = [f.name for f in fields(Placed)]
    names = list(dict.fromkeys(name for row in report.rows for name in row.gains))
    gains = [f"gain_over_{name}" for name in names]
    writer.writerow(
        ["name", "n_prompt", "n_gen"]
        + [f"{name}{end}" for name in spreads for end in ("", "_low", "_high")]
        + ["ram_bytes", "token_bytes", "note", *gains, *placed, *report.facts]
    )
    for row in report.rows:
        found = [getattr(row, name) for name in spreads]
        figures = [x for spread in found for x in (astuple(spread) if spread else (None, None, None))]
        writer.writerow(
            [
                *(row.name, row.n_prompt, row.n_gen, *figures),
                *(row.ram_bytes, row.token_bytes, row.note),
                *(row.gains.get(name) for name in names),
                *(None if row.placed is None else getattr(row.placed, name) for name in placed),
                *report.facts.values(),
            ]
        )
    return out.getvalue()


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all; raise `RequestError` if it cannot be written."""
    try:
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from None
