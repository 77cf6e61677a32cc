"""Plans the memory of a device before anything is allocated: what must be there first, expert slots from the rest.

Steps of many tokens need room for their intermediate results, and staging buffers for the experts without a slot, all
others do not: their own results, of few tokens, and slots that are lent lie in the same memory (`lending`). More slots
are in that of keys and values which no sequence has reached (`context_slots`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engine.devices.context_slots import ContextSlot, place_in_context
from engine.devices.footprint import Footprint
from engine.devices.lending import LentSlot, StepBytes, UsableSlots, place_lent
from engine.errors import DeviceError

STAGED_EXPERTS = 8  # in each of the buffers that long prompts stream their experts through
_LENT_SHARE = 2  # part of the memory left for experts that long steps may take from slots, which get it back
_TAKEN_SHARE = 16  # likewise from whole layers, which do not
_TAKEN_WEIGHT = 8  # of a byte that long steps take for good, beside one that they take while they run


@dataclass(frozen=True, slots=True)
class Wish:
    """How the user wants the device memory used.

    Attributes:
        hot_k: slots of each MoE layer; None for as many as fit.
        n_cpu_moe: instead of slots for hot experts, the experts of all layers but the first so many; None: not so.
    """

    hot_k: int | None = None
    n_cpu_moe: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What goes into the memory of a device, in bytes.

    Attributes:
        dense_bytes: weights that every token reads.
        state_bytes: keys, values and recurrent states.
        scratch_bytes: intermediate results of short steps; of all if none streams experts.
        long_steps: what steps of up to so many tokens need of the memory that slots lend: nothing if they are short,
            else theirs, and the buffers that experts pass through; empty if none do.
        n_slots: expert slots of each MoE layer: those that are kept, those in the memory of contexts, and those that
            share the memory of long steps.
        n_kept: the first of them, that are there in any step.
        context_slots: those that lie in the memory of keys and values.
        expert_bytes: int64 [n_moe_layers], the size of each of them.
        n_experts: of each layer.
        allowed_bytes: what may be used.
    """

    dense_bytes: int
    state_bytes: int
    scratch_bytes: int
    long_steps: StepBytes
    n_slots: npt.NDArray[np.intp]
    n_kept: npt.NDArray[np.intp]
    expert_bytes: npt.NDArray[np.int64]
    n_experts: int
    allowed_bytes: int
    context_slots: tuple[ContextSlot, ...] = ()

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of all slots."""
        return int((self.n_slots * self.expert_bytes).sum())

    @property
    def context_bytes(self) -> int:
        """Return the bytes of the slots in the memory of keys and values."""
        return sum(int(self.expert_bytes[slot.layer]) for slot in self.context_slots)

    @property
    def lent_slots(self) -> list[LentSlot]:
        """Return the slots in the memory of long steps."""
        n_in_contexts = np.bincount([slot.layer for slot in self.context_slots], minlength=len(self.n_slots))
        return place_lent(self.n_slots - self.n_kept - n_in_contexts, self.expert_bytes, self.long_steps)

    @property
    def lent_bytes(self) -> int:
        """Return their bytes."""
        return int(((self.n_slots - self.n_kept) * self.expert_bytes).sum()) - self.context_bytes

    @property
    def streaming_bytes(self) -> int:
        """Return what the longest steps need of this memory; 0 if none do."""
        return self.long_steps[-1][1] if self.long_steps else 0

    @property
    def shared_bytes(self) -> int:
        """Return the bytes that long steps use in one way, and all others in another."""
        return max(self.streaming_bytes, self.scratch_bytes + self.lent_bytes)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of everything."""
        kept = int((self.n_kept * self.expert_bytes).sum())
        return self.dense_bytes + self.state_bytes + kept + self.shared_bytes

    @property
    def usable(self) -> UsableSlots:
        """Return which slots steps leave alone."""
        return UsableSlots(self.n_kept, self.context_slots, self.lent_slots)

    def describe(self) -> str:
        """Return one line: who gets how much."""
        lent, borrowed = self.lent_bytes, self.context_bytes
        parts = {
            "dense weights": self.dense_bytes,
            "keys, values and states": self.state_bytes,
            "intermediate results": self.scratch_bytes,
            "what else long prompts need": self.shared_bytes - self.scratch_bytes - lent,
            "expert slots": self.slot_bytes - borrowed,
        }
        shares = ", ".join(f"{name} {n / 1e9:.3g}" for name, n in parts.items() if n > 0)
        lending = f", {lent / 1e9:.3g} of them lent to long prompts" if lent else ""
        lending += f"; {borrowed / 1e9:.3g} more of slots where no context has come yet" if borrowed else ""
        return f"{self.n_bytes / 1e9:.3g} of {self.allowed_bytes / 1e9:.3g} GB of VRAM: {shares}{lending}"


Planner: TypeAlias = Callable[..., MemoryPlan]


def longest_step(
    wanted: int,
    least: int,
    left: int,
    layer_bytes: npt.NDArray[np.int64],
    wish: Wish,
    needs: Callable[[int], tuple[int, int]],
) -> int:
    """Return the tokens of the longest steps: as many as wanted, or halved until the memory allows.

    All experts without a slot cross PCIe once in such a step, so twice as long ones take half as much time for that.
    Slots lend them their memory, and get it back. Where every expert has a slot these stay, and so do whole layers.

    Args:
        wanted: tokens.
        least: of steps that there is memory for in any case.
        left: bytes for experts, and for what longer steps need more.
        layer_bytes: int64 [n_moe_layers], all experts of a layer.
        wish: for the experts.
        needs: bytes that steps of so many tokens need more than the least ones, while they run and for good.
    """
    total, stay = int(layer_bytes.sum()), int(layer_bytes[wish.n_cpu_moe or 0 :].sum())
    if wish.hot_k is None and stay == total <= left:
        room = left - total
    elif wish.n_cpu_moe is not None:
        room = max(left - stay, left // _TAKEN_SHARE)
    else:
        room = left // _LENT_SHARE
    n_tokens = wanted
    while n_tokens > least:
        lent, taken = needs(n_tokens)
        if lent + _TAKEN_WEIGHT * taken <= room:
            return n_tokens
        n_tokens //= 2
    return least


def plan_memory(footprint: Footprint, allowed_bytes: int, wish: Wish, staging_bytes: int | None = None) -> MemoryPlan:
    """Plan the memory of a device that may use `allowed_bytes`.

    Args:
        footprint: of the model.
        allowed_bytes: of the device's memory.
        wish: for the experts.
        staging_bytes: of the buffers that long prompts stream experts through, which are needed if there are steps that
            do so and some expert has no slot; None for two buffers of some experts.

    Raises `DeviceError` if what is needed does not fit, saying what would.
    """
    n_layers, n_experts, sizes = len(footprint.expert_bytes), footprint.n_experts, footprint.expert_bytes
    largest = int(sizes.max(initial=0))
    staging = 2 * min(STAGED_EXPERTS, n_experts) * largest if staging_bytes is None else staging_bytes

    def plan(n_slots: npt.NDArray[np.intp], n_kept: npt.NDArray[np.intp] | None = None) -> MemoryPlan:
        kept = n_slots if n_kept is None else n_kept
        streams = bool((kept < n_experts).any())
        (short, scratch), *longer = footprint.scratch
        return MemoryPlan(
            footprint.dense_bytes,
            footprint.state_bytes,
            scratch if streams else footprint.long_scratch_bytes,
            ((short, 0), *((n, n_bytes + staging) for n, n_bytes in longer)) if streams and longer else (),
            n_slots,
            kept,
            sizes,
            n_experts,
            allowed_bytes,
        )

    everything = plan(np.full(n_layers, n_experts, np.intp))
    nothing = plan(np.zeros(n_layers, np.intp))
    if min(nothing.n_bytes, everything.n_bytes) > allowed_bytes:
        raise DeviceError(
            f"the model without its experts needs {_gigabytes(nothing.n_bytes)} of VRAM "
            f"({_gigabytes(nothing.dense_bytes)} weights, {_gigabytes(nothing.state_bytes)} keys, values and states), "
            f"and {_gigabytes(allowed_bytes)} may be used; use a shorter [engine] context_length, fewer n_sequences, "
            'a smaller max_batch_tokens or kv_type "q8_0", or raise vram_budget'
        )
    if wish.n_cpu_moe is not None:
        return _whole_layers(plan, wish.n_cpu_moe, n_layers, n_experts, allowed_bytes)
    if everything.n_bytes <= allowed_bytes and (wish.hot_k is None or wish.hot_k >= n_experts):
        return everything
    made = _with_context_slots(_lending(plan, nothing, wish.hot_k), footprint, wish.hot_k)
    if wish.hot_k is not None and made.n_slots.min(initial=n_experts) < min(wish.hot_k, n_experts):
        raise DeviceError(
            f"moe.hot_k is {wish.hot_k}, and {_gigabytes(allowed_bytes)} of VRAM hold {int(made.n_slots.min())} "
            f"experts of each of {n_layers} layers beside everything else; use a smaller hot_k or "
            '"auto", or raise vram_budget'
        )
    return made


def _lending(plan: Planner, nothing: MemoryPlan, most: int | None) -> MemoryPlan:
    """Return the plan with as many slots as fit, some of them in the memory of long steps.

    Args:
        plan: makes one from slots and those of them that are kept.
        nothing: the plan without slots.
        most: slots of a layer.
    """
    left = nothing.allowed_bytes - nothing.dense_bytes - nothing.state_bytes
    n_kept, n_slots = (
        slots_that_fit(left - n_bytes, nothing.expert_bytes, nothing.n_experts, most)
        for n_bytes in (nothing.shared_bytes, nothing.scratch_bytes)
    )
    return plan(n_slots, np.minimum(n_kept, n_slots))


def _with_context_slots(plan: MemoryPlan, footprint: Footprint, most: int | None) -> MemoryPlan:
    """Return the plan with as many slots more as contexts have room for, `most` of a layer in all."""
    most = plan.n_experts if most is None else min(most, plan.n_experts)
    slots = place_in_context(footprint.stretches, footprint.context_length, plan.expert_bytes, plan.n_slots, most)
    n_more = np.bincount([slot.layer for slot in slots], minlength=len(plan.n_slots))
    return replace(plan, n_slots=plan.n_slots + n_more, context_slots=slots)


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


def _whole_layers(plan: Planner, n_cpu: int, n_layers: int, n_experts: int, allowed_bytes: int) -> MemoryPlan:
    """Return the plan with the experts of the first `n_cpu` layers on the CPU, all others on the device."""

    def keep(n: int) -> MemoryPlan:
        return plan(np.where(np.arange(n_layers) < n, 0, n_experts).astype(np.intp))

    made = keep(n_cpu)
    if made.n_bytes > allowed_bytes:
        fits = next(n for n in range(min(n_cpu, n_layers), n_layers + 1) if keep(n).n_bytes <= allowed_bytes)
        raise DeviceError(
            f"moe.n_cpu_moe is {n_cpu}, which puts {_gigabytes(made.n_bytes)} into VRAM, and "
            f"{_gigabytes(allowed_bytes)} may be used; n_cpu_moe = {fits} fits"
        )
    return made


def least_cpu_layers(footprint: Footprint, allowed_bytes: int) -> int:
    """Return the smallest `n_cpu_moe` that fits."""
    n_layers = len(footprint.expert_bytes)
    for n_cpu in range(n_layers):
        try:
            plan_memory(footprint, allowed_bytes, Wish(n_cpu_moe=n_cpu))
        except DeviceError:
            continue
        return n_cpu
    return n_layers


def slots_that_fit(
    n_bytes: int, expert_bytes: npt.NDArray[np.int64], n_experts: int, most: int | None = None
) -> npt.NDArray[np.intp]:
    """Return slots of each layer for a stretch of device memory: as even as it goes, later layers first.

    The rest that is too small for one more slot everywhere goes to the last layers: their routing repeats itself more
    than that of the first ones.

    Args:
        n_bytes: of device memory.
        expert_bytes: int64 [n_layers].
        n_experts: of each layer; more slots would be empty.
        most: slots of a layer at most (the setting `hot_k`); None for as many as fit.
    """
    most = n_experts if most is None else min(most, n_experts)
    even = min(n_bytes // max(int(expert_bytes.sum()), 1), most)
    n_slots = np.full(len(expert_bytes), even, np.intp)
    rest = n_bytes - even * int(expert_bytes.sum())
    if even < most:
        for layer in range(len(expert_bytes) - 1, -1, -1):
            if expert_bytes[layer] <= rest:
                n_slots[layer] += 1
                rest -= int(expert_bytes[layer])
    return n_slots
