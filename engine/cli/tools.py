"""Small commands around models: `info`, `synth` and `config`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.cli.options import ENGINE_OPTIONS, add_common, add_output, add_settings, read_settings
from engine.cli.terminal import Bars
from engine.data import tiny_model_path
from engine.devices.traffic import count_weights
from engine.errors import RequestError
from engine.gguf import ModelFile, open_model_file, write_gguf
from engine.model_spec import AttentionSpec, LatentAttentionSpec
from engine.models import load_model


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the parser."""
    parser = commands.add_parser("info", help="tell what a model file holds", description="Tell what a model holds.")
    parser.add_argument("model", nargs="?", help="GGUF file or synthetic:NAME (default: the bundled tiny model)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_output(parser)
    parser.set_defaults(execute=info)

    parser = commands.add_parser(
        "synth",
        help="write a model of a published geometry with random weights",
        description="Write a model of a published geometry with random weights as a GGUF file, to measure speed with.",
    )
    parser.add_argument("name", metavar="NAME", help="for example qwen3-30b-a3b@q4_k_m:layers=4")
    parser.add_argument("out", type=Path, metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    add_output(parser)
    parser.set_defaults(execute=synth)

    parser = commands.add_parser(
        "config",
        help="print the settings in use as a TOML file",
        description="Print every setting with its meaning and its value: default, file, environment, options.",
    )
    add_settings(parser, ENGINE_OPTIONS)
    add_common(parser)
    parser.set_defaults(execute=config)


def info(args: argparse.Namespace, _: Console) -> int:
    """Print what a model is."""
    model_file = open_model_file(args.model or tiny_model_path())
    try:
        facts = model_facts(model_file)
    finally:
        model_file.close()
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return 0
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), shown)
    Console(highlight=False, markup=False).print(table)
    return 0


def _attention(spec: AttentionSpec | LatentAttentionSpec) -> str:
    if isinstance(spec, LatentAttentionSpec):
        return f"{spec.n_heads} heads over one latent vector of {spec.latent_dim} + {spec.rope_dim} values"
    return f"{spec.n_heads} heads, {spec.n_kv_heads} key-value heads, size {spec.head_dim}"


def model_facts(model_file: ModelFile) -> dict[str, str | int | float]:
    """Return what there is to know about a model, in reading order."""
    model = load_model(model_file)
    spec, weights = model.spec, count_weights(model.graph)
    recurrent = sum(spec.recurrent_layers)
    facts: dict[str, str | int | float] = {
        "file": model_file.name,
        "name": spec.name,
        "architecture": spec.architecture,
        "layers": spec.n_layers,
        "recurrent_layers": recurrent,
        "hidden_size": spec.hidden_size,
        "attention": _attention(spec.attention),
        "experts": spec.moe.n_experts,
        "experts_used": spec.moe.n_experts_used,
        "expert_ffn_size": spec.moe.ffn_size,
        "shared_ffn_size": spec.moe.shared_ffn_size,
        "vocabulary": spec.n_vocab,
        "trained_context": spec.context_length,
        "parameters": sum(_size(info.shape) for info in model_file.tensors.values()),
        "tensors": len(model_file.tensors),
        "weight_bytes": sum(info.n_bytes for info in model_file.tensors.values()),
        "expert_bytes": weights.expert_bytes,
        "bytes_a_token_reads": weights.token_bytes,
        "formats": weights.quant_mix,
    }
    return facts


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def synth(args: argparse.Namespace, console: Console) -> int:
    """Write a synthetic model."""
    if args.out.exists() and not args.force:
        raise RequestError(f"{args.out} exists; give another name, or --force to replace it")
    model_file = open_model_file(f"synthetic:{args.name.removeprefix('synthetic:')}")
    try:
        with Bars(console, quiet=args.quiet) as bars:
            write_gguf(model_file, args.out, progress=lambda done, total: bars.loading("writing", done, total))
    finally:
        model_file.close()
    if not args.quiet:
        console.print(f"wrote {args.out}, {args.out.stat().st_size:,} bytes")
    return 0


def config(args: argparse.Namespace, _: Console) -> int:
    """Print the settings."""
    sys.stdout.write(read_settings(args).to_toml())
    return 0
