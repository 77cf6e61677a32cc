"""The emulated device, and on it the promise: whatever the cache does, the logits keep their bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from cached_runner import LIMITS, MACHINE, SETUPS, Model, Setup
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupter import Interrupter
from model_runner import ModelRunner

from engine.data import tiny_model_path
from engine.devices.emulated import EmulatedDevice, HazardError
from engine.devices.emulated import device as device_module
from engine.devices.emulated import slot_memory as slot_memory_module
from engine.devices.emulated import staging as staging_module
from engine.devices.emulated.clock import Event, Timetable, VirtualClock
from engine.devices.emulated.staging import StagingAreas
from engine.devices.footprint import measure
from engine.devices.placement import Wish, least_cpu_layers, plan_memory, slots_that_fit
from engine.devices.slots import ClockedProgram, MeteredProgram, SlotProgram
from engine.devices.timing import Bandwidths, Machine, StepTime, StepWork, stream_waits, time_step
from engine.errors import DeviceError
from engine.experts import hot_cache as hot_cache_module
from engine.experts import slots as slots_module
from engine.experts import swapper as swapper_module
from engine.experts import watched_program as watched_program_module
from engine.experts.swapper import Swapper
from engine.generate.forward import ForwardPass


def some_tokens(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 300, 48).tolist()


SEED = 7
TOKENS = some_tokens(SEED)
INTERRUPTED = (
    device_module,
    slot_memory_module,
    staging_module,
    hot_cache_module,
    slots_module,
    swapper_module,
    watched_program_module,
)


class Models:
    """The models of this file by name, opened when first used."""

    def __init__(self, find) -> None:
        self._find = find
        self.opened: dict[str, Model] = {}

    def __call__(self, name: str) -> Model:
        if name not in self.opened:
            self.opened[name] = Model(tiny_model_path() if name == "tiny" else self._find(name))
        return self.opened[name]

    @functools.cache  # noqa: B019 - lives as long as the module's tests
    def reference(self, name: str, seed: int = SEED) -> np.ndarray:
        """Logits from the CPU device, which knows no cache, all tokens at once as far as a step goes."""
        model = self(name)
        with ModelRunner(model.file.path, max_tokens=16, context_length=LIMITS.context_length, n_threads=1) as runner:
            return runner.logits(some_tokens(seed))


@pytest.fixture(scope="module")
def models(golden_path) -> Iterator[Models]:
    made = Models(golden_path)
    yield made
    for model in made.opened.values():
        model.close()


NAMES = ("qwen3moe/qwen3moe-micro-Q8_0.gguf", "qwen35moe/qwen35moe-fusedgu-Q8_0.gguf", "tiny")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def run(models: Models, name: str, setup: Setup, n_prompt: int = 20, seed: int = SEED):
    """Logits, and the cache and program as the run left them, closed."""
    model = models(name)
    forward, cache, program = model.open(setup)
    logits = model.logits(forward, some_tokens(seed), n_prompt)
    cache.close()
    cache.table.check_integrity()
    program.close()
    return logits, cache, program


# -- the promise -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    setup=SETUPS,
    n_prompt=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_the_logits_have_the_same_bits_whatever_the_cache_does(models, name, setup, n_prompt, seed) -> None:
    logits, cache, _ = run(models, name, setup, n_prompt, seed)
    assert same_bits(logits, models.reference(name, seed))
    assert cache.statistics.hits.sum() <= cache.statistics.choices.sum()


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_swaps_really_happen_in_such_runs(models, name, adversarial) -> None:
    setup = Setup((6, 2, 0), "lru", adversarial=adversarial, bypass_n_tokens=30)
    logits, cache, program = run(models, name, setup)
    found = cache.statistics
    assert same_bits(logits, models.reference(name))
    assert found.n_loads > 20
    assert 0 < found.hit_rate < 1
    assert found.hits[2] == 0  # the layer without slots
    assert program.traffic.link == found.loaded_bytes


def test_all_hits(models) -> None:
    setup = Setup((64,), "static", bypass_n_tokens=30)
    model = models("tiny")
    forward, cache, program = model.open(setup)
    cache.fill(np.ones((model.n_layers, model.n_experts), np.float32), wait=True)
    logits = model.logits(forward, TOKENS, 20)
    assert same_bits(logits, models.reference("tiny"))
    assert cache.statistics.hit_rate == 1.0
    assert program.traffic.ram == program.traffic.link == 0 or program.time_spent.cpu_s == 0
    cache.close()
    program.close()


def test_all_misses_and_fewer_slots_than_a_token_uses(models) -> None:
    nothing, cache, program = run(models, "tiny", Setup((0,)))
    assert same_bits(nothing, models.reference("tiny"))
    assert cache.statistics.hit_rate == 0
    assert program.time_spent.cpu_s > 0
    few, cache, _ = run(models, "tiny", Setup((1,), "lru", bypass_n_tokens=64))
    assert same_bits(few, models.reference("tiny"))
    assert cache.statistics.n_loads > 0


def test_the_same_seed_gives_the_same_run_to_the_nanosecond(models) -> None:
    setup = Setup((5, 9), "lru", seed=3, adversarial=True, failing=0.2)
    _, cache, program = run(models, "tiny", setup)
    _, again, program_again = run(models, "tiny", setup)
    assert program.now() == program_again.now()
    assert cache.statistics.n_loads == again.statistics.n_loads
    assert np.array_equal(cache.table.ready, again.table.ready)
    _, other, _ = run(models, "tiny", Setup((5, 9), "lru", seed=4, adversarial=True, failing=0.2))
    assert not np.array_equal(cache.table.ready, other.table.ready)


def cut_in_steps(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The positions where steps begin, and their tokens, as far as there are any."""
    starts = [int(end - size) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]
    return [(at, TOKENS[at : at + n]) for at, n in zip(starts, sizes, strict=True) if at < len(TOKENS)]


def run_interrupted(models, setup: Setup, at_line: int, steps: Sequence[Sequence[int]]) -> None:
    """Run steps, one of which is interrupted and run again, which a model of attention layers can; compare them."""
    name = "qwen3moe/qwen3moe-micro-Q8_0.gguf"
    expected = models.reference(name)
    forward, cache, program = models(name).open(setup)
    interrupter, position = Interrupter(at_line, INTERRUPTED), 0
    for step in steps:
        try:
            with interrupter:
                logits = forward.run(0, step, position, "all").copy()
        except KeyboardInterrupt:
            logits = forward.run(0, step, position, "all").copy()
        assert same_bits(logits, expected[position : position + len(step)])
        position += len(step)
    cache.close()
    cache.table.check_integrity()
    program.close()
    assert interrupter.raised == (interrupter.n_lines >= at_line)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), at_line=st.integers(1, 4000), adversarial=st.booleans())
def test_an_interrupt_at_any_line_changes_no_bit_afterwards(models, seed, at_line, adversarial) -> None:
    setup = Setup((3,), "lru", seed=seed, adversarial=adversarial, bypass_n_tokens=64)
    run_interrupted(models, setup, at_line, [[token] for token in TOKENS[:24]])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    at_line=st.integers(1, 4000),
    adversarial=st.booleans(),
    n_lent=st.sampled_from([(0,), (2,), (5, 1)]),
)
def test_an_interrupt_while_experts_are_streamed_changes_no_bit_afterwards(
    models, seed, at_line, adversarial, n_lent
) -> None:
    setup = Setup((4,), "lru", seed=seed, adversarial=adversarial, bypass_n_tokens=8, n_lent=n_lent)
    steps = [step for _, step in cut_in_steps([10, 1, 1, 9, 8, 1, 1, 1, 8, 1, 1])]
    run_interrupted(models, setup, at_line, steps)


# -- long steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_long_step_streams_what_has_no_slot_and_leaves_the_slots_alone(models, name) -> None:
    model = models(name)
    forward, cache, program = model.open(Setup((4, 0, 64), "lru", bypass_n_tokens=8))
    heat = np.random.default_rng(0).random((model.n_layers, model.n_experts), np.float32)
    cache.fill(heat, wait=True)
    held, before, loads = cache.table.ready.copy(), program.traffic, cache.statistics.n_loads
    start, spent = program.now(), program.time_spent
    logits = forward.run(0, TOKENS[:16], 0, "all").copy()
    assert same_bits(logits, models.reference(name)[:16])
    moved, took = program.traffic - before, program.time_spent - spent
    cold = (~held).sum(1) * program.expert_bytes
    assert moved.link == moved.ram == cold.sum()
    assert took.cpu_s == took.wait_s == 0 < took.stream_s
    assert program.now() - start == pytest.approx(took.total_s)
    # It takes what the formula that `engine plan` uses says: nothing else was on the link.
    copies, dense = cold / MACHINE.bandwidths.pcie, (took.dense_s + took.attention_s) / model.n_layers
    assert took.stream_s == pytest.approx(stream_waits(copies, dense, took.layers[0]).sum())
    assert np.array_equal(cache.table.ready, held)
    assert cache.statistics.n_loads == loads
    assert cache.statistics.n_tokens == 0
    after = forward.run(0, TOKENS[16:17], 16, "all")  # with the experts where they were
    assert same_bits(after, models.reference(name)[16:17])
    cache.close()
    program.close()


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    setup=SETUPS,
    sizes=st.lists(st.sampled_from([1, 1, 1, 2, 8, 16]), min_size=1, max_size=12),
    short_step=st.sampled_from([1, 64]),
)
def test_slots_that_are_lent_in_between_change_no_bit(models, name, setup, sizes, short_step) -> None:
    """Long steps, streaming or not, and short ones in any order, on slots that the long ones poison."""
    model, expected = models(name), models.reference(name)
    forward, cache, program = model.open(replace(setup, bypass_n_tokens=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.devices.footprint.SHORT_STEP", short_step)
        for at, step in cut_in_steps(sizes):
            assert same_bits(forward.run(0, step, at, "all"), expected[at : at + len(step)])
            cache.table.check_integrity()
    cache.close()
    program.close()


def test_a_long_step_borrows_slots_and_leaves_the_others_as_they_are(models) -> None:
    model = models("tiny")
    setup = Setup((6,), "lru", bypass_n_tokens=8, n_lent=(2, 0, 6))
    forward, cache, program = model.open(setup)
    cache.fill(np.random.default_rng(0).random((model.n_layers, model.n_experts), np.float32), wait=True)
    before = program._memory.published()
    assert [len(experts) for experts in before] == [6] * model.n_layers
    forward.run(0, TOKENS[:8], 0, "none")
    forward.run(0, TOKENS[8:16], 8, "none")
    kept = program._memory.published()
    assert [len(experts) for experts in kept] == program.plan.n_kept.tolist()
    assert all(set(now) <= set(then) for now, then in zip(kept, before, strict=True))
    for at in range(16, 20):
        forward.run(0, TOKENS[at : at + 1], at, "none")
    cache._swapper.drain()
    assert (cache.table.ready.sum(1) == 6).all()
    cache.close()
    program.close()


def test_a_longer_step_borrows_more_slots(models) -> None:
    model = models("tiny")
    setup = Setup((6,), "lru", bypass_n_tokens=8, n_lent=(2, 0, 6), lends_one_up_to=9)
    forward, cache, program = model.open(setup)
    cache.fill(np.random.default_rng(0).random((model.n_layers, model.n_experts), np.float32), wait=True)
    counts = [program.usable_slots(n, 0).sum(1) for n in (7, 8, 9, 10)]
    assert (counts[0] == 6).all()
    assert (counts[1] == counts[2]).all()
    assert counts[0].sum() > counts[1].sum() > counts[3].sum()
    assert (counts[3] == program.plan.n_kept).all()
    for start, end in ((0, 8), (8, 18)):
        forward.run(0, TOKENS[start:end], start, "none")
        published = [len(experts) for experts in program._memory.published()]
        assert published == program.usable_slots(end - start, 0).sum(1).tolist()
    cache.close()
    program.close()


def test_the_tables_point_into_an_area_while_a_layer_is_computed(models, monkeypatch) -> None:
    """Else the arithmetic would read from RAM, and prove nothing about the copies."""
    forward, cache, program = models("tiny").open(Setup((3,), "lru", bypass_n_tokens=8))
    homes = [table.addresses.copy() for table in program._tables]
    run_operations, seen = program._program.run_operations, []

    def watched(first: int = 0, last: int = -1) -> None:
        for layer, table in enumerate(program._tables):
            if (first, last) == table.operations:
                seen.append((layer, int((table.addresses != homes[layer]).all(0).sum())))
        run_operations(first, last)

    monkeypatch.setattr(program._program, "run_operations", watched)
    forward.run(0, TOKENS[:16], 0, "none")
    assert seen == [(layer, models("tiny").n_experts) for layer in range(models("tiny").n_layers)]
    for table, home in zip(program._tables, homes, strict=True):
        published = (table.addresses != home).any(0).sum()
        assert published <= 3
    cache.close()
    program.close()


def test_misuse_of_the_areas_is_found(models) -> None:
    _, cache, program = models("tiny").open(Setup((0,), bypass_n_tokens=64))
    clock, experts = VirtualClock(), np.arange(4)
    areas = StagingAreas(program._tables, clock)
    areas.begin_copy(0, experts, Event(2.0))
    areas.begin_copy(1, experts, Event(3.0))
    with pytest.raises(HazardError, match="staged before their copies are done"):
        areas.stage(0)
    with pytest.raises(HazardError, match="layer 2 looks for its experts in an area that holds those of layer 0"):
        areas.stage(2)
    clock.advance_to(2.5)
    areas.stage(0)
    with pytest.raises(HazardError, match="overwritten while its experts are staged"):
        areas.begin_copy(2, experts, Event(4.0))
    areas.retire(0, 5.0)
    with pytest.raises(HazardError, match="overwritten while a step reads it"):
        areas.begin_copy(2, experts, Event(9.0))
    clock.advance_to(5.0)
    areas.begin_copy(2, experts, Event(9.0))
    cache.close()
    program.close()


# -- planted bugs are found ------------------------------------------------------------------------------------------


class Impatient(Swapper):
    """Publishes before the copy is done."""

    def _begin_copy(self, swap) -> bool:
        begun = super()._begin_copy(swap)
        if self._copying:
            self._copying.pop()
            self._table.make_ready(swap.layer, swap.slot)
            self._device.publish(swap.layer, swap.expert, swap.slot)
        return begun


class Ruthless(Swapper):
    """Does not wait for the steps that still read the victim."""

    def _begin_copy(self, swap) -> bool:
        self._table.load(swap.layer, swap.slot)
        swap.ticket = self._device.copy_expert(swap.layer, swap.expert, swap.slot)
        self._copying.append(swap)
        return True


class Forgetful(Swapper):
    """Does not take the victim out of the tables first."""

    def submit(self, swaps) -> int:
        publish = self._device.publish
        self._device.publish = lambda layer, expert, slot: None if slot < 0 else publish(layer, expert, slot)
        try:
            return super().submit(swaps)
        finally:
            del self._device.publish


class Stubborn(Swapper):
    """Lends no slot."""

    def lend_all_but(self, usable) -> None:
        pass


class Careless(Swapper):
    """Lends slots that an expert is being copied to."""

    def lend_all_but(self, usable) -> None:
        wait_all, self._device.wait_all = self._device.wait_all, lambda: None
        try:
            super().lend_all_but(usable)
        finally:
            self._device.wait_all = wait_all


class Nostalgic(Swapper):
    """Believes that slots come back with what was in them."""

    def lend_all_but(self, usable) -> None:
        table = self._table
        before = {(la, e): table.slot_of(la, e) for la, e in np.argwhere(table.ready).tolist()}
        super().lend_all_but(usable)
        for (layer, expert), slot in before.items():
            if not table.ready[layer, expert]:
                self._device.publish(layer, expert, slot)


class Hasty(Swapper):
    """Leaves copies behind when it is closed."""

    def drain(self) -> None:
        self._fenced.clear()
        self._copying.clear()


@pytest.mark.parametrize(
    ("swapper", "message"),
    [
        (Impatient, "before its copy is done"),
        (Ruthless, "while a step reads"),
        (Forgetful, "overwritten while expert .* is published"),
        (Hasty, "copies are under way"),
    ],
)
def test_a_planted_bug_is_found(models, swapper, message) -> None:
    with pytest.raises(HazardError, match=message):
        run(models, "tiny", Setup((5,), "lru", adversarial=True, bypass_n_tokens=64, max_in_flight=64, swapper=swapper))


@pytest.mark.parametrize(
    ("swapper", "message"),
    [
        (Stubborn, "is lent while expert .* is published in it"),
        (Careless, "is lent while an expert is copied into it"),
        (Nostalgic, "is lent while expert .* is published in it"),
        (Ruthless, "while a step has results there"),
    ],
)
def test_a_bug_planted_where_slots_are_lent_is_found(models, swapper, message) -> None:
    late = swapper in {Ruthless, Careless}
    setup = Setup(
        (5,), "static", 5, adversarial=late, bypass_n_tokens=8, max_in_flight=64, swapper=swapper, n_lent=(5,)
    )
    forward, _, _ = models("tiny").open(setup)

    def run_steps() -> None:
        for at, step in cut_in_steps([1, 1, 1, 8] * 3):
            forward.run(0, step, at, "none")

    with pytest.raises(HazardError, match=message):
        run_steps()


def test_misuse_of_slots_is_found(models) -> None:
    _, _, program = models("tiny").open(Setup((2,)))
    ticket = program.copy_expert(0, 3, 0)
    with pytest.raises(HazardError, match="two copies into slot 0"):
        program.copy_expert(0, 4, 0)
    with pytest.raises(HazardError, match="has no slot 2"):
        program.copy_expert(0, 4, 2)
    with pytest.raises(HazardError, match="has no expert"):
        program.copy_expert(0, 999, 1)
    program.wait_all()
    assert program.is_done(ticket)
    with pytest.raises(HazardError, match="holds expert 3"):
        program.publish(0, 4, 0)
    with pytest.raises(HazardError, match="holds nothing"):
        program.publish(0, 4, 1)
    program.publish(0, 3, 0)
    program.publish(0, 3, -1)
    program.close()


# -- memory, clock, cost model ---------------------------------------------------------------------------------------


def test_the_program_is_all_that_it_claims_to_be(models) -> None:
    _, _, program = models("tiny").open(Setup((2,)))
    assert isinstance(program, SlotProgram)
    assert isinstance(program, ClockedProgram)
    assert isinstance(program, MeteredProgram)
    assert program.state_bytes == pytest.approx(models("tiny").footprint.state_bytes, rel=0.01)
    program.close()


def test_steps_end_in_order_however_late_they_are() -> None:
    timetable = Timetable(VirtualClock(), 100.0, seed=0, adversarial=True)
    ends = [timetable.step(1.0).at for _ in range(50)]
    assert ends == sorted(ends)
    assert max(end - (i + 1) for i, end in enumerate(ends)) > 1.0


def test_copies_follow_one_another_at_the_speed_of_the_link() -> None:
    clock = VirtualClock()
    timetable = Timetable(clock, 100.0, seed=0)
    assert [timetable.copy(50).at for _ in range(3)] == [0.5, 1.0, 1.5]
    clock.advance_to(4.0)
    clock.advance_to(3.0)
    assert timetable.copy(100).at == 5.0
    assert timetable.step(2.0).at == clock.now == 6.0


def test_a_step_takes_as_long_as_the_slower_of_device_and_cpu() -> None:
    machine = Machine(Bandwidths(ram=10.0, pcie=5.0, vram=100.0), 0, handshake_s=0.5, layer_s=0.25)
    nothing = np.zeros(3)

    def time(hits, misses, streamed=nothing, copied=0.0) -> StepTime:
        hits, misses = np.array(hits, float), np.array(misses, float)
        return time_step(machine, StepWork(4, 200.0, 100.0, 0.0, hits, nothing, misses, nothing, streamed, copied))

    idle = time([0, 0, 0], [0, 0, 0])
    assert idle == StepTime(dense_s=2.0 + 1.0, attention_s=1.0)
    assert idle.total_s == 4.0
    mixed = time([100, 300, 0], [0, 10, 10])
    assert mixed.hits_s == 1.0 + 3.0
    assert mixed.cpu_s == (1.0 + 0.5) * 2
    assert mixed.wait_s == 1.5  # of the second layer the device is the slower one
    assert mixed.total_s == 4.0 + 4.0 + 1.5
    assert time([0, 0, 0], [0, 0, 10], copied=10.0).cpu_s == 2.5  # copies take RAM bandwidth from misses
    streamed = time([100, 0, 0], [0, 0, 0], streamed=np.array([10.0, 0, 0]))
    assert streamed.stream_s == pytest.approx(10 / 5 - 4 / 3)  # a third of everything else is done meanwhile
    assert streamed.wait_s == 0
    assert streamed.layers[2].sum() == streamed.stream_s


def test_a_step_that_streams_takes_as_long_as_the_slower_of_link_and_device() -> None:
    some, none = np.full(6, 3.0), np.zeros(6)
    assert stream_waits(none, 1.0, some).sum() == 0
    # The link is the slower one: it never stops but for the first two areas, and the last layer is computed after it.
    assert 6 * 1.0 + 6 * 0.5 + stream_waits(some, 1.0, np.full(6, 0.5)).sum() == 6 * 3.0 + 0.5
    # The device is: it waits for the first layer only.
    assert stream_waits(some, 2.0, np.full(6, 2.0)).tolist() == [1.0, 0, 0, 0, 0, 0]
    # An area is free when its layer is computed: the third layer's copy begins at 3 + 10, the second's is over by then.
    assert stream_waits(np.array([3.0, 3.0, 3.0]), 0.0, np.array([10.0, 1.0, 1.0])).tolist() == [3.0, 0.0, 2.0]


def test_memory_is_planned_before_it_is_used(models) -> None:
    model = models("tiny")
    footprint = measure(model.loaded.graph, LIMITS, 8)
    whole = plan_memory(footprint, 10**9, Wish())
    assert (whole.n_slots == model.n_experts).all()
    assert whole.streaming_bytes == 0
    fixed = plan_memory(footprint, 10**9, Wish(hot_k=0))
    assert fixed.slot_bytes == 0
    assert fixed.streaming_bytes > 0
    room = fixed.n_bytes + 10 * int(footprint.expert_bytes.sum())
    some = plan_memory(footprint, room, Wish())
    assert (some.n_kept == 10).all()
    size = int(footprint.expert_bytes[0])  # the same in all layers
    assert (some.n_slots - some.n_kept).sum() == (fixed.streaming_bytes - fixed.scratch_bytes) // size > model.n_layers
    assert some.n_bytes <= room
    assert "of them lent to long prompts" in some.describe()
    few = plan_memory(footprint, room, Wish(hot_k=7))
    assert few.n_kept.tolist() == few.n_slots.tolist() == [7] * model.n_layers
    assert "lent" not in few.describe()
    never = plan_memory(measure(model.loaded.graph, LIMITS, 17), room, Wish())  # no step is that long
    assert never.streaming_bytes == never.lent_bytes == 0 < never.slot_bytes
    with pytest.raises(DeviceError, match=r"hot_k is 13, .* hold 12 experts"):
        plan_memory(footprint, room, Wish(hot_k=13))
    n_cpu = least_cpu_layers(footprint, room)
    assert 0 < n_cpu < model.n_layers
    layers = plan_memory(footprint, room, Wish(n_cpu_moe=n_cpu))
    assert layers.n_slots.tolist() == [0] * n_cpu + [model.n_experts] * (model.n_layers - n_cpu)
    with pytest.raises(DeviceError, match=f"n_cpu_moe = {n_cpu} fits"):
        plan_memory(footprint, room, Wish(n_cpu_moe=n_cpu - 1))
    with pytest.raises(DeviceError, match="without its experts needs"):
        plan_memory(footprint, fixed.n_bytes - 1, Wish())


def test_sequences_of_one_step_each_read_their_own_keys(models) -> None:
    """Two sequences side by side, the second one position ahead, read more than one sequence of two tokens."""
    limits = replace(LIMITS, n_slots=2)
    model = models("qwen3moe/qwen3moe-micro-Q8_0.gguf")
    program = EmulatedDevice(MACHINE, stream_n_tokens=64).compile(model.loaded.graph, model.weights, limits)
    ids, rows = np.array([7, 8], np.int32), np.zeros(0, np.int32)
    seconds = []
    for slots, positions in (([0, 0], [0, 1]), ([0, 1], [0, 0]), ([0, 1], [0, 1])):
        before = program.time_spent.attention_s
        program.run(ids, np.array(positions, np.int32), np.array(slots, np.int32), rows)
        seconds.append(program.time_spent.attention_s - before)
    one, two = (model.footprint.attention_bytes(position) / MACHINE.bandwidths.vram for position in (0, 1))
    assert seconds == pytest.approx([two, 2 * one, one + two])
    program.close()


def test_a_device_that_is_too_small_says_so_before_it_allocates(models) -> None:
    model = models("tiny")
    device = EmulatedDevice(MACHINE, vram_budget=1000)
    with pytest.raises(DeviceError, match="may be used"):
        device.compile(model.loaded.graph, model.weights, LIMITS)


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    room=st.integers(0, 20_000),
    more=st.integers(0, 900),  # for longer steps
    staging=st.integers(0, 900),
    most=st.one_of(st.none(), st.integers(0, 12)),
)
def test_lent_slots_fit_beside_the_kept_ones_and_what_prompts_need_likewise(
    models, sizes, room, more, staging, most
) -> None:
    footprint = replace(
        models("tiny").footprint,
        expert_bytes=np.array(sizes),
        n_experts=10,
        dense_bytes=500,
        state_bytes=70,
        scratch=((64, 100), (512, 100 + more // 2), (4096, 100 + more))[: 3 if more else 1],
    )
    try:
        plan = plan_memory(footprint, room, Wish(most), staging)
    except DeviceError:
        return
    lent = int(((plan.n_slots - plan.n_kept) * footprint.expert_bytes).sum())
    kept = int((plan.n_kept * footprint.expert_bytes).sum())
    assert plan.n_bytes <= room
    assert (plan.n_kept <= plan.n_slots).all()
    assert plan.n_slots.max() <= 10
    if (plan.n_kept == 10).all():
        assert 500 + 70 + 100 + more + kept == plan.n_bytes
        return
    if not more:
        assert plan.streaming_bytes == lent == 0
        return
    in_long_steps = [(n, n_bytes + staging) for n, n_bytes in footprint.scratch[1:]]
    assert 500 + 70 + kept + in_long_steps[-1][1] <= plan.n_bytes
    assert 500 + 70 + kept + 100 + lent <= plan.n_bytes  # in decode
    for slot in plan.lent_slots:
        assert all(n_bytes <= slot.offset or n > slot.n_tokens for n, n_bytes in in_long_steps)
    without = slots_that_fit(room - 570 - max(100, in_long_steps[-1][1]), footprint.expert_bytes, 10, most)
    assert plan.slot_bytes >= (without * footprint.expert_bytes).sum() - max(sizes)  # lending never costs slots


@given(
    n_bytes=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    most=st.one_of(st.none(), st.integers(0, 12)),
)
def test_slots_fit_and_no_layer_could_have_one_more(n_bytes: int, sizes: list[int], most: int | None) -> None:
    expert_bytes, n_experts = np.array(sizes), 10
    n_slots = slots_that_fit(n_bytes, expert_bytes, n_experts, most)
    limit = n_experts if most is None else min(most, n_experts)
    rest = n_bytes - (n_slots * expert_bytes).sum()
    assert rest >= 0
    assert n_slots.max() <= limit
    assert n_slots.max() - n_slots.min() <= 1
    even = n_slots.min()
    assert all(n > even or n == limit or size > rest for n, size in zip(n_slots, sizes, strict=True))


def test_break_even_follows_from_the_bandwidths() -> None:
    assert Bandwidths(65e9, 25e9, 1008e9).break_even == pytest.approx(1.0689, abs=1e-4)
    assert Bandwidths(50e9, 25e9, 100e9).break_even == pytest.approx(2.0)
    assert Bandwidths(50e9, 25e9, 50e9).break_even == float("inf")


def test_the_footprint_counts_what_a_token_reads(models) -> None:
    footprint = measure(models("tiny").loaded.graph, LIMITS)
    assert footprint.n_layers == 8
    assert footprint.experts_used.tolist() == [4] * 8
    assert footprint.expert_total_bytes == 12_386_304
    assert footprint.attention_bytes(9) - footprint.attention_bytes(8) == pytest.approx(footprint.position_bytes)


def test_a_dense_model_runs_there_too(data) -> None:
    path = data / "peers" / "llama-Q8_0.gguf"
    with ModelRunner(path, max_tokens=16, context_length=LIMITS.context_length, n_threads=1) as runner:
        tokens = [token % runner.model.spec.n_vocab for token in TOKENS[:12]]
        expected = runner.logits(tokens)
        program = EmulatedDevice(MACHINE).compile(runner.model.graph, runner.weights, LIMITS)
        forward = ForwardPass(program, LIMITS, runner.model.spec.n_vocab)
        assert same_bits(forward.run(0, tokens, 0, "all"), expected)
        assert program.n_experts == 0
        assert program.time_spent.hits_s == program.time_spent.cpu_s == 0
        assert program.now() > 0
        program.close()
