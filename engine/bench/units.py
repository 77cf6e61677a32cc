"""Sizes and rates as people write them."""

from __future__ import annotations

from engine.errors import ConfigError
from engine.tables import parse_bytes


def parse_rate(text: str, key: str) -> float:
    """Return the bytes a second of `65GB/s` (`/s` may be left out); raise `ConfigError` naming `key` if it is none."""
    try:
        return float(parse_bytes(text.strip().removesuffix("/s"), key))
    except ConfigError:
        raise ConfigError(f'{key} is {text!r}; expected a bandwidth above 0 such as "65GB/s"') from None


def format_bytes(n: float) -> str:
    """Return a short text such as `64.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
