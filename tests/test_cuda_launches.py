"""What is launched for models of real shapes, without any GPU: within what every GPU takes.

The emulator runs small models only, so it does not see how many blocks a prompt of a large one has.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.devices.cuda.device import CUDADevice
from engine.devices.cuda.expert_layers import Staging, Streamed
from engine.devices.cuda.launch import MOST_BLOCKS, Launch
from engine.devices.cuda.lowering import Lowering
from engine.devices.graph import KVType
from engine.devices.placement import Wish
from engine.devices.program import Limits
from engine.models import load_model
from engine.synthetic import PUBLISHED, SyntheticModel
from tests.zero_weights import ZeroWeights

N_LAYERS = 7  # in which each kind of layer is there
MOST_THREADS, MOST_SHARED = 1024, 99 << 10  # of a block


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_launch_is_within_what_gpus_take(name: str) -> None:
    n_layers = min(N_LAYERS, PUBLISHED[name].size("block_count"))
    model_file = SyntheticModel.open(f"synthetic:{name}:layers={n_layers},vocab=4096")
    graph, weights = load_model(model_file).graph, ZeroWeights(model_file)
    device = CUDADevice.__new__(CUDADevice)  # no GPU is asked for anything
    device.prompt_tokens, device.wish, limits = 1 << 16, Wish(), Limits(512, 1, 1 << 17, KVType.Q8_0)
    larger = device._larger_steps(Lowering(graph, weights, limits), 1 << 60, 32)
    assert larger.max_tokens > 3000
    lowering = Lowering(graph, weights, larger, staging=Staging(2, 1, 32))
    steps = [lowering.launches(0, n, None) for n in (1, 8, 512)]
    longest = Lowering(graph, weights, replace(limits, max_tokens=1 << 16))  # which are not streamed
    assert 3000 < longest.limits.max_tokens <= MOST_BLOCKS
    steps.append(longest.launches(0, longest.limits.max_tokens, None))
    for step in (*steps, lowering.streaming_launches(0, larger.max_tokens)):
        for one in step:
            for launch in one.launches if isinstance(one, Streamed) else (one,):
                assert is_possible(launch), launch


def is_possible(launch: Launch) -> bool:
    return max(launch.grid[1:]) <= MOST_BLOCKS and launch.block <= MOST_THREADS and launch.shared_bytes <= MOST_SHARED


def test_too_many_blocks_are_noticed() -> None:
    fits = Launch("a.cu", "a", (), (1 << 20, MOST_BLOCKS, 1), 256, (), 1000)
    assert is_possible(fits)
    for wrong in ({"grid": (1, MOST_BLOCKS + 1, 1)}, {"block": 1056}, {"shared_bytes": 100 << 10}):
        assert not is_possible(replace(fits, **wrong))
