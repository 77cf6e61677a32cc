"""What the expert cache sees of a device that has slots for experts."""

from __future__ import annotations

from typing import Protocol, TypeAlias

Ticket: TypeAlias = object
"""Stands for work that was started; whoever started it asks `is_done` until it is, and then forgets it."""


class SlotDevice(Protocol):
    """A device with memory for some experts of each layer, in numbered slots.

    A step reads a slot only where a `publish` made before the step was started says so. None of these calls waits for
    the device, but for `wait_all`.
    """

    def copy_expert(self, layer: int, expert: int, slot: int) -> Ticket:
        """Start to copy an expert from RAM into a slot that no step reads. Raises `DeviceError` if that fails."""
        ...

    def fence(self) -> Ticket:
        """Return a ticket that is done when all steps started so far are: they read no slot any more."""
        ...

    def is_done(self, ticket: Ticket) -> bool:
        """Return whether the work is done. Raises `DeviceError` if it failed: the slot's contents are worthless."""
        ...

    def publish(self, layer: int, expert: int, slot: int) -> None:
        """Tell steps started from now on where an expert is: in a slot, or only in RAM (-1)."""
        ...

    def wait_all(self) -> None:
        """Wait for all steps and copies; those that failed do not raise."""
        ...
