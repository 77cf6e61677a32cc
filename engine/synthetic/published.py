"""Published models as their files describe them: architecture, keys under their GGUF names, optional tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A value for each layer: those of `period`, again and again, behind some `first` ones."""

    period: tuple[int | bool, ...]
    first: tuple[int | bool, ...] = ()

    def __getitem__(self, layer: int) -> int | bool:
        after = layer - len(self.first)
        return self.first[layer] if after < 0 else self.period[after % len(self.period)]


Key: TypeAlias = bool | int | float | str | tuple[int, ...] | PerLayer


@dataclass(frozen=True, slots=True)
class Published:
    """A model, as far as its file is told from others of its architecture.

    Attributes:
        architecture: `general.architecture`.
        n_vocab: tokens of the vocabulary.
        keys: hyper-parameters, by their keys without the architecture's prefix.
        tensors: optional ones that it has, by their names inside a block, or their whole names.
        layers: of optional tensors that some blocks have: which.
        n_heads: for multi-token prediction, that newer files have behind its layers and older ones left out.
        shapes: of optional tensors by whose shape a forward pass decides what they are for, and where files have a 1
            that changes nothing.
    """

    architecture: str
    n_vocab: int
    keys: Mapping[str, Key]
    tensors: tuple[str, ...] = ()
    layers: Mapping[str, PerLayer] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    n_heads: int = 0

    def with_heads(self, n: int) -> Published:
        """Return the model with so many heads for multi-token prediction."""
        if not n:
            return self
        keys = {"block_count": self.size("block_count") + n, "nextn_predict_layers": n}
        return replace(self, keys={**self.keys, **keys}, tensors=(*self.tensors, *_HEAD))

    def size(self, key: str, default: int | None = None) -> int:
        """Return a hyper-parameter that is one integer."""
        value = self.keys.get(key, default)
        assert isinstance(value, int)
        return value

    @property
    def least_layers(self) -> int:
        """Return how many layers it must have for those that its keys name to be there."""
        named = self.keys.get("ple.layers", ())
        assert isinstance(named, tuple)
        return 1 + max((int(layer) for layer in named), default=0)


_SIGMOID, _SQRT_SOFTPLUS = 2, 4  # of `expert_gating_func`
_OUTPUT, _ROUTER_BIAS = "output.weight", "exp_probs_b.bias"  # without an output matrix the embeddings serve
# What forward passes look for: parts of a head for multi-token prediction, and whether there is more than that.
_HEAD = "nextn.eh_proj.weight", "nextn.shared_head_norm.weight", "attn_norm.weight"
_HEAD_NORMS = "attn_q_norm.weight", "attn_k_norm.weight"

_QWEN_3: dict[str, Key] = {
    "context_length": 40960,
    "attention.head_count_kv": 4,
    "attention.key_length": 128,
    "attention.value_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": 128,
    "rope.freq_base": 1e6,
    "expert_count": 128,
    "expert_used_count": 8,
}
_QWEN_35: dict[str, Key] = {
    "context_length": 262144,
    "attention.head_count_kv": 2,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "full_attention_interval": 4,
    "rope.dimension_count": 64,
    "rope.dimension_sections": (11, 11, 10, 0),
    "rope.freq_base": 1e7,
    "expert_count": 256,
    "expert_used_count": 8,
    "ssm.conv_kernel": 4,
    "ssm.group_count": 16,
    "ssm.state_size": 128,
}
_QWEN_35_TENSORS = _OUTPUT, *_HEAD_NORMS, "ffn_gate_inp_shexp.weight"
# Without groups of experts, which would forbid some of the routing that is played.
_DEEPSEEK: dict[str, Key] = {
    "leading_dense_block_count": 3,
    "attention.head_count_kv": 1,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.kv_lora_rank": 512,
    "attention.indexer.key_length": 128,
    "attention.indexer.top_k": 2048,
    "rope.dimension_count": 64,
    "rope.freq_base": 1e4,
    "expert_count": 256,
    "expert_used_count": 8,
    "expert_feed_forward_length": 2048,
    "expert_gating_func": _SIGMOID,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
}
# Rows of the table that each head of n-grams chooses from: the primes that follow 20 million.
_QWEN_4_ROWS = tuple(
    20_000_000 + more for more in (3, 23, 33, 47, 59, 63, 69, 77, 81, 93, 107, 147, 153, 159, 161, 171)
)
_GEMMA_4_WINDOWS = PerLayer((True, True, True, True, True, False))

PUBLISHED: dict[str, Published] = {
    "qwen3.5-122b-a10b": Published(
        "qwen35moe",
        248320,
        _QWEN_35
        | {
            "block_count": 48,
            "embedding_length": 3072,
            "attention.head_count": 32,
            "expert_feed_forward_length": 1024,
            "expert_shared_feed_forward_length": 1024,
            "ssm.inner_size": 8192,
            "ssm.time_step_rank": 64,
        },
        _QWEN_35_TENSORS,
        n_heads=1,
    ),
    "qwen3.5-35b-a3b": Published(
        "qwen35moe",
        248320,
        _QWEN_35
        | {
            "block_count": 40,
            "embedding_length": 2048,
            "attention.head_count": 16,
            "expert_feed_forward_length": 512,
            "expert_shared_feed_forward_length": 512,
            "ssm.inner_size": 4096,
            "ssm.time_step_rank": 32,
        },
        _QWEN_35_TENSORS,
        n_heads=1,
    ),
    "qwen3-235b-a22b": Published(
        "qwen3moe",
        151936,
        _QWEN_3
        | {
            "block_count": 94,
            "embedding_length": 4096,
            "feed_forward_length": 12288,
            "attention.head_count": 64,
            "expert_feed_forward_length": 1536,
        },
        (_OUTPUT, *_HEAD_NORMS),
    ),
    "qwen3-30b-a3b": Published(
        "qwen3moe",
        151936,
        _QWEN_3
        | {
            "block_count": 48,
            "embedding_length": 2048,
            "feed_forward_length": 6144,
            "attention.head_count": 32,
            "expert_feed_forward_length": 768,
        },
        (_OUTPUT, *_HEAD_NORMS),
    ),
    "deepseek-v3.2": Published(
        "deepseek32",
        129280,
        _DEEPSEEK
        | {
            "block_count": 61,
            "context_length": 163840,
            "embedding_length": 7168,
            "feed_forward_length": 18432,
            "attention.head_count": 128,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "attention.q_lora_rank": 1536,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.indexer.head_count": 64,
        },
        (_OUTPUT, _ROUTER_BIAS),
    ),
    "deepseek-v4-flash": Published(
        "deepseek4",
        129280,
        {
            "block_count": 43,
            "context_length": 1048576,
            "embedding_length": 4096,
            "attention.head_count": 64,
            "attention.head_count_kv": 1,
            "attention.key_length": 512,
            "attention.value_length": 512,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.q_lora_rank": 1024,
            "attention.output_group_count": 8,
            "attention.output_lora_rank": 1024,
            "attention.sliding_window": 128,
            "attention.compress_ratios": PerLayer((4, 128), first=(0, 0)),
            "attention.compress_rope_freq_base": 160000.0,
            "attention.indexer.head_count": 64,
            "attention.indexer.key_length": 128,
            "attention.indexer.top_k": 512,
            "rope.dimension_count": 64,
            "rope.freq_base": 1e4,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 65536,
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.sinkhorn_iterations": 20,
            "hash_layer_count": 3,
            "expert_count": 256,
            "expert_used_count": 6,
            "expert_feed_forward_length": 2048,
            "expert_gating_func": _SQRT_SOFTPLUS,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.5,
            "swiglu_clamp_exp": 10.0,
        },
        (_OUTPUT, _ROUTER_BIAS),
        layers={"ffn_gate_tid2eid.weight": PerLayer((False,), first=(True, True, True))},
    ),
    "glm-5": Published(
        "glm-dsa",
        154880,
        _DEEPSEEK
        | {
            "block_count": 78,
            "context_length": 202752,
            "embedding_length": 6144,
            "feed_forward_length": 12288,
            "attention.head_count": 64,
            "attention.key_length_mla": 256,
            "attention.value_length_mla": 256,
            "attention.q_lora_rank": 2048,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.indexer.head_count": 32,
            "rope.freq_base": 1e6,
        },
        (_OUTPUT, _ROUTER_BIAS),
    ),
    "glm-5.3-flash": Published(
        "glm5-next",
        154880,
        _DEEPSEEK
        | {
            "block_count": 45,
            "context_length": 1048576,
            "embedding_length": 4096,
            "feed_forward_length": 12288,
            "attention.head_count": 64,
            "attention.head_count_kv": PerLayer((0, 0, 0, 1)),
            "attention.key_length": 512,
            "attention.key_length_mla": 256,
            "attention.value_length_mla": 256,
            "attention.q_lora_rank": 1536,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.indexer.head_count": 32,
            "attention.indexer.kpool": 4,
            "rope.dimension_count": 0,
            "kda.gate_lower_bound": -5.0,
            "kda.head_dim": 128,
            "ssm.conv_kernel": 4,
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.sinkhorn_iterations": 20,
            "expert_count": 288,
            "swiglu_clamp_exp": 10.0,
        },
        (_OUTPUT, _ROUTER_BIAS, "ssm_f_b.weight", "ssm_g_b.weight"),
    ),
    "glm-4.5-air": Published(
        "glm4moe",
        151552,
        {
            "block_count": 46,
            "context_length": 131072,
            "embedding_length": 4096,
            "feed_forward_length": 10944,
            "leading_dense_block_count": 1,
            "attention.head_count": 96,
            "attention.head_count_kv": 8,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 64,
            "rope.freq_base": 1e6,
            "expert_count": 128,
            "expert_used_count": 8,
            "expert_feed_forward_length": 1408,
            "expert_gating_func": _SIGMOID,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
        },
        (_OUTPUT, _ROUTER_BIAS, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    ),
    "gemma4-26b-a4b": Published(
        "gemma4",
        262144,
        {
            "block_count": 30,
            "context_length": 262144,
            "embedding_length": 2816,
            "embedding_length_per_layer_input": 0,
            "feed_forward_length": 2112,
            "attention.head_count": 16,
            "attention.head_count_kv": PerLayer((8, 8, 8, 8, 8, 2)),
            "attention.key_length": 512,
            "attention.value_length": 512,
            "attention.key_length_swa": 256,
            "attention.value_length_swa": 256,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.shared_kv_layers": 0,
            "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": _GEMMA_4_WINDOWS,
            "rope.dimension_count": 512,
            "rope.dimension_count_swa": 256,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4,
            "expert_count": 128,
            "expert_used_count": 8,
            "expert_feed_forward_length": 704,
            "final_logit_softcapping": 30.0,
        },
        ("rope_freqs.weight", "ffn_down_exps.scale", "layer_output_scale.weight"),
        layers={"attn_v.weight": _GEMMA_4_WINDOWS},  # in the others values are the keys
    ),
    "gpt-oss-120b": Published(
        "gpt-oss",
        201088,
        {
            "block_count": 36,
            "context_length": 131072,
            "embedding_length": 2880,
            "feed_forward_length": 2880,
            "attention.head_count": 64,
            "attention.head_count_kv": 8,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.sliding_window": 128,
            "rope.freq_base": 150000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
            "expert_count": 128,
            "expert_used_count": 4,
            "expert_feed_forward_length": 2880,
        },
        (
            _OUTPUT,
            "attn_q.bias",
            "attn_k.bias",
            "attn_v.bias",
            "attn_output.bias",
            "attn_sinks.weight",
            "ffn_gate_inp.bias",
            "ffn_gate_exps.bias",
            "ffn_up_exps.bias",
            "ffn_down_exps.bias",
        ),
    ),
    "hy4-preview": Published(
        "hy_v4",
        120832,
        _DEEPSEEK
        | {
            "block_count": 34,
            "context_length": 262144,
            "embedding_length": 2816,
            "feed_forward_length": 6912,
            "leading_dense_block_count": 1,
            "attention.head_count": 32,
            "attention.key_length_mla": 256,
            "attention.value_length_mla": 256,
            "attention.q_lora_rank": 1536,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.indexer.head_count": 16,
            "attention.indexer.types": PerLayer((True, False, False, False), first=(True,)),
            "rope.freq_base": 1e7,
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.magnitude": 2.0,
            "expert_feed_forward_length": 768,
            "expert_weights_scale": 2.827,
            "swiglu_clamp_exp": 10.0,
        },
        (_OUTPUT, _ROUTER_BIAS, "attn_sinks.weight"),
    ),
    "kimi-k3": Published(
        "kimi-k3",
        163840,
        {
            "block_count": 93,
            "context_length": 1048576,
            "embedding_length": 7168,
            "feed_forward_length": 33792,
            "leading_dense_block_count": 1,
            "attention.head_count": 96,
            "attention.head_count_kv": PerLayer((0, 0, 0, 1), first=(0, 0, 0, 1) * 23 + (1,)),
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "attention.kv_lora_rank": 512,
            "attention.q_lora_rank": 1536,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 64,
            "kda.gate_lower_bound": -5.0,
            "kda.head_dim": 128,
            "ssm.conv_kernel": 4,
            "attn_res.block_size": 12,
            "activation.situ_beta": 4.0,
            "activation.situ_linear_beta": 25.0,
            "expert_count": 896,
            "expert_used_count": 16,
            "expert_feed_forward_length": 3072,
            "expert_latent_length": 3584,
            "expert_gating_func": _SIGMOID,
            "expert_shared_count": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
        },
        (_OUTPUT, _ROUTER_BIAS, "ffn_routed_norm.weight", "ssm_f_b.weight", "ssm_g.weight"),
        shapes={"attn_gate.weight": (12288, 7168)},
    ),
    "ling-3.0-flash": Published(
        "bailingmoe3",
        157184,
        {
            "block_count": 42,
            "context_length": 262144,
            "embedding_length": 2560,
            "feed_forward_length": 6144,
            "leading_dense_block_count": 2,
            "attention.head_count": 32,
            "attention.head_count_kv": PerLayer((0, 0, 0, 0, 0, 1)),
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "attention.kv_lora_rank": 512,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": 64,
            "rope.freq_base": 6e6,
            "kda.gate_lower_bound": -5.0,
            "kda.head_dim": 128,
            "kda.safe_gate": True,
            "ssm.conv_kernel": 4,
            "expert_count": 512,
            "expert_used_count": 8,
            "expert_feed_forward_length": 768,
            "expert_gating_func": _SIGMOID,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 768,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        (_OUTPUT, _ROUTER_BIAS),
        shapes={"attn_gate.weight": (32, 2560), "ssm_a": (32, 1)},
    ),
    "minimax-m2": Published(
        "minimax-m2",
        200064,
        {
            "block_count": 62,
            "context_length": 196608,
            "embedding_length": 3072,
            "feed_forward_length": 1536,
            "attention.head_count": 48,
            "attention.head_count_kv": 8,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": 64,
            "rope.freq_base": 5e6,
            "expert_count": 256,
            "expert_used_count": 8,
            "expert_feed_forward_length": 1536,
            "expert_gating_func": _SIGMOID,
        },
        (_OUTPUT, _ROUTER_BIAS),
        shapes={"attn_q_norm.weight": (6144,), "attn_k_norm.weight": (1024,)},  # of all heads together
    ),
    "minimax-m3": Published(
        "minimax-m3",
        200064,
        {
            "block_count": 60,
            "context_length": 524288,
            "embedding_length": 6144,
            "feed_forward_length": 12288,
            "leading_dense_block_count": 3,
            "attention.head_count": 64,
            "attention.head_count_kv": 4,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.indexer.block_size": 128,
            "attention.indexer.head_count": 4,
            "attention.indexer.key_length": 128,
            "attention.indexer.local_blocks": 1,
            "attention.indexer.top_k": 16,
            "rope.dimension_count": 64,
            "rope.freq_base": 5e6,
            "expert_count": 128,
            "expert_used_count": 4,
            "expert_feed_forward_length": 3072,
            "expert_gating_func": _SIGMOID,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.0,
        },
        (_OUTPUT, _ROUTER_BIAS, *_HEAD_NORMS),
    ),
    "qwen3.8-flash-next": Published(
        "qwen4exp",
        248320,
        _QWEN_35
        | {
            "block_count": 48,
            "embedding_length": 2560,
            "embedding_length_per_layer_input": 160,
            "attention.head_count": 24,
            "attention.compress_ratios": PerLayer((0, 0, 0, 4)),
            "attention.indexer.head_count": 4,
            "attention.indexer.key_length": 128,
            "attention.indexer.top_k": 2048,
            "hyper_connection.count": 4,
            "hyper_connection.low_rank": 320,
            "ple.layers": (1,),
            "ple.ngram_size": 3,
            "ple.heads_per_ngram": 8,
            "ple.conv_kernel": 4,
            "ple.eos_token_id": 248044,
            "ple.layer_multipliers": (23703573157769, 20109073645365, 8052911324071),
            "ple.head_offsets": (0, *accumulate(_QWEN_4_ROWS[:-1])),
            "ple.head_vocab_sizes": _QWEN_4_ROWS,
            "expert_count": 512,
            "expert_used_count": 10,
            "expert_feed_forward_length": 640,
            "expert_shared_feed_forward_length": 640,
            "ssm.inner_size": 6144,
            "ssm.time_step_rank": 48,
        },
        _QWEN_35_TENSORS,
        shapes={"per_layer_token_embd.weight": (320001536, 160)},
    ),
    "tiny": Published(
        "qwen35moe",
        4096,
        _QWEN_35
        | {
            "block_count": 4,
            "context_length": 4096,
            "embedding_length": 256,
            "attention.head_count": 4,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.dimension_count": 16,
            "rope.dimension_sections": (3, 3, 2, 0),
            "rope.freq_base": 1e4,
            "expert_count": 16,
            "expert_used_count": 4,
            "expert_feed_forward_length": 256,
            "expert_shared_feed_forward_length": 256,
            "ssm.group_count": 4,
            "ssm.inner_size": 256,
            "ssm.state_size": 32,
            "ssm.time_step_rank": 8,
        },
        _QWEN_35_TENSORS,
        n_heads=1,
    ),
}
