"""Which operations of real architectures become one launch on the CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.devices import graph as ops
from engine.devices.cuda import fusion
from engine.gguf.reader import GGUFFile
from engine.models import load_model
from engine.quants.formats import BY_NAME


def groups(path) -> list[fusion.Fused]:
    with GGUFFile.open(path) as file:
        return [item for _, item in fusion.fused(load_model(file).graph.operations)]


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("qwen3moe/qwen3moe-micro-F32", {"RMSNorm", "Rope"}),
        ("qwen35moe/qwen35moe-micro-F32", {"SplitHeads", "RMSNorm", "Rope", "Gate"}),
        ("gpt-oss/gpt-oss-micro-F32", {"Rope"}),
    ],
)
def test_attention_takes_all_that_is_around_it(name: str, around: set[str], golden_path) -> None:
    """Nothing that makes queries and keys ready, and no gate, is left for a launch of its own."""
    items = groups(golden_path(f"{name}.gguf"))
    attentions = [item for item in items if isinstance(item, fusion.Attention)]
    assert attentions
    for attention in attentions:
        assert {type(op).__name__ for op in attention.operations} == {"Attention", *around}
        assert (attention.q_rope is not None, attention.k_rope is not None) == ("Rope" in around,) * 2
        assert (attention.q_norm is not None, attention.k_norm is not None) == ("RMSNorm" in around,) * 2
    assert "Rope" not in {type(item).__name__ for item in items}


@pytest.mark.parametrize("name", ["qwen3moe/qwen3moe-micro-F32", "qwen35moe/qwen35moe-micro-F32"])
def test_sum_norm_and_choice_are_one_launch(name: str, golden_path) -> None:
    """What lies between attention and the experts, in every layer that has some."""
    items = groups(golden_path(f"{name}.gguf"))
    n_experts = sum(isinstance(item, ops.Experts | fusion.SharedExpert) for item in items)
    assert sum(isinstance(item, fusion.NormAndRouter) for item in items) == n_experts > 0
    assert not any(isinstance(item, fusion.LinearAndRouter | ops.Router) for item in items)


def test_products_of_two_formats_are_one_launch() -> None:
    """That take the same activations; never with the matrix that a choice of experts is made by, nor more than fit."""

    def of(*names: str, chooses: int | None = None) -> list[dict[str, list[int]]]:
        rows = ops.Tensor(ops.Buffer(256, ops.Rows.TOKENS), 0, 256)
        weights = tuple(ops.Weight(f"w{i}", BY_NAME[name], 8, 256) for i, name in enumerate(names))
        op = ops.Linear(rows, weights, (None,) * len(weights), (rows,) * len(weights))
        groups = fusion.product_groups(op, chooses)
        return [{weight_format.name: list(members) for weight_format, members in group} for group in groups]

    assert of("Q4_K", "Q6_K", "Q4_K") == [{"Q4_K": [0, 2], "Q6_K": [1]}]
    assert of("Q4_K", "F32", "Q6_K", "Q5_K") == [{"Q4_K": [0], "Q6_K": [2]}, {"F32": [1]}, {"Q5_K": [3]}]
    assert of("Q4_K", "Q8_0", "IQ4_NL", "Q5_0") == [{"Q4_K": [0]}, {"Q8_0": [1], "Q5_0": [3]}, {"IQ4_NL": [2]}]
    assert of("Q4_K", "Q6_K", chooses=1) == [{"Q4_K": [0]}, {"Q6_K": [1]}]
    assert of("Q4_K", "Q6_K", chooses=0) == [{"Q4_K": [0]}, {"Q6_K": [1]}]
    assert of(*["Q4_K"] * 7, "Q6_K", "Q6_K", "Q5_K") == [{"Q4_K": [*range(7)], "Q5_K": [9]}, {"Q6_K": [7, 8]}]
    assert of(*["Q4_K"] * 9) == [{"Q4_K": [*range(8)]}, {"Q4_K": [8]}]


def test_a_norm_of_what_is_no_plain_sum_stays_before_the_choice(data: Path) -> None:
    """Gemma 4 has another norm for its router, dbrx one that takes the mean from values, too."""
    for name in ("gemma4", "dbrx"):
        items = groups(data / "peers" / f"{name}-F32.gguf")
        assert any(isinstance(item, fusion.LinearAndRouter | ops.Router) for item in items)
        assert not any(isinstance(item, fusion.NormAndRouter) for item in items)


def test_clamped_heads_are_rotated_where_they_are_attended(data: Path) -> None:
    """One launch clamps queries, keys and values together."""
    items = groups(data / "peers" / "dbrx-F32.gguf")
    attentions = [item for item in items if isinstance(item, fusion.Attention)]
    assert len(attentions) == sum(isinstance(item, ops.Clamp) for item in items) == 2
    assert all(item.q_rope and item.k_rope for item in attentions)


def test_values_that_are_made_of_keys_leave_attention_whole(data) -> None:
    attentions = [item for item in groups(data / "peers" / "gemma4-F32.gguf") if isinstance(item, fusion.Attention)]
    assert len(attentions) == 4
    for attention in attentions:
        assert attention.q_norm
        assert attention.k_norm
        assert attention.rope


def test_a_layer_norm_is_one_launch_with_the_sum_before_it(data) -> None:
    """Three layers of four end in the sum that the next one normalises; the first and the last norm are alone."""
    items = groups(data / "peers" / "cohere2moe-F32.gguf")
    sums = [item for item in items if isinstance(item, fusion.SumAndNorm)]
    assert [type(item.sum) for item in sums] == [ops.Add, ops.Combine, ops.Combine]
    alone = [item for item in items if isinstance(item, ops.RMSNorm)]
    assert [norm.centers for norm in (*alone, *(item.norm for item in sums))] == [True] * 5


def test_norms_with_biases_are_one_launch_with_the_sum_before_them(data) -> None:
    items = groups(data / "peers" / "phimoe-F32.gguf")
    norms = [item.norm for item in items if isinstance(item, fusion.SumAndNorm)]
    assert len(norms) == 3
    assert all(norm.bias for norm in norms)


@pytest.mark.parametrize(
    ("name", "n"), [("cohere2moe", 3), ("granite_swa", 3), ("kimi-k3-plain", 2), ("minimax-m3", 2)]
)
def test_a_shared_expert_like_the_others_is_one_of_them(data, name: str, n: int) -> None:
    """Its gate and up are matrices of their own, or rows of one."""
    items = groups(data / "peers" / f"{name}-F32.gguf")
    assert sum(isinstance(item, fusion.SharedExpert) for item in items) == n


def test_keys_that_tokens_share_are_made_where_they_are_stored(data) -> None:
    """Of attention in three layers, and of two indexers, which rotate their queries in the same launch."""
    items = groups(data / "peers" / "deepseek4-F32.gguf")
    assert sum(isinstance(item, fusion.SharedKeys) for item in items) == 5
    attentions = [item for item in items if isinstance(item, fusion.Attention)]
    assert [item.shared_keys is not None for item in attentions] == [False, True, True, True]
    assert {len(item.operations) for item in attentions} == {5}  # with norms and rotations of queries and keys
    selections = [item for item in items if isinstance(item, fusion.Selection)]
    assert [(item.shared_keys is not None, len(item.operations)) for item in selections] == [(True, 2)] * 2
    assert sum(isinstance(item, ops.Rope) for item in items) == 4  # of what attention finds
    assert not any(isinstance(item, ops.Compress | ops.SelectPositions) for item in items)


def test_latent_keys_without_a_rotated_part_are_normalised_where_they_are_stored(data) -> None:
    """In layers that share what they look at, too; pools are made, and looked for, by launches of their own."""
    items = groups(data / "peers" / "glm5-next-F32.gguf")
    attentions = [item for item in items if isinstance(item, fusion.Attention)]
    assert [(item.q_norm is None, item.k_norm is not None) for item in attentions] == [(True, True)] * 3
    assert [type(item) for item in items if isinstance(item, ops.Compress | ops.SelectPositions)] == [
        ops.Compress,
        ops.SelectPositions,
    ] * 2
    assert not any(isinstance(item, ops.JoinHeads | ops.SplitHeads) for item in items[4:])  # behind the streams


def test_means_of_keys_are_made_where_they_are_stored(data) -> None:
    """A convolution of tokens that are apart, and gates whose streams are added up, belong to nothing else."""
    items = groups(data / "peers" / "qwen4exp-F32.gguf")
    (keys,) = (item for item in items if isinstance(item, fusion.SharedKeys))
    (selection,) = (item for item in items if isinstance(item, fusion.Selection))
    assert selection.shared_keys == keys
    assert selection.q_rope is not None
    assert [len(item.operations) for item in items if isinstance(item, fusion.Attention)] == [7, 7]
    assert sum(isinstance(item, fusion.DeltaNetLayer) for item in items) == 2
    (conv,) = (item for item in items if isinstance(item, ops.CausalConv))
    assert conv.dilation == 3
    assert sum(isinstance(item, ops.Gate) and item.n_streams == 4 for item in items) == 9
    assert not any(isinstance(item, fusion.NormAndGate | ops.Compress | ops.SelectPositions) for item in items)


@pytest.mark.parametrize(
    ("name", "n"), [("deepseek32", 2), ("dots3note", 1), ("glm-dsa", 2), ("hy_v4", 2), ("minimax-m3", 2)]
)
def test_what_chooses_positions_rotates_its_queries_and_keys(data, name: str, n: int) -> None:
    items = groups(data / "peers" / f"{name}-F32.gguf")
    found = [item for item in items if isinstance(item, fusion.Selection)]
    assert len(found) == n
    assert {len(item.operations) for item in found} == {5 if name == "minimax-m3" else 3}  # with norms of heads
    assert not any(isinstance(item, ops.SelectPositions | ops.SelectBlocks) for item in items)


def test_streams_are_added_to_where_they_are_reduced_and_normalised(data) -> None:
    """Nothing is added before the first sub-layer; between the last row of all tokens and its norm, some are chosen."""
    items = groups(data / "peers" / "hy_v4-F32.gguf")
    streams = [item for item in items if isinstance(item, fusion.StreamsAndNorm)]
    assert [item.add is not None for item in streams] == [False] + [True] * 6
    assert [item.norm is not None for item in streams] == [True] * 6 + [False]
    assert not any(isinstance(item, ops.AddToStreams | ops.ReduceStreams) for item in items)


def test_residuals_are_mixed_where_the_last_is_added_up_and_the_mean_normalised(data) -> None:
    """Where the stream begins anew nothing is added; between the last mean and its norm, some rows are chosen."""
    items = groups(data / "peers" / "kimi-k3-F32.gguf")
    mixed = [item for item in items if isinstance(item, fusion.ResidualsAndNorm)]
    assert [len(item.mix.residuals) for item in mixed] == [1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
    assert [i for i, item in enumerate(mixed) if item.add is None] == [0, 1, 5, 9]
    assert [item.norm is not None for item in mixed] == [True] * 10 + [False]
    assert not any(isinstance(item, ops.MixResiduals) for item in items)


def assert_delta_net_layers_are_one(path: Path) -> None:
    kinds = [type(item) for item in groups(path)]
    assert fusion.DeltaNetLayer in kinds
    assert not {ops.CausalConv, ops.DeltaNet, fusion.NormAndGate} & set(kinds)


@pytest.mark.parametrize("name", ["qwen35moe/qwen35moe-micro-F32", "qwen3next/qwen3next-micro-F32"])
def test_a_delta_net_layer_is_one(name: str, golden_path) -> None:
    assert_delta_net_layers_are_one(golden_path(f"{name}.gguf"))


@pytest.mark.parametrize("name", ["bailingmoe3", "glm5-next", "kimi-k3", "kimi-linear"])
def test_so_is_one_whose_channels_decay_apart(name: str, data: Path) -> None:
    assert_delta_net_layers_are_one(data / "peers" / f"{name}-F32.gguf")
