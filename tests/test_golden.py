"""Whole models against logits that llama.cpp computed, by the tolerances that come with the golden files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cached_runner import SETUPS, Setup
from golden_files import ALL_FILES
from golden_model import F32_FLOOR, FLOOR, GoldenModel, open_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from model_runner import ModelRunner, divergence

from engine import _kernels
from engine.devices.graph import KVType

KV_F16 = {True: 5e-6, False: 3e-5}  # mean divergence that keys and values in f16 may add, F32 file or not
MARGIN, MARGIN_SIGMOID = 0.1, 0.01  # experts are compared where the last chosen one leads by this much


@pytest.fixture(scope="module", params=ALL_FILES, ids=lambda name: name.partition("/")[2])
def golden(request: pytest.FixtureRequest, golden_path) -> Iterator[GoldenModel]:
    with open_golden(golden_path(request.param + ".npz")) as golden:
        yield golden


def test_prompt_in_one_batch(golden: GoldenModel) -> None:
    logits = golden.runner.logits(golden.continued)
    n = len(golden.prompt)
    golden.check(golden.reference["logits_exact"], logits[:n])
    golden.check(golden.reference["greedy_logits_exact"], logits[n - 1 : -1])


def test_second_sequence_starts_afresh(golden: GoldenModel) -> None:
    golden.runner.logits(golden.prompt)
    logits = golden.runner.logits(golden.reference["tokens_b"].tolist())
    golden.check(golden.reference["logits_b_exact"], logits)


def test_long_prompt(golden: GoldenModel) -> None:
    if "tokens_long" not in golden.reference:
        assert "logits_long_exact" not in golden.reference
        return
    # Routing near-ties were not removed from these: judged by the median.
    logits = golden.runner.logits(golden.reference["tokens_long"].tolist())
    found = float(np.median(divergence(golden.reference["logits_long_exact"], logits)))
    limit = (
        F32_FLOOR
        if golden.is_f32
        else max(FLOOR, 2 * golden.llama_noise("kl_greedy_llama", "kl_b_llama", "kl_long_llama")[0])
    )
    assert found <= limit


def test_the_cut_of_a_prompt_changes_no_bit(golden: GoldenModel) -> None:
    whole = golden.runner.logits(golden.prompt).view(np.uint32)
    for cuts in ((1,) * (len(golden.prompt) - 1), (7, 1, 3, 2), (31,)):
        assert np.array_equal(golden.runner.logits(golden.prompt, cuts).view(np.uint32), whole), cuts


def test_greedy_continuation(golden: GoldenModel) -> None:
    expected, gaps = golden.reference["greedy_ids"].tolist(), golden.reference["greedy_gap"]
    made = golden.runner.greedy(golden.prompt, len(expected))
    n = len(golden.prompt)
    ours = golden.runner.logits(golden.continued)[n - 1 : -1]
    allowed = 2 * np.abs(ours - golden.reference["greedy_logits_exact"]).max()
    for step, (found, wanted) in enumerate(zip(made, expected, strict=True)):
        if found != wanted:
            assert gaps[step] <= allowed, f"step {step}: {found} instead of {wanted}"
            break


def test_chosen_experts(golden: GoldenModel) -> None:
    ours = np.sort(golden.runner.experts(golden.continued), axis=-1)
    theirs = np.sort(golden.reference["topk_exact"], axis=-1)
    is_sigmoid = str(golden.reference["margin_of"]) in {"ffn_moe_probs_biased", "ffn_moe_probs_masked"}
    clear = golden.reference["margin_exact"] >= (MARGIN_SIGMOID if is_sigmoid else MARGIN)
    assert clear.mean() > 0.9
    assert np.array_equal(ours[clear], theirs[clear])


@pytest.mark.parametrize("kv_type", [KVType.F16, KVType.Q8_0], ids=lambda t: t.name)
def test_smaller_caches(golden: GoldenModel, kv_type: KVType) -> None:
    with ModelRunner(golden.path, kv_type=kv_type) as runner:
        logits = runner.logits(golden.prompt)
        extra = KV_F16[golden.is_f32] if kv_type == KVType.F16 else 1e-3
        golden.check(golden.reference["logits_exact"], logits, extra)
        cut = runner.logits(golden.prompt, (5, 1, 9))
    assert np.array_equal(cut.view(np.uint32), logits.view(np.uint32))


def test_levels_and_threads_change_no_bit(golden: GoldenModel) -> None:
    tokens = golden.prompt[:20]
    expected = golden.runner.logits(tokens).view(np.uint32)
    for isa in _kernels.isa_levels():
        for n_threads in (1, 3):
            with ModelRunner(golden.path, isa=isa, n_threads=n_threads, max_tokens=16) as runner:
                assert np.array_equal(runner.logits(tokens).view(np.uint32), expected), (isa, n_threads)


def test_a_busy_cache_changes_no_bit(golden: GoldenModel) -> None:
    found = golden.check_with_a_cache()
    assert found.n_loads > 0
    assert found.hits.sum() > 0


@settings(max_examples=5)
@given(setup=SETUPS, n_prompt=st.integers(1, 64), chunk=st.integers(1, 16))
def test_whatever_the_cache_and_the_cuts_are_changes_no_bit(
    golden: GoldenModel, setup: Setup, n_prompt: int, chunk: int
) -> None:
    golden.check_with_a_cache(setup, n_prompt, chunk)


def test_sequences_in_one_step_do_not_see_each_other(golden: GoldenModel) -> None:
    a, b = golden.prompt[:9], golden.reference["tokens_b"].tolist()[:7]
    alone = [golden.runner.logits(tokens).view(np.uint32) for tokens in (a, b)]
    with ModelRunner(golden.path, n_slots=2) as runner:
        together = runner.program.run(
            np.array(a + b, np.int32),
            np.array([*range(len(a)), *range(len(b))], np.int32),
            np.array([1] * len(a) + [0] * len(b), np.int32),
            np.arange(len(a) + len(b), dtype=np.int32),
        )
        assert np.array_equal(together.view(np.uint32), np.concatenate(alone))
