"""The CUDA driver through `cuda.bindings`: imported when first needed, every call checked in one place.

Works with the 12.9 and 13.x bindings. Handles are kept as the bindings' own objects, addresses as plain integers.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from engine.errors import DeviceError

OLDEST_DRIVER = 12000  # CUDA 12.0, driver 525: the first that loads what the 12.9 compiler makes
OLDEST_COMPUTE = (8, 0)  # Ampere: cp.async and int8 tensor cores

_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "use fewer expert slots, a shorter context or a smaller vram_budget",
    "CUDA_ERROR_NO_DEVICE": "check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot, so that kernel driver and libcuda are of one version again",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel crashed; the device can be used again in a new process only",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel crashed; the device can be used again in a new process only",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "the GPU also drives a display that stops long kernels; use another GPU for it",
}


class DriverCallError(DeviceError):
    """A call of the CUDA driver failed; `name` is the error's name, for example CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, call: str, name: str, code: int, text: str) -> None:
        advice = _ADVICE.get(name)
        super().__init__(f"{call} failed: {name} ({code}): {text}" + (f"; {advice}" if advice else ""))
        self.name = name


@functools.cache
def bindings() -> ModuleType:
    """Return `cuda.bindings.driver`; raise `DeviceError` if the package is missing or does not load."""
    # Both are read by the driver when it starts. A kernel that is loaded at its first launch would wait for the device
    # to be idle, which it never is while a decode graph waits for the CPU.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    try:
        from cuda.bindings import driver  # noqa: PLC0415
    except ImportError as error:
        raise DeviceError(
            f"the package cuda-python cannot be imported ({error}); pip install 'cuda-python>=12.9.4,<13'"
        ) from None
    return driver  # type: ignore[no-any-return]


def call(name: str, *args: Any) -> Any:
    """Call a function of the driver; return its result, several as a tuple, None if there is none.

    Raises `DriverCallError` if the driver reports an error, `DeviceError` if there is no driver.
    """
    driver = bindings()
    try:
        code, *results = getattr(driver, name)(*args)
    except RuntimeError as error:  # libcuda.so.1 is not there, or lacks the function
        if type(error).__name__ == "DynamicLibNotFoundError":
            raise DeviceError(
                "no NVIDIA driver is installed (libcuda.so.1 was not found); install driver 525 or newer"
            ) from None
        raise DeviceError(f"the NVIDIA driver cannot be used ({error}); install driver 525 or newer") from None
    if code != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(code)
        raise DriverCallError(name, code.name, int(code), text.decode() if text else "unknown error")
    return results[0] if len(results) == 1 else tuple(results) if results else None


@dataclass(frozen=True, slots=True)
class GPU:
    """Facts of one device.

    Attributes:
        index: its ordinal.
        name: for people.
        compute: compute capability.
        memory_bytes: memory of the card.
        n_multiprocessors: streaming multiprocessors.
        shared_bytes: shared memory that a block may have.
        driver_version: CUDA version of the driver, 1000 * major + 10 * minor.
    """

    index: int
    name: str
    compute: tuple[int, int]
    memory_bytes: int
    n_multiprocessors: int
    shared_bytes: int
    driver_version: int

    @property
    def arch(self) -> str:
        """Return the compiler's name of the architecture, for example `sm_89`."""
        return f"sm_{self.compute[0]}{self.compute[1]}"

    @property
    def can_overlap(self) -> bool:
        """Return whether a kernel may begin, in a graph too, while the one before it still runs."""
        return self.compute >= (9, 0) and self.driver_version >= 12030

    @property
    def description(self) -> str:
        """Return one line for people."""
        major, minor = self.driver_version // 1000, self.driver_version % 1000 // 10
        return f"{self.name}, {self.memory_bytes / 1e9:.1f} GB, {self.arch}, CUDA {major}.{minor} driver"


def probe(index: int = 0) -> GPU:
    """Look for a GPU that we can use and return its facts.

    Raises `DeviceError` with the reason in one line: no package, no driver, a driver too old, no such device, a GPU too
    old.
    """
    call("cuInit", 0)
    version = int(call("cuDriverGetVersion"))
    if version < OLDEST_DRIVER:
        raise DeviceError(
            f"the NVIDIA driver is too old: it knows CUDA {version // 1000}.{version % 1000 // 10}, "
            f"{OLDEST_DRIVER // 1000}.{OLDEST_DRIVER % 1000 // 10} is needed; install driver 525 or newer"
        )
    count = int(call("cuDeviceGetCount"))
    if not 0 <= index < count:
        raise DeviceError(
            f"there is no GPU {index}: {count} found; choose one of 0 to {count - 1}"
            if count
            else "no GPU was found; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    device = call("cuDeviceGet", index)
    gpu = GPU(
        index=index,
        name=call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace"),
        compute=(
            attribute(device, "COMPUTE_CAPABILITY_MAJOR"),
            attribute(device, "COMPUTE_CAPABILITY_MINOR"),
        ),
        memory_bytes=int(call("cuDeviceTotalMem", device)),
        n_multiprocessors=attribute(device, "MULTIPROCESSOR_COUNT"),
        shared_bytes=attribute(device, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        driver_version=version,
    )
    if gpu.compute < OLDEST_COMPUTE:
        raise DeviceError(
            f"GPU {index} ({gpu.name}) has compute capability {gpu.compute[0]}.{gpu.compute[1]}; "
            f"{OLDEST_COMPUTE[0]}.{OLDEST_COMPUTE[1]} or newer is needed"
        )
    return gpu


def attribute(device: Any, name: str) -> int:
    """Return a device attribute by its name without `CU_DEVICE_ATTRIBUTE_`."""
    attributes = bindings().CUdevice_attribute
    return int(call("cuDeviceGetAttribute", getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), device))
