"""Architectures without golden files: tiny random models against logits of llama.cpp (see `make_peer_fixtures.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cached_runner import SETUPS, Setup
from golden_files import PEER_FILES
from golden_model import GoldenModel, open_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from model_runner import ModelRunner
from reference_device import ReferenceProgram

from engine import _kernels
from engine.devices.graph import (
    AddToStreams,
    Attention,
    CausalConv,
    Compress,
    DeltaNet,
    Experts,
    Gate,
    GateByAgreement,
    Gating,
    HashTokens,
    KVType,
    MixResiduals,
    Operation,
    ReduceStreams,
    RMSNorm,
    Rope,
    Router,
    Scale,
    Scoring,
    SelectPositions,
)

N_REFERENCE_TOKENS = 20
INDEXED = ("deepseek32", "dots3note", "glm-dsa", "hy_v4")  # attention looks at what an indexer chooses


@pytest.fixture(scope="module", params=PEER_FILES)
def peer(request: pytest.FixtureRequest, data: Path) -> Iterator[GoldenModel]:
    with open_golden(data / "peers" / f"{request.param}.npz") as peer:
        yield peer


def test_logits(peer: GoldenModel) -> None:
    peer.check(peer.reference["logits_exact"], peer.runner.logits(peer.prompt))


def test_formulas(peer: GoldenModel) -> None:
    program = ReferenceProgram(peer.runner.model.graph, peer.runner.weights)
    logits = np.concatenate([program.run(part) for part in (peer.prompt[:9], peer.prompt[9:N_REFERENCE_TOKENS])])
    assert np.abs(logits - peer.reference["logits_exact"][:N_REFERENCE_TOKENS]).max() < 1e-4


def test_cuts_levels_and_threads_change_no_bit(peer: GoldenModel) -> None:
    whole = peer.runner.logits(peer.prompt).view(np.uint32)
    for cuts in ((1,) * (len(peer.prompt) - 1), (7, 1, 3)):
        assert np.array_equal(peer.runner.logits(peer.prompt, cuts).view(np.uint32), whole), cuts
    for isa in _kernels.isa_levels():
        with ModelRunner(peer.path, isa=isa, n_threads=3, max_tokens=16) as runner:
            assert np.array_equal(runner.logits(peer.prompt).view(np.uint32), whole), isa


def test_routing_has_a_row_for_each_layer_with_experts(peer: GoldenModel) -> None:
    moe = peer.runner.model.spec.moe
    n_layers = len(peer.runner.model.graph.routings)
    assert peer.runner.experts(peer.prompt).shape == (n_layers, len(peer.prompt), moe.n_experts_used)


@settings(max_examples=5)
@given(setup=SETUPS, n_prompt=st.integers(1, 64), chunk=st.integers(1, 16))
def test_whatever_the_cache_and_the_cuts_are_changes_no_bit(
    peer: GoldenModel, setup: Setup, n_prompt: int, chunk: int
) -> None:
    if not peer.runner.model.spec.moe.n_experts:
        assert not peer.runner.model.graph.routings
        return
    peer.check_with_a_cache(setup, n_prompt, chunk)


def test_a_busy_cache_changes_no_bit(peer: GoldenModel) -> None:
    if peer.runner.model.spec.moe.n_experts:
        assert peer.check_with_a_cache().n_loads > 0


def deviations(
    data: Path, name: str, kind: type[Operation], otherwise: Callable[[Operation], dict[str, object]]
) -> np.ndarray:
    """How far logits are from those of llama.cpp if operations of a kind are others, for each position."""
    with open_golden(data / "peers" / f"{name}-F32.npz") as peer:
        graph = peer.runner.model.graph
        graph.operations = [replace(op, **otherwise(op)) if isinstance(op, kind) else op for op in graph.operations]
        logits = ReferenceProgram(graph, peer.runner.weights).run(peer.prompt)
        return np.abs(logits - peer.reference["logits_exact"]).max(-1)


@pytest.mark.parametrize(
    ("name", "unlimited", "n_seen"),
    [
        *((name, {"selected": None}, 12) for name in INDEXED),
        ("minimax-m3", {"selected": None}, 16),
        ("deepseek4", {"selected": None}, 15),
        ("glm5-next", {"selected": None}, 11),  # two pools of four, and three tokens more
        ("glm5-next-plain", {"selected": None}, 14),  # two of five, and four
        ("deepseek4", {"window": 0}, 8),
        ("deepseek4", {"shared_cache": None, "selected": None}, 3),
        ("dots3note", {"window": 0}, 8),
        ("qwen4exp", {"selected": None}, 15),  # three blocks of four, and three of a token's own
        ("qwen4exp-single", {"selected": None}, 12),
    ],
)
def test_other_logits_would_come_of_looking_at_all_positions(
    name: str, unlimited: dict[str, object], n_seen: int, data: Path
) -> None:
    differences = deviations(data, name, Attention, lambda _: unlimited)
    assert (differences[:n_seen] < 1e-4).all()
    assert (differences[n_seen:] > 0.01).all(), differences.min()


@pytest.mark.parametrize("name", ["hy_v4", "hy_v4-full"])
@pytest.mark.parametrize("otherwise", [{"magnitude": 0.0, "offset": 1.0}, {"magnitude": 1.0}, {"offset": 0.0}], ids=str)
def test_other_logits_would_come_of_one_residual_stream(name: str, otherwise: dict[str, float], data: Path) -> None:
    """With gates of 1 the streams stay alike, and whatever they weigh, their norm is that of one. Others count, too."""
    differences = deviations(data, name, ReduceStreams, lambda _: otherwise)
    assert (differences > 0.01).all(), differences.min()


@pytest.mark.parametrize(
    ("name", "kind", "otherwise"),
    [
        ("kimi-k3", MixResiduals, lambda op: {"residuals": op.residuals[-1:]}),  # the residual stream alone
        ("kimi-k3", MixResiduals, lambda op: {"residuals": op.residuals[1:] or op.residuals}),  # not the embeddings
        ("kimi-k3", MixResiduals, lambda _: {"eps": 100.0}),  # nearly equal scores
        ("kimi-k3", DeltaNet, lambda _: {"decay_bound": 0.0}),
        ("kimi-k3", DeltaNet, lambda op: {"decay_bound": op.decay_bound / 2}),
        ("kimi-k3", Experts, lambda op: {"limit": 100 * op.limit}),
        ("kimi-k3", Experts, lambda _: {"up_limit": 0.0}),
        ("kimi-k3", Gate, lambda op: {"limit": 100 * op.limit}),
        ("kimi-k3", Gate, lambda _: {"own_limit": 0.0}),
        ("deepseek4", ReduceStreams, lambda _: {"n_normalizations": 1}),
        ("deepseek4", ReduceStreams, lambda _: {"magnitude": 1.0}),
        ("deepseek4", ReduceStreams, lambda _: {"offset": 0.0}),
        ("deepseek4", AddToStreams, lambda _: {"mixing": None}),
        ("deepseek4", Rope, lambda _: {"period": 1}),
        ("deepseek4", Router, lambda _: {"table": None}),
        ("deepseek4", Router, lambda _: {"scoring": Scoring.SIGMOID}),
        ("glm5-next", Compress, lambda op: {"scores": op.values}),
        ("glm5-next", Compress, lambda op: {"values": op.scores}),
        ("glm5-next", DeltaNet, lambda op: {"decay_bound": op.decay_bound / 2}),
        ("glm5-next", Scale, lambda _: {"factor": 1.0}),  # the sum of streams
        ("glm5-next", Experts, lambda op: {"limit": 100 * op.limit}),
        ("glm5-next", Gate, lambda op: {"limit": 100 * op.limit}),
        ("glm5-next-plain", DeltaNet, lambda _: {"eps": 0.3}),  # that of other norms
        ("glm5-next-plain", ReduceStreams, lambda _: {"n_normalizations": 1}),
        ("qwen4exp", AddToStreams, lambda _: {"magnitude": 0.0}),
        ("qwen4exp", AddToStreams, lambda _: {"magnitude": 1.0}),
        ("qwen4exp", Scale, lambda _: {"factor": 1.0}),  # of what streams are made of
        ("qwen4exp", Gate, lambda op: {"gating": Gating.SILU} if op.n_streams > 1 else {}),
        (
            "qwen4exp",
            Gate,
            lambda op: {"gating": Gating.SILU} if op.x.width == 64 else {},
        ),  # of delta nets and attention
        ("qwen4exp", RMSNorm, lambda op: {"group_size": op.x.width} if op.x.width == 128 else {}),  # of all streams
        ("qwen4exp", HashTokens, lambda _: {"end_id": 127}),
        ("qwen4exp", HashTokens, lambda op: {"multipliers": op.multipliers[::-1]}),
        ("qwen4exp", HashTokens, lambda op: {"sizes": op.sizes - 1}),
        ("qwen4exp", HashTokens, lambda op: {"offsets": op.offsets[::-1]}),
        ("qwen4exp", GateByAgreement, lambda _: {"floor": 4.0}),
        ("qwen4exp", GateByAgreement, lambda op: {"b": op.a}),
        ("qwen4exp", CausalConv, lambda _: {"dilation": 1}),
        ("qwen4exp-single", CausalConv, lambda op: {"activates": op.dilation == 1}),
        ("qwen4exp-single", HashTokens, lambda _: {"end_id": 127}),
    ],
)
def test_other_logits_would_come_of_other_parts(
    name: str, kind: type[Operation], otherwise: Callable[[Operation], dict[str, object]], data: Path
) -> None:
    differences = deviations(data, name, kind, otherwise)
    assert np.median(differences) > 0.01, differences


@pytest.mark.parametrize("kv_type", KVType)
@pytest.mark.parametrize("name", [*INDEXED, "minimax-m3"])
def test_what_is_chosen_among_is_part_of_a_sequence(name: str, kv_type: KVType, data: Path) -> None:
    """It is saved, comes back to another slot of another program, and goes on, from an earlier position, too."""
    path = data / "peers" / f"{name}-F32.gguf"
    tokens = np.load(path.with_suffix(".npz"))["tokens"].tolist()
    with ModelRunner(path, kv_type=kv_type) as one, ModelRunner(path, kv_type=kv_type, n_slots=2) as other:
        expected = one.logits(tokens)
        saved = one.program.save_sequence(0, 25)
        other.forward.run(1, tokens[::-1], 0)  # what lay there before must not matter
        other.program.load_sequence(1, 25, saved)
        has_windows = any(cache.window for cache in one.model.graph.kv_caches)  # of which no more than one is saved
        for start in (25,) if has_windows else (25, 20):
            assert np.array_equal(other.forward.run(1, tokens[start:], start, "all"), expected[start:])


@pytest.mark.parametrize("n_saved", [25, 24, 23, 18])
@pytest.mark.parametrize("name", ["deepseek4", "glm5-next", "jamba", "qwen4exp", "qwen4exp-single"])
def test_what_states_keep_is_part_of_a_sequence(name: str, n_saved: int, data: Path) -> None:
    """It is saved, and comes back to another slot of another program."""
    path = data / "peers" / f"{name}-F32.gguf"
    tokens = np.load(path.with_suffix(".npz"))["tokens"].tolist()
    with ModelRunner(path) as one, ModelRunner(path, n_slots=2) as other:
        expected = one.logits(tokens)
        one.logits(tokens[:n_saved])
        saved = one.program.save_sequence(0, n_saved)
        other.forward.run(1, tokens[::-1], 0)  # what lay there before must not matter
        other.program.load_sequence(1, n_saved, saved)
        assert np.array_equal(other.forward.run(1, tokens[n_saved:], n_saved, "all"), expected[n_saved:])


@pytest.mark.parametrize(
    ("kind", "otherwise"),
    [
        (SelectPositions, lambda _: {"has_tail": False}),  # a fourth block in the place of a token's own
        (Compress, lambda _: {"period": 1}),  # the key of the last token
        (Rope, lambda _: {"period": 1}),  # by the position of the last token
    ],
)
def test_blocks_would_be_chosen_otherwise(kind: type[Operation], otherwise: Callable, data: Path) -> None:
    """Which tokens look at other blocks then is left to chance; all logits stay where all blocks are chosen."""
    with np.errstate(invalid="ignore"):  # the first tokens may find nothing at all
        differences = deviations(data, "qwen4exp", kind, otherwise)
    assert np.count_nonzero(differences[15:] > 0.001) >= 4, differences
    assert kind == SelectPositions or (differences[:15] < 1e-4).all()


def check_cuts_of_a_long_prompt(
    runner: ModelRunner, references: Path, *all_cuts: tuple[int, ...]
) -> tuple[list[int], np.ndarray]:
    """Return the prompt and its last logits, which are llama.cpp's and the same bits whatever its steps."""
    with np.load(references, allow_pickle=False) as z:
        tokens, exact = z["tokens_long"].tolist(), z["logits_long_exact"]
    n = len(exact)
    logits = runner.logits(tokens)[-n:]
    assert np.abs(logits - exact).max() < 1e-4
    for cuts in all_cuts:
        assert np.array_equal(runner.logits(tokens, cuts)[-n:], logits)
    return tokens, exact


def test_many_blocks_are_chosen_among_however_a_prompt_is_cut(data: Path) -> None:
    """Steps end within blocks, n-grams, and what the convolution goes back to; then each is one token."""
    references = data / "peers" / "qwen4exp-F32.npz"
    pieces = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (63, 64, 1, 65, 3), (290, *[1] * 9)
    with ModelRunner(references.with_suffix(".gguf")) as runner:
        check_cuts_of_a_long_prompt(runner, references, *pieces)


@pytest.mark.parametrize("context_length", [1, 3, 4, 5, 8, 11, 12])
@pytest.mark.parametrize("name", ["glm5-next", "glm5-next-plain"])
def test_contexts_of_less_than_a_pool_or_of_no_more_than_are_chosen(name: str, context_length: int, data: Path) -> None:
    references = np.load(data / "peers" / f"{name}-F32.npz")
    tokens, exact = references["tokens"][:context_length].tolist(), references["logits_exact"][:context_length]
    with ModelRunner(data / "peers" / f"{name}-F32.gguf", context_length=context_length) as runner:
        logits = runner.logits(tokens)
        assert np.abs(logits - exact).max() < 1e-4
        assert np.array_equal(runner.logits(tokens, (1,) * (context_length - 1)), logits)


def without_keys_of_128_tokens(op: Attention) -> Attention:
    return replace(op, shared_cache=None) if op.shared_cache and not op.selected else op


@pytest.mark.parametrize(
    ("name", "otherwise"),
    [
        ("deepseek4", without_keys_of_128_tokens),  # there are two
        ("glm5-next-plain", lambda op: replace(op, selected=None)),  # two of sixty pools are seen
    ],
)
def test_what_many_tokens_share_in_a_long_prompt(
    name: str, otherwise: Callable[[Attention], Attention], data: Path
) -> None:
    """However the prompt is cut; without that logits would be others."""
    references = data / "peers" / f"{name}-F32.npz"
    with ModelRunner(references.with_suffix(".gguf")) as runner:
        tokens, exact = check_cuts_of_a_long_prompt(runner, references, (127, 1, 1, 126, 3))
        graph = runner.model.graph
        graph.operations = [otherwise(op) if isinstance(op, Attention) else op for op in graph.operations]
        others = ReferenceProgram(graph, runner.weights).run(tokens)[-len(exact) :]
    assert (np.abs(others - exact).max(-1) > 0.01).all()


def test_phi_rotates_by_the_length_of_its_context(data: Path) -> None:
    """Up to the trained context with the short divisors, beyond it with the long ones from the first token on."""
    logits = {}
    for context_length in (16, 17):
        with ModelRunner(data / "peers" / "phimoe-long-F32.gguf", context_length=context_length) as runner:
            tokens = list(range(16))
            logits[context_length] = runner.logits(tokens)
            program = ReferenceProgram(runner.model.graph, runner.weights, context_length)
            assert np.abs(logits[context_length] - program.run(tokens)).max() < 1e-4
    assert np.abs(logits[16] - logits[17]).max() > 0.1


def test_llama4_beyond_one_chunk(data: Path) -> None:
    """Attention in chunks of 8192 tokens, and queries scaled by position from there on."""
    references = data / "peers" / "llama4-F32.npz"
    with np.load(references, allow_pickle=False) as z:
        tokens, exact = z["tokens_long"].tolist(), z["logits_long_exact"]
    with ModelRunner(references.with_suffix(".gguf"), max_tokens=256, context_length=len(tokens)) as runner:
        n = len(exact)
        runner.forward.run(0, tokens[:-n], 0, "none")
        logits = runner.forward.run(0, tokens[-n:], len(tokens) - n, "all")
    assert np.abs(logits - exact).max() < 1e-3
