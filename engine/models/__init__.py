"""Model architectures, chosen by `general.architecture`: one file for each that is not plain (`plain.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Protocol

from engine.devices.graph import Graph, Table, Vector, Weight
from engine.errors import UnsupportedModelError
from engine.gguf.model_file import ModelFile
from engine.model_spec import IndexerSpec, ModelSpec, PooledIndexerSpec
from engine.models import (
    afmoe,
    arctic,
    bailingmoe3,
    cohere2moe,
    dbrx,
    deepseek2,
    deepseek4,
    deepseek32,
    dots3note,
    exaone_moe,
    gemma4,
    glm5_next,
    gpt_oss,
    granite_swa,
    granitemoe,
    grok,
    grovemoe,
    hunyuan_moe,
    hy_v4,
    jamba,
    kimi_k3,
    kimi_linear,
    laguna,
    lfm2,
    llama,
    llama4,
    maple,
    mellum,
    mimo2,
    minimax_01,
    minimax_m3,
    nemotron_h,
    qwen3next,
    qwen4exp,
    qwen35moe,
    smallthinker,
    step35,
)
from engine.models.binding import Keys, Tensors
from engine.models.plain import PLAIN


class Architecture(Protocol):
    """What a file of this package defines."""

    def read_spec(self, keys: Keys, tensors: Tensors) -> ModelSpec:
        """Read the hyper-parameters."""
        ...

    def forward(self, spec: ModelSpec, tensors: Tensors) -> Graph:
        """Record the forward pass."""
        ...


ARCHITECTURES: dict[str, Architecture] = {
    **PLAIN,
    "afmoe": afmoe,
    "arctic": arctic,
    "bailingmoe3": bailingmoe3,
    "cohere2moe": cohere2moe,
    "dbrx": dbrx,
    "deepseek2": deepseek2,
    "deepseek32": deepseek32,
    "deepseek4": deepseek4,
    "dots3note": dots3note,
    "exaone-moe": exaone_moe,
    "gemma4": gemma4,
    "glm-dsa": deepseek32,
    "glm5-next": glm5_next,
    "gpt-oss": gpt_oss,
    "granite_swa": granite_swa,
    "granitehybrid": granitemoe,
    "granitemoe": granitemoe,
    "grok": grok,
    "grovemoe": grovemoe,
    "hunyuan-moe": hunyuan_moe,
    "hy_v4": hy_v4,
    "jamba": jamba,
    "kimi-k3": kimi_k3,
    "kimi-linear": kimi_linear,
    "laguna": laguna,
    "lfm2": lfm2,
    "lfm2moe": lfm2,
    "llama": llama,
    "llama4": llama4,
    "maple": maple,
    "mellum": mellum,
    "mimo2": mimo2,
    "minimax-01": minimax_01,
    "minimax-m3": minimax_m3,
    "mistral4": deepseek2,
    "nemotron_h": nemotron_h,
    "nemotron_h_moe": nemotron_h,
    "qwen35": qwen35moe,
    "qwen35moe": qwen35moe,
    "qwen3next": qwen3next,
    "qwen4exp": qwen4exp,
    "smallthinker": smallthinker,
    "step35": step35,
}


# Tensors that a forward pass may leave out: blocks for multi-token prediction, indexers of layers that share the choice
# of another or look at all positions, what NVFP4 files say of activations, and how experts are chosen for parts of
# images.
_BLOCK = re.compile(r"blk\.([0-9]{1,9})\.")
_UNUSED_SUFFIXES = ".input_scale", ".exp_probs_b_vl.bias"
_INDEXER = "indexer.", "indexer_compressor_"


@dataclass(frozen=True, slots=True)
class Model:
    """A model file understood: its hyper-parameters, its forward pass, and the tensors that this reads."""

    spec: ModelSpec
    graph: Graph

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of all tensors of the file that the forward pass reads, in order of first use."""
        names: dict[str, None] = {}
        draft = self.graph.draft
        for operation in (*self.graph.operations, *(draft.operations if draft else ())):
            for field in fields(operation):
                value = getattr(operation, field.name)
                for item in value if isinstance(value, tuple) else (value,):
                    if isinstance(item, (Weight, Vector, Table)):
                        names[item.name] = None
                    if isinstance(item, Weight) and item.scale is not None:
                        names[item.scale.name] = None
        return tuple(names)


def load_model(model_file: ModelFile, *, drafts: bool = False) -> Model:
    """Understand a model file; no weight is read. With `drafts` a block for multi-token prediction is used, too.

    Raises `UnsupportedModelError` for an architecture or variant that is not known, `GGUFError` for keys and tensors
    that are missing or do not fit together.
    """
    name = model_file.metadata.text("general.architecture")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise UnsupportedModelError(
            f"{model_file.name}: there is no forward pass for models of the architecture {name!r} "
            f"(general.architecture); this version runs {', '.join(sorted(ARCHITECTURES))}"
        )
    tensors = Tensors(model_file.name, model_file.tensors)
    spec = architecture.read_spec(Keys(model_file.metadata, tensors, name), tensors)
    if not drafts:
        spec = replace(spec, draft_layer=None)
    model = Model(spec, architecture.forward(spec, tensors))
    _check_all_used(model, model_file)
    return model


def _check_all_used(model: Model, model_file: ModelFile) -> None:
    """Refuse a file with weights that the forward pass leaves out: the text would be wrong, and nobody would know."""
    used = set(model.tensor_names)
    left_out = [name for name in model_file.tensors if name not in used and not _may_be_left_out(name, model.spec)]
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise UnsupportedModelError(
            f"{model_file.name}: the forward pass of {model.spec.architecture} has no use for {', '.join(left_out[:3])}"
            f"{more}; the file is of a variant that this version does not know"
        )


def _may_be_left_out(name: str, spec: ModelSpec) -> bool:
    block = _BLOCK.match(name)
    if name.endswith(_UNUSED_SUFFIXES) or block is None:
        return name.endswith(_UNUSED_SUFFIXES)
    layer, indexer = int(block[1]), getattr(spec.attention, "indexer", None)
    if layer >= spec.n_layers:
        return True
    needs_none = isinstance(indexer, IndexerSpec | PooledIndexerSpec) and not indexer.layers[layer]
    return needs_none and name.startswith(_INDEXER, block.end())
