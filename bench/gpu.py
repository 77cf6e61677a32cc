"""Measures the CUDA device on a real GPU: kernels against the bandwidth of their memory, hand-shakes, whole models.

    python bench/gpu.py [--out FOLDER] [--model synthetic:NAME] [--sections copies,linear,...]

Each section stands alone: one that fails is reported and the next is run. Results go to the screen and to `gpu.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine import _kernels, machine
from engine.devices.cpu import CPUDevice
from engine.devices.cuda import CUDADevice, drawing, elementwise, kernels, probe, recurrent, tiles
from engine.devices.cuda.attention import Cache, Heads, Place, Rotation, Sight
from engine.devices.cuda.attention import attend as attention_over
from engine.devices.cuda.attention import inputs as attention_inputs
from engine.devices.cuda.attention import scratch_bytes as attention_scratch_bytes
from engine.devices.cuda.driver import call
from engine.devices.cuda.jit import NVRTCCompiler
from engine.devices.cuda.kernels import Asked, Combined, Exchange, Forms, GateOf, Routed, Routing
from engine.devices.cuda.launch import Count, ExpertMatrix, Launch, Matrix, Rows
from engine.devices.cuda.program import CUDAProgram
from engine.devices.cuda.runtime import Context, DeviceMemory, Graph, PinnedMemory, Stream
from engine.devices.graph import Activation as ExpertActivation
from engine.devices.graph import Gating, KVType, Scoring
from engine.devices.placement import Wish
from engine.devices.program import DRAW, Limits
from engine.devices.timing import Bandwidths
from engine.errors import EngineError
from engine.generate.forward import ForwardPass
from engine.gguf import WeightMemory
from engine.models import Model, load_model
from engine.quants import install_grids
from engine.quants.formats import BY_NAME, Activation, QuantFormat
from engine.quants.grids import GRID_NAMES, load_grid
from engine.synthetic import open_model_file

MODEL = "synthetic:qwen3.5-122b-a10b:layers=8"
LINEAR_FORMATS = [
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "Q3_K",
    "Q2_K",
    "IQ4_XS",
    "MXFP4",
    "Q4_0",
    "IQ3_S",
    "IQ2_XS",
    "F16",
    "BF16",
]
POOL_BYTES = 1 << 30  # weights that a kernel cycles through: far more than the L2 cache
RAM_BYTES = 1 << 30  # that threads read: far more than the CPU's caches
# Threads, words under way of each, and blocks on a multiprocessor: the best on an H200 for launches of some size.
READ_SHAPES = ((128, 2, 16), (128, 8, 16), (256, 8, 8), (512, 1, 4), (512, 4, 2), (512, 8, 4))
READ_SOURCE = str(Path(__file__).with_name("read.cu").resolve())
SPEEDS = Bandwidths(100e9, 25e9, 1000e9)


class Bench:
    """The opened GPU, and what was measured so far."""

    def __init__(self, n_threads: int, model: str, n_prompt: int, longest: int, n_tokens: int) -> None:
        self.n_threads, self.model, self.n_prompt = n_threads, model, n_prompt
        self.longest, self.n_tokens = longest, n_tokens
        self.results: dict[str, Any] = {}
        self.gpu = probe()
        install_grids()
        self.context = Context(self.gpu)
        self.stream = Stream(self.context)
        self.vram_gb_s = 0.0

    def lengths(self, *wanted: int) -> list[int]:
        """Return numbers of tokens, those that are no more than the longest prompt."""
        return [n for n in wanted if n <= self.longest] or [self.longest]

    def note(self, section: str, name: str, value: Any, unit: str = "") -> None:
        """Keep a result and show it."""
        self.results.setdefault(section, {})[name] = value
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        print(f"{section:12} {name:58} {shown} {unit}", flush=True)

    def share(self, section: str, name: str, n_bytes: float, seconds: float) -> None:
        """Keep a kernel's bandwidth, also as a share of the memory's."""
        rate = n_bytes / seconds / 1e9
        of = f"GB/s, {rate / self.vram_gb_s:.0%} of VRAM; {seconds * 1e6:.1f} us" if self.vram_gb_s else "GB/s"
        self.note(section, name, rate, of)

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Return the shortest time the GPU took for what `work` queues."""
        start, end = (call("cuEventCreate", 0) for _ in range(2))
        best = float("inf")
        work()
        for _ in range(repeats):
            call("cuEventRecord", start, self.stream.handle)
            work()
            call("cuEventRecord", end, self.stream.handle)
            self.stream.synchronize()
            best = min(best, call("cuEventElapsedTime", start, end) * 1e-3)
        for event in (start, end):
            call("cuEventDestroy", event)
        return best

    def launch(self, launches: Iterable[Launch]) -> None:
        """Queue kernels, one after the other."""
        for launch in launches:
            self.stream.launch(launch)

    def replay_s(self, launches: Sequence[Launch], repeats: int = 5) -> float:
        """Return the seconds of one run of all launches, captured into a graph."""
        self.context.prepare(launches)
        for launch in launches:
            self.context.function(launch)
        graph: Graph = self.stream.capture(lambda: self.launch(launches))
        try:
            return self.seconds(lambda: graph.launch(self.stream), repeats)
        finally:
            graph.close()

    @contextmanager
    def memory(self, *sizes: int) -> Iterator[list[int]]:
        """Allocate zeroed device memory, and free it."""
        blocks = [DeviceMemory(size + 512) for size in sizes]
        try:
            for block, size in zip(blocks, sizes, strict=True):
                self.stream.fill(block.address, 0, size + 512)
            yield [block.address + 256 for block in blocks]
        finally:
            self.stream.synchronize()
            for block in blocks:
                block.close()

    def put(self, address: int, values: np.ndarray) -> None:
        """Copy an array to the device."""
        contiguous = np.ascontiguousarray(values)
        self.stream.upload(address, contiguous.ctypes.data, contiguous.nbytes)
        self.stream.synchronize()


@contextmanager
def opened(bench: Bench) -> Iterator[tuple[Model, WeightMemory]]:
    """Make the model and its weights, in memory."""
    start, file = time.perf_counter(), open_model_file(bench.model)
    try:
        loaded = load_model(file)
        weights = WeightMemory.load(file, loaded.tensor_names, "memory", n_threads=bench.n_threads)
        print(f"{bench.model}: {time.perf_counter() - start:.1f} s to make the weights", flush=True)
        try:
            yield loaded, weights
        finally:
            weights.close()
    finally:
        file.close()


@contextmanager
def compiled(
    bench: Bench, loaded: Model, weights: WeightMemory, limits: Limits, wish: Wish, **options: Any
) -> Iterator[CUDAProgram]:
    """Compile the model for the GPU, with its experts placed as wished for."""
    device = CUDADevice(wish=wish, bandwidths=SPEEDS, **{"n_threads": bench.n_threads} | options)
    try:
        program = device.compile(loaded.graph, weights, limits)
        try:
            yield program
        finally:
            program.close()
    finally:
        device.close()


# -- sections ---------------------------------------------------------------------------------------------------------


def facts(bench: Bench) -> None:
    bench.note("facts", "gpu", bench.gpu.description)
    bench.note("facts", "python", platform.python_version())
    bench.note("facts", "cuda-bindings", __import__("cuda.bindings", fromlist=["__version__"]).__version__)
    bench.note("facts", "nvrtc", str(NVRTCCompiler(bench.gpu.arch)._version))
    bench.note("facts", "cores", machine.n_physical_cores())
    bench.note("facts", "isa", str(_kernels.isa_levels()))
    bench.note("facts", "threads", bench.n_threads)
    data = np.empty(RAM_BYTES, np.uint8)
    for n in (*(n for n in (1, 4, 8) if n < bench.n_threads), bench.n_threads):
        bench.note("facts", f"RAM read, {n} threads", _kernels.read_bandwidth(data, n, 3) / 1e9, "GB/s")


def copies(bench: Bench) -> None:
    size = 256 << 20
    pinned = PinnedMemory(size)
    try:
        with bench.memory(size, size) as (a, b):
            for kib in (64, 1024, 5 * 1024, 64 * 1024):
                n = min(64, size // (kib << 10))

                def upload(piece: int = kib << 10, n: int = n) -> None:
                    for i in range(n):
                        bench.stream.upload(a + i * piece, pinned.address + i * piece, piece)

                s = bench.seconds(upload)
                bench.note("copies", f"host to device, pieces of {kib} KiB", n * (kib << 10) / s / 1e9, "GB/s")
            s = bench.seconds(lambda: bench.stream.download(pinned.address, a, size))
            bench.note("copies", "device to host", size / s / 1e9, "GB/s")
            s = bench.seconds(lambda: bench.stream.copy(b, a, size), 5)
            bench.note("copies", "within the device, read + written", 2 * size / s / 1e9, "GB/s")
            bench.vram_gb_s = 2 * size / s / 1e9
        source = np.ones(5 << 20, np.uint8)
        for n in (1, 4, bench.n_threads):
            start = time.perf_counter()
            for i in range(20):
                _kernels.parallel_copy(source.ctypes.data, pinned.address + (i % 40) * (5 << 20), source.nbytes, n)
            bench.note(
                "copies",
                f"RAM to pinned, {n} threads",
                20 * source.nbytes / (time.perf_counter() - start) / 1e9,
                "GB/s",
            )
    finally:
        pinned.close()


def _grid(bench: Bench, weight_format: QuantFormat, address: int) -> int:
    name = "IQ1_S" if weight_format.name == "IQ1_M" else weight_format.name
    if name not in GRID_NAMES:
        return 0
    bench.put(address, load_grid(name))
    return address


def read_launch(data: int, n_bytes: int, out: int, shape: tuple[int, int, int], n_multiprocessors: int) -> Launch:
    """Return a launch that reads so many bytes, a multiple of 16; shape: one of `READ_SHAPES`."""
    threads, depth, blocks = shape
    n_words, n_blocks = n_bytes // 16, n_multiprocessors * blocks
    return Launch(
        READ_SOURCE,
        "read_all",
        (f"THREADS={threads}", f"DEPTH={depth}"),
        (n_blocks, 1, 1),
        threads,
        (ctypes.c_void_p(data), ctypes.c_int64(n_words), ctypes.c_int64(-(-n_words // n_blocks)), ctypes.c_void_p(out)),
    )


def empty_launch(launch: Launch) -> Launch:
    """Return a launch as large as another one, that does nothing."""
    definitions = ("THREADS=32", "DEPTH=1")
    return Launch(READ_SOURCE, "nothing", definitions, launch.grid, launch.block, (), launch.shared_bytes)


def reads(bench: Bench) -> None:
    """What a launch of so many bytes can reach: kernels that only read, one after the other as products are."""
    with bench.memory(POOL_BYTES, 4) as (data, out):
        for mib in (10, 20, 40, 80, 160):
            n_bytes, times = mib << 20, []
            starts = [data + i * n_bytes for i in range(min(64, POOL_BYTES // n_bytes))]
            for shape in READ_SHAPES:
                launches = [read_launch(at, n_bytes, out, shape, bench.gpu.n_multiprocessors) for at in starts]
                times.append(bench.replay_s(launches) / len(launches))
            bench.share("reads", f"{mib} MiB", n_bytes, min(times))


def linear(bench: Bench) -> None:
    """A dense matrix of 3072 columns, as of the 122B, in each format; as many copies as the pool holds."""
    n_cols = 3072
    with bench.memory(POOL_BYTES + (64 << 20), 64 * n_cols * 4, 64 << 20, 4, 1 << 20) as (weights, x, out, count, grid):
        for name, n_rows, n_tokens in [
            *((name, n_rows, 1) for name in LINEAR_FORMATS for n_rows in (3072, 12288, 49152)),
            *(("Q4_K", n, 1) for n in (512, 1024)),
            *((name, 12288, n) for name in ("Q4_K", "Q6_K") for n in (2, 4, 8, 64)),
        ]:
            weight_format = BY_NAME[name]
            bench.put(count, np.array([n_tokens], np.int32))
            n_bytes = n_rows * weight_format.row_bytes(n_cols)
            stride = -(-n_bytes // 256) * 256 + 256
            n = max(1, min(64 if n_tokens <= 8 else 4, POOL_BYTES // stride))
            row_bytes = kernels.activation_bytes(weight_format.activation, n_cols)
            product = tiles.linear_for(n_tokens)
            launches = [
                product(
                    Rows(x, row_bytes),
                    n_cols,
                    weight_format,
                    [Matrix(weights + i * stride, n_rows, Rows(out, n_rows))],
                    _grid(bench, weight_format, grid),
                    Count(count, n_tokens),
                )
                for i in range(n)
            ]
            s = bench.replay_s(launches) / n
            bench.share("linear", f"{name} {n_rows} x {n_cols}, {n_tokens} tokens ({n_bytes >> 20} MiB)", n_bytes, s)


def products(bench: Bench) -> None:
    """Dense matrices times the tokens of a prompt, in operations (two for a multiply-add) a second."""
    n_cols = 3072
    with bench.memory(256 << 20, 4096 * 4096, 4096 * 12288 * 4, 256, 1 << 20) as (weights, x, out, count, grid):
        for name, n_rows, n_tokens in [
            *((name, 12288, 3000) for name in ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "IQ4_XS", "MXFP4", "IQ2_XS")),
            *(("Q4_K", n_rows, n) for n_rows, n in ((12288, 9), (12288, 64), (12288, 512), (1024, 3000), (3072, 3000))),
        ]:
            weight_format = BY_NAME[name]
            bench.put(count, np.array([n_tokens], np.int32))
            launch = tiles.linear(
                Rows(x, kernels.activation_bytes(weight_format.activation, n_cols)),
                n_cols,
                weight_format,
                [Matrix(weights, n_rows, Rows(out, n_rows))],
                _grid(bench, weight_format, grid),
                Count(count, n_tokens),
            )
            s = bench.replay_s([launch] * 4) / 4
            rate = 2 * n_rows * n_cols * n_tokens / s / 1e12
            bench.note("products", f"{name} {n_rows} x {n_cols}, {n_tokens} tokens", rate, f"TOPS; {s * 1e6:.1f} us")


def grouped_experts(bench: Bench) -> None:
    """The experts of a layer of the 122B for the tokens of a prompt, all in slots, chosen evenly."""
    n_experts, n_used, hidden, ffn = 256, 8, 3072, 1024
    formats = [BY_NAME[name] for name in ("Q4_K", "Q4_K", "Q6_K")]
    shapes = ((ffn, hidden), (ffn, hidden), (hidden, ffn))
    stacks = [-(-f.row_bytes(cols) * rows // 256) * 256 for f, (rows, cols) in zip(formats, shapes, strict=True)]
    x_bytes, h_bytes = (
        kernels.activation_bytes(Activation.Q8_256, hidden),
        kernels.activation_bytes(Activation.Q8_256, ffn),
    )
    for n_tokens in (64, 512, 3000):
        sizes, n_choices = tiles.Sizes(n_experts, n_used, hidden, ffn, 8), n_tokens * n_used
        parts = tiles.groups_bytes(sizes, n_tokens)
        with bench.memory(
            *(n_experts * size for size in stacks),
            *parts,
            n_tokens * x_bytes,
            4 * n_choices * ffn,
            n_choices * h_bytes,
            4 * n_choices * hidden,
            4 * n_choices,
            4 * n_experts,
            4,
        ) as (g, u, d, *groups_at, x, h, h_form, out, ids, places, count_at):
            rng, count, groups = np.random.default_rng(0), Count(count_at, n_tokens), tiles.Groups(*groups_at)
            bench.put(ids, np.stack([rng.permutation(n_experts)[:n_used] for _ in range(n_tokens)]).astype(np.int32))
            bench.put(places, np.arange(n_experts, dtype=np.int32))
            bench.put(count_at, np.array([n_tokens], np.int32))
            gate, up, down = (ExpertMatrix(a, n, f) for a, n, f in zip((g, u, d), stacks, formats, strict=True))
            group, most, rows = ctypes.c_int32(0), tiles.n_tiles(sizes, n_tokens), Rows(x, x_bytes)
            first = tiles.expert_gate_up(
                groups, group, sizes, gate, up, rows, rows, h, (0, 0), ExpertActivation.SILU, 0.0, 0.0, most
            )
            h_rows, out_rows = Rows(h_form, h_bytes), Rows(out, n_used * hidden)
            steps = {
                "sorting": tiles.group_choices(ids, places, sizes, groups, count),
                "gate and up": [first],
                "quantize": [kernels.quantize(Rows(h, ffn), ffn, Activation.Q8_256, h_rows, n_used, count)],
                "down": [tiles.expert_down(groups, group, sizes, down, h_rows, out_rows, 0, most)],
            }
            ops = {"gate and up": 4 * n_choices * ffn * hidden, "down": 2 * n_choices * ffn * hidden}
            for name, launches in steps.items():
                s = bench.replay_s(launches)
                rate = f"; {ops[name] / s / 1e12:.4g} TOPS" if name in ops else ""
                bench.note("grouped", f"{n_tokens} tokens: {name}", s * 1e6, f"us{rate}")


def experts(bench: Bench) -> None:
    """The hits of one token as in the 122B: gate and up 1024 x 3072, down 3072 x 1024."""
    hidden, ffn, n_used = 3072, 1024, 8
    for formats in (("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q4_K"), ("MXFP4", "MXFP4", "MXFP4")):
        gate, up, down = (BY_NAME[name] for name in formats)
        shapes = ((gate, ffn, hidden), (up, ffn, hidden), (down, hidden, ffn))
        sizes = [-(-f.row_bytes(cols) * rows // 256) * 256 for f, rows, cols in shapes]
        n_slots = POOL_BYTES // sum(sizes)
        with bench.memory(
            *(size * n_slots for size in sizes),
            1 << 20,
            1 << 20,
            1 << 20,
            4 * n_slots,
            n_slots * 4,
            4,
        ) as (g, u, d, x, h, out, ids, slots, count):
            bench.put(slots, np.arange(n_slots, dtype=np.int32))
            bench.put(ids, np.arange(n_slots, dtype=np.int32))
            bench.put(count, np.array([1], np.int32))
            x_rows = Rows(x, kernels.activation_bytes(gate.activation, hidden))
            own = [ExpertMatrix(a, size, f) for a, size, (f, _, _) in zip((g, u, d), sizes, shapes, strict=True)]
            for n_hits in (8, 4, 2):
                firsts, seconds_ = [], []
                for i in range(min(64, n_slots // n_hits)):
                    at, one = ids + 4 * i * n_hits, Count(count, 1)
                    firsts.append(
                        kernels.expert_gate_up(
                            at,
                            slots,
                            n_hits,
                            own[0],
                            own[1],
                            x_rows,
                            x_rows,
                            hidden,
                            ffn,
                            h,
                            (0, 0),
                            ExpertActivation.SILU,
                            0.0,
                            0.0,
                            one,
                        )
                    )
                    seconds_.append(
                        kernels.expert_down(
                            at,
                            slots,
                            n_hits,
                            own[2],
                            h,
                            hidden,
                            ffn,
                            Rows(out, hidden * n_used),
                            0,
                            one,
                            all_resident=True,
                        )
                    )
                n, name = len(firsts), "/".join(formats)
                bench.share(
                    "experts",
                    f"{name}, {n_hits} hits: gate and up",
                    n_hits * sum(sizes[:2]),
                    bench.replay_s(firsts) / n,
                )
                bench.share("experts", f"{name}, {n_hits} hits: down", n_hits * sizes[2], bench.replay_s(seconds_) / n)
                together = [launch for two in zip(firsts, seconds_, strict=True) for launch in two]
                bench.share("experts", f"{name}, {n_hits} hits: all", n_hits * sum(sizes), bench.replay_s(together) / n)


def _attention_inputs(cache: Cache, x: int, out: int, weights: int, place: Place, count: Count) -> Launch:
    """What a layer of the 122B does before it attends: 32 heads beside their gates, on 2 key heads of 256."""
    q = Heads(Rows(x, 16384), 32, 512, normalize=True, weight=weights, rotate=True)
    k = Heads(Rows(x, 16384), 2, 256, normalize=True, weight=weights, rotate=True)
    v = Heads(Rows(x, 16384), 2, 256)
    return attention_inputs(q, Rows(out, 8192), k, v, 1e-6, Rotation(weights, 64), cache, place, count)


def attention(bench: Bench) -> None:
    """One token of the 122B at several positions, with all there is between two products."""
    for kv_type in (KVType.F16, KVType.Q8_0):
        for n_positions in (16, 1024, 8192, 65536, 131072):
            cache = Cache(0, kv_type, 1, n_positions, 2, 256, 256)
            n = max(1, min(8, POOL_BYTES // cache.n_bytes))
            stride, scratch = -(-cache.n_bytes // 256) * 256, attention_scratch_bytes(cache, 32, 1)
            row_bytes = kernels.activation_bytes(Activation.Q8_256, 8192)
            with bench.memory(n * stride, 1 << 20, 1 << 20, 1 << 20, row_bytes, *scratch, 256) as (
                memory,
                x,
                q,
                out,
                form,
                values,
                parts,
                words,
            ):
                bench.put(words, np.array([1, n_positions - 1, 0], np.int32))
                place, count = Place(words + 4, words + 8), Count(words, 1)
                gate, forms = GateOf(Gating.SIGMOID, Rows(x + 1024, 16384), 256, 512), Forms(Rows(form, row_bytes))
                inputs, attends = [], []
                for i in range(n):
                    own = cache._replace(address=memory + i * stride)
                    inputs.append(_attention_inputs(own, x, q, out, place, count))
                    what = (own, 32, 0.0625, Sight(), (values, parts), place, count, gate, forms)
                    attends.append(attention_over(Rows(q, 8192), Rows(out, 8192), *what))
                name = f"{kv_type.name}, {n_positions} positions"
                all_launches = [launch for i in range(n) for launch in (inputs[i], *attends[i])]
                bench.share("attention", f"{name}: all", cache.n_bytes, bench.replay_s(all_launches) / n)
                merges = [two[1] for two in attends]
                bench.note("attention", f"{name}: inputs", bench.replay_s(inputs) / n * 1e6, "us")
                bench.note("attention", f"{name}: merging", bench.replay_s(merges) / n * 1e6, "us")


def prompt_attention(bench: Bench) -> None:
    """All tokens of a prompt of the 122B (32 heads on 2 key heads of 256); its operations that go token by token."""
    n = 3000
    for kv_type in (KVType.F16, KVType.Q8_0):
        cache = Cache(0, kv_type, 1, 4096, 2, 256, 256)
        sizes = (cache.n_bytes, n * 16384 * 4, n * 8192 * 4, n * 8192 * 4, 1 << 16, 4 * n, 4 * n, 4)
        with bench.memory(*sizes) as (memory, x, q, out, weights, positions, slots, counter):
            bench.put(positions, np.arange(n, dtype=np.int32))
            bench.put(counter, np.array([n], np.int32))
            own, place, count = cache._replace(address=memory), Place(positions, slots), Count(counter, n)
            inputs = _attention_inputs(own, x, q, weights, place, count)
            attends = attention_over(Rows(q, 8192), Rows(out, 8192), own, 32, 0.0625, Sight(), (0, 0), place, count)
            bench.note("prompt", f"inputs of {n} tokens, {kv_type.name}", bench.replay_s([inputs]) * 1e3, "ms")
            bench.note("prompt", f"attention of {n} tokens, {kv_type.name}", bench.replay_s(attends) * 1e3, "ms")
    with bench.memory(
        n * 12288 * 4, n * 8192 * 4, n * 64 * 4, 64 * 128 * 128 * 4, 1 << 20, 4 * n, 4 * n, 4, n * 12288 * 4
    ) as (
        qkv,
        out,
        beta,
        state,
        vectors,
        positions,
        slots,
        counter,
        convolved,
    ):
        bench.put(positions, np.arange(n, dtype=np.int32))
        bench.put(counter, np.array([n], np.int32))
        rows, places = Rows(beta, 64), (positions, slots, Count(counter, n))
        net = recurrent.delta_net(
            qkv,
            qkv + 4 * 2048,
            qkv + 4 * 4096,
            12288,
            rows,
            rows,
            vectors,
            vectors,
            0,
            state,
            Rows(out, 8192),
            16,
            64,
            128,
            128,
            1,
            0.0,
            False,
            1e-6,
            *places,
        )
        conv = recurrent.causal_conv(
            Rows(qkv, 12288), vectors, 0, state, Rows(convolved, 12288), 12288, 4, True, *places
        )
        bench.note("prompt", f"delta net of {n} tokens, 64 heads of 128 x 128", bench.replay_s([net]) * 1e3, "ms")
        bench.note("prompt", f"convolution of {n} tokens, 12288 channels", bench.replay_s(conv) * 1e3, "ms")


def small(bench: Bench) -> None:
    """What the small kernels of a layer cost inside a graph."""
    with bench.memory(1 << 20, 1 << 20, 1 << 20, 256, 4 << 20) as (x, y, z, words, state):
        bench.put(words, np.array([1, 5, 0], np.int32))
        one = Count(words, 1)
        routing = Routing(Rows(z, 256), 0, z + 4096, y, 256, 8, Scoring.SOFTMAX, 1, 1, True, 1.0)
        logits = (Rows(x, 3072 * 4), 3072, BY_NAME["F32"], [Matrix(state, 256, Rows(z, 256))], 0, one)
        made = {
            "add of 16 values": elementwise.add(Rows(x, 16), Rows(y, 16), Rows(z, 16), 16, one),
            "sum, norm and quantisation of 3072": kernels.residual(
                Rows(x, 3072),
                Rows(y, 3072),
                Rows(x, 3072),
                3072,
                one,
                y,
                1e-6,
                Rows(z, 3072),
                Forms(Rows(state, 4096)),
            ),
            "rms_norm of 32 x 256": elementwise.rms_norm(Rows(x, 8192), y, Rows(z, 8192), 32, 256, 1e-6, one),
            "quantize 3072": kernels.quantize(Rows(x, 3072), 3072, Activation.Q8_256, Rows(z, 4096), 1, one),
            "router of 256": kernels.router(routing, one),
            "router logits F32 256 x 3072": kernels.linear(*logits),
            "the same, and the choice": kernels.linear(*logits, routed=Routed(routing, words + 32)),
            "combination, norm and quantisation of 8 x 3072": kernels.residual(
                Rows(x, 3072),
                Combined(Rows(y, 8 * 3072), None, z, z, y, 8),
                Rows(x, 3072),
                3072,
                one,
                y,
                1e-6,
                Rows(z + 65536, 3072),
                Forms(Rows(state, 4096)),
            ),
            "norm, gate and quantisation of 64 x 128": kernels.gate(
                Rows(x, 8192),
                GateOf(Gating.SILU, Rows(y, 8192), 8192, 8192),
                Rows(x, 8192),
                8192,
                one,
                Forms(Rows(state, 16384)),
                128,
                y,
            ),
        }
        for name, launch in made.items():
            bench.note("small", name, bench.replay_s([launch] * 200) / 200 * 1e6, "us")
    with bench.memory(1 << 20, 64 << 20, 1 << 20, 256, 1 << 20, 1024) as (x, state, out, words, vectors, counters):
        bench.put(words, np.array([1, 5, 0], np.int32))
        net = recurrent.DeltaNet(
            16, 64, 128, 128, 1, 0.0, 4, False, 1e-6, 1e-6, Gating.SILU,
            vectors, vectors, vectors, vectors, state + (32 << 20), state,
        )  # fmt: skip
        forms, places = Forms(Rows(out + 65536, 16384)), (words + 4, words + 8)
        launch = recurrent.delta_net_step(x, x, x, x, net, out, out + 32768, counters, *places, forms)
        n_bytes = 2 * 64 * 128 * 128 * 4
        s = bench.replay_s([launch] * 100) / 100
        bench.share("small", "delta net, 64 heads of 128 x 128, with all around it", n_bytes, s)


def draws(bench: Bench) -> None:
    """What the choice of tokens takes on the GPU, and on the CPU with the logits fetched before."""
    most, rng = 8, np.random.default_rng(0)
    settings = {"greedy": (1, 1.0, 0.0), "top-k 40, top-p 0.95": (40, 0.95, 0.05), "top-p 0.95 alone": (0, 0.95, 0.0)}
    for n_vocab in (151_936, 248_320):
        rows = rng.standard_normal((most, n_vocab)).astype(np.float32) * 4
        sizes = rows.nbytes, n_vocab // 8, most * DRAW.itemsize, most * 4096, most * 8, most * 4, most * 4, 256
        with bench.memory(*sizes) as (logits, allowed, how, maxima, sums, n_done, chosen, words):
            bench.put(logits, rows)
            bench.put(allowed, np.full(n_vocab // 8, 0xFF, np.uint8))
            pinned = PinnedMemory(rows.nbytes)
            for n_rows in (1, most):
                fetch = partial(bench.stream.download, pinned.address, logits, 4 * n_rows * n_vocab)
                bench.note("draws", f"{n_rows} x {n_vocab}: fetching the logits", bench.seconds(fetch) * 1e6, "us")
                for name, (top_k, top_p, min_p) in settings.items():
                    bench.put(how, np.array([(0.3, top_p, min_p, 1 / 0.7, top_k)] * most, DRAW))
                    bench.put(words, np.array([n_rows], np.int32))
                    places, count = (allowed, how, maxima, sums, n_done, chosen), Count(words, n_rows)
                    launches = drawing.launches(Rows(logits, n_vocab), n_vocab, *places, count)
                    s = bench.replay_s(launches * 20) / 20
                    start, nothing = time.perf_counter(), np.zeros(0, np.int32)
                    for _ in range(20):
                        for row in rows[:n_rows]:
                            if top_k == 1:
                                _kernels.argmax(row)
                            else:
                                _kernels.sample(row, nothing, 0.7, top_k, top_p, min_p, 1.0, 0.0, 0.0, 0.3)
                    on_cpu = (time.perf_counter() - start) / 20 * 1e6
                    bench.note("draws", f"{n_rows} x {n_vocab}: {name}", s * 1e6, f"us; on the CPU {on_cpu:.0f}")
            pinned.close()


def handshake(bench: Bench) -> None:
    """48 requests in one graph, answered by a team of threads that has next to nothing to do for each."""
    n_layers, hidden = 48, 256
    row_bytes = kernels.activation_bytes(Activation.Q8_256, hidden)
    flags = PinnedMemory(8192 + 8 * 4 * hidden)
    try:
        with bench.memory(4096, 1 << 16, 4096) as (words, x, slots):
            bench.put(words, np.array([1, 0, 0], np.int32))
            bench.put(slots, np.full(16, -1, np.int32))
            at = flags.device_address
            sent = {Activation.Q8_256: at + 4096}
            exchange = Exchange(at + 192, sent, at + 8192, at, at + 64, at + 128, words + 4, words + 8, n_layers)
            launches: list[Launch] = []
            for layer in range(n_layers):
                ids, own = words + 256, exchange._replace(layer=layer)
                asked = Asked(slots, {Activation.Q8_256: Rows(x, row_bytes)}, hidden, own)
                launches.append(kernels.publish_misses(ids, 8, asked, Count(words, 1)))
                combined = Combined(Rows(x, 8 * hidden), own, ids, slots, 0, 8)
                launches.append(
                    kernels.residual(Rows(x, hidden), combined, Rows(x + 8192, hidden), hidden, Count(words, 1))
                )
            launches.append(kernels.publish_end(exchange))
            bench.context.prepare(launches)
            for launch in launches:
                bench.context.function(launch)
            graph = bench.stream.capture(lambda: bench.launch(launches))
            for n_threads in sorted({1, 4, bench.n_threads - 1, bench.n_threads}):
                programs = []
                for _ in range(n_layers):
                    program = _kernels.Program(1, 1, n_threads)
                    program.add(flags.address + 4096, 16, flags.address + 4096, 16, flags.address + 8192, 16, 16, 0)
                    programs.append(program)
                server = _kernels.RequestServer(programs, flags.address, flags.address + 64, flags.address + 128)
                step = _kernels.Step(1)
                step.n_tokens = 1
                best = float("inf")
                for i in range(20):
                    bench.put(words, np.array([1, i, 0], np.int32))
                    last = int(flags.bytes[:4].view(np.uint32)[0])
                    start = time.perf_counter()
                    graph.launch(bench.stream)
                    server.run(step, i * (n_layers + 1) + 1, last, 5.0)
                    bench.stream.synchronize()
                    best = min(best, time.perf_counter() - start)
                bench.note("handshake", f"a layer, {n_threads} threads", best / n_layers * 1e6, "us")
                flags.bytes[:4].view(np.uint32)[0] = 0
                flags.bytes[64:68].view(np.uint32)[0] = 0
            graph.close()
    finally:
        flags.close()


def model(bench: Bench) -> None:
    """Decode and prompt of some layers of a big model, placed in several ways; all must give the same bits."""
    limits = Limits(512, 1, 2048, KVType.F16)
    with opened(bench) as (loaded, weights):
        tokens = np.random.default_rng(0).integers(0, loaded.spec.n_vocab, 1024).tolist()
        cpu = CPUDevice(bench.n_threads).compile(loaded.graph, weights, limits)
        on_cpu = ForwardPass(cpu, limits, loaded.spec.n_vocab)
        _time_model(bench, "CPU alone", on_cpu, tokens, min(128, bench.n_prompt))
        reference = on_cpu.run(0, tokens[:6], 0, "all").copy()
        cpu.close()
        n_experts, expected = loaded.spec.moe.n_experts, None
        half = loaded.spec.n_layers // 2
        ways = [
            *(
                (f"hot cache, {k} of {n_experts} experts", Wish(k), bench.n_threads)
                for k in (n_experts, 0, 44, 160, 200)
            ),
            (f"hot cache, 0 of {n_experts} experts, a thread less", Wish(0), max(1, bench.n_threads - 1)),
            (f"layers, {half} of {loaded.spec.n_layers} on the CPU", Wish(n_cpu_moe=half), bench.n_threads),
        ]
        for name, wish, threads in ways:
            start = time.perf_counter()
            try:
                with compiled(bench, loaded, weights, limits, wish, n_threads=threads) as program:
                    bench.note("model", f"{name}: seconds to open", time.perf_counter() - start)
                    _fill(bench, name, program)
                    forward = ForwardPass(program, limits, loaded.spec.n_vocab)
                    logits = forward.run(0, tokens[:6], 0, "all").copy()
                    single = np.concatenate(
                        [forward.run(0, [token], i, "last").copy() for i, token in enumerate(tokens[:6])]
                    )
                    expected = logits if expected is None else expected
                    bench.note(
                        "model", f"{name}: same bits", bool((logits.view(np.uint32) == expected.view(np.uint32)).all())
                    )
                    bench.note(
                        "model",
                        f"{name}: same bits one by one",
                        bool((single.view(np.uint32) == expected.view(np.uint32)).all()),
                    )
                    bench.note(
                        "model", f"{name}: furthest from the CPU's logits", float(np.abs(logits - reference).max())
                    )
                    _time_model(bench, name, forward, tokens, bench.n_prompt)
                    bench.note("model", f"{name}: VRAM", program.device_bytes / 1e9, "GB")
            except Exception:  # one placement that fails must not cost the figures of the others
                print(traceback.format_exc(), flush=True)
                bench.results.setdefault("errors", []).append(traceback.format_exc())


def prompt(bench: Bench) -> None:
    """Prompts of a big model whose experts are streamed; all placements must give the same bits."""
    limits = Limits(512, 1, 8192, KVType.Q8_0)
    pinned, device_memory = PinnedMemory(256 << 20), DeviceMemory(256 << 20)
    s = bench.seconds(lambda: bench.stream.upload(device_memory.address, pinned.address, 256 << 20))
    pcie, expected = (256 << 20) / s / 1e9, None
    bench.note("prompt", "PCIe", pcie, "GB/s")
    pinned.close()
    device_memory.close()
    with opened(bench) as (loaded, weights):
        n_experts = loaded.spec.moe.n_experts
        tokens = np.random.default_rng(0).integers(0, loaded.spec.n_vocab, bench.longest).tolist()
        long, few = bench.lengths(64, 512, 3000), bench.lengths(16, 32, 64, 128, 256)
        for hot_k, bypass, lengths in (
            (n_experts, 32, long),
            (n_experts * 2 // 5, 32, long),
            (0, 32, long),
            (n_experts * 2 // 5, 10000, few),  # the CPU computes what has no slot
        ):
            name = f"{hot_k} of {n_experts} experts in slots, {'streams' if bypass == 32 else 'the CPU helps'}"
            start = time.perf_counter()
            with compiled(bench, loaded, weights, limits, Wish(hot_k), stream_n_tokens=bypass) as program:
                bench.note("prompt", f"{name}: seconds to open", time.perf_counter() - start)
                bench.note("prompt", f"{name}: tokens in a step", program.limits.max_tokens)
                _fill(bench, name, program)
                moved = sum(
                    int(n_bytes) * (n_experts - int(n_slots))
                    for n_bytes, n_slots in zip(program.expert_bytes, program.n_slots, strict=True)
                )
                forward = ForwardPass(program, program.limits, loaded.spec.n_vocab)
                for n in lengths:
                    logits = forward.run(0, tokens[:n], 0).copy()
                    times = []
                    for _ in range(3):
                        start = time.perf_counter()
                        forward.run(0, tokens[:n], 0)
                        times.append(time.perf_counter() - start)
                    s = min(times)
                    rate = moved / s / 1e9
                    shown = f"tok/s; {s * 1e3:.1f} ms; {rate:.1f} GB/s, {rate / pcie:.0%} of PCIe"
                    bench.note("prompt", f"{name}: prompt of {n}", n / s, shown)
                if bypass == 32:
                    expected = logits if expected is None else expected
                    same = bool((logits.view(np.uint32) == expected.view(np.uint32)).all())
                    bench.note("prompt", f"{name}: same bits", same)


def _fill(bench: Bench, name: str, program: Any) -> None:
    """Put random experts into all slots that no step borrows memory from, as a swapper would."""
    rng, start, n_bytes = np.random.default_rng(1), time.perf_counter(), 0
    tickets = []
    left = program.usable_slots(program.limits.max_tokens, program.limits.context_length)
    for layer, slots in enumerate(map(np.flatnonzero, left)):
        if len(slots) < program.n_experts:
            for slot, expert in zip(slots.tolist(), rng.permutation(program.n_experts).tolist(), strict=False):
                tickets.append((program.copy_expert(layer, expert, slot), layer, expert, slot))
                n_bytes += int(program.expert_bytes[layer])
    program.wait_all()
    for ticket, *place in tickets:
        assert program.is_done(ticket)
        program.publish(*place)
    if n_bytes:
        bench.note("model", f"{name}: filling the slots", n_bytes / (time.perf_counter() - start) / 1e9, "GB/s")


def _time_model(bench: Bench, name: str, forward: ForwardPass, tokens: list[int], prompt: int) -> None:
    forward.run(0, tokens[:prompt], 0)
    start = time.perf_counter()
    forward.run(0, tokens[:prompt], 0)
    bench.note("model", f"{name}: prompt of {prompt}", prompt / (time.perf_counter() - start), "tok/s")
    times = []
    for i in range(min(48, bench.n_tokens)):
        start = time.perf_counter()
        forward.run(0, tokens[prompt + i : prompt + i + 1], prompt + i)
        times.append(time.perf_counter() - start)
    late = times[min(8, len(times) - 1) :]
    shown = f"ms a token (best {min(times) * 1e3:.3f})"
    bench.note("model", f"{name}: decode", float(np.median(late) * 1e3), shown)


def swaps(bench: Bench) -> None:
    """What a token takes beside copies into slots that it does not read: so many experts a token."""
    limits = Limits(32, 1, 2048, KVType.F16)
    with ExitStack() as opened_now:
        loaded, weights = opened_now.enter_context(opened(bench))
        wish = Wish(loaded.spec.moe.n_experts * 21 // 32)
        program = opened_now.enter_context(compiled(bench, loaded, weights, limits, wish))
        _fill(bench, "21 of 32 experts in slots", program)
        forward = ForwardPass(program, limits, loaded.spec.n_vocab)
        n_layers, token = len(program.n_slots), 0
        for layer in range(n_layers):  # the first slot is what copies go to
            program.publish(layer, int(program._expert_in[layer, 0]), -1)
        for n_copies in (0, 2, 4, 6, 8, 0):
            times, before = [], program.layer_times
            for i in range(bench.n_tokens):
                copies = [program.copy_expert(j % n_layers, (i + j) % program.n_experts, 0) for j in range(n_copies)]
                start = time.perf_counter()
                forward.run(0, [token % loaded.spec.n_vocab], token)
                times.append(time.perf_counter() - start)
                token += 1
                late = sum(not program.is_done(copy) for copy in copies)
            spent = program.layer_times - before
            first, *others = (spent.device / spent.n_tokens * 1e6).tolist()
            program.wait_all()
            bench.note(
                "swaps",
                f"{n_copies} experts copied beside each token of {n_layers} layers",
                float(np.median(times)) * 1e3,
                f"ms; {spent.cpu.sum() / spent.n_tokens * 1e6:.0f} us the CPU's; {first:.0f} us until its first "
                f"request, {np.mean(others):.0f} until others; {late} of the last token's copies not over at its end",
            )


def guesses(bench: Bench) -> None:
    """Tokens with four fifths of the experts in slots, without guesses of what is missing and with them, by turns.

    Once by themselves, and once beside copies into slots that they do not read, as many as a cache makes.
    """
    limits, position, n_tokens = Limits(64, 1, 2048, KVType.F16), 64, bench.n_tokens
    with ExitStack() as opened_now:
        ways: dict[str, tuple[CUDAProgram, ForwardPass]] = {}
        for name in ("without", "with"):
            loaded, weights = opened_now.enter_context(opened(bench))
            wish = Wish(loaded.spec.moe.n_experts * 4 // 5)
            program = opened_now.enter_context(compiled(bench, loaded, weights, limits, wish, guesses=name == "with"))
            _fill(bench, f"{name} guesses", program)
            ways[name] = program, ForwardPass(program, limits, loaded.spec.n_vocab)
        n_layers, n_experts = len(program.n_slots), program.n_experts
        tokens = np.random.default_rng(0).integers(0, loaded.spec.n_vocab, position + 2 * n_tokens).tolist()
        for program, forward in ways.values():
            forward.run(0, tokens[:position], 0)
            for layer in range(n_layers):  # the first slot is what copies go to
                program.publish(layer, int(program._expert_in[layer, 0]), -1)
        for n_copies in (0, 20 * n_layers // 48):
            before = {name: program.layer_times for name, (program, _) in ways.items()}
            times: dict[str, list[float]] = {name: [] for name in ways}
            for i in range(n_tokens):
                for name, (program, forward) in ways.items():
                    for j in range(n_copies):
                        program.copy_expert(j % n_layers, (i + j) % n_experts, 0)
                    start = time.perf_counter()
                    forward.run(0, tokens[position : position + 1], position)
                    times[name].append(time.perf_counter() - start)
                    program.wait_all()
                position += 1
            for name, (program, _) in ways.items():
                spent = program.layer_times - before[name]
                device, cpu = (float(s.sum()) * 1e6 / n_tokens / n_layers for s in (spent.device, spent.cpu))
                shown = f"ms; of a layer {device:.1f} us until the CPU is asked, {cpu:.1f} until it has answered"
                n_asked, n_guessed = spent.guesses
                if n_asked:
                    shown += f"; {n_guessed / n_asked:.0%} of {n_asked / n_tokens / n_layers:.2f} experts guessed"
                what = f"a token {name} guesses, {n_copies} copied beside it"
                bench.note("guesses", what, float(np.median(times[name])) * 1e3, shown)


def operations(bench: Bench) -> None:
    """Where the GPU's time of a token goes."""
    _time_operations(bench, "operations", 1, Limits(32, 1, 2048, KVType.F16))


def prompt_operations(bench: Bench) -> None:
    """Where the GPU's time of a prompt goes."""
    _time_operations(bench, "prompt_operations", bench.longest, Limits(512, 1, 4096, KVType.F16))


def _time_operations(bench: Bench, section: str, n_tokens: int, limits: Limits) -> None:
    """Time each launch of a recorded step alone, all experts resident."""
    with opened(bench) as (loaded, weights), compiled(bench, loaded, weights, limits, Wish(None)) as program:
        before = np.arange(9, dtype=np.int32)
        program.run(before, before, 0 * before, before[:0])
        ids = np.random.default_rng(0).integers(0, loaded.spec.n_vocab, n_tokens).astype(np.int32)
        positions = np.arange(n_tokens, dtype=np.int32) + (9 if n_tokens == 1 else 0)
        program.run(ids, positions, 0 * ids, 0 * before[:1])
        launches = program._lowering.launches(program._memory.address, n_tokens, None)
        bench.context.prepare(launches)
        totals: dict[str, list[float]] = {}
        for launch in launches:
            key = f"{launch.kernel} {' '.join(launch.definitions)} grid {launch.grid}"
            if key not in totals:
                n = 20 if n_tokens == 1 else 1
                totals[key] = [0, bench.replay_s([launch] * n, 2) / n * 1e6]
            totals[key][0] += 1
        for key, (times, us) in sorted(totals.items(), key=lambda item: -item[1][0] * item[1][1])[:24]:
            bench.note(section, key, times * us, f"us in {times:.0f} launches (weights warm in L2)")
        bench.note(section, "launches of a step", len(launches))
        if n_tokens == 1:
            bench.note(section, "a step", bench.replay_s(launches, 9) * 1e6, "us")
            nothing = [empty_launch(launch) for launch in launches]
            bench.note(section, "as many launches that do nothing", bench.replay_s(nothing, 9) * 1e6, "us")


SECTIONS = {
    f.__name__: f
    for f in (
        facts,
        copies,
        small,
        reads,
        linear,
        products,
        experts,
        grouped_experts,
        attention,
        prompt_attention,
        draws,
        handshake,
        prompt,
        model,
        swaps,
        guesses,
        operations,
        prompt_operations,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections that were asked for; exit with a message if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for gpu.json")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=machine.n_physical_cores())
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt, 1 to 512")
    parser.add_argument("--longest", type=int, default=3000, help="tokens of the longest prompt, up to 4096")
    parser.add_argument("--tokens", type=int, default=160, help="tokens of an answer that a figure is taken of")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    args, sections = parser.parse_args(arguments), []
    for name in args.sections.split(","):
        if name not in SECTIONS:
            parser.error(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
        sections.append(name)
    for name in ("threads", "prompt", "longest", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected 1 or more")
    try:
        bench = Bench(args.threads, args.model, args.prompt, args.longest, args.tokens)
    except EngineError as error:
        sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in sections:
        start = time.perf_counter()
        try:
            bench.context.make_current()
            SECTIONS[name](bench)
        except Exception:  # GPUs are rented by the minute: whatever a section does, the others are run
            print(traceback.format_exc(), flush=True)
            bench.results.setdefault("errors", []).append(traceback.format_exc())
        bench.note("seconds", name, time.perf_counter() - start)
        (args.out / "gpu.json").write_text(json.dumps(bench.results, indent=1))
    if "errors" in bench.results:
        sys.exit(f"{len(bench.results['errors'])} parts failed; see above")


if __name__ == "__main__":
    main()
