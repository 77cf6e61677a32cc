"""Drafts of an answer that is known already, right as often as one likes: what drafts gain and cost on a machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.generate.drafting import Drafter, DraftPolicy, Head, Prospect

_MATCH = 9  # tokens: of what length a match is said to be


class Rehearsal(DraftPolicy):
    """Drafts the tokens of one answer."""

    def __init__(
        self,
        max_drafts: int,
        *,
        loses_all: bool,
        token_ids: Sequence[int],
        n_vocab: int,
        right: float = 1.0,
        n_always: int = 0,
        asks_head: bool = False,
    ) -> None:
        """Make the drafts.

        Args:
            max_drafts: as of a `DraftPolicy`.
            loses_all: likewise.
            token_ids: the answer.
            n_vocab: ids that there are.
            right: share of the drafts that are right.
            n_always: tokens that are drafted whether that pays or not; 0: as many as pay.
            asks_head: whether the model's head guesses the drafts, though nobody listens to it; else they come for
                nothing, as from a text that said the same before.
        """
        super().__init__(max_drafts, loses_all=loses_all)
        self.right, self.n_always, self.asks_head = right, n_always, asks_head
        ids, random = np.array(token_ids), np.random.default_rng(0)
        others = (ids + random.integers(1, n_vocab, len(ids))) % n_vocab
        self._drafts = np.where(random.random(len(ids)) < right, ids, others).tolist()

    def drafter(self, prompt_ids: Sequence[int]) -> Drafter:  # noqa: ARG002
        """Return what makes the drafts, whatever the prompt is."""
        return _Rehearsed(self, self._drafts)

    def by_match(self, length: int, most: int) -> Prospect:
        """Return how many tokens to draft, if not by the head."""
        if self.n_always and length:
            return Prospect(min(most, self.n_always), math.inf)
        return super().by_match(length, most)

    def by_head(self, most: int) -> Prospect:
        """Return how many tokens to draft by the head."""
        if not self.asks_head:
            return Prospect(0, 1.0)
        if self.n_always:
            return Prospect(min(most, self.n_always), math.inf)
        return super().by_head(most)


class _Rehearsed(Drafter):
    def __init__(self, policy: Rehearsal, drafts: Sequence[int]) -> None:
        super().__init__(policy, ())
        self._drafts, self._asks_head = drafts, policy.asks_head
        self._n_seen = 0

    def find(self, new: Sequence[int]) -> tuple[int, int]:
        self._n_seen += len(new)
        return 0 if self._asks_head else _MATCH, self._n_seen

    def draft(self, start: int, n: int) -> list[int]:
        return list(self._drafts[start : start + n])

    def guess(self, head: Head, n: int) -> tuple[list[int], float]:
        _, seconds = head(n)
        return self.draft(self._n_seen, n), seconds
