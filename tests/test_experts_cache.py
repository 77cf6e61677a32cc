"""Slot table, swapper and the cache as a whole, on a device that finishes its work in any order and sometimes fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import pytest
from fake_slots import FakeSlots
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupter import Interrupter

from engine.devices.program import StagedProgram, Step
from engine.devices.timing import Bandwidths
from engine.experts import hot_cache as hot_cache_module
from engine.experts import slots as slots_module
from engine.experts import swapper as swapper_module
from engine.experts.cost import SwapBudget
from engine.experts.hot_cache import HotCache, why_useless
from engine.experts.policy import make_policy
from engine.experts.slots import SlotState, SlotTable
from engine.experts.swapper import FAILURES_IN_A_ROW, Swapper
from engine.experts.swaps import Swaps, hottest
from engine.experts.watched_program import WatchedProgram

N_LAYERS, N_EXPERTS, N_USED = 4, 10, 3
LONG = 8  # tokens of a step that passes the cache by, and uses the memory of slots
SIZES = np.array([100, 100, 150, 150])


def make_cache(
    slots: list[int],
    seed: int,
    policy: str = "adaptive",
    failing: float = 0.0,
    rate: float = 1e9,
    kept: list[int] | None = None,
    **options,
) -> tuple[HotCache, FakeSlots]:
    device = FakeSlots(N_EXPERTS, seed, slots, failing, kept, lends_from=LONG)
    table = SlotTable(np.array(slots), N_EXPERTS, SIZES)
    budget = SwapBudget(rate, int(SIZES.max()))
    return HotCache(device, table, make_policy(policy, N_LAYERS, N_EXPERTS), budget, **options), device


def tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    """Skewed routing of one step: [n_layers, n, n_used]."""
    scores = np.linspace(2, 0, N_EXPERTS) + rng.gumbel(size=(N_LAYERS, n, N_EXPERTS))
    return np.argsort(-scores, axis=2)[:, :, :N_USED]


def check(cache: HotCache, device: FakeSlots) -> None:
    cache.table.check_integrity()
    assert np.array_equal(device.where >= 0, cache.table.ready)
    for layer, expert in zip(*np.nonzero(cache.table.ready), strict=True):
        assert device.where[layer, expert] == cache.table.slot_of(layer, expert)


many_slots = st.lists(st.integers(0, N_EXPERTS), min_size=N_LAYERS, max_size=N_LAYERS)


@settings(max_examples=60)
@given(
    slots=many_slots,
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(["adaptive", "decayed:margin=0", "lru", "lfru", "static", "window_topk:interval=3"]),
    failing=st.sampled_from([0.0, 0.2, 0.9]),
    pace=st.sampled_from([0.1, 0.5, 1.0]),
    in_flight=st.integers(1, 9),
    lent=st.integers(0, 4),
    grows=st.booleans(),
)
def test_no_slot_is_read_too_early_or_overwritten_too_soon(
    slots, seed, policy, failing, pace, in_flight, lent, grows
) -> None:
    """The fake device asserts both; here we check the books around it, and that hits are counted as they happened."""
    kept = [max(n - lent, 0) for n in slots]
    cache, device = make_cache(slots, seed, policy, failing, kept=kept, max_in_flight=in_flight, bypass_n_tokens=LONG)
    rng = np.random.default_rng(seed)
    served = n_short = 0
    for i in range(25):
        is_long = i == 0 or rng.random() < 0.2
        routing = tokens(rng, LONG if is_long else 1)
        n_positions = int(rng.integers(lent + 1)) if grows else 0
        cache.make_room(routing.shape[1], n_positions)
        check(cache, device)
        if is_long:
            device.start_long_step()
        else:
            served += sum(device.start_step(routing[:, 0], n_positions))
            n_short += 1
        cache.observe(routing)
        device.finish(pace)
        cache.step(1.0)
        check(cache, device)
        assert len(device.copies) <= in_flight
    assert cache.statistics.hits.sum() == served
    cache.close()
    check(cache, device)
    assert not device.copies
    found = cache.statistics
    assert found.n_tokens == n_short
    assert found.n_loads + found.n_failures <= device.n_copies + device.n_refused
    assert lent or found.n_loads + found.n_failures >= device.n_copies


@settings(max_examples=150)
@given(slots=many_slots, lent=st.integers(0, 4), seed=st.integers(0, 2**32 - 1), at_line=st.integers(1, 3000))
def test_an_interrupt_at_any_line_leaves_a_cache_that_goes_on(slots, lent, seed, at_line) -> None:
    cache, device = make_cache(slots, seed, "lru", kept=[max(n - lent, 0) for n in slots], bypass_n_tokens=LONG)
    rng = np.random.default_rng(seed)
    interrupter = Interrupter(at_line, (hot_cache_module, slots_module, swapper_module))
    for i in range(14):
        routing = tokens(rng, LONG if i % 5 < 2 else 1)
        try:
            with interrupter:
                cache.make_room(routing.shape[1], 0)
        except KeyboardInterrupt:
            cache.make_room(routing.shape[1], 0)
            check(cache, device)
        if routing.shape[1] == LONG:
            device.start_long_step()
        else:
            device.start_step(routing[:, 0])
        device.finish(0.6)
        try:
            with interrupter:
                cache.observe(routing)
                cache.step(1.0)
        except KeyboardInterrupt:
            cache.step(1.0)
        check(cache, device)
    assert interrupter.raised == (interrupter.n_lines >= at_line)
    cache.close()
    check(cache, device)


def test_lent_slots_come_back_when_no_step_needs_them_and_are_filled_at_once() -> None:
    """All parts of a prompt find them lent; what lies in the slots that are kept stays; free ones cost no budget."""
    cache, device = make_cache([4, 4, 2, 0], 1, kept=[2, 1, 2, 0], bypass_n_tokens=LONG)
    rng = np.random.default_rng(1)

    def run(n_tokens: int) -> None:
        routing = tokens(rng, n_tokens)
        cache.make_room(n_tokens, 0)
        if n_tokens >= LONG:
            device.start_long_step()
        else:
            device.start_step(routing[:, 0])
        cache.observe(routing)
        for _ in range(3):
            cache.step(1.0)
            device.finish(1.0)
        cache.step(0.0)
        check(cache, device)

    def residents() -> list[set[tuple[int, int]]]:
        found = np.argwhere(cache.table.ready).tolist()
        slots = [(layer, e, cache.table.slot_of(layer, e)) for layer, e in found]
        return [{(la, e) for la, e, slot in slots if (slot < device.n_kept[la]) == kept} for kept in (True, False)]

    for _ in range(3):
        run(LONG)
        assert cache.table.ready.sum(1).tolist() == [2, 1, 2, 0]
    loads = cache.statistics.n_loads
    assert loads == 5  # nothing was filled that a next part would have emptied
    run(1)
    assert cache.table.ready.sum(1).tolist() == [4, 4, 2, 0]
    kept, lent = residents()
    assert len(lent) == 5
    cache.make_room(LONG, 0)
    check(cache, device)
    assert residents() == [kept, set()]
    cache.make_room(LONG, 0)
    device.start_long_step()
    cache.make_room(1, 0)
    assert residents() == [kept, set()]
    run(1)
    assert cache.table.ready.sum(1).tolist() == [4, 4, 2, 0]


def test_a_first_fill_that_is_not_over_ends_when_slots_are_lent() -> None:
    cache, device = make_cache([4] * N_LAYERS, 1, kept=[1] * N_LAYERS, bypass_n_tokens=4, max_in_flight=2)
    rng = np.random.default_rng(1)
    cache.make_room(4, 0)
    cache.observe(tokens(rng, 4))  # it fills the slots, and needs none of their memory
    cache.make_room(1, 0)
    cache.observe(tokens(rng, 1))  # from now on a prompt fills no slots
    for n_tokens, n_ready in ((LONG, 1), (1, 4)):
        cache.make_room(n_tokens, 0)
        cache.observe(tokens(rng, n_tokens))
        for _ in range(20):
            device.finish(1.0)
            cache.step(1.0)
            check(cache, device)
        assert (cache.table.ready.sum(1) == n_ready).all()


@pytest.mark.parametrize("is_copying", [False, True])
def test_an_expert_on_its_way_into_a_slot_that_is_lent_is_given_up(is_copying: bool) -> None:
    cache, device = make_cache([3, 0, 0, 0], 1, "static", kept=[2, 0, 0, 0], bypass_n_tokens=LONG)
    rng = np.random.default_rng(1)
    device.start_step(tokens(rng, 1)[:, 0])
    cache.observe(tokens(rng, 1))
    cache.step(1.0)
    if is_copying:
        device.end_steps()
    cache.step(0.0)
    assert len(device.copies) == (3 if is_copying else 0)
    cache.make_room(LONG, 0)
    device.start_long_step()
    check(cache, device)
    device.finish(1.0)
    cache.step(0.0)
    device.finish(1.0)
    cache.step(0.0)
    check(cache, device)
    assert cache.table.ready.sum() == cache.statistics.n_loads == 2


def test_a_failed_copy_costs_one_warning_and_three_in_a_row_stop_the_swaps(caplog) -> None:
    cache, device = make_cache([5] * N_LAYERS, 0, "lru", failing=2.0)
    rng = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            cache.observe(tokens(rng, 1))
            device.finish(1.0)
            cache.step(1.0)
            check(cache, device)
    assert len(caplog.records) == 2
    assert "could not be copied" in caplog.records[0].message
    assert "swaps no more" in caplog.records[1].message
    assert cache.statistics.n_failures >= FAILURES_IN_A_ROW
    assert cache.statistics.n_loads == 0
    assert "frozen" in cache.describe()
    calls = device.n_calls
    cache.observe(tokens(rng, 1))
    cache.step(1.0)
    assert device.n_calls == calls


def test_a_victim_stays_readable_until_the_step_that_reads_it_is_done() -> None:
    device = FakeSlots(4, 0, [1])
    table = SlotTable(np.array([1]), 4, np.array([8]))
    swapper = Swapper(device, table)

    def swap(load: int, evict: int) -> Swaps:
        return Swaps(np.array([0]), np.array([load]), np.array([evict]), np.ones(1, np.float32))

    swapper.submit(swap(2, -1))
    swapper.poll()
    device.finish(1.0)
    swapper.poll()
    assert device.start_step(np.array([[2]])) == [True]
    swapper.submit(swap(3, 2))
    swapper.poll()
    assert table.slot(0, 0).state is SlotState.RETIRING
    assert device.n_copies == 1
    assert device.start_step(np.array([[2]])) == [False]
    device.finish(1.0)
    swapper.poll()
    assert table.slot(0, 0).state is SlotState.LOADING
    assert device.start_step(np.array([[3]])) == [False]
    device.finish(1.0)
    swapper.poll()
    assert device.start_step(np.array([[3]])) == [True]


def test_what_has_arrived_is_published_and_nothing_else_is_begun() -> None:
    cache, device = make_cache([3] * N_LAYERS, 0, "lru")
    rng = np.random.default_rng(0)

    def token() -> np.ndarray:
        routing = tokens(rng, 1)
        device.start_step(routing[:, 0])
        cache.observe(routing)
        return routing

    token()
    device.finish(1.0)
    cache.step(1.0)
    first = device.n_copies
    token()
    cache.step(1.0)  # the step that reads the victims still runs: nothing may be copied over them
    device.finish(1.0)
    assert not cache.table.ready.any()
    cache.publish_arrivals()
    check(cache, device)
    assert cache.table.ready.sum() == first == device.n_copies
    assert cache.table.held.sum() >= first


def test_no_copy_is_begun_while_somebody_waits() -> None:
    cache, device = make_cache([3] * N_LAYERS, 0, "lru")
    rng = np.random.default_rng(0)
    cache.observe(tokens(rng, 1))
    with cache.held():
        cache.step(1.0)
        assert cache.go_on()
        assert device.n_copies == 0
        assert cache.table.held.any()
    assert cache.go_on()
    first = device.n_copies
    assert first > 0
    device.finish(1.0)
    with cache.held():
        assert not cache.go_on()
    check(cache, device)
    assert cache.table.ready.sum() == first == device.n_copies


class Stepping(StagedProgram):
    """A program whose steps choose at random and note in `calls` that they ran."""

    runs_ahead = True

    def __init__(self, device: FakeSlots, calls: list[str]) -> None:
        self.device, self.calls, self.rng, self.n_hits = device, calls, np.random.default_rng(0), 0
        self.under_way: list[np.ndarray] = []

    def prepare(self, step: Step) -> None:
        pass

    def launch(self) -> None:
        self.calls.append("run")
        self.under_way.append(tokens(self.rng, 1))
        chosen = self.under_way[-1]
        self.n_hits += sum(self.device.where[layer, e] >= 0 for layer in range(N_LAYERS) for e in chosen[layer, 0])

    def finish_layers(self) -> None:
        pass

    def collect(self) -> tuple[np.ndarray, np.ndarray]:
        self.chosen = self.under_way.pop(0)
        return np.zeros(1, np.int32), np.zeros((1, 1), np.float32)

    def routing(self) -> np.ndarray:
        return self.chosen

    def drop(self) -> None:
        self.under_way.clear()


@pytest.mark.parametrize("in_background", [False, True])
def test_arrivals_are_published_before_a_step_if_nobody_else_does(monkeypatch, in_background: bool) -> None:
    cache, device = make_cache([3] * N_LAYERS, 0)
    calls: list[str] = []
    publish = cache.publish_arrivals
    monkeypatch.setattr(cache, "publish_arrivals", lambda: (calls.append("publish"), publish()))
    program = Stepping(device, calls)
    watched = WatchedProgram(program, cache, in_background=in_background)
    nothing = np.zeros(1, np.int32)
    for _ in range(6):
        watched.run(nothing, nothing, nothing, nothing)
        watched.settle()
        device.finish(1.0)
    assert calls == (["publish", "run"] if in_background else ["run"]) * 6
    assert cache.statistics.hits.sum() == program.n_hits > 0
    check(cache, device)
    watched.close()


@pytest.mark.parametrize("kept", [N_EXPERTS, N_EXPERTS - 1])
def test_a_policy_is_asked_for_nothing_where_every_expert_is_in_a_slot_for_good(kept: int) -> None:
    """Where a step may borrow one, it must know whom to put back."""
    cache, device = make_cache([N_EXPERTS] * N_LAYERS, 0, kept=[kept] * N_LAYERS)
    rng, told = np.random.default_rng(1), []
    observe = cache.policy.observe
    cache.policy.observe = lambda chosen: (told.append(chosen), observe(chosen))
    cache.fill(np.ones((N_LAYERS, N_EXPERTS), np.float32))
    n_before = 0
    while not cache.table.ready.all():
        cache.observe(tokens(rng, 1))
        cache.step(1.0)
        device.finish(1.0)
        n_before += 1
    assert len(told) == n_before > 0
    cache.reset_statistics()
    for _ in range(20):
        cache.observe(tokens(rng, 2))
        assert cache.step(1.0) == 0
    assert len(told) == n_before + (kept < N_EXPERTS) * 40
    statistics = cache.statistics
    assert (statistics.n_tokens, statistics.hit_rate, statistics.n_loads) == (40, 1.0, 0)
    assert (statistics.choices == 40 * N_USED).all()
    check(cache, device)


def test_the_first_prompt_fills_the_slots_and_later_ones_evict_nothing() -> None:
    cache, device = make_cache([3] * N_LAYERS, 1, bypass_n_tokens=16)
    rng = np.random.default_rng(1)
    prompt = tokens(rng, 64)
    cache.observe(prompt)
    for _ in range(5):
        device.finish(1.0)
        cache.step(0.0)  # a first fill needs no budget
    policy = make_policy("adaptive", N_LAYERS, N_EXPERTS)
    for chosen in prompt.transpose(1, 0, 2):
        policy.observe(chosen)
    wanted = hottest(policy.heat, np.full(N_LAYERS, 3))
    assert np.array_equal(cache.table.ready, wanted)
    assert cache.statistics.choices.sum() == 0
    cache.observe(tokens(rng, 1))
    copies = device.n_copies
    cache.observe(N_EXPERTS - 1 - tokens(rng, 64))
    assert device.n_copies == copies


@pytest.mark.parametrize("seeds", [True, False])
def test_whether_a_prompt_counts_as_heat_is_a_switch(seeds: bool) -> None:
    cache, _ = make_cache([3] * N_LAYERS, 1, bypass_n_tokens=16, prompt_seeds_heat=seeds)
    cache.observe(tokens(np.random.default_rng(0), 32))
    assert bool(cache.policy.heat.any()) is seeds


def test_a_budget_holds_swaps_back_and_what_is_left_is_kept() -> None:
    budget = SwapBudget(1000.0, 150, share=0.5)
    budget.grant(0.1)
    assert budget.allowance == 50
    for _ in range(10):
        budget.grant(0.1)
    assert budget.allowance == 150  # one expert, however slow the link is
    budget.spend(150)
    budget.grant(1.0)
    budget.grant(1.0)
    budget.grant(1.0)
    assert budget.allowance == 1000  # two tokens' worth, no burst after a pause
    budget.spend(1000)
    budget.grant(1.0, whole=True)
    assert budget.allowance == 1000
    cache, device = make_cache([3, 0, 0, 0], 1, "lru", rate=100.0)
    rng = np.random.default_rng(1)

    def bytes_after(n_tokens: int) -> int:
        for _ in range(n_tokens):
            cache.observe(tokens(rng, 1))
            device.finish(1.0)
            cache.step(1.0)
        device.finish(1.0)
        cache.step(0.0)
        return cache.statistics.loaded_bytes

    assert bytes_after(3) == 300  # free slots are filled as fast as the link goes, all others at half of that
    assert bytes_after(40) == pytest.approx(300 + 40 * 50, abs=150)


def test_a_cache_that_cannot_pay_says_why() -> None:
    assert why_useless(Bandwidths(65e9, 25e9, 60e9).break_even, np.array([4]), 2) is not None
    assert "less than one token's 8" in why_useless(1.1, np.array([6, 7]), 8)
    assert why_useless(1.1, np.array([8, 7]), 8) is None


def test_one_line_says_what_the_cache_does() -> None:
    cache, device = make_cache([3, 3, 4, 4], 1, kept=[3, 3, 3, 3], bypass_n_tokens=16)
    line = (
        "hot-expert cache: 3 to 4 of 10 experts in each of 4 layers (35%, 0.0 MB), about 84% hits expected; swaps may"
    )
    assert cache.describe().startswith(line)
    cache.observe(tokens(np.random.default_rng(0), 1))
    assert cache.describe().endswith("0% hits, 0.0 swaps a token")
    cache.make_room(1, 1)
    assert cache.describe().endswith("swaps a token; 2 slots are lent to the prompt or the context")
    off, _ = make_cache([0] * N_LAYERS, 1)
    assert off.describe().startswith("hot-expert cache off: no layer has a slot")
    off.observe(tokens(np.random.default_rng(0), 40))
    off.observe(tokens(np.random.default_rng(0), 1))
    assert off.step(1.0) == 0
    assert not device.copies


def test_statistics_can_start_afresh() -> None:
    cache, device = make_cache([5] * N_LAYERS, 3, "lru")
    rng = np.random.default_rng(3)
    for _ in range(5):
        cache.observe(tokens(rng, 1))
        device.finish(1.0)
        cache.step(1.0)
    before = cache.statistics
    assert before.n_tokens == 5
    assert before.n_loads > 0
    assert before.loaded_bytes >= 100 * before.n_loads
    cache.reset_statistics()
    after = cache.statistics
    assert (after.n_tokens, after.n_loads, after.loaded_bytes, int(after.choices.sum())) == (0, 0, 0, 0)


class Passing(Stepping):
    """Each step passes all layers as soon as a swap waits for it, and is over when what waited is copied."""

    def __init__(self, device: FakeSlots, cache: HotCache) -> None:
        super().__init__(device, [])
        self.cache, self.n_copies = cache, 0

    def launch(self) -> None:
        super().launch()
        self.device.start_step(self.under_way[-1][:, 0])

    def finish_layers(self) -> None:
        device, n_before = self.device, self.n_copies
        if len(self.calls) > 1:
            self._wait(lambda: self.cache._swapper._fenced or device.n_copies > n_before)
            device.steps[-1].n_passed = N_LAYERS
            self._wait(lambda: device.n_copies > n_before and not self.cache._swapper._fenced)
        self.n_copies = device.n_copies

    @staticmethod
    def _wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "nothing is copied while the step runs"
            time.sleep(1e-3)


def test_a_slot_is_filled_while_the_step_runs_that_may_have_read_it() -> None:
    """So the expert is there for the next one."""
    cache, device = make_cache([3] * N_LAYERS, 0, "lru")
    watched = WatchedProgram(Passing(device, cache), cache, in_background=True)
    nothing = np.zeros(1, np.int32)
    for _ in range(8):
        watched.run(nothing, nothing, nothing, nothing)
        device.finish(1.0)
    watched.close()
    cache.close()
    check(cache, device)


class Launching(Stepping):
    """Each step lets go of the interpreter before it has nothing more to do but wait, and then waits."""

    def launch(self) -> None:
        time.sleep(0.02)
        super().launch()

    def finish_layers(self) -> None:
        time.sleep(0.02)


def test_the_thread_leaves_the_interpreter_to_a_step_that_is_being_launched(monkeypatch) -> None:
    """Else it would hold it for as long as it plans swaps, as soon as the step is launched by a call of the driver."""
    cache, device = make_cache([3] * N_LAYERS, 0)
    calls: list[str] = []
    observe = cache.observe
    monkeypatch.setattr(cache, "observe", lambda *step: (calls.append("look"), observe(*step)))
    program = Launching(device, calls)
    watched = WatchedProgram(program, cache, in_background=True)
    nothing = np.zeros(1, np.int32)
    for _ in range(4):
        watched.run(nothing, nothing, nothing, nothing)
    watched.close()
    looks = [i for i, call in enumerate(calls) if call == "look"]
    assert [calls[:i].count("run") for i in looks] == [2, 3, 4]  # each at the step before, beside the next one


def test_an_error_in_the_thread_is_raised_by_the_step_beside_it(monkeypatch) -> None:
    cache, device = make_cache([3] * N_LAYERS, 0)
    watched = WatchedProgram(Stepping(device, []), cache, in_background=True)
    nothing = np.zeros(1, np.int32)
    watched.run(nothing, nothing, nothing, nothing)

    def fail(*_: object) -> None:
        raise RuntimeError("no step")

    monkeypatch.setattr(cache, "step", fail)
    with pytest.raises(RuntimeError, match="no step"):  # noqa: PT012 - the thread may be a step late
        for _ in range(100):
            watched.run(nothing, nothing, nothing, nothing)
            time.sleep(1e-3)
    watched.close()
