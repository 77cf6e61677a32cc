"""Layers that are run at another processor's request, which a Python thread plays here."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from engine import _kernels
from engine.quants.formats import BY_NAME

WIDTH, MAX_TOKENS = 48, 3


class Layers:
    """Programs that each multiply their own rows, and the three words they are asked through."""

    def __init__(self, n_layers: int, n_threads: int) -> None:
        self.flags = np.zeros((3, 16), np.uint32)
        self.x = np.arange(1, n_layers * MAX_TOKENS * WIDTH + 1, dtype=np.float32).reshape(n_layers, MAX_TOKENS, WIDTH)
        self.out = np.zeros_like(self.x)
        self.programs = [_kernels.Program(MAX_TOKENS, 1, n_threads) for _ in range(n_layers)]
        for i, program in enumerate(self.programs):
            x, out = int(self.x[i].ctypes.data), int(self.out[i].ctypes.data)
            program.scale(x, WIDTH, 0, 0, out, WIDTH, WIDTH, 2.0 + i, _kernels.ROWS_TOKENS)
        self.server = _kernels.RequestServer(self.programs, *(int(flag.ctypes.data) for flag in self.flags))
        self.step = _kernels.Step(MAX_TOKENS)
        self.step.n_tokens = MAX_TOKENS
        self.step.positions[:] = np.arange(MAX_TOKENS)

    def ask(self, numbers: list[int], *, must_answer: int) -> None:
        """Make requests one after another, each when the one before was answered; the last `must_answer` are not."""
        for i, number in enumerate(numbers):
            self.flags[0, 0] = number
            end = time.monotonic() + 20
            while i < must_answer and self.flags[1, 0] != number:
                assert time.monotonic() < end
                time.sleep(0)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("first", [1, 2**32 - 2], ids=["small numbers", "numbers that wrap"])
def test_layers_are_run_when_asked_for(n_threads: int, first: int) -> None:
    layers = Layers(4, n_threads)
    asked = [0, 1, 3]  # layer 2 has no request
    numbers = [(first + layer) % 2**32 for layer in (*asked, 4)]
    thread = threading.Thread(target=layers.ask, args=(numbers,), kwargs={"must_answer": len(asked)})
    thread.start()
    assert layers.server.run(layers.step, first, 0, 20.0)
    thread.join()
    for layer in range(4):
        expected = layers.x[layer] * (2.0 + layer) if layer in asked else 0.0
        np.testing.assert_array_equal(layers.out[layer], expected)


def test_the_time_of_each_layer_is_known() -> None:
    layers = Layers(3, 2)
    thread = threading.Thread(target=lambda: (time.sleep(0.05), layers.ask([1, 3, 4], must_answer=2)))
    thread.start()
    start = time.monotonic()
    assert layers.server.run(layers.step, 1, 0, 20.0)
    taken = time.monotonic() - start
    thread.join()
    waited, spent = layers.server.seconds
    assert waited[0] > 0.03  # it was asked after 0.05 s
    assert (spent[[0, 2]] > 0).all()
    assert waited[1] == spent[1] == 0
    assert waited.sum() + spent.sum() <= taken


def test_a_request_from_before_the_step_is_not_served_again() -> None:
    layers = Layers(2, 2)
    layers.flags[0, 0] = 7
    thread = threading.Thread(target=lambda: (time.sleep(0.05), layers.ask([13], must_answer=0)))
    thread.start()
    assert layers.server.run(layers.step, 11, 7, 20.0)
    thread.join()
    assert not layers.out.any()


def test_no_request_in_time_is_an_error() -> None:
    layers = Layers(1, 2)
    layers.flags[:2, 0] = 5, 4
    with pytest.raises(TimeoutError, match=r"no request for 0.01 s; the last was 5, answered 4"):
        layers.server.run(layers.step, 6, 5, 0.01)


def test_an_abandoned_step_ends() -> None:
    """Also if something is asked for."""
    layers = Layers(1, 2)
    layers.flags[2, 0] = 1
    for last in (0, 1):
        layers.flags[0, 0] = 1
        assert not layers.server.run(layers.step, 1, last, 20.0)
        assert layers.flags[1, 0] == 0


def test_programs_and_steps_that_do_not_fit_are_refused() -> None:
    layers = Layers(1, 2)
    address = int(layers.flags.ctypes.data)
    with pytest.raises(ValueError, match="number of programs"):
        _kernels.RequestServer([], address, address, address)
    with pytest.raises(ValueError, match="address of answered is 0"):
        _kernels.RequestServer(layers.programs, address, 0, address)
    with pytest.raises(ValueError, match="same number of threads"):
        _kernels.RequestServer([*layers.programs, _kernels.Program(1, 1, 1)], address, address, address)
    layers.step.n_tokens = MAX_TOKENS + 1
    with pytest.raises(ValueError, match="tokens"):
        layers.server.run(layers.step, 1, 0, 1.0)


class ExpertLayers:
    """Layers of experts of which one token asks for some, with guesses of what it will ask for.

    The other side is a thread that guesses a layer, gives the team time to fetch, and then asks for it.
    """

    N_EXPERTS, N_USED = 6, 3

    def __init__(
        self, n_layers: int, n_threads: int, name: str, hidden_size: int, ffn_size: int, *, shares: bool = False
    ) -> None:
        self.format, self.hidden_size, self.ffn_size = BY_NAME[name], hidden_size, ffn_size
        self.flags = np.zeros((4, 16), np.uint32)
        self.ids, self.guess = np.zeros(self.N_USED, np.int32), np.zeros(self.N_USED, np.int32)
        x = np.random.default_rng(0).standard_normal((1, hidden_size), np.float32)
        self.x = _kernels.quantize_activations(x, self.format.activation)
        self.answer = np.zeros(self.N_USED * hidden_size, np.float32)
        self.keep: list[np.ndarray] = []
        self.programs: list[_kernels.Program] = []
        for i in range(n_layers):
            self.programs.append(self._program(i, n_threads, self.programs[-1] if shares and i else None))
        addresses = [int(flag.ctypes.data) for flag in self.flags]
        self.server = _kernels.RequestServer(self.programs, *addresses, int(self.guess.ctypes.data))
        self.step = _kernels.Step(1)
        self.step.n_tokens = 1

    def _program(self, layer: int, n_threads: int, lender: _kernels.Program | None) -> _kernels.Program:
        hidden_size, ffn_size, ggml_type = self.hidden_size, self.ffn_size, self.format.ggml_type
        matrices = []
        for i, (n_rows, n_cols) in enumerate([(ffn_size, hidden_size)] * 2 + [(hidden_size, ffn_size)]):
            raw = np.empty((self.N_EXPERTS * n_rows, self.format.row_bytes(n_cols)), np.uint8)
            _kernels.fill_random_blocks(ggml_type, raw, n_cols, 3 * layer + i, 1)
            table = raw.ctypes.data + raw.nbytes // self.N_EXPERTS * np.arange(self.N_EXPERTS, dtype=np.int64)
            self.keep += [raw, table]
            matrices.append((int(table.ctypes.data), ggml_type, 0, 0))
        program = _kernels.Program(1, 1, n_threads, lender=lender)
        at = int(self.x.ctypes.data), self.x.strides[0]
        ids, out = int(self.ids.ctypes.data), int(self.answer.ctypes.data)
        form = _kernels.ACTIVATE_SILU, 0.0, 0.0, hidden_size, ffn_size, out, len(self.answer)
        program.experts(*at, *at, ids, self.N_EXPERTS, self.N_USED, *matrices, *form)
        return program

    def compute(self, asked: list[tuple[int, list[int]]]) -> list[np.ndarray]:
        """Return the answers without a server."""
        answers = []
        for layer, ids in asked:
            self.ids[:] = ids
            self.programs[layer].run(self.step)
            answers.append(self.answer.copy())
        return answers

    def serve(self, asked: list[tuple[int, list[int]]], guesses: list[list[int] | None]) -> list[np.ndarray]:
        """Return the answers of one step, in which each request follows its guess, if there is one."""
        answers: list[np.ndarray] = []

        def ask() -> None:
            for (layer, ids), guess in zip(asked, guesses, strict=True):
                if guess is not None:
                    self.guess[:] = guess
                    self.flags[3, 0] = 1 + layer
                    time.sleep(0.2)  # nothing tells when it was seen, and the machine may be busy
                self.ids[:] = ids
                self.flags[0, 0] = 1 + layer
                end = time.monotonic() + 20
                while self.flags[1, 0] != 1 + layer:
                    assert time.monotonic() < end
                    time.sleep(0)
                answers.append(self.answer.copy())
            self.flags[0, 0] = 1 + len(self.programs)

        thread = threading.Thread(target=ask)
        thread.start()
        assert self.server.run(self.step, 1, 0, 20.0)
        thread.join()
        return answers


@pytest.mark.parametrize("name", ["Q4_K", "F32"])
def test_layers_that_share_memory_give_the_same_answers(name: str) -> None:
    asked = [(2, [4, -1, 2]), (0, [5, 0, 3]), (1, [0, 1, 2]), (0, [5, 0, 3])]
    apart, together = (ExpertLayers(3, 2, name, 256, 512, shares=shares) for shares in (False, True))
    for answer, expected in zip(together.compute(asked), apart.compute(asked), strict=True):
        np.testing.assert_array_equal(answer.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["Q4_K", "F32"])
def test_down_waits_for_the_hidden_values_of_its_expert(name: str) -> None:
    random = np.random.default_rng(0)
    alone, team = (ExpertLayers(3, n_threads, name, 256, 2048, shares=True) for n_threads in (1, 5))
    for _ in range(60):  # each time with other hidden values, so that those of the layer before are none of them
        x = _kernels.quantize_activations(random.standard_normal((1, 256), np.float32), alone.format.activation)
        alone.x[:] = team.x[:] = x
        asked = [(layer, random.permutation(6)[:3].tolist()) for layer in random.permutation(3)]
        for answer, expected in zip(team.compute(asked), alone.compute(asked), strict=True):
            np.testing.assert_array_equal(answer.view(np.uint32), expected.view(np.uint32))


def test_the_operations_of_experts_may_be_run_apart() -> None:
    layers = ExpertLayers(1, 3, "Q4_K", 256, 512)
    (expected,) = layers.compute([(0, [4, 1, 2])])
    (program,) = layers.programs
    assert len(program) == 2
    for _ in range(2):
        layers.answer[:] = 0
        program.run(layers.step, 0, 1)
        assert not layers.answer.any()
        program.run(layers.step, 1, 2)
        np.testing.assert_array_equal(layers.answer.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("sizes", [("Q4_K", 256, 512), ("Q8_0", 96, 160), ("F32", 33, 18)], ids=str)
def test_a_guess_changes_no_answer_and_is_counted(sizes: tuple[str, int, int], n_threads: int) -> None:
    asked = [(0, [4, -1, 2]), (1, [5, 0, 3]), (3, [-1, 1, -1])]
    layers = ExpertLayers(4, n_threads, *sizes)
    plain = layers.compute(asked)
    assert all(np.abs(answer).max() > 0 for answer in plain)
    layers.answer[:] = 0
    guesses = [None, [0, -1, 5], [2**30, -7, 1]]  # two of three; then one beside what is no id
    for answer, expected in zip(layers.serve(asked, guesses), plain, strict=True):
        np.testing.assert_array_equal(answer.view(np.uint32), expected.view(np.uint32))
    assert layers.server.guesses.tolist() == [3 + 1, 2 + 1]


def test_guesses_need_a_place_for_their_ids() -> None:
    layers = Layers(1, 1)
    address = int(layers.flags.ctypes.data)
    with pytest.raises(ValueError, match="address of guessed_ids is 0"):
        _kernels.RequestServer(layers.programs, address, address, address, address)
