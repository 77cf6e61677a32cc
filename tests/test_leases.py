"""Slots: who gets which, what is reused, and that nothing is reused that a stopped step left half done."""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DeviceError, RequestError
from engine.generate.leases import SlotTable
from engine.generate.snapshots import Snapshots, likely_places


class FakeForward:
    """Records what would be run; can be told to stop in the middle."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[int], int]] = []
        self.fails = False

    def check(self, position, n_tokens):
        pass

    def run(self, slot, token_ids, position, outputs, progress):
        if self.fails:
            raise KeyboardInterrupt
        self.steps.append((slot, list(token_ids), position))
        return np.zeros((1, 1), np.float32)


def run(table: SlotTable, forward: FakeForward, tokens: list[int]) -> tuple[int, int]:
    """Run a sequence as an engine does; return its slot and the tokens reused."""
    with table.borrow(tokens) as lease:
        n_held = lease.n_held
        lease.extend(forward, tokens[n_held:])
        assert lease.n_held == len(tokens)
        return lease.slot, n_held


def test_keys_and_values_are_cut_back_to_the_common_prefix() -> None:
    table, forward = SlotTable(1, cuts_back=None), FakeForward()
    assert run(table, forward, [1, 2, 3, 4]) == (0, 0)
    assert run(table, forward, [1, 2, 9]) == (0, 2)
    assert run(table, forward, [1, 2, 9]) == (0, 2)  # the last token is run again, for its logits
    assert run(table, forward, [1, 2, 9, 10]) == (0, 3)
    assert run(table, forward, [7]) == (0, 0)
    assert forward.steps[1] == (0, [9], 2)


def test_a_recurrent_state_is_only_continued() -> None:
    table, forward = SlotTable(1, cuts_back=0), FakeForward()
    run(table, forward, [1, 2, 3])
    assert run(table, forward, [1, 2, 3, 4]) == (0, 3)
    assert run(table, forward, [1, 2, 3, 4]) == (0, 0)  # nothing new: the state is one token too far
    assert run(table, forward, [1, 2]) == (0, 0)
    assert run(table, forward, [1, 9, 3]) == (0, 0)


def test_the_best_slot_is_chosen_then_the_oldest() -> None:
    table, forward = SlotTable(3, cuts_back=None), FakeForward()
    assert [run(table, forward, [i, i, i])[0] for i in (1, 2, 3)] == [0, 1, 2]
    assert run(table, forward, [2, 2, 2, 5]) == (1, 3)
    assert run(table, forward, [9]) == (0, 0)  # unused for longest


@pytest.mark.parametrize("cuts_back", [None, 0, 1, 2])
def test_a_step_that_was_stopped_leaves_nothing_false(cuts_back: int | None) -> None:
    table, forward = SlotTable(1, cuts_back=cuts_back), FakeForward()
    run(table, forward, [1, 2, 3])
    forward.fails = True
    with pytest.raises(KeyboardInterrupt):
        run(table, forward, [1, 2, 3, 4, 5])
    forward.fails = False
    # Keys and values of the first three tokens are untouched; a state, or the row of one of them, may be another's.
    assert run(table, forward, [1, 2, 3, 4, 5]) == (0, 3 if cuts_back in {None, 2} else 0)


def test_reuse_can_be_turned_off() -> None:
    table, forward = SlotTable(1, cuts_back=None), FakeForward()
    run(table, forward, [1, 2, 3])
    with table.borrow([1, 2, 3, 4], reuse=False) as lease:
        assert lease.n_held == 0


def test_waiting_for_oneself_is_an_error() -> None:
    table = SlotTable(2, cuts_back=None)
    with table.borrow([1]), table.borrow([2]), pytest.raises(RequestError, match=r"all 2 sequences.*n_sequences"):
        table.borrow([3])
    table.borrow([3]).close()


def test_another_thread_is_waited_for() -> None:
    table = SlotTable(1, cuts_back=None)
    lease, got = table.borrow([1]), threading.Event()

    def borrow() -> None:
        with table.borrow([2]):
            got.set()

    thread = threading.Thread(target=borrow)
    thread.start()
    assert not got.is_set()
    lease.close()
    lease.close()  # closing twice gives nothing back twice
    thread.join(10)
    assert got.is_set()


class FakeStates:
    """States of a device whose only layer is recurrent: each is the tokens that made it."""

    def __init__(self, n_slots: int) -> None:
        self.states: list[list[int]] = [[] for _ in range(n_slots)]

    def save_states(self, slot: int, n_tokens: int) -> np.ndarray:
        return np.array(self.states[slot], np.uint8)

    def load_states(self, slot: int, n_tokens: int, saved: np.ndarray) -> None:
        self.states[slot] = saved.tolist()

    def check(self, position, n_tokens):
        pass

    def run(self, slot, token_ids, position, outputs, progress):
        if position == 0:
            self.states[slot] = []
        assert len(self.states[slot]) == position
        self.states[slot] += token_ids
        return np.zeros((1, 1), np.float32)


@given(
    st.integers(0, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 6)), max_size=25),
)
def test_a_state_is_always_that_of_what_the_slot_holds(
    max_snapshots: int, n_slots: int, sequences: list[tuple[list[int], int]]
) -> None:
    device = FakeStates(n_slots)
    snapshots = Snapshots(device, nullcontext(), max_snapshots)
    table = SlotTable(n_slots, cuts_back=0, snapshots=snapshots)
    for tokens, place in sequences:
        with table.borrow(tokens) as lease:
            assert list(lease.token_ids) == tokens[: lease.n_held]
            assert lease.n_held < len(tokens)
            if lease.n_held < place < len(tokens):
                lease.extend(device, tokens[lease.n_held : place])
                lease.remember()
            lease.extend(device, tokens[lease.n_held :])
            assert device.states[lease.slot] == tokens
        assert len(snapshots._kept) <= max_snapshots


def test_the_snapshot_unused_for_longest_makes_room() -> None:
    device = FakeStates(1)
    snapshots = Snapshots(device, nullcontext(), 2)
    table = SlotTable(1, cuts_back=0, snapshots=snapshots)
    with table.borrow([1, 2, 3, 4]) as lease:
        for token in (1, 2, 3):
            lease.extend(device, [token])
            lease.remember()
    assert [snapshots.best([1, 2, 3, 4][:n]) for n in range(5)] == [0, 0, 2, 3, 3]
    assert [snapshots.best(tokens) for tokens in ([1, 2, 9], [2, 3], [1, 258])] == [2, 0, 0]
    assert snapshots.n_bytes == 2 + 3
    assert snapshots.restore(0, [1, 2])
    snapshots.take(0, [1, 2, 9])
    assert [snapshots.best(tokens) for tokens in ([1, 2, 3], [1, 2, 9])] == [2, 3]
    assert not snapshots.restore(0, [1, 2, 3])
    assert snapshots.restore(0, [1, 2])
    snapshots.take(0, [1, 2, 9])  # is there: no other copy, and the last that makes room
    snapshots.take(0, [1])
    assert [snapshots.best(tokens) for tokens in ([1, 2, 3], [1, 2, 9])] == [1, 3]


def test_a_copy_serves_every_slot_that_holds_its_tokens() -> None:
    device = FakeStates(2)
    table = SlotTable(2, cuts_back=0, snapshots=Snapshots(device, nullcontext(), 1))
    with table.borrow([1, 2, 3, 4]) as one, table.borrow([1, 2, 5, 6]) as other:
        one.extend(device, [1, 2])
        one.remember()
        one.extend(device, [3, 4])
        other.extend(device, [1, 2, 5, 6])
    for end in (7, 8):
        with table.borrow([1, 2, end]) as one, table.borrow([1, 2, end]) as other:
            assert one.n_held == other.n_held == 2
            for lease in (one, other):
                lease.extend(device, [end])
                assert device.states[lease.slot] == [1, 2, end]


def test_a_copy_that_is_gone_meanwhile_means_to_begin_anew(monkeypatch) -> None:
    device = FakeStates(1)
    table = SlotTable(1, cuts_back=0, snapshots=Snapshots(device, nullcontext(), 1))
    with table.borrow([1, 2, 3]) as lease:
        lease.extend(device, [1, 2])
        lease.remember()
        lease.extend(device, [3])
    monkeypatch.setattr(table.snapshots, "best", lambda _: 1)  # as another thread made room after it had looked
    with table.borrow([1, 2, 4]) as lease:
        assert lease.n_held == 0
        lease.extend(device, [1, 2, 4])


def test_a_device_that_cannot_go_back_leaves_the_slot_empty() -> None:
    device = FakeStates(1)
    table = SlotTable(1, cuts_back=0, snapshots=Snapshots(device, nullcontext(), 2))
    with table.borrow([1, 2, 3]) as lease:
        lease.extend(device, [1, 2])
        lease.remember()
        lease.extend(device, [3])
        lent = lease.lend([1, 2, 3, 4])
        lent.begin(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "load_states", lambda *_: (_ for _ in ()).throw(DeviceError("it is gone")))
            lent.close()
            assert lease.n_held == 0
    with table.borrow([1, 2, 3]) as lease:
        assert lease.n_held == 0


@pytest.mark.parametrize(
    ("prompt", "end"),
    [([9, 1, 2], 1), ([1, 9, 2, 3], 2), ([1, 9, 2, 9], 2), ([1, 9, 9, 2, 2], 3), ([1, 2], 0), ([1], 0), ([9], 0)],
)
def test_where_the_next_prompt_may_leave_this_one(prompt: list[int], end: int) -> None:
    assert likely_places(prompt, {9}, 0, 0, 512) == [end] * (end > 0)
    assert likely_places(prompt, {9}, 2, 0, 512) == [end] * (end > 2)


@pytest.mark.parametrize(
    ("n_before", "n_after", "n_held", "at_once", "end"),
    [
        (100, 64, 0, 512, 100),  # the head of an answer
        (100, 65, 0, 512, 163),  # one step more, in which all experts are read
        (500, 100, 0, 512, 500),  # two steps, wherever they are cut
        (500, 600, 0, 512, 500),
        (400, 600, 0, 512, 998),  # three instead of two
        (600, 400, 0, 512, 998),
        (600, 400, 89, 512, 600),
        (400, 600, 400, 512, None),  # is there
    ],
)
def test_a_long_rest_of_a_prompt_is_not_worth_a_step_more(
    n_before: int, n_after: int, n_held: int, at_once: int, end: int | None
) -> None:
    prompt = [*[1] * (n_before - 1), 9, *[2] * n_after]
    assert likely_places(prompt, {9}, n_held, 0, at_once) == [end] * (end is not None)


@pytest.mark.parametrize(
    ("n_held", "n_common", "places"),
    [(0, 63, [98]), (0, 64, [98, 64]), (33, 96, [98]), (32, 96, [98, 96]), (0, 98, [98]), (98, 99, [])],
)
def test_where_a_prompt_left_the_one_before_others_may_too(n_held: int, n_common: int, places: list[int]) -> None:
    assert likely_places([1] * 100, {9}, n_held, n_common, 512) == places


def test_a_lease_tells_what_is_common_even_if_it_is_of_no_use() -> None:
    table, forward = SlotTable(1, cuts_back=0), FakeForward()
    with table.borrow([1, 2, 3, 4]) as lease:
        assert (lease.n_held, lease.n_common) == (0, 0)
        lease.extend(forward, [1, 2, 3, 4])
        with lease.lend([1, 2, 3, 5]) as lent:
            assert (lent.n_held, lent.n_common) == (0, 3)
            lent.extend(forward, [1, 2, 3, 5])
    with table.borrow([1, 2, 3, 5]) as lease:
        assert (lease.n_held, lease.n_common) == (0, 3)
    assert table.common(0, ()) == 0


class FakeRings:
    """Keys of a device whose only layer has a window of three tokens; positions six apart share a row."""

    WINDOW, N_ROWS, MAX_TOKENS = 3, 6, 3
    CUTS_BACK = N_ROWS - WINDOW + 1

    def __init__(self, n_slots: int) -> None:
        self.rows = np.full((n_slots, self.N_ROWS), -1)
        self.tokens: list[list[int]] = [[] for _ in range(n_slots)]
        self.steps_to_go = 0

    def seen(self, n_tokens: int) -> np.ndarray:
        return np.arange(max(0, n_tokens - self.WINDOW), n_tokens)

    def save_states(self, slot: int, n_tokens: int) -> np.ndarray:
        return self.rows[slot, self.seen(n_tokens) % self.N_ROWS].astype(np.uint8)

    def load_states(self, slot: int, n_tokens: int, saved: np.ndarray) -> None:
        self.rows[slot, self.seen(n_tokens) % self.N_ROWS] = saved

    def check(self, position, n_tokens):
        pass

    def run(self, slot, token_ids, position, outputs, progress):
        self.tokens[slot][position:] = token_ids
        for start in range(position, position + len(token_ids), self.MAX_TOKENS):
            new = self.tokens[slot][start : start + self.MAX_TOKENS]
            self.rows[slot, np.arange(start, start + len(new)) % self.N_ROWS] = new
            if self.steps_to_go == 0:
                raise KeyboardInterrupt
            self.steps_to_go -= 1
            for n in range(start + 1, start + len(new) + 1):
                seen = self.seen(n)
                assert self.rows[slot, seen % self.N_ROWS].tolist() == [self.tokens[slot][i] for i in seen]
        return np.zeros((1, 1), np.float32)


@given(
    st.integers(0, 3),
    st.integers(1, 2),
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, 16), st.integers(0, 8)),
        min_size=1,
        max_size=25,
    ),
)
def test_a_token_always_sees_the_rows_of_its_window(
    max_snapshots: int, n_slots: int, sequences: list[tuple[int, int, int, int]]
) -> None:
    """Zeros, then ones; each stops to be remembered somewhere, and in the middle of a step if it has so many."""
    device = FakeRings(n_slots)
    snapshots = Snapshots(device, nullcontext(), max_snapshots)
    table = SlotTable(n_slots, cuts_back=device.CUTS_BACK, snapshots=snapshots)
    for n_zeros, n_ones, place, device.steps_to_go in sequences:
        tokens = [0] * n_zeros + [1] * n_ones
        with suppress(KeyboardInterrupt), table.borrow(tokens) as lease:
            held = list(lease.token_ids)
            assert held == tokens[: len(held)]
            if lease.n_held < place < len(tokens):
                lease.extend(device, tokens[lease.n_held : place])
                lease.remember()
            lease.extend(device, tokens[lease.n_held :])


def test_a_sequence_in_rings_is_cut_back_by_some_tokens() -> None:
    table, device = SlotTable(1, cuts_back=FakeRings.CUTS_BACK), FakeRings(1)
    device.steps_to_go = 100
    assert run(table, device, [0] * 9) == (0, 0)
    assert run(table, device, [*[0] * 5, 1, 1]) == (0, 5)
    assert run(table, device, [*[0] * 5, 1, 2]) == (0, 6)
    assert run(table, device, [*[0] * 4, 2]) == (0, 0)  # of the nine tokens that there were, five are sure


def test_a_sequence_from_a_file_is_not_cut_back() -> None:
    for cuts_back, n_usable in ((None, 2), (4, 0), (0, 0)):
        table = SlotTable(1, cuts_back=cuts_back)
        with table.borrow(()) as lease:
            lease.begin(3)
            lease.commit([1, 2, 3], is_whole=False)
        assert table.usable(0, [1, 2, 3, 4]) == 3
        assert table.usable(0, [1, 2, 4]) == n_usable


@given(
    st.booleans(),
    st.integers(1, 3),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=25),
)
def test_what_a_slot_holds_is_always_what_was_run(can_cut_back: bool, n_slots: int, sequences: list[list[int]]) -> None:
    table, forward = SlotTable(n_slots, cuts_back=None if can_cut_back else 0), FakeForward()
    for tokens in sequences:
        run(table, forward, tokens)
    contents: list[list[int]] = [[] for _ in range(n_slots)]  # what a device would hold
    for (slot, new, position), tokens in zip(forward.steps, sequences, strict=True):
        assert position <= len(contents[slot])
        assert can_cut_back or position in {0, len(contents[slot])}
        del contents[slot][position:]
        contents[slot] += new
        assert contents[slot] == tokens
