"""The tests of the kernels and of the CUDA device once more, on a real GPU instead of the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cuda_launcher
import numpy as np
import pytest
import test_cuda_device
import test_cuda_draw
import test_cuda_kernels
import test_cuda_tiles
import test_draft_head
from test_cuda_device import (  # noqa: F401 - collected here
    Model,
    small,
    test_golden_models,
    test_more_copies_than_buffers,
    test_peers,
    test_peers_that_choose_what_attention_looks_at,
    test_slots_and_cuts_never_change_a_bit,
    test_steps_that_do_not_fit_are_refused,
    test_the_last_row_of_a_table_that_fills_its_pages_is_read_in_ram,
    test_tokens_are_drawn_as_the_cpu_draws_them,
    test_two_sequences_in_one_step,
)
from test_cuda_draw import (  # noqa: F401 - collected here
    test_draws_are_those_of_the_cpu,
    test_draws_break_no_rule,
    test_logits_that_are_no_numbers,
    test_only_allowed_tokens_are_drawn,
    test_what_takes_all_logits_is_left_to_the_cpu,
)
from test_cuda_kernels import (  # noqa: F401 - collected here
    test_a_convolution_of_tokens_that_are_apart,
    test_a_shared_expert_is_one_more_choice,
    test_a_step_keeps_the_state_after_one_of_its_tokens,
    test_activations_have_the_bits_of_the_cpu,
    test_attention,
    test_attention_inputs_are_what_single_operations_make,
    test_attention_looks_at_rows_that_tokens_share,
    test_attention_looks_at_selected_positions,
    test_attention_looks_at_the_blocks_of_each_key_head,
    test_blocks_are_selected,
    test_combination_takes_misses_from_the_answers,
    test_compress,
    test_elementwise_operations,
    test_embedding_is_the_dequantised_row,
    test_experts_have_the_bits_of_the_cpu,
    test_few_tokens_break_no_rule,
    test_few_tokens_have_the_bits_of_the_cpu,
    test_gate,
    test_gate_by_agreement,
    test_gates_of_streams_that_are_added_up,
    test_group_router,
    test_heads_have_matrices_of_their_own,
    test_hyper_connections,
    test_linear_has_the_bits_of_the_cpu,
    test_linear_takes_many_tokens_in_groups,
    test_linear_takes_some_tokens_together,
    test_matrices_of_two_formats_are_one_launch,
    test_mix_residuals,
    test_one_token_of_a_delta_net_layer_has_the_bits_of_its_parts,
    test_positions_are_selected,
    test_quotients_by_one_divisor_are_correctly_rounded,
    test_recurrent_layers,
    test_rope_is_accurate_at_long_positions,
    test_router,
    test_router_with_a_table,
    test_rows_are_carried_over_as_on_the_cpu,
    test_rows_that_tokens_share_are_stored_by_the_last_of_them,
    test_selective_scan,
    test_the_launch_of_the_logits_can_add_and_normalize_before,
    test_the_launch_of_the_logits_can_choose_and_ask,
    test_the_norm_of_a_sum_comes_in_all_forms,
    test_tiles_have_the_bits_of_the_cpu,
    test_tiles_take_any_number_of_tokens,
    test_tokens_are_hashed_as_the_cpu_hashes_them,
    test_tokens_of_a_prompt_share_tiles,
    test_words_of_the_host_are_fetched,
)
from test_cuda_prompts import (  # noqa: F401 - collected here
    prompt_model,
    single_tokens,
    test_long_steps_have_the_bits_of_single_tokens,
)
from test_cuda_states import test_a_step_of_wrong_drafts_is_taken_back  # noqa: F401 - collected here
from test_cuda_tiles import (  # noqa: F401 - collected here
    test_choices_are_sorted_and_cut_into_tiles,
    test_experts_by_tiles_have_the_bits_of_the_cpu,
)

from engine.devices.cuda import probe
from engine.errors import DeviceError

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the GPU where the tests expect the emulator and the stand-in driver."""
    try:
        probe()
    except DeviceError as error:
        pytest.skip(f"there is no GPU: {error}")
    monkeypatch.setattr(test_cuda_draw, "Emulator", cuda_launcher.RealGPU)
    monkeypatch.setattr(test_cuda_kernels, "Emulator", cuda_launcher.RealGPU)
    monkeypatch.setattr(test_cuda_tiles, "Emulator", cuda_launcher.RealGPU)
    monkeypatch.setattr(test_cuda_device, "StandInCompiler", lambda: None)  # NVIDIA's instead
    monkeypatch.setattr(test_draft_head, "StandInCompiler", lambda: None)


def test_swaps_never_change_a_bit(small: Model) -> None:  # noqa: F811 - the fixture above
    """Copies run beside the steps; nothing of it shows."""
    with small.open() as opened:
        expected = opened.logits()
    rng = np.random.default_rng(0)
    with small.open(hot_k=3) as opened:

        def swap() -> None:
            layer, slot = int(rng.integers(len(opened.program.n_slots))), int(rng.integers(3))
            for expert in range(opened.program.n_experts):
                opened.program.publish(layer, expert, -1)
            opened.copy(layer, int(rng.integers(opened.program.n_experts)), slot)

        for _ in range(3):
            assert (opened.logits(1, between=swap).view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize(("name", "hot_k"), test_draft_head.PLACES)
def test_heads_guess_as_on_the_cpu(name: str, hot_k: int | None, data: Path) -> None:
    with test_draft_head.open_head(data, name) as opened:
        test_draft_head.check_on_gpu(opened, hot_k)


@pytest.fixture(scope="module", autouse=True)
def close_the_context() -> Iterator[None]:
    """Give the GPU back at the end."""
    yield
    cuda_launcher._gpu_context.cache_clear()
