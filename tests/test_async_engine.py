"""The engine under asyncio: answers side by side, cancellation, errors."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from engine import AsyncEngine, Engine, EngineConfig, SamplingParams
from engine.errors import RequestError

PARAMS = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
PROMPTS = ["def main():", "import os", "class A:", "x = 1", "# Title"]
CONFIG = EngineConfig.load(
    overrides={"engine.n_sequences": 2, "engine.context_length": 128, "engine.n_threads": 1}, environ={}
)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    with Engine.open(config=CONFIG) as engine:
        return [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]


def test_answers_side_by_side(expected: list[tuple[int, ...]]) -> None:
    async def main() -> list[tuple[int, ...]]:
        async with await AsyncEngine.open(config=CONFIG) as engine:
            answers = await asyncio.gather(*(engine.generate(prompt, PARAMS) for prompt in PROMPTS))
            assert engine.statistics.n_requests == len(PROMPTS)
        return [answer.token_ids for answer in answers]

    assert asyncio.run(main()) == expected


def test_the_loop_is_free_while_an_answer_is_made(expected: list[tuple[int, ...]]) -> None:
    async def main() -> None:
        async with await AsyncEngine.open(config=CONFIG) as engine:
            answer = asyncio.create_task(engine.generate(PROMPTS[0], PARAMS))
            n_turns = 0
            while not answer.done():
                await asyncio.sleep(0)
                n_turns += 1
            assert n_turns > 1
            assert answer.result().token_ids == expected[0]

    asyncio.run(main())


def test_leaving_a_stream_or_cancelling_frees_its_sequence(expected: list[tuple[int, ...]]) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=110, ignore_eos=True)

    async def main() -> None:
        async with await AsyncEngine.open(config=CONFIG) as engine:
            for _ in range(3):
                async with aclosing(engine.stream(PROMPTS[0], long)) as chunks:
                    async for chunk in chunks:
                        assert chunk.completion is None
                        break
                task = asyncio.create_task(engine.generate(PROMPTS[1], long))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            answers = await asyncio.gather(*(engine.generate(prompt, PARAMS) for prompt in PROMPTS))
            assert [answer.token_ids for answer in answers] == expected

    asyncio.run(main())


def test_errors_arrive_where_they_are_awaited(expected: list[tuple[int, ...]]) -> None:
    async def main() -> None:
        async with await AsyncEngine.open(config=CONFIG) as engine:
            good, bad = await asyncio.gather(
                engine.generate(PROMPTS[0], PARAMS), engine.generate("", PARAMS), return_exceptions=True
            )
            assert good.token_ids == expected[0]
            assert isinstance(bad, RequestError)

    asyncio.run(main())


def test_a_closed_engine_says_so() -> None:
    async def main() -> None:
        async with await AsyncEngine.open(config=CONFIG) as engine:
            pass
        with pytest.raises(RequestError, match="the engine is closed; open it again"):
            await engine.generate("a", PARAMS)

    asyncio.run(main())
