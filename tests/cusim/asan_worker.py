"""The process in which kernels run under AddressSanitizer and UBSan: libasan must be loaded before anything else.

Reads pickled requests from standard input, answers on standard output. Every array gets an allocation of its own, so
the first byte past its end is out of bounds. A violation ends the process with a report on standard error.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from dataclasses import dataclass

from .abi import KernelError, Library

ALIGNMENT = 256  # of cudaMalloc

libc = ctypes.CDLL(None)
libraries: dict[str, Library] = {}


@dataclass
class Address:
    """A place in a buffer of the request."""

    buffer: int
    offset: int


@dataclass
class Image:
    """Bytes, and the positions in them that hold addresses."""

    data: bytes
    addresses: dict[int, Address]


@dataclass
class Request:
    """A launch; `values` are numbers, `Address`es and, for structs, `Image`s."""

    library: str
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    values: list
    shared_bytes: int
    order: str
    seed: int
    buffers: list[Image]
    written: set[int]  # the buffers whose contents go back


def allocate(n_bytes: int) -> int:
    p = ctypes.c_void_p()
    if libc.posix_memalign(ctypes.byref(p), ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(n_bytes)):
        raise MemoryError(f"{n_bytes} bytes for a kernel's argument")
    return p.value


def serve(request: Request) -> tuple[str | None, dict[int, bytes]]:
    """Run the launch; return the error or None, and the written buffers."""
    starts = [allocate(len(image.data)) for image in request.buffers]

    def at(address: Address) -> int:
        return starts[address.buffer] + address.offset

    def relocated(image: Image) -> bytes:
        data = bytearray(image.data)
        for position, address in image.addresses.items():
            data[position : position + 8] = at(address).to_bytes(8, "little")
        return bytes(data)

    def value(v: object) -> object:
        return at(v) if isinstance(v, Address) else relocated(v) if isinstance(v, Image) else v

    def content(index: int) -> bytes:
        image = request.buffers[index]
        data = bytearray(ctypes.string_at(starts[index], len(image.data)))
        for position, address in image.addresses.items():  # the sender knows its own addresses only
            if data[position : position + 8] == at(address).to_bytes(8, "little"):
                data[position : position + 8] = image.data[position : position + 8]
        return bytes(data)

    for start, image in zip(starts, request.buffers, strict=True):
        ctypes.memmove(start, relocated(image), len(image.data))
    if request.library not in libraries:
        libraries[request.library] = Library(request.library)
    library, error = libraries[request.library], None
    try:
        library.configure(request.order, request.seed)
        values = [value(v) for v in request.values]
        library.launch(request.name, request.grid, request.block, values, request.shared_bytes)
    except KernelError as e:
        error = str(e)
    results = {i: content(i) for i in request.written}
    for start in starts:
        libc.free(ctypes.c_void_p(start))
    return error, results


def main() -> None:
    """Serve requests until the sender closes the pipe."""
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(serve(request), sys.stdout.buffer)
        sys.stdout.buffer.flush()
