"""From what is asked to the tokens that are run, checked against what the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeGuard

import numpy as np

from engine.config import ModelSettings
from engine.errors import RequestError
from engine.runtime.answering import Messages, Prompt
from engine.runtime.files import read_chat_template
from engine.tokenizer import ChatTemplate, Tokenizer
from engine.tokenizer.vocabulary import TokenizerMetadata


class Prompts:
    """Reads prompts for one model.

    Attributes:
        tokenizer: text to token ids and back.
    """

    def __init__(self, metadata: TokenizerMetadata, settings: ModelSettings, n_vocab: int) -> None:
        """Load the tokenizer of a file; raise `ConfigError` if a chat template of the settings cannot be read."""
        self._metadata, self._n_vocab = metadata, n_vocab
        self._source = read_chat_template(settings)
        self._variables = settings.template_variables()
        self.tokenizer = Tokenizer.from_metadata(metadata)

    def ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt: a text, chat messages (put through the model's template), or ids.

        Raises `TokenizerError` for messages if the model has no chat template or it refuses them.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special=True)
        if _is_messages(prompt):
            return self.tokenizer.encode_chat(self._template.render(prompt, **self._variables))
        return [int(token_id) for token_id in prompt]  # type: ignore[arg-type]  # not messages, so ids

    def checked_ids(self, prompt: Prompt, context_length: int) -> list[int]:
        """Return the token ids of a prompt; raise `RequestError` if it cannot be run in a context of this length."""
        token_ids = self.ids(prompt)
        self.check_ids(token_ids)
        if len(token_ids) > context_length:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens and the context holds {context_length}; "
                "shorten it or raise [engine] context_length"
            )
        return token_ids

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raise `RequestError` if there are no tokens, or one is not in the vocabulary."""
        if not len(token_ids):
            raise RequestError("the prompt is empty; give at least one token")
        ids = np.asarray(token_ids)
        if ids.min() < 0 or ids.max() >= self._n_vocab:
            wrong = int(ids[(ids < 0) | (ids >= self._n_vocab)][0])
            raise RequestError(f"token id {wrong} is not in the vocabulary; expected 0 to {self._n_vocab - 1}")

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._source:
            return ChatTemplate(self._source, self.tokenizer)
        return ChatTemplate.from_metadata(self._metadata, self.tokenizer)


def _is_messages(prompt: Sequence[int] | Messages) -> TypeGuard[Messages]:
    return bool(len(prompt)) and isinstance(prompt[0], Mapping)
