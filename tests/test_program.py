"""The recorded program: its checks, its fused operations in threads against single ones in order, and its helpers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_case import blocks, normal, ways

from engine import _kernels as k
from engine.quants.formats import BY_NAME

# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def embedding() -> Callable[..., k.Program]:
    """Makes programs with a vocabulary of 10 and a context of 6."""
    memory = np.zeros((64, 1024), np.float32)
    at = memory.ctypes.data

    def make(max_tokens: int = 4, n_slots: int = 2) -> k.Program:
        assert memory.size
        program = k.Program(max_tokens, n_slots, 1)
        program.embed(at, 0, 10, 8, at + 4096, 8, 1.0)
        places = [at + 8192 * i for i in (1, 2, 3, 4)]
        program.attention(*sum(((p, 8) for p in places), ()), at + 65536, k.KV_F32, 6, 1, 1, 8, 8, 1.0, 0, 0, 0, 0.0)
        return program

    return make


def step_of(
    token_ids: Sequence[int], positions: Sequence[int], slots: Sequence[int] = (), outputs: Sequence[int] = ()
) -> k.Step:
    step, n = k.Step(8), len(token_ids)
    step.token_ids[:n], step.positions[:n] = token_ids, positions
    step.slots[: len(slots)], step.output_rows[: len(outputs)] = slots, outputs
    step.n_tokens, step.n_outputs = n, len(outputs)
    return step


@pytest.mark.parametrize(
    "step",
    [
        step_of([0], [0]),
        step_of([9, 9, 9, 9], [0, 1, 2, 3], outputs=[0, 3]),
        step_of([1, 2, 3], [5, 0, 1], [0, 1, 1], [2]),
        step_of([1, 2], [4, 2], [1, 0]),
    ],
)
def test_a_step_that_fits(embedding, step):
    embedding().run(step)
    assert [seconds >= 0 for _, seconds in embedding().profile(step)]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (step_of([], []), "a step of 0 tokens; this program takes 1 to 4"),
        (step_of([0] * 5, range(5)), "a step of 5 tokens"),
        (step_of([0], [0], outputs=[0, 1]), "2 outputs of 1 tokens"),
        (step_of([10], [0]), "token 0 has the id 10; the vocabulary has 0 to 9"),
        (step_of([0, -1], [0, 1]), "token 1 has the id -1"),
        (step_of([0], [6]), "token 0 is at position 6; the context has 6"),
        (step_of([0], [-1]), "position -1"),
        (step_of([0], [0], [2]), "token 0 is in slot 2; this program has 2"),
        (step_of([0], [0], [-1]), "slot -1"),
        (step_of([0, 0], [0, 2]), "does not follow the token before it"),
        (step_of([0, 0, 0], [0, 0, 1], [0, 1, 0]), "must stand together and in order"),
        (step_of([0, 0], [0, 0]), "does not follow"),
        (step_of([0, 0], [0, 1], outputs=[1, 0]), "output 1 is row 0"),
        (step_of([0, 0], [0, 1], outputs=[1, 1]), "rising"),
        (step_of([0, 0], [0, 1], outputs=[2]), "output 0 is row 2"),
        (step_of([0, 0], [0, 1], outputs=[-1]), "row -1"),
    ],
)
def test_a_step_that_does_not_fit(embedding, step, message):
    for run in (embedding().run, embedding().profile):
        with pytest.raises(ValueError, match=message):
            run(step)


def test_a_step_cannot_claim_more_tokens_than_it_has_room_for(embedding):
    step = k.Step(2)
    step.n_tokens = 3
    with pytest.raises(ValueError, match="3 tokens and 0 outputs in a step made for 2"):
        embedding().run(step)
    step.n_tokens, step.n_outputs = 2, 3
    with pytest.raises(ValueError, match="3 outputs in a step made for 2"):
        embedding().run(step)


def test_the_lowest_limit_of_all_operations_counts(embedding):
    program, memory = embedding(), np.zeros(4096, np.float32)
    at = memory.ctypes.data
    program.embed(at, 0, 7, 8, at + 4096, 8, 1.0)
    with pytest.raises(ValueError, match="the vocabulary has 0 to 6"):
        program.run(step_of([7], [0]))


# -- recording ---------------------------------------------------------------------------------------------------------

A, B, C = 1 << 20, 2 << 20, 3 << 20  # addresses that are never followed
SHARED = A, 4, 4, 1, 1, B, 16, C, 4, 4  # what attention is given beside the rest
TAIL = A, 4, 4, 8, 1, 0, 0, 0, 0, 1, True
FINE = {
    "embed": (A, 0, 10, 8, B, 8, 1.0, 0, 0, 1),
    "rows": (A, 0, 10, 8, B, 16, 1.0, C, 2, 2),
    "hash_tokens": (A, B, 4, C, C, C, 3, 4, 7),
    "rms_norm": (A, 8, C, 0, B, 8, 2, 4, 0, False, 1e-6, 0),
    "quantize": (A, 256, 256, 1, B, 0),
    "linear": (A, 32, 8, [(B, 0, 4, C, 4, 0, 0)], 0),
    "add": (A, 8, B, 8, C, 8, 8, 0),
    "gate": (A, 8, B, 4, C, 8, 8, 4, 0, 0.0, 0.0, 0),
    "gated_streams": (A, 8, B, 8, C, 4, 8, 8, 0, 0.0, 0.0, 0, 2),
    "gate_by_agreement": (A, 16, B, 16, C, 8, C, 16, 2, 8, 1e-6),
    "split_heads": (A, 12, B, 8, C, 4, 2, 4, 2),
    "join_heads": (A, 8, B, 4, C, 12, 2, 4, 2),
    "scale": (A, 8, 0, 0, B, 8, 8, 2.0, 0),
    "soft_cap": (A, 8, B, 8, 8, 30.0, 0),
    "clamp": (A, 8, B, 8, 8, 1.5, 0),
    "scale_by_position": (A, 8, 8, 1, 4, 0.1),
    "attention": (A, 32, B, 16, B, 16, C, 32, C, 0, 16, 2, 1, 16, 16, 1.0, 0, 0, 0, 0.0),
    "shared_attention": (*(A, 64, B, 64, B, 64, C, 64, C, 0, 16, 2, 1, 16, 16, 1.0, 0, 4, 0, 0.0), *SHARED),
    "tail_attention": (A, 32, B, 16, B, 16, C, 32, C, 0, 16, 2, 1, 16, 16, 1.0, 0, 0, 0, 0.0, *TAIL),
    "select_positions": (A, 32, B, 16, C, 2, A, 4, C, 0, 16, 2, 16, 4, 1.0, 4),
    "selecting_tail": (A, 32, B, 16, C, 2, A, 5, C, 0, 16, 2, 16, 4, 1.0, 4, True),
    "selecting_without_weights": (A, 32, B, 16, 0, 0, A, 4, C, 0, 16, 2, 16, 4, 1.0, 4),
    "select_blocks": (A, 32, B, 16, A, 8, C, 0, 16, 2, 16, 4, 8, 1),
    "store_keys": (A, 16, B, 16, C, 0, 16, 1, 16, 16),
    "carry_over": (A, 8, C, B, 8, 8, 4),
    "carry_over_from_before": (0, 0, C, B, 8, 8, 4),
    "carry_over_for_later": (A, 8, C, 0, 0, 8, 4),
    "causal_conv": (0, 8, 0, 0, C, B, 8, 8, 4, True, 3),  # 0: real memory, see below
    "rope": (A, 16, 0, 2, 8, 8, 0, 1.0, 4),
    "delta_net": (A, B, C, 64, A, 4, B, 4, C, C, 0, C, C, 64, 2, 4, 16, 16, 1, 0.0, True, 1e-6),
    "selective_scan": (A, 8, A, 8, B, 16, B, 16, 0, C, C, C, 8, 8, 16),
    "compress": (A, 16, B, 16, C, C, A, 8, 8, 2, 4),
    "mean": (A, 8, 0, 0, 0, C, A, 8, 8, 1, 4),
    "router": (A, 16, 0, B, C, 16, 4, 0, 4, 2, True, 1.0),
    "table_router": (A, 16, 0, B, C, 16, 4, 3, 1, 1, True, 1.0, C, 10),
    "group_router": (A, 16, B, C, C, 16, 4, 2),
    "experts": (A, 32, A, 32, B, 4, 2, (C, 0, 0, 0), (C, 0, 0, 0), (C, 0, 0, 0), 0, 0.0, 0.0, 8, 8, C, 16),
    "combine": (A, 16, B, 2, 0, 0, 0, 0, C, 8, C, 8, 8, 1.0),
    "stream_weights": (A, 8, C, C, B, C, 4, 4, 0.1, 2.0),
    "mixed_streams": (A, 24, C, C, B, C, 4, 4, 0.1, 2.0, B, 16, 3),
    "add_to_streams": (A, 32, B, 8, C, 4, A, 32, 4, 8, B, 16, 2.0),
    "mix_residuals": ([(A, 8), (B, 8)], C, C, 8, 8, 1e-6),
    "select_outputs": (A, 8, B, 8, 8),
}
ALIASES = {
    "carry_over_for_later": "carry_over",
    "carry_over_from_before": "carry_over",
    "gated_streams": "gate",
    "mean": "compress",
    "mixed_streams": "stream_weights",
    "rows": "embed",
    "selecting_tail": "select_positions",
    "selecting_without_weights": "select_positions",
    "shared_attention": "attention",
    "table_router": "router",
    "tail_attention": "attention",
}
BAD = [
    ("embed", 0, 0, "the address of table is 0"),
    ("embed", 1, 4, "4 is not the ggml type"),
    ("embed", 1, -1, "-1 is not the ggml type"),
    ("embed", 2, 0, "n_vocab is 0"),
    ("embed", 3, 0, "n_cols is 0"),
    ("embed", 5, 7, "the stride of out is 7; expected at least its width 8"),
    ("embed", 9, 2, "n_ids is 2; expected 1 for the ids of tokens"),
    ("rows", 5, 15, "the stride of out is 15; expected at least its width 16"),
    ("rows", 8, 1, "the stride of ids is 1; expected at least its width 2"),
    ("rows", 9, 0, "n_ids is 0"),
    ("hash_tokens", 0, 0, "the address of state is 0"),
    ("hash_tokens", 2, 3, "the stride of out is 3"),
    ("hash_tokens", 3, 0, "the address of multipliers is 0"),
    ("hash_tokens", 4, 0, "the address of sizes is 0"),
    ("hash_tokens", 5, 0, "the address of offsets is 0"),
    ("hash_tokens", 6, 1, "n_hashed is 1; expected 2 to 8"),
    ("hash_tokens", 6, 9, "n_hashed is 9"),
    ("hash_tokens", 7, 5, "n_heads is 5; expected a multiple of 2"),
    ("rms_norm", 0, 0, "the address of x"),
    ("rms_norm", 0, A + 2, "expected one of float32 values"),
    ("rms_norm", 1, 7, "the stride of x is 7"),
    ("rms_norm", 2, 0, "the address of weight is 0"),
    ("rms_norm", 6, 0, "n_groups is 0"),
    ("rms_norm", 8, 3, "weight_step is 3; expected 0 or 4"),
    ("rms_norm", 11, 2, "rows is 2; expected 0 to 1"),
    ("quantize", 2, 255, "255 values are not whole groups of 256"),
    ("quantize", 3, 3, "activation is 3"),
    ("quantize", 4, 0, "the address of out is 0"),
    ("linear", 0, 0, "the address of x is 0"),
    ("linear", 1, 31, "x_row_bytes is 31; expected at least 32"),
    ("linear", 3, [], "0 matrices in one operation"),
    ("linear", 3, [(B, 0, 4, C, 4, 0, 0)] * 9, "9 matrices in one operation; expected 1 to 8"),
    ("linear", 3, [(B, 0, 0, C, 4, 0, 0)], "n_rows is 0"),
    ("linear", 3, [(B, 0, 4, C, 3, 0, 0)], "the stride of out is 3"),
    ("linear", 3, [(0, 0, 4, C, 4, 0, 0)], "the address of a weight is 0"),
    ("linear", 3, [(B, 8, 4, C, 4, 0, 0)], "not whole blocks of 32"),
    ("add", 4, 0, "the address of out"),
    ("add", 6, 0, "the width of a is 0"),
    ("gate", 7, 3, "3 gates cannot share 8 columns"),
    ("gate", 8, 9, "kind is 9"),
    ("gate", 12, 2, "4 gates; expected 8 where streams are added up"),
    ("gated_streams", 12, 3, "3 streams cannot share 8 columns evenly"),
    ("gated_streams", 12, 0, "n_streams is 0"),
    ("gated_streams", 5, 3, "the stride of out is 3"),
    ("gate_by_agreement", 1, 15, "the stride of a is 15"),
    ("gate_by_agreement", 3, 15, "the stride of b is 15"),
    ("gate_by_agreement", 5, 7, "the stride of x is 7"),
    ("gate_by_agreement", 8, 0, "n_streams is 0"),
    ("gate_by_agreement", 9, 0, "n_cols is 0"),
    ("gate_by_agreement", 10, -1.0, "floor is -1.0"),
    ("gate", 8, 7, "limit is 0.0; expected a number above 0"),
    ("split_heads", 6, 0, "n_heads is 0"),
    ("split_heads", 7, 0, "first_dim is 0"),
    ("split_heads", 1, 11, "the stride of the joined rows is 11"),
    ("join_heads", 8, 0, "second_dim is 0"),
    ("join_heads", 1, 7, "the stride of first is 7"),
    ("scale", 6, 0, "n_cols is 0"),
    ("scale", 8, -1, "rows is -1"),
    ("soft_cap", 4, 0, "n_cols is 0"),
    ("soft_cap", 5, 0.0, "cap is 0.0; expected a number above 0"),
    ("clamp", 3, 7, "the stride of out is 7"),
    ("clamp", 5, 0.0, "limit is 0.0; expected a number above 0"),
    ("scale_by_position", 3, 2, "offset is 2"),
    ("scale_by_position", 4, 0, "period is 0"),
    ("rope", 5, 7, "n_rot is 7; expected an even number up to 8"),
    ("rope", 5, 10, "n_rot is 10"),
    ("rope", 6, 2, "style is 2"),
    ("rope", 8, 0, "period is 0"),
    ("attention", 9, 3, "cache_type is 3"),
    ("attention", 10, 0, "n_rows is 0"),
    ("attention", 12, 3, "2 heads cannot share 3 key/value heads evenly"),
    ("attention", 13, 577, "head_dim is 577"),
    ("attention", 14, 0, "value_dim is 0"),
    ("attention", 17, -1, "window is -1"),
    ("attention", 18, -1, "chunk is -1"),
    ("attention", 19, -1.0, "cap is -1.0; expected 0, or a number above"),
    ("attention", 8, 0, "the address of cache is 0"),
    ("shared_attention", 23, 2, "block_size is 2; expected 1 for a list of shared rows"),
    ("shared_attention", 26, 15, "the stride of shared_k is 15"),
    ("shared_attention", 27, 0, "the address of shared is 0"),
    ("shared_attention", 28, 0, "n_rows is 0"),
    ("shared_attention", 29, 0, "period is 0"),
    ("shared_attention", 14, 20, "value_dim is 20; expected at most 16 with shared rows"),
    ("shared_attention", 12, 2, "n_kv_heads is 2; expected 1 with shared rows"),
    ("select_positions", 15, 0, "period is 0"),
    ("selecting_tail", 7, 4, "the stride of out is 4; expected at least its width 5"),
    ("tail_attention", 22, 1, "top_k is 1; expected at least 2 with a tail"),
    ("store_keys", 0, 0, "the address of k is 0"),
    ("store_keys", 3, 15, "the stride of v is 15"),
    ("store_keys", 4, 0, "the address of cache is 0"),
    ("store_keys", 9, 0, "value_dim is 0"),
    ("carry_over", 1, 7, "the stride of x is 7"),
    ("carry_over", 2, 0, "the address of state is 0"),
    ("carry_over", 4, 7, "the stride of out is 7"),
    ("carry_over", 5, 0, "n_channels is 0"),
    ("carry_over", 6, 0, "n_kept is 0"),
    ("carry_over_for_later", 0, 0, "the addresses of x and out are 0"),
    ("causal_conv", 8, 1, "kernel_size is 1; expected 2 to 16"),
    ("causal_conv", 10, 0, "dilation is 0; expected 1 to 10"),
    ("causal_conv", 10, 11, "dilation is 11"),
    ("causal_conv", 8, 17, "kernel_size is 17"),
    ("causal_conv", 1, 7, "the stride of x is 7"),
    ("delta_net", 14, 3, "4 value heads cannot share 3 key heads evenly"),
    ("delta_net", 16, 0, "k_dim is 0"),
    ("delta_net", 3, 63, "the stride of v is 63"),
    ("delta_net", 10, A, "expected beta, or skip in its place"),
    ("delta_net", 6, 0, "expected alpha, or neither it nor beta, skip and dt_bias"),
    ("delta_net", 9, 0, "the address of dt_bias is 0"),
    ("delta_net", 18, 2, r"decay_dim is 2; expected 1, or with beta k_dim \(16\)"),
    ("delta_net", 19, 0.5, "decay_bound is 0.5; expected 0, or with beta less"),
    ("delta_net", 11, 0, "the address of state is 0"),
    ("compress", 1, 15, "the stride of values is 15; expected at least its width 16"),
    ("compress", 3, 15, "the stride of scores is 15"),
    ("compress", 4, 0, "the address of biases is 0"),
    ("compress", 5, 0, "the address of state is 0"),
    ("compress", 8, 0, "n_channels is 0"),
    ("compress", 9, 3, "n_parts is 3; expected 1 or 2"),
    ("compress", 10, 0, "period is 0"),
    ("selective_scan", 3, 7, "the stride of dt is 7; expected at least its width 8"),
    ("selective_scan", 5, 15, "the stride of b is 15"),
    ("selective_scan", 9, 0, "the address of skip is 0"),
    ("selective_scan", 10, 0, "the address of state is 0"),
    ("selective_scan", 13, 0, "n_channels is 0"),
    ("selective_scan", 14, 257, "state_size is 257; expected 1 to 256"),
    ("select_blocks", 5, 7, "the stride of out is 7"),
    ("select_blocks", 11, 0, "top_k is 0"),
    ("select_blocks", 12, 0, "block_size is 0"),
    ("select_blocks", 12, 1 << 30, "4 blocks of 1073741824 positions are more than"),
    ("select_blocks", 13, 5, "n_newest is 5; expected 1 to 4"),
    ("router", 5, 1025, "1025 experts; expected 1 to 1024"),
    ("router", 6, 17, "17 experts of 16 are used"),
    ("router", 7, 4, "scoring is 4"),
    ("table_router", 13, 0, "n_vocab is 0; expected at least 1 with a table"),
    ("router", 8, 5, "16 experts cannot be 5 groups"),
    ("router", 9, 5, "5 groups of 4 are used"),
    ("group_router", 2, 0, "the address of ids is 0"),
    ("group_router", 6, 17, "17 experts of 16 are used"),
    ("group_router", 7, 3, "16 experts cannot be groups of 3"),
    ("experts", 1, 31, "the row bytes of x for gate is 31"),
    ("experts", 3, 31, "the row bytes of x for up is 31"),
    ("experts", 4, 0, "the address of ids is 0"),
    ("experts", 6, 5, "5 experts of 4 are used"),
    ("experts", 7, (0, 0, 0, 0), "the address of the gate table is 0"),
    ("experts", 9, (C, 12, 0, 0), "not whole blocks of 256"),
    ("experts", 10, 6, "activation is 6"),
    ("experts", 10, 5, "limit is 0.0; expected a number above 0"),
    ("experts", 16, 15, "the stride of out is 15"),
    ("combine", 3, 0, "n_experts_used is 0"),
    ("combine", 6, A, "a shared gate needs a shared expert"),
    ("combine", 1, 15, "the stride of expert_out is 15"),
    ("stream_weights", 1, 7, "the stride of mixes is 7; expected at least its width 8"),
    ("stream_weights", 2, 0, "the address of scale is 0"),
    ("stream_weights", 4, 0, "the address of weights is 0"),
    ("stream_weights", 6, 3, "the stride of gates is 3"),
    ("stream_weights", 7, 9, "n_streams is 9; expected 1 to 8"),
    ("mixed_streams", 1, 23, "the stride of mixes is 23; expected at least its width 24"),
    ("mixed_streams", 5, 0, "mixing needs gates"),
    ("mixed_streams", 7, 5, "n_streams is 5; expected 1 to 4 to mix"),
    ("mixed_streams", 11, 15, "the stride of mixing is 15"),
    ("mixed_streams", 12, 0, "n_normalizations is 0"),
    ("add_to_streams", 11, 15, "the stride of mixing is 15"),
    ("add_to_streams", 12, -1.0, "magnitude is -1.0; expected 0, or a number above"),
    ("add_to_streams", 1, 31, "the stride of x is 31; expected at least its width 32"),
    ("add_to_streams", 2, 0, "the address of added is 0"),
    ("add_to_streams", 5, 3, "the stride of gates is 3"),
    ("add_to_streams", 8, 0, "n_streams is 0; expected 1 to 8"),
    ("add_to_streams", 9, 0, "n_cols is 0"),
    ("mix_residuals", 0, [], "0 residuals; expected 1 to 16"),
    ("mix_residuals", 0, [(A, 8)] * 17, "17 residuals; expected 1 to 16"),
    ("mix_residuals", 0, [(A, 8), (B, 7)], "the stride of residual 1 is 7"),
    ("mix_residuals", 1, 0, "the address of scorer is 0"),
    ("mix_residuals", 3, 7, "the stride of out is 7"),
    ("mix_residuals", 4, 0, "n_cols is 0"),
    ("select_outputs", 4, 0, "the width of x is 0"),
]


@pytest.fixture
def record() -> Callable[[str, tuple], int]:
    """Records an operation by name; returns how many the program then has."""
    values = np.zeros(256, np.float32)

    def call(name: str, arguments: tuple) -> int:
        program = k.Program(4, 1, 1)
        real = {"causal_conv": (0, 2), "rope": (2,), "selective_scan": (8,)}.get(name, ())
        filled = [values.ctypes.data if i in real else value for i, value in enumerate(arguments)]
        getattr(program, ALIASES.get(name, name))(*filled)
        return len(program)

    return call


@pytest.mark.parametrize("name", FINE)
def test_every_operation_can_be_recorded(record, name):
    assert record(name, FINE[name]) >= 1


@pytest.mark.parametrize(("name", "index", "value", "message"), BAD)
def test_sizes_and_addresses_that_do_not_fit(record, name, index, value, message):
    arguments = (*FINE[name][:index], value, *FINE[name][index + 1 :])
    with pytest.raises(ValueError, match=message):
        record(name, arguments)


def test_formats_of_one_product_take_the_same_form():
    weights = [(B, 0, 4, C, 4, 0, 0), (B, 8, 4, C, 4, 0, 0)]
    with pytest.raises(ValueError, match="must take activations in the same form"):
        k.Program(4, 1, 1).linear(A, 4096, 32, weights, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "max_tokens is 0"),
        ((1, 0, 1), "n_slots is 0"),
        ((1, 1, 0), "n_threads is 0; expected 1 to 1024"),
        ((1, 1, 1025), "n_threads is 1025"),
        ((1, 1, 1, "sse"), "no instruction-set level 'sse'"),
    ],
)
def test_programs_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        k.Program(*arguments)


def test_a_program_says_what_it_is():
    program = k.Program(1, 1, 3)
    assert (len(program), program.n_threads, program.isa) == (0, 3, k.isa_levels()[-1])
    assert k.Program(1, 1, 1, "scalar").isa == "scalar"


# -- running -----------------------------------------------------------------------------------------------------------

N_BUFFERS, WIDTH, MAX_TOKENS = 5, 64, 12


@dataclass(frozen=True)
class Memory:
    """Some buffers of [MAX_TOKENS, WIDTH] and what is read only."""

    buffers: np.ndarray  # [N_BUFFERS, MAX_TOKENS, WIDTH]
    quantized: np.ndarray
    vectors: np.ndarray
    weights: np.ndarray
    state: np.ndarray
    cache: np.ndarray

    @classmethod
    def fresh(cls) -> Memory:
        weights = blocks("Q8_0", 3, 2 * WIDTH, WIDTH)
        cache = np.zeros(k.kv_cache_bytes(k.KV_F16, 2, 64, 2, 16, 16), np.uint8)
        return cls(
            normal(1, N_BUFFERS, MAX_TOKENS, WIDTH),
            np.zeros((MAX_TOKENS, k.activation_bytes(2, WIDTH)), np.uint8),
            np.abs(normal(2, 4, WIDTH)),
            weights,
            np.zeros((2, 3, WIDTH), np.float32),
            cache,
        )

    def record(self, program: k.Program, operation: tuple) -> None:
        """Record one of the operations that `operations` draws."""
        name, a, b, c = operation
        at = [(buffer.ctypes.data, WIDTH) for buffer in self.buffers]
        vector, rows = self.vectors.ctypes.data, k.ROWS_TOKENS
        if name == "add":
            program.add(*at[a], *at[b], *at[c], WIDTH, rows)
        elif name == "add a part":
            program.add(at[a][0] + 64, WIDTH, *at[b], at[c][0] + 128, WIDTH, 16, rows)
        elif name == "gate":
            program.gate(*at[a], *at[b], *at[c], WIDTH, WIDTH, k.GATE_SILU, 0.0, 0.0, rows)
        elif name == "scale" and b != c:
            program.scale(*at[a], *at[b], *at[c], WIDTH, 0.5, rows)
        elif name == "norm of rows":
            program.rms_norm(*at[a], vector, vector, *at[c], 1, WIDTH, 0, False, 1e-6, rows)
        elif name == "norm of heads":
            program.rms_norm(*at[a], vector, 0, *at[c], 4, 16, 0, True, 1e-6, rows)
        elif name == "linear":
            program.quantize(*at[a], WIDTH, 2, self.quantized.ctypes.data, rows)
            ggml_type, weights = BY_NAME["Q8_0"].ggml_type, self.weights.ctypes.data
            products = [(weights, ggml_type, WIDTH, *at[c], 0, 0)]
            if b != c:
                second = weights + WIDTH * self.weights.shape[1]
                products.append((second, ggml_type, WIDTH, *at[b], vector, vector))
            program.linear(self.quantized.ctypes.data, self.quantized.shape[1], WIDTH, products, rows)
        elif name == "rope":
            program.rope(*at[c], vector, 4, 16, 16, a % 2, 1.0)
        elif name == "split" and a != c:
            program.split_heads(*at[a], at[c][0], WIDTH, at[c][0] + 128, WIDTH, 2, 16, 16)
        elif name == "conv" and a != c:
            program.causal_conv(*at[a], vector, 0, self.state.ctypes.data, *at[c], WIDTH, 4, True)
        elif name == "attention" and c not in (a, b):
            cache = self.cache.ctypes.data
            places = (*at[a], *at[b], at[b][0] + 128, WIDTH, *at[c])
            program.attention(*places, cache, k.KV_F16, 64, 4, 2, 16, 16, 0.25, 0, 0, 0, 0.0)


NAMES = ["add", "add a part", "gate", "scale", "norm of rows", "norm of heads", "linear", "rope", "split", "conv"]
operations = st.tuples(st.sampled_from([*NAMES, "attention"]), *[st.integers(0, N_BUFFERS - 1)] * 3)


def run_in_steps(memory: Memory, programs: Sequence[k.Program], lengths: Sequence[int]) -> bytes:
    """Run programs one after another in each step; each step has one more sequence, next to the first one."""
    step, position, seen = k.Step(MAX_TOKENS), 0, []
    for length in lengths:
        n = length + 1
        step.n_tokens = n
        step.positions[:n] = [*range(position, position + length), 0]
        step.slots[:n] = [0] * length + [1]
        for program in programs:
            program.run(step)
        position += length
        seen.append(memory.buffers[:, :n].tobytes())
    return b"".join(seen)


@settings(max_examples=60)
@given(st.lists(operations, min_size=1, max_size=14), st.lists(st.integers(1, MAX_TOKENS - 1), min_size=1, max_size=3))
def test_operations_that_are_fused_and_shared_equal_single_ones_in_order(drawn, lengths):
    memory, single = Memory.fresh(), []
    for operation in drawn:
        program = k.Program(MAX_TOKENS, 2, 1, "scalar")
        memory.record(program, operation)
        if len(program):
            single.append(program)
    expected = run_in_steps(memory, single, lengths)
    for isa, n_threads in ways(k.isa_levels()):
        memory = Memory.fresh()
        program = k.Program(MAX_TOKENS, 2, n_threads, isa)
        for operation in drawn:
            memory.record(program, operation)
        assert run_in_steps(memory, [program], lengths) == expected, (isa, n_threads)


def test_many_more_threads_than_cores_still_end():
    memory = Memory.fresh()
    program = k.Program(MAX_TOKENS, 2, 16)
    for operation in [("linear", 0, 1, 2), ("norm of rows", 2, 0, 3), ("linear", 3, 4, 0)] * 5:
        memory.record(program, operation)
    alone = Memory.fresh()
    expected = k.Program(MAX_TOKENS, 2, 1)
    for operation in [("linear", 0, 1, 2), ("norm of rows", 2, 0, 3), ("linear", 3, 4, 0)] * 5:
        alone.record(expected, operation)
    assert run_in_steps(memory, [program], [3, 5]) == run_in_steps(alone, [expected], [3, 5])


def test_a_profile_names_every_operation_and_changes_nothing():
    memory, other = Memory.fresh(), Memory.fresh()
    program, plain = k.Program(MAX_TOKENS, 2, 2), k.Program(MAX_TOKENS, 2, 2)
    for operation in [("add", 0, 1, 2), ("gate", 2, 1, 3), ("linear", 3, 0, 4), ("attention", 4, 3, 1)]:
        memory.record(program, operation)
        other.record(plain, operation)
    step = k.Step(MAX_TOKENS)
    step.n_tokens, step.positions[:] = 5, range(MAX_TOKENS)
    profile = program.profile(step)
    plain.run(step)
    assert memory.buffers.tobytes() == other.buffers.tobytes()
    names = "+".join(name for name, _ in profile).split("+")
    assert sorted(names) == sorted(["add", "gate", "quantize", "linear", "store_keys", "store_values", "attention"])
    assert len(names) == len(program)
    assert all(seconds >= 0 for _, seconds in profile)


def test_one_program_in_two_threads_is_refused():
    n = 64
    weights, x = normal(0, n, n), normal(1, 4096, n)
    out = np.zeros((4096, n), np.float32)
    program, step = k.Program(4096, 1, 1, "scalar"), k.Step(4096)
    program.linear(x.ctypes.data, 4 * n, n, [(weights.ctypes.data, 0, n, out.ctypes.data, n, 0, 0)], k.ROWS_TOKENS)
    step.n_tokens, step.positions[:] = 4096, range(4096)
    messages: list[str] = []

    def run_until_one_is_refused() -> None:
        while not messages:
            try:
                program.run(step)
            except ValueError as error:  # noqa: PERF203
                messages.append(str(error))

    threads = [threading.Thread(target=run_until_one_is_refused) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("running in another thread" in message for message in messages)


# -- helpers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 1, 1000, (1 << 20) + 1, 5_000_000])
def test_parallel_copy(n_bytes):
    source = np.random.default_rng(0).integers(0, 256, n_bytes + 1, np.uint8)
    for n_threads in (1, 3):
        copy = np.zeros_like(source)
        k.parallel_copy(source.ctypes.data, copy.ctypes.data, n_bytes, n_threads)
        np.testing.assert_array_equal(copy[:n_bytes], source[:n_bytes])
        assert copy[n_bytes] == 0


def test_parallel_copy_of_nothing_it_can_copy():
    for arguments, message in (
        ((0, A, 5, 1), "must be addresses"),
        ((A, B, -1, 1), "n_bytes is -1"),
        ((A, B, 1, 0), "n_threads is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            k.parallel_copy(*arguments)


def test_read_bandwidth():
    around = np.zeros(3_000_003, np.uint8)
    assert k.read_bandwidth(around[5:-5], 2, 2) > 0
    assert not around[:5].any()
    assert not around[-5:].any()
    assert around.mean() > 0.99  # written before it is read, but for what is not aligned
    for arguments, message in (
        ((np.zeros(0, np.uint8), 1, 1), "length of buffer"),
        ((np.zeros(9, np.uint8), 1, 0), "repeats"),
    ):
        with pytest.raises(ValueError, match=message):
            k.read_bandwidth(*arguments)


@pytest.mark.parametrize("kind", [k.KV_F32, k.KV_F16, k.KV_Q8_0])
def test_the_size_of_a_cache(kind):
    bytes_of = {k.KV_F32: 4, k.KV_F16: 2, k.KV_Q8_0: 1 + 2 / 32}[kind]
    assert k.kv_cache_bytes(kind, 3, 160, 2, 64, 32) == 3 * 160 * 2 * (64 + 32) * bytes_of
    assert k.kv_cache_bytes(kind, 1, 1, 1, 16, 16) >= 32 * bytes_of
    with pytest.raises(ValueError, match="n_rows is 0"):
        k.kv_cache_bytes(kind, 1, 0, 1, 16, 16)
