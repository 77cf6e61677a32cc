"""Looks at a GPU without loading anything onto it, for predictions."""

from __future__ import annotations

from engine.devices.cuda.device import MARGIN_BYTES
from engine.devices.cuda.driver import probe
from engine.devices.cuda.runtime import Context, Stream
from engine.devices.cuda.speeds import measure_speeds
from engine.devices.timing import Machine


def survey(n_threads: int, index: int = 0) -> tuple[str, Machine]:
    """Return what GPU `index` is, for people, and what the machine can do with it, measured in a fraction of a second.

    The machine's `vram_bytes` are those that a program may take now. `n_threads` read the RAM. Raises `DeviceError` if
    there is no GPU that can be used.
    """
    gpu = probe(index)
    context = Context(gpu)
    try:
        stream = Stream(context)
        try:
            speeds = measure_speeds(stream, n_threads)
        finally:
            stream.close()
        return gpu.description, Machine(speeds, max(context.free_bytes() - MARGIN_BYTES, 0))
    finally:
        context.close()
