"""Slots that are lent to long steps on the CUDA device, here the stand-in driver: no bit changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from interrupter import Interrupter
from test_cuda_device import Model, Opened

from engine.devices.cuda.expert_layers import PLACE_BYTES
from engine.devices.graph import KVType
from engine.devices.program import Limits
from engine.errors import DeviceError
from engine.experts import hot_cache as hot_cache_module
from engine.experts import slots as slots_module
from engine.experts import swapper as swapper_module
from engine.experts.cost import SwapBudget
from engine.experts.hot_cache import HotCache
from engine.experts.policy import make_policy
from engine.experts.slots import SlotTable
from engine.experts.watched_program import WatchedProgram
from engine.gguf.weights import WeightMemory
from tests.cusim import needs_emulator

pytestmark = [needs_emulator, pytest.mark.usefixtures("driver")]

LIMITS = Limits(max_tokens=12, n_slots=2, context_length=64, kv_type=KVType.F16)
SETTINGS = {"limits": LIMITS, "prompt_tokens": 24, "stream_n_tokens": 10}
N_TOKENS = 24
NAMES = ("qwen3moe/qwen3moe-micro-Q8_0", "qwen3next/qwen3next-wide-Q4_K_M")  # the latter's layers differ in size


class Lending:
    """A model whose weights can be pinned, and how much memory makes it lend some slots and keep others."""

    def __init__(self, path) -> None:
        self.model = model = Model(path)
        model.weights.close()
        model.weights = WeightMemory.load(model.file, model.model.tensor_names, "memory")
        model.tokens = np.random.default_rng(3).integers(0, model.n_vocab, N_TOKENS).tolist()
        with model.open(limits=replace(LIMITS, max_tokens=1)) as opened:
            self.expected = np.concatenate([step(opened.program, model, at, at + 1) for at in range(N_TOKENS)])
            whole = opened.program.device_bytes
        self.budget = next(budget for budget in range(whole, whole // 4, -whole // 100) if self._lends(budget))

    def _lends(self, budget: int) -> bool:
        with suppress(DeviceError), self.open(budget) as opened:
            n_kept, n_slots = opened.program.usable_slots(N_TOKENS, N_TOKENS).sum(1), opened.program.n_slots
            return bool((n_kept > 0).all() and (n_kept < n_slots).all() and (n_slots < opened.program.n_experts).all())
        return False

    def open(self, budget: int = 0, **settings) -> Opened:
        """Open it, with no expert in any slot."""
        budget = budget or self.budget
        opened = self.model.open(**{**SETTINGS, "vram_budget": budget, **settings})
        assert opened.program.device_bytes <= budget
        opened.program._places[:] = opened.program._expert_in[:] = -1
        return opened

    def close(self) -> None:
        self.model.close()


@pytest.fixture(scope="module")
def opened_models() -> Iterator[dict[str, Lending]]:
    models: dict[str, Lending] = {}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture(params=NAMES)
def lending(request, golden_path, driver, opened_models: dict[str, Lending]) -> Lending:
    """A model, opened by the first test that has the driver."""
    if request.param not in opened_models:
        opened_models[request.param] = Lending(golden_path(f"{request.param}.gguf"))
    return opened_models[request.param]


def step(program, model: Model, start: int, end: int) -> np.ndarray:
    """Logits of the last of some tokens."""
    n = end - start
    return program.run(
        np.array(model.tokens[start:end], np.int32),
        np.arange(start, end, dtype=np.int32),
        np.zeros(n, np.int32),
        np.array([n - 1], np.int32),
    ).copy()


def cut(rng: np.random.Generator) -> list[tuple[int, int]]:
    """The tokens in steps: long ones, short ones, and such as the CPU takes part in."""
    ends = [0]
    while ends[-1] < N_TOKENS:
        ends.append(min(N_TOKENS, ends[-1] + int(rng.choice([1, 1, 1, 3, 9, 10, 12]))))
    return list(pairwise(ends))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def cached(opened: Opened, policy: str = "lru") -> HotCache:
    program = opened.program
    return HotCache(
        program,
        SlotTable(program.n_slots, program.n_experts, program.expert_bytes),
        make_policy(policy, len(program.n_slots), program.n_experts),
        SwapBudget(1e12, int(program.expert_bytes.max()), 1.0),
        bypass_n_tokens=10,
    )


@pytest.mark.parametrize(
    ("driver_settings", "short_step", "long_step", "in_background"),
    [({}, 64, 512, True), ({"copy_us": 300, "jitter_us": 200}, 5, 4, True), ({"order": "random"}, 64, 4, False)],
    ids=str,
)
def test_long_and_short_steps_in_any_order_have_the_same_bits(
    lending: Lending,
    driver,
    driver_settings: dict,
    short_step: int,
    long_step: int,
    in_background: bool,
    monkeypatch,
) -> None:
    """Also where steps that ask the CPU are long ones, and where long ones take less memory than the longest."""
    driver.set(**driver_settings)
    monkeypatch.setattr("engine.devices.footprint.SHORT_STEP", short_step)
    monkeypatch.setattr("engine.devices.footprint.LEAST_LONG_STEP", long_step)
    rng, seen_lent = np.random.default_rng(5), 0
    with lending.open() as opened:
        n_left = [int(opened.program.usable_slots(n, 0).sum()) for n in (1, 10, 16, 17, 24)]
        assert n_left[0] > n_left[1] == n_left[2] >= n_left[3] == n_left[4]
        cache = cached(opened)
        watched = WatchedProgram(opened.program, cache, in_background=in_background)
        one_by_one = list(pairwise(range(13)))  # each when all copies are there, however slow they are
        for cuts in (cut(rng), cut(rng), one_by_one):
            for start, end in cuts:
                logits = step(watched, lending.model, start, end)
                assert same_bits(logits, lending.expected[end - 1 : end])
                n_kept = opened.program.usable_slots(N_TOKENS, N_TOKENS).sum(1)
                seen_lent += int((cache.table.ready.sum(1) > n_kept).sum())
                if cuts is one_by_one:
                    watched.settle()
                    opened.program.wait_all()
        watched.settle()
        watched.close()
        cache.close()
        cache.table.check_integrity()
        assert seen_lent > 0  # tokens found experts there
        assert cache.statistics.hits.sum() > 0


def test_an_expert_that_leaves_while_a_step_begins_is_no_error(lending: Lending) -> None:
    """The cache's thread may take one out of a slot that the step leaves alone, at any moment."""

    class Leaving(np.ndarray):
        """Has an expert in slot 0 until somebody has looked."""

        def __ge__(self, other: object) -> np.ndarray:
            found = np.asarray(self) >= other
            if self.base is not None:  # no copy
                self.base[0, 0] = -1
            return found

    model = lending.model
    with lending.open() as opened:
        opened.copy(0, 0, 0)
        opened.program._expert_in = opened.program._expert_in.view(Leaving)
        assert same_bits(step(opened.program, model, 0, 12), lending.expected[11:12])


def test_what_is_kept_stays_and_what_is_lent_is_overwritten(lending: Lending) -> None:
    """The memory is really the same: whoever believes the contents of a slot that was lent gets other logits."""
    model, expected = lending.model, lending.expected
    with lending.open() as opened:
        program, n_kept = opened.program, opened.program.usable_slots(N_TOKENS, N_TOKENS).sum(1)
        for layer, n_slots in enumerate(program.n_slots.tolist()):
            for slot in range(n_slots):
                opened.copy(layer, slot, slot)
        for at in range(4):
            assert same_bits(step(program, model, at, at + 1), expected[at : at + 1])
        with pytest.raises(AssertionError, match="needs the memory of an expert that is published"):
            step(program, model, 0, 12)
        lent = [(la, slot) for la, n in enumerate(program.n_slots) for slot in range(n_kept[la], n)]
        for layer, slot in lent:
            program.publish(layer, slot, -1)
        assert same_bits(step(program, model, 0, 12), expected[11:12])
        assert same_bits(step(program, model, 12, 24), expected[23:24])
        for at in range(N_TOKENS):  # with what was kept
            assert same_bits(step(program, model, at, at + 1), expected[at : at + 1])
        for layer, slot in lent:
            program.publish(layer, slot, slot)
        believed = np.concatenate([step(program, model, at, at + 1) for at in range(N_TOKENS)])
        assert not same_bits(believed, expected)


def test_a_shorter_one_of_the_long_steps_leaves_more_slots_alone(lending: Lending, monkeypatch) -> None:
    monkeypatch.setattr("engine.devices.footprint.LEAST_LONG_STEP", 16)
    with lending.open(prompt_tokens=LIMITS.context_length) as opened:
        program, model, expected = opened.program, lending.model, lending.expected
        left, least = (program.usable_slots(n, N_TOKENS) for n in (12, LIMITS.context_length))
        assert left.sum() > least.sum() > 0
        assert (left >= least).all()
        for layer, slot in np.argwhere(left).tolist():
            opened.copy(layer, slot, slot)
        for start, end in ((0, 12), (12, 24)):
            assert same_bits(step(program, model, start, end), expected[end - 1 : end])
        for at in range(N_TOKENS):
            assert same_bits(step(program, model, at, at + 1), expected[at : at + 1])


def test_slots_are_places_of_their_own(lending: Lending) -> None:
    """No two slots overlap; kept ones lie before all that long steps use, lent ones before the results of others."""
    with lending.open() as opened:
        lowering = opened.program._lowering
        stretches = []
        for layer in lowering.experts.layers:
            for slot in range(layer.n_slots):
                start = layer.offsets[slot]
                assert start == layer.place(slot) * PLACE_BYTES
                assert layer.matrix_offset(2) + layer.slot_bytes[2] == layer.expert_bytes
                stretches.append((start, start + layer.expert_bytes, slot < layer.n_kept))
        stretches.sort()
        assert all(end <= start for (_, end, _), (start, _, _) in pairwise(stretches))
        short, *longer = (lowering.scratch_of(n) for n in lowering.sizes)
        ring_end = lowering.staging_offset + lowering.staging.n_buffers * lowering.staging_buffer_bytes
        assert max(end for _, end, is_kept in stretches if is_kept) <= lowering.staging_offset
        assert stretches[-1][1] < short.offset
        assert all(ring_end <= scratch.offset for scratch in longer)
        assert max(scratch.offset + scratch.n_bytes for scratch in (short, *longer)) <= lowering.layout.n_bytes
        assert not stretches[-1][2]


@pytest.mark.parametrize(
    ("lending", "at_line"),
    [*((NAMES[0], at_line) for at_line in (30, 200, 400, 700, 1100, 2000)), (NAMES[1], 400)],
    indirect=["lending"],
)
def test_an_interrupt_while_slots_are_lent_or_come_back_changes_no_bit(lending: Lending, at_line: int) -> None:
    interrupter = Interrupter(at_line, (hot_cache_module, slots_module, swapper_module))
    with lending.open() as opened:
        cache = cached(opened)
        watched = WatchedProgram(opened.program, cache)
        for start, end in ((0, 1), (1, 11), (11, 12), (12, 13), (13, 24)):
            try:
                with interrupter:
                    logits = step(watched, lending.model, start, end)
            except KeyboardInterrupt:
                watched.settle()
                cache.recover()
                continue
            if not interrupter.raised or start == 0:
                assert same_bits(logits, lending.expected[end - 1 : end])
        cache.table.check_integrity()
        for start, end in ((0, 1), (1, 11), (11, 12), (12, 13), (13, 24)):
            assert same_bits(step(watched, lending.model, start, end), lending.expected[end - 1 : end])
        cache.close()
        cache.table.check_integrity()
        assert interrupter.raised
