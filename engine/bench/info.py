"""`info`: what a model file holds, where its parts would go on this machine, and what speed to expect."""

from __future__ import annotations

import argparse
import json
import math
import sys

from rich.console import Console
from rich.table import Table

from engine.bench.limits import read_bandwidth
from engine.bench.units import format_bytes
from engine.cli.options import ENGINE_OPTIONS, add_common, add_settings, read_settings
from engine.config import EngineConfig
from engine.data import tiny_model_path
from engine.devices.footprint import measure
from engine.devices.graph import KVType, Limits
from engine.devices.traffic import count_weights
from engine.gguf import ModelFile, open_model_file
from engine.machine import ram_bytes
from engine.model_spec import AttentionSpec, LatentAttentionSpec
from engine.models import Model, load_model
from engine.runtime import resolve

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
    """Print what a model is."""
    config = read_settings(args)
    model_file = open_model_file(config.model.path or tiny_model_path())
    try:
        model = load_model(model_file)
        facts = model_facts(model_file, model)
        here = machine_facts(model, config)
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
    for line in advice(here):
        out.print(line)
    return 0


def _shown(key: str, value: str | float) -> str:
    if isinstance(value, int):
        return f"{value:,}" + (f"  ({format_bytes(value)})" if "bytes" in key and value >= 1000 else "")
    return f"{value:,.1f}" if isinstance(value, float) else value


def _attention(spec: AttentionSpec | LatentAttentionSpec) -> str:
    if isinstance(spec, LatentAttentionSpec):
        return f"{spec.n_heads} heads over one latent vector of {spec.latent_dim} + {spec.rope_dim} values"
    return f"{spec.n_heads} heads, {spec.n_kv_heads} key-value heads, size {spec.head_dim}"


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
        "trained_context": spec.context_length,
        "parameters": sum(math.prod(info.shape) for info in model_file.tensors.values()),
        "tensors": len(model_file.tensors),
        "weight_bytes": sum(info.n_bytes for info in model_file.tensors.values()),
        "expert_bytes": weights.expert_bytes,
        "bytes_a_token_reads": weights.token_bytes,
        "formats": weights.quant_mix,
    }


def machine_facts(model: Model, config: EngineConfig) -> Facts:
    """Return where the parts of a model would go with these settings, and how fast the CPU could be at best."""
    settings = resolve(config, model.spec).engine
    limits = Limits(
        settings.max_batch_tokens, settings.n_sequences, settings.context_length, KVType[settings.kv_type.upper()]
    )
    footprint, weights = measure(model.graph, limits), count_weights(model.graph)
    bandwidth = read_bandwidth(settings.n_threads, _BANDWIDTH_BUFFER)
    used = weights.expert_bytes + weights.dense_bytes
    return {
        "RAM_bytes": ram_bytes(),
        "weights_in_RAM_bytes": used,
        "keys_and_values_bytes": footprint.state_bytes,
        "scratch_bytes": footprint.scratch_bytes,
        "needed_bytes": used + footprint.state_bytes + footprint.scratch_bytes,
        "context": settings.context_length,
        "threads": settings.n_threads,
        "read_bandwidth_GB_s": bandwidth / 1e9,
        "decode_tok_s_at_most": bandwidth / (weights.token_bytes + footprint.attention_bytes(0)),
    }


def advice(here: Facts) -> list[str]:
    """Return what follows for somebody who wants to run the model."""
    lines = [
        f"On the CPU alone a token takes at least {1e3 / float(here['decode_tok_s_at_most']):,.2f} ms: every weight it "
        "needs is read once, at the bandwidth just measured."
    ]
    if 0 < int(here["RAM_bytes"]) < int(here["needed_bytes"]):
        lines.append(
            f"It does not fit the RAM: {format_bytes(int(here['needed_bytes']))} of "
            f"{format_bytes(int(here['RAM_bytes']))}. The rest would be read from the disk for every token; take a "
            "smaller quantisation."
        )
    lines.append("For a GPU beside it: python -m engine plan -m MODEL --vram 24GB ... predicts each placement.")
    return lines
