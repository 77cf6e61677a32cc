"""`python -m engine plan`: what a machine that one need not have would do with a model, and which setting to use.

Nothing is run: bytes come from the model's shape, hits and swaps from replayed routing, and time from the same model
of a step that sets the emulated device's clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engine.bench.units import format_bytes, parse_rate
from engine.cli.options import add_output
from engine.config import EngineSettings
from engine.data import tiny_model_path
from engine.devices.footprint import Footprint, measure
from engine.devices.graph import Graph, KVType
from engine.devices.placement import MemoryPlan, Wish, least_cpu_layers, longest_step, plan_memory
from engine.devices.program import Limits
from engine.devices.timing import Bandwidths, Machine, StepTime, StepWork, time_step
from engine.errors import ConfigError, DeviceError
from engine.experts.policy import make_policy
from engine.experts.replay import replay
from engine.experts.routing_process import RoutingProcess
from engine.experts.trace import Trace, load_trace
from engine.models import load_model
from engine.synthetic import open_model_file
from engine.tables import parse_bytes

PROMPT_TOKENS, ANSWER_TOKENS = 128, 512  # of made-up routing
BATCH_TOKENS = 512  # of a step
LONG_STEP = EngineSettings().max_prompt_tokens
MAX_DRAFTS = EngineSettings().max_drafts
MOST_CONTEXT = 1 << 24  # tokens, as in the settings
SWAP_SHARE = 0.2  # of a token's time
SWAP_LAG = 1  # tokens by which a swap is late: its cause is looked at during the next step, and it arrives in that

# A Ryzen 9 7950X with 96 GB of DDR5 and an RTX 4090, on which a fork of llama.cpp with a hot-expert cache reports these
# tokens a second for Qwen3.5-122B-A10B at Q4_K_L. Kernels reach a part of what the data sheets say.
REFERENCE_MACHINE = "4090"
REFERENCE_MODEL = "qwen3.5-122b"
REFERENCE_TOK_S = (15.65, 17.87, 22.67)
VRAM_EFFICIENCY, RAM_EFFICIENCY = 0.9, 0.9


@dataclass(frozen=True, slots=True)
class Prediction:
    """One way to place the experts of a model.

    Attributes:
        name: for people.
        setting: in the [moe] table.
        decode_tok_s, prompt_tok_s: tokens a second, in the middle of the context.
        vram_bytes: used.
        hit_rate: share of the chosen experts that are read from VRAM.
        swaps: experts copied for a token.
        step: where the time of a token goes.
        ram_bytes, link_bytes: read from RAM and sent over PCIe for a token.
        reference_tok_s: reported by others for this model and machine; 0 if not known.
    """

    name: str
    setting: str
    decode_tok_s: float
    prompt_tok_s: float
    vram_bytes: int
    hit_rate: float
    swaps: float
    step: StepTime
    ram_bytes: float
    link_bytes: float
    reference_tok_s: float = 0.0


def predict(
    machine: Machine,
    footprint_for: Callable[[Wish], Footprint],
    allowed_bytes: int,
    trace: Trace,
    position: int,
    *,
    policy: str = "adaptive",
    progress: Callable[[int], object] | None = None,
) -> list[Prediction]:
    """Return the three ways: all experts on the CPU, whole layers on the GPU, hot experts on the GPU.

    `footprint_for` gives the model's needs with each; other arguments and errors are those of `predict_wish`.
    """
    n_cpu_moe = _least_cpu_layers(footprint_for, allowed_bytes)
    return [
        predict_wish(
            machine, footprint_for(wish), allowed_bytes, wish, trace, position, policy=policy, progress=progress
        )
        for wish in (Wish(hot_k=0), Wish(n_cpu_moe=n_cpu_moe), Wish())
    ]


def _least_cpu_layers(footprint_for: Callable[[Wish], Footprint], allowed_bytes: int) -> int:
    """Return the smallest `n_cpu_moe` that fits: what is free then may go to longer steps, which take some of it."""
    shortest_steps = footprint_for(Wish(n_cpu_moe=0))
    n_layers = len(shortest_steps.expert_bytes)
    for n_cpu in range(least_cpu_layers(shortest_steps, allowed_bytes), n_layers):
        wish = Wish(n_cpu_moe=n_cpu)
        with contextlib.suppress(DeviceError):
            plan_memory(footprint_for(wish), allowed_bytes, wish)
            return n_cpu
    return n_layers


def predict_wish(
    machine: Machine,
    footprint: Footprint,
    allowed_bytes: int,
    wish: Wish,
    trace: Trace,
    position: int,
    *,
    policy: str = "adaptive",
    progress: Callable[[int], object] | None = None,
) -> Prediction:
    """Return what comes of one way to place the experts.

    Args:
        machine: its speeds.
        footprint: the model's needs.
        allowed_bytes: of VRAM.
        wish: how to use them.
        trace: routing that the cache meets; its layers are stretched to the model's.
        position: tokens in the context.
        policy: of the cache.
        progress: called with the tokens replayed.

    Raises `DeviceError` if the model does not fit.
    """
    plan = plan_memory(footprint, allowed_bytes, wish)
    n_slots = plan.usable.of(1, position + 1).sum(1)
    is_whole = n_slots >= plan.n_experts
    if (is_whole | (n_slots == 0)).all():  # there is nothing to swap
        rates, loads = is_whole.astype(np.float64), np.zeros(len(is_whole))
    else:
        no_slots = np.zeros_like(n_slots)
        nothing = replace(plan, n_slots=no_slots, n_kept=no_slots, context_slots=())
        token_s = _prediction(machine, footprint, nothing, position, wish, policy, *np.zeros((2, len(is_whole)))).step
        rates, loads = _replayed(machine, footprint, n_slots, trace, policy, token_s.total_s, progress)
    return _prediction(machine, footprint, plan, position, wish, policy, rates, loads)


def _named(wish: Wish, policy: str) -> tuple[str, str]:
    """Return what a way to place experts is called, and its setting in the [moe] table."""
    if wish.n_cpu_moe is not None:
        return "whole layers on the GPU", f"n_cpu_moe = {wish.n_cpu_moe}"
    if wish.hot_k == 0:
        return "all experts on the CPU", "hot_k = 0"
    return f"hot experts ({policy})", f"hot_k = {wish.hot_k}" if wish.hot_k else 'hot_k = "auto"'


def _replayed(
    machine: Machine,
    footprint: Footprint,
    n_slots_of_model: npt.NDArray[np.intp],
    trace: Trace,
    policy: str,
    token_s: float,
    progress: Callable[[int], object] | None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return hit rates and loads a token of each of the model's layers, from a replay at the same share of slots."""
    n_layers, n_experts = len(n_slots_of_model), footprint.n_experts
    # Which of the trace's layers stands for which of the model's, by depth.
    stands_for = np.arange(trace.n_layers) * n_layers // trace.n_layers
    share = n_slots_of_model[stands_for] / n_experts
    n_slots = np.floor(share * trace.n_experts).astype(np.intp)
    sizes = np.maximum(footprint.expert_bytes[stands_for] * n_experts // trace.n_experts, 1)
    budget = machine.bandwidths.pcie * SWAP_SHARE * token_s * trace.n_layers / n_layers
    text = policy
    if policy == "adaptive" and np.isfinite(machine.bandwidths.break_even):
        text = f"adaptive:break_even={machine.bandwidths.break_even}"
    played = replay(
        trace,
        make_policy(text, trace.n_layers, trace.n_experts),
        n_slots,
        swap_bytes=budget,
        expert_bytes=sizes,
        lag=SWAP_LAG,
        progress=progress,
    )
    rates, loads = played.hits / np.maximum(played.choices, 1), played.loads / max(played.n_tokens, 1)
    nearest = np.arange(n_layers) * trace.n_layers // n_layers
    # A load is of bytes: the trace's experts may be a larger part of their layer than the model's are.
    per_layer = loads * sizes / footprint.expert_bytes[stands_for]
    return rates[nearest], per_layer[nearest]


def _prediction(
    machine: Machine,
    footprint: Footprint,
    plan: MemoryPlan,
    position: int,
    wish: Wish,
    policy: str,
    rates: npt.NDArray[np.float64],
    loads: npt.NDArray[np.float64],
) -> Prediction:
    used = footprint.experts_used.astype(np.float64)
    sizes, macs = footprint.expert_bytes.astype(np.float64), footprint.expert_macs.astype(np.float64)
    copied = float((loads * sizes).sum())
    token = StepWork(
        n_layers=footprint.n_layers,
        dense_bytes=footprint.read_bytes,
        attention_bytes=footprint.attention_bytes(position),
        dense_macs=footprint.dense_macs,
        hit_bytes=rates * used * sizes,
        hit_macs=rates * used * macs,
        miss_bytes=(1 - rates) * used * sizes,
        miss_macs=(1 - rates) * used * macs,
        streamed_bytes=np.zeros(len(rates)),
        copied_bytes=copied,
    )
    step = time_step(machine, token)
    return Prediction(
        *_named(wish, policy),
        1.0 / step.total_s,
        _prompt_speed(machine, footprint, plan, position),
        plan.n_bytes,
        float((token.hit_bytes.sum()) / max((token.hit_bytes + token.miss_bytes).sum(), 1.0)),
        float(loads.sum()),
        step,
        float(token.miss_bytes.sum()) + copied,
        copied,
    )


def _prompt_speed(machine: Machine, footprint: Footprint, plan: MemoryPlan, position: int) -> float:
    """Return prompt tokens a second in long steps: all experts without a slot are streamed, nearly all are chosen."""
    n_experts, n_tokens = max(plan.n_experts, 1), footprint.max_tokens
    unused = (1 - footprint.experts_used / n_experts) ** n_tokens
    chosen = n_experts * (1 - unused) * footprint.expert_bytes.astype(np.float64)
    nothing = np.zeros(len(plan.n_slots))
    macs = footprint.expert_macs.astype(np.float64) * footprint.experts_used * n_tokens
    work = StepWork(
        n_layers=footprint.n_layers,
        dense_bytes=footprint.read_bytes,
        attention_bytes=footprint.attention_bytes(position),
        dense_macs=float(footprint.dense_macs) * n_tokens,
        hit_bytes=chosen,
        hit_macs=macs,
        miss_bytes=nothing,
        miss_macs=nothing,
        streamed_bytes=(n_experts - plan.n_kept).astype(np.float64) * footprint.expert_bytes,
    )
    return n_tokens / time_step(machine, work).total_s


def measure_on_gpu(
    graph: Graph,
    limits: Limits,
    machine: Machine,
    wish: Wish,
    most: int = LONG_STEP,
    stream_n_tokens: int | None = None,
) -> Footprint:
    """Return what a forward pass needs where a GPU runs as much of a prompt together as its memory allows.

    Args:
        graph: the forward pass.
        limits: asked for; its steps are those of a GPU that is too small for longer ones.
        machine: with the GPU.
        wish: for the experts.
        most: tokens of a step.
        stream_n_tokens: of a step that streams the experts without a slot, at least; None for where that pays.
    """
    bare = measure(graph, limits, stores_once=True)
    pays = bare.streaming_pays_from(machine.bandwidths, machine.cpu_macs)
    threshold = stream_n_tokens or min(pays, limits.max_tokens)
    left = machine.vram_bytes - bare.dense_bytes - bare.state_bytes - bare.scratch_bytes
    if threshold > limits.max_tokens:
        return bare

    def longer(n_tokens: int, stream_n_tokens: int | None = None) -> Footprint:
        larger = replace(limits, max_tokens=n_tokens, max_outputs=limits.max_tokens)
        return measure(graph, larger, stream_n_tokens, stores_once=True)

    def needs(n_tokens: int) -> tuple[int, int]:
        found = longer(n_tokens)
        return found.scratch_bytes - bare.scratch_bytes, found.state_bytes - bare.state_bytes

    wanted = min(most, limits.n_slots * limits.context_length)
    layer_bytes = bare.expert_bytes * bare.n_experts
    return longer(longest_step(wanted, limits.max_tokens, left, layer_bytes, wish, needs), threshold)


# -- the command -----------------------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the parser of all commands."""
    parser = commands.add_parser(
        "plan",
        help="predict the speed on a machine",
        description="Predict how fast a machine would run a model with each placement of its experts, and say which "
        "setting to use. Nothing is run, and no weight is read.",
    )
    parser.add_argument("-m", "--model", metavar="MODEL", help="GGUF file or synthetic:NAME (default: the bundled one)")
    parser.add_argument(
        "--machine", choices=[REFERENCE_MACHINE], help="start from a known machine: RTX 4090, Ryzen 9 7950X, 96 GB"
    )
    parser.add_argument("--vram", metavar="SIZE", help="of the GPU that may be used, for example 24GB")
    parser.add_argument("--ram", metavar="SIZE", help="of the machine, for example 96GB")
    parser.add_argument("--ram-bandwidth", metavar="RATE", help="that the CPU reads weights with, for example 60GB/s")
    parser.add_argument("--pcie", metavar="RATE", help="from RAM to the GPU, for example 25GB/s")
    parser.add_argument("--vram-bandwidth", metavar="RATE", help="that the GPU reads weights with, for example 900GB/s")
    parser.add_argument("-c", "--context", type=int, default=8192, metavar="N", help="tokens to have room for")
    parser.add_argument("--kv-type", choices=["f32", "f16", "q8_0"], default="f16", help="of keys and values")
    parser.add_argument("--trace", metavar="FILE", help="recorded routing to replay (default: a made-up one)")
    parser.add_argument("--cache-policy", default="adaptive", metavar="NAME", help="of the cache (default: adaptive)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_output(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, console: Console) -> int:
    """Predict what is asked for."""
    machine, ram_bytes = read_machine(args)
    if not 1 <= args.context <= MOST_CONTEXT:
        raise ConfigError(f"--context is {args.context}; expected 1 to {MOST_CONTEXT}")
    if args.model == "":
        raise ConfigError("the name of the model is empty; give a file, or leave it out for the bundled model")
    model_file = open_model_file(args.model or tiny_model_path())
    try:
        model = load_model(model_file, drafts=MAX_DRAFTS > 0)
        n_weight_bytes = sum(model_file.tensors[name].n_bytes for name in model.tensor_names)
        kv_type, n_tokens = KVType[args.kv_type.upper()], min(BATCH_TOKENS, args.context)
        limits = Limits(n_tokens, 1, args.context, kv_type, max_drafts=MAX_DRAFTS)
        footprint_for = partial(measure_on_gpu, model.graph, limits, machine)
        footprint = footprint_for(Wish())
        if not footprint.n_experts:
            raise ConfigError(
                f"{model_file.name} has no experts, so there is nothing to place; `python -m engine info` says how a "
                "dense model runs here"
            )
        make_policy(args.cache_policy, 1, 1)  # raises for a name that is none, also where nothing is replayed
        trace = load_trace(args.trace) if args.trace else made_up_trace(footprint)
        with Progress(console=console, transient=True, disable=args.quiet or not console.is_terminal) as bar:
            task = bar.add_task("replaying routing", total=trace.n_tokens - trace.n_prompt)
            found = predict(
                machine,
                footprint_for,
                machine.vram_bytes,
                trace,
                args.context // 2,
                policy=args.cache_policy,
                progress=lambda done: bar.update(task, completed=done),
            )
        name = model.spec.name
    finally:
        model_file.close()
    if args.machine == REFERENCE_MACHINE and REFERENCE_MODEL in f"{args.model} {name}".lower():
        found = [_with_reference(p, tok_s) for p, tok_s in zip(found, REFERENCE_TOK_S, strict=True)]
    if args.json:
        rows = [asdict(p) for p in found]
        for row in rows:
            row["step"]["layers"] = row["step"]["layers"].tolist()
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    _show(found, machine, footprint, trace, name, n_weight_bytes, ram_bytes, args.context)
    return 0


def _with_reference(prediction: Prediction, tok_s: float) -> Prediction:
    return replace(prediction, reference_tok_s=tok_s)


def read_machine(args: argparse.Namespace) -> tuple[Machine, int]:
    """Return the machine that the options describe, and its RAM in bytes; raise `ConfigError` if one is missing."""
    known = {"vram": "22.6GB", "ram": "96GB", "ram_bandwidth": f"{65 * RAM_EFFICIENCY}GB/s", "pcie": "25GB/s"}
    known["vram_bandwidth"] = f"{1008 * VRAM_EFFICIENCY}GB/s"
    given = {key: getattr(args, key) for key in known}
    if args.machine == REFERENCE_MACHINE:
        given = {key: value or known[key] for key, value in given.items()}
    options = {key: f"--{key.replace('_', '-')}" for key in known}
    missing = [options[key] for key, value in given.items() if not value]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: missing; give the machine's figures, or start from known ones with --machine "
            f"{REFERENCE_MACHINE}; for the machine at hand there is `python -m engine info`"
        )
    ram, pcie, vram = (parse_rate(given[key], options[key]) for key in ("ram_bandwidth", "pcie", "vram_bandwidth"))
    vram_bytes, ram_bytes = (parse_bytes(given[key], options[key]) for key in ("vram", "ram"))
    return Machine(Bandwidths(ram, pcie, vram), vram_bytes), ram_bytes


def made_up_trace(footprint: Footprint) -> Trace:
    """Return routing that behaves like that of real models, for a model's shape."""
    process = RoutingProcess(
        len(footprint.expert_bytes), footprint.n_experts, int(footprint.experts_used.max(initial=0))
    )
    return process.trace(PROMPT_TOKENS, ANSWER_TOKENS)


def _show(
    found: list[Prediction],
    machine: Machine,
    footprint: Footprint,
    trace: Trace,
    name: str,
    n_weight_bytes: int,
    ram_bytes: int,
    context: int,
) -> None:
    out = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    speeds = machine.bandwidths
    header = Table(show_header=False, box=None, pad_edge=False)
    token_bytes = footprint.read_bytes + footprint.chosen_bytes
    header.add_row(
        "model",
        f"{name}: {format_bytes(n_weight_bytes)}, of which a token reads {format_bytes(token_bytes)} "
        f"({format_bytes(footprint.chosen_bytes)} of experts)",
    )
    header.add_row(
        "machine",
        f"{format_bytes(machine.vram_bytes)} VRAM at {format_bytes(speeds.vram)}/s, {format_bytes(ram_bytes)} RAM at "
        f"{format_bytes(speeds.ram)}/s, PCIe {format_bytes(speeds.pcie)}/s",
    )
    header.add_row("routing", f"{trace.name}, {trace.n_tokens - trace.n_prompt} tokens replayed")
    header.add_row(
        "times",
        f"predicted, not measured; at token {context // 2} of a context of {context}; prompts in steps of "
        f"{footprint.max_tokens} tokens",
    )
    out.print(header)
    out.print(placement_table(found))
    best = max(found, key=lambda p: p.decode_tok_s)
    gains = " and ".join(
        f"{best.decode_tok_s / other.decode_tok_s - 1:+.0%} over {other.name}" for other in found if other is not best
    )
    out.print(f"use [moe] {best.setting}: {best.decode_tok_s:.1f} tok/s, {gains}")
    if best.reference_tok_s:
        out.print(
            "fork's: measured by its author; ours are what the bandwidths allow, and no more than that until measured"
        )
    if n_weight_bytes > ram_bytes:
        out.print(
            f"the weights ({format_bytes(n_weight_bytes)}) are more than the RAM ({format_bytes(ram_bytes)}): the rest "
            "is read from disk again and again, and the times above cannot be reached; use a smaller quantisation"
        )


def placement_table(found: list[Prediction]) -> Table:
    """Return a column for each way to place the experts, so that a narrow terminal has room for it."""
    table = Table()
    table.add_column("experts")
    for p in found:
        table.add_column(p.name.replace(" on the", "\non the").replace(" (", "\n("), justify="right", no_wrap=True)
    rows: list[tuple[str, Callable[[Prediction], str]]] = [
        ("[moe] setting", lambda p: p.setting),
        ("decode tok/s", lambda p: f"{p.decode_tok_s:.2f}"),
        ("prompt tok/s", lambda p: f"{p.prompt_tok_s:.0f}"),
        ("VRAM GB", lambda p: f"{p.vram_bytes / 1e9:.1f}"),
        ("hits", lambda p: f"{p.hit_rate:.0%}"),
        ("swaps a token", lambda p: f"{p.swaps:.1f}"),
        ("token ms", lambda p: f"{p.step.total_s * 1e3:.1f}"),
        ("of that: dense ms", lambda p: f"{(p.step.dense_s + p.step.attention_s) * 1e3:.1f}"),
        ("experts on GPU ms", lambda p: f"{p.step.hits_s * 1e3:.1f}"),
        ("waiting for CPU ms", lambda p: f"{p.step.wait_s * 1e3:.1f}"),
        ("RAM GB a token", lambda p: f"{p.ram_bytes / 1e9:.2f}"),
    ]
    if any(p.reference_tok_s for p in found):
        rows.insert(2, ("fork's decode tok/s", lambda p: f"{p.reference_tok_s:.2f}"))
    for name, cell in rows:
        table.add_row(name, *(cell(p) for p in found))
    return table
