"""The stand-in CUDA driver: loads it in this process, steers it, and compiles kernels for it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

from . import build
from .abi import ORDERS

ERRORS = {
    "CUDA_ERROR_INVALID_VALUE": 1,
    "CUDA_ERROR_OUT_OF_MEMORY": 2,
    "CUDA_ERROR_NO_DEVICE": 100,
    "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
    "CUDA_ERROR_LAUNCH_FAILED": 719,
    "CUDA_ERROR_UNKNOWN": 999,
}
DEFAULTS = {
    "device_bytes": 1 << 30,
    "jitter_us": 0,
    "copy_us": 0,
    "wait_limit_s": 20,
    "n_devices": 1,
    "order": ORDERS["forward"],
    "seed": 1,
}


class StandInDriver:
    """Controls of the stand-in driver that this process has loaded; get it from `stand_in_driver`."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        lib.cusim_driver_message.restype = ctypes.c_char_p
        lib.cusim_driver_count.restype = ctypes.c_long
        for name in ("device_bytes", "pinned_allocations"):
            getattr(lib, f"cusim_driver_{name}").restype = ctypes.c_size_t

    def reset(self) -> None:
        """End the context with everything in it, clear errors, planned failures and settings."""
        self._lib.cusim_driver_forget_failures()
        self._lib.cuDevicePrimaryCtxReset_v2(0)
        self.set(**DEFAULTS)

    def set(self, **values: float | str) -> None:
        """Change settings: device_bytes, jitter_us, copy_us, wait_limit_s, n_devices, order (forward, ...), seed."""
        for name, value in values.items():
            number = ORDERS[value] if isinstance(value, str) else value
            if not self._lib.cusim_driver_set(name.encode(), ctypes.c_double(number)):
                raise KeyError(f"the stand-in driver has no setting {name!r}")

    def fail(self, call: str, nth: int = 1, error: str = "CUDA_ERROR_LAUNCH_FAILED") -> None:
        """Make the n-th coming call of a driver function fail.

        The calls "copy" and "kernel" stand for copies and kernels when a stream executes them; such a failure leaves
        the device unusable, as a crash on a GPU does.
        """
        self._lib.cusim_driver_fail(call.encode(), ctypes.c_long(nth), ERRORS[error])

    def count(self, call: str) -> int:
        """Return how often a driver function was called, or a "copy" or "kernel" executed, since the process began."""
        return self._lib.cusim_driver_count(call.encode())

    @property
    def message(self) -> str:
        """What broke the device last."""
        return build.name_places(self._lib.cusim_driver_message().decode(errors="replace"))

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that are allocated now."""
        return self._lib.cusim_driver_device_bytes()

    @property
    def pinned_allocations(self) -> int:
        """Pinned and registered host allocations that exist now."""
        return self._lib.cusim_driver_pinned_allocations()


@functools.cache
def stand_in_driver() -> StandInDriver:
    """Load the stand-in as this process's libcuda.so.1.

    `cuda.bindings` then finds it by that name, so this must come before its first call; a process that has loaded
    NVIDIA's driver cannot have both.
    """
    library = build.driver_library()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcuda" in line}
    others = {path for path in loaded if Path(path).name.startswith("libcuda.so") and Path(path) != library.resolve()}
    if others:
        raise RuntimeError(f"this process has loaded another driver: {', '.join(sorted(others))}")
    return StandInDriver(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))


def environment() -> dict[str, str]:
    """Return the variables that make a child process load the stand-in; add CUSIM_DRIVER for its settings."""
    return {"LD_LIBRARY_PATH": str(build.driver_library().parent)}


def image(source: Path | str, definitions: Sequence[str] = (), *, mode: str = "fast", **options) -> bytes:
    """Build a .cu file and return what the stand-in's cuModuleLoadData takes for a cubin."""
    library = build.kernel_library(Path(source), mode, defines=definitions, **options)
    return b"CUSIM:" + str(library).encode() + b"\0"


class StandInCompiler:
    """Takes the place of NVRTC: compiles the files of `cuda/` for the stand-in driver."""

    def __init__(self, mode: str = "fast") -> None:
        self.mode = mode

    def compile(self, source: str, definitions: Sequence[str]) -> bytes:
        """Return the image of `cuda/<source>` with `definitions` such as `N_TOKENS=1`."""
        return image(build.KERNEL_SOURCES / source, definitions, mode=self.mode)
