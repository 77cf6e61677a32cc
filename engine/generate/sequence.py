"""One answer in the making: its tokens, its text, and when it ends."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.config import SamplingParams
from engine.tokenizer import Tokenizer


class Sequence:
    """A prompt and the tokens that follow it.

    Text that could be the start of a stop text is held back until the next tokens decide, so what was shown is never
    taken back. A stop text is looked for in the text alone, wherever the borders of the tokens are; of several, the
    one that ends first counts, and of those the longest.

    Attributes:
        params: when to stop.
        prompt_ids: the tokens it goes on after.
        token_ids: the tokens made so far.
        finish_reason: "stop" after an end token or a stop text, "length" after the last token it may have, else None.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Tokens[int]) -> None:
        self.params = params
        self.prompt_ids = list(prompt_ids)
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._eog_ids = frozenset() if params.ignore_eos else tokenizer.eog_ids
        self._decoder = tokenizer.decoder(continues=True)
        self._history = array("i", self.prompt_ids)
        self._shown: list[str] = []
        self._held = ""  # decoded, but perhaps the start of a stop text

    @property
    def text(self) -> str:
        """The text that was shown so far."""
        return "".join(self._shown)

    def recent(self, n_tokens: int) -> npt.NDArray[np.int32]:
        """Return the last tokens of prompt and answer, oldest first, as int32 [at most `n_tokens`]; 0 for all."""
        return np.array(self._history[-n_tokens:], np.int32)

    def append(self, token_id: int) -> str:
        """Add a token and return the text that may be shown now: all there is, if this ends the sequence."""
        assert self.finish_reason is None, "the sequence has ended"
        self.token_ids.append(token_id)
        self._history.append(token_id)
        if token_id in self._eog_ids:
            self.finish_reason = "stop"
            return self.flush()
        self._held += self._decoder.push(token_id)
        at = self._find_stop()
        if at is not None:
            self.finish_reason = "stop"
            text = self._show(at)
            self._held = ""
            self._decoder.flush()  # of a character behind the stop text
            return text
        if len(self.token_ids) == self.params.max_tokens:
            self.finish_reason = "length"
            return self.flush()
        return self._show(self._n_certain())

    def flush(self) -> str:
        """Return the text that is still held back. For a sequence that ends without an end of its own."""
        self._held += self._decoder.flush()
        return self._show(len(self._held))

    def _show(self, n_characters: int) -> str:
        text, self._held = self._held[:n_characters], self._held[n_characters:]
        if text:
            self._shown.append(text)
        return text

    def _find_stop(self) -> int | None:
        """Return where the stop text that counts begins in the held text."""
        found = [(at + len(stop), at) for stop in self.params.stop if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _n_certain(self) -> int:
        """Return how much of the held text comes before anything that could become a stop text."""
        held, certain = self._held, len(self._held)
        for stop in self.params.stop:
            at = held.find(stop[0], max(0, len(held) - len(stop) + 1))
            while 0 <= at < certain and not stop.startswith(held[at:]):
                at = held.find(stop[0], at + 1)
            if at >= 0:
                certain = min(certain, at)
        return certain
