"""What a swap costs and what it may cost: the one model that policies, budget and predictions share.

A miss reads an expert from RAM. A hit reads it from VRAM instead. A load reads it from RAM, too, and sends it over
PCIe, where it disturbs nobody as long as it takes less than its share of the token. So, in time per byte, a load pays
if it turns at least `break_even` misses into hits:

    break_even * (1 / ram - 1 / vram) = 1 / ram
"""

from __future__ import annotations


class SwapBudget:
    """Bytes that may be copied for each token: what PCIe moves in a share of the token's time.

    What is not used is kept for the next tokens, up to as much as one token gets, and to one expert at least: so a
    slow link still swaps now and then, and a pause is never followed by a burst. As long as there are free slots all of
    a token's time may be used: what fills them takes nothing away, and nearly every choice is a miss without them.
    """

    def __init__(self, bytes_per_s: float, largest_expert: int, share: float = 0.5) -> None:
        """Start with nothing saved; `largest_expert` in bytes."""
        self._bytes_per_s, self._largest, self._share = bytes_per_s, float(largest_expert), share
        self.allowance = 0.0

    def grant(self, token_s: float, *, whole: bool = False) -> None:
        """Add what one token of that many seconds earns: its share of them, or the `whole`."""
        earned = self._bytes_per_s * (1.0 if whole else self._share) * token_s
        self.allowance = min(self.allowance + earned, max(2 * earned, self._largest))

    def spend(self, n_bytes: int) -> None:
        """Take off what was copied."""
        assert n_bytes <= self.allowance
        self.allowance -= n_bytes

    def describe(self) -> str:
        """Return the limit for people."""
        rate = f"{self._bytes_per_s * self._share / 1e9:.3g} MB for each millisecond"
        return f"swaps may take {self._share:.0%} of a token's time on PCIe, {rate}"
