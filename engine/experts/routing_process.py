"""Made-up routing that behaves like that of real models, for models with random weights and machines not at hand.

A token has a state: a sum of parts that last for ever, as long as a topic, some tokens, or one. Each layer multiplies
it by a random matrix and takes the top experts. The shares of the parts were fitted to recorded traces, so that overlap
of neighbouring tokens, skew, and the hit rates of LRU and Belady come out within a few points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.experts.trace import ANSWER, PROMPT, Trace

_WIDTH = 256  # of a state
_AT_ONCE = 64  # tokens whose choices are worked out together, which takes less time for each


@dataclass(frozen=True, slots=True)
class RoutingKind:
    """Shares of a state's variance, and how long the parts last.

    Attributes:
        permanent: share that never changes.
        topic: share that is drawn anew with the topic.
        context, context_tokens: share that drifts, and in how many tokens.
        moment, moment_tokens: likewise, faster.
        word, n_words, word_exponent: share that is the token's own; words are drawn by Zipf's law.
        twin_share, twin_memory: for models whose layers come in twins; how much of a matrix they share, and how much of
            the rest each copy keeps of the one before.
    """

    permanent: float
    topic: float
    context: float
    context_tokens: float
    moment: float
    moment_tokens: float
    word: float
    n_words: int
    word_exponent: float
    twin_share: float
    twin_memory: float


MANY_EXPERTS = RoutingKind(0.12, 0.256, 0.399, 9.6, 0.185, 1.8, 0.009, 1375, 0.99, 0.762, 0.39)
FEW_EXPERTS = RoutingKind(0.12, 0.453, 0.113, 29.7, 0.122, 1.9, 0.114, 202, 1.19, 0.853, 0.389)
_TWIN_LAG, _FIRST_TWIN, _LAST_TWIN = 12, 6, 41  # as in Qwen3-30B-A3B


class RoutingProcess:
    """Draws routing token by token; the same seed gives the same."""

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        n_experts_used: int,
        *,
        topic_tokens: float = 300.0,
        twins: bool = False,
        seed: int = 0,
    ) -> None:
        """Set it up; a topic lasts `topic_tokens` on average."""
        self.n_layers, self.n_experts, self.n_experts_used = n_layers, n_experts, n_experts_used
        self._kind = kind = MANY_EXPERTS if n_experts > 128 else FEW_EXPERTS
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._topic_end = 1.0 / topic_tokens
        self._routers = self._make_routers(twins)
        depth = 1.0 - 0.45 * np.exp(-np.arange(n_layers) / 3.0)  # the first layers know little of the context
        lasting = np.array([kind.permanent, kind.topic, kind.context]) * depth[:, None]
        passing = np.broadcast_to([kind.moment, kind.word], (n_layers, 2))
        noise = 1.0 - lasting.sum(1) - passing.sum(1)
        self._weights = np.sqrt(np.column_stack([lasting, passing, noise])).astype(np.float32)
        shares = 1.0 / np.arange(1, kind.n_words + 1) ** kind.word_exponent
        self._word_ends = np.cumsum(shares / shares.sum())
        self._words = self._normal(kind.n_words)
        self._permanent, self._topic, self._context, self._moment = self._normal(4)

    def _normal(self, n: int) -> npt.NDArray[np.float32]:
        return self._random.standard_normal((n, _WIDTH), np.float32)

    def _make_routers(self, twins: bool) -> npt.NDArray[np.float32]:
        shape = (self.n_layers, self.n_experts, _WIDTH)
        routers = self._random.standard_normal(shape, np.float32)
        if not twins:
            return routers
        kind, bases = self._kind, self._random.standard_normal((_TWIN_LAG, *shape[1:]), np.float32)
        for layer in range(_FIRST_TWIN, min(_LAST_TWIN + 1, self.n_layers)):
            if layer - _TWIN_LAG >= _FIRST_TWIN:  # made with the first copy of its chain
                continue
            own = routers[layer].copy()
            for copy in range(layer, min(_LAST_TWIN + 1, self.n_layers), _TWIN_LAG):
                if copy > layer:
                    own = kind.twin_memory * own + np.sqrt(1 - kind.twin_memory**2, dtype=np.float32) * routers[copy]
                base = np.float32(kind.twin_share) ** 0.5 * bases[layer % _TWIN_LAG]
                routers[copy] = base + np.float32(1 - kind.twin_share) ** 0.5 * own
        return routers

    def next_tokens(self, n_tokens: int) -> npt.NDArray[np.uint16]:
        """Return the experts of some more tokens, uint16 [n_tokens, n_layers, n_experts_used], best first."""
        k = self.n_experts_used
        ids = np.empty((n_tokens, self.n_layers, k), np.uint16)
        for first in range(0, n_tokens, _AT_ONCE):
            some = ids[first : first + _AT_ONCE]
            states = np.stack([self._next_states() for _ in some], axis=2)  # [n_layers, _WIDTH, tokens]
            coldness = -np.matmul(self._routers, states).transpose(2, 0, 1)
            top = np.argpartition(coldness, min(k, self.n_experts - 1), axis=2)[:, :, :k]
            order = np.argsort(np.take_along_axis(coldness, top, axis=2), axis=2)
            some[:] = np.take_along_axis(top, order, axis=2)
        return ids

    def _next_states(self) -> npt.NDArray[np.float32]:
        """Return what each layer multiplies for one more token, [n_layers, _WIDTH]."""
        kind, random = self._kind, self._random
        if random.random() < self._topic_end:
            self._topic = self._normal(1)[0]
        self._context = self._drift(self._context, kind.context_tokens)
        self._moment = self._drift(self._moment, kind.moment_tokens)
        word = self._words[min(int(np.searchsorted(self._word_ends, random.random())), kind.n_words - 1)]
        parts = np.stack([self._permanent, self._topic, self._context, self._moment, word, self._normal(1)[0]])
        states: npt.NDArray[np.float32] = self._weights @ parts
        return states

    def _drift(self, part: npt.NDArray[np.float32], n_tokens: float) -> npt.NDArray[np.float32]:
        kept = np.float32(np.exp(-1.0 / n_tokens))
        drifted: npt.NDArray[np.float32] = kept * part + np.sqrt(1 - kept * kept) * self._normal(1)[0]
        return drifted

    def trace(self, n_prompt: int, n_answer: int) -> Trace:
        """Return the next tokens as a trace."""
        ids = self.next_tokens(n_prompt + n_answer)
        phase = np.repeat(np.array([PROMPT, ANSWER], np.uint8), [n_prompt, n_answer])
        return Trace("made-up routing", ids, phase, self.n_experts, {"synthetic": True})
