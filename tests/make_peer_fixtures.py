"""Makes the models and logits of `tests/data/peers`: tiny random models of architectures that have no golden file.

Run by hand, with llama.cpp as the other opinion: `pip install llama-cpp-python gguf`, then
`python tests/make_peer_fixtures.py [NAME ...]`. For each model it writes

    NAME-F32.gguf, NAME-Q8_0.gguf   the weights, and the same through llama.cpp's own quantiser
    NAME-F32.npz, NAME-Q8_0.npz     `tokens`, and `logits_exact`: of float32 arithmetic on the file's own weights;
                                    for Q8_0 also `logits`: llama.cpp on the file itself, with activations of 8 bits

Those of a model that makes drafts (`*-mtp`) also hold what its block for multi-token prediction finds:

    `drafts_exact`      for each token, logits of a draft: of the token, the row that the model found for the one before
                        it (zeros for the first), its own position, and all such pairs of earlier positions; for Q8_0
                        also `drafts`, as `logits`
    `chain_exact`       logits of three drafts in a row, when all but the last 4 tokens have been seen: the first is of
                        the fourth token from the end, each other of the token that was drafted before it, and of the
                        row that the block itself found for that draft
    `chain_tokens`      what these three drafts are: their likeliest tokens

A row is what the output matrix is given, behind the last norm: the model's, and for a draft the one that the block has
or, where it has none, the model's too. In some models (`mimo2`, `step35`) it is what comes into that norm. Of several
blocks it is the first. This part needs llama.cpp as of llama-cpp-python 0.3.36, which has
`llama_batch_ext`, and whose `llama_cpp_ext` finds the functions of `llama-ext.h`.

GELU is the one function that llama.cpp looks up, in a table of float16 numbers. That moves logits of `gemma4` by up to
2.5e-3, where 1e-4 is allowed (with the formula itself: 4e-6). So its logits, and those of `grok` and `grok-1`, are of a
build without the table: ggml-cpu with the line `#define GGML_GELU_FP16` taken out of `vec.h`, in a folder that
`LLAMA_CPP_LIB_PATH` names.

Of blocks of n tokens (`qwen4exp`) llama.cpp lets a token look at a budget of positions in whole ones, and at n - 1
more. Those of the token's own block, while it is not whole, are among these; any that are left fall to one block more,
where it is not defined to which positions. So the budget is made smaller by as many as are left, which depends on the
place of a token in its block: logits are those of several runs. Only the last layer may have blocks of more than one
token then.

Where experts are chosen by a hair, two right programs choose differently. Models are therefore drawn until the logits,
those of drafts among them, stay close to the float32 ones in 8 bits, and also when the embeddings are disturbed a
little, in several ways.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_cpp import llama_cpp_ext

OUT = Path(__file__).resolve().parent / "data" / "peers"
N_VOCAB, HIDDEN, N_TOKENS = 128, 32, 32
N_TOKENS_LONG, N_TOKENS_WINDOW = 8260, 4130  # more than a chunk of Llama 4, than the window of SmallThinker
N_TOKENS_COMPRESSED = 300  # two compressed keys of 128 tokens, many of 4
N_LEFT, N_CHAINED = 4, 3  # tokens not yet seen when drafts are made in a row, and how many these are
N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 8
N_EXPERTS, FFN = 8, 32
CLOSE = 6e-3  # divergence at one position that is no sign of another expert
N_DISTURBED, DISTURBANCE = 12, 0.008  # runs, and how much of itself an embedding is changed by; 8 bits do about as much


@dataclass
class Ngrams:
    """Embeddings of n-grams in one layer: of up to `n` tokens, so many heads of each length."""

    layer: int
    n: int
    n_heads: int
    head_dim: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return N_ROWS_OF_HEADS[: (self.n - 1) * self.n_heads]

    @property
    def keys(self) -> dict[str, object]:
        return {
            "ple.layers": [self.layer],
            "ple.ngram_size": self.n,
            "ple.heads_per_ngram": self.n_heads,
            "ple.conv_kernel": NGRAM_KERNEL,
            "ple.eos_token_id": END_ID,
            "ple.layer_multipliers": np.array(MULTIPLIERS[: self.n], np.uint64),
            "ple.head_offsets": np.cumsum([0, *self.sizes[:-1]]).astype(np.uint64),
            "ple.head_vocab_sizes": np.array(self.sizes, np.uint64),
            "embedding_length_per_layer_input": self.head_dim,
        }


@dataclass
class Peer:
    """A model to make.

    Attributes:
        architecture: GGUF name.
        n_layers: blocks.
        n_mtp: blocks for multi-token prediction after these, which nobody runs but for drafts.
        draft_parts: tensors that such a block has of its own besides a projection and two norms; None: its drafts are
            not kept.
        keys: hyper-parameters beyond those that every model has, without the architecture's prefix; None for a key of
            those that this one does not have.
        moe_layers: the blocks with experts; the others are dense.
        n_experts_used: by a token.
        shared_size: width of the shared expert; 0 for none.
        fused_experts: whether gate and up are one matrix, in the shared expert, too.
        router_bias: up to how much is added to scores when experts are chosen; 0 for nothing.
        bias_name: tensor of that.
        head_dim: of queries, keys and values.
        value_dim: of values where they are not as wide as keys.
        n_kv_heads: of keys and values.
        layer_kv_heads: the same of each block where they differ.
        head_norm: of queries and keys: "head" for one weight that serves every head, "row" for one over all heads; of
            latent attention there is one of the rotated part of keys.
        fused_qkv: whether queries, keys and values are one matrix.
        rope_divisors: whether there is a tensor that frequencies are divided by.
        n_still: pairs, the last ones, that this tensor keeps from turning.
        embedding_gain: how large the embeddings are.
        long_divisors: whether there are two such tensors: for the trained context, and for a longer one.
        biases: whether norms, attention and output matrix have biases.
        group_width: of the experts that groups of two experts share; 0 for none.
        tied: whether the embeddings serve as output matrix.
        sinks: the blocks whose attention has sinks.
        recurrent: whether every other block is a delta net, or all but each n-th (`full_attention_interval`), and the
            others gate their attention; all gate their shared experts.
        kinds: of the blocks where each is one thing: "s" state space, "a" attention, "f" feed-forward network. One for
            multi-token prediction is the latter two.
        state_space_layers: those of other models.
        scan_layers: the blocks with a state for each channel.
        short_conv_layers: the blocks that convolve instead of attending.
        delta_layers: the blocks with a delta net whose channels decay apart.
        lightning_layers: the blocks with lightning attention.
        bounded_decays: whether these decays are bounded, and one matrix stands where others have two of low rank.
        has_whole_gate: whether one does for their gate alone.
        output_norm: tensor of the last norm.
        expert_width: what experts take and give where that is not HIDDEN.
        residual_scores: whether sub-layers take a mean of residuals.
        is_latent: whether attention is multi-head latent attention.
        indexer_layers: the blocks that choose the positions which this looks at.
        n_streams: residual streams with hyper-connections; 0: there is one without them.
        averages_streams: whether the head takes their mean.
        stream_rank: of the matrices that gate each value of these streams; 0: they are weighted as a whole.
        ngrams: embeddings of n-grams, if there are any.
        pooled_layers: the blocks whose attention has an indexer with keys that are means.
        pooled: how many tokens have one in the last of them; 1, or the others look at all positions.
        ratios: of each block, how many tokens share a compressed key, 0 for no such keys; none: attention is another.
        hash_layers: the blocks that choose experts by a table of tokens.
        block_layers: the blocks whose attention looks at blocks of positions that are chosen for each head of its keys.
        attention_gate: what gates the result of attention by a projection of its input: "value" for each value, "head".
        layer_heads: query heads of each block where they differ.
        ffn_norm: tensor of the norm before the feed-forward network; "" for none: it takes what attention takes.
        experts_norm: tensor of a norm that experts have for themselves, if they do.
        post_norms: tensors of norms behind attention and feed-forward network, if there are any.
        window_layers: those whose heads are `window_head_dim` wide, if that is not 0; of latent attention those with
            sizes of their own.
        keys_as_values: the blocks that have no projection to values.
        parallel_networks: whether every block has a dense network, beside its experts if it has any.
        dense_size: width of a dense network beside the experts of other models; 0 for none.
        dense_width: of the networks of blocks without experts.
        n_long: tokens of a long prompt whose last logits are kept as well.
        seed: the first that is tried.
    """

    architecture: str
    n_layers: int
    keys: dict[str, object] = field(default_factory=dict)
    moe_layers: tuple[int, ...] = ()
    n_experts_used: int = 2
    shared_size: int = 0
    fused_experts: bool = False
    router_bias: float = 0.0
    bias_name: str = "exp_probs_b.bias"
    head_dim: int = HEAD_DIM
    value_dim: int = 0
    n_kv_heads: int = N_KV_HEADS
    layer_kv_heads: tuple[int, ...] = ()
    head_norm: str = ""
    fused_qkv: bool = False
    rope_divisors: bool = False
    n_still: int = 0
    embedding_gain: float = 1.0
    long_divisors: bool = False
    biases: bool = False
    group_width: int = 0
    tied: bool = False
    sinks: tuple[int, ...] = ()
    recurrent: bool = False
    kinds: str = ""
    state_space_layers: tuple[int, ...] = ()
    scan_layers: tuple[int, ...] = ()
    short_conv_layers: tuple[int, ...] = ()
    delta_layers: tuple[int, ...] = ()
    lightning_layers: tuple[int, ...] = ()
    bounded_decays: bool = False
    has_whole_gate: bool = False
    output_norm: str = "output_norm"
    expert_width: int = 0
    residual_scores: bool = False
    is_latent: bool = False
    indexer_layers: tuple[int, ...] = ()
    n_streams: int = 0
    averages_streams: bool = False
    stream_rank: int = 0
    ngrams: Ngrams | None = None
    pooled_layers: tuple[int, ...] = ()
    pooled: int = 1
    ratios: tuple[int, ...] = ()
    hash_layers: tuple[int, ...] = ()
    block_layers: tuple[int, ...] = ()
    attention_gate: str = ""
    layer_heads: tuple[int, ...] = ()
    ffn_norm: str = "ffn_norm"
    experts_norm: str = ""
    post_norms: tuple[str, ...] = ()
    window_layers: tuple[int, ...] = ()
    window_head_dim: int = 0
    keys_as_values: tuple[int, ...] = ()
    parallel_networks: bool = False
    dense_size: int = 0
    dense_width: int = 2 * FFN
    n_long: int = 0
    n_mtp: int = 0
    draft_parts: tuple[str, ...] | None = None
    seed: int = 0


LAYER_NORM = "layer_output_norm"  # under which some files keep the last norm of a block for multi-token prediction
POST_NORMS = ("post_attention_norm", "post_ffw_norm")
MOE = {"expert_count": N_EXPERTS, "expert_feed_forward_length": FFN}
DELTA_K_HEADS, DELTA_V_HEADS, DELTA_DIM, DELTA_KERNEL = 2, 4, 16, 4
DELTA_NET = {
    "ssm.conv_kernel": DELTA_KERNEL,
    "ssm.inner_size": DELTA_V_HEADS * DELTA_DIM,
    "ssm.state_size": DELTA_DIM,
    "ssm.time_step_rank": DELTA_V_HEADS,
    "ssm.group_count": DELTA_K_HEADS,
    "full_attention_interval": 2,
    "rope.dimension_sections": [2, 1, 1, 0],
}
STATE_HEADS, STATE_GROUPS, STATE_HEAD_DIM, STATE_SIZE, STATE_KERNEL = 4, 2, 16, 24, 4
STATE_SPACE = {
    "ssm.conv_kernel": STATE_KERNEL,
    "ssm.inner_size": STATE_HEADS * STATE_HEAD_DIM,
    "ssm.state_size": STATE_SIZE,
    "ssm.time_step_rank": STATE_HEADS,
    "ssm.group_count": STATE_GROUPS,
    "attention.layer_norm_epsilon": 1e-5,
}
SCAN_SIZE, SCAN_STATE, SCAN_RANK, SCAN_KERNEL = 2 * HIDDEN, 24, 32, 4
SCAN = {
    "ssm.conv_kernel": SCAN_KERNEL,
    "ssm.inner_size": SCAN_SIZE,
    "ssm.state_size": SCAN_STATE,
    "ssm.time_step_rank": SCAN_RANK,
}
SHORT_KERNEL = 3
KDA_DIM, KDA_KERNEL = 16, 4
QUERY_RANK, LATENT_DIM, ROPE_DIM, KEY_DIM, VALUE_DIM = 16, 24, 8, 12, 10
OUTPUT_GROUPS, OUTPUT_RANK = 2, 16  # of projections of what groups of heads find
GATED_VALUE_DIM = 24  # heads with gates are a multiple of 8 wide on a GPU
WINDOW_LATENT_DIM, WINDOW_KEY_DIM, WINDOW_VALUE_DIM = 56, 20, 16  # where layers with a window have sizes of their own
LATENT = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": QUERY_RANK,
    "attention.kv_lora_rank": LATENT_DIM,
    "attention.key_length": LATENT_DIM + ROPE_DIM,
    "attention.value_length": LATENT_DIM,
    "attention.key_length_mla": KEY_DIM + ROPE_DIM,
    "attention.value_length_mla": VALUE_DIM,
    "rope.dimension_count": ROPE_DIM,
}
INDEXER_HEADS, INDEXER_DIM, TOP_K = 8, 64, 12
INDEXER = {
    "attention.indexer.head_count": INDEXER_HEADS,
    "attention.indexer.key_length": INDEXER_DIM,
    "attention.indexer.top_k": TOP_K,
}
BLOCK_DIM = 32
BLOCKS = {
    "attention.indexer.head_count": N_KV_HEADS,
    "attention.indexer.key_length": BLOCK_DIM,
    "attention.indexer.top_k": 4,
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 2,
}
QWEN_MTP = {"expert_shared_feed_forward_length": FFN, "nextn_predict_layers": 1}
QWEN_MTP_PARTS = {
    "head_dim": 16,
    "head_norm": "head",
    "recurrent": True,
    "ffn_norm": "post_attention_norm",
    "n_mtp": 1,
}
MULTIPLIERS = 0x1F3A5C7B9D21, 0x12B9B0A1D6E3, 0x1D8A7F04C2B5
N_ROWS_OF_HEADS, N_ROWS_MORE = (61, 67, 71, 73), 8
NGRAM_KERNEL, END_ID = 4, 7
STREAM_RANK = 32
QWEN_4 = MOE | {
    "expert_shared_feed_forward_length": FFN,
    "attention.indexer.head_count": INDEXER_HEADS,
    "attention.indexer.key_length": BLOCK_DIM,
    "attention.indexer.top_k": TOP_K,
    "hyper_connection.low_rank": STREAM_RANK,
}
QWEN_4_PARTS = {
    "shared_size": FFN,
    "head_norm": "head",
    "head_dim": 16,
    "recurrent": True,
    "stream_rank": STREAM_RANK,
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 4096}
LING_3 = MOE | {
    "attention.value_length_mla": GATED_VALUE_DIM,
    "kda.head_dim": KDA_DIM,
    "kda.gate_lower_bound": -5.0,
    "ssm.conv_kernel": KDA_KERNEL,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": FFN,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
}
KIMI_K3 = MOE | {
    "kda.head_dim": KDA_DIM,
    "ssm.conv_kernel": KDA_KERNEL,
    "leading_dense_block_count": 1,
    "expert_shared_count": 2,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
    "activation.situ_beta": 1.2,
}
HUNYUAN_4 = (
    MOE
    | LATENT
    | {
        "attention.value_length_mla": GATED_VALUE_DIM,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "hyper_connection.epsilon": 0.01,
        "hyper_connection.magnitude": 2.0,
    }
)
HUNYUAN_4_PARTS = {
    "shared_size": FFN,
    "router_bias": 0.2,
    "value_dim": GATED_VALUE_DIM,
    "is_latent": True,
    "attention_gate": "value",
}
GLM_5_NEXT = MOE | {
    "attention.kv_lora_rank": LATENT_DIM,
    "attention.q_lora_rank": QUERY_RANK,
    "attention.key_length": LATENT_DIM,
    "attention.value_length": LATENT_DIM,
    "attention.key_length_mla": KEY_DIM,
    "attention.value_length_mla": VALUE_DIM,
    "attention.layer_norm_rms_epsilon": 0.3,
    "attention.layer_norm_epsilon": 0.3,
    "rope.dimension_count": 0,
    "kda.head_dim": KDA_DIM,
    "ssm.conv_kernel": KDA_KERNEL,
    "hyper_connection.count": 4,
    "hyper_connection.epsilon": 0.01,
    "hyper_connection.sinkhorn_iterations": 3,
    "leading_dense_block_count": 1,
    "feed_forward_length": 2 * FFN,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
}
GLM_5_NEXT_PARTS = {
    "router_bias": 0.2,
    "is_latent": True,
    "n_streams": 4,
    "averages_streams": True,
}
PHI = MOE | {"attention.sliding_window": 8, "rope.scaling.attn_factor": 1.25}
PHI_PARTS = {"moe_layers": (0, 1), "long_divisors": True, "biases": True}
PEERS = {
    "afmoe": Peer(
        "afmoe",
        4,
        MOE
        | {
            "leading_dense_block_count": 2,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.8,
            "attention.sliding_window": 8,
            "rope.freq_base_swa": 500.0,
        },
        moe_layers=(2, 3),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        attention_gate="value",
        post_norms=POST_NORMS,
    ),
    "arctic": Peer(
        "arctic",
        2,
        MOE,
        moe_layers=(0, 1),
        experts_norm="ffn_norm_exps",
        dense_size=HIDDEN,
    ),
    "bailingmoe": Peer(
        "bailingmoe",
        2,
        MOE | {"expert_shared_count": 2, "expert_weights_norm": True, "expert_weights_scale": 1.5},
        moe_layers=(0, 1),
        shared_size=2 * FFN,
    ),
    "bailingmoe2": Peer(
        "bailingmoe2",
        3,
        MOE
        | {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": FFN,
            "expert_gating_func": 2,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "rope.dimension_count": HEAD_DIM // 2,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        fused_qkv=True,
    ),
    "bailingmoe3": Peer(
        "bailingmoe3",
        3,
        LATENT
        | LING_3
        | {
            "attention.head_count_kv": [0, 1, 0],
            "kda.safe_gate": True,
            "leading_dense_block_count": 1,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "swiglu_clamp_exp": [0.0, 0.5, 0.0],
            "swiglu_clamp_shexp": [0.5, 0.0, 0.3],
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        is_latent=True,
        value_dim=GATED_VALUE_DIM,
        attention_gate="head",
        delta_layers=(0, 2),
        bounded_decays=True,
    ),
    "bailingmoe3-vl": Peer(
        "bailingmoe3",
        2,
        {key: size for key, size in LATENT.items() if key != "attention.q_lora_rank"}
        | LING_3
        | {
            "attention.head_count_kv": [0, 1],
            "kda.gate_lower_bound": -2.0,
            "leading_dense_block_count": 1,
            "rope.dimension_sections": [2, 1, 1, 0],
        },
        moe_layers=(1,),
        shared_size=FFN,
        router_bias=0.2,
        tied=True,
        is_latent=True,
        value_dim=GATED_VALUE_DIM,
        attention_gate="head",
        delta_layers=(0,),
        bounded_decays=True,
    ),
    "cohere2moe": Peer(
        "cohere2moe",
        4,
        MOE
        | {
            "feed_forward_length": 2 * FFN,
            "attention.layer_norm_rms_epsilon": None,
            "attention.layer_norm_epsilon": 1e-5,
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 1,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": FFN,
            "expert_weights_norm": True,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [False, True, False, True],
            "rope.scaling.type": "none",
            "logit_scale": 0.6,
        },
        moe_layers=(1, 2, 3, 4),
        shared_size=FFN,
        ffn_norm="",
        tied=True,
        n_mtp=1,
    ),
    "dbrx": Peer(
        "dbrx",
        2,
        MOE
        | {
            "feed_forward_length": FFN,
            "attention.layer_norm_rms_epsilon": None,
            "attention.layer_norm_epsilon": 1e-5,
            "attention.clamp_kqv": 1.0,
        },
        moe_layers=(0, 1),
        fused_qkv=True,
        ffn_norm="attn_output_norm",
    ),
    "deepseek": Peer(
        "deepseek",
        2,
        MOE | {"leading_dense_block_count": 1, "expert_shared_count": 2, "expert_weights_scale": 1.5},
        moe_layers=(1,),
        shared_size=2 * FFN,
        tied=True,
        seed=1,
    ),
    "deepseek32": Peer(
        "deepseek32",
        2,
        MOE
        | LATENT
        | INDEXER
        | YARN
        | {
            "feed_forward_length": 2 * FFN,
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        is_latent=True,
        indexer_layers=(0, 1, 2),
        n_mtp=1,
    ),
    "deepseek4": Peer(
        "deepseek4",
        4,
        MOE
        | YARN
        | {
            "attention.q_lora_rank": QUERY_RANK,
            "attention.sliding_window": 8,
            "attention.compress_ratios": [0, 4, 128, 4],
            "attention.compress_rope_freq_base": 500.0,
            "attention.output_group_count": OUTPUT_GROUPS,
            "attention.output_lora_rank": OUTPUT_RANK,
            "attention.indexer.head_count": INDEXER_HEADS,
            "attention.indexer.key_length": INDEXER_DIM,
            "attention.indexer.top_k": 3,
            "rope.dimension_count": ROPE_DIM,
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 0.01,
            "hyper_connection.sinkhorn_iterations": 3,
            "hash_layer_count": 2,
            "expert_shared_count": 1,
            "expert_gating_func": 4,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.5,
            "swiglu_clamp_exp": [0.5, 1.0, 0.0, 0.7],
            "swiglu_clamp_shexp": [0.0, 0.4, 0.8, 0.6],
        },
        moe_layers=(0, 1, 2, 3),
        shared_size=FFN,
        router_bias=0.2,
        head_dim=32,
        n_kv_heads=1,
        n_streams=4,
        ratios=(0, 4, 128, 4),
        hash_layers=(0, 1),
        n_long=N_TOKENS_COMPRESSED,
    ),
    "dots1": Peer(
        "dots1",
        2,
        MOE
        | {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        moe_layers=(1,),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        n_kv_heads=N_HEADS,
    ),
    "dots3note": Peer(
        "dots3note",
        3,
        MOE
        | LATENT
        | INDEXER
        | {
            "attention.value_length_mla": GATED_VALUE_DIM,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False, True],
            "attention.indexer.types": [False, True, False],
            "attention.kv_lora_rank_swa": WINDOW_LATENT_DIM,
            "attention.key_length_swa": WINDOW_LATENT_DIM + ROPE_DIM,
            "attention.value_length_swa": WINDOW_LATENT_DIM,
            "attention.key_length_mla_swa": WINDOW_KEY_DIM + ROPE_DIM,
            "attention.value_length_mla_swa": WINDOW_VALUE_DIM,
            "rope.freq_base_swa": 500.0,
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        value_dim=GATED_VALUE_DIM,
        is_latent=True,
        indexer_layers=(1,),
        window_layers=(0, 2, 3),
        layer_heads=(2, 4, 2, 2),
        seed=201,
        attention_gate="head",
        head_norm="head",
        n_mtp=1,
    ),
    "exaone-moe": Peer(
        "exaone-moe",
        4,
        MOE
        | {
            "leading_dense_block_count": 2,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": FFN,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False, True, False],
            "rope.scaling.type": "none",
        },
        moe_layers=(2, 3),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        seed=92,
    ),
    "ernie4_5-moe": Peer(
        "ernie4_5-moe",
        3,
        MOE
        | {
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
            "expert_shared_feed_forward_length": 2 * FFN,
        },
        moe_layers=(1, 2),
        shared_size=2 * FFN,
        router_bias=0.05,
        tied=True,
    ),
    "gemma4": Peer(
        "gemma4",
        4,
        MOE
        | {
            "feed_forward_length": 2 * FFN,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False, True, False],
            "attention.key_length_swa": HEAD_DIM,
            "attention.value_length_swa": HEAD_DIM,
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 0,
            "rope.dimension_count_swa": HEAD_DIM,
            "rope.freq_base_swa": 500.0,
            "final_logit_softcapping": 6.0,
        },
        moe_layers=(0, 1, 2),
        head_norm="head",
        head_dim=2 * HEAD_DIM,
        window_layers=(0, 2),
        window_head_dim=HEAD_DIM,
        layer_kv_heads=(2, 1, 2, 1),
        keys_as_values=(1,),
        rope_divisors=True,
        n_still=3,
        post_norms=POST_NORMS,
        parallel_networks=True,
        tied=True,
    ),
    "granite_swa": Peer(
        "granite_swa",
        3,
        MOE
        | {
            "logit_scale": 1.5,
            "residual_scale": 0.7,
            "embedding_scale": 0.6,
            "attention.scale": 0.25,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [False, True, True],
            "attention.rope_pattern": [False, True, False],
            "expert_shared_feed_forward_length": FFN,
        },
        moe_layers=(0, 1, 2),
        shared_size=FFN,
        fused_experts=True,
        sinks=(0, 1, 2),
        tied=True,
    ),
    "granitehybrid": Peer(
        "granitehybrid",
        3,
        MOE
        | STATE_SPACE
        | {
            "attention.head_count_kv": [0, N_KV_HEADS, 0],
            "feed_forward_length": FFN,
            "rope.scaling.finetuned": False,
            "logit_scale": 1.5,
            "residual_scale": 0.7,
            "expert_shared_feed_forward_length": FFN,
        },
        moe_layers=(0, 1, 2),
        shared_size=FFN,
        tied=True,
        state_space_layers=(0, 2),
    ),
    "granitemoe": Peer(
        "granitemoe",
        3,
        MOE
        | {
            "logit_scale": 1.5,
            "residual_scale": 0.7,
            "embedding_scale": 0.6,
            "attention.scale": 0.25,
            "expert_shared_feed_forward_length": FFN,
        },
        moe_layers=(0, 1, 2),
        shared_size=FFN,
        tied=True,
    ),
    "grok": Peer(
        "grok",
        2,
        MOE
        | YARN
        | {
            "feed_forward_length": 2 * FFN,
            "embedding_scale": 1.5,
            "logit_scale": 0.8,
            "attention.output_scale": 0.4,
            "attention.temperature_length": 1024,
            "attn_logit_softcapping": 2.0,
            "router_logit_softcapping": 30.0,
            "final_logit_softcapping": 6.0,
            "rope.scaling.yarn_ext_factor": 1.0,
            "rope.scaling.yarn_attn_factor": 1.0,
            "rope.scaling.yarn_beta_fast": 100.0,
            "rope.scaling.yarn_beta_slow": 3.0,
        },
        moe_layers=(0, 1),
        head_dim=16,
        layer_heads=(2, 2),
        n_kv_heads=1,
        post_norms=("attn_output_norm", "post_ffw_norm"),
        dense_size=2 * FFN,
    ),
    "grok-1": Peer(
        "grok",
        2,
        {"expert_count": N_EXPERTS},
        moe_layers=(0, 1),
        post_norms=("attn_output_norm", "layer_output_norm"),
        embedding_gain=0.01,
    ),
    "grovemoe": Peer(
        "grovemoe",
        3,
        MOE | {"expert_chunk_feed_forward_length": FFN, "experts_per_group": 2, "expert_group_scale": 0.6},
        moe_layers=(0, 1, 2),
        head_norm="head",
        n_experts_used=3,
        group_width=FFN,
    ),
    "hunyuan-moe": Peer(
        "hunyuan-moe",
        2,
        MOE | {"expert_shared_feed_forward_length": 2 * FFN},
        moe_layers=(0, 1),
        shared_size=2 * FFN,
        head_norm="head",
        tied=True,
    ),
    "hy_v3": Peer(
        "hy_v3",
        2,
        MOE
        | {
            "expert_shared_feed_forward_length": FFN,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        moe_layers=(1,),
        shared_size=FFN,
        router_bias=0.2,
        bias_name="exp_probs_b",
        head_norm="head",
    ),
    "hy_v4": Peer(
        "hy_v4",
        3,
        HUNYUAN_4
        | INDEXER
        | {
            "attention.indexer.types": [True, False, True],
            "hyper_connection.count": 4,
            "leading_dense_block_count": 1,
            "swiglu_clamp_exp": [0.0, 0.5, 1.0],
        },
        **HUNYUAN_4_PARTS,
        moe_layers=(1, 2),
        indexer_layers=(0, 2),
        sinks=(0, 1, 2),
        n_streams=4,
    ),
    "hy_v4-full": Peer(
        "hy_v4",
        2,
        HUNYUAN_4 | {"hyper_connection.count": 3},
        **HUNYUAN_4_PARTS,
        moe_layers=(0, 1),
        sinks=(0, 1),
        n_streams=3,
    ),
    "jamba": Peer(
        "jamba",
        3,
        MOE | SCAN | {"attention.head_count_kv": [0, N_KV_HEADS, 0], "feed_forward_length": FFN},
        moe_layers=(0, 2),
        scan_layers=(0, 2),
        dense_width=FFN,
    ),
    "laguna": Peer(
        "laguna",
        3,
        MOE
        | YARN
        | {
            "leading_dense_block_count": 1,
            "expert_shared_feed_forward_length": FFN,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": 2,
            "rope.dimension_count": 8,
            "rope.dimension_count_swa": 16,
            "rope.freq_base_swa": 500.0,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        head_dim=16,
        layer_heads=(2, 4, 2),
        attention_gate="head",
    ),
    "kimi-k3": Peer(
        "kimi-k3",
        5,
        KIMI_K3
        | LATENT
        | {
            "attention.head_count_kv": [0, 1, 0, 0, 1],
            "attention.value_length_mla": GATED_VALUE_DIM,
            "attn_res.block_size": 2,
            "leading_dense_block_count": 3,
            "kda.gate_lower_bound": -5.0,
            "expert_latent_length": 2 * HIDDEN,
            "activation.situ_linear_beta": 1.5,
        },
        moe_layers=(3, 4),
        shared_size=2 * FFN,
        router_bias=0.2,
        embedding_gain=3.0,
        is_latent=True,
        value_dim=GATED_VALUE_DIM,
        attention_gate="value",
        delta_layers=(0, 2, 3),
        has_whole_gate=True,
        expert_width=2 * HIDDEN,
        residual_scores=True,
    ),
    "kimi-k3-plain": Peer(
        "kimi-k3",
        3,
        KIMI_K3
        | {key: size for key, size in LATENT.items() if key != "attention.q_lora_rank"}
        | {
            "attention.head_count_kv": [0, 1, 0],
            "attn_res.block_size": 0,
            "expert_shared_count": 1,
            "activation.situ_linear_beta": 0.0,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        is_latent=True,
        delta_layers=(0, 2),
        has_whole_gate=True,
    ),
    "kimi-linear": Peer(
        "kimi-linear",
        3,
        MOE
        | {key: size for key, size in LATENT.items() if key != "attention.q_lora_rank"}
        | {
            "attention.head_count_kv": [0, 1, 0],
            "kda.head_dim": KDA_DIM,
            "ssm.conv_kernel": KDA_KERNEL,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_scale": 2.446,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        is_latent=True,
        delta_layers=(0, 2),
    ),
    "llama4": Peer(
        "llama4",
        4,
        MOE | {"interleave_moe_layer_step": 2},
        moe_layers=(1, 3),
        shared_size=FFN,
        n_experts_used=1,
        rope_divisors=True,
        n_long=N_TOKENS_LONG,
    ),
    "maple": Peer(
        "maple",
        3,
        MOE
        | {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, True, False],
            "rope.freq_base_swa": 500.0,
            "swiglu_clamp_exp": [0.0, 0.5, 0.0],
        },
        moe_layers=(0, 1, 2),
        head_norm="head",
    ),
    "mellum": Peer(
        "mellum",
        2,
        MOE | YARN | {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]},
        moe_layers=(0, 1),
        head_norm="head",
    ),
    "mimo2": Peer(
        "mimo2",
        3,
        MOE
        | {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [False, True, True],
            "attention.value_scale": 0.7,
            "rope.dimension_count": 8,
            "rope.freq_base_swa": 500.0,
        },
        moe_layers=(1, 2),
        router_bias=0.2,
        fused_qkv=True,
        head_dim=24,
        value_dim=16,
        layer_kv_heads=(1, 2, 2),
        sinks=(1, 2),
    ),
    "minimax-01": Peer(
        "minimax-01",
        3,
        MOE | {"full_attention_interval": 2, "residual_scale": 1.7, "rope.dimension_count": 8},
        moe_layers=(0, 1, 2),
        head_dim=16,
        lightning_layers=(0, 2),
    ),
    "minimax-m2": Peer(
        "minimax-m2",
        3,
        MOE | {"expert_gating_func": 2, "rope.dimension_count": 8},
        moe_layers=(0, 1, 2),
        router_bias=0.2,
        head_norm="row",
        head_dim=16,
    ),
    "glm-dsa": Peer(
        "glm-dsa",
        3,
        MOE
        | LATENT
        | INDEXER
        | {
            "attention.indexer.types": [True, False, True],
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        is_latent=True,
        indexer_layers=(0, 2),
    ),
    "glm5-next": Peer(
        "glm5-next",
        5,
        GLM_5_NEXT
        | INDEXER
        | {
            "attention.head_count_kv": [0, 1, 0, 1, 1],
            "attention.indexer.kpool": 4,
            "attention.indexer.kpool_select_tail": True,
            "attention.indexer.top_k": 8,
            "attention.indexer.types": [True, True, True, False, True],
            "kda.gate_lower_bound": -5.0,
            "expert_shared_count": 2,
            "swiglu_clamp_exp": [0.5, 1.0, 0.0, 0.7, 0.5],
            "swiglu_clamp_shexp": [0.3, 0.0, 0.4, 0.8, 0.6],
        },
        moe_layers=(1, 2, 3, 4),
        embedding_gain=2.0,
        shared_size=2 * FFN,
        delta_layers=(0, 2),
        indexer_layers=(1, 4),
        **GLM_5_NEXT_PARTS,
    ),
    "glm5-next-plain": Peer(
        "glm5-next",
        3,
        GLM_5_NEXT
        | INDEXER
        | {
            "attention.head_count_kv": [0, 1, 0, 1],
            "attention.indexer.kpool": 5,
            "attention.indexer.top_k": 10,
            "nextn_predict_layers": 1,
            "expert_shared_count": 1,
        },
        moe_layers=(1, 2, 3),
        shared_size=FFN,
        delta_layers=(0, 2),
        indexer_layers=(1, 3),
        n_mtp=1,
        n_long=N_TOKENS_COMPRESSED,
        **GLM_5_NEXT_PARTS,
    ),
    "minimax-m3": Peer(
        "minimax-m3",
        3,
        MOE
        | BLOCKS
        | {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.0,
            "rope.dimension_count": 8,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        head_dim=16,
        block_layers=(1, 2),
    ),
    "mistral4": Peer(
        "mistral4",
        2,
        MOE
        | LATENT
        | YARN
        | {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "attention.temperature_scale": 0.3,
            "attention.temperature_length": 8,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        moe_layers=(1,),
        shared_size=FFN,
        is_latent=True,
    ),
    "lfm2moe": Peer(
        "lfm2moe",
        3,
        MOE
        | {
            "attention.head_count_kv": [0, N_KV_HEADS, 0],
            "shortconv.l_cache": SHORT_KERNEL,
            "leading_dense_block_count": 2,
            "expert_gating_func": 2,
        },
        moe_layers=(2,),
        router_bias=0.2,
        head_norm="head",
        short_conv_layers=(0, 2),
        output_norm="token_embd_norm",
        tied=True,
    ),
    "nemotron_h_moe": Peer(
        "nemotron_h_moe",
        4,
        MOE
        | STATE_SPACE
        | {
            "attention.head_count_kv": [0, 0, N_KV_HEADS, 0],
            "feed_forward_length": [0, FFN, 0, FFN],
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 2 * FFN,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "moe_latent_size": 32,
        },
        moe_layers=(1, 3),
        shared_size=2 * FFN,
        router_bias=0.2,
        kinds="sfaf",
        expert_width=32,
    ),
    "nemotron_h": Peer(
        "nemotron_h",
        3,
        STATE_SPACE
        | {
            "attention.head_count_kv": [0, N_KV_HEADS, 0],
            "feed_forward_length": [0, 0, 2 * FFN],
        },
        kinds="saf",
    ),
    "phimoe": Peer("phimoe", 2, PHI | {"rope.scaling.original_context_length": 4096}, **PHI_PARTS),
    "phimoe-long": Peer("phimoe", 2, PHI | {"rope.scaling.original_context_length": 16}, **PHI_PARTS),
    "qwen3vlmoe": Peer(
        "qwen3vlmoe",
        2,
        MOE | {"rope.dimension_sections": [3, 3, 2, 0], "n_deepstack_layers": 1},
        moe_layers=(0, 1),
        head_norm="head",
        head_dim=16,
    ),
    # Blocks of 4 tokens in the last layer, after one that looks at everything; n-grams of 2 and of 3 tokens.
    "qwen4exp": Peer(
        "qwen4exp",
        4,
        QWEN_4
        | DELTA_NET
        | Ngrams(2, 3, 2, HIDDEN // 4).keys
        | {
            "attention.compress_ratios": [0, 0, 0, 4],
            "hyper_connection.count": 4,
        },
        **QWEN_4_PARTS,
        moe_layers=(0, 1, 2, 3),
        n_streams=4,
        ngrams=Ngrams(2, 3, 2, HIDDEN // 4),
        pooled_layers=(1, 3),
        pooled=4,
        n_long=N_TOKENS_COMPRESSED,
    ),
    # Blocks of one token, in two layers; n-grams of 2 tokens; a fourth axis, on which only keys of blocks turn.
    "qwen4exp-single": Peer(
        "qwen4exp",
        4,
        QWEN_4
        | DELTA_NET
        | Ngrams(0, 2, 1, HIDDEN).keys
        | {
            "attention.compress_ratios": 1,
            "attention.recurrent_layers": [True, False, True, False],
            "full_attention_interval": None,
            "rope.dimension_sections": [2, 2, 2, 2],
            "hyper_connection.count": 3,
        },
        **QWEN_4_PARTS,
        moe_layers=(0, 1, 2, 3),
        fused_experts=True,
        tied=True,
        n_streams=3,
        ngrams=Ngrams(0, 2, 1, HIDDEN),
        pooled_layers=(1, 3),
    ),
    "smallthinker": Peer(
        "smallthinker",
        2,
        MOE
        | {
            "attention.sliding_window": 4096,
            "rope.freq_base_swa": 500.0,
            "expert_gating_func": 2,
        },
        moe_layers=(0, 1),
        n_long=N_TOKENS_WINDOW,
    ),
    "step35": Peer(
        "step35",
        4,
        MOE
        | {
            "expert_shared_feed_forward_length": FFN,
            "expert_weights_norm": True,
            "expert_weights_scale": 3.0,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [False, True, True, False],
            "rope.freq_base_swa": 500.0,
            "swiglu_clamp_exp": [0.0, 0.0, 0.5, 0.0],
            "swiglu_clamp_shexp": [0.0, 0.0, 0.4, 0.7],
        },
        moe_layers=(2, 3),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        layer_heads=(4, 2, 2, 4),
        rope_divisors=True,
        attention_gate="head",
    ),
    # A block for multi-token prediction makes drafts.
    "glm4moe-mtp": Peer(
        "glm4moe",
        2,
        MOE
        | {
            "feed_forward_length": 2 * FFN,
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "rope.dimension_count": HEAD_DIM // 2,
        },
        moe_layers=(1, 2),
        shared_size=FFN,
        router_bias=0.2,
        head_norm="head",
        ffn_norm="post_attention_norm",
        n_mtp=1,
        draft_parts=("embed_tokens", "shared_head_head", "shared_head_norm"),
    ),
    "qwen35moe-mtp": Peer(
        "qwen35moe",
        4,
        MOE | DELTA_NET | QWEN_MTP | {"full_attention_interval": 4},
        **QWEN_MTP_PARTS,
        moe_layers=(0, 1, 2, 3, 4),
        shared_size=FFN,
        embedding_gain=3.0,
        draft_parts=("shared_head_norm",),
    ),
    "qwen3next-mtp": Peer(
        "qwen3next",
        2,
        MOE | DELTA_NET | QWEN_MTP | {"rope.dimension_sections": None},
        **QWEN_MTP_PARTS,
        moe_layers=(0, 1, 2),
        shared_size=FFN,
        embedding_gain=2.0,
        draft_parts=("shared_head_norm",),
    ),
    # The dense siblings of architectures with experts.
    "lfm2": Peer(
        "lfm2",
        2,
        {"attention.head_count_kv": [0, N_KV_HEADS], "shortconv.l_cache": SHORT_KERNEL},
        head_norm="head",
        short_conv_layers=(0,),
        output_norm="token_embd_norm",
        tied=True,
    ),
    "llama": Peer("llama", 2, rope_divisors=True),
    "qwen3": Peer("qwen3", 2, head_norm="head", tied=True),
    "qwen35": Peer(
        "qwen35", 4, DELTA_NET, head_norm="head", recurrent=True, ffn_norm="post_attention_norm", head_dim=16
    ),
    "qwen35-mtp": Peer(
        "qwen35",
        2,
        DELTA_NET | {"nextn_predict_layers": 1},
        **QWEN_MTP_PARTS,
        tied=True,
        draft_parts=(),
    ),
}


def drafting(name: str, parts: tuple[str, ...] = (), keys: dict[str, object] | None = None, **changes: object) -> Peer:
    """A model like one of these, and a block for multi-token prediction that makes drafts."""
    peer = PEERS[name]
    keys = peer.keys | {"nextn_predict_layers": 1} | (keys or {})
    return replace(peer, **({"n_mtp": 1} | changes), keys=keys, draft_parts=parts)


PEERS |= {
    "bailingmoe3-mtp": drafting(
        "bailingmoe3",
        (LAYER_NORM,),
        {
            "attention.head_count_kv": [0, 1, 1],
            "feed_forward_length": 2 * FFN,
            "swiglu_clamp_exp": [0.0, 0.0, 0.5],
            "swiglu_clamp_shexp": [0.5, 0.0, 0.4],
        },
        n_layers=2,
        moe_layers=(1, 2),
        delta_layers=(0,),
    ),
    "cohere2moe-mtp": drafting(
        "cohere2moe",
        (),
        {"attention.sliding_window_pattern": [False, True, False, True]},
        n_layers=3,
        moe_layers=(1, 2, 3),
    ),
    "deepseek2-mtp": drafting(
        "mistral4",
        ("embed_tokens", "shared_head_head", "shared_head_norm"),
        {
            "feed_forward_length": 2 * FFN,
            "attention.temperature_scale": None,
            "attention.temperature_length": None,
            "expert_gating_func": 2,
            "expert_weights_scale": 2.5,
        },
        architecture="deepseek2",
        moe_layers=(1, 2),
        router_bias=0.2,
        embedding_gain=2.0,
    ),
    "deepseek32-mtp": drafting("deepseek32", ("shared_head_norm",)),
    "glm-dsa-mtp": drafting(
        "glm-dsa",
        ("shared_head_norm",),
        {"feed_forward_length": 2 * FFN, "attention.indexer.types": [True, False]},
        n_layers=2,
        moe_layers=(1, 2),
    ),
    "hy_v3-mtp": drafting("hy_v3", ("shared_head_norm",), {"feed_forward_length": 2 * FFN}, moe_layers=(1, 2)),
    "mimo2-mtp": drafting(
        "mimo2",
        (LAYER_NORM,),
        {"attention.sliding_window_pattern": [False, True, True, True]},
        layer_kv_heads=(1, 2, 2, 2),
        sinks=(1, 2, 3),
    ),
    "nemotron_h_moe-mtp": drafting(
        "nemotron_h_moe",
        ("shared_head_norm",),
        {
            "attention.head_count_kv": [0, 0, N_KV_HEADS, N_KV_HEADS],
            "attention.layer_norm_epsilon": 0.05,
            "feed_forward_length": [0, FFN, 0, FFN],
        },
        n_layers=3,
        moe_layers=(1, 3),
        kinds="sfa",
    ),
    "step35-mtp": drafting(
        "step35",
        ("shared_head_norm", "shared_head_head"),
        {
            "nextn_predict_layers": 2,
            "attention.sliding_window_pattern": [False, True, False, True, True],
            "feed_forward_length": 2 * FFN,
            "swiglu_clamp_exp": [0.0, 0.0, 0.5, 0.6, 0.0],
            "swiglu_clamp_shexp": [0.0, 0.0, 0.4, 0.3, 0.0],
        },
        n_layers=3,
        n_mtp=2,
        moe_layers=(2, 3, 4),
        layer_heads=(4, 2, 4, 2, 2),
    ),
}


# -- models ----------------------------------------------------------------------------------------------------------


class Draw:
    """Random tensors; a projection adds about as much as it is given."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, *shape: int, gain: float = 1.0) -> np.ndarray:
        return (self._rng.standard_normal(shape) * gain / np.sqrt(shape[-1])).astype(np.float32)

    def norm(self, size: int) -> np.ndarray:
        return (1 + 0.25 * self._rng.standard_normal(size)).astype(np.float32)

    def between(self, low: float, high: float, *shape: int) -> np.ndarray:
        return self._rng.uniform(low, high, shape).astype(np.float32)

    def choices(self, n: int, n_experts: int, n_used: int) -> np.ndarray:
        return self._rng.random((n, n_experts)).argsort(-1)[:, :n_used].astype(np.int32)


def tensors(peer: Peer, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    yield "token_embd.weight", draw.matrix(N_VOCAB, HIDDEN, gain=peer.embedding_gain * np.sqrt(HIDDEN))
    if not peer.stream_rank:
        yield f"{peer.output_norm}.weight", draw.norm(HIDDEN) * np.float32(0.5 if peer.tied else 1.0)
    if peer.biases:
        yield f"{peer.output_norm}.bias", draw.between(-0.3, 0.3, HIDDEN)
    if not peer.tied:
        yield "output.weight", draw.matrix(N_VOCAB, HIDDEN, gain=2.5)
        if peer.biases:
            yield "output.bias", draw.between(-1, 1, N_VOCAB)
    if peer.long_divisors:
        yield "rope_factors_short.weight", draw.between(1, 2, peer.head_dim // 2)
        yield "rope_factors_long.weight", draw.between(4, 8, peer.head_dim // 2)
    if peer.rope_divisors:
        divisors = draw.between(1, 8, peer.head_dim // 2)
        divisors[len(divisors) - peer.n_still :] = 1e30
        yield "rope_freqs.weight", divisors
    if peer.stream_rank:
        yield from low_rank_streams("output_hc", peer, draw)
    elif peer.n_streams and not peer.averages_streams:
        yield from hyper_connections("output_hc", peer.n_streams, 1, draw)
    if peer.ngrams:
        n_rows, width = sum(peer.ngrams.sizes) + N_ROWS_MORE, peer.ngrams.head_dim
        yield "per_layer_token_embd.weight", draw.matrix(n_rows, width, gain=np.sqrt(width))
    if peer.residual_scores:
        yield "output_res_score.weight", draw.matrix(HIDDEN, gain=0.6)
    for layer in range(peer.n_layers + peer.n_mtp):
        for name, values in block(peer, layer, draw):
            yield f"blk.{layer}.{name}", values
    for layer in range(peer.n_layers, peer.n_layers + peer.n_mtp):
        yield f"blk.{layer}.nextn.eh_proj.weight", draw.matrix(HIDDEN, 2 * HIDDEN)
        yield f"blk.{layer}.nextn.enorm.weight", draw.norm(HIDDEN)
        yield f"blk.{layer}.nextn.hnorm.weight", draw.norm(HIDDEN)
        for part in peer.draft_parts or ():
            if part.endswith("norm"):
                values = draw.norm(HIDDEN)
            else:
                values = draw.matrix(N_VOCAB, HIDDEN, gain=np.sqrt(HIDDEN) if part == "embed_tokens" else 2.5)
            yield f"blk.{layer}.{'' if part == LAYER_NORM else 'nextn.'}{part}.weight", values


def block(peer: Peer, layer: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    if not peer.stream_rank:
        yield "attn_norm.weight", draw.norm(HIDDEN)
    if peer.biases:
        yield "attn_norm.bias", draw.between(-0.3, 0.3, HIDDEN)
    if peer.kinds:
        yield from one_kind(peer, layer, draw)
        return
    if peer.ffn_norm and not peer.stream_rank:
        yield f"{peer.ffn_norm}.weight", draw.norm(HIDDEN)
        if peer.biases:
            yield f"{peer.ffn_norm}.bias", draw.between(-0.3, 0.3, HIDDEN)
    if peer.experts_norm:
        yield f"{peer.experts_norm}.weight", draw.norm(HIDDEN)
    for name in peer.post_norms:
        yield f"{name}.weight", draw.norm(HIDDEN)
    is_recurrent = peer.recurrent and (layer + 1) % (peer.keys.get("full_attention_interval") or 2) != 0
    if is_recurrent and layer < peer.n_layers:
        yield from delta_net(peer, draw)
    elif layer in peer.state_space_layers:
        yield from state_space(draw)
    elif layer in peer.scan_layers:
        yield from selective_scan(draw)
    elif layer in peer.short_conv_layers:
        yield from short_conv(draw)
    elif layer in peer.delta_layers:
        yield from kimi_delta_attention(peer, draw)
    elif layer in peer.lightning_layers:
        yield from lightning_attention(peer, draw)
    elif peer.ratios:
        yield from compressed_attention(peer, layer, draw)
    else:
        yield from latent_attention(peer, layer, draw) if peer.is_latent else attention(peer, layer, draw)
    if layer in peer.indexer_layers:
        yield from indexer(peer, draw)
    for part in ("attn", "ffn") if peer.n_streams and layer < peer.n_layers else ():
        if peer.stream_rank:
            yield from low_rank_streams(f"hc_{part}", peer, draw)
            yield f"hc_{part}_inject.weight", draw.matrix(peer.n_streams, peer.n_streams * HIDDEN, gain=2.0)
        else:
            n_scales = 3 if "hyper_connection.sinkhorn_iterations" in peer.keys else 2
            yield from hyper_connections(f"hc_{part}", peer.n_streams, n_scales, draw)
    if peer.ngrams and layer == peer.ngrams.layer:
        yield from ngrams(peer, draw)
    if layer in peer.pooled_layers:
        yield from block_indexer(draw, INDEXER_HEADS)
    if peer.residual_scores:
        for part in ("attn", "ffn"):
            yield f"{part}_res_score.weight", draw.matrix(HIDDEN, gain=0.6)
    if layer in peer.block_layers:
        yield from block_indexer(draw)
    if peer.parallel_networks:
        yield from parallel_networks(peer, layer, draw)
        return
    if layer not in peer.moe_layers:
        yield from feed_forward("", peer.dense_width, draw)
        return
    yield "ffn_gate_inp.weight", draw.matrix(N_EXPERTS, HIDDEN, gain=6.0 if peer.expert_width else 3.0)
    if layer in peer.hash_layers:
        yield "ffn_gate_tid2eid.weight", draw.choices(N_VOCAB, N_EXPERTS, peer.n_experts_used)
    elif peer.router_bias:
        yield peer.bias_name, draw.between(-peer.router_bias, peer.router_bias, N_EXPERTS)
    if peer.fused_experts:
        yield "ffn_gate_up_exps.weight", draw.matrix(N_EXPERTS, 2 * FFN, HIDDEN)
    else:
        for part in ("gate", "up"):
            yield f"ffn_{part}_exps.weight", draw.matrix(N_EXPERTS, FFN, peer.expert_width or HIDDEN)
    yield "ffn_down_exps.weight", draw.matrix(N_EXPERTS, peer.expert_width or HIDDEN, FFN)
    if peer.expert_width:
        yield "ffn_routed_down.weight", draw.matrix(peer.expert_width, HIDDEN)
        yield "ffn_routed_norm.weight", draw.norm(peer.expert_width)
        yield "ffn_routed_up.weight", draw.matrix(HIDDEN, peer.expert_width, gain=0.3)
    if peer.group_width:
        for part in ("gate", "up"):
            yield f"ffn_{part}_chexps.weight", draw.matrix(N_EXPERTS // 2, peer.group_width, HIDDEN)
        yield "ffn_down_chexps.weight", draw.matrix(N_EXPERTS // 2, HIDDEN, peer.group_width)
    if peer.shared_size:
        yield from feed_forward("_shexp", peer.shared_size, draw, fused=peer.fused_experts and not peer.stream_rank)
        if peer.recurrent:
            yield "ffn_gate_inp_shexp.weight", draw.matrix(HIDDEN)
    if peer.dense_size:
        yield from feed_forward("", peer.dense_size, draw)


def parallel_networks(peer: Peer, layer: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    yield "layer_output_scale.weight", draw.between(0.5, 1.5, 1)
    yield from feed_forward("", 2 * FFN, draw)
    if layer not in peer.moe_layers:
        return
    yield "post_ffw_norm_1.weight", draw.norm(HIDDEN)
    yield "pre_ffw_norm_2.weight", draw.norm(HIDDEN)
    yield "post_ffw_norm_2.weight", draw.norm(HIDDEN)
    yield "ffn_gate_inp.weight", draw.matrix(N_EXPERTS, HIDDEN, gain=6.0)
    yield "ffn_gate_inp.scale", draw.norm(HIDDEN) * np.float32(np.sqrt(HIDDEN))
    if layer == peer.moe_layers[0]:
        yield "ffn_gate_up_exps.weight", draw.matrix(N_EXPERTS, 2 * FFN, HIDDEN)
    else:
        for part in ("gate", "up"):
            yield f"ffn_{part}_exps.weight", draw.matrix(N_EXPERTS, FFN, HIDDEN)
    yield "ffn_down_exps.weight", draw.matrix(N_EXPERTS, HIDDEN, FFN)
    yield "ffn_down_exps.scale", draw.between(0.5, 1.5, N_EXPERTS)


def one_kind(peer: Peer, layer: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    kind = peer.kinds[layer] if layer < peer.n_layers else "af"
    if kind == "s":
        yield from state_space(draw)
    if "a" in kind:
        yield from attention(peer, layer, draw)
    if kind == "af":
        yield "post_attention_norm.weight", draw.norm(HIDDEN)
    if "f" not in kind:
        return
    if layer not in peer.moe_layers:
        yield "ffn_up.weight", draw.matrix(2 * FFN, HIDDEN)
        yield "ffn_down.weight", draw.matrix(HIDDEN, 2 * FFN)
    else:
        width = peer.expert_width or HIDDEN
        yield "ffn_gate_inp.weight", draw.matrix(N_EXPERTS, HIDDEN, gain=6.0)
        yield "exp_probs_b.bias", draw.between(-peer.router_bias, peer.router_bias, N_EXPERTS)
        yield "ffn_up_exps.weight", draw.matrix(N_EXPERTS, FFN, width)
        yield "ffn_down_exps.weight", draw.matrix(N_EXPERTS, width, FFN, gain=0.3)
        yield "ffn_up_shexp.weight", draw.matrix(peer.shared_size, HIDDEN)
        yield "ffn_down_shexp.weight", draw.matrix(HIDDEN, peer.shared_size, gain=0.3)
        if peer.expert_width:
            yield "ffn_latent_down.weight", draw.matrix(width, HIDDEN)
            yield "ffn_latent_up.weight", draw.matrix(HIDDEN, width)


def state_space(draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    inner, keys = STATE_HEADS * STATE_HEAD_DIM, STATE_GROUPS * STATE_SIZE
    yield "ssm_in.weight", draw.matrix(2 * inner + 2 * keys + STATE_HEADS, HIDDEN)
    yield "ssm_conv1d.weight", draw.matrix(inner + 2 * keys, STATE_KERNEL)
    yield "ssm_conv1d.bias", draw.between(-0.5, 0.5, inner + 2 * keys)
    yield "ssm_dt.bias", draw.between(-1, 1, STATE_HEADS)
    yield "ssm_a", draw.between(-2, -0.1, STATE_HEADS, 1)
    yield "ssm_d", draw.between(0.5, 1.5, STATE_HEADS, 1)
    yield "ssm_norm.weight", draw.norm(inner).reshape(STATE_GROUPS, -1)
    yield "ssm_out.weight", draw.matrix(HIDDEN, inner)


def selective_scan(draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    yield "ssm_in.weight", draw.matrix(2 * SCAN_SIZE, HIDDEN)
    yield "ssm_conv1d.weight", draw.matrix(SCAN_SIZE, SCAN_KERNEL)
    yield "ssm_conv1d.bias", draw.between(-0.5, 0.5, SCAN_SIZE)
    yield "ssm_x.weight", draw.matrix(SCAN_RANK + 2 * SCAN_STATE, SCAN_SIZE)
    yield "ssm_dt_norm.weight", draw.norm(SCAN_RANK)
    yield "ssm_b_norm.weight", draw.norm(SCAN_STATE)
    yield "ssm_c_norm.weight", draw.norm(SCAN_STATE)
    yield "ssm_dt.weight", draw.matrix(SCAN_SIZE, SCAN_RANK)
    yield "ssm_dt.bias", draw.between(-4, 0, SCAN_SIZE)
    yield "ssm_a", draw.between(-4, -0.1, SCAN_SIZE, SCAN_STATE)
    yield "ssm_d", draw.between(0.5, 1.5, SCAN_SIZE)
    yield "ssm_out.weight", draw.matrix(HIDDEN, SCAN_SIZE, gain=0.5)


def short_conv(draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    yield "shortconv.in_proj.weight", draw.matrix(3 * HIDDEN, HIDDEN)
    yield "shortconv.conv.weight", draw.matrix(HIDDEN, SHORT_KERNEL)
    yield "shortconv.out_proj.weight", draw.matrix(HIDDEN, HIDDEN)


def feed_forward(suffix: str, size: int, draw: Draw, *, fused: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    if fused:
        yield f"ffn_up{suffix}.weight", draw.matrix(2 * size, HIDDEN)
    else:
        for part in ("gate", "up"):
            yield f"ffn_{part}{suffix}.weight", draw.matrix(size, HIDDEN)
    yield f"ffn_down{suffix}.weight", draw.matrix(HIDDEN, size)


def attention(peer: Peer, layer: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    n_heads = peer.layer_heads[layer] if peer.layer_heads else N_HEADS
    n_kv_heads = peer.layer_kv_heads[layer] if peer.layer_kv_heads else peer.n_kv_heads
    head_dim = peer.window_head_dim if layer in peer.window_layers else peer.head_dim
    value_dim = peer.value_dim or head_dim
    q_size, k_size, v_size = n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * value_dim
    sizes = {"q": 2 * q_size if peer.recurrent else q_size, "k": k_size, "v": v_size}
    if layer in peer.keys_as_values:
        del sizes["v"]
    if peer.fused_qkv:
        yield "attn_qkv.weight", draw.matrix(sum(sizes.values()), HIDDEN)
    else:
        for part, size in sizes.items():
            yield f"attn_{part}.weight", draw.matrix(size, HIDDEN)
            if peer.biases:
                yield f"attn_{part}.bias", draw.between(-0.5, 0.5, size)
    # Beside layers that choose blocks llama.cpp makes keys and values float16 numbers: there they must count little.
    gain = 0.25 if layer in peer.block_layers + peer.pooled_layers else 0.005 if peer.block_layers else 1.0
    yield "attn_output.weight", draw.matrix(HIDDEN, n_heads * value_dim, gain=gain)
    if peer.biases:
        yield "attn_output.bias", draw.between(-0.5, 0.5, HIDDEN)
    if layer in peer.sinks:
        yield "attn_sinks.weight", draw.between(-1, 1, n_heads)
    if peer.attention_gate:
        yield "attn_gate.weight", draw.matrix(n_heads if peer.attention_gate == "head" else q_size, HIDDEN)
    if peer.head_norm:
        for part, size in (("q", q_size), ("k", k_size)):
            yield f"attn_{part}_norm.weight", draw.norm(size if peer.head_norm == "row" else head_dim)


def latent_attention(peer: Peer, layer: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    n_heads = peer.layer_heads[layer] if peer.layer_heads else N_HEADS
    latent_dim, key_dim, value_dim = LATENT_DIM, KEY_DIM, peer.value_dim or VALUE_DIM
    if layer in peer.window_layers:
        latent_dim, key_dim, value_dim = WINDOW_LATENT_DIM, WINDOW_KEY_DIM, WINDOW_VALUE_DIM
    rope_dim = peer.keys["rope.dimension_count"]
    query_size = n_heads * (key_dim + rope_dim)
    if "attention.q_lora_rank" in peer.keys:
        yield "attn_q_a.weight", draw.matrix(QUERY_RANK, HIDDEN)
        yield "attn_q_a_norm.weight", draw.norm(QUERY_RANK)
        yield "attn_q_b.weight", draw.matrix(query_size, QUERY_RANK)
    else:
        yield "attn_q.weight", draw.matrix(query_size, HIDDEN)
    yield "attn_kv_a_mqa.weight", draw.matrix(latent_dim + rope_dim, HIDDEN)
    yield "attn_kv_a_norm.weight", draw.norm(latent_dim)
    yield "attn_k_b.weight", draw.matrix(n_heads, latent_dim, key_dim)
    yield "attn_v_b.weight", draw.matrix(n_heads, value_dim, latent_dim)
    has_choice = peer.indexer_layers and layer not in peer.window_layers
    yield "attn_output.weight", draw.matrix(HIDDEN, n_heads * value_dim, gain=0.1 if has_choice else 1.0)
    if peer.attention_gate:
        n_gates = n_heads if peer.attention_gate == "head" else n_heads * value_dim
        yield "attn_gate.weight", draw.matrix(n_gates, HIDDEN)
    if layer in peer.sinks:
        yield "attn_sinks.weight", draw.between(-1, 1, n_heads)
    if peer.head_norm:
        yield "attn_k_norm.weight", draw.norm(rope_dim)


def compressed_attention(peer: Peer, layer: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    dim, ratio = peer.head_dim, peer.ratios[layer]
    yield "attn_q_a.weight", draw.matrix(QUERY_RANK, HIDDEN)
    yield "attn_q_a_norm.weight", draw.norm(QUERY_RANK)
    yield "attn_q_b.weight", draw.matrix(N_HEADS * dim, QUERY_RANK)
    yield "attn_kv.weight", draw.matrix(dim, HIDDEN)
    yield "attn_kv_a_norm.weight", draw.norm(dim)
    yield "attn_sinks.weight", draw.between(-1, 1, N_HEADS)
    yield "attn_output_a.weight", draw.matrix(OUTPUT_GROUPS * OUTPUT_RANK, N_HEADS * dim // OUTPUT_GROUPS)
    yield "attn_output_b.weight", draw.matrix(HIDDEN, OUTPUT_GROUPS * OUTPUT_RANK, gain=0.2)
    if ratio:
        yield from compressor("attn", dim, ratio, draw)
    if ratio == 4:
        yield "indexer.attn_q_b.weight", draw.matrix(INDEXER_HEADS * INDEXER_DIM, QUERY_RANK)
        yield "indexer.proj.weight", draw.matrix(INDEXER_HEADS, HIDDEN)
        yield from compressor("indexer", INDEXER_DIM, ratio, draw)


def compressor(name: str, dim: int, ratio: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    width = 2 * dim if ratio == 4 else dim
    yield f"{name}_compressor_kv.weight", draw.matrix(width, HIDDEN)
    yield f"{name}_compressor_gate.weight", draw.matrix(width, HIDDEN)
    yield f"{name}_compressor_ape.weight", draw.between(-1, 1, ratio, width)
    yield f"{name}_compressor_norm.weight", draw.norm(dim)


def hyper_connections(name: str, n_streams: int, n_scales: int, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    n_mixes = n_streams * (n_scales if n_scales < 3 else 2 + n_streams)
    yield f"{name}_fn.weight", draw.matrix(n_mixes, n_streams * HIDDEN, gain=2.0)
    yield f"{name}_scale.weight", draw.between(0.5, 1.5, n_scales)
    yield f"{name}_base.weight", draw.between(-1, 1, n_mixes)


def low_rank_streams(name: str, peer: Peer, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    width = peer.n_streams * HIDDEN
    yield f"{name}_norm.weight", draw.norm(width)
    yield f"{name}_down.weight", draw.matrix(peer.stream_rank, width, gain=2.0)
    yield f"{name}_up.weight", draw.matrix(width, peer.stream_rank, gain=4.0)


def ngrams(peer: Peer, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    width = peer.n_streams * HIDDEN
    yield "ple_key.weight", draw.matrix(width, HIDDEN)
    yield "ple_value.weight", draw.matrix(HIDDEN, HIDDEN)
    for part in ("key", "query", "conv"):
        yield f"ple_norm_{part}.weight", draw.norm(width)
    yield "ple_conv1d.weight", draw.matrix(width, NGRAM_KERNEL, gain=2.0)


def indexer(peer: Peer, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    yield "indexer.attn_q_b.weight", draw.matrix(INDEXER_HEADS * INDEXER_DIM, QUERY_RANK)
    yield "indexer.attn_k.weight", draw.matrix(INDEXER_DIM, HIDDEN)
    yield "indexer.k_norm.weight", draw.norm(INDEXER_DIM)
    yield "indexer.k_norm.bias", draw.between(-0.5, 0.5, INDEXER_DIM)
    yield "indexer.proj.weight", draw.matrix(INDEXER_HEADS, HIDDEN)
    pool_size = peer.keys.get("attention.indexer.kpool")
    if pool_size:
        yield "indexer_compressor_gate.weight", draw.matrix(INDEXER_DIM, HIDDEN, gain=3.0)
        yield "indexer_compressor_ape.weight", draw.between(-3, 3, pool_size, INDEXER_DIM)


def block_indexer(draw: Draw, n_heads: int = N_KV_HEADS) -> Iterator[tuple[str, np.ndarray]]:
    yield "indexer.q_proj.weight", draw.matrix(n_heads * BLOCK_DIM, HIDDEN)
    yield "indexer.k_proj.weight", draw.matrix(BLOCK_DIM, HIDDEN)
    yield "indexer.q_norm.weight", draw.norm(BLOCK_DIM)
    yield "indexer.k_norm.weight", draw.norm(BLOCK_DIM)


def delta_net(peer: Peer, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    n_v, dim = DELTA_V_HEADS, DELTA_DIM
    n_channels = (2 * DELTA_K_HEADS + n_v) * dim
    yield "attn_qkv.weight", draw.matrix(n_channels, HIDDEN)
    yield "attn_gate.weight", draw.matrix(n_v * dim, HIDDEN)
    yield "ssm_conv1d.weight", draw.matrix(n_channels, DELTA_KERNEL)
    yield "ssm_dt.bias", draw.between(-1, 1, n_v)
    yield "ssm_a", draw.between(-2, -0.1, n_v)
    if peer.architecture == "qwen3next":
        yield "ssm_ba.weight", draw.matrix(2 * n_v, HIDDEN)
    else:
        yield "ssm_beta.weight", draw.matrix(n_v, HIDDEN)
        yield "ssm_alpha.weight", draw.matrix(n_v, HIDDEN)
    yield "ssm_norm.weight", draw.norm(dim)
    yield "ssm_out.weight", draw.matrix(HIDDEN, n_v * dim)


def kimi_delta_attention(peer: Peer, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    size = N_HEADS * KDA_DIM
    for part in "qkv":
        yield f"attn_{part}.weight", draw.matrix(size, HIDDEN)
        yield f"ssm_conv1d_{part}.weight", draw.matrix(size, 1, KDA_KERNEL)
    yield "ssm_beta.weight", draw.matrix(N_HEADS, HIDDEN)
    for part in "fg":
        if peer.bounded_decays:
            yield f"ssm_{part}_a.weight", draw.matrix(size, HIDDEN)
        elif part == "g" and peer.has_whole_gate:
            yield "ssm_g.weight", draw.matrix(size, HIDDEN)
        else:
            yield f"ssm_{part}_a.weight", draw.matrix(KDA_DIM, HIDDEN)
            yield f"ssm_{part}_b.weight", draw.matrix(size, KDA_DIM)
    yield "ssm_dt.bias", draw.between(-4, 1, size)
    shape = (N_HEADS,) if peer.architecture in {"glm5-next", "kimi-k3"} else (N_HEADS, 1)
    yield "ssm_a", draw.between(0.5, 3, *shape) if peer.bounded_decays else draw.between(-2, -0.1, *shape)
    yield "ssm_norm.weight", draw.norm(KDA_DIM)
    yield "attn_output.weight", draw.matrix(HIDDEN, size, gain=0.5)


def lightning_attention(peer: Peer, draw: Draw) -> Iterator[tuple[str, np.ndarray]]:
    size = N_HEADS * peer.head_dim
    yield "attn_norm_2.weight", draw.norm(size)
    yield "attn_qkv.weight", draw.matrix(3 * size, HIDDEN)
    yield "attn_gate.weight", draw.matrix(size, HIDDEN)
    yield "attn_output.weight", draw.matrix(HIDDEN, size)


def write_model(path: Path, peer: Peer, seed: int, disturbance: int = 0) -> None:
    writer = gguf.GGUFWriter(path, peer.architecture)
    keys: dict[str, object] = {
        "vocab_size": N_VOCAB,
        "context_length": 16384,
        "embedding_length": HIDDEN,
        "block_count": peer.n_layers + peer.n_mtp,
        "feed_forward_length": FFN if len(peer.moe_layers) == peer.n_layers else 2 * FFN,
        "attention.head_count": list(peer.layer_heads) or N_HEADS,
        "attention.head_count_kv": list(peer.layer_kv_heads) or peer.n_kv_heads,
        "attention.key_length": peer.head_dim,
        "attention.value_length": peer.value_dim or peer.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": peer.head_dim,
        "rope.freq_base": 10000.0,
    }
    if peer.moe_layers:
        keys["expert_used_count"] = peer.n_experts_used

    def add_unsigned(key: str, values: np.ndarray) -> None:
        writer.add_key_value(key, values.tolist(), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64)

    for key, value in (keys | peer.keys).items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
            np.ndarray: add_unsigned,
        }
        add[type(value)](f"{peer.architecture}.{key}", value)
    writer.add_string("general.name", f"tiny random {peer.architecture}")
    writer.add_string("tokenizer.ggml.model", "none")
    for name, values in tensors(peer, Draw(seed)):
        if disturbance and name == "token_embd.weight":
            noise = np.random.default_rng(disturbance).standard_normal(values.shape)
            disturbed = (values * (1 + DISTURBANCE * noise)).astype(np.float32)
            writer.add_tensor(name, disturbed)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- llama.cpp -------------------------------------------------------------------------------------------------------


def quantize(source: Path, target: Path, file_type: int) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = file_type, 1, True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert status == 0


def llama_logits(path: Path, peer: Peer, tokens: np.ndarray, n_wanted: int) -> np.ndarray:
    """Logits of the last tokens, of several runs where llama.cpp's budget of positions is another at each place."""
    if peer.pooled == 1:
        return logits_of_a_run(path, peer, tokens, n_wanted)
    runs = [
        logits_of_a_run(path, peer, tokens, n_wanted, {"attention.indexer.top_k": TOP_K - peer.pooled + 1 + n_own})
        for n_own in range(peer.pooled)
    ]
    n_own = np.arange(len(tokens) - n_wanted + 1, len(tokens) + 1) % peer.pooled
    return np.stack(runs)[n_own, np.arange(n_wanted)]


def logits_of_a_run(
    path: Path, peer: Peer, tokens: np.ndarray, n_wanted: int, instead: dict[str, int] | None = None
) -> np.ndarray:
    """Logits of the last tokens, with some keys replaced."""
    with opened_model(path, peer, instead) as model, opened_context(model, peer, len(tokens), n_wanted) as context:
        return decode(context, tokens, n_wanted)


@contextlib.contextmanager
def opened_model(path: Path, peer: Peer, instead: dict[str, int] | None = None) -> Iterator[llama_cpp.llama_model_p]:
    """A model with its weights as they are, and some keys replaced."""
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.use_extra_bufts = False
    model_parameters.load_mtp = peer.draft_parts is not None
    overrides = (llama_cpp.llama_model_kv_override * (len(instead or {}) + 1))()  # an empty one is the last
    for override, (key, number) in zip(overrides, (instead or {}).items(), strict=False):
        override.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        override.key = f"{peer.architecture}.{key}".encode()
        override.value.val_i64 = number
    model_parameters.kv_overrides = ctypes.cast(overrides, type(model_parameters.kv_overrides))
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
    assert model, path
    yield model
    llama_cpp.llama_model_free(model)


@contextlib.contextmanager
def opened_context(
    model: llama_cpp.llama_model_p,
    peer: Peer,
    n_tokens: int,
    n_wanted: int,
    kind: int = llama_cpp.LLAMA_CONTEXT_TYPE_DEFAULT,
) -> Iterator[llama_cpp.llama_context_p]:
    """A context with one thread, and keys and values in float32.

    Without flash attention, but where blocks are chosen: llama.cpp looks at all positions then.
    """
    parameters = llama_cpp.llama_context_default_params()
    parameters.ctx_type = kind
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = -(-n_tokens // 256) * 256
    parameters.n_outputs_max = n_wanted
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if peer.block_layers:
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.swa_full = True
    context = llama_cpp.llama_init_from_model(model, parameters)
    assert context
    yield context
    llama_cpp.llama_free(context)


def decode(context: llama_cpp.llama_context_p, tokens: np.ndarray, n_wanted: int) -> np.ndarray:
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), i, 1, 0
        batch.logits[i] = i >= len(tokens) - n_wanted
    assert llama_cpp.llama_decode(context, batch) == 0
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n_wanted, N_VOCAB)).copy()
    llama_cpp.llama_batch_free(batch)
    return found


def llama_drafts(path: Path, peer: Peer, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a draft for each token, of some drafts in a row, and the tokens of these.

    They are made as llama.cpp makes its own: drafts in a row are forgotten before the tokens come that were accepted.
    """
    n, n_seen = len(tokens), len(tokens) - N_LEFT
    with opened_model(path, peer) as model:
        with opened_context(model, peer, n, n) as context:
            llama_cpp_ext.llama_set_embeddings_nextn(context, True, False)
            decode(context, tokens, n)
            rows = np.ctypeslib.as_array(llama_cpp_ext.llama_get_embeddings_nextn(context), (n, HIDDEN))
            rows = np.concatenate([np.zeros((1, HIDDEN), np.float32), rows[:-1]])
        with opened_context(model, peer, n, n, llama_cpp.LLAMA_CONTEXT_TYPE_MTP) as context:
            llama_cpp_ext.llama_set_embeddings_nextn(context, True, True)
            drafts = [draft(context, tokens[:n_seen], rows[:n_seen], 0)[0]]
            token, row = tokens[n_seen : n_seen + 1], rows[n_seen : n_seen + 1]
            chain = np.empty((N_CHAINED, N_VOCAB), np.float32)
            for i in range(N_CHAINED):
                chain[i : i + 1], row = draft(context, token, row, n_seen + i)
                token = chain[i : i + 1].argmax(-1)
            memory = llama_cpp.llama_get_memory(context)
            assert llama_cpp.llama_memory_seq_rm(memory, 0, n_seen, -1)
            drafts.append(draft(context, tokens[n_seen:], rows[n_seen:], n_seen)[0])
    return np.concatenate(drafts), chain, chain.argmax(-1).astype(np.int32)


def draft(
    context: llama_cpp.llama_context_p, tokens: np.ndarray, rows: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of pairs of a token and a row, from a position on, and the rows that the block finds for them."""
    batch = llama_cpp.llama_batch_ext_init(context)
    for i, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        values = llama_cpp.llama_embd(row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 1, HIDDEN)
        assert llama_cpp.llama_batch_ext_add_token(batch, 0, int(token)) == i
        assert llama_cpp.llama_batch_ext_set_pos(batch, i, ctypes.byref(llama_cpp.llama_pos(start + i)))
        assert llama_cpp.llama_batch_ext_set_embd_token(batch, i, values)
        assert llama_cpp.llama_batch_ext_set_output_logits(batch, i, True)
    assert llama_cpp.llama_process(context, llama_cpp.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), N_VOCAB)).copy()
    found = np.ctypeslib.as_array(llama_cpp_ext.llama_get_embeddings_nextn(context), (len(tokens), HIDDEN)).copy()
    llama_cpp.llama_batch_ext_free(batch)
    return logits, found


def answers(path: Path, peer: Peer, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """All that llama.cpp finds for each token, and what it drafts."""
    found = {"logits": llama_logits(path, peer, tokens, len(tokens))}
    if peer.draft_parts is not None:
        found |= zip(("drafts", "chain", "chain_tokens"), llama_drafts(path, peer, tokens), strict=True)
    return found


def differences(reference: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> np.ndarray:
    """Divergence of all logits; drafts in a row differ in all that follows another token."""
    names = [name for name in reference if name != "chain_tokens"]
    return np.concatenate([divergence(reference[name], others[name]) for name in names])


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    p, q = (x - x.max(-1, keepdims=True) for x in (reference.astype(np.float64), logits.astype(np.float64)))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


def is_decisive(peer: Peer, seed: int, tokens: np.ndarray, plain: dict[str, np.ndarray], folder: Path) -> bool:
    """Return whether small disturbances leave the experts of a model as they are."""
    path = folder / "disturbed.gguf"
    for disturbance in range(1, 1 + N_DISTURBED):
        write_model(path, peer, seed, disturbance)
        if differences(plain, answers(path, peer, tokens)).max() > CLOSE:
            return False
    return True


def of_exact(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays by the names that they have in a file where they are exact."""
    return {part if part == "chain_tokens" else f"{part}_exact": values for part, values in found.items()}


def make(name: str, peer: Peer, folder: Path) -> None:
    model, quantized, back = OUT / f"{name}-F32.gguf", OUT / f"{name}-Q8_0.gguf", folder / "back.gguf"
    for seed in range(peer.seed, peer.seed + 1000):
        tokens = np.random.default_rng(1000 + seed).integers(N_VOCAB, size=peer.n_long or N_TOKENS).astype(np.int32)
        if peer.ngrams:
            tokens[[5, 17, 18]] = END_ID
        short = tokens[:N_TOKENS]
        write_model(model, peer, seed)
        quantize(model, quantized, llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
        quantize(quantized, back, llama_cpp.LLAMA_FTYPE_ALL_F32)
        plain, exact, noisy = (answers(path, peer, short) for path in (model, back, quantized))
        noise = differences(exact, noisy)
        if noise.max() < CLOSE and is_decisive(peer, seed, short, plain, folder):
            break
    else:
        raise SystemExit(f"{name}: no seed gives decisive routers")
    arrays = {"tokens": short} | of_exact(plain)
    if peer.n_long:
        arrays |= {"tokens_long": tokens, "logits_long_exact": llama_logits(model, peer, tokens, N_TOKENS)}
    np.savez_compressed(model.with_suffix(".npz"), **arrays)
    measured = {part: noisy[part] for part in ("logits", "drafts") if part in noisy}
    np.savez_compressed(quantized.with_suffix(".npz"), tokens=short, **of_exact(exact), **measured)
    print(
        f"{name}: seed {seed}, logits' deviation {plain['logits'].std():.2f}, 8 bits diverge by {noise.mean():.1e}, "
        f"at most {noise.max():.1e}; {model.stat().st_size >> 10} + {quantized.stat().st_size >> 10} KiB"
    )


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as scratch:
        for chosen in sys.argv[1:] or PEERS:
            make(chosen, PEERS[chosen], Path(scratch))
