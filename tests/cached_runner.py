"""Runs a model on the emulated device with a hot-expert cache, with every choice in the test's hands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from engine.devices.context_slots import ContextSlot
from engine.devices.cpu.lowering import Lowering
from engine.devices.emulated import Behaviour, EmulatedDevice
from engine.devices.emulated.device import EmulatedProgram
from engine.devices.footprint import measure
from engine.devices.graph import KVType
from engine.devices.placement import plan_memory
from engine.devices.program import Limits
from engine.devices.timing import Bandwidths, Machine
from engine.experts.cost import SwapBudget
from engine.experts.hot_cache import HotCache
from engine.experts.policy import make_policy
from engine.experts.slots import SlotTable
from engine.experts.swapper import Swapper
from engine.experts.watched_program import WatchedProgram
from engine.generate.forward import ForwardPass
from engine.gguf.reader import GGUFFile
from engine.gguf.weights import WeightMemory
from engine.models import load_model

MACHINE = Machine(Bandwidths(ram=20e6, pcie=10e6, vram=300e6), vram_bytes=10**9)
POLICIES = ("adaptive", "decayed", "window_topk:interval=3", "lru", "lfru", "static")
LIMITS = Limits(max_tokens=16, n_slots=1, context_length=64, kv_type=KVType.F32)


@dataclass(frozen=True)
class Setup:
    """How one run is made."""

    n_slots: tuple[int, ...]  # of each layer, taken round and cut to the layer's experts
    policy: str = "lru"
    seed: int = 0
    adversarial: bool = False
    failing: float = 0.0
    bypass_n_tokens: int = 8
    budget_share: float = 1.0
    max_in_flight: int = 16
    n_threads: int = 1
    swapper: type[Swapper] = Swapper
    n_lent: tuple[int, ...] = (0,)  # of the slots of each layer, to steps that stream experts
    lends_one_up_to: int = 0  # tokens of such steps that take one of them only
    outlast: tuple[int, ...] = ()  # positions beyond which one more of the slots of every layer is lent to the context


SETUPS = st.builds(
    Setup,
    n_slots=st.lists(st.integers(0, 64), min_size=1, max_size=8).map(tuple),
    n_lent=st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple),
    lends_one_up_to=st.integers(0, 20),
    outlast=st.lists(st.integers(0, 50), max_size=5).map(tuple),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 2**32 - 1),
    adversarial=st.booleans(),
    failing=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    bypass_n_tokens=st.integers(1, 20),
    budget_share=st.sampled_from([0.0, 0.1, 1.0]),
    max_in_flight=st.integers(1, 64),
    n_threads=st.integers(1, 3),
)


class Model:
    """An opened model file, and what it computes without any cache."""

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile.open(path)
        self.loaded = load_model(self.file)
        self.weights = WeightMemory.load(self.file, self.loaded.tensor_names, "mmap")
        self.footprint = measure(self.loaded.graph, LIMITS)
        self.n_layers, self.n_experts = len(self.footprint.expert_bytes), self.footprint.n_experts

    def open(self, setup: Setup) -> tuple[ForwardPass, HotCache, EmulatedProgram]:
        behaviour = Behaviour(setup.seed, setup.adversarial, setup.failing)
        device = EmulatedDevice(
            MACHINE, n_threads=setup.n_threads, stream_n_tokens=setup.bypass_n_tokens, behaviour=behaviour
        )
        plan = plan_memory(self.footprint, MACHINE.vram_bytes, device.wish)
        n_slots = np.minimum(np.resize(np.array(setup.n_slots, np.intp), self.n_layers), self.n_experts)
        n_kept = np.maximum(n_slots - np.resize(np.array(setup.n_lent, np.intp), self.n_layers), 0)
        longest_first = sorted(setup.outlast, reverse=True)
        in_contexts = [ContextSlot(la, 0, 0, n) for la in range(self.n_layers) for n in longest_first[: n_slots[la]]]
        n_kept = np.maximum(n_kept - len(longest_first), 0)
        lowered = Lowering(self.loaded.graph, self.weights, LIMITS, setup.n_threads, device.cpu.isa)
        size = int(plan.expert_bytes.sum())  # a slot of each layer
        long_steps = (setup.bypass_n_tokens - 1, 0), (setup.lends_one_up_to, size), (LIMITS.max_tokens, 1 << 60)
        context_slots = tuple(in_contexts)
        plan = replace(plan, n_slots=n_slots, n_kept=n_kept, context_slots=context_slots, long_steps=long_steps)
        program = EmulatedProgram(device, lowered, self.footprint, plan, setup.bypass_n_tokens)
        cache = HotCache(
            program,
            SlotTable(n_slots, self.n_experts, program.expert_bytes),
            make_policy(setup.policy, self.n_layers, self.n_experts),
            SwapBudget(MACHINE.bandwidths.pcie, int(program.expert_bytes.max()), setup.budget_share),
            bypass_n_tokens=setup.bypass_n_tokens,
            max_in_flight=setup.max_in_flight,
        )
        cache._swapper = setup.swapper(program, cache.table, setup.max_in_flight)
        return ForwardPass(WatchedProgram(program, cache), LIMITS, self.loaded.spec.n_vocab), cache, program

    def logits(self, forward: ForwardPass, tokens: list[int], n_prompt: int, chunk: int = 1) -> np.ndarray:
        """Logits of all tokens: the prompt in steps as long as they may be, the rest `chunk` at a time."""
        starts = [0, *range(n_prompt, len(tokens), chunk), len(tokens)]
        parts = [forward.run(0, tokens[start:stop], start, "all") for start, stop in pairwise(starts) if start < stop]
        return np.concatenate(parts)

    def close(self) -> None:
        self.weights.close()
        self.file.close()
