"""Turns a recorded forward pass into kernel launches with fixed addresses.

The first pass walks the operations in order: it reserves device memory for weights, caches and states, notes when each
result is first made and last used, and puts activations into the forms that the weight formats take (once for each
form, however many matrices read them). The second makes the launches, for steps of at most some number of rows; a
program has such a list for each of some sizes of steps, over the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.devices import graph as ops
from engine.devices.context_slots import ContextSlot
from engine.devices.cuda import expert_operations, fusion, operations, sequence_operations, tiles
from engine.devices.cuda.drawing import Drawing
from engine.devices.cuda.expert_layers import ExpertLayer, ExpertTables, Staging, Streamed, place_slots
from engine.devices.cuda.kernels import Exchange
from engine.devices.cuda.launch import MOST_BLOCKS, Count, Launch, Rows
from engine.devices.cuda.places import Layout, Pass, StepLayout, aligned, reserved_bytes
from engine.devices.cuda.recorder import Recorder
from engine.devices.cuda.scratch import Scratch
from engine.devices.cuda.sequence_state import context_stretches
from engine.devices.footprint import step_sizes
from engine.devices.graph import Graph
from engine.devices.placement import MemoryPlan
from engine.devices.program import Limits, WeightAccess


class Lowering:
    """What a graph needs on the device, and its launches.

    Attributes:
        limits: of a step.
        most_tokens: of a step, for which a launch has blocks.
        staging: the ring of long steps, or None.
        layout: of the device allocation.
        step: the inputs of a step in it.
        drawing: what draws tokens, one for each sequence at most.
        experts: of all layers.
        recorder: what the operations need.
        state: offset and bytes of all caches and states.
        sizes: numbers of tokens for which there is a plan of the intermediate results of steps, the least first; all
            but those of the first use the memory of lent slots.
        staging_offset, staging_buffer_bytes: where the ring begins, and what each of its buffers takes.
        n_vocab: logits of a row.
        n_embeddings: token ids that there are.
    """

    def __init__(
        self,
        graph: Graph,
        weights: WeightAccess,
        limits: Limits,
        plan: MemoryPlan | None = None,
        staging: Staging | None = None,
        *,
        tables: Mapping[str, int] = MappingProxyType({}),
        guesses: bool = False,
        keeps_draft_experts: bool | None = False,
    ) -> None:
        """Plan the memory.

        Args:
            graph: the forward pass.
            weights: of the model.
            limits: of a step; of fewer tokens where launches have no blocks for as many.
            plan: of the memory, with the expert slots; None for none anywhere.
            staging: the ring for long steps, without which there are none.
            tables: addresses of those that the device reads rows of in RAM, by name; all others get a copy.
            guesses: whether the CPU is told what the next layer's router would choose of a layer's activations.
            keeps_draft_experts: whether all experts of the head that drafts tokens have slots, else none has; None:
                nothing is drafted.
        """
        layers, draft = _expert_layers(graph, plan), graph.draft if keeps_draft_experts is not None else None
        n_step_layers = len(layers)
        if draft is not None:
            experts = [op for op in draft.operations if isinstance(op, ops.Experts)]
            layers += [ExpertLayer(op, op.routing.n_experts if keeps_draft_experts else 0, 0, 0) for op in experts]
        n_used = max((op.routing.ids.width for op in graph.operations if isinstance(op, ops.Experts)), default=0)
        by_choice = any(not expert_operations.can_group(op) for op in graph.operations if isinstance(op, ops.Experts))
        self.most_tokens = MOST_BLOCKS // (n_used + 1 if by_choice else 1)  # each choice, and a shared expert
        self.limits = limits = limits.up_to(self.most_tokens)
        self.staging = staging
        self.sizes = step_sizes(limits.max_tokens, staging.from_n_tokens if staging else None)
        self.layout = Layout()
        self.step = StepLayout(self.layout, limits.max_tokens, limits.max_draws)
        at_once = staging.at_once if staging else 1
        self.experts = ExpertTables(layers, self.layout, limits.max_tokens, at_once, n_step_layers)
        self.recorder = Recorder(weights, limits, self.layout, self.experts, tables)

        state_start = self.layout.n_bytes
        self.recorder.reserve_states(graph)
        self.state = (state_start, self.layout.n_bytes - state_start)
        items = list(fusion.fused(graph.operations))
        if guesses:
            choices = [choice for _, item in items if (choice := fusion.choice_of(item)) is not None]
            width = self.experts.hidden_size  # where experts take something else, its router has no use for that
            self.experts.next_routers = {
                self.experts.number(choice.router.out): (choice.linear.x, following.linear, following.router)
                for choice, following in pairwise(choices)
                if choice.linear.x.width == following.linear.x.width == width
            }
        self._record(items, 0)
        self._draft_calls, end = None, len(graph.operations)
        if draft is not None:
            of_draft = list(fusion.fused(draft.operations))
            self._draft_calls = self.recorder.aside(lambda: self._record(of_draft, end))
            end += len(draft.operations)
        assert graph.logits is not None
        self.recorder.index = end
        self._logits = self.recorder.use(graph.logits).need
        self._draft_logits = self.recorder.use(draft.logits).need if draft and draft.logits else None
        self.n_vocab = graph.logits.width
        self.drawing = Drawing(self.recorder, limits.max_draws, self.n_vocab)
        self._place_scratch_and_slots(plan)
        self.n_embeddings = next(op.table.n_rows for op in graph.operations if isinstance(op, ops.Embed))

    def _record(self, items: Sequence[tuple[int, fusion.Fused]], first: int) -> None:
        """Record operations, with their numbers from the `first` on."""
        for index, item in items:
            self.recorder.index = first + index
            _LOWER[type(item)](self.recorder, item)

    @property
    def can_draft(self) -> bool:
        """Return whether there are launches that guess a token."""
        return self._draft_calls is not None

    @property
    def draft_asks_cpu(self) -> bool:
        """Return whether these ask the CPU for experts."""
        return any(not layer.is_resident for layer in self.experts.layers[self.experts.n_step_layers :])

    @property
    def needs_cpu(self) -> bool:
        """Return whether some experts have no slot."""
        return any(not layer.is_resident for layer in self.experts.step_layers)

    @property
    def can_stream(self) -> bool:
        """Return whether long steps may bring the experts that have no slot to the device."""
        formats = [weight.format for layer in self.experts.step_layers for weight in layer.weights]
        return self.needs_cpu and all(tiles.has_integer_form(f) for f in formats)

    def scratch_of(self, most: int) -> Scratch:
        """Return where the results of a step of at most so many tokens lie."""
        return next(scratch for n_tokens, scratch in zip(self.sizes, self._scratches, strict=True) if most <= n_tokens)

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of the intermediate results of the longest steps."""
        return self._scratches[-1].n_bytes

    def logits(self, most: int) -> int:
        """Return where a step of at most so many tokens leaves its logits."""
        return self.scratch_of(most).offset_of(self._logits)

    def draw(self, base: int, most: int, chosen: int, *, is_draft: bool = False) -> list[Launch]:
        """Return the launches that draw the next tokens after a step of at most so many; they go to `chosen`.

        If it `is_draft`, they draw from what the head that drafts tokens gave.
        """
        count = Count(base + self.step.n_rows[ops.Rows.OUTPUTS], min(most, self.drawing.n_rows))
        need = self._draft_logits if is_draft else self._logits
        assert need is not None
        logits = Rows(base + self.scratch_of(most).offset_of(need), self.n_vocab)
        return self.drawing.launches(base, logits, base + self.step.draws, chosen, count)

    def launches(self, base: int, most: int, exchange: Exchange | None) -> list[Launch]:
        """Return the launches of a step of at most `most` tokens, for an allocation that begins at `base`."""
        made = Pass(self.limits, self.step, self.scratch_of(most), most, base, exchange)
        return [launch for launch in self.recorder.launches(made) if isinstance(launch, Launch)]

    def draft_launches(self, base: int, exchange: Exchange | None) -> list[Launch]:
        """Return the launches that guess what follows one token; in them, too, the CPU may be asked for experts."""
        assert self._draft_calls is not None
        made = Pass(self.limits, self.step, self.scratch_of(1), 1, base, exchange)
        return [launch for launch in self._draft_calls(made) if isinstance(launch, Launch)]

    def streaming_launches(self, base: int, most: int) -> list[Launch | Streamed]:
        """Return the launches of a step that brings experts without a slot to the device, for at least some tokens."""
        assert self.staging is not None
        assert most >= tiles.MIN_TOKENS
        first, n_bytes = base + self.staging_offset, self.staging_buffer_bytes
        buffers = tuple(first + i * n_bytes for i in range(self.staging.n_buffers))
        made = Pass(self.limits, self.step, self.scratch_of(most), most, base, staging=buffers)
        return self.recorder.launches(made)

    def _place_scratch_and_slots(self, plan: MemoryPlan | None) -> None:
        """Lay out what comes after weights and states, and the slots in the memory of contexts.

        Behind the kept slots lies memory that is used in two ways: by the ring, and behind it the intermediate results
        of a long step; or by lent slots, and the intermediate results of short steps.
        """
        layout, layers, staging = self.layout, self.experts.layers, self.staging
        layout.n_bytes = shared = place_slots(layers, layout.n_bytes, lambda layer: layer.n_kept)
        self._place_in_contexts(() if plan is None else plan.context_slots)
        self.staging_offset = self.staging_buffer_bytes = 0
        self._scratches = [self.recorder.scratch_for(self.limits.up_to(n)) for n in self.sizes]
        short, *longer = self._scratches
        if staging is not None:
            self.staging_buffer_bytes = max(layer.batch_bytes(staging.at_once) for layer in self.experts.step_layers)
            self.staging_offset = layout.reserve(self.staging_buffer_bytes * staging.n_buffers)
        behind_ring = layout.n_bytes
        for scratch in longer:
            scratch.offset = behind_ring
            layout.n_bytes = max(layout.n_bytes, behind_ring + reserved_bytes(scratch.n_bytes))
        for slot in () if plan is None else plan.lent_slots:
            layers[slot.layer].offsets.append(shared + slot.offset)
        ends = [layer.offsets[-1] + layer.expert_bytes for layer in layers if layer.n_lent]
        n_bytes = reserved_bytes(short.n_bytes)
        short.offset = max(*[end + reserved_bytes(0) for end in ends], shared, layout.n_bytes - n_bytes)
        layout.n_bytes = max(layout.n_bytes, short.offset + n_bytes)
        assert all(len(layer.offsets) == layer.n_slots for layer in layers)

    def _place_in_contexts(self, context_slots: Sequence[ContextSlot]) -> None:
        """Lay out the slots in the memory of contexts."""
        layers, stretches = self.experts.layers, context_stretches(self.recorder.states, self.limits)
        for slot in context_slots:
            layer, (start, n_bytes) = layers[slot.layer], stretches[slot.stretch]
            layer.offsets.append(aligned(start + slot.offset))
            assert layer.offsets[-1] + layer.expert_bytes <= start + n_bytes


def _expert_layers(graph: Graph, plan: MemoryPlan | None) -> list[ExpertLayer]:
    """Return the layers whose experts may be in slots, with those of a plan, or without any."""
    operations = [op for op in graph.operations if isinstance(op, ops.Experts) and graph.has_slots(op)]
    if plan is None:
        return [ExpertLayer(op, 0, 0, 0) for op in operations]
    n_in_contexts = np.bincount([slot.layer for slot in plan.context_slots], minlength=len(operations))
    n_lent = plan.n_slots - plan.n_kept - n_in_contexts
    counts = np.stack([plan.n_kept, n_in_contexts, n_lent], 1).tolist()
    return [ExpertLayer(op, *of_layer) for op, of_layer in zip(operations, counts, strict=True)]


def _sum_and_norm(recorder: Recorder, two: fusion.SumAndNorm) -> None:
    if isinstance(two.sum, ops.Combine):
        expert_operations.combine(recorder, two.sum, two.norm)
    else:
        operations.add(recorder, two.sum, two.norm)


def _selection(recorder: Recorder, item: fusion.Selection) -> None:
    """Record a choice with what makes its queries and keys ready."""
    if isinstance(item.select, ops.SelectPositions):
        sequence_operations.select_positions(recorder, item.select, item)
    else:
        sequence_operations.select_blocks(recorder, item.select, item)


_LOWER: dict[type[fusion.Fused], Callable[[Recorder, Any], None]] = {
    ops.Embed: operations.embed,
    ops.HashTokens: sequence_operations.hash_tokens,
    ops.SelectOutputs: operations.select_outputs,
    ops.RMSNorm: operations.rms_norm,
    ops.Add: operations.add,
    ops.Linear: operations.linear,
    ops.HeadLinear: operations.head_linear,
    ops.Scale: operations.scale,
    ops.SoftCap: operations.soft_cap,
    ops.Clamp: operations.clamp,
    ops.Gate: operations.gate,
    ops.GateByAgreement: operations.gate_by_agreement,
    ops.SplitHeads: operations.split_heads,
    ops.JoinHeads: operations.join_heads,
    ops.AddToStreams: operations.add_to_streams,
    fusion.StreamsAndNorm: operations.reduce_streams,
    fusion.ResidualsAndNorm: operations.mix_residuals,
    fusion.SumAndNorm: _sum_and_norm,
    fusion.NormAndGate: lambda recorder, two: operations.gate(recorder, two.gate, two.norm),
    ops.ScaleByPosition: sequence_operations.scale_by_position,
    ops.Rope: sequence_operations.rope,
    ops.StoreKeys: sequence_operations.store_keys,
    ops.CarryOver: sequence_operations.carry_over,
    ops.CausalConv: sequence_operations.causal_conv,
    ops.DeltaNet: sequence_operations.delta_net,
    ops.SelectiveScan: sequence_operations.selective_scan,
    ops.Compress: sequence_operations.compress,
    ops.SelectPositions: sequence_operations.select_positions,
    ops.SelectBlocks: sequence_operations.select_blocks,
    fusion.Selection: _selection,
    fusion.SharedKeys: lambda recorder, item: sequence_operations.compress(recorder, item.compress),
    fusion.Attention: sequence_operations.attention_layer,
    fusion.DeltaNetLayer: sequence_operations.delta_net_layer,
    ops.Router: expert_operations.router,
    ops.GroupRouter: expert_operations.group_router,
    ops.Experts: expert_operations.experts,
    ops.Combine: expert_operations.combine,
    fusion.LinearAndRouter: expert_operations.linear_and_router,
    fusion.NormAndRouter: expert_operations.norm_and_router,
    fusion.SharedExpert: expert_operations.shared_expert,
}
