"""CUDA kernels and the CUDA driver on a CPU, for tests: see README.md beside this file."""

from .abi import KernelError
from .build import BuildError, missing_requirement
from .driver import StandInCompiler, StandInDriver, environment, image, stand_in_driver
from .launch import Module, Pointers, SanitizerError

__all__ = [
    "BuildError",
    "KernelError",
    "Module",
    "Pointers",
    "SanitizerError",
    "StandInCompiler",
    "StandInDriver",
    "environment",
    "image",
    "missing_requirement",
    "stand_in_driver",
]
