"""Pictures of bench results. Needs matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError
from engine.files import whole_file

if TYPE_CHECKING:
    from engine.bench.conversation import Turn
    from engine.bench.measure import Row, Spread
    from engine.bench.replay import Study

# Colours that stay apart for colour-blind readers (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5A5A5A")
SMOOTHING = 32  # tokens in a moving average


ENDINGS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise `ConfigError` if no picture could be written there, before there is anything to draw."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--plot {path}: expected a name that ends in {', '.join(ENDINGS)}")
    figure(1, 1, 1.0)


def figure(n_rows: int, n_columns: int, height: float) -> tuple[Any, Any]:
    """Return a new figure and its axes [n_rows, n_columns]; raise `ConfigError` if matplotlib is missing."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - optional
    except ImportError:
        raise ConfigError("plots need matplotlib; install it with: pip install matplotlib") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - optional

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(11, height * n_rows), squeeze=False, layout="constrained")
    return fig, axes


def save(fig: Any, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the file's ending; raise `ConfigError` if that is not possible."""
    path = Path(path)
    try:
        with whole_file(path) as file:
            fig.savefig(file, dpi=140, format=path.suffix.removeprefix("."))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: the plot cannot be written: {reason}") from error


def moving_rate(hits: npt.NDArray[np.int64], choices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the hit rate of the last `SMOOTHING` tokens at each token."""
    total_hits = np.concatenate([[0], np.cumsum(hits)])
    total = np.concatenate([[0], np.cumsum(choices)])
    stop = np.arange(1, len(total))
    start = np.maximum(stop - SMOOTHING, 0)
    rate: npt.NDArray[np.float64] = (total_hits[stop] - total_hits[start]) / np.maximum(total[stop] - total[start], 1)
    return rate


def plot_speeds(rows: Sequence[Row], title: str, path: str | Path) -> None:
    """Draw the rows of a table of speeds as bars, with a line from the slowest to the fastest run of each."""
    fig, axes = figure(1, 2, 1.2 + 0.42 * len(rows))
    speeds: tuple[tuple[str, list[Spread]], ...] = (
        ("decode, tokens a second", [row.decode_tok_s for row in rows]),
        ("prompt, tokens a second", [row.prompt_tok_s for row in rows]),
    )
    names = list(dict.fromkeys(row.name for row in rows))
    colours = [COLOURS[names.index(row.name) % len(COLOURS)] for row in rows]
    places = np.arange(len(rows))[::-1]  # the first row on top
    for axis, (what, spreads) in zip(axes[0], speeds, strict=True):
        medians = np.array([spread.median for spread in spreads])
        ranges = np.array([[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]])
        axis.barh(places, medians, xerr=ranges, color=colours, ecolor="0.25", error_kw={"linewidth": 1.0}, height=0.62)
        for place, spread in zip(places, spreads, strict=True):
            axis.annotate(
                f"{spread.median:,.0f}" if spread.median >= 1000 else f"{spread.median:.1f}",
                (spread.high, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color="0.3",
            )
        axis.set_xlabel(what)
        axis.margins(x=0.22)
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,.0f}" if medians.max() >= 10 else "{x:g}")
        axis.set_yticks(places, [f"{row.name}\n{row.n_prompt} + {row.n_gen} tokens" for row in rows])
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
    axes[0][1].tick_params(labelleft=False)
    if any(row.placed is not None and row.placed.is_virtual for row in rows):
        title += "; times of a virtual clock"
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold")
    save(fig, path)


def plot_replays(studies: Sequence[Study], path: str | Path) -> None:
    """Draw, for each trace, hit rates over time, and hit rate against what it costs to copy."""
    fig, axes = figure(len(studies), 2, 3.4)
    for (over_time, against_loads), found in zip(axes, studies, strict=True):
        policies = [row for row in found.rows if not row.is_bound]
        for i, row in enumerate(policies):
            played, colour = found.replays[row.policy], COLOURS[i % len(COLOURS)]
            rate = moving_rate(played.hits_over_time, played.choices_over_time)
            over_time.plot(np.arange(len(rate)), 100 * rate, color=colour, linewidth=1.4, label=row.policy)
            against_loads.scatter(row.loads_per_layer, 100 * row.hit_rate, color=colour, s=36, zorder=3)
        for row in found.rows:
            if row.is_bound:
                against_loads.axhline(100 * row.hit_rate, color="0.6", linewidth=0.8, linestyle="--")
                against_loads.annotate(
                    row.policy,
                    (1.0, 100 * row.hit_rate),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="right",
                    color="0.4",
                )
        over_time.set_title(found.trace.name, loc="left", fontweight="bold")
        over_time.set_xlabel(f"token of the answer (mean of the last {SMOOTHING})")
        over_time.set_ylabel("hits, % of choices")
        against_loads.set_xlabel("experts loaded, per token and layer")
        against_loads.set_ylabel("hits, % of choices")
        against_loads.margins(y=0.15)
        for axis in (over_time, against_loads):
            axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False)
    save(fig, path)


def plot_conversation(turns: Sequence[Turn], title: str, path: str | Path) -> None:
    """Draw the hit rate over time, with the subjects of the turns."""
    fig, axes = figure(1, 1, 3.6)
    axis = axes[0][0]
    rate = moving_rate(np.concatenate([t.hits for t in turns]), np.concatenate([t.choices for t in turns]))
    axis.plot(np.arange(len(rate)), 100 * rate, color=COLOURS[0], linewidth=1.4)
    top, start = 100 * float(rate.max(initial=0.0)), 0
    for turn in turns:
        if start:
            axis.axvline(start, color="0.6", linewidth=0.8, linestyle="--")
        axis.annotate(
            f"{turn.kind}\n{turn.hit_rate:.0%}", (start, top), xytext=(4, 4), textcoords="offset points", color="0.3"
        )
        start += len(turn.hits)
    axis.set_title(title, loc="left", fontweight="bold", pad=26)
    axis.set_xlabel(f"token of the answers (mean of the last {SMOOTHING})")
    axis.set_ylabel("hits, % of choices")
    axis.set_xlim(0, max(start, 1))
    axis.grid(alpha=0.25)
    save(fig, path)
