"""What an engine and a session have in common: they answer prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal, overload

from engine.config import SamplingParams
from engine.generate.answer import Chunk, Completion

Messages = Sequence[Mapping[str, object]]
Prompt = str | Sequence[int] | Messages
StepProgress = Callable[[int, int], None]  # tokens done, tokens in all


class Answering(ABC):
    """Answers prompts, in a place that the class which derives from it chooses."""

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        progress: StepProgress | None = None,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        progress: StepProgress | None = None,
    ) -> Generator[Chunk, None, None]: ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        progress: StepProgress | None = None,
    ) -> Completion | Generator[Chunk, None, None]:
        """Answer a prompt. A session then holds prompt and answer, but for the answer's last token.

        Args:
            prompt: a text to continue, chat messages such as `[{"role": "user", "content": "Hello"}]`, or token ids;
                the whole of it, also in a session, which runs only what it does not hold already.
            params: how tokens are chosen; None for the [sampling] settings.
            stream: return an iterator of pieces instead of the whole answer. Close it to stop early.
            progress: called with (tokens done, tokens in all) while the prompt is run, in the thread that runs a step,
                whose end it must not wait for: what it asks the engine for raises `RequestError`.

        Raises:
            RequestError: for an empty prompt, or one that leaves no room in the context.
            TokenizerError: for messages, if the model has no chat template or it refuses them.

        >>> from engine import Engine, SamplingParams
        >>> with Engine.open() as engine:
        ...     answer = engine.generate("def main():", SamplingParams(max_tokens=6, ignore_eos=True))
        ...     answer.finish_reason, answer.usage.n_prompt_tokens, len(answer.token_ids)
        ('length', 4, 6)
        """
        if stream:
            return self._stream(prompt, params, progress)
        return self._complete(prompt, params, progress)

    @abstractmethod
    def _complete(self, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None) -> Completion:
        """Return the whole answer."""

    @abstractmethod
    def _stream(
        self, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None
    ) -> Generator[Chunk, None, None]:
        """Check the request, and return the answer's pieces."""
