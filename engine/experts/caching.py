"""Sets the expert cache up as the settings want it, and puts away what it learned when the engine is closed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.config import EngineConfig, MoESettings
from engine.devices.program import Program
from engine.devices.slots import SlotProgram, WaitingProgram
from engine.errors import ConfigError
from engine.experts.cost import SwapBudget
from engine.experts.hot_cache import CacheStatistics, HotCache, why_useless
from engine.experts.policy import make_policy
from engine.experts.profile import Profile, fingerprint, load_profile, merge_profiles, save_profile
from engine.experts.slots import SlotTable
from engine.experts.steering import make_steering
from engine.experts.trace import TraceRecorder
from engine.experts.watched_program import WatchedProgram
from engine.model_spec import ModelSpec
from engine.resources import Resources

log = logging.getLogger(__name__)


class ExpertCaching:
    """The hot-expert cache of an opened program, with its profile and the trace that is recorded; any of them or none.

    Attributes:
        program: runs steps, and lets the cache work between them.
        cache: None if there is nothing to cache.
    """

    def __init__(self, program: Program, config: EngineConfig, spec: ModelSpec, tensor_names: Sequence[str]) -> None:
        """Set up what the settings ask for; raise `ConfigError` for a profile or a trace that cannot be used.

        tensor_names: those that the program reads.
        """
        moe = config.moe
        steering = make_steering(moe.routing, program, tensor_names, spec)
        self._profile_path, self._trace_path = moe.profile, moe.record_trace
        self._profile: Profile | None = None
        self._name = spec.name
        self._placement = ""
        self._why_off = "no GPU in use" if spec.moe.n_experts else "the model has no experts"
        self.cache: HotCache | None = None
        recorder = None
        if isinstance(program, SlotProgram) and program.n_experts:
            self._model = fingerprint(spec.architecture, spec.name, len(program.n_slots), program.n_experts)
            self.cache = self._make_cache(program, moe, spec.moe.n_experts_used)
        elif self._profile_path:
            log.warning("moe.profile has no effect: this device keeps no experts of its own")
            self._profile_path = ""
        if self._trace_path:
            recorder = TraceRecorder(spec.name, spec.moe.n_experts, {"architecture": spec.architecture})
        self._recorder = recorder
        self.program = WatchedProgram(
            program,
            self.cache,
            recorder,
            steering,
            in_background=isinstance(program, WaitingProgram) and self.cache is not None and program.leaves_a_cpu,
        )

    def _make_cache(self, program: SlotProgram, moe: MoESettings, n_experts_used: int) -> HotCache:
        speeds, n_slots = program.bandwidths, program.n_slots
        whole = moe.n_cpu_moe >= 0
        if moe.hot_rebalance_interval != MoESettings().hot_rebalance_interval and moe.policy != "window_topk":
            log.warning(
                "moe.hot_rebalance_interval is %d, which has no effect: the policy %s looks at every token and is held "
                'back by moe.swap_budget; set policy = "window_topk" for swaps every so many tokens',
                moe.hot_rebalance_interval,
                moe.policy,
            )
        cache = HotCache(
            program,
            SlotTable(n_slots, program.n_experts, program.expert_bytes),
            make_policy(_policy_text(moe, speeds.break_even), len(n_slots), program.n_experts),
            SwapBudget(speeds.pcie, int(program.expert_bytes.max(initial=0)), moe.swap_budget),
            bypass_n_tokens=moe.hot_pp_bypass_n_tokens,
            prompt_seeds_heat=moe.prompt_seeds_heat,
        )
        if whole:
            self._placement = (
                f"experts of the first {min(moe.n_cpu_moe, len(n_slots))} of {len(n_slots)} MoE layers on the CPU, "
                "all others on the device; no cache (n_cpu_moe)"
            )
        elif not n_slots.any():
            wish = 'hot_k is 0; set hot_k = "auto" to use the VRAM that is left'
            if moe.hot_k != 0:
                wish = "no VRAM is left for a slot; raise vram_budget, or use a shorter context or kv_type q8_0"
            self._placement = f"hot-expert cache off: all experts on the CPU, as {wish}"
        elif problem := why_useless(speeds.break_even, n_slots, n_experts_used):
            log.warning("the hot-expert cache can hardly pay: %s", problem)
        if self._profile_path and Path(self._profile_path).exists():
            self._profile = load_profile(self._profile_path, self._model)
            cache.fill(self._profile.counts, wait=True)
        # Where all experts of a layer fit there is nothing to choose.
        everything = np.broadcast_to((n_slots == program.n_experts)[:, None], cache.table.held.shape)
        cache.fill(everything.astype(np.float32), wait=True)
        cache.reset_statistics()  # what was put there before the first token is no swap
        return cache

    @property
    def statistics(self) -> CacheStatistics | None:
        """Return what the cache did so far, None if there is none."""
        self.program.settle()
        return None if self.cache is None else self.cache.statistics

    def describe(self) -> str:
        """Return one line: what is kept where and what that earns, or why there is no cache."""
        if self.cache is None:
            return f"hot-expert cache off: {self._why_off}"
        return self._placement or self.cache.describe()

    def close(self) -> None:
        """Wait for the cache and write profile and trace; what cannot be written costs a warning."""
        with Resources() as held:
            held.defer(self._write)
            if self.cache is not None:
                held.defer(self.cache.close)
            held.defer(self.program.close)
            self.program.settle()

    def _write(self) -> None:
        try:
            if self._profile_path and self.cache is not None and self.cache.n_counted:
                self._save_profile(self.cache)
        except ConfigError as error:
            log.warning("the expert profile is not saved: %s", error)
        try:
            if self._recorder is not None and self._recorder.n_tokens:
                self._recorder.save(self._trace_path)
        except ConfigError as error:
            log.warning("the routing trace is not saved: %s", error)

    def _save_profile(self, cache: HotCache) -> None:
        now = Profile(self._name, self._model, cache.n_counted, cache.counts.astype(np.float32))
        old = [] if self._profile is None else [self._profile]
        save_profile(self._profile_path, merge_profiles([*old, now], now.name))


def _policy_text(moe: MoESettings, break_even: float) -> str:
    """Return the policy as `make_policy` takes it."""
    if moe.n_cpu_moe >= 0:
        return "static"
    if moe.policy == "window_topk":
        return f"window_topk:interval={moe.hot_rebalance_interval}"
    if moe.policy == "adaptive" and np.isfinite(break_even):
        return f"adaptive:break_even={break_even}"
    return moe.policy
