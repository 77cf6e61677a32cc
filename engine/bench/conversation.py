"""A scripted conversation that changes its subject, to see how a cache of experts follows: hit rate over time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table

from engine.cli.layers import layer_table
from engine.config import SamplingParams
from engine.errors import RequestError, TokenizerError
from engine.experts.hot_cache import CacheStatistics
from engine.runtime import Engine, EngineStatistics

SCRIPT = (
    ("prose", "Tell me about a lighthouse keeper who finds a letter in a bottle one winter morning."),
    ("code", "Write a Python class for a queue with a fixed size, with methods push, pop and len, and a test of it."),
    ("German", "Erkläre mir bitte in einfachen Worten, warum der Himmel am Abend rot und am Tag blau ist."),
    ("arithmetic", "A train leaves at 9:40 and travels 315 km at 90 km/h. When does it arrive? Show each step."),
    (
        "code",
        "def parse_config(path):\n    # Now rewrite the queue above in C, with error codes instead of exceptions.\n",
    ),
    ("French", "Raconte-moi en quelques phrases une promenade au marché de Lyon un dimanche matin."),
    ("prose", "Go on with the story of the lighthouse keeper: what did the letter say?"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer.

    Attributes:
        kind: what it was about.
        n_prompt: tokens of the prompt that were run.
        decode_tok_s: tokens a second of the answer.
        hits, choices: int64 [n_tokens], of all layers together, for each token that the cache served.
        n_loads: experts copied meanwhile.
    """

    kind: str
    n_prompt: int
    decode_tok_s: float
    hits: npt.NDArray[np.int64]
    choices: npt.NDArray[np.int64]
    n_loads: int

    @property
    def hit_rate(self) -> float:
        """Return the share of choices served from slots."""
        return float(self.hits.sum() / max(int(self.choices.sum()), 1))


def converse(engine: Engine, n_gen: int, watch: Callable[[str, EngineStatistics], None]) -> list[Turn]:
    """Play the script with answers of `n_gen` tokens; `watch` is called with (subject, statistics) after each token.

    Without a chat template the turns are one growing text. Turns that no longer fit the context begin a new one.
    Raises `RequestError` if no cache is in use.
    """
    if engine.statistics.cache is None:
        raise RequestError("a conversation shows how the hot-expert cache does, and none is in use; see --device")
    messages: list[dict[str, str]] = []
    turns = []
    for kind, question in SCRIPT:
        messages.append({"role": "user", "content": question})
        prompt = _prompt(engine, messages)
        if len(prompt) + n_gen > engine.config.engine.context_length:
            messages = messages[-1:]
            prompt = _prompt(engine, messages)
        turn, text = _answer(engine, kind, prompt, n_gen, watch)
        turns.append(turn)
        messages.append({"role": "assistant", "content": text})
    return turns


def _prompt(engine: Engine, messages: list[dict[str, str]]) -> list[int]:
    try:
        return engine.prompt_ids(messages)
    except TokenizerError:  # no chat template
        return engine.tokenize("\n\n".join(message["content"] for message in messages), add_special=True)


def _answer(
    engine: Engine, kind: str, prompt: list[int], n_gen: int, watch: Callable[[str, EngineStatistics], None]
) -> tuple[Turn, str]:
    params = SamplingParams(max_tokens=n_gen, temperature=0.8, seed=1, ignore_eos=True)
    before, seen = _cache(engine.statistics), []
    for chunk in engine.generate(prompt, params, stream=True):
        statistics = engine.statistics
        watch(kind, statistics)
        seen.append(_cache(statistics))
        completion = chunk.completion
    assert completion is not None
    # The first token comes out of the prompt, whose end the cache may have served, too.
    hits = np.diff([int(cache.hits.sum()) for cache in seen])
    choices = np.diff([int(cache.choices.sum()) for cache in seen])
    served = choices > 0
    timings = completion.timings
    turn = Turn(
        kind,
        timings.n_prompt_tokens,
        timings.decode_tok_s,
        hits[served],
        choices[served],
        seen[-1].n_loads - before.n_loads,
    )
    return turn, completion.text


def _cache(statistics: EngineStatistics) -> CacheStatistics:
    assert statistics.cache is not None
    return statistics.cache


# -- showing it ------------------------------------------------------------------------------------------------------


def table_of(turns: list[Turn], *, is_virtual: bool) -> Table:
    """Return the table of a conversation."""
    table = Table(title="hit rate, turn by turn", title_justify="left")
    table.add_column("turn")
    for heading in ("prompt", "answer", "hits", "first 16", "last 16", "swaps a token", "decode tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    note = " (virtual)" if is_virtual else ""
    for i, turn in enumerate(turns, 1):
        first, last = (_rate(turn, part) for part in (slice(0, 16), slice(-16, None)))
        table.add_row(
            f"{i} {turn.kind}",
            str(turn.n_prompt),
            str(len(turn.hits)),
            f"{turn.hit_rate:.0%}",
            f"{first:.0%}",
            f"{last:.0%}",
            f"{turn.n_loads / max(len(turn.hits), 1):.1f}",
            f"{turn.decode_tok_s:,.1f}{note}",
        )
    return table


def _rate(turn: Turn, part: slice) -> float:
    return float(turn.hits[part].sum() / max(int(turn.choices[part].sum()), 1))


class Watcher:
    """Calls `show` with a live view of the last tokens, at most `max_rows` layers high, every few tokens."""

    def __init__(self, show: Callable[[Table], None], max_rows: int = 0, every: int = 16) -> None:
        self._show, self._max_rows, self._every = show, max_rows, every
        self._kind = ""
        self._before: EngineStatistics | None = None

    def __call__(self, kind: str, now: EngineStatistics) -> None:
        """Take in one token; the first of a subject comes out of a prompt, whose time is not a token's."""
        before = self._before
        if before is None or before.cache is None or now.cache is None or kind != self._kind:
            self._kind, self._before = kind, now
        elif now.cache.n_tokens - before.cache.n_tokens >= self._every:
            self._show(layer_table(kind, now, before, self._max_rows))
            self._before = now


def to_json(turns: list[Turn]) -> str:
    """Return every figure."""
    rows = [{**asdict(turn), "hits": turn.hits.tolist(), "choices": turn.choices.tolist()} for turn in turns]
    return json.dumps(rows, indent=1) + "\n"
