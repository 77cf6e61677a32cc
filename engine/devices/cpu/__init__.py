"""The CPU device: a forward pass as one flat program of C calls."""

from engine.devices.cpu.device import CPUDevice

__all__ = ["CPUDevice"]
