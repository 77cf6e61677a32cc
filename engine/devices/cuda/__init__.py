"""The CUDA device: a forward pass as one graph of kernels, with the experts that do not fit computed on the CPU."""

from engine.devices.cuda.device import CUDADevice
from engine.devices.cuda.driver import probe
from engine.devices.cuda.survey import survey

__all__ = ["CUDADevice", "probe", "survey"]
