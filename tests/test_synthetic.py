"""Made-up models: the published shapes, the formats that llama-quantize would choose, and weights that stay sane."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from model_runner import ModelRunner

from engine.data import tiny_model_path
from engine.errors import ConfigError
from engine.gguf import GGUFFile, WeightMemory, write_gguf
from engine.gguf.recipes import RECIPES, choose_format
from engine.models import load_model
from engine.synthetic import PUBLISHED, SyntheticModel, open_model_file
from engine.synthetic.published import PerLayer, Published
from engine.synthetic.recorder import record_tensors

# parameters in billions, tensors, F32 tensors: as published, or read off published files
SIZES = {
    "qwen3.5-122b-a10b": (122.1, 879, 361),
    "qwen3.5-35b-a3b": (34.7, 733, 301),
    "qwen3-235b-a22b": (235.1, 1131, 471),
    "qwen3-30b-a3b": (30.5, 579, 241),
}


@pytest.mark.parametrize("name", SIZES)
def test_has_the_published_size(name: str) -> None:
    model = open_model_file(f"synthetic:{name}")
    n_weights = sum(math.prod(t.shape) for t in model.tensors.values())
    n_float = sum(t.format.name == "F32" for t in model.tensors.values())
    assert (round(n_weights / 1e9, 1), len(model.tensors), n_float) == SIZES[name]


def share_of_experts(name: str) -> float:
    """How many of the experts a token takes."""
    return PUBLISHED[name].size("expert_used_count") / PUBLISHED[name].size("expert_count")


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("deepseek-v3.2", 671, 36.5),  # 37 with the output matrix
        ("deepseek-v4-flash", 284, 13),
        ("glm-4.5-air", 106, 12),
        ("glm-5", 744, 40),
        ("glm-5.3-flash", 313, 16),  # 18 with the output matrix and the block for multi-token prediction
        ("gpt-oss-120b", 117, 4.6),  # 5.1 with the output matrix
        ("kimi-k3", 2779, 103),  # 104 with the output matrix
        ("ling-3.0-flash", 124, 5.1),
        ("minimax-m2", 229, 10),
        ("minimax-m3", 426, 23.5),  # 428 with its eyes
        ("qwen3.8-flash-next", 125 + 51, 6 + 51),  # with the table of n-grams
    ],
)
def test_has_about_the_published_size(name: str, billions: int, active: int) -> None:
    model = open_model_file(f"synthetic:{name}@q8_0")
    sizes = {tensor.name: math.prod(tensor.shape) / 1e9 for tensor in model.tensors.values()}
    experts = sum(size for tensor, size in sizes.items() if tensor.endswith("_exps.weight"))
    chosen = experts * share_of_experts(name)
    tables = sizes["token_embd.weight"] + sizes["output.weight"]
    assert sum(sizes.values()) == pytest.approx(billions, abs=1.5)
    assert sum(sizes.values()) - tables - experts + chosen == pytest.approx(active, abs=0.5)


def test_gemma4_has_the_published_size() -> None:
    """25.2 billion, of which a token takes 3.8: embeddings count once, and are the output matrix, too."""
    model = open_model_file("synthetic:gemma4-26b-a4b")
    sizes = {tensor.name: math.prod(tensor.shape) / 1e9 for tensor in model.tensors.values()}
    experts = sum(size for tensor, size in sizes.items() if tensor.endswith("_exps.weight"))
    chosen = experts * share_of_experts("gemma4-26b-a4b")
    assert round(sum(sizes.values()), 1) == 25.2
    assert round(sum(sizes.values()) - experts + chosen, 1) == 3.8
    few = open_model_file("synthetic:gemma4-26b-a4b:layers=2")
    assert set(load_model(few).tensor_names) == set(few.tensors)


def test_the_first_target_weighs_what_its_file_does() -> None:
    model = SyntheticModel.open("synthetic:qwen3.5-122b-a10b@q4_k_l")
    assert 74.5e9 < model.n_bytes < 75.5e9
    assert model.n_bytes == sum(t.n_bytes for t in model.tensors.values())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_forward_pass_binds_every_tensor(name: str, recipe: str) -> None:
    model = open_model_file(f"synthetic:{name}@{recipe}:vocab=4096")  # names of more tokens only take long
    loaded = load_model(model)
    assert set(loaded.tensor_names) == set(model.tensors)
    assert loaded.spec.n_layers == PUBLISHED[name].size("block_count")
    assert loaded.spec.moe.n_experts == PUBLISHED[name].size("expert_count")


PEERS = sorted(path.stem.removesuffix("-F32") for path in (Path(__file__).parent / "data/peers").glob("*-F32.gguf"))
NOT_BY_KEYS = {
    "dots3note": "gates differ in size",
    "grok-1": "files of then had no key for the size of experts",
    "laguna": "gates differ in size",
    "llama4": "its shared expert is in no key",
    "nemotron_h": "the only size of its networks is one for each block",
    "qwen4exp": "has indexers that are left out",
    "step35": "gates differ in size",
    "step35-mtp": "gates differ in size",
}
BY_RULE = {f"ffn_{part}.weight" for part in ("gate_inp", "down_exps", "gate_shexp", "down_shexp")}
SHAPES = {f"{part}.weight" for part in ("attn_gate", "attn_q_norm", "attn_k_norm", "ffn_up_shexp")}
SHAPES |= {"ssm_a", "per_layer_token_embd.weight"}


@pytest.mark.parametrize("name", [name for name in PEERS if name not in NOT_BY_KEYS])
def test_keys_tell_the_tensors_of_any_architecture(data: Path, name: str) -> None:
    """Names and shapes of files that llama.cpp reads, too."""
    with GGUFFile.open(data / "peers" / f"{name}-F32.gguf") as file:
        metadata, shapes = file.metadata, {tensor: info.shape for tensor, info in file.tensors.items()}
    architecture = metadata.text("general.architecture")
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): metadata.value(key) for key in metadata if key.startswith(prefix)}
    n_blocks, of_parts = keys["block_count"], {}  # shapes of each part, by block
    for tensor, shape in shapes.items():
        if tensor.startswith("blk."):
            _, block, part = tensor.split(".", 2)
            of_parts.setdefault(part, {})[int(block)] = shape
    layers = {
        part: PerLayer(tuple(block in of_parts.get(part, ()) for block in range(n_blocks)))
        for part in {*of_parts, *BY_RULE}
    }
    same = {part: {*found.values()}.pop() for part, found in of_parts.items() if len({*found.values()}) == 1}
    said = {part: shape for part, shape in {**shapes, **same}.items() if part in SHAPES}
    published = Published(architecture, shapes["token_embd.weight"][0], keys, tuple(shapes), layers, said)
    infos = record_tensors(name, published, metadata, RECIPES["f16"])
    n_layers = n_blocks - keys.get("nextn_predict_layers", 0)
    has_head = f"blk.{n_layers}.nextn.eh_proj.weight" in infos
    left_out = f"blk.{n_layers}.indexer.", *(f"blk.{block}." for block in range(n_layers + has_head, n_blocks))
    assert {tensor: info.shape for tensor, info in infos.items()} == {
        tensor: shape for tensor, shape in shapes.items() if not tensor.startswith(left_out)
    }


# -- formats ---------------------------------------------------------------------------------------------------------


def differing_formats(path: Path) -> list[tuple[str, str, str]]:
    """Return (tensor, format in the file, our choice) where they differ; F32 tensors are not for us to choose."""
    recipe = RECIPES[re.search(r"-([A-Z0-9_]+)\.gguf", path.name)[1].lower()]
    with GGUFFile.open(path) as file:
        n_layers = file.metadata.integer(f"{file.metadata.text('general.architecture')}.block_count")
        differing = []
        for info in file.tensors.values():
            layer = int(info.name.split(".")[1]) if info.name.startswith("blk.") else 0
            chosen = choose_format(recipe, info.name, layer, n_layers, info.shape[-1]).name
            if info.format.name not in {"F32", chosen}:
                differing.append((info.name, info.format.name, chosen))
    return differing


@pytest.mark.parametrize("name", ["qwen35moe/qwen35moe-wide-Q4_K_M", "qwen3moe/qwen3moe-micro-Q8_0"])
def test_chooses_formats_as_llama_quantize_does(data: Path, name: str) -> None:
    assert differing_formats(data / "golden" / f"{name}.gguf") == []


@pytest.mark.parametrize("name", ["qwen35moe/*-MXFP4", "qwen35moe/*-Q3_K_M", "qwen3moe/*-Q4_K_M", "qwen3moe/*-Q5_K_M"])
def test_chooses_formats_as_llama_quantize_does_in_all_golden_files(shared: Path, name: str) -> None:
    paths = list((shared / "golden").glob(f"{name}.gguf"))
    assert paths
    assert {path.name: differing_formats(path) for path in paths} == {path.name: [] for path in paths}


@pytest.mark.parametrize(("usual", "formats"), [("IQ4_XS", ("IQ4_XS", "Q5_K")), ("Q2_K", ("Q3_K", "Q4_K"))])
def test_values_shared_by_many_heads_get_more_bits(shared: Path, usual: str, formats: tuple[str, str]) -> None:
    # llama-quantize does so from four query heads to a value head on; the golden file has two, every real model more
    differing = differing_formats(shared / "golden" / "qwen35moe" / f"qwen35moe-wide-{usual}.gguf")
    assert {(name.split(".")[2], *formats) for name, *formats in differing} == {
        ("attn_qkv", *formats),
        ("attn_v", *formats),
    }


@pytest.mark.parametrize(
    ("usual", "n_cols", "expected"),
    [
        ("q4_k_m", 256, "Q4_K"),
        ("q4_k_m", 96, "Q5_0"),
        ("iq4_xs", 96, "IQ4_NL"),
        ("iq2_xxs", 512, "IQ2_XXS"),
        ("iq2_xxs", 96, "IQ4_NL"),
        ("q2_k", 96, "Q4_0"),
        ("q6_k", 96, "Q8_0"),
        ("q8_0", 8, "F16"),
    ],
)
def test_short_rows_get_short_blocks(usual: str, n_cols: int, expected: str) -> None:
    assert choose_format(RECIPES[usual], "blk.0.attn_q.weight", 0, 8, n_cols).name == expected


# -- weights ---------------------------------------------------------------------------------------------------------


def contents(name: str, n_threads: int = 1) -> dict[str, bytes]:
    model = open_model_file(name)
    with WeightMemory.load(model, model.tensors, "memory", n_threads=n_threads) as memory:
        return {tensor: memory.array(tensor).tobytes() for tensor in model.tensors}


def test_weights_depend_on_name_and_seed_alone() -> None:
    name = "synthetic:tiny@q4_k_m:layers=2,experts=5"
    first = contents(name)
    assert contents(name, n_threads=3) == first
    other = contents(f"{name},seed=1")
    assert all(other[tensor] != raw for tensor, raw in first.items())
    assert len(set(first.values())) == len(first)


def test_is_made_in_memory_whatever_the_mode() -> None:
    model = open_model_file("synthetic:tiny:layers=1")
    with WeightMemory.load(model, model.tensors, "mmap") as memory:
        assert memory.mode == "memory"
        assert memory.n_bytes == model.n_bytes


@pytest.mark.parametrize(
    "name",
    [
        "tiny@q4_k_m",
        "tiny@f16",
        "tiny@mxfp4",
        "qwen3-30b-a3b@q8_0:layers=2,experts=16,vocab=4096",
        "ling-3.0-flash@q8_0:layers=6,experts=4,used=2,vocab=4096",
        "glm-5@q8_0:layers=4,experts=4,used=2,vocab=4096",
        "deepseek-v4-flash@q8_0:layers=4,experts=8,used=2,vocab=4096",
        "glm-5.3-flash@q8_0:layers=5,experts=8,used=2,vocab=4096",
        "gpt-oss-120b@q8_0:layers=2,experts=8,used=2,vocab=4096",
        "hy4-preview@q8_0:layers=4,experts=8,used=2,vocab=4096",
    ],
)
def test_logits_are_sane(name: str) -> None:
    with ModelRunner(f"synthetic:{name}", max_tokens=6) as runner:
        logits, chosen = runner.logits([1, 200, 3000, 17, 5, 99]), runner.program.routing()
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3
    assert len({int(row.argmax()) for row in logits}) > 1  # the tokens before make a difference
    assert len(np.unique(chosen)) > runner.model.spec.moe.n_experts_used


def test_a_written_model_is_the_same_model(tmp_path: Path) -> None:
    model = open_model_file("synthetic:tiny@q5_k_m:layers=1")
    write_gguf(model, tmp_path / "tiny.gguf")
    with GGUFFile.open(tmp_path / "tiny.gguf") as file:
        assert {n: (t.format, t.shape) for n, t in file.tensors.items()} == {
            n: (t.format, t.shape) for n, t in model.tensors.items()
        }
        made = contents("synthetic:tiny@q5_k_m:layers=1")
        assert all(file.mapped(name).tobytes() == made[name] for name in made)
        assert file.metadata.texts("tokenizer.ggml.tokens") == model.metadata.texts("tokenizer.ggml.tokens")
    kinds = {key: field.types[-1].name for key, field in gguf.GGUFReader(tmp_path / "tiny.gguf").fields.items()}
    golden = {key: field.types[-1].name for key, field in gguf.GGUFReader(tiny_model_path()).fields.items()}
    shared_keys = set(kinds) & set(golden)
    assert len(shared_keys) > 30
    assert {key: kinds[key] for key in shared_keys} == {key: golden[key] for key in shared_keys}


# -- metadata and names ----------------------------------------------------------------------------------------------


def test_the_vocabulary_is_filled_up() -> None:
    metadata = open_model_file("synthetic:qwen3.5-122b-a10b").metadata
    tokens, types = metadata.texts("tokenizer.ggml.tokens"), metadata.integers("tokenizer.ggml.token_type")
    assert len(tokens) == len(set(tokens)) == len(types) == 248320
    assert (tokens[4096], tokens[-1], types[4096], types[-1]) == ("[PAD4096]", "[PAD248319]", 5, 5)
    assert tokens[metadata.integer("tokenizer.ggml.eos_token_id")] == "<|endoftext|>"


def test_options_change_the_shape() -> None:
    model = open_model_file("synthetic:QWEN3-30B-A3B@Q8_0:layers=2,experts=16,used=4,vocab=5000,context=100,seed=9")
    spec = load_model(model).spec
    assert (spec.n_layers, spec.moe.n_experts, spec.moe.n_experts_used) == (2, 16, 4)
    assert (spec.n_vocab, spec.context_length, model.seed) == (5000, 100, 9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic:", "there is no model '', only qwen3.5-122b-a10b, "),
        ("synthetic:qwen3-30-a3b", "there is no model 'qwen3-30-a3b'.*did you mean qwen3-30b-a3b"),
        ("synthetic:tiny@q4_km", "there is no quantisation 'q4_km'.*did you mean q4_k_m"),
        ("synthetic:tiny:layer=3", "unknown option 'layer'; expected layers, experts"),
        ("synthetic:tiny:layers", "option layers is ''; expected a number"),
        ("synthetic:tiny:layers=-1", "option layers is '-1'; expected a number"),
        ("synthetic:tiny:layers=²", "option layers is '²'; expected a number"),
        ("synthetic:tiny:layers=1,layers=2", "option layers is given twice"),
        ("synthetic:tiny:layers=0", "layers is 0; expected 1 to 1000"),
        ("synthetic:qwen3.8-flash-next:layers=1", "layers is 1; expected 2 to 1000"),
        ("synthetic:tiny:experts=2", "used is 4; expected 1 to 2"),
        ("synthetic:tiny:vocab=10", "vocab is 10; expected 4096 to 1000000"),
    ],
)
def test_says_what_is_wrong_with_a_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_model_file(name)
