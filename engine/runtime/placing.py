"""Chooses and opens the device that the settings ask for, with everything that was left to us made definite."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

from engine import _kernels, machine
from engine.config import EngineConfig, EngineSettings
from engine.devices.cpu import CPUDevice
from engine.devices.cuda import CUDADevice, survey
from engine.devices.emulated import Behaviour, EmulatedDevice
from engine.devices.footprint import Footprint
from engine.devices.graph import KVType
from engine.devices.placement import Wish
from engine.devices.program import Device, Limits
from engine.devices.timing import Bandwidths, Machine
from engine.errors import ConfigError, DeviceError
from engine.experts.steering import OWN
from engine.gguf.weights import Mode
from engine.model_spec import ModelSpec

_log = logging.getLogger("engine")

Level = Literal["scalar", "avx2", "avx512", "avx512_vbmi"]
OpenProgress = Callable[[str, int, int], None]  # what is being done, done so far, in all
DEFAULT_CONTEXT = 8192  # tokens, for models trained for more
_RAM_TO_SPARE = 2 << 30  # bytes beside weights that are read into memory because nobody said otherwise


def resolve(config: EngineConfig, spec: ModelSpec) -> EngineConfig:
    """Return the settings with everything that was left to us replaced by what is used for this model and machine."""
    settings = config.engine
    context_length = settings.context_length or min(spec.context_length, DEFAULT_CONTEXT)
    if context_length > spec.context_length:
        _log.warning(
            "context_length %d is more than the %d tokens the model was trained for; text beyond that will be poor",
            context_length,
            spec.context_length,
        )
    odd = [dim for dim in spec.attention.cached_dims if dim % 32]
    if settings.kv_type == "q8_0" and odd:
        raise ConfigError(
            f"engine.kv_type is 'q8_0', which needs heads of a multiple of 32 values; this model's have {odd[0]}; "
            'set kv_type = "f16"'
        )
    return replace(
        config,
        engine=replace(
            settings,
            n_threads=settings.n_threads or machine.n_physical_cores(),
            isa=_capped_level(settings.isa),
            context_length=context_length,
            max_batch_tokens=min(settings.max_batch_tokens, context_length * settings.n_sequences),
            max_drafts=most_drafts(config),
        ),
    )


def most_drafts(config: EngineConfig) -> int:
    """Return how many tokens may be drafted for a step: none where it matters which experts the right ones choose."""
    moe = config.moe
    return config.engine.max_drafts if moe.routing == OWN and not moe.record_trace else 0


def limits_of(settings: EngineSettings) -> Limits:
    """Return the limits of a program with settings that are resolved."""
    return Limits(
        settings.max_batch_tokens,
        settings.n_sequences,
        settings.context_length,
        KVType[settings.kv_type.upper()],
        max_drafts=settings.max_drafts,
    )


def check_memory(footprint: Footprint, settings: EngineSettings) -> None:
    """Raise `DeviceError` if what must be in RAM beside the weights does not fit what is free."""
    needed, available = footprint.state_bytes + footprint.scratch_bytes, machine.available_memory()
    if available is None or needed <= available:
        return
    raise DeviceError(
        f"keys, values and states of {settings.n_sequences} x {settings.context_length} tokens, and intermediate "
        f"results of {settings.max_batch_tokens} tokens, need {needed / 1e9:.1f} GB of RAM, and "
        f"{available / 1e9:.1f} GB are free; lower [engine] context_length, n_sequences or max_batch_tokens, "
        "or set kv_type = 'q8_0'"
    )


def load_mode(config: EngineConfig, n_bytes: int, vram_bytes: int | None) -> Mode:
    """Return how so many bytes of weights come into RAM: as set, or as is best beside the GPU.

    From memory of our own a GPU gets experts while steps run; from the pages of a file only between them, through
    buffers. Where all weights go to the GPU, or there is none, pages serve as well and open at once.

    Args:
        config: the settings.
        n_bytes: of the weights.
        vram_bytes: of the GPU, that weights may take; None if none is in use.
    """
    if config.model.load != "auto":
        return config.model.load
    if vram_bytes is None or (n_bytes <= vram_bytes and memory_wish(config) == Wish()):
        return "mmap"
    available = machine.available_memory()
    if available is None or n_bytes + _RAM_TO_SPARE <= available:
        return "memory"
    _log.warning(
        'the weights stay in the pages of the file (load = "mmap"), as they are %.1f GB and %.1f GB of RAM are free: '
        "experts come to the GPU through buffers, and no step is begun before the one before is over",
        n_bytes / 1e9,
        available / 1e9,
    )
    return "mmap"


def _capped_level(cap: Level | Literal[""]) -> Level:
    """Return the best instruction-set level of this CPU that does not exceed `cap`."""
    order: tuple[Level, ...] = get_args(Level)
    allowed = order[: order.index(cap) + 1] if cap else order
    return next(level for level in reversed(allowed) if level in _kernels.isa_levels())


def open_device(config: EngineConfig, progress: OpenProgress | None = None) -> tuple[Device, str]:
    """Open the device that the settings ask for; return it and why it is this one. Raises `DeviceError`."""
    settings, reason = config.engine, "as set"
    if settings.device == "emulated":
        return _emulated_device(config), reason
    if settings.device == "cuda":
        try:
            return _cuda_device(config, progress), reason
        except DeviceError as error:
            raise DeviceError(f"engine.device is 'cuda', but {error}") from None
    if settings.device == "auto":
        try:
            return _cuda_device(config, progress), "found"
        except DeviceError as error:
            reason = f"no GPU is used: {error}"
    wishes = {
        "moe.hot_k": config.moe.hot_k not in {0, "auto"},
        "moe.n_cpu_moe": config.moe.n_cpu_moe >= 0,
        "engine.vram_budget": bool(settings.vram_budget),
    }
    for key, is_set in wishes.items():
        if is_set:
            _log.warning("%s has no effect: there is no GPU in use", key)
    return CPUDevice(settings.n_threads, settings.isa), reason


def _cuda_device(config: EngineConfig, progress: OpenProgress | None) -> CUDADevice:
    settings = config.engine
    return CUDADevice(
        wish=memory_wish(config),
        vram_budget=settings.vram_budget_bytes,
        n_threads=settings.n_threads,
        isa=settings.isa or None,
        prompt_tokens=settings.max_prompt_tokens,
        stream_n_tokens=stream_n_tokens(config),
        guesses=config.moe.fetch_ahead,
        progress=(lambda _, done, total: progress("compiling kernels", done, total)) if progress else None,
    )


def survey_machine(config: EngineConfig) -> tuple[str, Machine | None]:
    """Look at the GPU that the settings would use, without loading anything onto it.

    Returns what it is, for people, and what the machine can do with it; or why none is used, and None. The machine's
    `vram_bytes` are those that may be used; speeds are measured, but for an emulated GPU, which has those of its
    settings.

    Raises `DeviceError` if the settings ask for a GPU that is not there.
    """
    settings = config.engine
    if settings.device == "cpu":
        return 'engine.device is "cpu"', None
    if settings.device == "emulated":
        name, found = "emulated, with the speeds of the settings", _emulated_machine(config)
    else:
        try:
            name, found = survey(settings.n_threads)
        except DeviceError as error:
            if settings.device == "cuda":
                raise DeviceError(f"engine.device is 'cuda', but {error}") from None
            return str(error), None
    budget = settings.vram_budget_bytes
    return name, found if budget is None else replace(found, vram_bytes=min(found.vram_bytes, budget))


def _emulated_machine(config: EngineConfig) -> Machine:
    played = config.emulated
    speeds = Bandwidths(played.ram_bandwidth * 1e9, played.pcie_bandwidth * 1e9, played.vram_bandwidth * 1e9)
    return Machine(speeds, played.vram_bytes, played.handshake_us * 1e-6, played.layer_us * 1e-6)


def _emulated_device(config: EngineConfig) -> EmulatedDevice:
    played, settings = config.emulated, config.engine
    return EmulatedDevice(
        _emulated_machine(config),
        wish=memory_wish(config),
        vram_budget=settings.vram_budget_bytes,
        stream_n_tokens=stream_n_tokens(config),
        n_threads=settings.n_threads,
        isa=settings.isa or None,
        behaviour=Behaviour(played.seed, played.adversarial),
    )


def stream_n_tokens(config: EngineConfig) -> int | None:
    """Return the tokens of a step from which on the settings want experts streamed; None for where that pays."""
    wanted = config.moe.stream_n_tokens
    return None if wanted == "auto" else wanted


def memory_wish(config: EngineConfig) -> Wish:
    """Return how the settings want the memory of a GPU used."""
    hot_k, n_cpu_moe = config.moe.hot_k, config.moe.n_cpu_moe
    return Wish(None if hot_k == "auto" else hot_k, None if n_cpu_moe < 0 else n_cpu_moe)
