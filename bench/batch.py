"""Measures what answering prompts together gains over answering them one by one, in tokens a second of all answers.

    python bench/batch.py -m MODEL [-t THREADS] [--device cpu] [--sequences 8] [--prompt-tokens 16] [--gen-tokens 32]
                          [--rounds 5]

Both ways alternate, on one engine and with the same prompts of random tokens; the texts must be the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

from engine import Completion, Engine, EngineConfig, SamplingParams
from engine.bench.measure import random_tokens
from engine.errors import EngineError


def main() -> None:
    """Measure; print a line for each round, then the medians. Exit with a message for what cannot be done."""
    try:
        _measure(_read_arguments())
    except EngineError as error:
        sys.exit(f"error: {error}")


def _measure(args: argparse.Namespace) -> None:
    settings = {
        "engine.device": args.device,
        "engine.n_sequences": args.sequences,
        "engine.n_threads": args.threads,
        "model.path": args.model,
    }
    params = SamplingParams(max_tokens=args.gen_tokens, temperature=0.0, ignore_eos=True)
    n_tokens = args.sequences * args.gen_tokens
    speeds: list[tuple[float, float]] = []
    with Engine.open(config=EngineConfig.load(overrides=settings)) as engine:
        ids = random_tokens((args.rounds + 1) * args.sequences * args.prompt_tokens, engine.spec.n_vocab)
        prompts = [ids[i : i + args.prompt_tokens] for i in range(0, len(ids), args.prompt_tokens)]
        for i in range(args.rounds + 1):
            chosen = prompts[i * args.sequences : (i + 1) * args.sequences]
            alone_s, alone = _run(engine, chosen, params, together=False)
            _forget(engine, args.sequences)
            together_s, together = _run(engine, chosen, params, together=True)
            _forget(engine, args.sequences)
            if [c.token_ids for c in alone] != [c.token_ids for c in together]:
                raise SystemExit("the texts differ: a sequence must not depend on those beside it")
            if i:  # the first round warms up
                speeds.append((n_tokens / alone_s, n_tokens / together_s))
                print(f"round {i}: {_line(speeds[-1:])}", flush=True)
    print(f"medians of {args.rounds} rounds: {_line(speeds)}")


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure answers made together against answers made one by one.")
    parser.add_argument("-m", "--model", default="synthetic:qwen3-30b-a3b:layers=8", metavar="MODEL")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or auto (default: cpu)")
    for name, default in (("sequences", 8), ("prompt-tokens", 16), ("gen-tokens", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    args = parser.parse_args()
    for name in ("sequences", "prompt_tokens", "gen_tokens", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more")
    return args


def _run(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, *, together: bool
) -> tuple[float, list[Completion]]:
    start = time.perf_counter()
    if together:
        answers = dict(engine.generate_many(prompts, params))
        found = [answers[i] for i in range(len(prompts))]
    else:
        found = [engine.generate(prompt, params) for prompt in prompts]
    seconds = time.perf_counter() - start
    completions = [answer for answer in found if isinstance(answer, Completion)]
    assert len(completions) == len(prompts)
    return seconds, completions


def _forget(engine: Engine, n_sequences: int) -> None:
    """Empty all sequences, so that no prompt is held already."""
    for session in [engine.new_session() for _ in range(n_sequences)]:
        session.close()


def _line(speeds: list[tuple[float, float]]) -> str:
    """Return the medians of some rounds; the ratio's is that of the rounds' own, for speeds change between them."""
    alone, together = (median(speed) for speed in zip(*speeds, strict=True))
    ratio = median(together / alone for alone, together in speeds)
    return f"one by one {alone:.1f} tok/s, together {together:.1f} tok/s, {ratio:.2f} x"


if __name__ == "__main__":
    main()
