"""Made-up models: the published shape of a real one, with random weights that are made straight in memory.

A model of 75 GB is there in half a minute, without a download, to see how fast a machine would run the real one. The
text it writes is nonsense, and its routers have no favourites: a cache of hot experts must be measured with recorded
routing. For that the routers can be given a bias for the choice of experts, which is zero until somebody writes it.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from engine.data import tiny_model_path
from engine.errors import ConfigError
from engine.gguf.metadata import Metadata, Value
from engine.gguf.model_file import TensorInfo
from engine.gguf.reader import GGUFFile
from engine.gguf.recipes import RECIPES, Recipe, choose_format
from engine.quants.formats import BY_NAME, I32

PREFIX = "synthetic:"
DEFAULT_RECIPE = "q4_k_m"


# -- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a model. Delta-net fields are 0 where every layer has softmax attention.

    `dense_ffn_size` is that of the first `n_dense_layers`, which have no experts, or of the networks beside experts.
    `latent_dim` and `value_dim` are 0 where attention is not latent; where it is, `n_rot` values of a head's `head_dim`
    are its rotated part. `query_rank` is 0 where queries are made in one step. `top_k` is 0 where attention looks at
    all positions; where it is not, an indexer chooses so many, with a `pool_size` that many at a time.

    With a `window` every layer has softmax attention; all but one of every `attention_interval` layers have the window,
    and in it `window_kv_heads` heads for keys and values, `window_head_dim` wide, and a rotation of their own.

    With an `output_rank` attention has one key that tokens share (`period`), in every layer beside those of a window,
    and its output is projected in `n_output_groups` groups of heads. `n_streams` residual streams are mixed, 0 where
    there is one; in the first `n_tables` layers a table chooses experts by token id.
    """

    architecture: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_rot: int
    rope_theta: float
    n_experts: int
    n_experts_used: int
    expert_ffn_size: int
    shared_ffn_size: int
    n_vocab: int
    context_length: int
    attention_interval: int = 1  # every so many layers one has softmax attention
    n_k_heads: int = 0
    n_v_heads: int = 0
    delta_head_dim: int = 0
    conv_kernel: int = 0
    n_dense_layers: int = 0
    dense_ffn_size: int = 0
    window: int = 0
    window_kv_heads: int = 0
    window_head_dim: int = 0
    window_rope_theta: float = 0.0
    latent_dim: int = 0
    value_dim: int = 0
    query_rank: int = 0
    n_indexer_heads: int = 0
    indexer_dim: int = 0
    top_k: int = 0
    n_output_groups: int = 0
    output_rank: int = 0
    n_streams: int = 0
    n_tables: int = 0
    pool_size: int = 0

    def is_recurrent(self, layer: int) -> bool:
        """Return whether a layer is a delta net."""
        return not self.window and (layer + 1) % self.attention_interval != 0

    def has_window(self, layer: int) -> bool:
        """Return whether a layer looks back no further than the window."""
        return self.window > 0 and (layer + 1) % self.attention_interval != 0

    def period(self, layer: int) -> int:
        """Return how many tokens share a key in a layer, 0 for none: by turns 4 and 128, but for the first two."""
        return (4, 128)[layer % 2] if self.output_rank and layer >= 2 else 0


@dataclass(frozen=True, slots=True)
class Style:
    """What an architecture fixes, as far as it shows in tensors and keys.

    Attributes:
        ffn_norm: tensor of the norm before the feed-forward network.
        query_parts: rows of `attn_q` for each value of a query; 2 where a gate lies beside it.
        head_norm: what a norm of queries and keys goes over: "head", "row" for all heads, or nothing.
        has_biases: whether queries, keys and values have biases.
        has_router_bias: whether there is a bias for the choice of experts.
        has_shared_gate: whether the shared expert is gated.
        has_head_gates: whether heads of latent attention are gated.
        has_dense_beside: whether a dense network lies beside the experts.
        has_output: whether there is an output matrix; without one the embeddings serve.
        vectors: further ones of each block, as long as the stream is wide, as there are experts, or one value.
        has_bounded_decays: whether the decays of delta nets are bounded; `ssm_a` is positive then.
        has_low_ranks: whether decays and gates of delta nets are made by way of vectors as wide as a head.
        averages_streams: whether the mean of residual streams goes to the head.
        keys: hyper-parameters that all its models have.
    """

    ffn_norm: str = "ffn_norm.weight"
    query_parts: int = 1
    head_norm: str = "head"
    has_biases: bool = False
    has_router_bias: bool = False
    has_shared_gate: bool = False
    has_head_gates: bool = False
    has_dense_beside: bool = False
    has_output: bool = True
    vectors: tuple[tuple[str, Literal["stream", "experts", "one"]], ...] = ()
    has_bounded_decays: bool = False
    has_low_ranks: bool = False
    averages_streams: bool = False
    keys: tuple[tuple[str, Value], ...] = ()


_SIGMOID, _SQRT_SOFTPLUS = 2, 4  # of `expert_gating_func`
_DEEPSEEK = Style(
    has_router_bias=True,
    keys=(
        ("expert_gating_func", _SIGMOID),
        ("expert_shared_count", 1),
        ("expert_weights_norm", True),
        ("expert_weights_scale", 2.5),
    ),
)
# Without groups of experts, which would forbid some of the routing that is played.
STYLES: dict[str, Style] = {
    "bailingmoe3": Style(
        has_router_bias=True,
        has_head_gates=True,
        has_bounded_decays=True,
        keys=(
            ("expert_gating_func", _SIGMOID),
            ("expert_shared_count", 1),
            ("expert_weights_norm", True),
            ("expert_weights_scale", 2.5),
            ("kda.safe_gate", True),
            ("kda.gate_lower_bound", -5.0),
        ),
    ),
    "deepseek32": _DEEPSEEK,
    "deepseek4": Style(
        has_router_bias=True,
        keys=(
            ("expert_gating_func", _SQRT_SOFTPLUS),
            ("expert_shared_count", 1),
            ("expert_weights_norm", True),
            ("expert_weights_scale", 1.5),
            ("swiglu_clamp_exp", 10.0),
            ("attention.compress_rope_freq_base", 160000.0),
            ("rope.scaling.type", "yarn"),
            ("rope.scaling.factor", 16.0),
            ("rope.scaling.original_context_length", 65536),
            ("hyper_connection.sinkhorn_iterations", 20),
        ),
    ),
    "gemma4": Style(
        has_dense_beside=True,
        has_output=False,
        vectors=(
            ("post_attention_norm.weight", "stream"),
            ("post_ffw_norm.weight", "stream"),
            ("post_ffw_norm_1.weight", "stream"),
            ("pre_ffw_norm_2.weight", "stream"),
            ("post_ffw_norm_2.weight", "stream"),
            ("ffn_gate_inp.scale", "stream"),
            ("ffn_down_exps.scale", "experts"),
            ("layer_output_scale.weight", "one"),
        ),
        keys=(
            ("attention.shared_kv_layers", 0),
            ("embedding_length_per_layer_input", 0),
            ("final_logit_softcapping", 30.0),
        ),
    ),
    "glm-dsa": _DEEPSEEK,
    "glm5-next": replace(
        _DEEPSEEK,
        has_bounded_decays=True,
        has_low_ranks=True,
        averages_streams=True,
        keys=(
            *_DEEPSEEK.keys,
            ("swiglu_clamp_exp", 10.0),
            ("kda.gate_lower_bound", -5.0),
            ("hyper_connection.sinkhorn_iterations", 20),
        ),
    ),
    "glm4moe": Style(
        "post_attention_norm.weight",
        head_norm="",
        has_biases=True,
        has_router_bias=True,
        keys=(
            ("expert_gating_func", _SIGMOID),
            ("expert_shared_count", 1),
            ("expert_weights_norm", True),
            ("expert_weights_scale", 1.0),
        ),
    ),
    "minimax-m2": Style(head_norm="row", has_router_bias=True, keys=(("expert_gating_func", _SIGMOID),)),
    "qwen35moe": Style("post_attention_norm.weight", query_parts=2, has_shared_gate=True),
    "qwen3moe": Style(),
}

GEOMETRIES: dict[str, Geometry] = {
    "qwen3.5-122b-a10b": Geometry(
        "qwen35moe", 48, 3072, 32, 2, 256, 64, 1e7, 256, 8, 1024, 1024, 248320, 262144, 4, 16, 64, 128, 4
    ),
    "qwen3.5-35b-a3b": Geometry(
        "qwen35moe", 40, 2048, 16, 2, 256, 64, 1e7, 256, 8, 512, 512, 248320, 262144, 4, 16, 32, 128, 4
    ),
    "qwen3-235b-a22b": Geometry("qwen3moe", 94, 4096, 64, 4, 128, 128, 1e6, 128, 8, 1536, 0, 151936, 40960),
    "qwen3-30b-a3b": Geometry("qwen3moe", 48, 2048, 32, 4, 128, 128, 1e6, 128, 8, 768, 0, 151936, 40960),
    "deepseek-v3.2": Geometry(
        "deepseek32",
        61,
        7168,
        128,
        1,
        192,
        64,
        1e4,
        256,
        8,
        2048,
        2048,
        129280,
        163840,
        n_dense_layers=3,
        dense_ffn_size=18432,
        latent_dim=512,
        value_dim=128,
        query_rank=1536,
        n_indexer_heads=64,
        indexer_dim=128,
        top_k=2048,
    ),
    "deepseek-v4-flash": Geometry(
        "deepseek4",
        43,
        4096,
        64,
        1,
        512,
        64,
        1e4,
        256,
        6,
        2048,
        2048,
        129280,
        1048576,
        window=128,
        query_rank=1024,
        n_indexer_heads=64,
        indexer_dim=128,
        top_k=512,
        n_output_groups=8,
        output_rank=1024,
        n_streams=4,
        n_tables=3,
    ),
    "glm-5": Geometry(
        "glm-dsa",
        78,
        6144,
        64,
        1,
        256,
        64,
        1e6,
        256,
        8,
        2048,
        2048,
        154880,
        202752,
        n_dense_layers=3,
        dense_ffn_size=12288,
        latent_dim=512,
        value_dim=256,
        query_rank=2048,
        n_indexer_heads=32,
        indexer_dim=128,
        top_k=2048,
    ),
    "glm-5.3-flash": Geometry(
        "glm5-next",
        45,
        4096,
        64,
        1,
        256,
        0,
        1e4,
        288,
        8,
        2048,
        2048,
        154880,
        1048576,
        attention_interval=4,
        n_k_heads=64,
        n_v_heads=64,
        delta_head_dim=128,
        conv_kernel=4,
        n_dense_layers=3,
        dense_ffn_size=12288,
        latent_dim=512,
        value_dim=256,
        query_rank=1536,
        n_indexer_heads=32,
        indexer_dim=128,
        top_k=2048,
        n_streams=4,
        pool_size=4,
    ),
    "glm-4.5-air": Geometry(
        "glm4moe",
        46,
        4096,
        96,
        8,
        128,
        64,
        1e6,
        128,
        8,
        1408,
        1408,
        151552,
        131072,
        n_dense_layers=1,
        dense_ffn_size=10944,
    ),
    "gemma4-26b-a4b": Geometry(
        "gemma4",
        30,
        2816,
        16,
        2,
        512,
        512,
        1e6,
        128,
        8,
        704,
        0,
        262144,
        262144,
        attention_interval=6,
        dense_ffn_size=2112,
        window=1024,
        window_kv_heads=8,
        window_head_dim=256,
        window_rope_theta=1e4,
    ),
    "ling-3.0-flash": Geometry(
        "bailingmoe3",
        42,
        2560,
        32,
        1,
        192,
        64,
        6e6,
        512,
        8,
        768,
        768,
        157184,
        262144,
        attention_interval=6,
        n_k_heads=32,
        n_v_heads=32,
        delta_head_dim=128,
        conv_kernel=4,
        n_dense_layers=2,
        dense_ffn_size=6144,
        latent_dim=512,
        value_dim=128,
    ),
    "minimax-m2": Geometry("minimax-m2", 62, 3072, 48, 8, 128, 64, 5e6, 256, 8, 1536, 0, 200064, 196608),
    "tiny": Geometry("qwen35moe", 4, 256, 4, 2, 64, 16, 1e4, 16, 4, 256, 256, 4096, 4096, 4, 4, 8, 32, 4),
}


# -- tensors ---------------------------------------------------------------------------------------------------------

Parts = list[tuple[str, tuple[int, ...]]]  # names inside a block, and shapes, slowest dimension first

# F32 in every recipe. Those not named in `_fill_vector` are random matrices like any other.
_NORMS = ("norm.weight", "norm_1.weight", "norm_2.weight", ".scale", "_scale.weight")  # around 1
_TABLE = "ffn_gate_tid2eid.weight"
_FLOAT_PARTS = (
    *_NORMS,
    "rope_freqs.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "ssm_conv1d.weight",
    "ssm_conv1d_q.weight",
    "ssm_conv1d_k.weight",
    "ssm_conv1d_v.weight",
    "ssm_a",
    "ssm_dt.bias",
    "exp_probs_b.bias",
    "indexer.k_norm.bias",
    "attn_q.bias",
    "attn_k.bias",
    "attn_v.bias",
    "attn_sinks.weight",
    "_ape.weight",
    "_fn.weight",
    "_base.weight",
    "_scale.weight",
)


def _shapes(g: Geometry, *, has_router_biases: bool) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield name, layer and shape of all tensors, in the order of the file."""
    yield "token_embd.weight", 0, (g.n_vocab, g.hidden_size)
    for layer in range(g.n_layers):
        style, is_dense = STYLES[g.architecture], layer < g.n_dense_layers
        parts: Parts = [("attn_norm.weight", (g.hidden_size,))]
        if g.n_streams:
            parts += _stream_shapes(g, "hc_attn", 3) + _stream_shapes(g, "hc_ffn", 3)
        parts += _mixer_shapes(g, layer)
        parts.append((style.ffn_norm, (g.hidden_size,)))
        if is_dense or style.has_dense_beside:
            parts += _network_shapes(g, "", g.dense_ffn_size)
        if not is_dense:
            parts += _expert_shapes(g)
        sizes = {"stream": g.hidden_size, "experts": g.n_experts, "one": 1}
        parts += [(name, (sizes[size],)) for name, size in style.vectors]
        if layer < g.n_tables:
            parts.append((_TABLE, (g.n_vocab, g.n_experts_used)))
        elif not is_dense and (has_router_biases or style.has_router_bias):
            parts.append(("exp_probs_b.bias", (g.n_experts,)))
        for part, shape in parts:
            yield f"blk.{layer}.{part}", layer, shape
    if g.window_head_dim and g.n_layers >= g.attention_interval:  # for layers without a window
        yield "rope_freqs.weight", 0, (g.n_rot // 2,)
    if g.n_streams and not STYLES[g.architecture].averages_streams:
        for name, shape in _stream_shapes(g, "output_hc", 1):
            yield name, 0, shape
    yield "output_norm.weight", 0, (g.hidden_size,)
    if STYLES[g.architecture].has_output:
        yield "output.weight", 0, (g.n_vocab, g.hidden_size)


def _stream_shapes(g: Geometry, name: str, n_scales: int) -> Parts:
    """What makes one row of the streams; with three scales gates for them and their mixing as well."""
    n_mixes = g.n_streams * (2 + g.n_streams if n_scales > 1 else 1)
    shapes = {"fn": (n_mixes, g.n_streams * g.hidden_size), "base": (n_mixes,), "scale": (n_scales,)}
    return [(f"{name}_{part}.weight", shape) for part, shape in shapes.items()]


def _mixer_shapes(g: Geometry, layer: int) -> Parts:
    if g.output_rank:
        return _compressed_attention_shapes(g, layer)
    if g.latent_dim:
        return _kimi_delta_shapes(g) if g.is_recurrent(layer) else _latent_attention_shapes(g)
    return _delta_net_shapes(g) if g.is_recurrent(layer) else _attention_shapes(g, in_window=g.has_window(layer))


def _attention_shapes(g: Geometry, *, in_window: bool) -> Parts:
    style = STYLES[g.architecture]
    n_kv_heads, head_dim = (g.window_kv_heads, g.window_head_dim) if in_window else (g.n_kv_heads, g.head_dim)
    n_q, n_kv = g.n_heads * head_dim, n_kv_heads * head_dim
    sizes = {"q": style.query_parts * n_q, "k": n_kv, "v": n_kv}
    if g.window and not in_window:
        del sizes["v"]  # values are the keys
    parts: Parts = [(f"attn_{part}.weight", (size, g.hidden_size)) for part, size in sizes.items()]
    if style.has_biases:
        parts += [(f"attn_{part}.bias", (size,)) for part, size in sizes.items()]
    if style.head_norm:
        of_row = style.head_norm == "row"
        parts.append(("attn_q_norm.weight", (n_q if of_row else head_dim,)))
        parts.append(("attn_k_norm.weight", (n_kv if of_row else head_dim,)))
    return [*parts, ("attn_output.weight", (g.hidden_size, n_q))]


def _delta_net_shapes(g: Geometry) -> Parts:
    value_size = g.n_v_heads * g.delta_head_dim
    n_channels = 2 * g.n_k_heads * g.delta_head_dim + value_size
    return [
        ("attn_qkv.weight", (n_channels, g.hidden_size)),
        ("attn_gate.weight", (value_size, g.hidden_size)),
        ("ssm_beta.weight", (g.n_v_heads, g.hidden_size)),
        ("ssm_alpha.weight", (g.n_v_heads, g.hidden_size)),
        ("ssm_conv1d.weight", (n_channels, g.conv_kernel)),
        ("ssm_dt.bias", (g.n_v_heads,)),
        ("ssm_a", (g.n_v_heads,)),
        ("ssm_norm.weight", (g.delta_head_dim,)),
        ("ssm_out.weight", (g.hidden_size, value_size)),
    ]


def _latent_attention_shapes(g: Geometry) -> Parts:
    n_q = g.n_heads * g.head_dim
    parts: Parts = [("attn_q.weight", (n_q, g.hidden_size))]
    if g.query_rank:
        parts = [
            ("attn_q_a.weight", (g.query_rank, g.hidden_size)),
            ("attn_q_a_norm.weight", (g.query_rank,)),
            ("attn_q_b.weight", (n_q, g.query_rank)),
        ]
    if g.top_k:
        parts += [
            ("indexer.attn_q_b.weight", (g.n_indexer_heads * g.indexer_dim, g.query_rank)),
            ("indexer.attn_k.weight", (g.indexer_dim, g.hidden_size)),
            ("indexer.k_norm.weight", (g.indexer_dim,)),
            ("indexer.k_norm.bias", (g.indexer_dim,)),
            ("indexer.proj.weight", (g.n_indexer_heads, g.hidden_size)),
        ]
    if g.pool_size:
        parts += [
            ("indexer_compressor_gate.weight", (g.indexer_dim, g.hidden_size)),
            ("indexer_compressor_ape.weight", (g.pool_size, g.indexer_dim)),
        ]
    if STYLES[g.architecture].has_head_gates:
        parts.append(("attn_gate.weight", (g.n_heads, g.hidden_size)))
    return [
        *parts,
        ("attn_kv_a_mqa.weight", (g.latent_dim + g.n_rot, g.hidden_size)),
        ("attn_kv_a_norm.weight", (g.latent_dim,)),
        ("attn_k_b.weight", (g.n_heads, g.latent_dim, g.head_dim - g.n_rot)),
        ("attn_v_b.weight", (g.n_heads, g.value_dim, g.latent_dim)),
        ("attn_output.weight", (g.hidden_size, g.n_heads * g.value_dim)),
    ]


def _compressed_attention_shapes(g: Geometry, layer: int) -> Parts:
    n_q, n_out, period = g.n_heads * g.head_dim, g.n_output_groups * g.output_rank, g.period(layer)
    parts: Parts = [
        ("attn_q_a.weight", (g.query_rank, g.hidden_size)),
        ("attn_q_a_norm.weight", (g.query_rank,)),
        ("attn_q_b.weight", (n_q, g.query_rank)),
        ("attn_kv.weight", (g.head_dim, g.hidden_size)),
        ("attn_kv_a_norm.weight", (g.head_dim,)),
        ("attn_sinks.weight", (g.n_heads,)),
        ("attn_output_a.weight", (n_out, n_q // g.n_output_groups)),
        ("attn_output_b.weight", (g.hidden_size, n_out)),
    ]
    if period:
        parts += _compressor_shapes(g, "attn_compressor", g.head_dim, period)
    if period == 4:
        parts += _compressor_shapes(g, "indexer_compressor", g.indexer_dim, period)
        parts += [
            ("indexer.attn_q_b.weight", (g.n_indexer_heads * g.indexer_dim, g.query_rank)),
            ("indexer.proj.weight", (g.n_indexer_heads, g.hidden_size)),
        ]
    return parts


def _compressor_shapes(g: Geometry, name: str, width: int, period: int) -> Parts:
    n_values = 2 * width if period == 4 else width  # each token has a part in two keys then
    return [
        (f"{name}_kv.weight", (n_values, g.hidden_size)),
        (f"{name}_gate.weight", (n_values, g.hidden_size)),
        (f"{name}_ape.weight", (period, n_values)),
        (f"{name}_norm.weight", (width,)),
    ]


def _kimi_delta_shapes(g: Geometry) -> Parts:
    size = g.n_v_heads * g.delta_head_dim
    parts: Parts = [(f"attn_{part}.weight", (size, g.hidden_size)) for part in "qkv"]
    parts += [(f"ssm_conv1d_{part}.weight", (size, 1, g.conv_kernel)) for part in "qkv"]
    for part in "fg":
        if STYLES[g.architecture].has_low_ranks:
            parts.append((f"ssm_{part}_a.weight", (g.delta_head_dim, g.hidden_size)))
            parts.append((f"ssm_{part}_b.weight", (size, g.delta_head_dim)))
        else:
            parts.append((f"ssm_{part}_a.weight", (size, g.hidden_size)))
    return [
        *parts,
        ("ssm_beta.weight", (g.n_v_heads, g.hidden_size)),
        ("ssm_dt.bias", (size,)),
        ("ssm_a", (g.n_v_heads, 1)),
        ("ssm_norm.weight", (g.delta_head_dim,)),
        ("attn_output.weight", (g.hidden_size, size)),
    ]


def _network_shapes(g: Geometry, suffix: str, size: int, *stack: int) -> Parts:
    return [
        (f"ffn_gate{suffix}.weight", (*stack, size, g.hidden_size)),
        (f"ffn_up{suffix}.weight", (*stack, size, g.hidden_size)),
        (f"ffn_down{suffix}.weight", (*stack, g.hidden_size, size)),
    ]


def _expert_shapes(g: Geometry) -> Parts:
    parts: Parts = [("ffn_gate_inp.weight", (g.n_experts, g.hidden_size))]
    parts += _network_shapes(g, "_exps", g.expert_ffn_size, g.n_experts)
    if g.shared_ffn_size:
        if STYLES[g.architecture].has_shared_gate:
            parts.append(("ffn_gate_inp_shexp.weight", (g.hidden_size,)))
        parts += _network_shapes(g, "_shexp", g.shared_ffn_size)
    return parts


def _tensor_infos(g: Geometry, recipe: Recipe, *, has_router_biases: bool) -> dict[str, TensorInfo]:
    infos = {}
    for name, layer, shape in _shapes(g, has_router_biases=has_router_biases):
        if name.endswith(_FLOAT_PARTS):
            chosen = BY_NAME["F32"]
        elif name.endswith(_TABLE):
            chosen = I32
        else:
            is_output = name == "token_embd.weight" and not STYLES[g.architecture].has_output
            role = "output.weight" if is_output else name
            chosen = choose_format(recipe, role, layer, g.n_layers, shape[-1])
        n_bytes = prod(shape[:-1]) * chosen.row_bytes(shape[-1])
        infos[name] = TensorInfo(name, chosen, shape, n_bytes)
    return infos


# -- metadata --------------------------------------------------------------------------------------------------------


@cache
def _tiny_tokenizer() -> dict[str, Value]:
    """Return the tokenizer keys of the bundled model."""
    with GGUFFile.open(tiny_model_path()) as file:
        values = {key: file.metadata.value(key) for key in file.metadata if key.startswith("tokenizer.")}
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            values[key] = file.metadata.texts(key)
        return values


def _tokenizer_values(n_vocab: int) -> dict[str, Value]:
    """Return a small tokenizer that works, its vocabulary filled up with entries that no text has."""
    values = dict(_tiny_tokenizer())
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    unused = 5
    padding = range(len(tokens), n_vocab)
    values["tokenizer.ggml.tokens"] = tokens + [f"[PAD{i}]" for i in padding]
    values["tokenizer.ggml.token_type"] = np.concatenate([types, np.full(len(padding), unused, np.int32)])
    return values


def _metadata_values(title: str, g: Geometry, recipe: Recipe) -> dict[str, Value]:
    def float32(value: float) -> float:
        return float(np.float32(value))

    keys: dict[str, Value] = {
        "block_count": g.n_layers,
        "context_length": g.context_length,
        "embedding_length": g.hidden_size,
        "attention.head_count": g.n_heads,
        "attention.head_count_kv": g.n_kv_heads,
        "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim,
        "attention.layer_norm_rms_epsilon": float32(1e-6),
        "rope.freq_base": float32(g.rope_theta),
        "rope.dimension_count": g.n_rot,
        "expert_count": g.n_experts,
        "expert_used_count": g.n_experts_used,
        "expert_feed_forward_length": g.expert_ffn_size,
        **dict(STYLES[g.architecture].keys),
    }
    if g.architecture == "qwen35moe":
        n_pairs = g.n_rot // 2  # dealt to time, height and width in turn; text has the same position in all
        keys |= {
            "rope.dimension_sections": np.array([(n_pairs + 2) // 3, (n_pairs + 1) // 3, n_pairs // 3, 0], np.int32),
            "expert_shared_feed_forward_length": g.shared_ffn_size,
            "ssm.conv_kernel": g.conv_kernel,
            "ssm.state_size": g.delta_head_dim,
            "ssm.group_count": g.n_k_heads,
            "ssm.time_step_rank": g.n_v_heads,
            "ssm.inner_size": g.n_v_heads * g.delta_head_dim,
            "full_attention_interval": g.attention_interval,
        }
    else:
        keys["feed_forward_length"] = g.dense_ffn_size or 3 * g.hidden_size  # of a dense layer, if there is one
        keys["leading_dense_block_count"] = g.n_dense_layers
    if g.n_streams:
        keys |= {"hyper_connection.count": g.n_streams, "hyper_connection.epsilon": float32(1e-6)}
    if g.output_rank:
        keys |= {
            "attention.sliding_window": g.window,
            "attention.compress_ratios": np.array([g.period(layer) for layer in range(g.n_layers)], np.int32),
            "attention.output_group_count": g.n_output_groups,
            "attention.output_lora_rank": g.output_rank,
            "hash_layer_count": min(g.n_tables, g.n_layers),
        }
    if g.window_head_dim:
        has_window = [g.has_window(layer) for layer in range(g.n_layers)]
        keys |= {
            "attention.head_count_kv": np.where(has_window, g.window_kv_heads, g.n_kv_heads).astype(np.int32),
            "attention.sliding_window": g.window,
            "attention.sliding_window_pattern": np.array(has_window),
            "attention.key_length_swa": g.window_head_dim,
            "attention.value_length_swa": g.window_head_dim,
            "rope.dimension_count_swa": g.window_head_dim,
            "rope.freq_base_swa": float32(g.window_rope_theta),
        }
    if g.latent_dim:
        keys |= {
            "attention.head_count_kv": np.array([0 if g.is_recurrent(i) else 1 for i in range(g.n_layers)], np.int32),
            "attention.key_length": g.latent_dim + g.n_rot,
            "attention.value_length": g.latent_dim,
            "attention.key_length_mla": g.head_dim,
            "attention.value_length_mla": g.value_dim,
            "attention.kv_lora_rank": g.latent_dim,
            "expert_shared_feed_forward_length": g.shared_ffn_size,
        }
        if g.delta_head_dim:
            keys |= {"kda.head_dim": g.delta_head_dim, "ssm.conv_kernel": g.conv_kernel}
    if g.query_rank:
        keys["attention.q_lora_rank"] = g.query_rank
    if g.top_k:
        keys |= {
            "attention.indexer.head_count": g.n_indexer_heads,
            "attention.indexer.key_length": g.indexer_dim,
            "attention.indexer.top_k": g.top_k,
        }
    if g.pool_size:
        keys["attention.indexer.kpool"] = g.pool_size
    return {
        "general.architecture": g.architecture,
        "general.type": "model",
        "general.name": title,
        "general.file_type": recipe.file_type,
        "general.quantization_version": 2,
        **{f"{g.architecture}.{key}": value for key, value in keys.items()},
        **_tokenizer_values(g.n_vocab),
    }


# -- the model -------------------------------------------------------------------------------------------------------


class SyntheticModel:
    """A `ModelFile` that makes its weights when they are read: the same bytes for the same name, options and seed."""

    def __init__(
        self, name: str, geometry: Geometry, recipe: Recipe, seed: int, *, has_router_biases: bool = False
    ) -> None:
        self.name = name
        self.geometry = geometry
        self.seed = seed
        self.metadata = Metadata(name, _metadata_values(name.removeprefix(PREFIX), geometry, recipe))
        self.tensors = _tensor_infos(geometry, recipe, has_router_biases=has_router_biases)

    @classmethod
    def open(cls, name: str, *, has_router_biases: bool = False) -> SyntheticModel:
        """Make a model from a name like `synthetic:qwen3.5-35b-a3b@q4_k_m:layers=8,seed=1`.

        Options: `layers`, `experts`, `used` (experts of a token), `vocab`, `context` and `seed`.

        Raises `ConfigError` for a name that does not say this.
        """
        shape_name, recipe_name, options = _parse(name)
        geometry = _look_up(name, "model", shape_name, GEOMETRIES)
        recipe = _look_up(name, "quantisation", recipe_name, RECIPES)
        seed = options.pop("seed", 0)
        geometry = replace(geometry, **{_OPTIONS[key]: value for key, value in options.items()})  # type: ignore[arg-type]
        _check(name, geometry)
        return cls(name, geometry, recipe, seed, has_router_biases=has_router_biases)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(info.n_bytes for info in self.tensors.values())

    def mapped(self, name: str) -> None:
        """Return None: there is no file."""

    def read(self, name: str, out: npt.NDArray[np.uint8], n_threads: int, progress: Callable[[int], None]) -> None:
        """Make the weights of a tensor."""
        info = self.tensors[name]
        seed = int.from_bytes(hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest(), "little")
        decay_sign = 1 if STYLES[self.geometry.architecture].has_bounded_decays else -1
        if info.format == I32:
            _fill_table(out.view(np.int32).reshape(info.shape), self.geometry.n_experts, seed)
        elif not _fill_vector(info, out, seed, decay_sign):
            from engine import _kernels  # noqa: PLC0415

            rows = out.reshape(-1, info.format.row_bytes(info.shape[-1]))
            _kernels.fill_random_blocks(info.format.ggml_type, rows, info.shape[-1], seed, n_threads)
        progress(info.n_bytes)

    def close(self) -> None:
        """Do nothing: no file is open."""


def _fill_table(experts: npt.NDArray[np.int32], n_experts: int, seed: int) -> None:
    """Choose different experts for each token id, [n_vocab, n_experts_used]."""
    n_vocab, n_used = experts.shape
    first = np.random.default_rng(seed).integers(0, n_experts, (n_vocab, 1))
    experts[:] = (first + np.arange(n_used) * (n_experts // n_used)) % n_experts


def _fill_vector(info: TensorInfo, out: npt.NDArray[np.uint8], seed: int, decay_sign: int) -> bool:
    """Fill a tensor whose values must have a certain size for the model to stay sane; return whether it is one."""
    random = np.random.default_rng(seed)
    values = out.view(np.float32) if info.format.name == "F32" else None
    if info.name.endswith(_NORMS):
        drawn = 1 + 0.1 * random.standard_normal(info.shape)
    elif info.name == "rope_freqs.weight":  # a quarter of the pairs turn
        drawn = np.where(np.arange(info.shape[0]) < info.shape[0] // 4, 1.0, 1e30)
    elif info.name.endswith("ssm_a"):  # decay rates, as these layers are initialised for training
        drawn = decay_sign * random.uniform(1, 16, info.shape)
    elif info.name.endswith("ssm_dt.bias"):  # softplus of it is a time step from 0.001 to 0.1
        step = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), info.shape))
        drawn = step + np.log(-np.expm1(-step))
    elif info.name.endswith(("bias", "_base.weight", "_ape.weight", "attn_sinks.weight")):
        drawn = np.zeros(info.shape)
    else:
        return False
    assert values is not None
    values.reshape(info.shape)[:] = drawn
    return True


# -- names -----------------------------------------------------------------------------------------------------------

_OPTIONS = {
    "layers": "n_layers",
    "experts": "n_experts",
    "used": "n_experts_used",
    "vocab": "n_vocab",
    "context": "context_length",
}
_FORM = "synthetic:<model>[@<quantisation>][:<option>=<number>,...]"


def _parse(name: str) -> tuple[str, str, dict[str, int]]:
    head, _, tail = name.removeprefix(PREFIX).partition(":")
    shape_name, _, recipe_name = head.partition("@")
    options: dict[str, int] = {}
    for item in filter(None, tail.split(",")):
        key, _, number = (part.strip() for part in item.partition("="))
        if key not in {*_OPTIONS, "seed"}:
            raise ConfigError(f"{name}: unknown option {key!r}; expected {', '.join([*_OPTIONS, 'seed'])} ({_FORM})")
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            raise ConfigError(f"{name}: option {key} is {number!r}; expected a number below a billion")
        if key in options:
            raise ConfigError(f"{name}: option {key} is given twice")
        options[key] = int(number)
    return shape_name.strip(), recipe_name.strip() or DEFAULT_RECIPE, options


_T = TypeVar("_T")


def _look_up(name: str, what: str, wanted: str, table: dict[str, _T]) -> _T:
    if wanted.lower() in table:
        return table[wanted.lower()]
    close = difflib.get_close_matches(wanted.lower(), table, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{name}: there is no {what} {wanted!r}, only {', '.join(table)}{hint}")


def _check(name: str, g: Geometry) -> None:
    smallest_vocab = len(_tokenizer_values(0)["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    for option, value, low, high in (
        ("layers", g.n_layers, 1, 1000),
        ("experts", g.n_experts, 1, 4096),
        ("used", g.n_experts_used, 1, g.n_experts),
        ("vocab", g.n_vocab, smallest_vocab, 1_000_000),
        ("context", g.context_length, 1, 10_000_000),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}: {option} is {value}; expected {low} to {high}")
