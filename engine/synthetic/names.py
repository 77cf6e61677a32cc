"""Names of made-up models: `synthetic:qwen3.5-35b-a3b@q4_k_m:layers=8,seed=1`."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TypeVar

from engine.errors import ConfigError
from engine.gguf.recipes import RECIPES, Recipe
from engine.synthetic.metadata import smallest_vocab
from engine.synthetic.published import PUBLISHED, Published

PREFIX = "synthetic:"
DEFAULT_RECIPE = "q4_k_m"

_FORM = "synthetic:<model>[@<quantisation>][:<option>=<number>,...]"
_KEYS = {  # that options stand for
    "layers": "block_count",
    "experts": "expert_count",
    "used": "expert_used_count",
    "context": "context_length",
}
_OPTIONS = "layers", "experts", "used", "vocab", "context", "heads", "seed"


def look_up(name: str) -> tuple[Published, Recipe, int]:
    """Return what a name says: a model, changed as its options want it, a mixture of formats, and the seed.

    Raises `ConfigError` for a name that makes no sense.
    """
    model_name, recipe_name, options = _parse(name)
    published = _find(name, "model", model_name, PUBLISHED)
    recipe = _find(name, "quantisation", recipe_name, RECIPES)
    return _changed(name, published, options), recipe, options.get("seed", 0)


def _parse(name: str) -> tuple[str, str, dict[str, int]]:
    head, _, tail = name.removeprefix(PREFIX).partition(":")
    model_name, _, recipe_name = head.partition("@")
    options: dict[str, int] = {}
    for item in filter(None, tail.split(",")):
        key, _, number = (part.strip() for part in item.partition("="))
        if key not in _OPTIONS:
            raise ConfigError(f"{name}: unknown option {key!r}; expected {', '.join(_OPTIONS)} ({_FORM})")
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            raise ConfigError(f"{name}: option {key} is {number!r}; expected a number below a billion")
        if key in options:
            raise ConfigError(f"{name}: option {key} is given twice")
        options[key] = int(number)
    return model_name.strip(), recipe_name.strip() or DEFAULT_RECIPE, options


_T = TypeVar("_T")


def _find(name: str, what: str, wanted: str, table: dict[str, _T]) -> _T:
    if wanted.lower() in table:
        return table[wanted.lower()]
    close = difflib.get_close_matches(wanted.lower(), table, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{name}: there is no {what} {wanted!r}, only {', '.join(table)}{hint}")


def _changed(name: str, published: Published, options: dict[str, int]) -> Published:
    """Return a model with options in the place of what was published."""
    keys = {_KEYS[option]: value for option, value in options.items() if option in _KEYS}
    n_vocab, n_heads = options.get("vocab", published.n_vocab), options.get("heads", 0)
    published = replace(published, n_vocab=n_vocab, keys={**published.keys, **keys})
    for option, value, low, high in (
        ("layers", published.size("block_count"), published.least_layers, 1000),
        ("experts", published.size("expert_count"), 1, 4096),
        ("used", published.size("expert_used_count"), 1, published.size("expert_count")),
        ("vocab", n_vocab, smallest_vocab(), 1_000_000),
        ("context", published.size("context_length"), 1, 10_000_000),
        ("heads", n_heads, 0, published.n_heads),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}: {option} is {value}; expected {low} to {high}")
    return published.with_heads(n_heads)
