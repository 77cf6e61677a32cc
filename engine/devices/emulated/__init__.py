"""A GPU played by the CPU: real arithmetic, memory of limited size, a virtual clock, and checks for hazards."""

from engine.devices.emulated.device import Behaviour, EmulatedDevice
from engine.devices.emulated.slot_memory import HazardError

__all__ = ["Behaviour", "EmulatedDevice", "HazardError"]
