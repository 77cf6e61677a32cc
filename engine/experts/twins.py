"""Twin layers: layers that choose the same expert numbers for the same token, found while a model runs.

Some models were grown by repeating a block of layers, and the routers of the copies still agree: in Qwen3-30B-A3B
layers l and l + 12 choose 60 to 74 % the same experts, where the popularity of each expert alone would give 18 %. So
the choice of the earlier twin says, many layers ahead, what the later one is about to read.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from engine.experts.tracker import Chosen, Heat, count_choices

N_STANDARD_ERRORS = 5.0  # a thousand pairs are looked at; by chance one in three million gets here
LEAST_EXCESS = 0.15  # twins that agree less than this above chance are not worth a swap
FIRST_LOOK, LAST_PERIOD = 16, 1024  # tokens: a look after 16, 32 more, 64 more ... and every 1024 in the end
SAMPLE = 32  # tokens compared in a look, which takes some milliseconds
KEEP = 0.9  # weight of all earlier looks: agreement is a property of the model, not of the text


class Twins:
    """For each layer, the earlier layer that foretells it best, and how well each router rank does.

    Attributes:
        of: [n_layers], the twin of each layer, -1 for none.
        layers: those that have one, ascending.
        agreement: [n_layers], the share of equal choices of each layer and its twin.
        confidence: float32 [n_layers, n_experts_used], the probability that the layer chooses what its twin ranked
            first, second, and so on.
    """

    def __init__(self, n_layers: int, n_experts: int, min_lead: int = 4) -> None:
        """Start with no twins; a twin is at least `min_lead` layers earlier, for a copy to have time."""
        self._n_experts = n_experts
        self._pairs = np.tri(n_layers, n_layers, -min_lead, dtype=bool)  # [later, earlier]
        self._both = np.zeros((n_layers, n_layers))  # experts that two layers chose for the same token
        self._counts = np.zeros((n_layers, n_experts))
        self._tokens = np.zeros(n_layers)
        self._rank_hits = np.zeros((n_layers, 0))  # how often a layer chose what its twin gave a rank, since it has it
        self._rank_tokens = np.zeros(n_layers)
        self._recent: deque[Chosen] = deque(maxlen=SAMPLE)
        self._period = FIRST_LOOK
        self._until_look = FIRST_LOOK
        self.of = np.full(n_layers, -1, np.intp)
        self.layers = np.zeros(0, np.intp)
        self.confidence = np.zeros((n_layers, 0), np.float32)
        self.agreement = np.zeros(n_layers)

    def observe(self, chosen: Chosen) -> bool:
        """Take in one token: ids [n_layers, n_experts_used]; return whether twins were looked for."""
        self._recent.append(chosen)
        self._until_look -= 1
        if self._until_look:
            return False
        self._look()
        self._period = min(2 * self._period, LAST_PERIOD)
        self._until_look = self._period
        return True

    def _look(self) -> None:
        """Decide anew who is whose twin, and set `of`, `layers`, `agreement` and `confidence`."""
        tokens = np.stack(self._recent)  # [tokens, layers, ranks]
        self._recent.clear()
        n_layers, n_ranks = tokens.shape[1:]
        known = tokens < self._n_experts
        # Which layers chose an expert is looked up for all choices: no matrix product, as BLAS would wake its threads,
        # which the CPU's own team of threads would have to wait for.
        n_tokens, layers = np.arange(len(tokens))[:, None], np.arange(n_layers)[:, None]
        choices = np.where(known, tokens, self._n_experts).reshape(len(tokens), -1)
        chose = np.zeros((len(tokens), self._n_experts + 1, n_layers), np.uint8)
        chose[n_tokens[:, :, None], choices.reshape(tokens.shape), layers] = 1
        chose[:, self._n_experts] = 0
        same = chose[n_tokens, choices].reshape(*tokens.shape, n_layers).sum((0, 2), dtype=np.int64)
        self._both = KEEP * self._both + same
        self._counts = KEEP * self._counts + count_choices(tokens, self._n_experts)
        self._tokens = KEEP * self._tokens + known.any(2).sum(0)
        if not self._rank_hits.size:
            self._rank_hits = np.zeros((n_layers, n_ranks))
        self._choose_twins(n_ranks)
        self._count_ranks(tokens)
        self._estimate_confidence()

    def _choose_twins(self, n_ranks: int) -> None:
        n_tokens = np.minimum(self._tokens[:, None], self._tokens[None, :])
        n_choices = np.maximum(n_tokens * n_ranks, 1.0)
        share = self._both / n_choices
        # Choices of *different* tokens that agree: what popularity alone gives, without the token they have in common.
        by_popularity = np.einsum("ae,be->ab", self._counts, self._counts) - self._both
        chance = by_popularity / np.maximum(n_choices * (n_tokens - 1.0), 1.0)
        excess = share - chance
        error = np.sqrt(np.clip(chance * (1.0 - chance), 0.01, None) / n_choices)
        accepted = self._pairs & (n_tokens >= 2) & (excess > np.maximum(LEAST_EXCESS, N_STANDARD_ERRORS * error))
        score = np.where(accepted, share, -1.0)
        best = score.argmax(1)
        twin = np.where(score[np.arange(len(best)), best] > 0, best, -1)
        changed = twin != self.of
        self._rank_hits[changed] = 0
        self._rank_tokens[changed] = 0
        self.of = twin
        self.layers = np.flatnonzero(self.of >= 0)
        self.agreement = np.where(self.of >= 0, share[np.arange(len(best)), best], 0.0)

    def _count_ranks(self, tokens: Chosen) -> None:
        guesses, truth = tokens[:, self.of[self.layers]], tokens[:, self.layers]  # [tokens, twins, ranks]
        known = guesses < self._n_experts
        hits = (guesses[:, :, :, None] == truth[:, :, None, :]).any(3) & known
        self._rank_hits *= KEEP
        self._rank_tokens *= KEEP
        self._rank_hits[self.layers] += hits.sum(0)
        self._rank_tokens[self.layers] += known[:, :, 0].sum(0)

    def _estimate_confidence(self) -> None:
        # A layer has seen few tokens at first: its own counts are drawn towards those of all twins together.
        hits, n_tokens = self._rank_hits[self.layers], self._rank_tokens[self.layers]
        pooled = hits.sum(0) / max(n_tokens.sum(), 1.0)
        self.confidence = np.zeros(self._rank_hits.shape, np.float32)
        self.confidence[self.layers] = (hits + 8.0 * pooled) / (n_tokens[:, None] + 8.0)

    def foretell(self, chosen: Chosen) -> Heat:
        """Return how probable each expert is in the layers that have a twin, given what the twins chose for a token.

        chosen: ids [n_layers, n_experts_used]; only the rows of twins are looked at. Returns float32 [n_twins,
        n_experts], in the order of `layers`.
        """
        expected = np.zeros((len(self.layers), self._n_experts + 1), np.float32)
        places = np.minimum(chosen[self.of[self.layers]], self._n_experts).astype(np.intp)
        np.put_along_axis(expected, places, self.confidence[self.layers], axis=1)
        return expected[:, :-1]
