"""`batch`: answer every prompt of some files, as a TOML file says; run again, it goes on where it was stopped."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.batch import Item, Job, ResultFile, check_job, load_job, run_job
from engine.cli.command import EXIT_SOME_FAILED
from engine.cli.options import add_answering, read_overrides
from engine.cli.summaries import speed
from engine.cli.terminal import Bars
from engine.errors import EngineError
from engine.generate.answer import Completion
from engine.runtime import Engine

_MOST_SHOWN = 10  # items with which something is wrong
_EPILOG = """\
a job file:
  [batch]
  input = ["questions.jsonl"]          # {"question": "..."} a line; or CSV, or text files
  prompt = "Answer briefly: {question}"
  chat = true
  output = "answers.jsonl"

  [model]
  path = "model.gguf"

  [sampling]
  max_tokens = 200
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "batch",
        help="answer all prompts of some files",
        description="Answer every prompt of some files, several at a time, and write each answer as it is finished. "
        "A run that was stopped goes on where it was. The exit code is 3 if an item failed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", metavar="JOB.toml", help="what to do: a [batch] table, and any settings of the engine")
    parser.add_argument("--check", action="store_true", help="check the job, its input and its model, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run the items again that failed in earlier runs")
    add_answering(parser, has_config=False)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    job = load_job(args.job, read_overrides(args))
    if args.check:
        if wrong := check_job(job):
            console.print(f"{args.job}: {len(wrong)} of {len(job.items)} items cannot be answered:")
            console.print("\n".join(wrong[:_MOST_SHOWN] + ["..."] * (len(wrong) > _MOST_SHOWN)), markup=False)
            return EXIT_SOME_FAILED
        if not args.quiet:
            console.print(f"{args.job}: {len(job.items)} items, nothing wrong")
        return 0
    with ResultFile(job.output, job.items) as results:
        if args.retry_failed:
            results.forget_failed()
        n_before = len(results.done)
        if n_before < len(job.items):
            try:
                _run(job, results, console, quiet=args.quiet)
            except KeyboardInterrupt:
                console.print(f"stopped with {_tally(job, results)}; the same command goes on from here")
                raise
        if not args.quiet:
            console.print(f"{_tally(job, results)}, {n_before} of them before; results in {job.output}")
        if not results.failed:
            return 0
        n = len(results.failed)
        console.print(
            f'{n} item{"s" * (n != 1)} failed; what was wrong stands under "error" in {job.output}; once that is '
            "mended, --retry-failed runs them again"
        )
        return EXIT_SOME_FAILED


def _tally(job: Job, results: ResultFile) -> str:
    failed = f" ({len(results.failed)} failed)" if results.failed else ""
    return f"{len(results.done)} of {len(job.items)} items done{failed}"


def _run(job: Job, results: ResultFile, console: Console, *, quiet: bool) -> None:
    with Bars(console, quiet=quiet) as bars, Engine.open(config=job.config, progress=bars.loading) as engine:
        bars.close()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=len(job.items), completed=len(results.done))

            def on_result(item: Item, outcome: Completion | EngineError) -> None:
                if isinstance(outcome, EngineError):
                    console.print(f"{item.source}: {outcome}")
                bar.update(task, completed=len(results.done))

            run_job(job, results, engine, on_result, lambda: bar.update(task, description=speed(engine.statistics)))
        if not quiet:
            console.print(speed(engine.statistics))
