"""The experts of many tokens by tiles: the choices sorted on the device, then the bits of the CPU, in the emulator."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from cuda_launcher import SCHEDULES, Emulator, aligned, same_bits
from test_cuda_kernels import EXPERTS, activations, cpu_experts, grid_of, random_experts

from engine.devices.cuda import kernels, tiles
from engine.devices.cuda.launch import ExpertMatrix
from engine.devices.cuda.tiles import Groups, Sizes
from engine.quants.formats import BY_NAME
from tests.cusim import needs_emulator

pytestmark = needs_emulator
F32 = np.float32


def make_groups(emulator: Emulator, sizes: Sizes, max_tokens: int) -> tuple[Groups, list[np.ndarray]]:
    parts = [np.full(n // 4, -7, np.int32) for n in tiles.groups_bytes(sizes, max_tokens)]
    return Groups(*(emulator.at(part) for part in parts)), parts


def expected_groups(
    ids: np.ndarray, places: np.ndarray, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]], list[int]]:
    """Sorted choices, where each expert's begin, tiles, where each group's begin."""
    flat = ids.ravel()
    chosen = np.flatnonzero(flat >= 0)
    choices = chosen[np.argsort(flat[chosen], kind="stable")]
    counts = np.bincount(flat[chosen], minlength=sizes.n_experts)
    first_choice = np.cumsum(counts) - counts
    found, starts = [], []
    for group in range(sizes.n_groups):
        starts.append(len(found))
        for expert in range(sizes.n_experts):
            place = int(places[expert])
            if place == -1 or (0 if place >= 0 else 1 + (-2 - place) // sizes.at_once) != group:
                continue
            at = place if place >= 0 else (-2 - place) % sizes.at_once
            for done in range(0, int(counts[expert]), 64):
                n = min(64, int(counts[expert]) - done)
                found.append((expert, at, int(first_choice[expert]) + done, n))
    return choices, first_choice, found, [*starts, len(found)]


@pytest.mark.parametrize("mode", ["fast", "race", "asan"])
def test_choices_are_sorted_and_cut_into_tiles(mode: str) -> None:
    """With experts in slots, experts that pass through in two batches, one that is elsewhere, ids that do not count."""
    rng, emulator = np.random.default_rng(0), Emulator(mode)
    sizes, n_tokens, max_tokens = Sizes(9, 3, 64, 64, at_once=3), 150, 160
    ids = np.stack([rng.permutation(9)[:3] for _ in range(n_tokens)]).astype(np.int32)
    ids[rng.random(ids.shape) < 0.4] = 2
    ids[5, 1] = -1
    places = np.array([3, -2, 0, -3, -1, -4, 1, -5, 2], np.int32)
    choices, first_choice, expected, starts = expected_groups(ids, places, sizes)
    for order, seed in SCHEDULES:
        groups, parts = make_groups(emulator, sizes, max_tokens)
        count = emulator.count(n_tokens, max_tokens)
        launches = tiles.group_choices(emulator.at(ids), emulator.at(places), sizes, groups, count)
        emulator.run(launches, order, seed)
        assert (parts[0][: len(choices)] == choices).all()
        assert (parts[1] == first_choice).all()
        assert [tuple(tile) for tile in parts[2].reshape(-1, 4)[: len(expected)].tolist()] == expected
        assert (parts[2][4 * len(expected) :] == -7).all()
        assert parts[3].tolist() == starts


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("mixed", "fast"),
        ("blocks of 32", "fast"),
        ("gelu", "fast"),
        ("both", "race"),
        ("looked up", "asan"),
        ("situ", "fast"),
    ],
)
def test_experts_by_tiles_have_the_bits_of_the_cpu(name: str, mode: str) -> None:
    """Experts in slots, and others in a staging buffer, two at a time; one is elsewhere and left alone."""
    formats, hidden_size, ffn_size, activation, limits = EXPERTS[name]
    n_experts, n_used, n_tokens = 6, 3, 70 if mode == "fast" else 12
    rng, emulator = np.random.default_rng(2), Emulator(mode)
    own_formats = tuple(BY_NAME[f] for f in formats)
    gate, up, down = own_formats
    sizes = Sizes(n_experts, n_used, hidden_size, ffn_size, at_once=2)
    x = rng.standard_normal((n_tokens, hidden_size)).astype(F32)
    ids = np.stack([rng.permutation(n_experts)[:n_used] for _ in range(n_tokens)]).astype(np.int32)
    ids[:, 0] = np.where((ids[:, 1:] == 2).any(1), ids[:, 0], 2)  # one expert is chosen by more than a tile of tokens
    places = np.array([-2, 1, 0, -1, -3, -4], np.int32)
    scale = rng.random(n_experts).astype(F32)
    stacks, biases = random_experts(rng, own_formats, n_experts, hidden_size, ffn_size)
    expected = cpu_experts(x, ids, stacks, own_formats, scale, biases, activation, *limits)
    grids = [grid_of(f) for f in own_formats]
    grid_at = [0 if grid is None else emulator.at(grid) for grid in grids]
    x_gate, x_up = (activations(x, f.activation) for f in (gate, up))
    count = emulator.count(n_tokens)

    def matrices(members: list[int]) -> list[ExpertMatrix]:
        """The experts one after another, as in slots or in a staging buffer."""
        placed = [aligned(np.ascontiguousarray(stack[members])) for stack in stacks]
        return [
            ExpertMatrix(emulator.at(p), p.strides[0], f, emulator.at(scale) if i == 0 else 0, emulator.at(biases[i]))
            for i, (p, f) in enumerate(zip(placed, own_formats, strict=True))
        ]

    groups_of = [matrices([2, 1]), matrices([0, 4]), matrices([5])]
    for order, seed in SCHEDULES if mode != "asan" else SCHEDULES[:1]:
        h = np.full((n_tokens * n_used, ffn_size), np.nan, F32)
        out = np.full((n_tokens, n_used * hidden_size), 7, F32)
        groups, _ = make_groups(emulator, sizes, n_tokens + 1)
        launches = tiles.group_choices(emulator.at(ids), emulator.at(places), sizes, groups, count)
        for group, (gates, ups, _) in enumerate(groups_of):
            number, rows = ctypes.c_int32(group), (emulator.byte_rows(x_gate), emulator.byte_rows(x_up))
            launches.append(
                tiles.expert_gate_up(
                    groups,
                    number,
                    sizes,
                    gates,
                    ups,
                    *rows,
                    emulator.at(h),
                    (grid_at[0], grid_at[1]),
                    activation,
                    *limits,
                    4,
                )
            )
        emulator.run(launches, order, seed)
        h_form = aligned(np.zeros((len(h), kernels.activation_bytes(down.activation, ffn_size)), np.uint8))
        h_rows = emulator.byte_rows(h_form)
        launches = [kernels.quantize(emulator.rows(h), ffn_size, down.activation, h_rows, n_used, count)]
        launches += [
            tiles.expert_down(groups, ctypes.c_int32(i), sizes, downs, h_rows, emulator.rows(out), grid_at[2], 4)
            for i, (_, _, downs) in enumerate(groups_of)
        ]
        emulator.run(launches, order, seed)
        found = out.reshape(n_tokens, n_used, hidden_size)
        elsewhere = ids == 3
        assert elsewhere.any()
        assert (found[elsewhere] == 7).all()
        assert same_bits(found[~elsewhere], expected[~elsewhere])
