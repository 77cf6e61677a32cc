"""Mixtures of formats: which one llama-quantize gives each weight, by the name of the mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.quants.formats import BY_NAME, QuantFormat

Choice = Callable[[int, int], str]  # (layer, n_layers) -> format name


def _always(name: str) -> Choice:
    return lambda _layer, _n_layers: name


def _more_bits(better: str, usual: str) -> Choice:
    """Choose the better format in the first and last eighth of the layers and in every third one between."""

    def choose(layer: int, n_layers: int) -> str:
        eighth = n_layers // 8
        is_better = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
        return better if is_better else usual

    return choose


def _first(count: int, better: str, usual: str) -> Choice:
    return lambda layer, _n_layers: better if layer < count else usual


def _first_part(divisor: int, better: str, usual: str) -> Choice:
    return lambda layer, n_layers: better if layer < n_layers // divisor else usual


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which format each weight gets, after the rules of llama-quantize; norms, routers and the like stay F32.

    Attributes:
        file_type: number of the mixture in `general.file_type`.
        usual: for all matrices not named below.
        embedding, output: for the two tables of the vocabulary.
        value: for `attn_v` and `attn_qkv`, the down projections and `attn_output`.
        down: for all down projections.
        attn_output: for the output projection of attention.
        experts: for the routed experts, whatever the others say; empty for no exception.
    """

    file_type: int
    usual: str
    embedding: str
    output: str
    value: Choice
    down: Choice
    attn_output: str
    experts: str = ""


def _uniform(file_type: int, name: str) -> Recipe:
    return Recipe(file_type, name, name, name, _always(name), _always(name), name)


_Q4_K_M = Recipe(15, "Q4_K", "Q4_K", "Q6_K", _more_bits("Q6_K", "Q4_K"), _more_bits("Q6_K", "Q4_K"), "Q4_K")

RECIPES: dict[str, Recipe] = {
    "iq2_xxs": Recipe(19, "IQ2_XXS", "Q2_K", "Q5_K", _always("Q4_K"), _first_part(8, "Q2_K", "IQ2_XXS"), "IQ2_XXS"),
    "q2_k": Recipe(10, "Q2_K", "Q2_K", "Q6_K", _always("Q4_K"), _always("Q3_K"), "Q3_K"),
    "q3_k_m": Recipe(12, "Q3_K", "Q3_K", "Q6_K", _first(2, "Q5_K", "Q4_K"), _first_part(16, "Q5_K", "Q4_K"), "Q4_K"),
    "q4_k_s": Recipe(14, "Q4_K", "Q4_K", "Q6_K", _first(4, "Q5_K", "Q4_K"), _first_part(8, "Q5_K", "Q4_K"), "Q4_K"),
    "q4_k_m": _Q4_K_M,
    "q4_k_l": replace(_Q4_K_M, embedding="Q8_0", output="Q8_0"),
    "q5_k_m": Recipe(17, "Q5_K", "Q5_K", "Q6_K", _more_bits("Q6_K", "Q5_K"), _more_bits("Q6_K", "Q5_K"), "Q5_K"),
    "q6_k": _uniform(18, "Q6_K"),
    "q8_0": _uniform(7, "Q8_0"),
    "iq4_xs": Recipe(30, "IQ4_XS", "IQ4_XS", "Q6_K", _always("Q5_K"), _first_part(8, "Q5_K", "IQ4_XS"), "IQ4_XS"),
    "mxfp4": replace(_uniform(38, "Q8_0"), experts="MXFP4"),
    "f16": _uniform(1, "F16"),
}

# Formats whose blocks are longer than a row give way to ones with short blocks.
_FALLBACK = {
    "IQ2_XXS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


def choose_format(recipe: Recipe, name: str, layer: int, n_layers: int, n_cols: int) -> QuantFormat:
    """Return the format of a weight with rows of `n_cols`, in a layer of `n_layers` (0 for tensors of no layer)."""
    part = name.rsplit(".", 2)[-2]
    if part in {"token_embd", "per_layer_token_embd"}:
        chosen = recipe.embedding
    elif part == "output":
        chosen = recipe.output
    elif ".indexer." in name:
        chosen = "BF16"  # llama-quantize leaves them as they are
    elif recipe.experts and part.endswith("_exps"):
        chosen = recipe.experts
    elif part in {"attn_v", "attn_qkv"}:
        chosen = recipe.value(layer, n_layers)
    elif part.startswith("ffn_down"):
        chosen = recipe.down(layer, n_layers)
    elif part == "attn_output":
        chosen = recipe.attn_output
    else:
        chosen = recipe.usual
    if n_cols % BY_NAME[chosen].block_size:
        chosen = _FALLBACK.get(chosen, chosen)
    return BY_NAME[chosen if n_cols % BY_NAME[chosen].block_size == 0 else "F16"]
