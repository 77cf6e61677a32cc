"""CUDA kernels and the CUDA driver on a CPU, for tests: see README.md beside this file."""

import os

import pytest

from .abi import KernelError
from .build import BuildError, missing_requirement
from .driver import StandInCompiler, StandInDriver, environment, image, stand_in_driver
from .launch import Module, Pointers, SanitizerError, run_every_way

# Running the package needs no g++; without it there is no emulator, and what it would have shown is not tested. CI must
# test it, so there the tests run and fail.
needs_emulator = pytest.mark.skipif(
    missing_requirement() is not None and "CI" not in os.environ, reason=str(missing_requirement())
)

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
    "needs_emulator",
    "run_every_way",
    "stand_in_driver",
]
