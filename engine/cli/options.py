"""Options that commands share, and how they become settings. Common settings have names of their own."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from engine.config import TABLES, EngineConfig
from engine.errors import ConfigError
from engine.tables import table_fields, to_toml

ENGINE_OPTIONS = {
    "engine.device": ("--device",),
    "engine.n_threads": ("-t", "--threads"),
    "engine.context_length": ("-c", "--context"),
    "engine.kv_type": ("--kv-type",),
    "model.load": ("--load",),
    "model.chat_template": ("--chat-template",),
    "moe.hot_k": ("--hot-k",),
    "moe.hot_rebalance_interval": ("--hot-rebalance-interval",),
    "moe.hot_pp_bypass_n_tokens": ("--hot-pp-bypass-n-tokens",),
    "moe.n_cpu_moe": ("--n-cpu-moe",),
    "moe.policy": ("--cache-policy",),
    "moe.profile": ("--expert-profile",),
    "moe.record_trace": ("--record-trace",),
    "engine.vram_budget": ("--vram-budget",),
}
SAMPLING_OPTIONS = {
    "sampling.max_tokens": ("-n", "--max-tokens"),
    "sampling.temperature": ("--temperature",),
    "sampling.top_k": ("--top-k",),
    "sampling.top_p": ("--top-p",),
    "sampling.min_p": ("--min-p",),
    "sampling.repetition_penalty": ("--repetition-penalty",),
    "sampling.seed": ("-s", "--seed"),
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print the problem and leave."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_settings(parser: argparse.ArgumentParser, options: dict[str, tuple[str, ...]]) -> None:
    """Add short names of settings, "table.key": flags."""
    group = parser.add_argument_group("settings")
    for key, flags in options.items():
        table, _, name = key.partition(".")
        spec = table_fields(TABLES[table])[name]
        meaning = spec.doc.replace("%", "%%").removesuffix(".")
        metavar = _metavar(spec.kind)
        group.add_argument(*flags, dest=key, metavar=metavar, help=f"{meaning} (default: {to_toml(spec.default)})")


def add_answering(parser: argparse.ArgumentParser, *, has_config: bool = True) -> None:
    """Add what every command takes that answers prompts."""
    parser.add_argument(
        "--stop",
        dest="sampling.stop",
        action="append",
        type=lambda text: text.replace("\\n", "\n").replace("\\t", "\t"),
        metavar="TEXT",
        help="end at this text, in which \\n and \\t stand for line end and tab (repeatable)",
    )
    parser.add_argument(
        "--chat-variable",
        dest="model.chat_variables",
        action="append",
        metavar="NAME=VALUE",
        help="tell the chat template something, for example enable_thinking=false (repeatable)",
    )
    add_settings(parser, SAMPLING_OPTIONS | ENGINE_OPTIONS)
    add_common(parser, has_config=has_config)


def _metavar(kind: Any) -> str:
    """Return what stands for a value in help texts: its choices, or a letter for its type."""
    origin = get_origin(kind)
    if origin is Literal:
        return "|".join(str(choice) for choice in get_args(kind) if choice)
    if origin is tuple:
        return f"{_metavar(get_args(kind)[0])},..."
    if origin is not None:
        return "|".join(_metavar(option) for option in get_args(kind))
    return {int: "N", float: "X", str: "TEXT"}[kind]


def add_common(parser: argparse.ArgumentParser, *, has_config: bool = True) -> None:
    """Add what every command takes that opens a model."""
    group = parser.add_argument_group("more settings")
    if has_config:
        group.add_argument("--config", metavar="FILE", help="read settings from a TOML file (see configs/default.toml)")
    group.add_argument(
        "--set",
        dest="set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="give any setting, for example --set engine.max_batch_tokens=256; wins over file and environment",
    )
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add what says how much is told."""
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="print results and errors only")
    group.add_argument("--debug", action="store_true", help="log details, and show where an error comes from")


def read_overrides(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings that a command line gives, by "table.key". Raises `ConfigError` for a malformed one."""
    overrides: dict[str, object] = {}
    for assignment in args.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected TABLE.KEY=VALUE")
        overrides[key.strip()] = value.strip()
    for key, value in vars(args).items():
        if "." in key and value is not None:
            overrides[key] = tuple(value) if isinstance(value, list) else value
    model = getattr(args, "model", None)
    if model == "":  # an unset variable of the shell must not run another model than was meant
        raise ConfigError("the name of the model is empty; give a file, or leave it out for the bundled model")
    if model:
        overrides["model.path"] = model
    return overrides


def read_settings(args: argparse.Namespace) -> EngineConfig:
    """Make the settings of a parsed command line.

    Raises `ConfigError` for a wrong value, naming the option's setting.
    """
    return EngineConfig.load(args.config, read_overrides(args))
