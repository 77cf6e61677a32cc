"""How often each expert will be chosen in the next tokens: counts that forget at several speeds, weighed as they prove.

An expert's choices come in bursts, on top of what lasts as long as a topic and what never changes. So its rate is taken
for a sum of its recent rates over a few, some and many tokens, and of those that its layer's twins had, if there are
any. How much each of them says differs: routers trained for balance forget at once, a single topic never does. The
weights are therefore fitted by least squares while the model runs. They are the same for all experts, begin at what
short chats taught, and stay near that until there is evidence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.experts.tracker import Chosen, Heat, Places

HORIZON = 32  # tokens; what is further away weighs exponentially less
HALF_LIVES = (4.0, 16.0, 64.0, 256.0, np.inf)  # in tokens
N_OF_TWINS = 2  # the first so many of these are kept of a layer's twins, too
FIRST_WEIGHTS = np.array([0.15, 0.60, 0.35, 0.10, 0.0, *(0.10, 0.15)])
CONFIDENCE = 10.0  # samples' worth of evidence that the first weights stand for
CAUTION = 16.0  # tokens without a choice that every rate begins with, so that the first choices do not say too much
N_SAMPLED = 12  # layers that are learned from, spread over the model
LEARN_EVERY = 4  # tokens
CLOSELY = 32  # tokens at the end of a prompt that are learned from; those before are only counted

Weights = npt.NDArray[np.float64]
Rates = npt.NDArray[np.float32]


class Forecast:
    """Implements `Tracker`. Its heat is the number of times that each expert is expected to be chosen soon.

    "Soon" fades: a choice n tokens from now counts (1 - 1 / HORIZON) ** (n - 1), which makes HORIZON tokens in all.

    Attributes:
        heat: float32 [n_layers, n_experts].
        weights: of the rates at each of `HALF_LIVES`, and of those of twins.
        of_one_choice: what a choice made now adds to an expert's heat.
        n_tokens: seen so far.
    """

    def __init__(self, n_layers: int, n_experts: int) -> None:
        """Start with no heat, the first weights, and no twins."""
        self.heat: Heat = np.zeros((n_layers, n_experts), np.float32)
        self.weights: Weights = FIRST_WEIGHTS
        self.of_one_choice = 0.0
        self.n_tokens = 0
        self._places = Places(n_layers, n_experts)
        # One layer more than there are, always empty: the twin of those that have none.
        self._counts = np.zeros((len(FIRST_WEIGHTS), n_layers + 1, n_experts), np.float32)
        self._decay = 0.5 ** (1.0 / np.array(HALF_LIVES))
        self._remembered = np.zeros(len(HALF_LIVES))  # tokens, forgotten as the counts are
        self._twins = np.full((2, n_layers), -1)
        self._fit = _Fit(n_layers, n_experts)

    @property
    def rates(self) -> npt.NDArray[np.float32]:
        """Return the choices a token at each of `HALF_LIVES`, float32 [half-lives, n_layers, n_experts]."""
        own = self._counts[: len(HALF_LIVES), :-1]
        return own / (self._remembered + CAUTION).astype(np.float32)[:, None, None]

    def set_twins(self, twin_of: npt.NDArray[np.intp]) -> None:
        """Take note of the earlier twin of each layer, -1 for none; it is a twin to that one in turn."""
        later = np.full(len(twin_of), -1)
        has_one = np.flatnonzero(twin_of >= 0)
        later[twin_of[has_one]] = has_one
        self._twins = np.stack([twin_of, later])

    def observe_prompt(self, tokens: Chosen) -> None:
        """Take in a prompt at once, or its end: ids [n_tokens, n_layers, n_experts_used]."""
        n = max(len(tokens) - CLOSELY, 0)
        if n:
            ages = np.arange(n - 1, -1, -1)
            known = tokens[:n] < self.heat.shape[1]
            places = (tokens[:n] + (np.arange(len(self.heat)) * self.heat.shape[1])[:, None])[known]
            ages_of_choices = np.broadcast_to(ages[:, None, None], known.shape)[known]
            for counts, decay in zip(self._counts, self._decay, strict=False):  # those of twins follow from these
                counted = np.bincount(places, decay**ages_of_choices, self.heat.size)
                counts[:-1] = counts[:-1] * np.float32(decay**n) + counted.reshape(self.heat.shape).astype(np.float32)
            self._remembered = self._remembered * self._decay**n + (self._decay[:, None] ** ages).sum(1)
            self.n_tokens += n
            self._fit.skip(n)
        for chosen in tokens[n:]:
            self.observe(chosen)

    def observe(self, chosen: Chosen) -> None:
        """Take in one token: ids [n_layers, n_experts_used]."""
        own, places = self._counts[: len(HALF_LIVES)], self._places.of(chosen)
        own *= self._decay.astype(np.float32)[:, None, None]
        self._remembered = self._remembered * self._decay + 1.0
        self.n_tokens += 1
        for counts in own:
            counts.reshape(-1)[places] += 1
        n_twins = np.count_nonzero(self._twins >= 0, axis=0)
        if n_twins.any():
            share = (1.0 / np.maximum(n_twins, 1)).astype(np.float32)[:, None]
            for counts, of_twins in zip(own[:N_OF_TWINS], self._counts[len(HALF_LIVES) :], strict=True):
                of_twins[:-1] = share * (counts[self._twins[0]] + counts[self._twins[1]])
        rate_of_count = 1.0 / (self._remembered + CAUTION)
        rate_of_count = np.append(rate_of_count, rate_of_count[:N_OF_TWINS])
        self.weights = self._fit.learn(chosen, self._counts, rate_of_count)
        scale = HORIZON * self.weights * rate_of_count
        self.of_one_choice = float(scale[: len(HALF_LIVES)].sum())
        # Not a matrix product: BLAS would wake its threads, which the CPU's own team of threads would have to wait for.
        np.einsum("s,sle->le", scale.astype(np.float32), self._counts[:, :-1], out=self.heat)
        np.maximum(self.heat, 0, out=self.heat)


class _Fit:
    """Least squares of choices on the rates before them, with all of the past in a few numbers.

    The choices that follow a sample are still to come when it is taken. So samples wait in a sum that fades as the
    horizon does, and a choice is worth what that sum holds at its place; the samples' products wait alike.
    """

    def __init__(self, n_layers: int, n_experts: int) -> None:
        n = len(FIRST_WEIGHTS)
        self._layers = slice(0, n_layers, max(n_layers // N_SAMPLED, 1))
        n_sampled = len(range(n_layers)[self._layers])
        self._places = Places(n_sampled, n_experts)
        self._waiting: Rates = np.zeros((n, n_sampled * n_experts), np.float32)
        self._waiting_products = np.zeros((n, n))
        self._products = np.zeros((n, n))
        self._results = np.zeros(n)
        self._largest = 0.0  # product of a sample, on average over the rates
        self._n_tokens = 0
        self._weights: Weights = FIRST_WEIGHTS

    def learn(self, chosen: Chosen, counts: npt.NDArray[np.float32], rate_of_count: Weights) -> Weights:
        """Take in one token and return the weights.

        Args:
            chosen: ids [n_layers, n_experts_used].
            counts: float32 [weights, n_layers + 1, n_experts], the token's own among them.
            rate_of_count: float64 [weights].
        """
        places = self._places.of(chosen[self._layers])
        self._results += self._waiting[:, places].sum(1) / HORIZON
        self._products += self._waiting_products / HORIZON
        self._waiting *= np.float32(1.0 - 1.0 / HORIZON)
        self._waiting_products *= 1.0 - 1.0 / HORIZON
        if self._n_tokens % LEARN_EVERY == 0:
            self._take_sample(counts[:, self._layers], rate_of_count)
        self._n_tokens += 1
        return self._weights

    def skip(self, n_tokens: int) -> None:
        """Pass over tokens that are not learned from."""
        self._waiting *= np.float32((1.0 - 1.0 / HORIZON) ** n_tokens)
        self._waiting_products *= (1.0 - 1.0 / HORIZON) ** n_tokens

    def _take_sample(self, counts: npt.NDArray[np.float32], rate_of_count: Weights) -> None:
        rates = counts.reshape(len(counts), -1) * rate_of_count.astype(np.float32)[:, None]
        rates -= rates.mean(1, keepdims=True)  # what all experts have in common tells none from another
        products = np.einsum("ae,be->ab", rates, rates)
        self._waiting += rates
        self._waiting_products += products
        self._largest = max(self._largest, float(np.trace(products)) / len(rates))
        if self._largest > 0:
            doubt = np.eye(len(rates)) * (CONFIDENCE * self._largest)
            self._weights = np.linalg.solve(self._products + doubt, self._results + doubt @ FIRST_WEIGHTS)
