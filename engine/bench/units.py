"""Sizes and rates as people write them."""

from __future__ import annotations

import re

from engine.errors import ConfigError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Return the bytes of `24GB`, `5.3 MB`, `16GiB` or a plain number. Raises `ConfigError` if it is none of these."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]i?|)b?", text.strip().lower())
    if not match:
        raise ConfigError(f"{text!r} is not a size; write for example 24GB, 5.3MB or 16GiB")
    return round(float(match[1]) * _FACTORS[match[2]])


def parse_rate(text: str) -> float:
    """Return the bytes a second of `65GB/s` (`/s` may be left out). Raises `ConfigError` if it is no rate above 0."""
    try:
        rate = parse_bytes(text.strip().lower().removesuffix("/s"))
    except ConfigError:
        rate = 0
    if rate <= 0:
        raise ConfigError(f"{text!r} is not a bandwidth; write for example 65GB/s")
    return float(rate)


def format_bytes(n: float) -> str:
    """Return a short text such as `64.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
