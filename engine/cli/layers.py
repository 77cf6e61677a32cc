"""Where experts are found and where the time goes, layer by layer, for people."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from rich.table import Table

from engine.devices.timing import LayerTimes, StepTime
from engine.runtime import EngineStatistics

Times = dict[str, npt.NDArray[np.float64]]  # heading -> seconds a token, [n_moe_layers]


def layer_table(what: str, now: EngineStatistics, before: EngineStatistics, max_rows: int = 0) -> Table:
    """Return what happened between two looks at decoding: for each MoE layer hits, swaps, and where the time went.

    Both must be of an engine with a cache; `what` is the title's beginning. Layers for which `max_rows` leaves no room
    stand beside the others; 0 for as many rows as layers.
    """
    cache, old = now.cache, before.cache
    assert cache is not None
    assert old is not None
    hits, choices, loads = cache.hits - old.hits, cache.choices - old.choices, cache.loads - old.loads
    n_tokens = max(cache.n_tokens - old.n_tokens, 1)
    title = f"{what}: {hits.sum() / max(int(choices.sum()), 1):.0%} hits, {loads.sum() / n_tokens:.1f} swaps a token"
    times: Times = {}
    if now.time_spent is not None and before.time_spent is not None:
        spent, times = _of_steps(now.time_spent - before.time_spent, n_tokens, len(hits))
        title += spent
    elif now.layer_times is not None and before.layer_times is not None:
        spent, times = _of_layers(now.layer_times - before.layer_times)
        title += spent
    if now.has_virtual_clock:
        title += " (virtual clock)"
    table = Table(title=title, title_justify="left", padding=(0, 1))
    n_layers = len(hits)
    n_blocks = -(-n_layers // max_rows) if max_rows else 1
    n_rows = -(-n_layers // n_blocks)
    bars = ("",) if n_blocks == 1 else ()
    headings = ("layer", "hits", *bars, "swaps", *times)
    for heading in headings * n_blocks:
        table.add_column(heading, justify="right" if heading else "left")

    def cells(layer: int) -> list[str]:
        if layer >= n_layers:
            return [""] * len(headings)
        rate = hits[layer] / max(int(choices[layer]), 1)
        found = [str(layer), f"{rate:.0%}", *("█" * round(20 * rate) for _ in bars), f"{loads[layer] / n_tokens:.2f}"]
        return found + [f"{seconds[layer] * 1e6:.1f}" for seconds in times.values()]

    for row in range(n_rows):
        table.add_row(*(cell for block in range(n_blocks) for cell in cells(block * n_rows + row)))
    return table


def _of_steps(times: StepTime, n_tokens: int, n_layers: int) -> tuple[str, Times]:
    """Return what a device says that knows where all its time goes."""
    spent = (
        f"; of a token {_ms(times.total_s, n_tokens)} ms: dense {_ms(times.dense_s, n_tokens)}, attention "
        f"{_ms(times.attention_s, n_tokens)}, experts {_ms(times.hits_s, n_tokens)}, waiting for the CPU "
        f"{_ms(times.wait_s, n_tokens)}"
    )
    layers = times.layers if times.layers.size else np.zeros((3, n_layers))
    return spent, dict(zip(("device us", "CPU us", "wait us"), layers / n_tokens, strict=True))


def _of_layers(times: LayerTimes) -> tuple[str, Times]:
    """Return what a device says that measures when the CPU was asked and had answered."""
    n_tokens = max(times.n_tokens, 1)
    device, cpu = float(times.device.sum()), float(times.cpu.sum())
    spent = (
        f"; of a token {_ms(device, n_tokens)} ms until the CPU is asked, {_ms(cpu, n_tokens)} until it has answered"
    )
    if times.guesses[0]:
        spent += f"; {times.guesses[1] / times.guesses[0]:.0%} of what it was asked for had been guessed"
    return spent, {"device us": times.device / n_tokens, "CPU us": times.cpu / n_tokens}


def _ms(seconds: float, n_tokens: int) -> str:
    return f"{seconds / n_tokens * 1e3:.3f}"
