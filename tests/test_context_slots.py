"""Slots in the memory of keys and values: where they are put, when they are lent, and on the emulated device no bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from cached_runner import Model, Setup
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import tiny_model_path
from engine.devices.context_slots import ALIGNMENT, ContextSlot, SequenceLengths, place_in_context
from engine.devices.emulated import HazardError
from engine.devices.footprint import measure
from engine.devices.graph import KVType
from engine.devices.lending import LentSlot, UsableSlots, place_lent
from engine.devices.placement import Wish, plan_memory
from engine.devices.program import Limits

TOKENS = np.random.default_rng(2).integers(5, 300, 48).tolist()


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> int:
    """The least positions that a slot must be there for, small enough for tests."""
    monkeypatch.setattr("engine.devices.context_slots.LEAST_POSITIONS", 3)
    return 3


@settings(max_examples=200)
@given(
    stretches=st.lists(st.sampled_from([64, 96, 256]), max_size=6),
    context_length=st.integers(1, 200),
    layers=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=5),
    most=st.integers(0, 9),
)
def test_slots_in_stretches_are_places_of_their_own(stretches, context_length, layers, most) -> None:
    sizes, n_slots = np.array([256 * size for size, _ in layers]), np.array([n for _, n in layers], np.intp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.devices.context_slots.LEAST_POSITIONS", 3)
        slots = place_in_context(stretches, context_length, sizes, n_slots, most)
    n_more = np.bincount([slot.layer for slot in slots], minlength=len(layers))
    assert (n_slots + n_more <= np.maximum(n_slots, most)).all()
    taken = sorted((slot.stretch, slot.offset, slot.offset + sizes[slot.layer]) for slot in slots)
    for (stretch, _, end), (next_stretch, start, _) in pairwise(taken):
        assert stretch < next_stretch or end <= start
    for slot in slots:
        assert 3 <= slot.n_positions <= slot.offset / stretches[slot.stretch] < slot.n_positions + 1
        assert slot.offset + sizes[slot.layer] + ALIGNMENT <= context_length * stretches[slot.stretch]
    for a, b in pairwise(slots):
        assert a.layer < b.layer or (a.layer == b.layer and a.n_positions >= b.n_positions)
    if len(set(sizes)) == 1:
        room = [context_length * s - ALIGNMENT - 3 * s for s in stretches]
        fit = sum(max(n_bytes, 0) // int(sizes[0]) for n_bytes in room)
        assert len(slots) == min(fit, int(np.maximum(most - n_slots, 0).sum()))
        grown = n_slots + n_more
        assert all(grown[layer] <= max(n, grown.min() + 1) for layer, n in enumerate(n_slots))


def test_layers_with_fewer_slots_get_those_that_stay_longest(least) -> None:
    slots = place_in_context([64, 64], 64, np.full(3, 1024), np.array([2, 0, 1]), 3)
    found = [(slot.layer, slot.n_positions) for slot in slots]
    assert found == [(0, 12), (1, 44), (1, 28), (1, 12), (2, 44), (2, 28)]


@given(
    in_contexts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), max_size=12),
    lent=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=6),
    n_positions=st.integers(0, 22),
    n_tokens=st.integers(0, 10),
)
def test_a_slot_is_usable_while_no_sequence_and_no_step_is_longer(in_contexts, lent, n_positions, n_tokens) -> None:
    n_kept = np.array([1, 0, 2])
    context_slots = [ContextSlot(layer, 0, 0, end) for layer, end in in_contexts]
    lent_slots = [LentSlot(layer, 0, end) for layer, end in lent]
    usable, expected = UsableSlots(n_kept, context_slots, lent_slots), []
    for layer in range(3):
        there = [end >= n_positions for la, end in in_contexts if la == layer]
        stay = [end >= n_tokens for la, end in lent if la == layer]
        expected.append([True] * n_kept[layer] + there + stay)
    longest = max(map(len, expected))
    assert usable.of(n_tokens, n_positions).tolist() == [row + [False] * (longest - len(row)) for row in expected]
    assert usable.of(n_tokens, n_positions) is usable.of(n_tokens, n_positions)
    assert usable.of(0, 0).sum(1).tolist() == [len(row) for row in expected]


def test_each_step_leaves_the_lent_slots_alone_that_lie_behind_its_memory() -> None:
    slots = place_lent(np.array([3, 0, 1]), np.array([10, 7, 20]), ((5, 0), (8, 15), (64, 30), (512, 45)))
    assert [(slot.layer, slot.offset, slot.n_tokens) for slot in slots] == [
        (0, 0, 5),
        (2, 10, 5),
        (0, 30, 64),
        (0, 40, 64),
    ]
    usable = UsableSlots(np.array([1, 0, 0]), [], slots)
    assert [usable.of(n, 0).sum(1).tolist() for n in (1, 5, 6, 64, 65)] == [
        [4, 0, 1],
        [4, 0, 1],
        [3, 0, 0],
        [3, 0, 0],
        [1, 0, 0],
    ]


def test_sequences_are_as_long_as_their_last_step_left_them() -> None:
    lengths, at = SequenceLengths(3), lambda *values: np.array(values, np.int32)
    assert lengths.longest_after(at(4), at(1)) == 5
    assert lengths.longest_after(at(), at()) == 0  # nothing was noted
    lengths.note(at(7, 8, 9, 0), at(0, 0, 0, 2))
    assert lengths.longest_after(at(3), at(1)) == 10
    lengths.note(at(20), at(2))
    assert lengths.longest_after(at(0), at(2)) == 10  # another one begins where that was
    lengths.note(at(0), at(2))
    assert lengths.longest_after(at(0), at(1)) == 10
    lengths.note(at(4), at(0))  # cut back
    assert lengths.longest_after(at(0), at(1)) == 5


def test_a_plan_puts_slots_into_contexts_only_where_there_is_something_to_choose(models) -> None:
    graph, most = models.loaded.graph, models.n_experts
    footprint = measure(graph, Limits(16, 2, 4096, KVType.F16))
    assert sum(footprint.stretches) * 4096 <= footprint.state_bytes
    everything = plan_memory(footprint, 10**12, Wish())
    assert not everything.context_slots
    room = footprint.dense_bytes + footprint.state_bytes + footprint.scratch_bytes + footprint.expert_total_bytes // 4
    some = plan_memory(footprint, room, Wish())
    assert some.n_bytes <= room
    assert some.context_slots
    assert "more of slots where no context has come yet" in some.describe()
    own = some.n_slots - np.bincount([slot.layer for slot in some.context_slots], minlength=len(some.n_slots))
    assert (some.n_kept <= own).all()
    assert some.usable.of(1, 4096).sum(1).tolist() == own.tolist()
    assert some.slot_bytes - some.context_bytes == (own * some.expert_bytes).sum()
    assert (plan_memory(footprint, room, Wish(hot_k=int(own.min()) + 1)).n_slots <= own.min() + 1).all()
    for wish in (Wish(hot_k=0), Wish(n_cpu_moe=len(some.n_slots) - 1)):
        assert not plan_memory(footprint, room + footprint.expert_total_bytes, wish).context_slots
    assert some.n_slots.max() <= most


@pytest.fixture(scope="module")
def models():
    model = Model(tiny_model_path())
    yield model
    model.close()


def test_slots_go_as_a_sequence_grows_and_come_back_with_the_next(models) -> None:
    setup = Setup((6,), "lru", bypass_n_tokens=64, outlast=(10, 20, 20))
    forward, cache, program = models.open(setup)
    expected = models.logits(models.open(Setup((0,)))[0], TOKENS, 1)
    for _ in range(2):
        for at, token in enumerate(TOKENS):
            logits = forward.run(0, [token], at, "last")
            assert np.array_equal(logits.view(np.uint32), expected[at : at + 1].view(np.uint32))
            n_gone = 0 if at < 10 else 1 if at < 20 else 3
            assert (cache.table.n_usable == 6 - n_gone).all()
            cache.table.check_integrity()
            if at == 9:
                assert cache.table.ready.sum(1).max() == 6
    cache.close()
    program.close()


def test_long_steps_leave_experts_in_contexts_alone(models) -> None:
    setup = Setup((7,), "lru", bypass_n_tokens=8, n_lent=(2,), outlast=(12, 40))
    forward, cache, program = models.open(setup)
    cache.fill(np.ones((models.n_layers, models.n_experts), np.float32), wait=True)
    held = cache.table.ready.copy()
    forward.run(0, TOKENS[:10], 0, "none")
    assert (cache.table.ready.sum(1) == 5).all()  # three that are kept and two in the context
    forward.run(0, TOKENS[10:20], 10, "none")
    assert (cache.table.ready.sum(1) == 4).all()
    assert (cache.table.ready <= held).all()
    forward.run(0, TOKENS[20:21], 20, "none")
    assert (cache.table.n_usable == 6).all()
    cache.close()
    program.close()


def test_a_sequence_that_is_put_back_takes_its_memory(models) -> None:
    setup = Setup((6,), "lru", bypass_n_tokens=64, outlast=(10, 20))
    forward, cache, program = models.open(setup)
    for at, token in enumerate(TOKENS[:29]):
        forward.run(0, [token], at, "none")
    saved = program.save_sequence(0, 29)
    expected = forward.run(0, TOKENS[29:30], 29, "last").copy()
    for at, token in enumerate(TOKENS[:10]):
        forward.run(0, [token], at, "last")
    assert cache.table.ready.sum(1).max() > 4
    with pytest.raises(HazardError, match=r"is lent while expert .* is published in it"):
        program.load_sequence(0, 29, saved)
    forward.program.load_sequence(0, 29, saved)
    assert (cache.table.n_usable == 4).all()
    logits = forward.run(0, TOKENS[29:30], 29, "last")
    assert np.array_equal(logits.view(np.uint32), expected.view(np.uint32))
    cache.close()
    program.close()
