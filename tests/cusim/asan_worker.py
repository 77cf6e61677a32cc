"""The process in which kernels run under AddressSanitizer and UBSan: libasan must be loaded before anything else.

Reads pickled requests from standard input, answers on standard output. Every array gets an allocation of its own, as
exact as those of cudaMalloc are not, so the first byte past its end is out of bounds. A violation ends the process with
a report on standard error.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from abi import KernelError, Library

ALIGNMENT = 256  # of cudaMalloc

libc = ctypes.CDLL(None)


def allocate(data: bytes) -> int:
    p = ctypes.c_void_p()
    if libc.posix_memalign(ctypes.byref(p), ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(len(data))):
        raise MemoryError
    ctypes.memmove(p.value, data, len(data))
    return p.value


def serve(request: dict) -> tuple[str | None, list[bytes]]:
    buffers = [allocate(data) for data in request["buffers"]]

    def resolve(value: object) -> object:
        match value:
            case ("buffer", int(index), int(offset)):
                return buffers[index] + offset
            case _:
                return value

    tables = []
    for entries in request["tables"]:
        tables.append(allocate(b"".join(resolve(e).to_bytes(8, "little") for e in entries)))
    values = [tables[v[1]] if isinstance(v, tuple) and v[0] == "table" else resolve(v) for v in request["values"]]
    library = libraries.setdefault(request["library"], Library(request["library"]))
    error = None
    try:
        library.configure(request["order"], request["seed"])
        library.launch(request["name"], request["grid"], request["block"], values, request["shared_bytes"])
    except KernelError as e:
        error = str(e)
    results = [
        ctypes.string_at(buffers[i], len(data)) if i in request["written"] else b""
        for i, data in enumerate(request["buffers"])
    ]
    for address in (*buffers, *tables):
        libc.free(ctypes.c_void_p(address))
    return error, results


libraries: dict[str, Library] = {}
while True:
    try:
        request = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    pickle.dump(serve(request), sys.stdout.buffer)
    sys.stdout.buffer.flush()
