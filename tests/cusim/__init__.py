"""CUDA kernels and the CUDA driver on a CPU, for tests: see README.md beside this file."""

from .abi import KernelError
from .build import BuildError, kernel_library, missing_requirement
from .launch import Module, Pointers, SanitizerError

__all__ = [
    "BuildError",
    "KernelError",
    "Module",
    "Pointers",
    "SanitizerError",
    "kernel_library",
    "missing_requirement",
]
