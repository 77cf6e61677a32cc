"""The bench command: what is asked for, measured in turn, shown and written."""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from engine.bench import conversation, drafts, kernels, measure, peers, placements, plots, replay
from engine.bench.table import Report, machine_facts, render, to_csv, to_json, write_file
from engine.cli.options import ENGINE_OPTIONS, add_common, add_settings, read_settings
from engine.cli.terminal import Bars
from engine.config import EngineConfig
from engine.data import tiny_model_path
from engine.errors import ConfigError, RequestError
from engine.files import check_target
from engine.machine import last_level_cache_bytes, n_physical_cores
from engine.quants.formats import QuantFormat
from engine.runtime import Engine, EngineStatistics
from engine.synthetic import PREFIX

DESCRIPTION = """Measure prompt and decode speed, and how near decoding is to the bandwidth of the memory, measured in
the same runs. Prompts are random tokens, answers what the model draws after them, read token by token."""
_CONVERSATION_TOKENS = 768  # of context beside the longest answer
_LINES_AROUND_LAYERS = 7  # title, which may take two lines, headings, frame, and the cursor's
_FILE_WIDTH = 160  # columns, where the output is not a terminal
BENCH_OPTIONS = {
    "bench.prompt_tokens": ("--prompt-tokens",),
    "bench.gen_tokens": ("--gen-tokens",),
    "bench.reps": ("--reps",),
}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` to the parser of all commands."""
    add_arguments(commands.add_parser("bench", help="measure speed", description=DESCRIPTION))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, and what to do with them."""
    parser.add_argument("-m", "--model", metavar="MODEL", help="GGUF file or synthetic:NAME (default: the bundled one)")
    parser.add_argument("--peer", action="append", default=[], choices=peers.PEERS, help="measure it on the same file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the speeds, or the hit rates of --replay or --conversation"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--kernels",
        nargs="?",
        const="all",
        metavar="FORMATS",
        help="measure every weight format, or some (Q4_K,MXFP4), at every instruction set",
    )
    what.add_argument("--profile", action="store_true", help="show where the time of a prompt and of a token goes")
    what.add_argument(
        "--conversation", action="store_true", help="play a conversation of many subjects; show hit rates turn by turn"
    )
    what.add_argument(
        "--watch", action="store_true", help="the same, with a live view of hits, swaps and times by layer"
    )
    what.add_argument(
        "--drafts",
        nargs="?",
        const=drafts.DEFAULT,
        metavar="SHARES",
        help=f"measure what drafts (tokens that are guessed and checked together) gain if such shares are right "
        f"(default: {drafts.DEFAULT}); all else is measured without",
    )
    replay.add_arguments(parser, what)
    add_settings(parser, BENCH_OPTIONS | ENGINE_OPTIONS)
    add_common(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Measure what is asked for."""
    _check_outputs([path for path in (args.json, args.csv, args.plot) if path])
    if (args.kernels or args.profile) and (args.peer or args.json or args.csv or args.plot):
        raise RequestError("--peer, --json, --csv and --plot do not go with --kernels or --profile")
    if (args.conversation or args.watch or args.drafts) and (args.peer or args.csv):
        raise RequestError("--peer and --csv do not go with --conversation, --watch or --drafts; there is --json")
    if args.drafts and args.plot:
        raise RequestError("--plot does not go with --drafts; there is --json")
    if args.replay and args.peer:
        raise RequestError("--peer does not go with --replay, which runs no model")
    if args.plot:
        plots.check_plot(args.plot)
    is_terminal = sys.stdout.isatty()
    out = Console(highlight=False, markup=False, width=None if is_terminal else _FILE_WIDTH)
    if args.replay:
        replay.run(args, out, console)
        return 0
    if args.conversation or args.watch:
        _converse(args, out, console)
        return 0
    config = _with_context(read_settings(args))
    if not args.drafts:
        config = _without_drafts(config)
    for peer_name in args.peer:
        _check_peer(peer_name, config)
    with Bars(console, quiet=args.quiet) as bars:
        if args.drafts:
            _show_drafts(drafts.read_shares(args.drafts), config, args.json, bars, out)
        elif args.kernels:
            _show_kernels(kernels.named_formats(args.kernels), config, bars, out)
        elif args.profile:
            _show_profile(config, bars, out)
        else:
            report = _measure(config, args.peer, bars)
            render(report, out)
            if args.json:
                write_file(args.json, to_json(report))
            if args.csv:
                write_file(args.csv, to_csv(report))
            if args.plot:
                plots.plot_speeds(report.rows, str(report.facts["model"]), args.plot)
    return 0


def _check_outputs(paths: list[Path]) -> None:
    """Raise `ConfigError` if a result cannot be written there, before it is measured."""
    try:
        for path in paths:
            check_target(path)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from None


def _with_context(config: EngineConfig) -> EngineConfig:
    """Return the settings with a context that holds the longest run, if none was set."""
    needed = max(config.bench.prompt_tokens) + config.bench.gen_tokens
    settings = config.engine
    return replace(config, engine=replace(settings, context_length=settings.context_length or needed))


def _without_drafts(config: EngineConfig) -> EngineConfig:
    """Return the settings without drafts: how a made-up model's text repeats itself says nothing of others."""
    return replace(config, engine=replace(config.engine, max_drafts=0))


def _check_peer(name: str, config: EngineConfig) -> None:
    if config.model.path.startswith(PREFIX):
        raise RequestError(
            f"--peer {name} needs a file, and {config.model.path} is made in memory; write it with "
            "`python -m engine synth` and measure the file"
        )
    peers.import_llama_cpp()


def _measure(config: EngineConfig, peer_names: list[str], bars: Bars) -> Report:
    settings = config.bench
    lengths, n_gen, reps = settings.prompt_tokens, settings.gen_tokens, settings.reps
    used, statistics, rows = _measure_engine(config, bars)
    facts = machine_facts() | {
        "model": f"{statistics.model}, {statistics.file_bytes / 1e9:.3g} GB ({config.model.load})",
        "formats": statistics.weights.quant_mix,
        "device": statistics.device,
        "runs": f"{reps} x each prompt + {n_gen} tokens; median (lowest-highest)",
    }
    if peer_names:
        rows += peers.measure_llama_cpp(
            os.fspath(config.model.path or tiny_model_path()),
            prompt_lengths=lengths,
            n_gen=n_gen,
            reps=reps,
            n_threads=used.engine.n_threads,
            n_batch=used.engine.max_batch_tokens,
            token_bytes=statistics.weights.token_bytes,
            buffer_bytes=settings.bandwidth_mb << 20,
            progress=bars.steps,
        )
    notes = placements.explain(config, statistics) if statistics.cache is not None else []
    if any(row.placed is None for row in rows):
        notes.append("RAM gave, of limit: how fast it was read just before and after each run, and the share of that.")
        if statistics.file_bytes < 4 * last_level_cache_bytes():
            notes.append("The weights are small against this CPU's caches, so the share of the limit says little.")
    return Report(facts, rows, notes)


def _measure_engine(config: EngineConfig, bars: Bars) -> tuple[EngineConfig, EngineStatistics, list[measure.Row]]:
    """Return the settings in use, what the engine says of itself, and its rows: one kind, or three with a GPU."""
    bench = config.bench
    if config.engine.device not in {"emulated", "cuda"}:
        with Engine.open(config=config, progress=bars.loading) as engine:
            if engine.statistics.cache is None:
                rows = measure.measure(
                    engine, "all on CPU", bench.prompt_tokens, bench.gen_tokens, bench.reps, bars.steps
                )
                return engine.config, engine.statistics, rows
    return placements.measure_placements(config, bars)


def _converse(args: argparse.Namespace, out: Console, console: Console) -> None:
    """Play the script, and show what it did to the hit rate."""
    config = _without_drafts(read_settings(args))
    settings, n_gen = config.engine, config.bench.gen_tokens
    context = settings.context_length or _CONVERSATION_TOKENS + n_gen
    config = replace(config, engine=replace(settings, context_length=context))
    with Bars(console, quiet=args.quiet) as bars, Engine.open(config=config, progress=bars.loading) as engine:
        bars.close()
        if args.watch:
            with Live(console=out, auto_refresh=False) as live:
                room = max(out.height - _LINES_AROUND_LAYERS, 1)
                watcher = conversation.Watcher(lambda table: live.update(table, refresh=True), room)
                turns = conversation.converse(engine, n_gen, watcher)
        else:
            turns = conversation.converse(engine, n_gen, lambda *_: None)
        statistics = engine.statistics
    out.print(conversation.table_of(turns, is_virtual=statistics.has_virtual_clock))
    out.print(statistics.cache_line)
    if args.json:
        write_file(args.json, conversation.to_json(turns))
    if args.plot:
        plots.plot_conversation(turns, f"{statistics.model}, a conversation of many subjects", args.plot)


def _show_drafts(shares: list[float], config: EngineConfig, json_file: Path | None, bars: Bars, out: Console) -> None:
    bench = config.bench
    with Engine.open(config=config, progress=bars.loading) as engine:
        n_prompt = bench.prompt_tokens[0]
        rows = drafts.measure_drafts(engine, shares, n_prompt, bench.gen_tokens, bench.reps, bars.steps)
        statistics, has_head = engine.statistics, engine.has_draft_head
    bars.close()
    facts = machine_facts() | {
        "model": statistics.model,
        "device": statistics.device,
        "runs": f"{bench.reps} x {n_prompt} + {bench.gen_tokens} tokens, in turn; every text was the same",
        "drafts": "known before, after the time that the model's own head takes" if has_head else "known before",
    }
    for key, value in facts.items():
        out.print(f"{key}: {value}")
    out.print(drafts.table_of(rows, is_virtual=statistics.has_virtual_clock))
    if json_file:
        write_file(json_file, drafts.to_json(rows, facts))


def _show_kernels(formats: Sequence[QuantFormat], config: EngineConfig, bars: Bars, out: Console) -> None:
    n_threads = config.engine.n_threads or n_physical_cores()
    speeds = kernels.measure_kernels(formats, n_threads, config.bench.bandwidth_mb << 20, bars.steps)
    for key, value in machine_facts().items():
        out.print(f"{key}: {value}")
    out.print(
        f"Decode: one token through {kernels.N_EXPERTS} experts a layer, {kernels.HIDDEN_SIZE} x {kernels.FFN_SIZE}; "
        "GB/s of weights, and the share of the bandwidth of the RAM, measured in turn. "
        f"Prompt: {kernels.N_PROMPT_TOKENS} tokens through one expert, {n_threads} threads. "
        "* = no vector code of its own at this level."
    )
    table = Table()
    for heading in ("format", "level"):
        table.add_column(heading)
    for decode in speeds[0].decode:
        table.add_column(f"decode, {decode.n_threads} thread{'s' * (decode.n_threads > 1)}", justify="right")
    table.add_column("prompt, GMAC/s", justify="right")
    for speed in speeds:
        table.add_row(
            speed.format,
            speed.isa if speed.is_fast else f"{speed.isa} *",
            *(f"{decode.bytes_s / 1e9:.2f} ({decode.share:.0%})" for decode in speed.decode),
            f"{speed.macs_s / 1e9:.1f}",
        )
    out.print(table)


def _show_profile(config: EngineConfig, bars: Bars, out: Console) -> None:
    """Print the operations of a prompt and of one token after it, the slowest kind first."""
    with Engine.open(config=config, progress=bars.loading) as engine:
        n_prompt = min(max(config.bench.prompt_tokens), engine.config.engine.max_batch_tokens)
        for title, n_tokens in ((f"prompt of {n_prompt} tokens", n_prompt), ("one token", 1)):
            tokens = measure.random_tokens(n_tokens, engine.spec.n_vocab)
            engine.profile(tokens)  # first use of pages
            times: dict[str, list[float]] = defaultdict(list)
            for name, seconds in engine.profile(tokens):
                times[name].append(seconds)
            total = sum(map(sum, times.values()))
            table = Table(title=f"{title}: {total * 1e3:.3f} ms", title_justify="left")
            for heading in ("operation", "calls", "ms", "us a call", "share"):
                table.add_column(heading, justify="left" if heading == "operation" else "right")
            for name, seconds_of in sorted(times.items(), key=lambda item: -sum(item[1])):
                spent = sum(seconds_of)
                a_call = spent / len(seconds_of) * 1e6
                table.add_row(name, str(len(seconds_of)), f"{spent * 1e3:.3f}", f"{a_call:.1f}", f"{spent / total:.0%}")
            out.print(table)
