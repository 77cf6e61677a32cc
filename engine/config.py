"""Settings: one frozen dataclass for each TOML table.

Where a value comes from, the later one winning: the dataclass's default, the TOML file, the environment, the command
line. What a field means stands in its class's docstring and nowhere else: the comments of `configs/default.toml` and
the help texts are made from it.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from engine.errors import ConfigError, EngineError, RequestError
from engine.tables import Table, parse_bytes, read_assignment, read_tables, setting, summary, table_fields, to_toml

_ENGINE_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})


@dataclass(frozen=True)
class ModelSettings(Table):
    """Which model is run.

    Attributes:
        path: a GGUF file (any shard of a split one), or "synthetic:NAME" for a published geometry with random
            weights; "" = the small trained model that comes with the package.
        load: "mmap" leaves the weights in the file's pages (opens at once; the first pass reads the disk), "memory"
            copies them into huge pages (takes as much RAM as the file is big; steady speed from then on, and a GPU gets
            experts straight from there), "auto" = memory beside a GPU that cannot hold them all, if they fit the free
            RAM, else mmap.
        chat_template: a Jinja file to use instead of the chat template in the model file; "" = none.
        chat_variables: values for what the chat template can be told, each as "NAME=VALUE", for example
            "enable_thinking=false" or "reasoning_effort=low"; the template says which there are.
    """

    table: ClassVar[str] = "model"

    path: str = ""
    load: Literal["auto", "mmap", "memory"] = "auto"
    chat_template: str = ""
    chat_variables: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `ConfigError` for a variable that is none, or is not for the user to give."""
        for name in self.template_variables().keys() & _ENGINE_VARIABLES:
            raise ConfigError(f"model.chat_variables has {name!r}, which is what the engine tells the template")

    def template_variables(self) -> dict[str, Any]:
        """Return the chat template's variables by name."""
        return dict(read_assignment(text, "model.chat_variables") for text in self.chat_variables)


@dataclass(frozen=True)
class EngineSettings(Table):
    """Where and how the model is run.

    Attributes:
        device: "cpu", "cuda" (an NVIDIA GPU with the CPU's help), "emulated" (a GPU played by the CPU, for tests and
            predictions), or "auto" = cuda if there is one, else cpu; the log says which, and why.
        n_threads: CPU threads; 0 = one for each physical core.
        isa: instruction-set level that is not to be exceeded: "scalar", "avx2", "avx512" or "avx512_vbmi"; "" = the
            best this CPU runs.
        context_length: tokens in a sequence at most; 0 = what the model was trained for, up to 8192.
        max_batch_tokens: tokens of a prompt that are run together.
        max_prompt_tokens: the same where a GPU streams experts, all of which pass once for each such part of a prompt:
            the longer, the faster long prompts are, and the longer other answers wait for one; fewer if its memory is
            small.
        n_sequences: sequences whose keys, values and states are kept at the same time.
        n_snapshots: copies of the states of recurrent layers, and of the last keys and values of layers with a window,
            that are kept, of all sequences together, at the ends of messages and where prompts differ, so that neither
            a chat which goes on a little differently nor what many prompts begin with need be run again; 0 = none.
        max_drafts: tokens that are guessed and checked in one step, at most, where one answer is made at a time and
            that is faster; it changes no text. They are guessed from where the text said the same before, or by the
            model's own head for that (multi-token prediction), if its file has one that is known here. 0 = none, and
            no such head is loaded. Where routing is recorded or played there are none, either.
        kv_type: how keys and values are stored: "f32", "f16" or "q8_0" (less memory, a little less exact).
        vram_budget: GPU memory the engine may take, for example "22.2GB"; "" = all that is free.
    """

    table: ClassVar[str] = "engine"

    device: Literal["auto", "cpu", "cuda", "emulated"] = "auto"
    n_threads: int = setting(0, low=0, high=1024)
    isa: Literal["", "scalar", "avx2", "avx512", "avx512_vbmi"] = setting("", env="ENGINE_ISA")
    context_length: int = setting(0, low=0, high=1 << 24)
    max_batch_tokens: int = setting(512, low=1, high=1 << 16)
    max_prompt_tokens: int = setting(16384, low=1, high=1 << 16)
    n_sequences: int = setting(1, low=1, high=1024)
    n_snapshots: int = setting(4, low=0, high=1 << 16)
    max_drafts: int = setting(7, low=0, high=15)
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
        hot_pp_bypass_n_tokens: batches of at least this many tokens do not change the cache.
        stream_n_tokens: batches of at least this many tokens have the experts that are not in the cache streamed
            through the GPU; in smaller ones the CPU computes them. "auto" = where that becomes quicker by the measured
            bandwidths: at some hundred tokens with many fast cores.
        policy: who decides which experts are kept: "adaptive" (a forecast that is learned, and a budget for swaps),
            "decayed" (forgetting counts), "window_topk" (counts over the last tokens), "lru", "lfru", or "static".
        swap_budget: share of a token's time that copying experts to the GPU may take.
        fetch_ahead: whether the CPU, while it waits for the GPU, brings experts into its caches that the next layer's
            router would choose of this layer's activations. It changes speed only. Where `routing` is played, such
            guesses are, too: right for 63 % of the experts.
        n_cpu_moe: layers, from the first, whose experts stay on the CPU while all others go to the GPU whole; the
            classical way, for comparison. -1 = not used.
        prompt_seeds_heat: whether the end of batches that bypass the cache counts when experts are chosen to stay (the
            first one always fills the empty slots).
        profile: file with the counts of earlier runs, which the cache starts from; made if it is not there, and
            brought up to date at the end; "" = none.
        record_trace: write the routing of every token to this file at the end, for `python -m engine.bench --replay`;
            "" = do not.
        routing: who chooses the experts of a token that is made: "own" = the routers. For models of random weights
            ("synthetic:NAME"), whose routers have no favourites: "made-up" = a process that behaves like recorded
            routing, or a trace file, whose answer is played back.
    """

    table: ClassVar[str] = "moe"

    hot_k: int | Literal["auto"] = setting("auto", low=0, high=1 << 16, env="LLAMA_ARG_MOE_HOT_K")
    hot_rebalance_interval: int = setting(60, low=1, high=1 << 20, env="LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL")
    hot_pp_bypass_n_tokens: int = setting(32, low=1, high=1 << 20, env="LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS")
    stream_n_tokens: int | Literal["auto"] = setting("auto", low=1, high=1 << 20)
    policy: Literal["adaptive", "decayed", "window_topk", "lru", "lfru", "static"] = "adaptive"
    swap_budget: float = setting(0.2, low=0.0, high=1.0)
    fetch_ahead: bool = True
    n_cpu_moe: int = setting(-1, low=-1, high=1 << 16)
    prompt_seeds_heat: bool = True
    profile: str = ""
    record_trace: str = ""
    routing: str = "own"

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
        bandwidth_mb: size of the buffer that the bandwidth of the memory is measured with, before and after each run.
    """

    table: ClassVar[str] = "bench"

    prompt_tokens: tuple[int, ...] = setting((128,), low=1, high=1 << 20)
    gen_tokens: int = setting(64, low=1, high=1 << 20)
    reps: int = setting(3, low=1, high=1000)
    bandwidth_mb: int = setting(256, low=16, high=1 << 20)

    def check(self) -> None:
        """Raise `ConfigError` if there is nothing to measure."""
        if not self.prompt_tokens:
            raise ConfigError("bench.prompt_tokens is []; expected at least one length")


@dataclass(frozen=True)
class EmulatedSettings(Table):
    """The GPU and the memories that device = "emulated" plays; its speeds are those of a virtual clock.

    Attributes:
        vram: memory of the GPU.
        vram_bandwidth: GB/s that its kernels read it with.
        ram_bandwidth: GB/s that the CPU reads weights with.
        pcie_bandwidth: GB/s of copies from RAM to the GPU.
        handshake_us: what it costs to have the CPU compute some experts of a layer.
        layer_us: what a layer costs the GPU beside reading weights.
        seed: of the chance in `adversarial`.
        adversarial: copies end in any order and late, to test that nobody relies on theirs; the text stays the same.
    """

    table: ClassVar[str] = "emulated"

    vram: str = "24GB"
    vram_bandwidth: float = setting(900.0, low=0.001, high=1e6)
    ram_bandwidth: float = setting(60.0, low=0.001, high=1e6)
    pcie_bandwidth: float = setting(25.0, low=0.001, high=1e6)
    handshake_us: float = setting(6.0, low=0.0, high=1e6)
    layer_us: float = setting(30.0, low=0.0, high=1e6)
    seed: int = setting(0, low=0, high=(1 << 63) - 1)
    adversarial: bool = False

    def check(self) -> None:
        """Raise `ConfigError` if the memory is no size."""
        parse_bytes(self.vram, "emulated.vram")

    @property
    def vram_bytes(self) -> int:
        """Return the memory of the GPU in bytes."""
        return parse_bytes(self.vram, "emulated.vram")


@dataclass(frozen=True)
class EngineConfig:
    """All settings. `EngineConfig()` is the default; `EngineConfig.load` reads a TOML file and the environment."""

    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    moe: MoESettings = field(default_factory=MoESettings)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    bench: BenchSettings = field(default_factory=BenchSettings)
    emulated: EmulatedSettings = field(default_factory=EmulatedSettings)

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
        tables: dict[str, Any] = read_tables(
            TABLES, None if path is None else Path(path), os.environ if environ is None else environ, overrides or {}
        )
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
                note = f" Environment: {spec.env}." if spec.env else ""
                lines += textwrap.wrap(spec.doc + note, 118, initial_indent="# ", subsequent_indent="# ")
                lines.append(f"{key} = {to_toml(getattr(getattr(self, name), key))}")
        return "\n".join(lines) + "\n"


TABLES: dict[str, type[Table]] = {
    t.table: t for t in (ModelSettings, EngineSettings, MoESettings, SamplingParams, BenchSettings, EmulatedSettings)
}
