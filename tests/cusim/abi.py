"""Calls kernels in a library that `build` made, through the C interface of `include/cusim/runtime.h`.

Standard library only: the sanitizer's worker process loads nothing else.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
SPIN_LIMIT_S = 20.0
ERROR_BYTES = 1 << 14


class KernelError(Exception):
    """A kernel, or the way it was launched, broke a rule; the message names block, thread and source line."""


class _Param(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("kind", ctypes.c_char))


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("entry", ctypes.c_void_p),
        ("n_params", ctypes.c_size_t),
        ("params", ctypes.POINTER(_Param)),
    )


class Library:
    """A loaded library of kernels."""

    def __init__(self, path: str) -> None:
        self._lib = ctypes.CDLL(path)
        self._lib.cusim_static_shared.restype = ctypes.c_void_p
        self.kernels: dict[str, _Kernel] = {}
        table = (_Kernel * 4096).in_dll(self._lib, "cusim_kernels")
        for kernel in table:
            if kernel.name is None:
                break
            self.kernels[kernel.name.decode()] = kernel

    def configure(self, order: str, seed: int, spin_limit_s: float = SPIN_LIMIT_S) -> None:
        """Set in which order threads and blocks run."""
        self._lib.cusim_configure(ORDERS[order], ctypes.c_uint64(seed), ctypes.c_double(spin_limit_s))

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], values: Sequence[object], shared_bytes: int = 0
    ) -> None:
        """Run a kernel to its end. Values: addresses and integers as int, numbers as float, structs as bytes."""
        kernel = self.kernels[name]
        if len(values) != kernel.n_params:
            raise KernelError(f"{name} takes {kernel.n_params} arguments, got {len(values)}")
        pairs = zip(kernel.params[: kernel.n_params], values, strict=True)
        images = [_image(name, i, p.size, p.kind.decode(), value) for i, (p, value) in enumerate(pairs)]
        buffers = [ctypes.create_string_buffer(image, max(len(image), 16)) for image in images]
        params = (ctypes.c_void_p * (len(buffers) + 1))(*map(ctypes.addressof, buffers))
        error = ctypes.create_string_buffer(ERROR_BYTES)
        dims = [(ctypes.c_uint * 3)(*sides) for sides in (grid, block)]
        shared = ctypes.c_void_p(self._lib.cusim_static_shared())
        size = ctypes.c_size_t(shared_bytes)
        if self._lib.cusim_launch(
            ctypes.byref(kernel), params, *dims, size, shared, error, ctypes.c_size_t(ERROR_BYTES)
        ):
            raise KernelError(f"{name}: {error.value.decode(errors='replace')}")


def _image(name: str, index: int, size: int, kind: str, value: object) -> bytes:
    """Return the bytes of one argument."""
    wanted = {"p": int, "i": int, "f": (int, float), "s": bytes}[kind]
    try:
        if not isinstance(value, wanted):
            raise TypeError(f"expected {wanted}")
        if kind == "f":
            return struct.pack("f" if size == 4 else "d", value)
        if kind == "s":
            if len(value) != size:
                raise ValueError(f"a struct of {size} bytes is expected, not {len(value)}")
            return value
        return value.to_bytes(size, "little", signed=value < 0)
    except (TypeError, ValueError, OverflowError, struct.error) as e:
        raise KernelError(f"{name}: argument {index} ({value!r}) does not fit the parameter: {e}") from e
