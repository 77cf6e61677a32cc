"""What the expert cache sees of a device that has slots for experts."""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.devices.program import StagedProgram
from engine.devices.timing import Bandwidths, LayerTimes, StepTime, Traffic

Ticket: TypeAlias = object
"""Stands for work that was started; whoever started it asks `is_done` until it is, and then forgets it."""


class SlotDevice(Protocol):
    """A device with memory for some experts of each layer, in numbered slots.

    A step reads a slot only where a `publish` made before the step was started says so. None of these calls waits for
    the device, but for `wait_all`. Fences are passed in the order of steps and their layers as a rule, and copies end
    in the order in which they were begun; nothing goes wrong where they do not, but then it may be noticed late.
    """

    def copy_expert(self, layer: int, expert: int, slot: int) -> Ticket:
        """Start to copy an expert from RAM into a slot that no step reads. Raises `DeviceError` if that fails."""
        ...

    def fence(self, layer: int) -> Ticket:
        """Return a ticket that is done when no step started so far reads a slot of the layer any more."""
        ...

    def is_done(self, ticket: Ticket) -> bool:
        """Return whether the work is done. Raises `DeviceError` if it failed: the slot's contents are worthless."""
        ...

    def publish(self, layer: int, expert: int, slot: int) -> None:
        """Tell steps started from now on where an expert is: in a slot, or only in RAM (-1)."""
        ...

    def usable_slots(self, n_tokens: int, n_positions: int) -> npt.NDArray[np.bool_]:
        """Return which slots a step leaves alone, bool [n_moe_layers, most slots of a layer].

        The others are lent to it, or to the context: whatever is in them is lost. No expert may be published there when
        the step begins, nor be copied there before it is over.

        Args:
            n_tokens: of the step.
            n_positions: of the longest sequence after it.
        """
        ...

    def longest_after(self, positions: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> int:
        """Return how many tokens the longest sequence has after a step with tokens there; slots: of sequences."""
        ...

    def wait_all(self) -> None:
        """Wait for all steps and copies; those that failed do not raise."""
        ...


@runtime_checkable
class SlotProgram(SlotDevice, Protocol):
    """A compiled forward pass on such a device, ready for a cache; its slots are empty at first."""

    @property
    def n_slots(self) -> npt.NDArray[np.intp]:
        """Return the slots of each MoE layer."""
        ...

    @property
    def n_experts(self) -> int:
        """Return the experts of each MoE layer."""
        ...

    @property
    def expert_bytes(self) -> npt.NDArray[np.int64]:
        """Return the size of one expert of each MoE layer, int64 [n_moe_layers]."""
        ...

    @property
    def bandwidths(self) -> Bandwidths:
        """Return the speeds that decide which swaps pay."""
        ...

    @property
    def device_bytes(self) -> int:
        """Return the device memory in use, slots and everything else."""
        ...


@runtime_checkable
class WaitingProgram(SlotProgram, StagedProgram, Protocol):
    """One whose steps wait for the device, so that another thread may work, and call all of the above, meanwhile.

    Attributes:
        leaves_a_cpu: whether there is a CPU for it.
    """

    leaves_a_cpu: bool


@runtime_checkable
class ClockedProgram(Protocol):
    """A program whose time is not the wall clock's."""

    def now(self) -> float:
        """Return the seconds on the program's clock."""
        ...


@runtime_checkable
class MeteredProgram(Protocol):
    """A program that knows where time and bytes went, of all its steps so far."""

    @property
    def time_spent(self) -> StepTime:
        """Return where the time went."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Return what was moved."""
        ...


@runtime_checkable
class TimedProgram(Protocol):
    """A program that measures how device and CPU share the time."""

    @property
    def layer_times(self) -> LayerTimes:
        """Return the times of all steps of one token so far."""
        ...
