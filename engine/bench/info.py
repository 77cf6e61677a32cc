"""`info`: what a model file holds, where its parts would go on this machine, and what speed to expect."""

from __future__ import annotations

import argparse
import json
import math
import sys

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from engine.bench.limits import read_bandwidth
from engine.bench.plan import Prediction, made_up_trace, measure_on_gpu, placement_table, predict, predict_wish
from engine.bench.units import format_bytes
from engine.cli.options import ENGINE_OPTIONS, add_common, add_settings, read_settings
from engine.config import EngineConfig
from engine.data import tiny_model_path
from engine.devices.footprint import Footprint, measure
from engine.devices.placement import MemoryPlan, Wish, plan_memory
from engine.devices.timing import Machine
from engine.devices.traffic import WeightTraffic, count_weights
from engine.errors import DeviceError
from engine.gguf import ModelFile
from engine.machine import available_memory, ram_bytes
from engine.model_spec import AttentionSpec, CompressedAttentionSpec, LatentAttentionSpec
from engine.models import Model, load_model
from engine.runtime import limits_of, memory_wish, most_drafts, resolve, stream_n_tokens, survey_machine
from engine.synthetic import PREFIX, open_model_file

Facts = dict[str, str | int | float]

_BANDWIDTH_BUFFER = 128 << 20  # bytes


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "info",
        help="tell what a model file holds and how it would run here",
        description="Tell what a model holds, where its parts would go on this machine, and what speed to expect. "
        "No weight is read.",
    )
    parser.add_argument("model", nargs="?", help="GGUF file or synthetic:NAME (default: the bundled tiny model)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, ENGINE_OPTIONS)
    add_common(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace, _: Console) -> int:
    """Print what a model is and how it would run."""
    config = read_settings(args)
    model_file = open_model_file(config.model.path or tiny_model_path())
    try:
        model = load_model(model_file, drafts=most_drafts(config) > 0)
        facts = model_facts(model_file, model)
        here, placements = machine_facts(model, config)
    finally:
        model_file.close()
    if args.json:
        sys.stdout.write(json.dumps(facts | here, indent=2, ensure_ascii=False) + "\n")
        return 0
    out = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    for title, part in (("model", facts), ("on this machine", here)):
        table = Table(show_header=False, box=None, pad_edge=False, title=title, title_justify="left")
        for key, value in part.items():
            table.add_row(key.replace("_", " "), _shown(key, value))
        out.print(table)
    if placements:
        out.print(placement_table(placements))
    for line in advice(here, config.model.load, is_synthetic=config.model.path.startswith(PREFIX)):
        out.print(line)
    return 0


def _shown(key: str, value: str | float) -> str:
    if isinstance(value, int):
        return f"{value:,}" + (f"  ({format_bytes(value)})" if "bytes" in key and value >= 1000 else "")
    if isinstance(value, float):
        return f"{value:.0%}" if key.startswith("share") else f"{value:,.1f}"
    return value


def _attention(spec: AttentionSpec | LatentAttentionSpec | CompressedAttentionSpec) -> str:
    if isinstance(spec, CompressedAttentionSpec):
        return f"{spec.n_heads} heads over one key of {spec.head_dim} values, of a token or of some together"
    if isinstance(spec, LatentAttentionSpec):
        in_windows = f"; in windows {_attention(spec.window_attention)}" if spec.window_attention else ""
        rotated = f" + {spec.rope_dim}" if spec.rope_dim else ""
        return f"{spec.n_heads} heads over one latent vector of {spec.latent_dim}{rotated} values{in_windows}"
    up_to, up_to_kv = ("up to " if heads else "" for heads in (spec.layer_heads, spec.layer_kv_heads))
    values = f" (values {spec.value_dim})" if spec.value_dim else ""
    values += f" ({spec.window_head_dim} in windows)" if spec.window_head_dim else ""
    return f"{up_to}{spec.n_heads} heads, {up_to_kv}{spec.n_kv_heads} key-value heads, size {spec.head_dim}{values}"


def model_facts(model_file: ModelFile, model: Model) -> Facts:
    """Return what there is to know about a model, in reading order."""
    spec, weights = model.spec, count_weights(model.graph)
    return {
        "file": model_file.name,
        "name": spec.name,
        "architecture": spec.architecture,
        "layers": spec.n_layers,
        "recurrent_layers": sum(spec.recurrent_layers),
        "hidden_size": spec.hidden_size,
        "attention": _attention(spec.attention),
        "experts": spec.moe.n_experts,
        "experts_used": spec.moe.n_experts_used,
        "expert_ffn_size": spec.moe.ffn_size,
        "shared_ffn_size": spec.moe.shared_ffn_size,
        "vocabulary": spec.n_vocab,
        "heads_that_draft_tokens": int(spec.draft_layer is not None),
        "trained_context": spec.context_length,
        "parameters": sum(math.prod(info.shape) for info in model_file.tensors.values()),
        "tensors": len(model_file.tensors),
        "weight_bytes": sum(info.n_bytes for info in model_file.tensors.values()),
        "expert_bytes": weights.expert_bytes,
        "bytes_a_token_reads": weights.token_bytes,
        "formats": weights.quant_mix,
    }


def machine_facts(model: Model, config: EngineConfig) -> tuple[Facts, list[Prediction]]:
    """Return where the parts of a model would go with these settings and how fast it would be, and other placements.

    With a GPU the figures are those of `engine plan` for this machine; without one they are what the RAM allows.
    """
    config = resolve(config, model.spec)
    limits, weights = limits_of(config.engine), count_weights(model.graph)
    bare, threshold = measure(model.graph, limits), stream_n_tokens(config)
    name, machine = survey_machine(config)
    if machine is None:
        return _facts_without_gpu(config, bare, weights) | {"GPU": f"none is used: {name}"}, []
    is_emulated = config.engine.device == "emulated"
    pays = bare.streaming_pays_from(machine.bandwidths, machine.cpu_macs)

    def footprint_for(wish: Wish) -> Footprint:
        if is_emulated:
            return measure(model.graph, limits, threshold or pays)
        return measure_on_gpu(model.graph, limits, machine, wish, config.engine.max_prompt_tokens, threshold)

    footprint = footprint_for(memory_wish(config))
    try:
        plan = plan_memory(footprint, machine.vram_bytes, memory_wish(config))
    except DeviceError as error:
        return _facts_without_gpu(config, footprint, weights) | {"GPU": name, "problem": str(error)}, []
    position, trace = config.engine.context_length // 2, made_up_trace(footprint)
    chosen = predict_wish(
        machine, footprint, plan.allowed_bytes, memory_wish(config), trace, position, policy=config.moe.policy
    )
    others = []
    if footprint.n_experts:
        others = predict(machine, footprint_for, plan.allowed_bytes, trace, position, policy=config.moe.policy)
    return _facts_with_gpu(config, footprint, name, machine, plan, chosen), others


def _facts_without_gpu(config: EngineConfig, footprint: Footprint, weights: WeightTraffic) -> Facts:
    bandwidth = read_bandwidth(config.engine.n_threads, _BANDWIDTH_BUFFER)
    needed = sum(weights.by_format.values())
    full = footprint.attention_bytes(config.engine.context_length - 1)
    return {
        **_ram_facts(needed, footprint.state_bytes, footprint.scratch_bytes),
        "context": config.engine.context_length,
        "threads": config.engine.n_threads,
        "read_bandwidth_GB_s": bandwidth / 1e9,
        "decode_tok_s_at_most": bandwidth / (weights.token_bytes + footprint.attention_bytes(0)),
        "decode_tok_s_at_most_in_full_context": bandwidth / (weights.token_bytes + full),
    }


def _facts_with_gpu(
    config: EngineConfig, footprint: Footprint, name: str, machine: Machine, plan: MemoryPlan, chosen: Prediction
) -> Facts:
    speeds = machine.bandwidths
    on_cpu = int(((plan.n_slots < plan.n_experts) * plan.expert_bytes).sum()) * plan.n_experts
    facts: Facts = _ram_facts(on_cpu, 0, 0) | {
        "GPU": name,
        "VRAM_free_bytes": machine.vram_bytes,
        "VRAM_planned_bytes": plan.n_bytes,
        "in_VRAM": plan.describe(),
    }
    if footprint.n_experts:
        facts |= {
            "expert_slots_of_a_layer": _slots(plan, footprint.context_length),
            "share_of_experts_in_VRAM": plan.slot_bytes / footprint.expert_total_bytes,
            "share_of_reads_from_VRAM_expected": chosen.hit_rate,
        }
    return facts | {
        "context": config.engine.context_length,
        "threads": config.engine.n_threads,
        "read_bandwidth_GB_s": speeds.ram / 1e9,
        "PCIe_bandwidth_GB_s": speeds.pcie / 1e9,
        "VRAM_bandwidth_GB_s": speeds.vram / 1e9,
        "decode_tok_s_expected": chosen.decode_tok_s,
    }


def _ram_facts(weight_bytes: int, state_bytes: int, scratch_bytes: int) -> Facts:
    return {
        "RAM_bytes": ram_bytes(),
        "RAM_free_bytes": available_memory() or 0,
        "weights_in_RAM_bytes": weight_bytes,
        **({"keys_and_values_bytes": state_bytes, "scratch_bytes": scratch_bytes} if scratch_bytes else {}),
        "needed_bytes": weight_bytes + state_bytes + scratch_bytes,
    }


def _slots(plan: MemoryPlan, context_length: int) -> str:
    text = f"{_range(plan.n_slots)} of {plan.n_experts}"
    if plan.context_slots:
        text += f", {_range(plan.usable.of(1, context_length).sum(1))} in a full context"
    return f"{text}, {_range(plan.n_kept)} while a long prompt runs" if plan.lent_bytes else text


def _range(numbers: npt.NDArray[np.intp]) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low}" if low == high else f"{low} to {high}"


def advice(here: Facts, load: str, *, is_synthetic: bool = False) -> list[str]:
    """Return what follows for somebody who wants to run the model; `load` is the setting."""
    lines = [_fit(here, load, is_synthetic=is_synthetic)]
    if "decode_tok_s_expected" in here:
        lines += [
            f"With these settings about {here['decode_tok_s_expected']:,.1f} tok/s at half of the context: predicted "
            "from bytes and the bandwidths above, and hits from a replay of made-up routing. Nothing was run, and "
            "kernels stay below what the bandwidths allow.",
            "The same for another machine: python -m engine plan -m MODEL --machine 4090, or --vram 24GB ...",
        ]
    else:
        lines += [
            f"On the CPU a token takes at least {1e3 / float(here['decode_tok_s_at_most']):,.2f} ms: every weight it "
            "needs is read once, at the bandwidth just measured.",
            "What a GPU would change: python -m engine plan -m MODEL --machine 4090, or --vram 24GB ...",
        ]
    return lines


def _fit(here: Facts, load: str, *, is_synthetic: bool) -> str:
    """Say whether the RAM holds what must be there."""
    needed, ram, free = int(here["needed_bytes"]), int(here["RAM_bytes"]), int(here["RAM_free_bytes"])
    if not needed:
        return "It fits the VRAM."
    if 0 < ram < needed and is_synthetic:
        return f"It does not fit the RAM: {format_bytes(needed)} of {format_bytes(ram)}; take fewer layers."
    if 0 < ram < needed:
        return (
            f"It does not fit the RAM: {format_bytes(needed)} of {format_bytes(ram)}. The rest is read from the disk "
            "for every token, which is slower by far than what follows; take a smaller quantisation."
        )
    if 0 < free < needed:
        return f"It fits the RAM, but not the {format_bytes(free)} that are free now; close other programs."
    has_gpu = "decode_tok_s_expected" in here
    if (load == "mmap" or (load == "auto" and not has_gpu)) and not is_synthetic:
        return (
            'It fits the RAM. The first tokens read the file from the disk (load = "mmap"); --load memory reads all of '
            "it before."
        )
    return "It fits the RAM."
