"""What a file may ask of a forward pass: other ways to store it, variants refused by name, contradictions."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_mutations import Parts, damage_parts, exercise, parts_of
from golden_files import PEERS
from model_runner import ModelRunner

from engine import _kernels
from engine.devices import graph as ops
from engine.devices.footprint import measure
from engine.devices.graph import KVType
from engine.devices.program import Limits
from engine.devices.tables import expert_table
from engine.devices.traffic import count_weights
from engine.errors import GGUFError, UnsupportedModelError
from engine.gguf import WeightMemory
from engine.gguf.metadata import Metadata
from engine.gguf.model_file import TensorInfo
from engine.gguf.older_forms import in_current_form
from engine.gguf.reader import GGUFFile
from engine.gguf.writer import write_gguf
from engine.model_spec import MoESpec
from engine.models import ARCHITECTURES, Model, load_model
from engine.quants.formats import BY_NAME, I32, QuantFormat
from engine.quants.reference import dequantize
from engine.synthetic import SyntheticModel


def load(parts: Parts, folder: Path) -> Model:
    path = folder / "model.gguf"
    path.write_bytes(parts.encode())
    with GGUFFile.open(path) as file:
        return load_model(file)


@pytest.fixture
def peer(data: Path):
    return lambda name: parts_of(data / "peers" / f"{name}-F32.gguf")


def with_tensor(parts: Parts, name: str, *shape: int) -> Parts:
    return replace(parts, tensors=[*parts.tensors, TensorInfo(name, BY_NAME["F32"], shape, 4 * int(np.prod(shape)))])


def without_tensors(parts: Parts, ending: str) -> Parts:
    return replace(parts, tensors=[info for info in parts.tensors if not info.name.endswith(ending)])


def test_an_unknown_architecture_is_named_and_the_known_ones_are_listed(peer, tmp_path: Path) -> None:
    parts = peer("llama")
    parts.values["general.architecture"] = "gemma2"
    with pytest.raises(UnsupportedModelError, match="'gemma2'") as caught:
        load(parts, tmp_path)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("minimax-01", "attention.key_length", 264, r"attention.key_length is 264; this version computes at most 256"),
        ("minimax-m2", "expert_gating_func", 5, r"expert_gating_func is 5; .* 1 \(softmax\), 2 \(sigmoid\), 3"),
        ("grovemoe", "experts_per_group", 3, r"experts_per_group is 3; expected a divisor of expert_count \(8\)"),
        ("grovemoe", "experts_per_group", 4, r"experts_per_group is 4; expected as many groups as experts are used"),
        ("grovemoe", "expert_group_count", 2, r"expert_group_count is 2; this version needs 1"),
        ("minimax-m2", "expert_count", 0, r"has a router \(blk.0.ffn_gate_inp.weight\) but no expert_count"),
        ("minimax-m2", "expert_used_count", 9, r"expert_used_count is 9; expected at most expert_count \(8\)"),
        ("llama", "rope.scaling.type", "ntk", "'ntk'; this version knows none, linear, yarn and longrope"),
        ("llama", "attention.head_count_kv", 3, "head_count_kv is 3; expected a divisor of attention.head_count"),
        ("bailingmoe2", "expert_group_count", 3, "expert_group_count is 3; expected a divisor of expert_count"),
        ("bailingmoe2", "expert_group_count", 8, "expert_group_count is 8; expected groups that hold 2 experts"),
        ("bailingmoe3", "kda.safe_gate", False, "kda.safe_gate is false; this version knows bounded decays only"),
        ("bailingmoe3", "kda.gate_lower_bound", 0.0, "kda.gate_lower_bound is 0.0; expected a number below 0"),
        ("bailingmoe3", "kda.gate_lower_bound", float("-inf"), "gate_lower_bound is -inf; expected a finite number"),
        (
            "bailingmoe3",
            "rope.dimension_sections",
            np.array([1, 1, 1, 1], np.int32),
            r"rope.dimension_sections is \[1, 1, 1, 1\]; this version knows three axes",
        ),
        ("bailingmoe3", "swiglu_clamp_exp", np.array([0.5, 1.0], np.float32), "one number of at least 0 for each of 3"),
        ("qwen35", "ssm.inner_size", 63, "ssm.inner_size is 63; expected 64"),
        ("qwen35", "nextn_predict_layers", 4, r"nextn_predict_layers is 4; expected less than block_count \(4\)"),
        ("granitemoe", "embedding_scale", float("inf"), "embedding_scale is inf; expected a finite number"),
        ("minimax-m2", "expert_count", 1025, "expert_count is 1025; this version computes at most 1024"),
        ("llama", "attention.key_length", 640, "attention.key_length is 640; this version computes at most 576"),
        ("llama", "attention.value_length", 640, "attention.value_length is 640; this version computes at most 576"),
        ("mistral4", "attention.kv_lora_rank", 569, "kv_lora_rank is 569; this version computes at most 568"),
        ("nemotron_h", "ssm.state_size", 257, "ssm.state_size is 257; this version computes at most 256"),
        ("jamba", "ssm.state_size", 257, "ssm.state_size is 257; this version computes at most 256"),
        ("jamba", "ssm.inner_size", 63, r"ssm_in.weight has the shape \[128, 32\]; .* must be \[126, 32\]"),
        ("jamba", "ssm.conv_kernel", 1, "ssm.conv_kernel is 1; expected an integer from 2"),
        ("kimi-k3", "attn_res.block_size", 0, r"has no use for .*res_score\.weight"),
        ("kimi-k3", "activation.situ_beta", 0.0, "situ_beta is 0.0; expected a number from 0.001 to 1000000$"),
        ("kimi-k3", "activation.situ_beta", float("inf"), "situ_beta is inf; expected a finite number"),
        (
            "kimi-k3",
            "activation.situ_linear_beta",
            1e7,
            "linear_beta is 10000000.0; expected .* 1000000, or 0 for none",
        ),
        ("kimi-k3", "kda.gate_lower_bound", 0.5, "kda.gate_lower_bound is 0.5; expected a number below 0"),
        (
            "kimi-k3",
            "expert_latent_length",
            32,
            r"ffn_routed_down.weight has the shape \[64, 32\]; .* must be \[32, 32\]",
        ),
        (
            "kimi-k3",
            "expert_latent_length",
            0,
            r"ffn_gate_exps.weight has the shape \[8, 32, 64\]; .* be \[8, 32, 32\]",
        ),
        ("kimi-linear", "kda.head_dim", 257, "kda.head_dim is 257; this version computes at most 256"),
        ("kimi-linear", "kda.head_dim", 8, r"attn_q.weight has the shape \[64, 32\]; .* must be \[32, 32\]"),
        (
            "kimi-linear",
            "attention.head_count_kv",
            np.array([0, 1], np.int32),
            r"\[0, 1\]; expected one number for each",
        ),
        ("kimi-linear", "attention.key_length_mla", 8, "key_length_mla is 8; expected more than rope.dimension_count"),
        ("lfm2moe", "shortconv.l_cache", 17, "shortconv.l_cache is 17; this version computes at most 16"),
        ("lfm2moe", "shortconv.l_cache", 1, "shortconv.l_cache is 1; expected an integer from 2"),
        ("smallthinker", "rope.freq_base_swa", 0.5, "rope.freq_base_swa is 0.5; expected a number above 1"),
        ("cohere2moe", "rope.freq_base_swa", 500.0, "freq_base_swa is 500; this version needs that of rope.freq_base"),
        ("cohere2moe", "attention.sliding_window", 0, "attention.sliding_window is 0; expected an integer from 1"),
        ("cohere2moe", "leading_dense_block_count", -1, "leading_dense_block_count is -1; expected an integer from 0"),
        ("dbrx", "attention.clamp_kqv", -1.0, "attention.clamp_kqv is -1.0; expected a number above 0, or 0 for no"),
        (
            "granite_swa",
            "attention.rope_pattern",
            np.array([True]),
            "rope_pattern is 1 values; expected one for",
        ),
        ("deepseek32", "attention.q_lora_rank", 0, "q_lora_rank is 0; expected at least 1"),
        (
            "deepseek32",
            "attention.indexer.top_k",
            1 << 15,
            "indexer.top_k is 32768; this version computes at most 16384",
        ),
        ("deepseek32", "attention.indexer.top_k", 0, "indexer.top_k is 0; expected an integer from 1"),
        ("deepseek32", "attention.indexer.key_length", 4, "indexer.key_length is 4; expected at least rope.dimension"),
        ("deepseek32", "attention.indexer.key_length", 640, "key_length is 640; this version computes at most 576"),
        ("deepseek32", "attention.indexer.head_count", 4, r"proj.weight has the shape \[8, 32\]; .* \[4, 32\]"),
        ("deepseek4", "hyper_connection.count", 5, "hyper_connection.count is 5; this version computes at most 4"),
        (
            "deepseek4",
            "hyper_connection.count",
            3,
            r"hc_attn_fn.weight has the shape \[24, 128\]; .* must be \[15, 96\]",
        ),
        (
            "deepseek4",
            "hyper_connection.sinkhorn_iterations",
            101,
            "iterations is 101; this version computes at most 100",
        ),
        (
            "deepseek4",
            "attention.compress_ratios",
            np.array([0, 4, 64, 4], np.int32),
            "attention.compress_ratios has a 64; this version knows 0, 4 and 128",
        ),
        (
            "deepseek4",
            "attention.compress_ratios",
            np.array([0, 4], np.int32),
            "compress_ratios is 2 numbers; expected one for each of 4 layers",
        ),
        (
            "deepseek4",
            "attention.compress_ratios",
            np.array([0, 4, 0, 4], np.int32),
            r"has no use for blk\.2\.attn_compressor",
        ),
        ("deepseek4", "attention.key_length", 640, "key_length is 640; this version computes at most 576"),
        ("deepseek4", "attention.key_length", 33, r"value_length is 32; expected key_length \(33\)"),
        ("deepseek4", "attention.value_length", 16, r"value_length is 16; expected key_length \(32\)"),
        ("deepseek4", "attention.output_group_count", 3, r"group_count is 3; expected a divisor of .*head_count \(4\)"),
        ("deepseek4", "attention.sliding_window", 0, "attention.sliding_window is 0; expected an integer from 1"),
        ("deepseek4", "attention.compress_rope_freq_base", 0.5, "rope_freq_base is 0.5; expected a number above 1"),
        ("deepseek4", "attention.indexer.key_length", 65, "indexer.key_length is 65; expected an even number"),
        ("deepseek4", "attention.indexer.top_k", 1 << 15, "top_k is 32768; this version computes at most 16384"),
        (
            "deepseek4",
            "rope.scaling.type",
            "longrope",
            "scaling.type is 'longrope'; this version needs none, linear or",
        ),
        ("deepseek4", "rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor is 0.5; this version needs 1"),
        ("deepseek4", "expert_gating_func", 2, "expert_gating_func stands for sigmoid; this version needs 4"),
        ("deepseek4", "expert_gating_func", 5, "expert_gating_func is 5; this version knows 1"),
        ("deepseek4", "hash_layer_count", 1, "hash_layer_count is 1; expected as many as leading blocks have"),
        ("deepseek4", "expert_used_count", 3, r"ffn_gate_tid2eid.weight has the shape \[128, 2\]; .* \[128, 3\]"),
        (
            "glm-dsa",
            "attention.indexer.types",
            np.array([True, False]),
            "types is 2 values; expected one for each of 3",
        ),
        ("glm-dsa", "attention.indexer.types", np.array([False, True, True]), "types is false for the first layer"),
        ("glm5-next", "attention.indexer.kpool", 1, "indexer.kpool is 1; expected an integer from 2"),
        ("glm5-next", "attention.indexer.kpool", 3, r"top_k is 8; expected a multiple of .*indexer.kpool \(3\)"),
        ("glm5-next", "attention.indexer.kpool", 8, r"compressor_ape.weight has the shape \[4, 64\]; .* \[8, 64\]"),
        ("glm5-next", "attention.indexer.kpool_select_tail", False, "select_tail is false; this version needs true"),
        ("glm5-next", "attention.indexer.top_k", 1 << 15, "top_k is 32768; this version computes at most 16384"),
        (
            "glm5-next",
            "attention.indexer.types",
            np.array([True, False, True, False, True]),
            "types is false for the first layer with attention",
        ),
        (
            "glm5-next",
            "attention.head_count_kv",
            np.array([0, 1], np.int32),
            r"head_count_kv is \[0, 1\]; expected one number for each of 5 layers",
        ),
        (
            "glm5-next",
            "expert_feed_forward_length",
            np.array([32, 64], np.int32),
            r"expert_feed_forward_length differs between layers \(32, 64\)",
        ),
        ("glm5-next", "rope.dimension_count", 8, "rope.dimension_count is 8; this version needs 0"),
        ("glm5-next", "kda.gate_lower_bound", 0.5, "kda.gate_lower_bound is 0.5; expected a number below 0"),
        ("glm5-next", "hyper_connection.count", 5, "hyper_connection.count is 5; this version computes at most 4"),
        ("dots3note", "attention.sliding_window", 0, "attention.sliding_window is 0; expected an integer from 1"),
        (
            "dots3note",
            "attention.sliding_window_pattern",
            np.array([False] * 3),
            "sliding_window_pattern is False for all layers; expected some layers with a window",
        ),
        (
            "dots3note",
            "attention.head_count",
            np.array([2, 4], np.int32),
            r"head_count is \[2, 4\]; expected one number for each of 3 layers",
        ),
        (
            "dots3note",
            "attention.head_count",
            np.array([2, 4, 4, 2], np.int32),
            r"head_count differs between layers with a window \(2, 4\); this version needs one value",
        ),
        (
            "dots3note",
            "attention.indexer.types",
            np.array([True, True, False]),
            r"indexer.types is \[True, True, False\]; this version needs true for the layers without a window",
        ),
        ("dots3note", "attention.key_length_mla_swa", 8, "key_length_mla_swa is 8; expected more than rope.dimension"),
        ("dots3note", "attention.kv_lora_rank_swa", 569, "kv_lora_rank_swa is 569; this version computes at most 568"),
        ("dots3note", "attention.q_lora_rank", 0, "q_lora_rank is 0; expected at least 1"),
        ("dots3note", "rope.scaling.type", "yarn", "rope.scaling.type is 'yarn'; this version needs none"),
        ("hy_v4", "hyper_connection.count", 9, "hyper_connection.count is 9; this version computes at most 8"),
        ("hy_v4", "hyper_connection.count", 2, r"hc_attn_fn.weight has the shape \[8, 128\]; .* must be \[4, 64\]"),
        ("hy_v4", "hyper_connection.magnitude", float("nan"), "magnitude is nan; expected a finite number"),
        ("hy_v4", "attention.indexer.key_length", 65, "indexer.key_length is 65; expected an even number"),
        ("hy_v4", "attention.indexer.key_length", 6, r"key_length is 6; expected at least rope.dimension_count \(8\)"),
        ("hy_v4", "attention.indexer.types", np.array([False, True, True]), "types is false for the first layer"),
        ("hy_v4", "attention.indexer.top_k", 0, "has no use for blk.0.indexer"),
        ("hy_v4", "rope.scaling.type", "yarn", "rope.scaling.type is 'yarn'; this version needs none"),
        ("minimax-m3", "attention.indexer.head_count", 4, r"head_count is 4; expected attention.head_count_kv \(2\)"),
        ("minimax-m3", "attention.indexer.key_length", 4, "key_length is 4; expected at least rope.dimension_count"),
        ("minimax-m3", "attention.indexer.key_length", 640, "key_length is 640; this version computes at most 576"),
        ("minimax-m3", "attention.indexer.top_k", 1 << 15, "top_k is 32768; this version computes at most 16384"),
        ("minimax-m3", "attention.indexer.block_size", 0, "block_size is 0; expected an integer from 1"),
        ("minimax-m3", "attention.indexer.block_size", 1 << 17, "is 131072; this version computes at most 65536"),
        ("minimax-m3", "attention.indexer.local_blocks", 0, "local_blocks is 0; expected an integer from 1"),
        ("minimax-m3", "attention.indexer.local_blocks", 5, r"local_blocks is 5; expected at most .*top_k \(4\)"),
        ("minimax-m3", "leading_dense_block_count", 0, r"tensor blk\.0\.indexer\.q_proj\.weight is missing"),
        ("minimax-m3", "leading_dense_block_count", 2, r"has no use for blk\.1\.indexer"),
        (
            "minimax-m3",
            "attention.head_count",
            np.array([4, 2, 4], np.int32),
            "head_count or head_count_kv differs between layers",
        ),
        ("granite_swa", "rope.freq_base_swa", 500.0, "freq_base_swa is 500; this version needs that of rope.freq_base"),
        ("gemma4", "attention.shared_kv_layers", 2, "attention.shared_kv_layers is 2; this version runs the models"),
        ("gemma4", "embedding_length_per_layer_input", 8, "embedding_length_per_layer_input is 8; this version runs"),
        ("gemma4", "attention.key_length_swa", 640, "key_length_swa is 640; this version computes at most 576"),
        ("gemma4", "attention.value_length_swa", 4, r"value_length_swa is 4; expected that of keys \(8\)"),
        ("gemma4", "attention.value_length", 8, r"value_length is 8; expected that of keys \(16\)"),
        ("gemma4", "rope.dimension_count_swa", 16, "dimension_count_swa is 16; expected an even number up to the head"),
        ("gemma4", "final_logit_softcapping", 1e-9, "softcapping is 1e-09; expected a number from 1 to 1000000, or 0"),
        (
            "grok",
            "attn_logit_softcapping",
            -30.0,
            "attn_logit_softcapping is -30.0; expected a number from 1 to 1000000",
        ),
        ("grok", "final_logit_softcapping", 1e7, "final_logit_softcapping is 10000000.0; expected a number from 1 to"),
        ("grok", "rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor is 0.5; this version needs 1"),
        ("grok", "rope.scaling.yarn_attn_factor", 1.2, "yarn_attn_factor is 1.2; this version needs 1"),
        ("grok", "rope.scaling.yarn_beta_slow", 0.0, "yarn_beta_slow is 0.0; expected a number above 0, at most"),
        ("qwen4exp", "hyper_connection.count", 1, "hyper_connection.count is 1; expected an integer from 2"),
        ("qwen4exp", "hyper_connection.count", 9, "hyper_connection.count is 9; this version computes at most 8"),
        ("qwen4exp", "hyper_connection.low_rank", 0, "low_rank is 0; expected an integer from 1"),
        ("qwen4exp", "hyper_connection.low_rank", 16, r"hc_attn_down.weight has the shape \[32, 128\]"),
        ("qwen4exp", "attention.value_length", 8, r"value_length is 8; expected attention.key_length \(16\)"),
        ("qwen4exp", "attention.indexer.head_count", 0, "head_count is 0; expected an integer from 1"),
        ("qwen4exp", "attention.indexer.key_length", 8, r"is 8; expected at least rope.dimension_count \(16\)"),
        ("qwen4exp", "attention.indexer.key_length", 640, "key_length is 640; this version computes at most 576"),
        ("qwen4exp", "attention.indexer.top_k", 1 << 15, "top_k is 32768; this version computes at most 16384"),
        ("qwen4exp", "attention.indexer.top_k", 10, r"has a 4; this version needs divisors of .*top_k \(10\)"),
        (
            "qwen4exp",
            "attention.compress_ratios",
            np.array([0, 0, 4], np.int32),
            "3 numbers; expected one for each of 4",
        ),
        ("qwen4exp", "attention.compress_ratios", np.array([0, 5, 0, 4], np.int32), "has a 5; this version needs"),
        ("qwen4exp", "ple.layers", np.array([0, 2], np.int32), "ple.layers has 2 layers; this version needs one"),
        ("qwen4exp", "ple.layers", np.array([1], np.int32), "ple.layers is 1; expected a layer with a delta net"),
        ("qwen4exp", "ple.layers", np.array([4], np.int32), "ple.layers is 4; expected a layer with a delta net"),
        ("qwen4exp", "ple.ngram_size", 1, "ngram_size is 1; expected an integer from 2"),
        ("qwen4exp", "ple.ngram_size", 9, "ngram_size is 9; this version computes at most 8"),
        ("qwen4exp", "ple.heads_per_ngram", 33, "heads_per_ngram is 33; this version computes at most 32"),
        ("qwen4exp", "ple.heads_per_ngram", 3, r"per_layer_input is 8; expected embedding_length \(32\) over 6 heads"),
        ("qwen4exp", "ple.conv_kernel", 1, "conv_kernel is 1; expected an integer from 2"),
        ("qwen4exp", "ple.conv_kernel", 12, "conv_kernel is 12; this version computes at most 11"),
        ("qwen4exp", "ple.eos_token_id", -1, "eos_token_id is -1; expected an integer from 0"),
        (
            "qwen4exp",
            "ple.layer_multipliers",
            np.ones(2, np.uint64),
            "layer_multipliers is 2 numbers; expected at least 3",
        ),
        ("qwen4exp", "ple.head_offsets", np.ones(3, np.uint64), "head_offsets is 3 numbers; expected at least 4"),
        ("qwen4exp", "ple.head_vocab_sizes", np.zeros(4, np.uint64), "vocab_sizes is 0 from 0 on; expected sizes of"),
        ("qwen4exp", "ple.head_offsets", np.full(4, 1 << 31, np.uint64), "61 from 2147483648 on; expected sizes of"),
        (
            "qwen4exp",
            "ple.head_offsets",
            np.full(4, 220, np.uint64),
            "vocab_sizes is 293 rows; expected at most the 280",
        ),
        ("llama4", "expert_used_count", 2, "expert_used_count is 2; this version needs 1"),
        ("llama4", "embedding_length", 64, r"token_embd.weight has the shape \[128, 32\]; .* must be \[128, 64\]"),
    ],
)
def test_keys_that_cannot_be_followed_are_named(
    peer, tmp_path: Path, name: str, key: str, value: object, message: str
) -> None:
    parts = peer(name)
    parts.values[f"{name}.{key}"] = value
    with pytest.raises((GGUFError, UnsupportedModelError), match=message):
        load(parts, tmp_path)


def test_experts_in_a_space_of_their_own_have_no_gate_of_a_shared_one(peer, tmp_path: Path) -> None:
    parts = with_tensor(peer("kimi-k3"), "blk.3.ffn_gate_inp_shexp.weight", 1, 32)
    with pytest.raises(UnsupportedModelError, match=r"has no use for blk\.3\.ffn_gate_inp_shexp\.weight"):
        load(parts, tmp_path)


def test_residuals_that_are_too_many_are_counted(peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.models.kimi_k3.MOST_RESIDUALS", 3)
    message = "block_size is 2, so that 4 rows are mixed in the last of 5 layers; this version mixes at most 3"
    with pytest.raises(UnsupportedModelError, match=message):
        load(peer("kimi-k3"), tmp_path)


def test_layers_without_an_indexer_may_have_its_tensors_and_a_file_no_tail(peer, tmp_path: Path) -> None:
    """The key for the tail says what is always done; a layer that shares a choice leaves its indexer out."""
    parts = peer("glm5-next")
    del parts.values["glm5-next.attention.indexer.kpool_select_tail"]
    n_operations = len(load(parts, tmp_path).graph.operations)
    for name, shape in (("indexer.proj", (8, 32)), ("indexer_compressor_ape", (4, 64))):
        parts = with_tensor(parts, f"blk.3.{name}.weight", *shape)
    assert len(load(parts, tmp_path).graph.operations) == n_operations
    with pytest.raises(UnsupportedModelError, match=r"has no use for blk\.2\.indexer\.proj\.weight"):
        load(with_tensor(parts, "blk.2.indexer.proj.weight", 8, 32), tmp_path)


def test_pools_take_as_many_times_less_memory(peer, tmp_path: Path) -> None:
    """Keys of 24 values in three layers, in two 64 of pools of four, in float16; two pools and a tail are seen."""
    graph = load(peer("glm5-next"), tmp_path).graph
    found = measure(graph, Limits(16, 2, 4096, KVType.F16), stores_once=True)
    of_pools = 4 * (2 * 3 * 64)  # what the next ones are made of
    delta_nets = 4 * 2 * (3 * 3 * 64 + 4 * 16 * 16)
    assert found.recurrent_bytes == of_pools + delta_nets
    assert found.state_bytes == 2 * (3 * 4096 * 48 + 2 * 1024 * 128 + found.recurrent_bytes)
    assert found.position_bytes == 2 * 128 / 4
    assert found.window_bytes == 3 * 12 * 48


def test_what_deepseek4_files_may_leave_out(peer, tmp_path: Path) -> None:
    """Limits of the shared expert are those of the others, unless the file says something else."""
    parts = peer("deepseek4")
    assert load(parts, tmp_path).spec.moe.shared_limits == pytest.approx((0.0, 0.4, 0.8, 0.6))
    del parts.values["deepseek4.swiglu_clamp_shexp"]
    spec = load(parts, tmp_path).spec
    assert spec.moe.shared_limits == spec.moe.limits == pytest.approx((0.5, 1.0, 0.0, 0.7))
    first = next(info for info in parts.tensors if info.name == "blk.2.exp_probs_b.bias")
    parts.tensors.append(replace(first, name="blk.2.exp_probs_b_vl.bias"))  # for images
    load(parts, tmp_path)


def test_what_qwen4_files_may_leave_out(peer, tmp_path: Path) -> None:
    """Blocks, and n-grams; an indexer that is not asked may be there."""
    parts = peer("qwen4exp")
    spec = load(parts, tmp_path).spec
    assert spec.attention.indexer.periods == (0, 0, 0, 4)
    assert (spec.ngrams.layer, spec.ngrams.n_rows) == (2, 272)
    del parts.values["qwen4exp.attention.compress_ratios"], parts.values["qwen4exp.ple.layers"]
    parts.tensors[:] = [info for info in parts.tensors if ".ple_" not in info.name and "per_layer" not in info.name]
    model = load(parts, tmp_path)
    assert model.spec.ngrams is None
    assert not any(isinstance(op, ops.SelectPositions | ops.HashTokens) for op in model.graph.operations)


def test_a_table_of_ngrams_takes_no_memory_of_a_device(peer, tmp_path: Path) -> None:
    """A token reads four of its rows."""
    model = load(peer("qwen4exp"), tmp_path)
    found = measure(model.graph, Limits(16, 2, 4096, KVType.F16), stores_once=True)
    weights = [weight for op in model.graph.operations if isinstance(op, ops.Linear) for weight in op.weights]
    assert found.dense_bytes == found.read_bytes == sum(weight.n_bytes for weight in weights)
    assert (
        count_weights(model.graph).dense_bytes == found.read_bytes + 4 * 8 * 4 + 32 * 4
    )  # and a token's own embedding


def test_rows_that_tokens_share_take_as_many_times_less_memory(peer, tmp_path: Path) -> None:
    """Heads of 32 values, an indexer's of 64, in float16; rows of 4 tokens in 2 layers, of 128 in one; rings of 256."""
    found = measure(load(peer("deepseek4"), tmp_path).graph, Limits(16, 2, 4096, KVType.F16), stores_once=True)
    rows_of_4, rows_of_128 = 1024, 32
    shared = 2 * rows_of_4 * (64 + 128) + rows_of_128 * 64
    assert found.recurrent_bytes == 4 * (2 * 6 * (32 + 64) + 3 * 32)
    assert found.state_bytes == 2 * (4 * 256 * 64 + shared + found.recurrent_bytes)
    assert found.stretches == ()
    assert found.position_bytes == (2 * rows_of_4 * 128 + rows_of_128 * 64) / 4096
    assert found.window_bytes == 4 * 8 * 64 + 2 * 3 * 64


@pytest.mark.parametrize(
    ("name", "weight_format", "message"),
    [
        (
            "blk.0.ffn_gate_tid2eid.weight",
            BY_NAME["F32"],
            r"has the type F32; expected integers \(I32\)",
        ),
        ("blk.0.attn_kv.weight", I32, "attn_kv.weight has the type I32; expected weights"),
        ("blk.0.attn_norm.weight", I32, "attn_norm.weight has the type I32; expected weights"),
    ],
)
def test_integers_are_in_tables_only(peer, tmp_path: Path, name: str, weight_format: QuantFormat, message: str) -> None:
    parts = peer("deepseek4")
    changed = [replace(info, format=weight_format) if info.name == name else info for info in parts.tensors]
    with pytest.raises(GGUFError, match=message):
        load(replace(parts, tensors=changed), tmp_path)


@pytest.mark.parametrize(("ids", "found"), [([0, 8], "0 to 8"), ([-1, 7], "-1 to 7")])
def test_a_table_names_experts_that_there_are(ids: list[int], found: str) -> None:
    class Bytes:
        is_own_memory = True

        def array(self, name: str) -> np.ndarray:
            return np.array(ids, np.int32).view(np.uint8)

    with pytest.raises(GGUFError, match=f"table names expert {found}; the model has 0 to 7"):
        expert_table(Bytes(), ops.Table("table", 1, 2), 8)


def test_layers_that_choose_what_attention_looks_at(peer, tmp_path: Path) -> None:
    """By a list, else all of them, or in models for very long contexts by a rule."""

    def layers(parts: Parts) -> tuple[bool, ...]:
        return load(parts, tmp_path).spec.attention.indexer.layers

    parts = peer("glm-dsa")
    assert layers(parts) == (True, False, True)
    del parts.values["glm-dsa.attention.indexer.types"]
    with pytest.raises(GGUFError, match=r"tensor blk\.1\.indexer\.attn_k\.weight is missing"):
        load(parts, tmp_path)
    parts.values["glm-dsa.attention.indexer.types"] = np.array([True, False, False])
    assert layers(parts) == (True, False, False)  # with an indexer that is left out
    early = load_model(SyntheticModel.open("synthetic:glm-5:layers=8,context=1048576"))
    assert early.spec.attention.indexer.layers == (True, True, True, False, False, False, True, False)
    parts = peer("deepseek32")
    parts.values.update(
        {
            "deepseek32.context_length": 1 << 20,
            "deepseek32.attention.indexer.types": np.array([True, False]),
        }
    )
    assert layers(parts) == (True, True)


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_tensor_is_named(peer, tmp_path: Path, name: str) -> None:
    output = "attn_output_b" if name == "deepseek4" else "attn_output"
    with pytest.raises(GGUFError, match=rf"tensor blk\.\d\.{output}\.weight is missing"):
        load(without_tensors(peer(name), f"{output}.weight"), tmp_path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "attn_k_norm.weight", "ffn_gate_inp.scale"])
def test_what_gemma4_cannot_be_computed_without(peer, tmp_path: Path, name: str) -> None:
    with pytest.raises(GGUFError, match=f"tensor .*{name} is missing"):
        load(without_tensors(peer("gemma4"), name), tmp_path)


def test_gemma4_without_experts_is_dense(peer, tmp_path: Path) -> None:
    parts = peer("gemma4")
    del parts.values["gemma4.expert_count"]
    for name in ("_exps.weight", "_exps.scale", "inp.weight", "inp.scale", "ffw_norm_1.weight", "norm_2.weight"):
        parts = without_tensors(parts, name)
    graph = load(parts, tmp_path).graph
    assert not graph.routings
    assert sum(isinstance(op, ops.Gate) for op in graph.operations) == 4


@pytest.mark.parametrize(("epsilons", "eps", "centers"), [((0.1, 0.2), 0.1, False), ((0.0, 0.2), 0.2, True)])
def test_the_epsilons_of_cohere2moe_say_which_norm_it_has(
    peer, tmp_path: Path, epsilons: tuple[float, float], eps: float, centers: bool
) -> None:
    parts = peer("cohere2moe")
    names = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    parts.values.update({f"cohere2moe.{name}": value for name, value in zip(names, epsilons, strict=True)})
    norms = [op for op in load(parts, tmp_path).graph.operations if isinstance(op, ops.RMSNorm)]
    assert len(norms) == 5
    assert {(norm.eps, norm.centers) for norm in norms} == {(eps, centers)}


@pytest.mark.parametrize("name", ["arctic", "cohere2moe"])
def test_attention_comes_while_experts_are_waited_for(peer, tmp_path: Path, name: str) -> None:
    kinds = [type(op) for op in load(peer(name), tmp_path).graph.operations]
    first = kinds.index(ops.Experts)
    assert ops.Attention in kinds[first : kinds.index(ops.Combine)]


def test_a_limit_of_0_clamps_nothing(peer, tmp_path: Path) -> None:
    parts = peer("dbrx")
    assert sum(isinstance(op, ops.Clamp) for op in load(parts, tmp_path).graph.operations) == 2
    parts.values["dbrx.attention.clamp_kqv"] = 0.0
    assert not any(isinstance(op, ops.Clamp) for op in load(parts, tmp_path).graph.operations)


def test_long_rope_needs_both_sets_of_divisors(peer, tmp_path: Path) -> None:
    parts = without_tensors(peer("phimoe"), "factors_long.weight")
    with pytest.raises(GGUFError, match=r"tensor rope_factors_long.weight is missing"):
        load(parts, tmp_path)
    parts = without_tensors(parts, "factors_short.weight")
    ropes = [op for op in load(parts, tmp_path).graph.operations if isinstance(op, ops.Rope)]
    assert {(op.divisors, op.magnitude) for op in ropes} == {((), 1.25)}
    parts.values["phimoe.rope.scaling.type"] = "longrope"
    with pytest.raises(GGUFError, match=r"tensor rope_factors_short.weight is missing"):
        load(parts, tmp_path)


def test_experts_that_groups_share_are_no_layer_of_the_cache(data: Path) -> None:
    """They are dense weights, of which a token reads some; a MoE layer is counted once."""
    with GGUFFile.open(data / "peers" / "grovemoe-F32.gguf") as file:
        graph = load_model(file).graph
    footprint, traffic = measure(graph, Limits(64, 1, 256, KVType.F16)), count_weights(graph)
    assert len(graph.routings) == len(footprint.expert_bytes) == traffic.expert_layers == 3
    shared = 3 * 4 * 32 * 32 * 4  # matrices and experts of a layer
    assert footprint.idle_bytes == 3 * shared // 4  # three of four are used
    assert footprint.read_bytes + footprint.chosen_bytes == traffic.token_bytes - 32 * 4  # that is a row of embeddings


def test_without_a_shared_expert_nothing_is_halved(peer, tmp_path: Path) -> None:
    parts = peer("cohere2moe")
    halved, whole = load(parts, tmp_path), load(without_tensors(parts, "_shexp.weight"), tmp_path)
    for model, scale in ((halved, 0.5), (whole, 1.0)):
        assert {op.scale for op in model.graph.operations if isinstance(op, ops.Combine)} == {scale}


@pytest.mark.parametrize("name", ["blk.0.ffn_norm.bias", "blk.1.attn_sub_norm.weight", "position_embd.weight"])
def test_a_tensor_without_use_is_refused(peer, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"forward pass of llama has no use for {name}; .* variant"):
        load(with_tensor(peer("llama"), name, 32), tmp_path)


def test_experts_in_tensors_of_their_own_are_refused(peer, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"every expert in a tensor of its own .* convert the model again"):
        load(with_tensor(peer("llama"), "blk.0.ffn_gate.0.weight", 64, 32), tmp_path)


@pytest.mark.parametrize(
    ("name", "of_blocks"),
    [
        ("bailingmoe2", {}),
        (
            "bailingmoe3",
            {
                "attention.head_count_kv": np.array([0, 1, 0, 1], np.int32),
                "swiglu_clamp_exp": np.array([0.0, 0.5, 0.0, 0.25], np.float32),
            },
        ),
    ],
)
def test_blocks_for_multi_token_prediction_are_left_out(
    peer, tmp_path: Path, name: str, of_blocks: dict[str, np.ndarray]
) -> None:
    parts = peer(name)
    alone = load(parts, tmp_path)
    more = {"block_count": 4, "nextn_predict_layers": 1} | of_blocks
    parts.values.update({f"{name}.{key}": value for key, value in more.items()})
    model = load(with_tensor(parts, "blk.3.nextn.eh_proj.weight", 32, 64), tmp_path)
    moe = replace(model.spec.moe, limits=model.spec.moe.limits[: alone.spec.n_layers])  # one more is of that block
    assert replace(model.spec, moe=moe) == alone.spec
    assert model.tensor_names == alone.tensor_names


def test_a_head_that_is_counted_but_left_out_of_deepseek4(peer, tmp_path: Path) -> None:
    parts = peer("deepseek4")
    n_layers = load(parts, tmp_path).spec.n_layers
    parts.values["deepseek4.nextn_predict_layers"] = 1
    spec = load(parts, tmp_path).spec
    assert spec.n_layers == n_layers
    assert spec.draft_layer is None


def _rotations(model: Model) -> list[np.ndarray]:
    return [op.frequencies for op in model.graph.operations if isinstance(op, ops.Rope)]


@pytest.mark.parametrize(("name", "differs"), [("glm4moe-mtp", False), ("qwen35moe-mtp", True)])
def test_axes_of_pictures_change_text_only_where_they_take_turns(
    peer, tmp_path: Path, name: str, differs: bool
) -> None:
    parts = peer(name)
    architecture = parts.values["general.architecture"]
    sections = f"{architecture}.rope.dimension_sections"
    parts.values.pop(sections, None)
    plain = _rotations(load(parts, tmp_path))
    parts.values[sections] = np.array([1, 2, 1, 0], np.int32)
    assert np.array_equal(plain[0], _rotations(load(parts, tmp_path))[0]) != differs


def test_older_names_of_linear_scaling(peer, tmp_path: Path) -> None:
    parts = peer("llama")
    plain = _rotations(load(parts, tmp_path))[0]
    parts.values["llama.rope.scale_linear"] = 4.0
    np.testing.assert_allclose(_rotations(load(parts, tmp_path))[0], plain / 4)
    parts.values["llama.rope.scaling.factor"] = 0.0  # none
    np.testing.assert_allclose(_rotations(load(parts, tmp_path))[0], plain)


def test_layers_without_experts_use_none(peer, tmp_path: Path) -> None:
    parts = peer("dbrx")
    n_used = load(parts, tmp_path).spec.moe.n_experts_used
    parts.values["dbrx.expert_used_count"] = np.array([0, n_used], np.int32)
    assert load(parts, tmp_path).spec.moe.n_experts_used == n_used


def test_jamba_counts_one_expert_where_it_has_none(peer, tmp_path: Path) -> None:
    parts = without_tensors(without_tensors(peer("jamba"), "_exps.weight"), "ffn_gate_inp.weight")
    for layer in (0, 2):
        for name in ("gate", "up", "down"):
            parts = with_tensor(parts, f"blk.{layer}.ffn_{name}.weight", 32, 32)
    parts.values.update({"jamba.expert_count": 1, "jamba.expert_used_count": 1})
    model = load(parts, tmp_path)
    assert model.spec.moe == MoESpec()
    assert not model.graph.routings


@pytest.mark.parametrize("name", PEERS)
def test_heads_that_contradict_themselves(peer, tmp_path: Path, name: str) -> None:
    rng, path, parts = random.Random(0), tmp_path / "changed.gguf", peer(name)
    outcomes = set()
    for _ in range(40):
        path.write_bytes(damage_parts(rng, parts).encode(rng))
        outcomes.add(exercise(path))
    assert "GGUFError" in outcomes <= {"ran", "GGUFError", "UnsupportedModelError"}


# -- the same weights, stored in another way -------------------------------------------------------------------------


class Stored:
    """A model file made of arrays in memory, float32 all of them."""

    def __init__(self, metadata: Metadata, arrays: dict[str, np.ndarray]) -> None:
        self.name, self.metadata = "stored", metadata
        self._arrays = arrays
        self.tensors = {name: TensorInfo(name, BY_NAME["F32"], a.shape, a.nbytes) for name, a in arrays.items()}

    def mapped(self, name: str) -> np.ndarray:
        return np.ascontiguousarray(self._arrays[name], np.float32).view(np.uint8).reshape(-1)


def fuse_qkv(arrays: dict[str, np.ndarray], layer: int) -> None:
    """One matrix and one bias for queries, keys and values."""
    for kind in ("weight", "bias"):
        parts = [arrays.pop(f"blk.{layer}.attn_{part}.{kind}") for part in "qkv"]
        arrays[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)


def interleave_delta_net(arrays: dict[str, np.ndarray], layer: int) -> None:
    """One matrix for all inputs of a delta net, a key head at a time: its query, key, values and output gates."""
    name, n_k_heads = f"blk.{layer}.attn_qkv.weight", 2
    if f"blk.{layer}.ssm_ba.weight" not in arrays:
        return
    qkv, z = arrays.pop(name), arrays.pop(f"blk.{layer}.attn_gate.weight")
    key_size = (len(qkv) - len(z)) // 2
    parts = [*np.split(qkv, [key_size, 2 * key_size]), z]
    by_head = [part.reshape(n_k_heads, -1, part.shape[-1]) for part in parts]
    arrays[f"blk.{layer}.ssm_in.weight"] = np.concatenate(by_head, axis=1).reshape(-1, qkv.shape[-1])


def join_keys_and_values(arrays: dict[str, np.ndarray], layer: int) -> None:
    """One matrix for keys and values, head by head, as files from before `attn_k_b` have it."""
    if f"blk.{layer}.attn_k_b.weight" not in arrays:
        return
    keys, values = (arrays.pop(f"blk.{layer}.attn_{part}_b.weight") for part in "kv")
    joined = np.concatenate([keys.transpose(0, 2, 1), values], axis=1)
    arrays[f"blk.{layer}.attn_kv_b.weight"] = joined.reshape(-1, joined.shape[-1])


def fuse_kimi(arrays: dict[str, np.ndarray], layer: int) -> None:
    """One matrix for queries, keys and values of a delta net, and one for keys and values of latent attention."""
    join_keys_and_values(arrays, layer)
    if f"blk.{layer}.attn_v.weight" in arrays:
        parts = [arrays.pop(f"blk.{layer}.attn_{part}.weight") for part in "qkv"]
        arrays[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts)


def older_sizes(metadata: Metadata) -> Metadata:
    """The keys of a DeepSeek file from then: sizes of a head where today's files have those of the cache."""
    values = {key: metadata.value(key) for key in metadata}
    for key in ("key_length", "value_length"):
        if f"deepseek2.attention.{key}_mla" in values:
            values[f"deepseek2.attention.{key}"] = values.pop(f"deepseek2.attention.{key}_mla")
            values["deepseek2.attention.head_count_kv"] = values["deepseek2.attention.head_count"]
    return Metadata("older", values)


@pytest.mark.parametrize(
    ("name", "restore"),
    [
        ("qwen2moe/qwen2moe-micro-F32", fuse_qkv),
        ("qwen3next/qwen3next-micro-F32", interleave_delta_net),
        ("deepseek2/deepseek2-v3-micro-F32", join_keys_and_values),
        ("peers/kimi-linear-F32", fuse_kimi),
    ],
)
def test_fused_tensors_change_no_bit(golden_path, data: Path, tmp_path: Path, name: str, restore) -> None:
    is_peer, fused = name.startswith("peers/"), tmp_path / "fused.gguf"
    path = data / f"{name}.gguf" if is_peer else golden_path(f"{name}.gguf")
    with GGUFFile.open(path) as file:
        arrays = {name: file.mapped(name).view(np.float32).reshape(info.shape) for name, info in file.tensors.items()}
        n_tensors = len(arrays)
        for layer in range(file.metadata.integer(f"{file.metadata.text('general.architecture')}.block_count")):
            restore(arrays, layer)
        assert len(arrays) < n_tensors
        write_gguf(Stored(older_sizes(file.metadata), arrays), fused)
    tokens = list(range(3, 40, 2))
    with ModelRunner(path) as apart, ModelRunner(fused) as together:
        assert np.array_equal(together.logits(tokens).view(np.uint32), apart.logits(tokens).view(np.uint32))


# -- files of an older form ------------------------------------------------------------------------------------------


class Joined:
    """A DeepSeek file with one tensor: keys and values of three heads, 16 and 24 rows each, in quantised blocks."""

    def __init__(self, form: str, **sizes: int) -> None:
        values = {"key_length": 26, "value_length": 24, "head_count": 3, "kv_lora_rank": 256} | sizes
        keys = {f"deepseek2.attention.{key}": value for key, value in values.items()}
        self.name, self.metadata = "joined", Metadata("joined", keys | {"deepseek2.rope.dimension_count": 10})
        info = TensorInfo("blk.0.attn_kv_b.weight", BY_NAME[form], (120, 256), 120 * BY_NAME[form].row_bytes(256))
        self.bytes = np.empty(info.n_bytes, np.uint8)
        if form == "F32":
            self.bytes.view(np.float32)[:] = np.random.default_rng(0).standard_normal(120 * 256)
        else:
            _kernels.fill_random_blocks(info.format.ggml_type, self.bytes.reshape(120, -1), 256, 1, 1)
        self.tensors = {info.name: info, "norm": TensorInfo("norm", BY_NAME["F32"], (256,), 1024)}

    def mapped(self, name: str) -> np.ndarray:
        return self.bytes if name == "blk.0.attn_kv_b.weight" else np.zeros(1024, np.uint8)

    def read(self, name: str, out: np.ndarray, n_threads: int, progress) -> None:
        out[:] = self.mapped(name)


@pytest.mark.parametrize("form", ["F32", "F16", "Q8_0", "Q4_K", "IQ4_XS"])
def test_joined_keys_and_values_are_taken_apart_exactly(form: str) -> None:
    file = Joined(form)
    now = in_current_form(file)
    assert list(now.tensors) == ["blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight", "norm"]
    seen: list[tuple[int, int]] = []
    memory = WeightMemory.load(now, now.tensors, "mmap", progress=lambda *done: seen.append(done))
    assert memory.mode == "mmap"
    assert seen[-1] == (memory.n_bytes, memory.n_bytes)
    rows = dequantize(BY_NAME[form], file.bytes.reshape(120, -1), 256).reshape(3, 40, 256)
    keys, values = (now.tensors[f"blk.0.attn_{part}_b.weight"] for part in "kv")
    assert (keys.shape, keys.format.name, values.shape, values.format.name) == ((3, 256, 16), "F32", (3, 24, 256), form)
    assert np.array_equal(memory.array(keys.name).view(np.float32).reshape(keys.shape), rows[:, :16].transpose(0, 2, 1))
    assert np.array_equal(memory.array(values.name).reshape(3, 24, -1), file.bytes.reshape(3, 40, -1)[:, 16:])


@pytest.mark.parametrize("sizes", [{"value_length": 25}, {"head_count": 4}, {"key_length": 10}, {"kv_lora_rank": 32}])
def test_joined_keys_and_values_that_contradict_the_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(GGUFError, match=r"attn_kv_b.weight has the shape \[120, 256\]; by the file's metadata"):
        in_current_form(Joined("F32", **sizes))


def test_a_file_with_both_forms_is_read_from_the_joined_one() -> None:
    file = Joined("Q8_0")
    file.tensors["blk.0.attn_k_b.weight"] = TensorInfo("blk.0.attn_k_b.weight", BY_NAME["Q8_0"], (768, 16), 1)
    assert in_current_form(file).tensors["blk.0.attn_k_b.weight"].shape == (3, 256, 16)
