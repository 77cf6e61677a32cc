"""The engine for asyncio programs: answers are awaited, and streams are asynchronous iterators."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from types import TracebackType

from engine.config import EngineConfig, SamplingParams
from engine.errors import RequestError
from engine.generate.answer import Chunk, Completion
from engine.runtime import Engine, EngineStatistics, Prompt


class AsyncEngine:
    """An `Engine` whose answers do not block the event loop. Use it from the loop that opened it.

    Each answer has a thread, as many at a time as there are sequences ([engine] n_sequences); further ones wait in
    order. Answers under way share their steps. A task that is cancelled stops its answer at the next token.

    >>> import asyncio
    >>> from engine import AsyncEngine, EngineConfig, SamplingParams
    >>> async def main():
    ...     config = EngineConfig.load(overrides={"engine.n_sequences": 2})
    ...     async with await AsyncEngine.open(config=config) as engine:
    ...         params = SamplingParams(max_tokens=5, ignore_eos=True)
    ...         both = await asyncio.gather(engine.generate("a", params), engine.generate("b", params))
    ...     return [len(answer.token_ids) for answer in both]
    >>> asyncio.run(main())
    [5, 5]
    """

    def __init__(self, engine: Engine) -> None:
        """Take over an engine that is open; `AsyncEngine.open` is the usual way."""
        self.engine = engine
        self._threads = ThreadPoolExecutor(engine.config.engine.n_sequences, "answer")

    @classmethod
    async def open(cls, path: str | os.PathLike[str] | None = None, config: EngineConfig | None = None) -> AsyncEngine:
        """Open a model without blocking the loop; see `Engine.open`."""
        return cls(await asyncio.to_thread(Engine.open, path, config))

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """Answer a prompt; see `Engine.generate`."""
        async with aclosing(self.stream(prompt, params)) as chunks:
            async for chunk in chunks:
                if chunk.completion is not None:
                    return chunk.completion
        raise AssertionError("a stream ends with its completion or an error")

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Chunk, None]:
        """Yield an answer piece by piece, the last chunk with the whole of it. Leaving the iterator stops it."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()
        is_cancelled = threading.Event()

        def work() -> None:
            try:
                with closing(self.engine.generate(prompt, params, stream=True)) as chunks:
                    for chunk in chunks:
                        if is_cancelled.is_set():
                            return
                        loop.call_soon_threadsafe(pieces.put_nowait, chunk)
            except BaseException as error:
                loop.call_soon_threadsafe(pieces.put_nowait, error)

        try:
            task = self._threads.submit(work)
        except RuntimeError:
            raise RequestError("the engine is closed; open it again") from None
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.completion is not None:
                    return
        finally:
            is_cancelled.set()
            task.cancel()

    @property
    def statistics(self) -> EngineStatistics:
        """Return what the engine is and what it has done so far."""
        return self.engine.statistics

    async def close(self) -> None:
        """Wait for the answers under way and free all memory."""
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self.engine.close)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()
