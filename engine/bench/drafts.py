"""What drafts gain, and cost where they are wrong: one answer, made again and again.

The drafts are the answer that was made without any, of which so many are right as one wants to know about. If the
model has a head for them, that guesses, too, and what it says is put aside. How often a text says what it said before,
and how often a head is right, depends on the text; how much that is worth depends on the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.table import Table

from engine.bench.measure import Progress, Spread, random_tokens
from engine.bench.rehearsal import Rehearsal
from engine.config import SamplingParams
from engine.errors import ConfigError, EngineError, RequestError
from engine.generate.answer import Completion
from engine.runtime import Engine

DEFAULT = "1,0.9,0.75,0.5,0.25,0"


@dataclass(frozen=True, slots=True)
class DraftRow:
    """Answers with a share of their drafts right.

    Attributes:
        right: the share; None for no drafts.
        tok_s: tokens a second.
        gain: over no drafts, the median of all rounds' ratios.
        drafts: tokens that were drafted for each that was made.
        guess_s: seconds that the model's head takes for one, at the end; 0 where it is not asked.
    """

    right: float | None
    tok_s: Spread
    gain: float
    drafts: float
    guess_s: float


def read_shares(text: str) -> list[float]:
    """Return shares written as "1,0.5"; raise `ConfigError` for anything else."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"--drafts is {text!r}; expected shares of right drafts from 0 to 1, such as {DEFAULT}")
    return shares


def measure_drafts(
    engine: Engine, shares: Sequence[float], n_prompt: int, n_gen: int, reps: int, progress: Progress
) -> list[DraftRow]:
    """Make an answer without drafts and with each share of right ones, in turn; the first round warms up.

    Raises `RequestError` if the engine makes no drafts, `EngineError` if a text is not the same.
    """
    policy = engine.drafts
    if policy is None:
        raise RequestError("there are no drafts: engine.max_drafts is 0, or routing is played or recorded")
    prompt = random_tokens(n_prompt, engine.spec.n_vocab)
    params = SamplingParams(max_tokens=n_gen, temperature=0.0, ignore_eos=True)
    engine.drafts = None
    expected = _answer(engine, prompt, params)

    def rehearsed(right: float) -> Rehearsal:
        return Rehearsal(
            policy.max_drafts,
            loses_all=policy.loses_all,
            token_ids=expected.token_ids,
            n_vocab=engine.spec.n_vocab,
            right=right,
            asks_head=engine.has_draft_head,
        )

    ways = [None, *map(rehearsed, shares)]
    speeds: list[list[float]] = [[] for _ in ways]
    n_drafts = [0] * len(ways)
    for round_ in range(reps + 1):
        for i, way in enumerate(ways):
            engine.drafts, before = way, engine.statistics.n_drafts
            found = _answer(engine, prompt, params)
            if found.token_ids != expected.token_ids:
                raise EngineError("a text differs from the one without drafts; please report this")
            if round_:
                speeds[i].append(found.timings.decode_tok_s)
                n_drafts[i] += engine.statistics.n_drafts - before
            progress("answers", round_ * len(ways) + i + 1, (reps + 1) * len(ways))
    engine.drafts = policy
    return [
        DraftRow(
            None if way is None else way.right,
            Spread.of(own),
            median(speed / plain for speed, plain in zip(own, speeds[0], strict=True)),
            n / (reps * max(n_gen - 1, 1)),
            0.0 if way is None else way.guess_s,
        )
        for way, own, n in zip(ways, speeds, n_drafts, strict=True)
    ]


def _answer(engine: Engine, prompt: list[int], params: SamplingParams) -> Completion:
    with engine.new_session() as session:  # which forgets what its sequence held
        return session.generate(prompt, params)


def table_of(rows: Sequence[DraftRow], *, is_virtual: bool) -> Table:
    """Return the rows as a table; times may be those of a virtual clock."""
    table = Table()
    clock = ", virtual clock" if is_virtual else ""
    headings = "drafts right", f"tok/s{clock}", "lowest to highest", "gain", "drafts for each token", "ms to guess one"
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        speed = row.tok_s
        table.add_row(
            "none made" if row.right is None else f"{row.right:.0%}",
            f"{speed.median:,.1f}",
            f"{speed.low:,.1f} to {speed.high:,.1f}",
            "" if row.right is None else f"{row.gain:.2f} x",
            "" if row.right is None else f"{row.drafts:.2f}",
            f"{row.guess_s * 1e3:.2f}" if row.guess_s else "",
        )
    return table


def to_json(rows: Sequence[DraftRow], facts: Mapping[str, str]) -> str:
    """Return all figures as JSON."""
    return json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=1)
