"""Opens a GPU as a device, and plans what of a model goes where in its memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np

from engine import _kernels
from engine.devices.cuda import tiles
from engine.devices.cuda.driver import probe
from engine.devices.cuda.expert_layers import Staging
from engine.devices.cuda.host_memory import pinned_tables
from engine.devices.cuda.jit import Compiler, Progress
from engine.devices.cuda.lowering import Lowering
from engine.devices.cuda.places import reserved_bytes
from engine.devices.cuda.program import CUDAProgram
from engine.devices.cuda.runtime import Context, Stream
from engine.devices.cuda.speeds import measure_speeds
from engine.devices.footprint import measure, step_sizes
from engine.devices.graph import Graph as ForwardGraph
from engine.devices.placement import STAGED_EXPERTS, MemoryPlan, Wish, longest_step, plan_memory
from engine.devices.program import Limits, WeightAccess
from engine.devices.timing import CPU_MACS, Bandwidths
from engine.quants import install_grids
from engine.resources import Resources

_log = logging.getLogger("engine")
MARGIN_BYTES = 256 << 20  # left to the driver, the display and fragmentation
_STAGING_SHARE = 1 / 8  # of the memory left for experts: the ring that experts pass through
_MOST_BUFFERS = 32  # of the ring


class CUDADevice:
    """All operations on one GPU, but for experts that have no slot there: those the CPU computes at the same time."""

    def __init__(
        self,
        index: int = 0,
        *,
        wish: Wish | None = None,
        vram_budget: int | None = None,
        n_threads: int = 1,
        isa: str | None = None,
        bandwidths: Bandwidths | None = None,
        prompt_tokens: int = 4096,
        stream_n_tokens: int | None = None,
        guesses: bool = True,
        compiler: Compiler | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Open GPU `index`; raise `DeviceError` if there is none that can be used.

        Args:
            index: which GPU.
            wish: what to do with its memory; by default as many expert slots as fit.
            vram_budget: bytes of device memory to use at most; None for what is free.
            n_threads: CPU threads for the experts without a slot.
            isa: instruction-set level that they may use; None for the best.
            bandwidths: of the machine; None to measure them.
            prompt_tokens: of a prompt that are run together, if memory allows and more than `Limits.max_tokens`.
            stream_n_tokens: steps of this many tokens or more bring the experts that have no slot to the GPU; in
                smaller ones the CPU computes them. None for where that pays.
            guesses: whether the CPU fetches what the next layer will likely ask it for while it waits.
            compiler: makes the kernels; None for NVIDIA's.
            progress: called while kernels are compiled.
        """
        self.gpu = probe(index)
        self.wish = wish or Wish()
        self.vram_budget = vram_budget
        self.n_threads = n_threads
        self.isa = isa
        self.bandwidths = bandwidths
        self.prompt_tokens = prompt_tokens
        self.stream_n_tokens = stream_n_tokens
        self.guesses = guesses
        self.progress = progress
        install_grids()
        self.context = Context(self.gpu, compiler)

    @property
    def description(self) -> str:
        """Return one line for people."""
        return f"CUDA: {self.gpu.description}; {self.n_threads} CPU thread{'s' * (self.n_threads != 1)}"

    @property
    def usable_bytes(self) -> int:
        """Return the bytes of device memory that a program may take now."""
        self.context.make_current()
        free = self.context.free_bytes() - MARGIN_BYTES
        return free if self.vram_budget is None else min(free, self.vram_budget)

    def compile(self, graph: ForwardGraph, weights: WeightAccess, limits: Limits) -> CUDAProgram:
        """Make a program of a recorded forward pass. The weights must outlive it."""
        self.context.make_current()
        speeds = self.bandwidths or self._measure_speeds()
        with Resources() as held:
            tables = held.own(pinned_tables(graph, weights))
            lowering, plan = self._fit(graph, weights, limits, speeds, tables.addresses)
            program = CUDAProgram(
                self.context,
                lowering,
                plan.usable,
                weights,
                tables,
                speeds,
                n_threads=self.n_threads,
                isa=self.isa,
                progress=self.progress,
            )
            held.pop_all()  # the tables are the program's now
        return program

    def close(self) -> None:
        """Give the GPU back; programs must be closed before."""
        self.context.close()

    def _measure_speeds(self) -> Bandwidths:
        with closing(Stream(self.context)) as stream:
            return measure_speeds(stream, self.n_threads)

    def _where_streaming_pays(self, graph: ForwardGraph, limits: Limits, speeds: Bandwidths) -> int:
        """Return from how many tokens on; at most what was asked for in a step, as only streaming allows more."""
        cpu_macs = self.n_threads * CPU_MACS[self.isa or _kernels.isa_levels()[-1]]
        return min(measure(graph, limits).streaming_pays_from(speeds, cpu_macs), limits.max_tokens)

    def _fit(
        self,
        graph: ForwardGraph,
        weights: WeightAccess,
        limits: Limits,
        speeds: Bandwidths,
        tables: Mapping[str, int],
    ) -> tuple[Lowering, MemoryPlan]:
        """Plan the memory, with as many expert slots as asked for or as fit."""
        allowed = self.usable_bytes
        bare = self._bare(graph, weights, limits, tables)
        threshold = self.stream_n_tokens or self._where_streaming_pays(graph, limits, speeds)
        threshold = max(threshold, tiles.MIN_TOKENS, limits.n_slots + 1)  # a step of all sequences streams nothing
        limits = self._larger_steps(bare, allowed - bare.layout.n_bytes, threshold)
        bare = self._bare(graph, weights, limits, tables)
        staging = self._staging(bare, int((allowed - bare.layout.n_bytes) * _STAGING_SHARE), threshold)
        scratch_bytes = reserved_bytes(bare.scratch_bytes)
        footprint = replace(
            measure(graph, limits),
            dense_bytes=bare.layout.n_bytes - bare.state[1] - scratch_bytes,
            state_bytes=bare.state[1],
            scratch=((limits.max_tokens, scratch_bytes),),
            expert_bytes=np.array([layer.expert_bytes for layer in bare.experts.step_layers], np.int64),
        )
        staging_bytes = 0
        if staging is not None:
            staging_bytes = reserved_bytes(staging.n_buffers * _batch_bytes(bare, staging.at_once))
            sizes = step_sizes(limits.max_tokens, staging.from_n_tokens)
            scratch = [reserved_bytes(bare.recorder.scratch_for(limits.up_to(n)).n_bytes) for n in sizes]
            scratch[0] += reserved_bytes(0)  # between slots and the results of short steps
            footprint = replace(footprint, scratch=tuple(zip(sizes, scratch, strict=True)))
        plan = plan_memory(footprint, allowed, self.wish, staging_bytes)
        streams = bool((plan.n_kept < bare.experts.n_experts).any())
        ring = staging if streams else None
        # Beside experts that the CPU computes those of a draft are few; where it computes none it shall not begin to.
        draft_layers = bare.experts.layers[bare.experts.n_step_layers :]
        draft_bytes = sum(reserved_bytes(layer.n_experts * layer.expert_bytes) for layer in draft_layers)
        keeps = None if not streams and plan.n_bytes + draft_bytes > allowed else not streams
        if graph.draft is not None and keeps is None:
            _log.warning("the head that drafts tokens is not used: its experts, %.3g GB, do not fit", draft_bytes / 1e9)
        lowering = Lowering(
            graph, weights, limits, plan, ring, tables=tables, guesses=self.guesses, keeps_draft_experts=keeps
        )
        assert lowering.layout.n_bytes <= allowed
        return lowering, plan

    def _bare(self, graph: ForwardGraph, weights: WeightAccess, limits: Limits, tables: Mapping[str, int]) -> Lowering:
        """Return what is needed without any expert."""
        bare = Lowering(graph, weights, limits, tables=tables, guesses=self.guesses)
        bare.recorder.uploads.clear()  # they hold the weights, and a recorder refers to itself: it may live on for long
        return bare

    def _larger_steps(self, bare: Lowering, left: int, threshold: int) -> Limits:
        """Return limits with as many tokens in a step as asked for, or as memory allows; left: bytes for experts."""
        limits, recorder = bare.limits, bare.recorder
        if not bare.can_stream or threshold > limits.max_tokens:
            return limits  # they would have to go through the CPU

        def larger(n_tokens: int) -> Limits:
            return replace(limits, max_tokens=n_tokens, max_outputs=max(limits.max_tokens, limits.n_slots))

        def needs(n_tokens: int) -> tuple[int, int]:
            scratch = recorder.scratch_for(larger(n_tokens)).n_bytes - bare.scratch_bytes
            return scratch, recorder.state_bytes(larger(n_tokens)) - recorder.state_bytes(limits)

        wanted = min(self.prompt_tokens, limits.n_slots * limits.context_length, bare.most_tokens)
        layers = bare.experts.step_layers
        layer_bytes = np.array([layer.n_experts * layer.expert_bytes for layer in layers], np.int64)
        n_tokens = longest_step(wanted, limits.max_tokens, left, layer_bytes, self.wish, needs)
        return limits if n_tokens == limits.max_tokens else larger(n_tokens)

    @staticmethod
    def _staging(bare: Lowering, n_bytes: int, threshold: int) -> Staging | None:
        """Return a ring of about so many bytes, two buffers of one expert at least; None if none can be used."""
        if not bare.can_stream or bare.limits.max_tokens < threshold:
            return None
        one = _batch_bytes(bare, 1)
        at_once = max(1, min(STAGED_EXPERTS, bare.experts.n_experts, n_bytes // (2 * one)))
        n_buffers = max(2, min(_MOST_BUFFERS, n_bytes // _batch_bytes(bare, at_once)))
        return Staging(n_buffers, at_once, threshold)


def _batch_bytes(lowering: Lowering, at_once: int) -> int:
    """Return the bytes of a staging buffer."""
    return max(layer.batch_bytes(at_once) for layer in lowering.experts.step_layers)
