"""Settings: one frozen dataclass for each TOML table, and one strict parser for all of them.

Where a value comes from, the later one winning: the dataclass's default, the TOML file, the environment, the command
line. Every value is checked where it enters, so that an error names the file (or variable, or option), the key, what
was found and what was expected. What a field means stands in its class's docstring and nowhere else: the comments of
`configs/default.toml` and the help texts are made from it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from engine.errors import ConfigError, EngineError, RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def setting(default: T, *, low: float | None = None, high: float | None = None, env: str = "") -> T:
    """Declare a field: default, range of a number (both ends included), environment variable that sets it."""
    made: T = field(default=default, metadata={"low": low, "high": high, "env": env})
    return made


class Table:
    """Base of the dataclasses below: checks every field when an object is made."""

    table: ClassVar[str]
    error: ClassVar[type[EngineError]] = ConfigError  # what a bad value raises

    def __post_init__(self) -> None:
        for name, spec in table_fields(type(self)).items():
            found = getattr(self, name)
            if not spec.accepts(found):
                raise self.error(f"{self.table}.{name} is {found!r}; expected {spec.expected}")
        self.check()

    def check(self) -> None:
        """Raise `error` for values that do not fit together."""


@dataclass(frozen=True)
class ModelSettings(Table):
    """Which model is run.

    Attributes:
        path: a GGUF file (any shard of a split one), or "synthetic:NAME" for a published geometry with random
            weights; "" = the small trained model that comes with the package.
        load: "mmap" leaves the weights in the file's pages (opens at once; the first pass reads the disk), "memory"
            copies them into huge pages (takes as much RAM as the file is big; steady speed from then on).
    """

    table: ClassVar[str] = "model"

    path: str = ""
    load: Literal["mmap", "memory"] = "mmap"


@dataclass(frozen=True)
class EngineSettings(Table):
    """Where and how the model is run.

    Attributes:
        device: "cpu", "cuda" (an NVIDIA GPU with the CPU's help), "emulated" (a GPU played by the CPU, for tests and
            predictions), or "auto" = cuda if there is one, else cpu; the log says which, and why.
        n_threads: CPU threads; 0 = one for each physical core.
        isa: instruction-set level that is not to be exceeded: "scalar", "avx2" or "avx512"; "" = the best this CPU
            runs.
        context_length: tokens in a sequence at most; 0 = what the model was trained for, up to 8192.
        max_batch_tokens: tokens of a prompt that are run together.
        n_sequences: sequences whose keys, values and states are kept at the same time.
        kv_type: how keys and values are stored: "f32", "f16" or "q8_0" (less memory, a little less exact).
        vram_budget: GPU memory the engine may take, for example "22.2GB"; "" = all that is free.
    """

    table: ClassVar[str] = "engine"

    device: Literal["auto", "cpu", "cuda", "emulated"] = "auto"
    n_threads: int = setting(0, low=0, high=1024)
    isa: Literal["", "scalar", "avx2", "avx512"] = setting("", env="ENGINE_ISA")
    context_length: int = setting(0, low=0, high=1 << 24)
    max_batch_tokens: int = setting(512, low=1, high=1 << 16)
    n_sequences: int = setting(1, low=1, high=1024)
    kv_type: Literal["f32", "f16", "q8_0"] = "f16"
    vram_budget: str = ""

    def check(self) -> None:
        """Raise `ConfigError` for a budget that is no size, or one without a GPU."""
        if self.vram_budget:
            parse_bytes(self.vram_budget, "engine.vram_budget")
            if self.device == "cpu":
                raise ConfigError(
                    f"engine.vram_budget is {self.vram_budget!r} and engine.device is 'cpu', which uses no GPU memory; "
                    'set vram_budget = "" or another device'
                )

    @property
    def vram_budget_bytes(self) -> int | None:
        """Return the budget in bytes, None if there is none."""
        return parse_bytes(self.vram_budget, "engine.vram_budget") if self.vram_budget else None


@dataclass(frozen=True)
class MoESettings(Table):
    """Where experts live: the hot-expert cache, or whole layers.

    Attributes:
        hot_k: experts of each MoE layer that are kept in GPU memory; 0 = none, "auto" = as many as fit.
        hot_rebalance_interval: tokens between two looks at which experts to swap, for "window_topk"; the other policies
            look at every token and are held back by `swap_budget`.
        hot_pp_bypass_n_tokens: batches of at least this many tokens neither use nor change the cache.
        policy: who decides which experts are kept: "adaptive" (forgetting counts, twin layers, a budget for swaps),
            "decayed" (forgetting counts), "window_topk" (counts over the last tokens), "lru", "lfru", or "static".
        swap_budget: share of a token's time that copying experts to the GPU may take.
        n_cpu_moe: layers, from the first, whose experts stay on the CPU while all others go to the GPU whole; the
            classical way, for comparison. -1 = not used.
    """

    table: ClassVar[str] = "moe"

    hot_k: int | Literal["auto"] = setting("auto", low=0, high=1 << 16, env="LLAMA_ARG_MOE_HOT_K")
    hot_rebalance_interval: int = setting(60, low=1, high=1 << 20, env="LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL")
    hot_pp_bypass_n_tokens: int = setting(32, low=1, high=1 << 20, env="LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS")
    policy: Literal["adaptive", "decayed", "window_topk", "lru", "lfru", "static"] = "adaptive"
    swap_budget: float = setting(0.2, low=0.0, high=1.0)
    n_cpu_moe: int = setting(-1, low=-1, high=1 << 16)

    def check(self) -> None:
        """Raise `ConfigError` for a hot cache and whole layers at the same time."""
        if self.n_cpu_moe >= 0 and self.hot_k not in {0, "auto"}:
            raise ConfigError(
                f"moe.hot_k is {self.hot_k} and moe.n_cpu_moe is {self.n_cpu_moe}: experts are placed either by hot "
                "slots or by whole layers; set hot_k = 0 or n_cpu_moe = -1"
            )


@dataclass(frozen=True)
class SamplingParams(Table):
    """How the next token is chosen, and when to stop.

    Attributes:
        max_tokens: tokens that are made at most; 0 = as many as the context holds.
        temperature: divides the logits; 0 = always the likeliest token.
        top_k: the likeliest tokens that stay in the draw; 0 = all.
        top_p: the likeliest tokens that together have this probability stay in the draw.
        min_p: tokens with less than this share of the likeliest token's probability drop out.
        repetition_penalty: divides positive and multiplies negative logits of tokens that were used; 1 = off.
        presence_penalty: subtracted from the logits of tokens that were used.
        frequency_penalty: subtracted from the logits of tokens that were used, once for each use.
        penalty_window: the penalties look back over this many tokens, of prompt and answer; 0 = over all.
        seed: of the random numbers; the same seed gives the same text. -1 = a new one each time.
        stop: texts that end the answer; they are not part of it.
        ignore_eos: go on after an end token.
        logprobs: likeliest tokens to report with each token made, with their log probabilities; -1 = report none.
    """

    table: ClassVar[str] = "sampling"
    error: ClassVar[type[EngineError]] = RequestError

    max_tokens: int = setting(256, low=0, high=1 << 24)
    temperature: float = setting(0.7, low=0.0, high=100.0)
    top_k: int = setting(40, low=0, high=1 << 24)
    top_p: float = setting(0.95, low=0.0, high=1.0)
    min_p: float = setting(0.05, low=0.0, high=1.0)
    repetition_penalty: float = setting(1.0, low=0.01, high=100.0)
    presence_penalty: float = setting(0.0, low=-100.0, high=100.0)
    frequency_penalty: float = setting(0.0, low=-100.0, high=100.0)
    penalty_window: int = setting(64, low=0, high=1 << 24)
    seed: int = setting(-1, low=-1, high=(1 << 63) - 1)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int = setting(-1, low=-1, high=100)

    def check(self) -> None:
        """Raise `RequestError` for a stop text that would match everywhere."""
        if "" in self.stop:
            raise RequestError("sampling.stop holds an empty text; expected texts of at least one character")


@dataclass(frozen=True)
class BenchSettings(Table):
    """What `python -m engine.bench` measures.

    Attributes:
        prompt_tokens: lengths of the prompts.
        gen_tokens: tokens that are made after each prompt.
        reps: times everything is measured; the table shows the median and the spread.
        bandwidth_mb: size of the buffer that memory bandwidth is measured with; far more than the caches hold.
    """

    table: ClassVar[str] = "bench"

    prompt_tokens: tuple[int, ...] = setting((128,), low=1, high=1 << 20)
    gen_tokens: int = setting(64, low=1, high=1 << 20)
    reps: int = setting(3, low=1, high=1000)
    bandwidth_mb: int = setting(512, low=16, high=1 << 20)

    def check(self) -> None:
        """Raise `ConfigError` if there is nothing to measure."""
        if not self.prompt_tokens:
            raise ConfigError("bench.prompt_tokens is []; expected at least one length")


@dataclass(frozen=True)
class EngineConfig:
    """All settings. `EngineConfig()` is the default; `EngineConfig.load` reads a TOML file and the environment."""

    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    moe: MoESettings = field(default_factory=MoESettings)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    bench: BenchSettings = field(default_factory=BenchSettings)

    def __post_init__(self) -> None:
        """Raise `ConfigError` for tables that do not fit together."""
        if self.engine.device == "cpu" and (self.moe.hot_k not in {0, "auto"} or self.moe.n_cpu_moe >= 0):
            key = "n_cpu_moe" if self.moe.n_cpu_moe >= 0 else "hot_k"
            raise ConfigError(
                f"moe.{key} is {getattr(self.moe, key)} and engine.device is 'cpu', which has no GPU memory to put "
                f"experts in; set {key} = {-1 if key == 'n_cpu_moe' else 0} or another device"
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> EngineConfig:
        """Read settings: file, then environment, then `overrides`, the later one winning.

        Args:
            path: a TOML file; None for no file.
            overrides: values by "table.key", as from a command line; a string is read as the field's type.
            environ: environment variables; None for the process's own.

        Raises:
            ConfigError: naming file, key, what was found and what was expected.
        """
        given: dict[str, dict[str, _Given]] = {name: {} for name in TABLES}
        if path is not None:
            _take_file(given, Path(path))
        _take_environment(given, os.environ if environ is None else environ)
        for key, value in (overrides or {}).items():
            _take_override(given, key, value)
        tables: dict[str, Any] = {name: _make_table(table, given[name]) for name, table in TABLES.items()}
        try:
            return cls(**tables)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}" if path is not None else str(error)) from None

    def to_toml(self) -> str:
        """Return a TOML file that holds every key with its value and, as a comment, what it means."""
        lines = [
            "# Every setting of the engine. A key left out has the value shown in configs/default.toml.",
            "# Precedence: command line, then environment, then this file, then the default.",
        ]
        for name, table in TABLES.items():
            lines += ["", f"# {summary(table)}", f"[{name}]"]
            for key, spec in table_fields(table).items():
                lines += [f"# {line}" for line in _wrapped(spec.doc + spec.environment_note)]
                lines.append(f"{key} = {to_toml(getattr(getattr(self, name), key))}")
        return "\n".join(lines) + "\n"


TABLES: dict[str, type[Table]] = {
    t.table: t for t in (ModelSettings, EngineSettings, MoESettings, SamplingParams, BenchSettings)
}


# -- what a field may hold -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One key of a table: its type, range, default, environment variable and meaning."""

    key: str
    kind: Any
    default: object
    low: float | None
    high: float | None
    env: str
    doc: str

    def accepts(self, value: object) -> bool:
        """Return whether a value has the field's type and is in its range."""
        return self._fits(self.kind, value)

    def _fits(self, kind: Any, value: object) -> bool:
        origin = typing.get_origin(kind)
        if origin is Literal:
            return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
        if origin in {typing.Union, types.UnionType}:
            return any(self._fits(option, value) for option in typing.get_args(kind))
        if origin is tuple:
            return isinstance(value, tuple) and all(self._fits(typing.get_args(kind)[0], item) for item in value)
        if kind is float:
            return type(value) in {int, float} and math.isfinite(value) and self._in_range(value)  # type: ignore[arg-type]
        if kind is int:
            return type(value) is int and self._in_range(value)  # a bool is no number here
        return type(value) is kind

    def _in_range(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def expected(self) -> str:
        """Return, for an error message, what the field may hold."""
        return self._describe(self.kind)

    def _describe(self, kind: Any) -> str:
        origin = typing.get_origin(kind)
        if origin is Literal:
            choices = [json.dumps(choice) for choice in typing.get_args(kind)]
            return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        if origin in {typing.Union, types.UnionType}:
            return " or ".join(self._describe(option) for option in typing.get_args(kind))
        if origin is tuple:
            return f"a list, each item {self._describe(typing.get_args(kind)[0])}"
        if kind in {int, float}:
            name = "an integer" if kind is int else "a number"
            return name if self.low is None else f"{name} from {self.low:g} to {_plain(self.high)}"
        return {str: "a string", bool: "true or false"}[kind]

    @property
    def environment_note(self) -> str:
        """Return a sentence about the environment variable, empty if there is none."""
        return f" Environment: {self.env}." if self.env else ""


_fields_of: dict[type[Table], dict[str, FieldSpec]] = {}


def table_fields(table: type[Table]) -> dict[str, FieldSpec]:
    """Return the fields of a table by key, in order."""
    if table not in _fields_of:
        hints, docs = typing.get_type_hints(table), _documented(table)
        _fields_of[table] = {
            f.name: FieldSpec(
                f.name,
                hints[f.name],
                f.default,
                f.metadata.get("low"),
                f.metadata.get("high"),
                f.metadata.get("env", ""),
                docs.get(f.name, ""),
            )
            for f in fields(table)  # type: ignore[arg-type]
        }
    return _fields_of[table]


def summary(table: type[Table]) -> str:
    """Return the first line of a table's docstring."""
    return (inspect.getdoc(table) or "").partition("\n")[0]


def _documented(table: type[Table]) -> dict[str, str]:
    """Take the "Attributes:" section of a docstring apart: text by field name."""
    docs: dict[str, str] = {}
    key = ""
    for line in (inspect.getdoc(table) or "").partition("Attributes:\n")[2].splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            key = start[1]
            docs[key] = start[2]
        elif line.strip():
            docs[key] += " " + line.strip()
    return docs


def parse_bytes(text: str, key: str) -> int:
    """Read a size such as "22.2GB" or "24 GiB" (powers of 1000 and of 1024); raise `ConfigError` naming `key`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _BYTE_UNITS[match[2].upper()]) if match else 0
    if not size:
        raise ConfigError(f'{key} is {text!r}; expected a size above 0 such as "22.2GB" or "800 MiB"')
    return size


# -- taking values in ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that is set somewhere; `origin` says where, for error messages. Text is still to be read as a type."""

    value: object
    origin: str
    is_text: bool = False


def _take_file(given: dict[str, dict[str, _Given]], path: Path) -> None:
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); expected a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        n_lines = max(1, len(text.splitlines()))
        problem = str(error).replace("at end of document", f"at line {n_lines}, the end of the file")
        raise ConfigError(f"{path}: is not valid TOML: {problem}") from None
    for name, table in document.items():
        if name not in TABLES:
            kind = f"table [{name}]" if isinstance(table, dict) else f"key {name} outside of a table"
            raise ConfigError(f"{path}: unknown {kind}; {_known(name, TABLES, 'tables')}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is {table!r}; expected a table, [{name}]")
        for key, value in table.items():
            _check_key(name, key, str(path))
            given[name][key] = _Given(tuple(value) if isinstance(value, list) else value, str(path))


def _take_environment(given: dict[str, dict[str, _Given]], environ: Mapping[str, str]) -> None:
    for name, table in TABLES.items():
        for key, spec in table_fields(table).items():
            if spec.env and spec.env in environ:
                given[name][key] = _Given(environ[spec.env], f"environment variable {spec.env}", is_text=True)


def _take_override(given: dict[str, dict[str, _Given]], key: str, value: object) -> None:
    name, _, short = key.partition(".")
    origin = f"setting {key}"
    if name not in TABLES or not short:
        raise ConfigError(f'{origin}: unknown; expected "table.key"; {_known(name, TABLES, "tables")}')
    _check_key(name, short, origin)
    given[name][short] = _Given(value, origin, is_text=isinstance(value, str))


def _check_key(name: str, key: str, origin: str) -> None:
    known = table_fields(TABLES[name])
    if key in known:
        return
    elsewhere = [other for other, table in TABLES.items() if key in table_fields(table)]
    hint = f"it belongs in [{elsewhere[0]}]" if elsewhere else _known(key, known, "keys")
    raise ConfigError(f"{origin}: unknown key {name}.{key}; {hint}")


def _known(found: str, names: Iterable[str], what: str) -> str:
    close = difflib.get_close_matches(found, list(names), 1)
    return f"did you mean {close[0]}?" if close else f"the {what} are {', '.join(names)}"


def _make_table(table: type[Table], given: dict[str, _Given]) -> Table:
    values: dict[str, object] = {}
    for key, spec in table_fields(table).items():
        if key in given:
            values[key] = _read(table.table, spec, given[key])
    try:
        return table(**values)
    except EngineError as error:  # values that are each right, but not together
        origins = dict.fromkeys(g.origin for g in given.values())
        raise ConfigError(f"{', '.join(origins)}: {error}") from None


def _read(table: str, spec: FieldSpec, given: _Given) -> object:
    candidates: list[object] = [given.value]
    if given.is_text:
        candidates = [*_as_toml(str(given.value)), given.value]
    for value in candidates:
        if spec.accepts(value):
            return float(value) if spec.kind is float else value  # type: ignore[arg-type]
    shown = list(given.value) if isinstance(given.value, tuple) else given.value
    raise ConfigError(f"{given.origin}: {table}.{spec.key} is {shown!r}; expected {spec.expected}")


def _as_toml(text: str) -> list[object]:
    """Return the value that a text is in TOML, as a list of one; empty if it is none. "1, 2" is a list too."""
    found: list[object] = []
    for candidate in (text, f"[{text}]"):
        try:
            document = tomllib.loads(f"value = {candidate}")
        except tomllib.TOMLDecodeError:
            continue
        if list(document) == ["value"]:
            value = document["value"]
            found.append(tuple(value) if isinstance(value, list) else value)
    return found


# -- writing ---------------------------------------------------------------------------------------------------------


def _wrapped(text: str, width: int = 118) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def to_toml(value: object) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(to_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in TOML and JSON


def _plain(value: float | None) -> str:
    return f"{int(value)}" if value is not None and value == int(value) else f"{value:g}"
